"""How much `gpu.py` does, on a GPU and on a CPU."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from reporting import ROOT

from crosskd_hf.models import CONFIGS

GOLDEN = ROOT / "tests" / "golden"
Checks = Iterator[tuple[str, Callable[[], dict]]]


@dataclass(frozen=True)
class Options:
    """How much is done.

    Attributes:
        device: "cuda" or "cpu".
        size, batch: height and width in pixels, and number, of timed images.
        backbones: of student and teacher that are timed and folded.
        small: of those that are trained a few steps.
        side: longer side of the images of these, in pixels.
        detectors, compiled: that are trained, and trained compiled.
        cases: golden cases.
        precisions: of training.
        steps: that are watched.
        runs: that are timed, after one that isn't.
        backend: of `torch.compile`.
        resumed_steps: of the run that is killed, which saves five times.
        patience: seconds for a run to end.
    """

    device: str
    size: tuple[int, int]
    batch: int
    backbones: tuple[str, str]
    small: tuple[str, str]
    side: int
    cases: tuple[str, ...]
    precisions: tuple[str, ...]
    compiled: tuple[str, ...]
    backend: str
    steps: int
    runs: int
    resumed_steps: int
    detectors: tuple[str, ...] = tuple(sorted(CONFIGS))
    patience: float = 240


GPU = Options(
    device="cuda",
    size=(800, 1344),
    batch=4,
    backbones=("resnet50", "resnet101"),
    small=("resnet18", "resnet34"),
    side=512,
    cases=tuple(sorted(path.stem for path in GOLDEN.glob("*.json") if path.stem != "preprocessing")),
    precisions=("fp32", "bf16", "fp16"),
    compiled=tuple(sorted(CONFIGS)),
    backend="inductor",
    steps=20,
    runs=7,
    resumed_steps=100,
)
CPU = dataclasses.replace(
    GPU,
    device="cpu",
    size=(96, 128),
    batch=2,
    backbones=("resnet18", "resnet18"),
    small=("resnet18", "resnet18"),
    side=96,
    cases=("gfl_r18_crosskd",),
    precisions=("fp32",),  # bf16 takes minutes where convolutions know none
    compiled=("gfl",),
    backend="eager",
    steps=3,
    runs=3,
    resumed_steps=15,
)
