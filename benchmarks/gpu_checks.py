"""What `gpu.py` checks: golden cases, folding, watched training steps, a run that is killed.

A section gives names of checks and the functions that do them. A function returns what it measured; what is wrong is
its `problem`, and so is an exception.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import yaml
from faults import ends, kill_all, last_step, resumed_at, steps_logged
from gpu_options import GOLDEN, Checks, Options
from reporting import ROOT
from step import Counts
from torch.overrides import TorchFunctionMode
from transformers import PrinterCallback, TrainerCallback

from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.shapes import load_shapes
from crosskd_hf.data.split import DetectionSplit, keep_for_training
from crosskd_hf.distillation.pair import prepared_teacher
from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.backbone import batchnorms
from crosskd_hf.models.base import DenseDetector
from crosskd_hf.recipe.run_folder import STATE_FILE, is_finished
from crosskd_hf.training.arguments import DetectionTrainingArguments
from crosskd_hf.training.distillation_trainer import DistillationTrainer

sys.path.insert(0, str(ROOT / "tests"))
from golden_cases import GoldenCase

WARM_UP = 4  # steps that may wait for the GPU: memory, kernels and compiled programs are got then
FOLDED = 1e-4  # of a map's largest value
# Largest relative difference of the first step's loss to fp32.
SAME_LOSS = {"bf16": 0.05, "fp16": 0.02, "compiled": 5e-3}
SAME_RUN = {"cpu": 0.0, "cuda": 0.02}  # a GPU adds up in another order every time


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """fp32 as it is written; PyTorch lets convolutions on a GPU round to TF32 otherwise."""
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    try:
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed


# Numbers ------------------------------------------------------------------------------------------------------------


def golden(options: Options) -> Checks:
    """Equality with the reference implementation."""
    for name in options.cases:
        yield name, functools.partial(golden_case, name, options.device)


def golden_case(name: str, device: str) -> dict:
    """A golden case with the tests' bars."""
    with without_tf32():
        result = GoldenCase(GOLDEN, name, device=device).run()
    shares = {kind: error / bar for kind, (_, error, bar) in result.kinds.items() if bar}
    worst = max(shares, key=shares.__getitem__)
    return {
        "problem": "; ".join(result.failures[:3]),
        "numbers": result.count,
        "beyond their bar": len(result.failures),
        "nearest to its bar": worst,
        "error / bar": shares[worst],
    }


def folding(options: Options) -> Checks:
    """BatchNorms that become part of convolutions, with TF32 as PyTorch has it by default."""
    for backbone in sorted(set(options.backbones)):
        yield backbone, functools.partial(folded, backbone, options.device)


def folded(backbone: str, device: str) -> dict:
    """A teacher before and after."""
    torch.manual_seed(0)
    teacher = MODELS["gfl"](CONFIGS["gfl"](backbone=backbone)).eval().requires_grad_(False)
    for norm in batchnorms(teacher.backbone):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
    prepared = prepared_teacher(teacher.to(device))
    before, after = (len(list(batchnorms(model.backbone))) for model in (teacher, prepared))
    pixels = torch.randn(2, 3, 128, 160).to(device)
    with torch.no_grad(), without_tf32():
        pairs = zip(prepared.backbone(pixels), teacher.backbone(pixels), strict=True)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    problem = f"{after} of {before} BatchNorms are left" if after or not before else ""
    problem = problem or ("" if error < FOLDED else f"maps differ by {error:.2g}")
    return {"problem": problem, "BatchNorms": before, "folded": before - after, "largest difference": error}


# Training -----------------------------------------------------------------------------------------------------------


class Copies(TorchFunctionMode):
    """Counts tensors that are made of Python's numbers: the host waits until they are on a GPU."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        self.number += made and not isinstance(args[-1] if args else None, torch.Tensor)
        return function(*args, **(kwargs or {}))


class SyncWatch(TrainerCallback):
    """Between the begin and the end of a step the host must not wait for the device.

    On a GPU whatever waits raises an error. On a CPU what would wait is counted (`syncs`).

    Args:
        device: "cuda" or "cpu".
        scaled: by GradScaler, whose step waits by design.
        compiled: on a CPU nothing can be counted then.
    """

    def __init__(self, device: str, scaled: bool, compiled: bool):
        self.device, self.scaled = device, scaled
        self.counts, self.copies = Counts(), Copies()
        self.modes = () if device == "cuda" or compiled else (self.counts, self.copies)
        self.steps, self._on = 0, False

    @property
    def syncs(self) -> int:
        """Seen on a CPU."""
        return self.counts.syncs + self.copies.number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= WARM_UP:
            self.steps += 1
            self.watch(True)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.scaled:
            self.watch(False)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.watch(False)

    def watch(self, on: bool) -> None:
        """Begin or end to watch."""
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if on else "default")
        for mode in self.modes if on != self._on else ():
            mode.__enter__() if on else mode.__exit__(None, None, None)
        self._on = on


def steps(options: Options) -> Checks:
    """Steps of the trainer in every precision, and at many image sizes."""
    sides = [options.side // 2, options.side * 5 // 8, options.side * 3 // 4]
    for detector in options.detectors:
        losses: list[float] = []
        for precision in options.precisions:
            yield f"{detector}, {precision}", functools.partial(train_steps, options, detector, precision, losses)
        various = {"multiscale": "choice", "multiscale_short_sides": sides}
        yield f"{detector}, fp32, multi-scale", functools.partial(train_steps, options, detector, "fp32", [], various)


def compiled(options: Options) -> Checks:
    """The same, compiled."""
    for detector in options.compiled:
        losses: list[float] = []
        yield f"{detector}, fp32", functools.partial(train_steps, options, detector, "fp32", losses)
        yield f"{detector}, compiled", functools.partial(train_steps, options, detector, "compiled", losses)


def train_steps(
    options: Options, detector: str, precision: str, of_fp32: list[float], sizes: dict | None = None
) -> dict:
    """A few steps of CrossKD on generated images, all watched but the first.

    Args:
        options: how many, of what.
        detector: student and teacher are one.
        precision: of the networks, or "compiled" in fp32.
        of_fp32: first loss of the same in fp32, noted here if there is none.
        sizes: of `DetectionDataset`, where images are of several.
    """
    cuda = options.device == "cuda"
    # torch_compile is told to accelerate in the environment. On a CPU every batch's labels are looked at.
    environment, as_on_gpu = mock.patch.dict(os.environ), mock.patch.object(DenseDetector, "_is_due", due_once)
    with TemporaryDirectory() as folder, environment, as_on_gpu:
        arguments = DetectionTrainingArguments(
            output_dir=folder,
            max_steps=WARM_UP + options.steps,
            warmup_steps=0,
            lr_milestones=[],
            learning_rate=1e-3,
            logging_steps=1,
            per_device_train_batch_size=options.batch,
            dataloader_num_workers=0,
            dataloader_drop_last=True,
            save_strategy="no",
            use_cpu=not cuda,
            disable_tqdm=True,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            channels_last=precision in ("bf16", "fp16"),
            torch_compile=precision == "compiled",
            torch_compile_backend=options.backend if precision == "compiled" else None,
        )
        trainer = small_trainer(options, detector, arguments, sizes or {})
        watch = SyncWatch(options.device, precision == "fp16", precision == "compiled")
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        before = [p.detach().clone() for p in trainer.pair.parameters()]
        try:
            trainer.train()
        finally:
            watch.watch(False)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in logs]
    of_fp32 += [] if of_fp32 else losses[:1]
    difference = abs(losses[0] / of_fp32[0] - 1)
    frozen = all(torch.equal(a, b) for a, b in zip(before, trainer.pair.parameters(), strict=True))
    left = len(list(batchnorms(trainer.pair.teacher.backbone)))
    problems = {
        f"{watch.steps} of {options.steps} steps were watched": watch.steps != options.steps,
        f"the host waits {watch.syncs} times": watch.syncs,
        f"losses {losses} aren't all finite": not all(map(math.isfinite, losses)),
        "no weight has changed": frozen,
        f"{left} BatchNorms of the teacher aren't folded": left,
        f"the first loss is {difference:.2g} from that in fp32": difference > SAME_LOSS.get(precision, 0),
    }
    return {
        "problem": "; ".join(text for text, holds in problems.items() if holds),
        "steps watched": watch.steps,
        "first loss": losses[0],
        "last loss": losses[-1],
        "first loss / fp32 - 1": difference,
        "memory (GB)": logs[-1]["memory_gb"],
    }


def due_once(model: DenseDetector, what: str, values: torch.Tensor) -> bool:
    """Whether a model may look at values, as it decides it on a GPU."""
    return not torch.compiler.is_compiling() and what not in model._checked


@functools.cache
def wide_images(side: int) -> DetectionSplit:
    """Generated images with boxes, all of one size."""
    with TemporaryDirectory() as folder:  # what is open stays readable
        split = keep_for_training(load_shapes("train", 24, side=side, difficulty=0.2, cache_dir=folder))
    sizes = zip(split.dataset["width"], split.dataset["height"], strict=True)
    wide = [i for i, (width, height) in enumerate(sizes) if width > height]
    return dataclasses.replace(split, dataset=split.dataset.select(wide))


def small_trainer(
    options: Options, detector: str, arguments: DetectionTrainingArguments, sizes: dict
) -> DistillationTrainer:
    """Of random weights, on generated images of one size, unless `sizes` says otherwise."""
    torch.manual_seed(0)
    split = wide_images(options.side)
    short = options.side * 3 // 4
    data = DetectionDataset(split, train=True, short_side=short, long_side=options.side, **sizes)
    student, teacher = (
        MODELS[detector](CONFIGS[detector](backbone=name, frozen_stages=0, id2label=split.id2label))
        for name in options.small
    )
    if options.device == "cuda":  # the peak of this run only
        torch.cuda.reset_peak_memory_stats()
    return DistillationTrainer(student, teacher, arguments, train_dataset=data)


# Killed -------------------------------------------------------------------------------------------------------------


def resume(options: Options) -> Checks:
    """A run that is killed by SIGKILL, and started again."""
    yield "train.py", functools.partial(killed_and_resumed, options)


def killed_and_resumed(options: Options) -> dict:
    """Beside one that isn't disturbed: the losses of the steps that both took last are the same."""
    with TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        recipe = write_recipe(folder, options)

        def started(run: str, number: int) -> subprocess.Popen:
            process = start(folder, recipe, run, number)
            stack.callback(kill_all, process)
            return process

        whole, killed = started("whole", 0), started("killed", 0)
        if problem := wait_to_kill(killed, folder, options):
            return {"problem": f"{problem}: {end_of(folder / 'killed0.log')}"}
        step = last_step(folder / "killed")
        for run, process in (("killed1", started("killed", 1)), ("whole0", whole)):
            if not ends(process, options.patience) or process.returncode:
                return {"problem": f"status {process.returncode}: {end_of(folder / f'{run}.log')}"}
        resumed = resumed_at((folder / "killed1.log").read_text(errors="replace"))
        if resumed != step or not is_finished(folder / "killed"):
            return {"problem": f"step {step} was saved, {resumed} resumed: {end_of(folder / 'killed1.log')}"}
        difference = loss_difference(folder / "whole", folder / "killed", step)
    allowed = SAME_RUN[options.device]
    return {
        "problem": "" if difference <= allowed else f"losses differ by {difference:.2g}",
        "resumed from": step,
        "steps": options.resumed_steps,
        "largest difference of a loss": difference,
    }


def end_of(log: Path) -> str:
    """The last words of a run."""
    return log.read_text(errors="replace")[-500:]


def write_recipe(folder: Path, options: Options) -> Path:
    """A small pair on generated images, which saves five times."""
    small = {"detector": "gfl", "backbone": "lcnet_050", "fpn_channels": 64, "head_channels": 64, "frozen_stages": 0}
    shapes = {"layout": "shapes", "train_split": "train", "val_split": "val", "shapes_side": 64}
    sizes = {"short_side": 48, "long_side": 64, "max_train_images": 16, "max_val_images": 4}
    training = {
        "output_dir": "set by the command line",
        "max_steps": options.resumed_steps,
        "save_strategy": "steps",
        "save_steps": options.resumed_steps // 5,
        "eval_strategy": "no",
        "logging_steps": 1,
        "warmup_steps": 0,
        "lr_milestones": [],
        "learning_rate": 0.001,
        "use_cpu": options.device == "cpu",
        "disable_tqdm": True,
    }
    content = {
        "model": {**small, "backbone_weights": "random"},
        "teacher": {**small, "checkpoint": "random"},
        "distillation": {},
        "data": {**shapes, **sizes},
        "training": training,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(folder: Path, recipe: Path, run: str, number: int) -> subprocess.Popen:
    """Start a run by `train.py`, its output to a file."""
    values = [f"training.output_dir={folder / run}", f"data.cache_dir={folder / run}_cache"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with open(folder / f"{run}{number}.log", "w") as log:
        command = [sys.executable, str(ROOT / "train.py"), str(recipe), *values]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_to_kill(process: subprocess.Popen, folder: Path, options: Options) -> str:
    """SIGKILL to a run two steps after its first checkpoint. What is wrong, if anything."""
    log, until = folder / "killed0.log", time.monotonic() + options.patience
    while process.poll() is None and time.monotonic() < until:
        if (step := last_step(folder / "killed")) and steps_logged(log) >= step + 2:
            kill_all(process)
            return ""
        time.sleep(0.01)
    return "the run that was to be killed " + ("was over" if process.poll() == 0 else "came to no checkpoint")


def loss_difference(first: Path, second: Path, step: int) -> float:
    """The largest relative difference of a loss after a step."""
    histories = [json.loads((run / STATE_FILE).read_text())["log_history"] for run in (first, second)]
    losses = [{e["step"]: e["loss"] for e in history if "loss" in e and e["step"] > step} for history in histories]
    if losses[0].keys() != losses[1].keys() or not losses[0]:
        raise ValueError(f"steps {sorted(losses[0])} and {sorted(losses[1])} were logged")
    return max(abs(losses[1][step] / loss - 1) for step, loss in losses[0].items())
