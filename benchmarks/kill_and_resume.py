"""Disturbs a training run at random moments, starts it again, and compares it with an undisturbed one.

    python benchmarks/kill_and_resume.py --fault kill --kills 5 --workers 0 --processes 1 --output DIR --log F.json

A small CrossKD recipe on generated noise images is trained twice by the same command: undisturbed, and with faults:
SIGKILL, SIGTERM, one of two processes killed, a disk that fills up, a checkpoint that is damaged. Some are aimed at
phases that random moments seldom hit: a checkpoint that is being written or removed, an evaluation, the final save.
Weights, optimizer, schedule and random states must agree bit for bit; otherwise the exit status is 1. The log gathers
several calls, `--log F.json --table` prints it. Needs Linux (/proc); the faults themselves are in `faults.py`.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from faults import (
    FAULTS,
    READY,
    DiskSkipped,
    Target,
    kill_all,
    last_step,
    resumed_at,
    small_disk,
    steps_logged,
)
from PIL import Image
from reporting import commit
from safetensors.torch import load_file

from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.recipe.run_folder import is_finished
from crosskd_hf.training.checkpoints import checkpoint_folders, leftovers, step_of
from crosskd_hf.utils.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"detector": "gfl", "backbone": "resnet18", "fpn_channels": 64, "head_channels": 64}
SAVE_STEPS = 10
EVAL_STEPS = 15
AIMS = ("any", "saving", "evaluation", "any")  # in turn; the last of several faults is aimed at the end
STATES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
LONGEST_DELAY = 0.3  # seconds between the start of the phase that is aimed at and the kill
POLL = 0.002  # seconds


# The run --------------------------------------------------------------------------------------------------------


def write_noise_coco(folder: Path, images: int) -> None:
    """Noise images, upright and wide, with one or two boxes each, in COCO layout."""
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    (folder / "noise").mkdir()
    content: dict = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    for i in range(1, images + 1):
        width, height = (128, 96) if i % 3 else (96, 120)
        pixels = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / "noise" / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        for j in range(1 + i % 2):
            x, y, w, h = (int(v) for v in rng.integers((0, 0, 20, 20), (60, 50, 60, 60)))
            box = [x, y, min(w, width - x), min(h, height - y)]
            record = {"id": 10 * i + j, "image_id": i, "category_id": 1 + j, "bbox": box}
            content["annotations"].append(record | {"area": box[2] * box[3], "iscrowd": 0})
    (folder / "annotations" / "instances_noise.json").write_text(json.dumps(content))


def write_recipe(folder: Path, steps: int, workers: int, seed: int) -> Path:
    """CrossKD with everything that draws random numbers: drop path, flips, scales, shuffling, random weights."""
    content = {
        "model": {**SMALL, "backbone_weights": "random", "drop_path_rate": 0.3, "frozen_stages": 0},
        "teacher": {**SMALL, "checkpoint": "random"},
        "distillation": {"crosskd": {"tap_index": 3}},
        "data": {
            "path": str(folder / "data"),
            "train_split": "noise",
            "val_split": "noise",
            "short_side": 96,
            "long_side": 128,
            "multiscale": "choice",
            "multiscale_short_sides": [64, 80, 96],
            "cache_dir": str(folder / "cache"),
        },
        "training": {
            "output_dir": "set by the command line",
            "max_steps": steps,
            "warmup_steps": 5,
            "lr_milestones": [4],
            "learning_rate": 0.002,
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": SAVE_STEPS,
            "save_total_limit": 2,
            "eval_strategy": "steps",
            "eval_steps": EVAL_STEPS,
            "logging_steps": 1,
            "dataloader_num_workers": workers,
            "seed": seed,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def command(recipe: Path, output: Path, processes: int) -> list[str]:
    """What a user would type, with a free port for the processes to meet."""
    train = ["-m", "crosskd_hf", "train", str(recipe), f"training.output_dir={output}"]
    if processes == 1:
        return [sys.executable, *train]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    return [sys.executable, *launch, "--main_process_port", port, *train]


def start(recipe: Path, output: Path, processes: int, log: Path) -> subprocess.Popen:
    """Start a run in a process group of its own, its output to a file."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(log, "w") as file:
        return subprocess.Popen(
            command(recipe, output, processes), env=environment, stdout=file, stderr=file, start_new_session=True
        )


# Moments --------------------------------------------------------------------------------------------------------


def is_changing(output: Path, since: float) -> bool:
    """Whether a checkpoint is being written or removed, by what was touched after a time (`time.time()`)."""
    for folder in leftovers(output):
        try:
            if folder.stat().st_mtime >= since:
                return True
        except FileNotFoundError:  # renamed or removed in between
            return True
    return False


def phase(output: Path, log: Path, steps: int, since: float, finished: bool) -> str:
    """What a run is at, from its log and its folders; `finished` was it before it was started."""
    if finished:
        return "finished"
    text = log.read_text(errors="replace")
    if "trained to step" in text:
        return "end"
    if is_changing(output, since):
        return "saving"
    step = steps_logged(log)
    if not step:
        return "starting"
    due = step % EVAL_STEPS == 0 or step == steps
    return "evaluation" if due and f"evaluation at step {step}:" not in text else "training"


@dataclass
class Disturbance:
    """One fault, in seconds from the start of its process.

    Attributes:
        steps_lost: steps that were logged and have to be taken again.
        problem, note: see `Outcome`.
    """

    number: int
    aim: str
    planned: float
    seconds: float
    resumed_from: int
    steps_reached: int
    steps_lost: int
    phase: str
    left_behind: str
    status: int
    problem: str = ""
    note: str = ""


@dataclass
class Timing:
    """Seconds of the undisturbed run: until the first step is logged, and in all."""

    first_step: float
    total: float
    steps: int

    @property
    def step(self) -> float:
        """Seconds a step, with the saves and evaluations that go with it."""
        return (self.total - self.first_step) / self.steps


def plan(rng: random.Random, timing: Timing, resumed: int, kills_left: int) -> float:
    """Seconds after which to kill a process that resumes from step `resumed`.

    Uniform from the imports of a starting process up to twice a kill's share of the steps that are left.
    """
    work = timing.step * (timing.steps - resumed)
    high = timing.first_step + work * min(1.0, 2 / (kills_left + 1))
    return rng.uniform(0.3 * timing.first_step, max(high, 1.1 * timing.first_step))


def wait_for_moment(
    process: subprocess.Popen, moment: float, is_due: Callable[[], bool], delay: float
) -> float | None:
    """Wait until a run is to be disturbed: a moment is over and then, after a delay, what is aimed at has begun.

    Returns:
        seconds since the call, or None if the run ended before.
    """
    began = time.monotonic()
    while process.poll() is None:
        if time.monotonic() - began >= moment and is_due():
            time.sleep(delay)
            return time.monotonic() - began
        time.sleep(POLL)
    return None


@dataclass
class Series:
    """What is done to one run, and what came of it.

    Attributes:
        fault: a key of `FAULTS`.
        number: of faults.
        grace, limit: see `Target`.
        done, starts: the faults so far, and how many processes there were.
    """

    recipe: Path
    folder: Path
    processes: int
    timing: Timing
    fault: str
    number: int
    seed: int
    grace: float
    limit: float
    done: list[Disturbance] = field(default_factory=list)
    starts: int = 0

    @property
    def output(self) -> Path:
        """Of the disturbed run."""
        return self.folder / "killed"


class SeriesError(Exception):
    """A run didn't come back from a fault."""


def run_disturbed(series: Series) -> None:
    """Disturb a run and start it again until all faults are spent, or it is over, and it has ended by itself.

    Raises:
        SeriesError: a start failed that nothing was done to.
    """
    rng, done, output, timing = random.Random(series.seed), series.done, series.output, series.timing
    ready, damaged = READY.get(series.fault), []
    print(HEADER, flush=True)
    while True:
        number, resumed, finished = len(done) + 1, last_step(output), is_finished(output)
        aim = next_aim(number, series.number, resumed == timing.steps)
        moment = plan(rng, timing, resumed, series.number - len(done))
        if number == 2:  # whatever the dice say, faults hit after the first checkpoint
            moment = max(moment, timing.first_step + 1.2 * SAVE_STEPS * timing.step)
        # A run that is over survives anything: one fault shows that, more would only be counted.
        if number > series.number or any(fault.phase == "finished" for fault in done):
            moment = float("inf")
        log, since = series.folder / f"killed_{series.starts}.log", time.time()
        process = start(series.recipe, output, series.processes, log)
        series.starts += 1
        now = functools.partial(phase, output, log, timing.steps, since, finished)
        delay = 0.0 if aim == "any" else rng.uniform(0, LONGEST_DELAY)

        def is_due(aim=aim, now=now, process=process, log=log) -> bool:
            return (aim == "any" or now() == aim) and (ready is None or ready(process, output, log))

        try:
            seconds = wait_for_moment(process, moment, is_due, delay)
            if seconds is not None:
                seen = now()
                limits = {"grace": series.grace, "limit": series.limit + 2 * SAVE_STEPS * timing.step}
                target = Target(process, series.processes, output, log, number, rng, **limits)
                outcome = FAULTS[series.fault](target)
        finally:
            if process.poll() is None:
                kill_all(process)
        text = log.read_text(errors="replace")
        if done and (problem := wrong_start(text, resumed, damaged)):
            done[-1].problem = done[-1].problem or problem
            print(f"      then: {problem}", flush=True)
        if seconds is None:
            if process.returncode:
                raise SeriesError(f"a run ended with status {process.returncode}:\n{text[-3000:]}")
            return  # by itself, maybe before its fault
        if resumed_at(text) is not None:  # it has told
            damaged = []
        damaged += [outcome.damaged] if outcome.damaged else []
        reached = max(resumed, steps_logged(log))
        times, lost = (round(moment, 2), round(seconds, 2)), reached - last_step(output)
        if series.fault == "term" and lost:
            outcome.problem = outcome.problem or f"{lost} steps are lost"
        state = seen, left_behind(output), process.returncode, outcome.problem, outcome.note
        done.append(Disturbance(number, aim, *times, resumed, reached, lost, *state))
        print(row(done[-1]), flush=True)


def next_aim(number: int, of: int, trained: bool) -> str:
    """What a fault is aimed at.

    A run waits for its end only once, with the last of several faults: otherwise those that follow would hit a run
    that has nothing left to lose. One that is trained doesn't save or evaluate any more.
    """
    if trained:
        return "any"
    return "end" if number == of >= len(AIMS) else AIMS[(number - 1) % len(AIMS)]


def wrong_start(text: str, expected: int, damaged: list[str]) -> str:
    """What is wrong with how a run went on, from its output; nothing if it is right or didn't come that far.

    Args:
        text: its output.
        expected: step of the newest whole checkpoint, 0 for none.
        damaged: names of checkpoints that it has to call damaged.
    """
    at = resumed_at(text)
    if at is None:
        return ""
    silent = [name for name in damaged if not re.search(rf"/{name} is left out: it is damaged", text)]
    if silent:
        return f"it says nothing of the damage of {', '.join(silent)}"
    return "" if at == expected else f"it went on from step {at} instead of {expected}"


def left_behind(output: Path) -> str:
    """What a kill left of checkpoints: `30` is complete, `40?` was being written or removed."""
    steps = [str(step_of(folder)) for folder in checkpoint_folders(output)]
    return " ".join(steps + [f"{step_of(folder.stem)}?" for folder in leftovers(output)])


COLUMNS = "{:>4}  {:<10}  {:>7}  {:>12}  {:>9}  {:>4}  {:<10}  {:>6}  {:<12}  {}"
HEADER = COLUMNS.format(
    *("no.", "aim", "seconds", "resumed from", "last step", "lost", "while", "status", "checkpoints", "remarks")
)


def row(fault: Disturbance) -> str:
    origin, left = fault.resumed_from or "start", fault.left_behind or "-"
    steps = origin, fault.steps_reached, fault.steps_lost
    remarks = f"PROBLEM: {fault.problem}" if fault.problem else fault.note
    return COLUMNS.format(
        fault.number, fault.aim, fault.seconds, *steps, fault.phase, fault.status, left, remarks
    ).rstrip()


def run_undisturbed(recipe: Path, output: Path, processes: int, log: Path, steps: int) -> Timing:
    """Run to the end and note how long it took."""
    began, first = time.monotonic(), None
    process = start(recipe, output, processes, log)
    try:
        while process.poll() is None:
            if first is None and steps_logged(log):
                first = time.monotonic() - began
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            kill_all(process)
    if process.returncode:
        raise SystemExit(f"the undisturbed run ended with status {process.returncode}:\n{log.read_text()[-3000:]}")
    return Timing(first or 0.0, time.monotonic() - began, steps)


# Comparison -----------------------------------------------------------------------------------------------------


def flatten(value, name: str = "") -> dict[str, object]:
    """Name -> leaf of nested dicts, lists and tuples."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {name: value}
    return {path: leaf for key, part in items for path, leaf in flatten(part, f"{name}.{key}").items()}


def same(a: object, b: object) -> bool:
    """Bit for bit, so that NaN equals itself and 0.0 isn't -0.0."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        a, b = a.cpu().contiguous().numpy(), b.cpu().contiguous().numpy()
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


def load(path: Path) -> dict[str, object]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return flatten(torch.load(path, weights_only=False))  # written by this program


def compare(first: Path, second: Path, steps: int) -> list[dict]:
    """Each file of the final state: values compared, those that differ, and SHA-256 of both."""
    rows = []
    last = f"checkpoint-{steps}"
    found = {path.relative_to(first).as_posix() for kind in STATES for path in (first / last).glob(kind)}
    for name in ["model.safetensors", *sorted(found)]:
        a, b = load(first / name), load(second / name)
        names = sorted({*a, *b})
        different = [key for key in names if key not in a or key not in b or not same(a[key], b[key])]
        digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (first, second)]
        rows.append({"file": name, "values": len(names), "different": different, "sha256": digests})
    metrics = [json.loads((folder / "evaluation" / "eval_metrics.json").read_text()) for folder in (first, second)]
    different = [key for key in metrics[0] if metrics[0][key] != metrics[1].get(key)]
    rows.append({"file": "evaluation/eval_metrics.json", "values": len(metrics[0]), "different": different})
    return rows


# Several series -------------------------------------------------------------------------------------------------


def add_to_log(path: Path, entry: dict) -> list[dict]:
    """Append a series to a JSON list of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = (json.loads(path.read_text()) if path.exists() else []) + [entry]
    write_atomically(path, json.dumps(entries, indent=1) + "\n")
    return entries


def table(entries: list[dict]) -> str:
    """Fault and processes -> times planned, tried, survived, most steps lost, where they hit.

    None of a series survived whose run didn't come back or ended otherwise than the undisturbed one.
    """
    lines = [
        "| fault | processes | workers | planned | tried | survived | most steps lost | while |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted({(entry["fault"], entry["processes"], entry["workers"]) for entry in entries}):
        mine = [entry for entry in entries if (entry["fault"], entry["processes"], entry["workers"]) == key]
        faults = [fault for entry in mine for fault in entry["faults"]]
        good = [fault for entry in mine if entry["equal"] for fault in entry["faults"] if not fault["problem"]]
        phases = Counter(fault["phase"] for fault in faults)
        where = ", ".join(f"{name} {number}" for name, number in phases.most_common())
        lost = max((fault["steps_lost"] for fault in faults), default=0)
        planned = sum(entry["planned"] for entry in mine)
        lines.append("| " + " | ".join(map(str, (*key, planned, len(faults), len(good), lost, where))) + " |")
    errors = [f"{e['fault']}, seed {e['seed']}: {e['error'].splitlines()[0]}" for e in entries if e.get("error")]
    return "\n".join([*lines, *errors])


def main() -> None:
    """Print the table of a log, or run a series."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", choices=FAULTS, default="kill", help="what is done to the run")
    parser.add_argument("--kills", type=int, default=5, help="how often; no more than a twelfth of the steps")
    parser.add_argument("--workers", type=int, default=0, help="data workers a process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the faults' moments")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of the run")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--grace", type=float, default=30, help="seconds to save and end within after SIGTERM")
    parser.add_argument(
        "--limit", type=float, default=60, help="seconds to end within after other faults, beside those of 20 steps"
    )
    parser.add_argument("--output", type=Path, help="a new or empty folder")
    parser.add_argument("--log", type=Path, help="JSON of several series, to which this one is added")
    parser.add_argument("--table", action="store_true", help="only print the table of --log")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="other values for the recipe")
    options = parser.parse_args()
    if options.table:
        if options.log is None or not options.log.is_file():
            parser.error("--table needs the --log of earlier series")
        print(table(json.loads(options.log.read_text())))
        return
    if options.output is None:
        parser.error("--output is missing")
    if options.fault == "rank" and options.processes < 2:
        parser.error("--fault rank needs --processes 2")
    folder = options.output.resolve()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} isn't empty")
    # Told to end (`timeout`), it ends its run and unmounts the disk.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Mounted first: without root nothing has to be trained to find that out.
    disk = small_disk(folder / "killed") if options.fault == "disk" else contextlib.nullcontext()
    try:
        with disk:
            passed = run_series(options, folder)
    except DiskSkipped as reason:
        print(f"skipped: {reason}")
        return
    sys.exit(not passed)


def run_series(options: argparse.Namespace, folder: Path) -> bool:
    """Run both, print the tables, write `result.json`. Whether all went well."""
    write_noise_coco(folder / "data", options.images)
    recipe = write_recipe(folder, options.steps, options.workers, options.seed)
    if options.overrides:
        load_recipe(recipe, options.overrides).save(recipe)
    whole = folder / "whole"
    timing = run_undisturbed(recipe, whole, options.processes, folder / "whole.log", options.steps)
    print(
        f"undisturbed: {timing.total:.1f} s, first step after {timing.first_step:.1f} s, {timing.steps} steps; "
        f"{options.workers} workers, {options.processes} processes; {options.fault}",
        flush=True,
    )
    # The cache of the data set is a part of the run, so the killed one makes its own.
    shutil.rmtree(folder / "cache")
    settings = options.fault, options.kills, options.seed, options.grace, options.limit
    series = Series(recipe, folder, options.processes, timing, *settings)
    rows, error = [], ""
    try:
        run_disturbed(series)
        rows = compare(whole, series.output, options.steps)
    except (SeriesError, OSError) as problem:  # it is logged as the others are: the worst outcome must not be left out
        error = f"{type(problem).__name__}: {problem}"
    for entry in rows:
        digest = "sha256 equal" if len(set(entry.get("sha256", [""]))) == 1 else "sha256 differs"
        text = f"{len(entry['different'])} differ: {entry['different'][:5]}" if entry["different"] else "identical"
        print(f"{entry['file']:<40} {entry['values']:>5} values, {text}{', ' + digest if 'sha256' in entry else ''}")
    equal = not error and not any(entry["different"] for entry in rows)
    verdict = error or ("the same bit for bit" if equal else "DIFFERENT")
    print(f"{len(series.done)} of {options.kills} faults, {series.starts} starts: {verdict}")
    result = {name: getattr(options, name) for name in ("fault", "processes", "workers", "seed", "steps")}
    result |= {"commit": commit(), "planned": options.kills, "done": len(series.done), "equal": equal, "error": error}
    result |= {"survived": sum(equal and not fault.problem for fault in series.done)}
    result |= {"most_steps_lost": max((fault.steps_lost for fault in series.done), default=0)}
    result |= {"phases": Counter(fault.phase for fault in series.done)}
    result |= {"starts": series.starts, "timing": asdict(timing), "faults": [asdict(fault) for fault in series.done]}
    if options.log is not None:
        print(table(add_to_log(options.log, result)))
    (folder / "result.json").write_text(json.dumps(result | {"files": rows}, indent=1))
    return equal and not any(fault.problem for fault in series.done)


if __name__ == "__main__":
    main()
