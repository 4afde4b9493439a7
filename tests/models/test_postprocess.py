"""From predictions to detections by hand, on both sides of every comparison."""

import pytest
import torch

from crosskd_hf.models.box_coding import logits_of_product
from crosskd_hf.models.postprocess import select_detections

IMAGE = (1000, 2000)  # height, width: larger than any box below unless a test says otherwise


def tiles(count: int) -> torch.Tensor:
    """Boxes of 10 pixels that don't touch: 150 a row."""
    index = torch.arange(count)
    corner = torch.stack([index % 150 * 12, index // 150 * 12], dim=1).float()
    return torch.cat([corner, corner + 10], dim=1)


def select(probabilities, boxes, centerness=None, level_sizes=None, image_size=IMAGE, **options) -> dict:
    """Of one image: `probabilities` (P, labels) of the classes instead of logits, `centerness` (P,) too."""
    logits = torch.as_tensor(probabilities, dtype=torch.float32).logit()
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    if centerness is not None:
        centerness = torch.tensor(centerness).logit()[None]
        logits = logits_of_product(logits, centerness[0, :, None])
    sizes, level_sizes = torch.tensor([image_size]), level_sizes or [len(boxes)]
    (found,) = select_detections(logits[None], boxes[None], sizes, centerness, level_sizes, **options)
    return found


def scores(found: dict) -> list[float]:
    return [round(score, 4) for score in found["scores"].tolist()]


# Threshold, top-k, centerness ---------------------------------------------------------------------------------------

PAIRS = [[0.9, 0.5], [0.8, 0.4], [0.3, 0.01], [0.2, 0.01], [0.1, 0.01]]


@pytest.mark.parametrize(
    ("probabilities", "options", "expected"),
    [
        # Strictly above the threshold; a logit of 0 is a probability of exactly .5.
        ([[0.5], [0.5001], [0.4999]], {"score_threshold": 0.5}, [0.5001]),
        ([[0.0501], [0.0499], [0.9]], {}, [0.9, 0.0501]),
        # Two pairs a level: level 0 drops .5 and .4 though level 1's .1 is worse. The cut counts pairs, not priors.
        (PAIRS, {"level_sizes": [2, 3], "max_candidates": 2}, [0.9, 0.8, 0.3, 0.2]),
        (PAIRS, {"level_sizes": [2, 2, 1], "max_candidates": 2}, [0.9, 0.8, 0.3, 0.2, 0.1]),
        # Sorted over levels.
        ([[0.3], [0.9], [0.5], [0.7]], {"level_sizes": [1, 1, 2]}, [0.9, 0.7, 0.5, 0.3]),
        # Centerness multiplies after the threshold: .06 passes and ends at .006; .04 doesn't, whatever its centerness.
        ([[0.06], [0.04]], {"centerness": [0.1, 0.9]}, [0.006]),
        # And after the cut, which keeps .9; .8 * .9 = .72 would have been better.
        ([[0.9], [0.8]], {"centerness": [0.1, 0.9], "max_candidates": 1}, [0.09]),
        ([[0.9], [0.8]], {"centerness": [0.1, 0.9]}, [0.72, 0.09]),
        ([[0.9, 0.4], [0.5, 0.02]], {"centerness": [0.5, 0.8]}, [0.45, 0.4, 0.2]),
    ],
)
def test_threshold_cut_and_centerness(probabilities, options, expected):
    assert scores(select(probabilities, tiles(len(probabilities)), **options)) == expected


def test_every_class_above_the_threshold_is_a_detection():
    found = select([[0.9, 0.02, 0.3], [0.01, 0.6, 0.04]], tiles(2), level_sizes=[1, 1])
    assert scores(found) == [0.9, 0.6, 0.3]
    assert found["labels"].tolist() == [0, 1, 2] and found["labels"].dtype == torch.int64
    assert found["boxes"].tolist() == tiles(2)[[0, 1, 0]].tolist()


def test_a_level_keeps_a_thousand_pairs_and_an_image_the_best_hundred():
    first, second = torch.linspace(0.9, 0.5, 1200), torch.linspace(0.2, 0.1, 50)
    both = torch.cat([first, second])[:, None]
    found = select(both, tiles(1250), level_sizes=[1200, 50], max_detections=5000)
    torch.testing.assert_close(found["scores"], torch.cat([first[:1000], second]))
    torch.testing.assert_close(select(both, tiles(1250))["scores"], first[:100])
    assert len(select(both, tiles(1250), max_detections=7)["scores"]) == 7


def test_equal_scores_keep_the_order_of_levels_and_priors():
    # Eight equal pairs a level and three wanted: those of the first priors, their classes in order.
    found = select([[0.5, 0.5]] * 8, tiles(8), level_sizes=[4, 4], max_candidates=3)
    assert found["boxes"].tolist() == tiles(8)[[0, 0, 1, 4, 4, 5]].tolist()
    assert found["labels"].tolist() == [0, 1, 0, 0, 1, 0]


def test_a_prior_with_many_classes_counts_as_many_pairs():
    # 30 classes of the first prior are the best 30 pairs; the other priors' are below them.
    probabilities = [[0.9 - 0.01 * label for label in range(30)], [0.5] * 30, [0.4] * 30]
    found = select(probabilities, tiles(3), max_candidates=31)
    assert found["labels"].tolist() == [*range(30), 0]
    assert found["boxes"][:30].unique(dim=0).tolist() == tiles(1).tolist()


# Clipping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ([199.5, 0, 250, 10], [199.5, 0, 200, 10]),
        ([200, 0, 250, 10], None),  # on the padding: no width is left
        ([210, 0, 250, 10], None),
        ([0, 99.5, 10, 130], [0, 99.5, 10, 100]),
        ([0, 100, 10, 130], None),
        ([-9, 0, 0, 10], None),
        ([-9, -8, 0.5, 10], [0, 0, 0.5, 10]),
        ([0, -9, 10, 0], None),
        ([20, 20, 20, 30], None),  # no width
        ([20, 20, 30, 20], None),
        ([30, 20, 20, 30], None),  # negative width
        ([30, 30, 20, 20], None),  # both negative: a positive area
    ],
)
def test_boxes_are_clipped_and_dropped_without_area(box, kept):
    found = select([[0.9], [0.8]], [box, [50, 50, 60, 60]], image_size=(100, 200))
    assert found["boxes"].tolist() == [*([kept] if kept else []), [50, 50, 60, 60]]


# Suppression --------------------------------------------------------------------------------------------------------

SQUARE = [0.0, 0, 10, 10]


@pytest.mark.parametrize(
    ("boxes", "options", "expected"),
    [
        # Strictly above the IoU threshold: height / 10. The default is .6.
        ([SQUARE, [0, 0, 10, 5.0]], {"nms_threshold": 0.5}, [0.9, 0.8]),
        ([SQUARE, [0, 0, 10, 5.1]], {"nms_threshold": 0.5}, [0.9]),
        ([SQUARE, [0, 0, 10, 6.0]], {}, [0.9, 0.8]),
        ([SQUARE, [0, 0, 10, 6.1]], {}, [0.9]),
        # A chain: IoU(a, b) = 8/12 = .67 = IoU(b, c), IoU(a, c) = 6/14 = .43. b goes, c stays.
        ([SQUARE, [2, 0, 12, 10], [4, 0, 14, 10]], {}, [0.9, 0.7]),
        # Over levels, too.
        ([SQUARE, SQUARE], {"level_sizes": [1, 1]}, [0.9]),
        # By the scores with centerness, .09 and .72.
        ([SQUARE, [0, 0, 10, 9]], {"centerness": [0.1, 0.9]}, [0.72]),
        # 100 x 10 and 20 x 10 overlap by .2; cut to an image's 20 pixels they are equal.
        ([[0, 0, 100, 10], [0, 0, 20, 10]], {}, [0.9, 0.8]),
        ([[0, 0, 100, 10], [0, 0, 20, 10]], {"image_size": (100, 20)}, [0.9]),
        ([[30, 0, 40, 10], [30, 0, 40, 10]], {"image_size": (100, 20)}, []),
    ],
)
def test_suppression(boxes, options, expected):
    assert scores(select([[0.9], [0.8], [0.7]][: len(boxes)], boxes, **options)) == expected


def test_suppression_is_per_class():
    found = select([[0.9, 0.85], [0.8, 0.01]], [SQUARE, SQUARE])
    assert scores(found) == [0.9, 0.85] and found["labels"].tolist() == [0, 1]


@pytest.mark.parametrize("label", [0, 79, 1202])
def test_classes_far_apart_are_not_rounded(label):
    # IoU .5991 and .6012 of small boxes far from the origin; single precision has steps of 1/4 pixel there.
    probabilities = torch.full((4, label + 1), 0.01)
    probabilities[:, label] = torch.tensor([0.9, 0.8, 0.7, 0.6])
    x = 3990.0
    boxes = [[x, 0, x + 8, 8], [x, 0, x + 8, 4.793], [x, 50, x + 8, 58], [x, 50, x + 8, 54.81]]
    assert scores(select(probabilities, boxes, image_size=(4000, 4000))) == [0.9, 0.8, 0.7]


def test_few_of_many_candidates_are_left():
    # All of the best 1000 candidates are one object; the others are found behind them.
    probabilities = torch.cat([torch.linspace(0.9, 0.5, 1500), torch.linspace(0.4, 0.3, 50)])[:, None]
    boxes = torch.cat([torch.tensor([[500.0, 900, 600, 1000]]).repeat(1500, 1), tiles(50)])
    found = select(probabilities, boxes, max_candidates=5000)
    assert len(found["scores"]) == 51
    assert found["boxes"][1:].tolist() == tiles(50).tolist()


# Batches, and against a plain implementation ------------------------------------------------------------------------


def plain_nms(boxes: torch.Tensor, score: torch.Tensor, label: torch.Tensor, threshold: float) -> list[int]:
    """Box by box in double precision."""
    boxes, kept = boxes.double(), []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    for i in score.argsort(descending=True, stable=True).tolist():
        rivals = [j for j in kept if label[j] == label[i]]
        sides = torch.minimum(boxes[rivals, 2:], boxes[i, 2:]) - torch.maximum(boxes[rivals, :2], boxes[i, :2])
        overlap = sides.clamp(min=0).prod(dim=1)
        if not (overlap / (areas[rivals] + areas[i] - overlap) > threshold).any():
            kept.append(i)
    return kept


def plain_select(logits, boxes, centerness, level_sizes, image_size, count, detections) -> dict:
    """One image, level by level and pair by pair; of equal scores, the first."""
    candidates = []
    for start, size in zip([0, *torch.tensor(level_sizes).cumsum(0).tolist()], level_sizes, strict=False):
        flat = logits[start : start + size].sigmoid().flatten()
        best = flat.argsort(descending=True, stable=True)[:count]
        candidates += [(start + i // logits.shape[1], i % logits.shape[1]) for i in best[flat[best] > 0.05].tolist()]
    prior, label = torch.tensor(candidates, dtype=torch.long).reshape(-1, 2).unbind(1)
    score = logits[prior, label].sigmoid()
    score = score if centerness is None else score * centerness[prior].sigmoid()
    height, width = image_size
    x, y = boxes[prior][:, ::2].clamp(0, width), boxes[prior][:, 1::2].clamp(0, height)
    moved = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)
    real = (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])
    moved, score, label = moved[real], score[real], label[real]
    keep = plain_nms(moved, score, label, 0.6)[:detections]
    return {"scores": score[keep], "labels": label[keep], "boxes": moved[keep]}


@pytest.mark.parametrize(("mean", "labels"), [(-6.0, 80), (-2.5, 80), (0.0, 3), (-1.0, 1)])
@pytest.mark.parametrize(("with_centerness", "tied"), [(False, True), (True, False)])
def test_a_batch_equals_a_plain_implementation(mean, labels, with_centerness, tied):
    torch.manual_seed(0)
    level_sizes = [200, 50, 12, 3, 1]
    sizes = [(300, 400), (250, 310), (1, 1)]
    logits = torch.randn(3, 266, labels) * 1.5 + mean
    if tied:
        logits = logits.round()
    corner = torch.rand(3, 266, 2) * 350 - 10
    boxes = torch.cat([corner, corner + torch.rand(3, 266, 2) * 150 - 5], dim=-1)
    centerness = torch.randn(3, 266) if with_centerness else None
    folded = logits if centerness is None else logits_of_product(logits, centerness[..., None])
    found = select_detections(
        folded, boxes, torch.tensor(sizes), centerness, level_sizes, max_candidates=40, max_detections=25
    )
    for i, image in enumerate(found):
        one = None if centerness is None else centerness[i]
        expected = plain_select(logits[i], boxes[i], one, level_sizes, sizes[i], 40, 25)
        # A sigmoid's last bit depends on the tensor's shape; the product's logits round once more.
        torch.testing.assert_close(
            image["scores"], expected["scores"], rtol=1e-6 if centerness is None else 1e-5, atol=0
        )
        assert image["labels"].tolist() == expected["labels"].tolist()
        assert image["boxes"].tolist() == expected["boxes"].tolist()


def test_an_image_without_detections_among_others():
    logits = torch.tensor([[0.9, 0.01], [0.02, 0.8]]).logit().repeat(3, 1, 1)
    logits[1] = -9
    boxes = tiles(2).repeat(3, 1, 1).requires_grad_()  # gradients do no harm
    found = select_detections(logits, boxes, torch.tensor([IMAGE] * 3), torch.full((3, 2), 9.0), [1, 1])
    assert [image["labels"].tolist() for image in found] == [[0, 1], [], [0, 1]], "images don't suppress each other"
    assert found[1]["scores"].shape == (0,) and found[1]["boxes"].shape == (0, 4)
    assert found[1]["labels"].dtype == torch.int64
