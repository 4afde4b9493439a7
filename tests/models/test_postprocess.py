"""From predictions to detections by hand, on both sides of every comparison."""

import math

import pytest
import torch

from crosskd_hf.models.postprocess import clip_boxes, select_detections

IMAGE = (1000, 2000)  # height, width: larger than any box below unless a test says otherwise


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def tiles(count: int) -> torch.Tensor:
    """Boxes of 10 pixels that don't touch: 150 a row."""
    index = torch.arange(count)
    corner = torch.stack([index % 150 * 12, index // 150 * 12], dim=1).float()
    return torch.cat([corner, corner + 10], dim=1)


def select(
    probabilities, boxes, centerness=None, level_sizes=None, image_size=IMAGE, scale=(1.0, 1.0), **options
) -> dict:
    """Of one image: `probabilities` (P, labels) instead of logits, `centerness` (P,) too."""
    logits = torch.tensor(probabilities, dtype=torch.float32).logit()
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    if centerness is not None:
        centerness = torch.tensor(centerness).logit()[None]
    sizes, level_sizes = torch.tensor([image_size]), level_sizes or [len(boxes)]
    (found,) = select_detections(logits[None], boxes[None], centerness, level_sizes, sizes, [scale], **options)
    return found


def scores(found: dict) -> list[float]:
    return [round(score, 4) for score in found["scores"].tolist()]


# Threshold and top-k ------------------------------------------------------------------------------------------------


def test_score_is_strictly_above_the_threshold():
    # A logit of 0 is a probability of exactly .5.
    logits = torch.tensor([[0.0], [1e-3], [-1e-3]])
    found = select_detections(logits[None], tiles(3)[None], None, [3], torch.tensor([IMAGE]), score_threshold=0.5)[0]
    assert found["boxes"].tolist() == tiles(3)[1:2].tolist()


def test_default_threshold():
    assert scores(select([[0.0501], [0.0499], [0.9]], tiles(3))) == [0.9, 0.0501]


def test_every_class_above_the_threshold_is_a_detection():
    found = select([[0.9, 0.02, 0.3], [0.01, 0.6, 0.04]], tiles(2))
    assert scores(found) == [0.9, 0.6, 0.3]
    assert found["labels"].tolist() == [0, 1, 2] and found["labels"].dtype == torch.int64
    assert found["boxes"].tolist() == tiles(2)[[0, 1, 0]].tolist()


def test_each_level_keeps_its_best_pairs():
    # Two pairs a level. Level 0 drops .5 and .4 though level 1's .1 is worse; the cut counts pairs, not priors.
    probabilities = [[0.9, 0.5], [0.8, 0.4], [0.3, 0.01], [0.2, 0.01], [0.1, 0.01]]
    found = select(probabilities, tiles(5), level_sizes=[2, 3], max_candidates=2)
    assert scores(found) == [0.9, 0.8, 0.3, 0.2]
    found = select(probabilities, tiles(5), level_sizes=[2, 2, 1], max_candidates=2)
    assert scores(found) == [0.9, 0.8, 0.3, 0.2, 0.1]


def test_labels_and_boxes_of_later_levels_are_found():
    found = select([[0.01, 0.02], [0.01, 0.9], [0.8, 0.01]], tiles(3), level_sizes=[1, 1, 1])
    assert found["labels"].tolist() == [1, 0]
    assert found["boxes"].tolist() == tiles(3)[1:].tolist()


def test_default_cut_is_a_thousand_pairs_a_level():
    first = torch.linspace(0.9, 0.5, 1200)
    second = torch.linspace(0.2, 0.1, 50)
    probabilities = torch.cat([first, second])[:, None].tolist()
    found = select(probabilities, tiles(1250), level_sizes=[1200, 50], max_detections=5000)
    assert len(found["scores"]) == 1050
    torch.testing.assert_close(found["scores"][999], first[999])
    torch.testing.assert_close(found["scores"][1000], second[0])


# Centerness ---------------------------------------------------------------------------------------------------------


def test_centerness_multiplies_the_score_after_the_threshold():
    # .06 passes and ends at .006; .04 doesn't, whatever its centerness.
    found = select([[0.06], [0.04]], tiles(2), centerness=[0.1, 0.9])
    assert scores(found) == [0.006]


def test_centerness_multiplies_the_score_after_the_cut():
    # The cut keeps .9, which becomes .09; .8 * .9 = .72 would have been better.
    found = select([[0.9], [0.8]], tiles(2), centerness=[0.1, 0.9], max_candidates=1)
    assert scores(found) == [0.09]


def test_centerness_decides_order_and_suppression():
    box = [[0.0, 0, 10, 10], [0, 0, 10, 9]]
    found = select([[0.9], [0.8]], box, centerness=[0.1, 0.9])
    assert scores(found) == [0.72] and found["boxes"].tolist() == [box[1]]
    assert scores(select([[0.9], [0.8]], tiles(2), centerness=[0.1, 0.9])) == [0.72, 0.09]


def test_centerness_is_a_priors_for_all_its_classes():
    found = select([[0.9, 0.4], [0.5, 0.02]], tiles(2), centerness=[0.5, 0.8])
    assert scores(found) == [0.45, 0.4, 0.2]
    assert found["labels"].tolist() == [0, 0, 1]


# Clipping and rescaling ---------------------------------------------------------------------------------------------


def test_clips_to_height_and_width():
    boxes = torch.tensor([[-10.0, -20, 500, 600], [3, 4, 5, 6], [150, 70, 250, 90]])
    expected = [[0, 0, 200, 100], [3, 4, 5, 6], [150, 70, 200, 90]]
    assert clip_boxes(boxes, (100, 200)).tolist() == expected
    assert clip_boxes(boxes[None, :, None], (100, 200)).shape == (1, 3, 1, 4)


def test_clips_to_the_image_and_then_divides_by_the_factors():
    # Height factor .5, width factor .25.
    found = select([[0.9]], [[-10.0, -20, 500, 600]], image_size=(100, 200), scale=(0.5, 0.25))
    assert found["boxes"].tolist() == [[0, 0, 800, 200]]
    found = select([[0.9]], [[10.0, 20, 30, 40]], image_size=(100, 200), scale=(0.5, 0.25))
    assert found["boxes"].tolist() == [[40, 40, 120, 80]]


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ([199.5, 0, 250, 10], True),
        ([200, 0, 250, 10], False),  # on the padding: no width is left
        ([210, 0, 250, 10], False),
        ([0, 99.5, 10, 130], True),
        ([0, 100, 10, 130], False),
        ([-9, 0, 0, 10], False),
        ([-9, 0, 0.5, 10], True),
        ([0, -9, 10, 0], False),
        ([20, 20, 20, 30], False),  # no width
        ([20, 20, 30, 20], False),
        ([30, 20, 20, 30], False),  # negative width
        ([30, 30, 20, 20], False),  # both negative: a positive area
    ],
)
def test_boxes_without_area_inside_the_image_are_dropped(box, kept):
    found = select([[0.9], [0.8]], [box, [50, 50, 60, 60]], image_size=(100, 200))
    assert scores(found) == ([0.9, 0.8] if kept else [0.8])


def test_dropped_boxes_suppress_nothing_and_overlap_counts_after_the_clip():
    # 100 x 10 and 20 x 10 overlap by .2; cut to the image's 20 pixels they are equal.
    boxes = [[0, 0, 100, 10], [0, 0, 20, 10]]
    assert scores(select([[0.9], [0.8]], boxes, image_size=(100, 200))) == [0.9, 0.8]
    assert scores(select([[0.9], [0.8]], boxes, image_size=(100, 20))) == [0.9]
    # Both lose their area.
    assert scores(select([[0.9], [0.8]], [[30, 0, 40, 10], [30, 0, 40, 10]], image_size=(100, 20))) == []


# Suppression --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "kept"), [(4.9, 2), (5.0, 2), (5.1, 1)])
def test_suppresses_strictly_above_the_iou_threshold(height, kept):
    # IoU height / 10, .5 exactly in the middle.
    found = select([[0.9], [0.8]], [[0, 0, 10, 10], [0, 0, 10, height]], nms_threshold=0.5)
    assert scores(found) == [0.9, 0.8][:kept]


@pytest.mark.parametrize(("height", "kept"), [(5.9, 2), (6.1, 1)])
def test_default_iou_threshold(height, kept):
    assert len(select([[0.9], [0.8]], [[0, 0, 10, 10], [0, 0, 10, height]])["scores"]) == kept


def test_iou_of_exactly_six_tenths_is_not_above_the_threshold():
    assert len(select([[0.9], [0.8]], [[0, 0, 10, 10], [0, 0, 10, 6]])["scores"]) == 2


def test_suppression_is_per_class():
    box = [0.0, 0, 10, 10]
    found = select([[0.9, 0.85], [0.8, 0.01]], [box, box])
    assert scores(found) == [0.9, 0.85]
    assert found["labels"].tolist() == [0, 1]


def test_suppressed_boxes_suppress_nothing():
    # A chain: IoU(a, b) = 8/12 = .67 = IoU(b, c), IoU(a, c) = 6/14 = .43. b goes, c stays.
    boxes = [[0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10]]
    assert scores(select([[0.9], [0.8], [0.7]], boxes)) == [0.9, 0.7]


def test_keeps_the_best_hundred_of_all_classes():
    probabilities = torch.linspace(0.9, 0.3, 150).reshape(75, 2)
    found = select(probabilities.tolist(), tiles(75))
    torch.testing.assert_close(found["scores"], probabilities.flatten()[:100])
    assert len(select(probabilities.tolist(), tiles(75), max_detections=7)["scores"]) == 7


def test_detections_are_sorted_over_levels():
    found = select([[0.3], [0.9], [0.5], [0.7]], tiles(4), level_sizes=[1, 1, 2])
    assert scores(found) == [0.9, 0.7, 0.5, 0.3]


@pytest.mark.parametrize("centerness", [None, [0.5, 0.5]])
def test_nothing_found_is_empty(centerness):
    found = select([[0.01, 0.02], [0.03, 0.04]], tiles(2), centerness=centerness, level_sizes=[1, 1])
    assert found["scores"].shape == (0,)
    assert found["labels"].shape == (0,) and found["labels"].dtype == torch.int64
    assert found["boxes"].shape == (0, 4)


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


def plain_select(logits, boxes, centerness, level_sizes, image_size, scale, count, detections) -> dict:
    """One image, level by level and pair by pair; of equal scores, the first."""
    candidates = []
    for start, size in zip([0, *torch.tensor(level_sizes).cumsum(0).tolist()], level_sizes, strict=False):
        flat = logits[start : start + size].sigmoid().flatten()
        best = flat.argsort(descending=True, stable=True)[:count]
        candidates += [(start + i // logits.shape[1], i % logits.shape[1]) for i in best[flat[best] > 0.05].tolist()]
    prior, label = torch.tensor(candidates, dtype=torch.long).reshape(-1, 2).unbind(1)
    score = logits[prior, label].sigmoid()
    score = score if centerness is None else score * centerness[prior].sigmoid()
    height, width = scale
    moved = clip_boxes(boxes[prior], image_size) / torch.tensor([width, height, width, height])
    real = (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])
    moved, score, label = moved[real], score[real], label[real]
    keep = plain_nms(moved, score, label, 0.6)[:detections]
    return {"scores": score[keep], "labels": label[keep], "boxes": moved[keep]}


@pytest.mark.parametrize(("mean", "labels"), [(-6.0, 80), (-2.5, 80), (0.0, 3), (-1.0, 1)])
@pytest.mark.parametrize("with_centerness", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_batch_equals_a_plain_implementation(mean, labels, with_centerness, tied):
    torch.manual_seed(0)
    level_sizes, sizes, scales = (
        [200, 50, 12, 3, 1],
        [(300, 400), (250, 310), (1, 1)],
        [(0.5, 0.7), (2.0, 2.0), (1, 1)],
    )
    logits = torch.randn(3, 266, labels) * 1.5 + mean
    if tied:
        logits = logits.round()
    corner = torch.rand(3, 266, 2) * 350 - 10
    boxes = torch.cat([corner, corner + torch.rand(3, 266, 2) * 150 - 5], dim=-1)
    centerness = torch.randn(3, 266) if with_centerness else None
    found = select_detections(
        logits, boxes, centerness, level_sizes, torch.tensor(sizes), scales, max_candidates=40, max_detections=25
    )
    for i, own in enumerate(found):
        own_centerness = None if centerness is None else centerness[i]
        expected = plain_select(logits[i], boxes[i], own_centerness, level_sizes, sizes[i], scales[i], 40, 25)
        # A sigmoid's last bit depends on the tensor's shape.
        torch.testing.assert_close(own["scores"], expected["scores"], rtol=1e-6, atol=0)
        assert own["labels"].tolist() == expected["labels"].tolist()
        assert own["boxes"].tolist() == expected["boxes"].tolist()


def test_an_image_without_detections_among_others():
    logits = torch.tensor([[0.9, 0.01], [0.02, 0.8]]).logit().repeat(3, 1, 1)
    logits[1] = -9
    found = select_detections(logits, tiles(2).repeat(3, 1, 1), None, [1, 1], torch.tensor([IMAGE] * 3))
    assert [own["labels"].tolist() for own in found] == [[0, 1], [], [0, 1]]
    assert found[1]["boxes"].shape == (0, 4) and found[1]["labels"].dtype == torch.int64


def test_images_of_a_batch_have_their_own_size_and_scale():
    boxes = torch.tensor([[[0.0, 0, 50, 50]]]).repeat(2, 1, 1)
    sizes, scales = torch.tensor([(40, 30), (100, 100)]), [(2.0, 0.5), (1.0, 1.0)]
    found = select_detections(torch.ones(2, 1, 1), boxes, None, [1], sizes, scales)
    assert [own["boxes"].tolist() for own in found] == [[[0, 0, 60, 20]], [[0, 0, 50, 50]]]
    found = select_detections(torch.ones(2, 1, 1), boxes, None, [1], sizes)
    assert [own["boxes"].tolist() for own in found] == [[[0, 0, 30, 40]], [[0, 0, 50, 50]]]


def test_images_of_a_batch_do_not_suppress_each_other():
    found = select_detections(
        torch.tensor([[[2.0]], [[1.0]]]), tiles(1).repeat(2, 1, 1), None, [1], torch.tensor([IMAGE] * 2)
    )
    assert [len(own["scores"]) for own in found] == [1, 1]


def test_equal_scores_keep_the_order_of_levels_and_priors():
    # Eight equal pairs a level and three wanted: those of the first priors, their classes in order.
    found = select([[0.5, 0.5]] * 8, tiles(8), level_sizes=[4, 4], max_candidates=3)
    assert found["boxes"].tolist() == tiles(8)[[0, 0, 1, 4, 4, 5]].tolist()
    assert found["labels"].tolist() == [0, 1, 0, 0, 1, 0]


def test_a_class_is_suppressed_over_levels():
    box = [0.0, 0, 10, 10]
    found = select([[0.01, 0.9], [0.01, 0.8], [0.7, 0.01]], [box] * 3, level_sizes=[1, 1, 1])
    assert scores(found) == [0.9, 0.7]


def test_a_prior_with_many_classes_counts_as_many_pairs():
    # 30 classes of the first prior are the best 30 pairs; the other priors' are below them.
    probabilities = [[0.9 - 0.01 * label for label in range(30)], [0.5] * 30, [0.4] * 30]
    found = select(probabilities, tiles(3), max_candidates=31)
    assert found["labels"].tolist() == [*range(30), 0]
    assert found["boxes"][:30].unique(dim=0).tolist() == tiles(1).tolist()


@pytest.mark.parametrize("label", [0, 79, 1202])
def test_classes_far_apart_are_not_rounded(label):
    # IoU .5991 and .6012 of small boxes far from the origin; single precision has steps of 1/4 pixel there.
    probabilities = torch.full((4, label + 1), 0.01)
    probabilities[:, label] = torch.tensor([0.9, 0.8, 0.7, 0.6])
    x = 3990.0
    boxes = [[x, 0, x + 8, 8], [x, 0, x + 8, 4.793], [x, 50, x + 8, 58], [x, 50, x + 8, 54.81]]
    assert scores(select(probabilities.tolist(), boxes, image_size=(4000, 4000))) == [0.9, 0.8, 0.7]


def test_few_of_many_candidates_are_left():
    # All of the best 1000 candidates are one object; the others are found behind them.
    probabilities = torch.cat([torch.linspace(0.9, 0.5, 1500), torch.linspace(0.4, 0.3, 50)])[:, None].tolist()
    boxes = torch.cat([torch.tensor([[500.0, 900, 600, 1000]]).repeat(1500, 1), tiles(50)])
    found = select(probabilities, boxes, max_candidates=5000)
    assert len(found["scores"]) == 51
    assert found["boxes"][1:].tolist() == tiles(50).tolist()


def test_outputs_with_gradients_are_selected_as_others():
    logits = torch.tensor([[[2.0], [1.0]]], requires_grad=True)
    found = select_detections(logits, tiles(2)[None].requires_grad_(), None, [2], torch.tensor([IMAGE]))
    assert len(found[0]["scores"]) == 2
