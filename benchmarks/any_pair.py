"""Students whose shape or classes differ from their teacher's, trained on BCCD by the command line.

    python benchmarks/any_pair.py --data data/bccd --output DIR

Three pairs: towers of 64 channels from towers of 256; 2 convolutions a tower from 4; the 3 blood-cell classes from a
teacher that has them among 10, in another order. Each student is trained twice by the same command: undisturbed, and
killed with SIGKILL after its first checkpoint, then started again. Reported: the KD loss at the beginning and the end,
whether weights (adapters included) of both runs agree bit for bit, and whether the saved student loads without
adapters. The exit status is 1 if a loss doesn't fall or anything differs. Teachers are trained for a moment only: what
is shown is that the pairs work, not what they gain.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

import crosskd_hf  # noqa: F401 - registers the detectors
from crosskd_hf.distillation.pair import METHODS_FILE
from crosskd_hf.recipe.run_folder import STATE_FILE
from crosskd_hf.training.checkpoints import MARKER

WARMUP_STEPS = 10
MIN_STEPS = 20
OTHER_CLASSES = ("ant", "bee", "cow", "dog", "elk", "fox", "gnu")  # no box has them
SHARED = [
    *("model.detector=gfl", "model.backbone=lcnet_050", "model.backbone_weights=random", "model.frozen_stages=0"),
    *("model.freeze_batchnorm_statistics=false", "data.train_split=train", "data.val_split=val", "data.images=images"),
    *("data.short_side=120", "data.long_side=160", "data.max_val_images=16", "training.per_device_train_batch_size=4"),
    *("training.optim=adamw_torch_fused", "training.learning_rate=4.0e-3", "training.base_batch_size=null"),
    *(
        "training.lr_milestones=[]",
        f"training.warmup_steps={WARMUP_STEPS}",
        "training.logging_steps=5",
        "training.use_cpu=true",
    ),
    *("training.eval_strategy=no", "training.save_strategy=steps", "training.dataloader_num_workers=0"),
]


@dataclass(frozen=True)
class Pair:
    """What differs between student and teacher: overrides of each, and of the distillation."""

    name: str
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    distillation: tuple[str, ...] = ("distillation.methods=[crosskd]",)
    ten_classes: bool = False
    adapters: tuple[str, ...] = ()


def widths(channels: int) -> tuple[str, ...]:
    """Overrides that make FPN and towers so wide."""
    return f"model.fpn_channels={channels}", f"model.head_channels={channels}"


PAIRS = (
    Pair(
        "width 64 <- 256",
        widths(64),
        widths(256),
        ("distillation.methods=[crosskd,pkd]",),
        adapters=("crosskd.adapters.cls", "crosskd.adapters.reg", "pkd.adapters.fpn"),
    ),
    Pair(
        "2 <- 4 convolutions",
        (*widths(64), "model.head_blocks=2"),
        widths(64),
        ("distillation.methods=[crosskd]", "distillation.crosskd.student_tap_index=2"),
    ),
    Pair("3 <- 10 classes", widths(64), widths(64), ten_classes=True),
)


def write_ten_classes(data: Path, folder: Path) -> Path:
    """BCCD with ten categories, in alphabetical order; the images stay where they are."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for path in sorted((data / "annotations").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in content["categories"]}
        ordered = sorted([*names.values(), *OTHER_CLASSES], key=str.lower)
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(ordered, start=1)]
        for annotation in content["annotations"]:
            annotation["category_id"] = ordered.index(names[annotation["category_id"]]) + 1
        (folder / "annotations" / path.name).write_text(json.dumps(content), encoding="utf-8")
    if not (folder / "images").exists():
        (folder / "images").symlink_to((data / "images").resolve())
    return folder


def command(recipe: Path, overrides: list[str]) -> list[str]:
    """A training by the command line."""
    return [sys.executable, "-m", "crosskd_hf", "train", str(recipe), *overrides]


def train(words: list[str], log: Path) -> None:
    """Run a training to its end.

    Raises:
        SystemExit: it failed.
    """
    with open(log, "a", encoding="utf-8") as file:
        if subprocess.run(words, stdout=file, stderr=subprocess.STDOUT).returncode:
            last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
            raise SystemExit(f"training failed: {last}\nsee {log}")


def kill_after_checkpoint(words: list[str], output: Path, log: Path) -> None:
    """Start a training and kill it as soon as a checkpoint is whole.

    Raises:
        SystemExit: it ended before.
    """
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None and not list(output.glob(f"checkpoint-*/{MARKER}")):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"the training ended before it could be killed: take more --steps, or see {log}")


def kd_losses(output: Path) -> list[float]:
    """Sum of the distillation terms at each log."""
    history = json.loads((output / STATE_FILE).read_text(encoding="utf-8"))["log_history"]
    return [sum(v for k, v in e.items() if k.startswith("kd_")) for e in history if "kd_cls" in e and "loss" in e]


def differences(first: Path, second: Path) -> list[str]:
    """Names of tensors that aren't bit for bit the same in two runs, those of the last checkpoint included."""
    runs = []
    for folder in (first, second):
        adapters = sorted(folder.glob(f"checkpoint-*/{METHODS_FILE}"), key=lambda p: p.stat().st_mtime)[-1:]
        runs.append(load_file(folder / "model.safetensors"))
        for path in adapters:
            runs[-1] |= {f"adapters.{key}": value for key, value in load_file(path).items()}
    mine, theirs = runs
    shared = set(mine) & set(theirs)
    return sorted(set(mine) ^ set(theirs)) + [key for key in sorted(shared) if not torch.equal(mine[key], theirs[key])]


def run_pair(pair: Pair, data: Path, output: Path, steps: int) -> dict:
    """Train a pair and measure it."""
    recipe = output / "recipe.yaml"
    recipe.write_text("training: {}\n", encoding="utf-8")
    folder = output / pair.name.replace(" ", "_").replace("<-", "from")
    folder.mkdir(exist_ok=True)
    teacher_data = write_ten_classes(data, output / "ten_classes") if pair.ten_classes else data
    teacher, log = folder / "teacher", folder / "log.txt"
    ends = [f"training.max_steps={steps}", f"training.save_steps={steps // 2}"]
    words = [*SHARED, *pair.teacher, *ends, f"data.path={teacher_data}", f"training.output_dir={teacher}"]
    train(command(recipe, words), log)
    students = [folder / "undisturbed", folder / "killed"]
    for student in students:
        words = [*SHARED, *pair.student, *ends, *pair.distillation, f"data.path={data}"]
        words += [f"teacher.checkpoint={teacher}", f"training.output_dir={student}"]
        if student is students[1]:
            kill_after_checkpoint(command(recipe, words), student, log)
        train(command(recipe, words), log)
    _, info = AutoModelForObjectDetection.from_pretrained(
        students[0], output_loading_info=True, trust_remote_code=False
    )
    losses = kd_losses(students[0])
    tenth = max(1, len(losses) // 10)
    adapters = sorted((students[0] / f"checkpoint-{steps}").glob(METHODS_FILE))
    found = sorted(load_file(adapters[0])) if adapters else []
    return {
        "pair": pair.name,
        "kd_first": sum(losses[:tenth]) / tenth,
        "kd_last": sum(losses[-tenth:]) / tenth,
        "differing_tensors": len(differences(*students)),
        "adapters": ", ".join(found) or "none",
        "as_expected": tuple(found) == tuple(f"{place}.weight" for place in pair.adapters),
        "clean": not (info["missing_keys"] or info["unexpected_keys"]),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/bccd"), help="BCCD in COCO layout")
    parser.add_argument("--output", type=Path, default=Path("runs/any_pair"))
    parser.add_argument("--steps", type=int, default=100, help=f"of each training; at least {MIN_STEPS}")
    arguments = parser.parse_args()
    if not (arguments.data / "annotations").is_dir():
        parser.error(f"{arguments.data} is no data set in COCO layout: name BCCD's folder with --data")
    if arguments.steps < MIN_STEPS:
        parser.error(f"--steps {arguments.steps}: at least {MIN_STEPS}, of which {WARMUP_STEPS} are warm-up")
    if arguments.output.exists() and any(arguments.output.iterdir()):
        parser.error(f"{arguments.output} isn't empty: remove it, or name another --output")
    arguments.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results = []
    for pair in PAIRS:
        results.append(run_pair(pair, arguments.data.absolute(), arguments.output.absolute(), arguments.steps))
        print(json.dumps(results[-1]), flush=True)
    print("\n| pair | KD loss, first and last tenth | tensors changed by kill and resume | adapters | saved student |")
    print("|---|---|---|---|---|")
    for r in results:
        saved = "loads without adapters" if r["clean"] else "DOES NOT LOAD CLEANLY"
        losses = f"{r['kd_first']:.3f} -> {r['kd_last']:.3f}"
        print(f"| {r['pair']} | {losses} | {r['differing_tensors']} | {r['adapters']} | {saved} |")
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if any(
        r["kd_last"] >= r["kd_first"] or r["differing_tensors"] or not r["clean"] or not r["as_expected"]
        for r in results
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
