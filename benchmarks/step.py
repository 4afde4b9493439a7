"""One CrossKD step against its floor: operators, host syncs, memory, time.

    python benchmarks/step.py                         # counts, of every detector: exact, the same on every machine
    python benchmarks/step.py --time 15               # also seconds, of 15 interleaved pairs of step and floor
    python benchmarks/step.py --precisions 7          # bf16 with channels last against fp32, interleaved
    python benchmarks/step.py --time 15 --precision bf16 --channels-last

The floor is the same convolutions only: student forward and backward, teacher forward, cross pass forward and
backward, with the mean of all outputs as the loss. A step also has assignment, losses, alignment and their gradients.
A step's teacher has its BatchNorms folded into its convolutions, as in training. The floor that operators are counted
beyond has that teacher too; the floor that time and memory are compared with has the teacher as it was given.
Operators are those that PyTorch dispatches, counted by a `TorchDispatchMode`; syncs those among them that make the
host wait for a GPU. Memory is the peak of what tensors hold at once, weights left out.
"""

import argparse
import contextlib
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from reporting import add_output, finish, median_with_interval
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crosskd_hf.data.collator import padded_number
from crosskd_hf.distillation import CrossKD, DistillationPair
from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.base import DenseDetector

SYNCS = ("_local_scalar_dense", "nonzero", "unique", "masked_select")


class Counts(TorchDispatchMode):
    """Counts operators, and the bytes that the tensors they make hold at once."""

    def __init__(self):
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.mask_indexing = 0  # a `nonzero` inside an operator
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        self.operators[name] += 1
        indices = args[1] if name.startswith("aten.index") and len(args) > 1 and isinstance(args[1], list) else ()
        self.mask_indexing += any(index is not None and index.dtype == torch.bool for index in indices)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size

    @property
    def total(self) -> int:
        """Operators dispatched."""
        return sum(self.operators.values())

    @property
    def syncs(self) -> int:
        """Those among them that a GPU's host waits for."""
        found = sum(count for name, count in self.operators.items() if any(sync in name for sync in SYNCS))
        return found + self.mask_indexing


@dataclass
class Step:
    """A student and its teacher with a batch."""

    pair: DistillationPair
    given_teacher: DenseDetector
    inputs: dict
    precision: str = "fp32"

    @classmethod
    def build(
        cls,
        detector: str,
        images: int,
        boxes: int,
        size: tuple[int, int],
        backbones: tuple[str, str] = ("resnet50", "resnet101"),
        num_labels: int = 80,
        device: str = "cpu",
        precision: str = "fp32",
        channels_last: bool = False,
    ) -> "Step":
        """Random weights, images and boxes, the same at every call."""
        torch.manual_seed(0)
        student, teacher = (
            MODELS[detector](CONFIGS[detector](backbone=backbone, num_labels=num_labels)) for backbone in backbones
        )
        layout = torch.channels_last if channels_last else torch.contiguous_format
        pair = DistillationPair(student, teacher, [CrossKD()]).train().to(device=device, memory_format=layout)
        pair.prepare_teacher(dtype=torch.bfloat16 if precision == "bf16" else None)
        pair.to(memory_format=layout)
        height, width = size
        padded = padded_number(boxes)
        corner = torch.rand(images, padded, 2) * torch.tensor([width * 0.6, height * 0.6])
        shape = torch.rand(images, padded, 2) * torch.tensor([width * 0.4, height * 0.4]) + 4
        inputs = {
            "pixel_values": torch.randn(images, 3, height, width).contiguous(memory_format=layout),
            "pixel_mask": torch.ones(images, height, width, dtype=torch.bool),
            "labels": {
                "boxes_xyxy": torch.cat([corner, corner + shape], dim=-1),
                "class_labels": torch.randint(0, num_labels, (images, padded)),
                "mask": (torch.arange(padded) < boxes).repeat(images, 1),
            },
        }
        inputs = {name: _to(value, device) for name, value in inputs.items()}
        return cls(pair, teacher, inputs, precision)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Of the step's precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.inputs["pixel_values"].device.type, torch.bfloat16)

    def full(self) -> Tensor:
        """Everything between a batch and the gradients."""
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def loss(self) -> Tensor:
        """The sum of all terms, as the trainer computes it."""
        with self.autocast():
            return self.pair(**self.inputs).loss

    def floor(self) -> Tensor:
        """The convolutions alone."""
        return self._convolutions(self.given_teacher)

    def folded_floor(self) -> Tensor:
        """The same with the teacher of the step."""
        return self._convolutions(self.pair.teacher)

    def _convolutions(self, teacher: DenseDetector) -> Tensor:
        student, tap = self.pair.student, self.pair.teacher_observer.tap_index
        pixels = self.inputs["pixel_values"]
        with self.autocast():
            head = student.head(student.fpn(student.backbone(pixels)), tap_index=self.pair.student_observer.tap_index)
            with torch.no_grad():
                teacher.head(teacher.fpn(teacher.backbone(pixels)), tap_index=tap)
            cross = teacher.head(head.cls_taps, head.reg_taps, start_block=tap)
        outputs = [m for h in (head, cross) for maps in (h.logits, h.boxes, h.centerness or []) for m in maps]
        loss = sum(output.mean() for output in outputs)
        loss.backward()
        return loss.detach()

    def zero(self) -> None:
        """Drop the gradients."""
        self.pair.zero_grad(set_to_none=True)


def _to(value, device: str):
    return {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)


def count(step: Step, part: Callable[[], Tensor]) -> Counts:
    """Operators and memory of a part, after a first run that fills caches."""
    part()
    step.zero()
    with Counts() as counts:
        part()
    step.zero()
    return counts


def seconds(step: Step, part: Callable[[], Tensor]) -> float:
    """Of one run."""
    step.zero()
    start = time.perf_counter()
    part()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(step: Step, pairs: int) -> Iterator[tuple[float, float]]:
    """Seconds of step and floor, the two in turn, so that a slow moment of the machine meets both."""
    for part in (step.full, step.floor):
        seconds(step, part)
    for pair in range(pairs):
        parts = (step.full, step.floor) if pair % 2 else (step.floor, step.full)
        times = {part: seconds(step, part) for part in parts}
        yield times[step.full], times[step.floor]


def compare_precisions(detector: str, pairs: int, size: tuple[int, int], device: str) -> dict:
    """A row of steps in bf16 with channels last against steps in fp32, in turn."""
    plain = Step.build(detector, 2, 8, size, device=device)
    half = Step.build(detector, 2, 8, size, device=device, precision="bf16", channels_last=True)
    losses = [step.full().item() for step in (plain, half)]  # also the first, slow run
    times = [[seconds(step, part) for step in (half, plain) for part in (step.full, step.floor)] for _ in range(pairs)]
    return {
        "detector": detector,
        "batch": f"2 images of 8 boxes, {size[0]}x{size[1]}, bf16 and channels last against fp32",
        "time / fp32": median_with_interval([mine / other for mine, _, other, _ in times]),
        "floor / fp32 floor": median_with_interval([mine / other for _, mine, _, other in times]),
        "loss / fp32": losses[1] / losses[0],
    }


def measure(detector: str, arguments: argparse.Namespace) -> list[dict]:
    """A detector's rows."""
    rows = []
    for images, boxes in ((2, 8), (8, 8), (2, 40)):
        step = Step.build(detector, images, boxes, (128, 160))
        full, floor, folded = (count(step, part) for part in (step.full, step.floor, step.folded_floor))
        rows.append(
            {
                "detector": detector,
                "batch": f"{images} images of {boxes} boxes, 128x160",
                "floor": floor.total,
                "folded floor": folded.total,
                "beyond": full.total - folded.total,
                "syncs": full.syncs,
                "memory / floor": full.peak / floor.peak,
            }
        )
    if arguments.time:
        height, width = arguments.size
        step = Step.build(
            detector,
            2,
            8,
            (height, width),
            device=arguments.device,
            precision=arguments.precision,
            channels_last=arguments.channels_last,
        )
        times = list(interleaved(step, arguments.time))
        row = {"detector": detector, "batch": f"2 images of 8 boxes, {height}x{width}, {arguments.precision}"}
        row["time / floor"] = median_with_interval([full / floor for full, floor in times])
        row["seconds"] = median_with_interval([full for full, _ in times])
        if arguments.device == "cpu":
            row["memory / floor"] = count(step, step.full).peak / count(step, step.floor).peak
        rows.append(row)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", default=sorted(CONFIGS), choices=sorted(CONFIGS))
    parser.add_argument("--time", type=int, default=0, metavar="PAIRS", help="also measure seconds, of so many pairs")
    parser.add_argument(
        "--precisions", type=int, default=0, metavar="PAIRS", help="only compare bf16 with fp32, of so many pairs"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"), help="of timed images")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cpu")
    add_output(parser)
    arguments = parser.parse_args()
    rows = []
    for detector in arguments.detectors:
        if arguments.precisions:
            rows.append(compare_precisions(detector, arguments.precisions, tuple(arguments.size), arguments.device))
        else:
            rows += measure(detector, arguments)
        print(f"{detector}: done", flush=True)
    finish(arguments, rows, ("detector", "batch"))


if __name__ == "__main__":
    main()
