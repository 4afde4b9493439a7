"""A step in other layouts and precisions: the same losses and gradients, up to their rounding."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_args, tiny_batch, tiny_model, tiny_processor, tiny_split
from torch.utils._python_dispatch import TorchDispatchMode

from crosskd_hf.distillation import PKD, CrossKD, DistillationPair, Mimic
from crosskd_hf.distillation.alignment import align, standardise
from crosskd_hf.distillation.observers.dense import DenseObserver
from crosskd_hf.distillation.pair import prepared_teacher
from crosskd_hf.models.backbone import batchnorms
from crosskd_hf.models.head import GroupNorm, HalfPrecisionGroupNorm, LevelScales
from crosskd_hf.training.distillation_trainer import DistillationTrainer

# On levels of a cell or two the alignment standardises what is mostly rounding.
LARGE = {"height": 128, "width": 160}


# CPUs without such instructions take ten seconds for a step in half precision.
WITH_AND_WITHOUT_GROUP_NORM = ["gfl", pytest.param("retinanet", marks=pytest.mark.slow)]


def pair_of(detector: str, fold: bool = False, channels_last: bool = False) -> DistillationPair:
    options = {"head_blocks": 1, "strides": [8, 16, 32]}
    student, teacher = tiny_model(detector, seed=1, **options).train(), tiny_model(detector, **options)
    methods = [CrossKD(CrossKD.Settings(tap_index=1)), PKD(PKD.Settings(weight=1.0))]
    pair = DistillationPair(student, teacher, methods)
    pair.prepare_teacher(fold)
    return pair.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def gradients_of(pair: DistillationPair, loss: torch.Tensor) -> torch.Tensor:
    """All of them, in one row."""
    pair.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in pair.parameters() if p.grad is not None])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("detector", ["gfl", "retinanet"])
def test_channels_last_and_a_folded_teacher_change_nothing(detector: str) -> None:
    inputs, plain = tiny_batch(**LARGE), pair_of(detector)
    expected = plain(**inputs).loss
    gradients = gradients_of(plain, expected)
    pair = pair_of(detector, channels_last=True, fold=True)
    loss = pair(**inputs).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert relative(gradients_of(pair, loss), gradients) < 0.02  # as a change of the pixels by 1e-6


@pytest.mark.parametrize("detector", WITH_AND_WITHOUT_GROUP_NORM)
def test_bfloat16_is_as_near_as_its_rounding(detector: str) -> None:
    inputs, pair = tiny_batch(**LARGE), pair_of(detector, fold=True, channels_last=True)
    expected = pair(**inputs).loss
    gradients = gradients_of(pair, expected)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pair(**inputs).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)  # 8 bits of mantissa: 0.4% an operation
    assert relative(gradients_of(pair, loss), gradients) < 0.5


@pytest.mark.parametrize("detector", WITH_AND_WITHOUT_GROUP_NORM)
def test_half_precision_with_a_scaled_loss(detector: str) -> None:
    """The cross pass sends gradients through the teacher's layers: neither lost below fp16's range nor beyond it."""
    inputs, pair = tiny_batch(**LARGE), pair_of(detector, fold=True, channels_last=True)
    expected = pair(**inputs).loss
    gradients = gradients_of(pair, expected)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD([p for p in pair.student.parameters() if p.requires_grad], lr=0.0)
    with torch.autocast("cpu", torch.float16):
        loss = pair(**inputs).loss
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    gradients_of(pair, scaler.scale(loss))
    scaler.unscale_(optimizer)
    found = torch.cat([p.grad.flatten() for p in pair.student.parameters() if p.grad is not None])
    assert found.isfinite().all() and relative(found, gradients) < 0.2
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10, "no step was skipped"


def trainer(folder: Path, **options) -> DistillationTrainer:
    student, split = tiny_model(seed=1), tiny_split(folder / "data")
    args = tiny_args(folder / "run", **options)
    return DistillationTrainer(
        student, tiny_model(), args, train_dataset=split, eval_dataset=split, processing_class=tiny_processor(student)
    )


def test_a_trainer_prepares_its_own_copy_of_the_teacher(tmp_path: Path) -> None:
    found = trainer(tmp_path, bf16=True, channels_last=True)
    weight = found.pair.teacher.head.cls_predictor.weight
    assert weight.dtype == torch.bfloat16 and not list(batchnorms(found.pair.teacher.backbone))
    assert found.model.head.cls_predictor.weight.is_contiguous(memory_format=torch.channels_last)
    assert found.teacher.head.cls_predictor.weight.dtype == torch.float32
    assert set(found.teacher.state_dict()) == set(tiny_model().state_dict()), "with its BatchNorms"


# Half precision on a GPU --------------------------------------------------------------------------------------------


def saved_bytes(loss_of, *inputs: torch.Tensor) -> list[tuple[torch.dtype, int]]:
    """Type and number of values of what is kept for the backward pass, parameters left out."""
    kept: list[tuple[torch.dtype, int]] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        if not isinstance(value, torch.nn.Parameter):
            kept.append((value.dtype, value.numel()))
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss_of(*inputs)
    return kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_of_half_precision_maps(dtype: torch.dtype) -> None:
    """As fp32 makes it of the same maps, up to the rounding of what comes out; only statistics are kept in fp32."""
    generator = torch.Generator().manual_seed(0)
    norm = GroupNorm(4, 8)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=generator)
        norm.bias.normal_(generator=generator)
    # Far from zero: a mean that is rounded to half precision would be off by 1% of the deviation.
    features = (torch.randn(2, 8, 5, 6, generator=generator) + 3).to(dtype).requires_grad_()
    slope = torch.randn(2, 8, 5, 6, generator=generator).to(dtype)
    expected = norm(features.float())
    wanted = torch.autograd.grad(expected, (features, norm.weight, norm.bias), slope.float())
    found = HalfPrecisionGroupNorm.apply(features, norm.weight, norm.bias, norm.num_groups, norm.eps)
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))
    gradients = torch.autograd.grad(found, (features, norm.weight, norm.bias), slope)
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    kept = saved_bytes(lambda x: HalfPrecisionGroupNorm.apply(x, norm.weight, norm.bias, 4, norm.eps), features)
    assert sorted(kept, key=lambda pair: pair[1]) == [(torch.float32, 8), (torch.float32, 8), (dtype, 480)]


class ContiguousOnly(TorchDispatchMode):
    """GroupNorm's kernels on a GPU: they refuse maps with channels last, and take gradients to be contiguous."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "native_group_norm" in str(function):
            maps = [value for value in args if isinstance(value, torch.Tensor) and value.dim() == 4]
            assert maps and all(value.is_contiguous() for value in maps)
        return function(*args, **(kwargs or {}))


def test_group_norm_gives_its_kernels_the_layout_that_those_of_a_gpu_know() -> None:
    norm = GroupNorm(4, 8)
    features = torch.randn(2, 8, 5, 6).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    with ContiguousOnly():
        found = HalfPrecisionGroupNorm.apply(features, norm.weight, norm.bias, norm.num_groups, norm.eps)
        found.backward(torch.ones_like(found).contiguous(memory_format=torch.channels_last))
    assert features.grad is not None


@pytest.mark.parametrize("rectify", [False, True])
def test_aligned_maps_keep_their_precision(rectify: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(2, 8, 5, 6, generator=generator).bfloat16() + 2 for _ in range(2))
    slope = torch.randn(2, 8, 5, 6, generator=generator).bfloat16()
    half, full = mine.clone().requires_grad_(), mine.float().requires_grad_()
    (found,) = align([half], [theirs], rectify)
    (expected,) = align([full], [theirs.float()], rectify)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())
    found.backward(slope)
    expected.backward(slope.float())
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad.float(), full.grad, rtol=0.01, atol=1e-4)
    kept = saved_bytes(lambda x: align([x], [theirs], rectify), half)
    assert all(dtype == torch.bfloat16 for dtype, count in kept if count == 480)
    assert standardise([half])[0].dtype == torch.float32  # of the feature loss


def test_a_teachers_weights_are_cast_once() -> None:
    given = tiny_model("atss").eval().requires_grad_(False)
    plain, cast = prepared_teacher(given), prepared_teacher(given, dtype=torch.bfloat16)
    shown = []
    for teacher in (plain, cast):
        observer = DenseObserver(teacher)
        observer.ask_for_taps(3)
        observer.ask_for_predictions()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            shown.append(observer(tiny_batch()["pixel_values"]))
    expected, found = shown
    assert torch.equal(found.predictions.logits, expected.predictions.logits)
    assert torch.equal(found.context.predictions.boxes, expected.context.predictions.boxes)
    assert all(map(torch.equal, found.taps.cls, expected.taps.cls))
    for module in cast.modules():
        dtypes = {parameter.dtype for parameter in module.parameters(recurse=False)}
        if isinstance(module, torch.nn.Conv2d):
            assert dtypes == {torch.bfloat16}
        elif isinstance(module, (torch.nn.GroupNorm, LevelScales)):
            assert dtypes == {torch.float32}
    assert {parameter.dtype for parameter in given.parameters()} == {torch.float32}


def test_maps_and_terms_have_their_precision() -> None:
    """Maps are as precise as the networks run; predictions and losses are in fp32."""
    student, teacher = tiny_model("gfl", seed=1), tiny_model("gfl")
    pair = DistillationPair(student, teacher, [CrossKD(), PKD(), Mimic()])
    with torch.autocast("cpu", torch.bfloat16):
        shown = pair.student_observer(**tiny_batch())
        output = pair(**tiny_batch())
    assert {level.dtype for level in [*shown.features, *shown.taps.cls, *shown.taps.reg]} == {torch.bfloat16}
    assert shown.predictions.logits.dtype == shown.predictions.boxes_xyxy.dtype == torch.float32
    assert {term.dtype for term in [output.loss, *output.loss_dict.values()]} == {torch.float32}
