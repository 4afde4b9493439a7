"""The methods beside CrossKD on tiny pairs: what they train, what they refuse, batches without labels; CWD's maps and
FGD's masks by hand. Their values are compared in `test_kd_golden.py`."""

import pytest
import torch
from query_models import query_batch, query_model
from tiny import tiny_batch, tiny_model

from crosskd_hf.distillation import BCKD, CWD, FGD, LD, MGD, CrossKD, DistillationPair, PairError
from crosskd_hf.distillation.methods.cwd import logit_maps
from crosskd_hf.distillation.methods.fgd import attention, object_mask
from crosskd_hf.distillation.observation import Observation, Predictions, Targets
from crosskd_hf.distillation.regions import per_level, valuable_region

TERMS = {
    BCKD: {"bckd_cls", "bckd_box"},
    CWD: {"cwd"},
    FGD: {"fgd_foreground", "fgd_background", "fgd_attention", "fgd_relation"},
    LD: {"ld_main", "ld_region", "ld_class", "ld_imitation"},
    MGD: {"mgd"},
}


def pair_of(method, student: str = "gfl", teacher: str = "gfl", **options) -> DistillationPair:
    """A student that is narrower than its teacher."""
    return DistillationPair(tiny_model(student, fpn_channels=16, **options), tiny_model(teacher, seed=1), [method])


@pytest.mark.parametrize("kind", TERMS)
def test_every_term_has_a_gradient_and_the_teacher_none(kind: type) -> None:
    pair = pair_of(kind())
    before = {name: value.clone() for name, value in pair.teacher.state_dict().items()}
    output = pair(**tiny_batch())
    assert TERMS[kind] <= output.loss_dict.keys()
    terms = {name: output.loss_dict[name] for name in TERMS[kind]}
    assert all(torch.isfinite(term) and term > 0 for term in terms.values()), terms
    torch.stack(list(terms.values())).sum().backward()
    trained = [name for name, p in pair.student.backbone.named_parameters() if p.grad is not None and p.grad.any()]
    assert trained, "the backbone learns by it"
    assert all(p.grad is not None for p in pair.methods.parameters())
    assert all(torch.equal(value, before[name]) for name, value in pair.teacher.state_dict().items())
    assert not [name for name in pair.student.state_dict() if "method" in name or "context" in name]


@pytest.mark.parametrize("kind", TERMS)
def test_images_without_boxes_and_without_labels(kind: type) -> None:
    pair = pair_of(kind())
    batch = tiny_batch()
    for label in batch["labels"]:
        label["boxes"], label["class_labels"] = label["boxes"][:0], label["class_labels"][:0]
    output = pair(**batch)
    assert all(torch.isfinite(term) for term in output.loss_dict.values())
    alone = pair(batch["pixel_values"])
    assert alone.loss_dict.keys() == TERMS[kind] and torch.isfinite(alone.loss)
    alone.loss.backward()
    assert all(p.grad is not None for p in pair.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("method", "student", "teacher", "message"),
    [
        (
            LD(),
            "retinanet",
            "gfl",
            r"ld: .* are crosskd_retinanet and crosskd_gfl; it is for two GFL",
        ),
        (LD(), "atss", "atss", r"ld: .* whose boxes are distributions"),
        (BCKD(), "gfl", "retinanet", r"bckd: student and teacher have 1 and 9 priors per cell"),
        (
            CWD(CWD.Settings(maps="logits")),
            "gfl",
            "retinanet",
            r"1 and 9 priors per cell: set distillation.cwd.maps=features",
        ),
    ],
)
def test_pairs_that_cannot_be(method, student: str, teacher: str, message: str) -> None:
    with pytest.raises(PairError, match=message):
        pair_of(method, student, teacher)


def test_levels_that_differ_are_refused_by_bckd_and_shared_by_cwd() -> None:
    with pytest.raises(PairError, match=r"bckd: student and teacher have different strides"):
        pair_of(BCKD(), strides=[8, 16, 32, 64])
    pair = pair_of(CWD(), strides=[8, 16, 32, 64])
    assert pair(**tiny_batch()).loss_dict["cwd"] > 0


@pytest.mark.parametrize(("teacher", "on", "weight"), [("gfl", "logits", 5.0), ("retinanet", "features", 10.0)])
def test_published_settings_go_by_the_teacher(teacher: str, on: str, weight: float) -> None:
    method = CWD()
    pair_of(method, teacher, teacher)
    assert method.resolved == CWD.Settings(on, weight, 1.0)
    focal = FGD(FGD.Settings(relation_weight=0.5))
    pair_of(focal, "fcos", "fcos")
    assert focal.resolved == FGD.Settings(1.6e-3, 8e-4, 8e-4, 0.5, 0.8)


@pytest.mark.parametrize("kind", [CWD, MGD])
def test_query_based_detectors_learn_by_features(kind: type) -> None:
    pair = DistillationPair(query_model("rt_detr"), query_model("rt_detr", seed=1), [kind()])
    term = pair(**query_batch()).loss_dict[kind.name]
    assert torch.isfinite(term) and term > 0
    with pytest.raises(PairError, match=r"fgd: rt_detr doesn't show where objects are: take pkd, cwd or mgd"):
        DistillationPair(query_model("rt_detr"), query_model("rt_detr", seed=1), [FGD()])
    for method in (BCKD(), LD()):
        with pytest.raises(PairError, match=r"(bckd|ld|rt_detr)"):
            DistillationPair(query_model("rt_detr"), query_model("rt_detr", seed=1), [method])


def test_methods_stand_beside_each_other() -> None:
    pair = pair_of(CrossKD())
    together = DistillationPair(pair.student, pair.teacher, [CrossKD(), BCKD(), CWD(), FGD(), LD(), MGD()])
    names = together(**tiny_batch()).loss_dict.keys()
    assert {"kd_cls", "kd_box"}.union(*TERMS.values()) <= names


def test_logits_as_maps() -> None:
    """Two anchors a cell, two classes: a channel is an anchor's class; a level of 1 x 2 cells, and one of a cell."""
    logits = torch.arange(12.0).reshape(1, 6, 2)  # prior, class
    shown = Predictions(logits, sides=lambda: (logits, logits), mask=torch.ones(1, 6))
    features = [torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 1)]
    first, second = logit_maps(Observation(features=features, predictions=shown))
    assert first.shape == (1, 4, 1, 2) and second.shape == (1, 4, 1, 1)
    assert first[0, :, 0].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert second[0, :, 0, 0].tolist() == [8, 9, 10, 11]


def test_masks_of_objects() -> None:
    """A map of 4 x 4 cells of 8 pixels. The box 8..15 x 0..7 reaches from cell 1 to 2 and from 0 to 1: 4 cells; the
    other has one cell more on each side, of which two rows lie outside."""
    boxes = torch.tensor([[[8.0, 0, 15, 7], [0, 17, 31, 60], [9, 9, 9, 9]]])
    mask = torch.tensor([[True, True, False]])
    nothing, one = torch.zeros(0), torch.ones(())
    targets = Targets(boxes, mask.long(), mask, torch.tensor([[32.0, 32]]), nothing, nothing, one, one)
    found = object_mask(targets, torch.zeros(1, 1, 4, 4))[0]
    quarter, part = 0.25, 1 / (5 * 7)
    assert found[:2].tolist() == [[0, quarter, quarter, 0]] * 2
    torch.testing.assert_close(found[2:], torch.full((2, 4), part))
    assert not object_mask(None, torch.zeros(1, 1, 4, 4)).any()


def test_attention_is_1_on_average() -> None:
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    spatial, channel = attention(features, 0.5)
    torch.testing.assert_close(spatial.mean((1, 2)), torch.ones(2))
    torch.testing.assert_close(channel.mean(1), torch.ones(2))


def test_regions_by_hand() -> None:
    """Four anchors of 8 x 8 in a row, one box of 8 x 8 on the first: IoUs 1, 0, 0, 0, mean 1/4, deviation 1/2, so that
    the threshold is 3/4, and a prior is valuable from 3/16 on. None is: the first is above, the others below."""
    anchors = torch.tensor([[float(8 * i), 0, 8 * i + 8, 8] for i in range(4)])
    valid, mask = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    box = torch.tensor([[[0.0, 0, 8, 8]]])
    assert valuable_region(anchors, [4], valid, box, mask).tolist() == [[0, 0, 0, 0]]
    # Moved by half a side: 1/2 of two anchors is covered; IoU 1/3 each, mean 1/6, deviation 0.19245, threshold 0.359.
    # Centres 4 apart, corners 12 x 8 apart: 1/2 - 16/208 = 0.423 is above; the third has no overlap.
    moved = box + torch.tensor([4.0, 0, 4, 0])
    assert valuable_region(anchors, [4], valid, moved, mask).tolist() == [[0, 0, 0, 0]]
    # By three quarters: 1/4 of the first, 3/4 of the second: IoU 1/7 and 3/5, mean 0.18571, deviation 0.28452, from
    # 0.11756 to 0.47024. First: 1/4 - 36/260 = 0.1115 is below. By 5 pixels: 3/8 - 25/233 = 0.268 is inside.
    assert valuable_region(anchors, [4], valid, box + torch.tensor([6.0, 0, 6, 0]), mask)[0, 0] == 0
    inside = valuable_region(anchors, [4], valid, box + torch.tensor([5.0, 0, 5, 0]), mask)
    assert inside[0, 0].item() == pytest.approx(3 / 13) and not inside[0, 2:].any()
    assert per_level(torch.tensor([[True, False, True], [True, True, False]]), [2, 1]).tolist() == [3, 3, 1]
