"""What a dense detector shows to a method: taps, predictions, targets; and what it isn't asked for."""

import pytest
import torch
from tiny import tiny_batch, tiny_model
from torch import nn

from crosskd_hf.distillation import PairError
from crosskd_hf.distillation.observers.dense import DenseObserver
from crosskd_hf.models.box_coding import logits_of_product
from crosskd_hf.models.targets import relative_boxes

pytestmark = pytest.mark.usefixtures("one_thread")

DETECTORS = ("gfl", "retinanet", "fcos", "atss")
FIELDS = ("logits", "bins", "quality", "mask", "boxes_xyxy")


def observer_of(detector: str = "gfl", k: int | None = None, raw: bool = False, **options) -> DenseObserver:
    """With predictions, of a detector whose levels have scales of their own."""
    model = tiny_model(detector).eval().requires_grad_(False)
    for level, scale in enumerate(model.head.scales.parameters() if hasattr(model.head, "scales") else ()):
        scale.fill_(1 + level / 10)
    observer = DenseObserver(model, **options)
    observer.ask_for_predictions()
    if k is not None:
        observer.ask_for_taps(k, raw)
    return observer


def calls(module: nn.Module) -> list:
    """Its forward passes, noted as they come."""
    noted: list = []
    module.register_forward_hook(lambda *_: noted.append(1))
    return noted


# Taps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "raw"), [(0, False), (1, True), (2, False), (4, False), (4, True)])
def test_taps_are_the_heads_after_k_blocks(k, raw):
    observer, pixels = observer_of("gfl", k, raw), tiny_batch()["pixel_values"]
    shown = observer(pixels)
    head = observer.model.head(shown.features, tap_index=k, raw_taps=raw)
    for maps, expected in ((shown.taps.cls, head.cls_taps), (shown.taps.reg, head.reg_taps)):
        assert all(map(torch.equal, maps, expected)) and len(maps) == 5
    assert shown.taps.rectified == (k > 0)
    assert all(tap is level for tap, level in zip(shown.taps.cls, shown.features, strict=True)) == (k == 0)
    assert any((level < 0).any() for level in shown.taps.cls) == (raw or k == 0)


@pytest.mark.parametrize(("k", "expected"), [(0, 16), (1, 32), (4, 32)])
def test_channels_at_the_tap(k, expected):
    observer = DenseObserver(tiny_model(fpn_channels=16))
    observer.ask_for_taps(k)
    assert observer.tap_channels() == {"cls": expected, "reg": expected}
    assert observer.feature_channels == 16 and observer.model_type == "crosskd_gfl"


@pytest.mark.parametrize("k", [-1, 5])
def test_taps_that_there_are_not_are_refused(k):
    with pytest.raises(PairError, match=f"the tap is {k}, the towers have 4 blocks"):
        observer_of().ask_for_taps(k)


@pytest.mark.parametrize("other", [(2, False), (3, True)])
def test_two_methods_may_tap_the_same_only(other):
    observer = observer_of(k=3)
    observer.ask_for_taps(3, raw=False)
    with pytest.raises(PairError, match="two methods tap different states"):
        observer.ask_for_taps(*other)


@pytest.mark.parametrize(("detector", "k"), [("gfl", 0), ("retinanet", 1), ("fcos", 2), ("atss", 3), ("gfl", 4)])
def test_finishing_its_own_taps_gives_its_own_predictions(k, detector):
    observer, batch = observer_of(detector, k), tiny_batch()
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[:, :32, :50] = True
    shown = observer(batch["pixel_values"], mask)
    finished = observer.finish(shown.taps, shown)
    for name in FIELDS:
        found, expected = getattr(finished, name), getattr(shown.predictions, name)
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected), name


# Predictions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", DETECTORS)
def test_predictions_are_the_detectors_own(detector):
    observer, pixels = observer_of(detector), tiny_batch()["pixel_values"]
    shown, output = observer(pixels).predictions, observer.model(pixels)
    logits = shown.logits if shown.quality is None else logits_of_product(shown.logits, shown.quality[..., None])
    assert torch.equal(logits, output.logits)
    assert torch.equal(relative_boxes(shown.boxes_xyxy, torch.tensor([[64, 96]] * 2)), output.pred_boxes)
    assert (shown.quality is None) == (output.centerness is None)
    assert shown.quality is None or torch.equal(shown.quality, output.centerness)
    assert (shown.bins is None) == (detector != "gfl")
    assert shown.bins is None or shown.bins.shape == (*shown.logits.shape[:2], 4, 17)


@pytest.mark.parametrize(("detector", "of_padding"), [("gfl", 0), ("retinanet", 0), ("atss", 0), ("fcos", 1)])
def test_padding_is_masked_unless_the_detector_trains_on_it(detector, of_padding):
    mask = torch.zeros(1, 64, 96, dtype=torch.bool)
    mask[:, :32, :64] = True
    observer = observer_of(detector)
    shown = observer(torch.zeros(1, 3, 64, 96), mask)
    inside = observer.model.valid_priors(shown.context.priors, torch.tensor([[32.0, 64.0]]))
    assert (shown.predictions.mask[inside] == 1).all() and (shown.predictions.mask[~inside] == of_padding).all()
    assert inside.any() and not inside.all()


def test_classes_are_picked_in_the_given_order():
    whole, some = observer_of(k=3), observer_of(k=3, classes=torch.tensor([1, 0]))
    pixels = tiny_batch()["pixel_values"]
    shown = some(pixels)
    logits = whole(pixels).predictions.logits
    assert torch.equal(shown.predictions.logits, logits[..., [1, 0]])
    assert torch.equal(some.finish(shown.taps, shown).logits, logits[..., [1, 0]])


@pytest.mark.parametrize("detector", DETECTORS)
def test_levels_are_restricted_in_everything(detector):
    """To the second and the third: a cross pass scales them as the whole head does."""
    pixels, mask = tiny_batch()["pixel_values"], torch.ones(2, 64, 96, dtype=torch.bool)
    mask[:, 32:] = False
    whole, some = observer_of(detector, 2)(pixels, mask), observer_of(detector, 2, levels=(1, 2))
    shown = some(pixels, mask)
    assert shown.strides == (16, 32) and whole.strides == (8, 16, 32, 64, 128)
    for name in ("cls", "reg"):
        assert all(map(torch.equal, getattr(shown.taps, name), getattr(whole.taps, name)[1:3]))
    assert len(shown.features) == 2 and all(map(torch.equal, shown.features, whole.features[1:3]))
    first, second, third = whole.context.priors.level_sizes[:3]
    priors = shown.context.priors
    assert priors.level_sizes == [second, third] and priors.strides.unique().tolist() == [16, 32]
    for predictions in (shown.predictions, some.finish(shown.taps, shown)):
        for name in FIELDS:
            found, expected = getattr(predictions, name), getattr(whole.predictions, name)
            if expected is not None:
                assert torch.equal(found, expected[:, first : first + second + third]), name


# Only what is asked for ---------------------------------------------------------------------------------------------


def test_without_labels_taps_and_predictions_the_head_is_not_run():
    """As of a teacher by whose features alone a student learns."""
    observer = DenseObserver(tiny_model())
    heads, shown = calls(observer.model.head), observer(tiny_batch()["pixel_values"])
    assert not heads and len(shown.features) == 5
    assert shown.taps is shown.predictions is shown.targets is None and not shown.loss_dict


@pytest.mark.parametrize("detector", ["gfl", "fcos"])
def test_losses_and_targets_are_the_detectors_own(detector):
    observer, batch = DenseObserver(tiny_model(detector)), tiny_batch()
    shown, output = observer(**batch), observer.model(**batch)
    assert shown.loss_dict == output.loss_dict
    targets, losses = shown.targets, shown.context.losses
    assert targets.image_sizes.tolist() == [[64, 96]] * 2
    boxes = relative_boxes(targets.boxes_xyxy, targets.image_sizes)
    torch.testing.assert_close(boxes[0, :1], batch["labels"][0]["boxes"])
    assert torch.equal(targets.labels[1], batch["labels"][1]["class_labels"])
    assert targets.box_mask.tolist() == [[True, False], [True, True]]
    assert targets.positive is losses.assignment.positive and targets.positive.any()
    assert targets.mask is losses.assignment.class_weights
    assert targets.class_normalizer is losses.class_normalizer and targets.box_normalizer is losses.box_normalizer


def test_labels_are_alike_where_priors_and_assignment_are():
    observers = [DenseObserver(tiny_model(**options)) for options in ({}, {}, {"anchor_scale": 4})]
    observers.append(DenseObserver(tiny_model("atss")))
    assert [observers[0].labels_like(other) for other in observers] == [True, True, False, False]
