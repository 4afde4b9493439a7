"""Disturbs a training run at random moments, starts it again, and compares it with an undisturbed one.

    python benchmarks/kill_and_resume.py --fault kill --kills 5 --workers 0 --processes 1 --output DIR --log F.json

A small CrossKD recipe on generated noise images is trained twice by the same command: undisturbed, and with faults:
SIGKILL, SIGTERM, one of two processes killed, a disk that fills up, a checkpoint that is damaged. Some are aimed at
phases that random moments seldom hit: a checkpoint that is being written or removed, an evaluation, the final save.
Weights, optimizer, schedule and random states must agree bit for bit; otherwise the exit status is 1. The log gathers
several calls. Needs Linux (/proc).
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from crosskd_hf.checkpoints import MARKER, checkpoint_folders, newest_complete
from crosskd_hf.files import write_atomically
from crosskd_hf.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"detector": "gfl", "backbone": "resnet18", "fpn_channels": 64, "head_channels": 64}
SAVE_STEPS = 10
EVAL_STEPS = 15
AIMS = ("any", "saving", "evaluation", "any", "end")  # in turn
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
        "distillation": {"tap_index": 3},
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
    train = ["-m", "crosskd_hf.train", str(recipe), f"training.output_dir={output}"]
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


def steps_logged(log: Path) -> int:
    """The last optimizer step that a run has logged; 0 if none."""
    found = re.findall(r"^step (\d+)/\d+ ", log.read_text(errors="replace"), re.MULTILINE)
    return int(found[-1]) if found else 0


# Killing --------------------------------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    """A process and all that came from it: torch starts each rank in a session, so not all are in its group."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    family = [pid]
    for member in family:
        family += parents.get(member, [])
    return family


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to a run and everything it started, and wait until all are gone."""
    family = descendants(process.pid)
    for pid in family:  # the launcher first, so that it has no time to end the others in its own way
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
    while any(is_alive(pid) for pid in family):
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_changing(output: Path, since: float) -> bool:
    """Whether a checkpoint folder is without marker and was touched after a time (`time.time()`)."""
    for folder in checkpoint_folders(output):
        try:
            if not (folder / MARKER).exists() and folder.stat().st_mtime >= since:
                return True
        except FileNotFoundError:  # removed in between
            return True
    return False


def phase(output: Path, log: Path, steps: int, since: float) -> str:
    """What a run is at, from its log and its folders."""
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
        problem: what should not have happened, or nothing.
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
    """Seconds after which to kill a process that goes on from step `resumed`.

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


def last_step(output: Path) -> int:
    """Step of the checkpoint that the next process goes on from."""
    return int(Path(newest_complete(output) or "checkpoint-0").name.removeprefix("checkpoint-"))


@dataclass
class Series:
    """What is done to one run.

    Attributes:
        fault: a key of `FAULTS`.
        limit: seconds that the run has to end by itself, where the fault doesn't end it.
    """

    recipe: Path
    folder: Path
    processes: int
    timing: Timing
    fault: str
    number: int
    seed: int
    limit: float

    @property
    def output(self) -> Path:
        """Of the disturbed run."""
        return self.folder / "killed"


def run_disturbed(series: Series) -> tuple[list[Disturbance], int]:
    """Disturb a run and start it again until all faults are spent and it has ended by itself.

    Returns:
        the faults, and how many processes there were.
    """
    rng, done, starts, output, timing = random.Random(series.seed), [], 0, series.output, series.timing
    print(HEADER, flush=True)
    while True:
        number, resumed = len(done) + 1, last_step(output)
        # A run that is over doesn't save or evaluate any more.
        aim = "any" if resumed == timing.steps else AIMS[(number - 1) % len(AIMS)]
        moment = plan(rng, timing, resumed, series.number - len(done))
        if number == 2:  # whatever the dice say, faults hit after the first checkpoint
            moment = max(moment, timing.first_step + 1.2 * SAVE_STEPS * timing.step)
        moment = moment if number <= series.number else float("inf")
        log, since = series.folder / f"killed_{starts}.log", time.time()
        process = start(series.recipe, output, series.processes, log)
        starts += 1
        now = functools.partial(phase, output, log, timing.steps, since)
        delay = 0.0 if aim == "any" else rng.uniform(0, LONGEST_DELAY)
        seconds = wait_for_moment(process, moment, lambda aim=aim, now=now: aim == "any" or now() == aim, delay)
        if done and series.fault == "damage" and "is left out" not in log.read_text(errors="replace"):
            done[-1].problem = done[-1].problem or "the damage was not noticed" * ("damaged" in done[-1].left_behind)
        if seconds is None:
            if process.returncode:
                raise SystemExit(f"a run ended with status {process.returncode}:\n{log.read_text()[-3000:]}")
            return done, starts  # by itself, maybe before its fault
        seen = now()
        problem = FAULTS[series.fault](process, series, log, rng)
        reached = max(resumed, steps_logged(log))
        times, lost = (round(moment, 2), round(seconds, 2)), reached - last_step(output)
        left = left_behind(output)
        done.append(Disturbance(number, aim, *times, resumed, reached, lost, seen, left, process.returncode, problem))
        print(row(done[-1]), flush=True)


# Faults. Each ends a run and tells what went wrong about that, or nothing ------------------------------------------


def kill(process: subprocess.Popen, series: Series, log: Path, rng: random.Random) -> str:
    """SIGKILL to all at once."""
    kill_all(process)
    return ""


def terminate(process: subprocess.Popen, series: Series, log: Path, rng: random.Random) -> str:
    """SIGTERM to the program, or to the launcher of several: it saves and says so, and loses no step."""
    process.send_signal(signal.SIGTERM)
    if not ends(process, series.limit):
        return f"it didn't end within {series.limit:g} s"
    text = log.read_text(errors="replace")
    said = re.search(r"ended by SIGTERM after step (\d+): its state is saved", text)
    if said:
        saved = last_step(series.output)
        if saved != int(said.group(1)) or saved < steps_logged(log):
            return f"step {saved} is saved, {said.group(1)} was said, {steps_logged(log)} logged"
        # A launcher has a status of its own.
        return "" if process.returncode == 0 or series.processes > 1 else f"its status is {process.returncode}"
    began, over = "goes on from" in text or steps_logged(log), "trained to step" in text
    return "" if over or not began else "it didn't say what it saved"


def kill_rank(process: subprocess.Popen, series: Series, log: Path, rng: random.Random) -> str:
    """SIGKILL to one of several processes: all others end, with an error."""
    ranks = [pid for pid in descendants(process.pid) if is_rank(pid)]
    if ranks:  # none while the launcher is starting
        os.kill(rng.choice(ranks), signal.SIGKILL)
    else:
        process.kill()
    if not ends(process, series.limit):
        return f"the others didn't end within {series.limit:g} s"
    return "" if process.returncode else "the launcher says that all is well"


def fill_disk(process: subprocess.Popen, series: Series, log: Path, rng: random.Random) -> str:
    """A file that takes all space where the run writes; it ends at the next checkpoint, the last one is intact."""
    before, filler = newest_complete(series.output), series.output / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            pass
    ended = ends(process, series.limit)
    filler.unlink()
    if not ended:
        return f"it didn't end within {series.limit:g} s"
    if "trained to step" in log.read_text(errors="replace") and not process.returncode:
        return ""  # nothing was left to be saved
    if not process.returncode or not re.search(
        "disk is full|GB are free|No space left", log.read_text(errors="replace")
    ):
        return f"status {process.returncode}, and no word of the disk"
    # It may have been the last to fit.
    step = int(before.rpartition("-")[2]) if before else 0
    return "" if last_step(series.output) >= step else "the last checkpoint isn't there any more"


def damage(process: subprocess.Popen, series: Series, log: Path, rng: random.Random) -> str:
    """SIGKILL, and a file of the newest whole checkpoint is cut short, changed in one bit, or gone."""
    kill_all(process)
    if (newest := newest_complete(series.output)) is None:
        return ""
    path = rng.choice([path for path in sorted(Path(newest).iterdir()) if path.suffix in (".pt", ".safetensors")])
    how = rng.choice(("cut", "bit", "gone"))
    if how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "bit":
        with open(path, "r+b") as file:
            file.seek(rng.randrange(path.stat().st_size))
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    else:
        path.unlink()
    print(f"      {path.name} of {Path(newest).name}: {how}", flush=True)
    return "" if newest_complete(series.output) != newest else "it still counts as whole"


FAULTS = {"kill": kill, "term": terminate, "rank": kill_rank, "disk": fill_disk, "damage": damage}


def ends(process: subprocess.Popen, seconds: float) -> bool:
    """Wait until a run and all it started are gone; kill what is left."""
    family = descendants(process.pid)
    until = time.monotonic() + seconds
    while time.monotonic() < until and (process.poll() is None or any(is_alive(pid) for pid in family)):
        time.sleep(0.05)
    ended = process.poll() is not None and not any(is_alive(pid) for pid in family)
    for pid in [] if ended else family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
    return ended


def is_rank(pid: int) -> bool:
    """Whether a process is one of those that train, and not their launcher or a data worker of theirs."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        parent_words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    ranked = any(word.startswith(b"LOCAL_RANK=") for word in environment)
    return ranked and b"crosskd_hf.train" in words and b"accelerate.commands.launch" in b" ".join(parent_words)


def left_behind(output: Path) -> str:
    """What a kill left of checkpoints: `30` is whole, `40?` is not."""
    return " ".join(
        folder.name.removeprefix("checkpoint-") + ("" if (folder / MARKER).exists() else "?")
        for folder in checkpoint_folders(output)
    )


COLUMNS = "{:>4}  {:<10}  {:>7}  {:>12}  {:>9}  {:>4}  {:<10}  {:>6}  {:<12}  {}"
HEADER = COLUMNS.format(
    *("no.", "aim", "seconds", "resumed from", "last step", "lost", "while", "status", "checkpoints", "problem")
)


def row(fault: Disturbance) -> str:
    origin, left = fault.resumed_from or "start", fault.left_behind or "-"
    steps = origin, fault.steps_reached, fault.steps_lost
    return COLUMNS.format(
        fault.number, fault.aim, fault.seconds, *steps, fault.phase, fault.status, left, fault.problem or "-"
    )


def run_undisturbed(recipe: Path, output: Path, processes: int, log: Path, steps: int) -> Timing:
    """Run to the end and note how long it took."""
    began, first = time.monotonic(), None
    process = start(recipe, output, processes, log)
    while process.poll() is None:
        if first is None and steps_logged(log):
            first = time.monotonic() - began
        time.sleep(0.05)
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
    """Fault and processes -> times tried, survived, most steps lost, where they hit."""
    lines = [
        "| fault | processes | workers | tried | survived | most steps lost | while |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in sorted({(entry["fault"], entry["processes"], entry["workers"]) for entry in entries}):
        mine = [entry for entry in entries if (entry["fault"], entry["processes"], entry["workers"]) == key]
        faults = [fault for entry in mine for fault in entry["faults"]]
        good = [fault for entry in mine if entry["equal"] for fault in entry["faults"] if not fault["problem"]]
        phases = Counter(fault["phase"] for fault in faults)
        where = ", ".join(f"{name} {number}" for name, number in phases.most_common())
        lost = max((fault["steps_lost"] for fault in faults), default=0)
        lines.append("| " + " | ".join(map(str, (*key, len(faults), len(good), lost, where))) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run both, print the tables, write `result.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", choices=FAULTS, default="kill", help="what is done to the run")
    parser.add_argument("--kills", type=int, default=5, help="how often")
    parser.add_argument("--workers", type=int, default=0, help="data workers a process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the faults' moments")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of the run")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--limit", type=float, default=60, help="seconds to end within, of faults that don't kill")
    parser.add_argument("--output", type=Path, help="a new or empty folder")
    parser.add_argument("--log", type=Path, help="JSON of several series, to which this one is added")
    parser.add_argument("--table", action="store_true", help="only print the table of --log")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="other values for the recipe")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.log.read_text())))
        return
    if options.output is None or (options.fault == "rank" and options.processes < 2):
        parser.error("--output is missing" if options.output is None else "--fault rank needs --processes 2")
    folder = options.output.resolve()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} isn't empty")
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
    settings = options.processes, timing, options.fault, options.kills, options.seed, options.limit
    series = Series(recipe, folder, *settings)
    with small_disk(series.output) if options.fault == "disk" else contextlib.nullcontext():
        faults, starts = run_disturbed(series)
        rows = compare(whole, series.output, options.steps)
    for entry in rows:
        digest = "sha256 equal" if len(set(entry.get("sha256", [""]))) == 1 else "sha256 differs"
        text = f"{len(entry['different'])} differ: {entry['different'][:5]}" if entry["different"] else "identical"
        print(f"{entry['file']:<40} {entry['values']:>5} values, {text}{', ' + digest if 'sha256' in entry else ''}")
    equal = not any(entry["different"] for entry in rows)
    problems = [fault for fault in faults if fault.problem]
    print(f"{len(faults)} faults, {starts} starts: " + ("the same bit for bit" if equal else "DIFFERENT"))
    result = {name: getattr(options, name) for name in ("fault", "processes", "workers", "seed", "steps")}
    result |= {"planned": options.kills, "equal": equal, "starts": starts, "timing": asdict(timing)}
    result |= {"faults": [asdict(fault) for fault in faults]}
    if options.log is not None:
        print(table(add_to_log(options.log, result)))
    (folder / "result.json").write_text(json.dumps(result | {"files": rows}, indent=1))
    sys.exit(not equal or bool(problems))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system in memory for a folder, a little larger than a run's checkpoints. Needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


if __name__ == "__main__":
    main()
