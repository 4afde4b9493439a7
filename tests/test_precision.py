"""A step in other layouts and precisions, and compiled: the same losses and gradients, up to their rounding."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_args, tiny_batch, tiny_model, tiny_processor, tiny_split

from crosskd_hf.data.collator import padded_number
from crosskd_hf.distillation.objective import distillation_losses, prepare_teacher, student_forward, teacher_forward
from crosskd_hf.distillation.settings import resolve_settings
from crosskd_hf.models.backbone import batchnorms
from crosskd_hf.recipe import DistillationSection
from crosskd_hf.trainer import DistillationTrainer

DETECTORS = ["gfl", "retinanet", "fcos", "atss"]
# On levels of a cell or two the alignment standardises what is mostly rounding.
LARGE = {"height": 256, "width": 320}


class Pair:
    """A student and a teacher with a batch."""

    def __init__(self, detector: str, fold: bool = False, channels_last: bool = False):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.student = tiny_model(detector, seed=1).train().to(memory_format=layout)
        self.teacher = tiny_model(detector).eval().requires_grad_(False)
        self.teacher = prepare_teacher(self.teacher, fold).to(memory_format=layout)
        self.settings = resolve_settings(DistillationSection(pkd=1.0), self.teacher)

    def loss(self, inputs: dict) -> torch.Tensor:
        """The sum of all terms."""
        output = student_forward(self.student, inputs, self.settings)
        own = teacher_forward(self.teacher, inputs, self.settings)
        terms = distillation_losses(self.student, output, self.teacher, own, self.settings)
        return output.loss + sum(term.sum() for term in terms.values())

    def gradients(self, loss: torch.Tensor) -> torch.Tensor:
        """All of them, in one row."""
        self.student.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in self.student.parameters() if p.grad is not None])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def padded_batch(boxes: int, height: int = 64, width: int = 96) -> dict:
    """`boxes` random boxes an image, padded as the collator does it."""
    generator = torch.Generator().manual_seed(boxes)
    length = padded_number(boxes)
    corner = torch.rand(2, length, 2, generator=generator) * torch.tensor([width / 2, height / 2])
    size = 16 + torch.rand(2, length, 2, generator=generator) * 24
    labels = {
        "boxes": torch.cat([corner, corner + size], dim=-1),
        "class_labels": torch.randint(0, 2, (2, length), generator=generator),
        "mask": (torch.arange(length) < boxes).expand(2, length).contiguous(),
    }
    return {"pixel_values": torch.randn(2, 3, height, width, generator=generator), "labels": labels}


@pytest.mark.parametrize("detector", DETECTORS)
def test_channels_last_and_a_folded_teacher_change_nothing(detector: str) -> None:
    inputs, plain = tiny_batch(**LARGE), Pair(detector)
    expected = plain.loss(inputs)
    gradients = plain.gradients(expected)
    for options in ({"channels_last": True}, {"fold": True}, {"channels_last": True, "fold": True}):
        pair = Pair(detector, **options)
        loss = pair.loss(inputs)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4), options
        assert relative(pair.gradients(loss), gradients) < 0.02, options  # as a change of the pixels by 1e-6


@pytest.mark.parametrize("detector", DETECTORS)
def test_bfloat16_is_as_near_as_its_rounding(detector: str) -> None:
    inputs, pair = tiny_batch(**LARGE), Pair(detector, fold=True, channels_last=True)
    expected = pair.loss(inputs)
    gradients = pair.gradients(expected)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pair.loss(inputs)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)  # 8 bits of mantissa: 0.4% an operation
    assert relative(pair.gradients(loss), gradients) < 0.5


@pytest.mark.parametrize("detector", DETECTORS)
def test_half_precision_with_a_scaled_loss(detector: str) -> None:
    """The cross pass sends gradients through the teacher's layers: neither lost below fp16's range nor beyond it."""
    inputs, pair = tiny_batch(**LARGE), Pair(detector, fold=True, channels_last=True)
    expected = pair.loss(inputs)
    gradients = pair.gradients(expected)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD([p for p in pair.student.parameters() if p.requires_grad], lr=0.0)
    with torch.autocast("cpu", torch.float16):
        loss = pair.loss(inputs)
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    pair.gradients(scaler.scale(loss))
    scaler.unscale_(optimizer)
    found = torch.cat([p.grad.flatten() for p in pair.student.parameters() if p.grad is not None])
    assert found.isfinite().all() and relative(found, gradients) < 0.2
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10, "no step was skipped"


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("detector", DETECTORS)
def test_a_compiled_step_is_one_program_for_any_number_of_boxes(detector: str, backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pair = Pair(detector)
    compiled = torch.compile(pair.loss, fullgraph=True, backend=backend)
    for boxes in (3, 20, 200):
        inputs = padded_batch(boxes)
        for padded in inputs["labels"].values():
            torch._dynamo.mark_dynamic(padded, 1)
        expected = pair.loss(inputs)
        gradients = pair.gradients(expected)
        loss = compiled(inputs)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5), boxes
        assert relative(pair.gradients(loss), gradients) < 1e-4, boxes
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
def test_compiled_programs_serve_any_image_size() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pair = Pair("retinanet")
    compiled = torch.compile(pair.loss, fullgraph=True, backend="eager")
    for size in ((256, 320), (288, 256), (320, 384)):
        inputs = padded_batch(8, *size)
        assert compiled(inputs).item() == pytest.approx(pair.loss(inputs).item(), rel=1e-5), size
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the first size's own, then one of all others


def trainer(folder: Path, **options) -> DistillationTrainer:
    student, split = tiny_model(seed=1), tiny_split(folder / "data")
    args, processor = tiny_args(folder / "run", max_steps=2, **options), tiny_processor(student)
    # torch 2.15's bfloat16 convolutions of stride 2 on a CPU return whatever was in memory as the gradient of maps one
    # cell wide, which images of 64 pixels have.
    processor.size = {"shortest_edge": 128, "longest_edge": 192}
    return DistillationTrainer(student, tiny_model(), args, split, split, processor)


def losses(found: DistillationTrainer) -> list[float]:
    return [entry["loss"] for entry in found.state.log_history if "loss" in entry]


def test_the_trainer_knows_them_all(tmp_path: Path) -> None:
    expected = None
    for i, options in enumerate(
        (
            {"fold_teacher_batchnorm": False},
            {"channels_last": True},
            {"torch_compile": True, "torch_compile_backend": "eager"},
            {"bf16": True, "channels_last": True},
        )
    ):
        mine = trainer(tmp_path / str(i), **options)
        mine.train()
        expected = expected or losses(mine)
        assert losses(mine) == pytest.approx(expected, rel=0.05 if "bf16" in options else 1e-3), options
        mine.save_model()
        saved = type(mine.accelerator.unwrap_model(mine.model)).from_pretrained(tmp_path / str(i) / "run")
        state = mine.accelerator.unwrap_model(mine.model).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in saved.state_dict().items()), options


def test_the_teacher_itself_is_left_as_it_is(tmp_path: Path) -> None:
    teacher = trainer(tmp_path, channels_last=True).teacher
    assert list(batchnorms(teacher.backbone)) and set(teacher.state_dict()) == set(tiny_model().state_dict())
