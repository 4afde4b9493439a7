"""Trains for an hour and watches memory, file handles, threads, checkpoints and throughput.

    python benchmarks/soak.py --minutes 60 --workers 2 --folder DIR --output SOAK.json --picture SOAK.png

A small CrossKD run on generated noise images, with evaluations and checkpoints every minute or so, by the ordinary
command in a process of its own. It is sampled from outside (/proc, so Linux only) and ended by SIGTERM. Slopes are of
straight lines through the samples after a warm-up of a fifth of the time, with 95% intervals that allow for the
samples' correlation. The folder and the log grow by what is logged; that is reported as such. Exit status 1 if the run
ended early or badly, or kept too many checkpoints.
"""

import argparse
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from faults import descendants, ends, kill_all, last_step, steps_logged
from kill_and_resume import start, write_noise_coco, write_recipe
from reporting import commit, machine

from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.training.checkpoints import checkpoint_folders
from crosskd_hf.utils.files import write_atomically
from crosskd_hf.utils.plots import new_figure, save_figure

KEPT = 2  # save_total_limit
OVERRIDES = ("training.max_steps=10000000", "training.save_steps=100", "training.eval_steps=150")
WARM_UP = 0.2  # of the time
BLOCKS = 20  # means of which stand for independent samples
FEWEST = 4  # blocks that an interval can be told from
GRACE = 60  # seconds to save and end within
WATCHED = {"memory_mb": "MB", "rss_mb": "MB", "handles": "", "threads": "", "folder_mb": "MB", "log_mb": "MB"}
UNITS = WATCHED | {"steps_per_second": "steps/s", "steps_per_cpu_second": "steps/s"}


def sample(pid: int, folder: Path, log: Path, began: float) -> dict[str, float]:
    """What a run and all its workers hold at this moment.

    Memory that they share counts once in `memory_mb` (PSS), and in `rss_mb` once in each process that has it.
    """
    counts = dict.fromkeys(("memory_mb", "rss_mb", "handles", "threads", "processes"), 0)
    counts["cpu_seconds"] = 0  # other programs on the machine don't change it much
    found: dict[str, float] = {"seconds": time.monotonic() - began, **counts}
    for member in descendants(pid):
        process = Path(f"/proc/{member}")
        try:
            memory = (process / "smaps_rollup").read_text()
            pss, rss = (re.search(rf"^{name}:\s+(\d+) kB", memory, re.MULTILINE) for name in ("Pss", "Rss"))
            threads = re.search(r"^Threads:\s+(\d+)", (process / "status").read_text(), re.MULTILINE)
            handles = len(list((process / "fd").iterdir()))
            times = (process / "stat").read_text().rpartition(")")[2].split()[11:15]
        except OSError:  # a worker has just ended
            continue
        if pss is None or rss is None or threads is None:
            continue
        found["memory_mb"] += int(pss.group(1)) / 1024
        found["rss_mb"] += int(rss.group(1)) / 1024
        # Its own time, and that of its children which have ended.
        found["cpu_seconds"] += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        found["threads"] += int(threads.group(1))
        found["handles"] += handles
        found["processes"] += 1
    found["checkpoints"] = len(checkpoint_folders(folder))
    found["folder_mb"] = sum(_size(path) for path in folder.rglob("*")) / 1e6
    found["log_mb"] = log.stat().st_size / 1e6
    found["steps"] = steps_logged(log)
    return {name: round(value, 4 if name == "log_mb" else 2) for name, value in found.items()}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def slope(hours: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Change an hour with its 95% interval, by least squares: of means of blocks, neighbouring samples being alike.

    Raises:
        ValueError: there are too few samples.
    """
    blocks = min(BLOCKS, len(values))
    if blocks < FEWEST:
        raise ValueError(f"{len(values)} samples after the warm-up are too few for a slope: take more --minutes")
    hours, values = (np.array([block.mean() for block in np.array_split(v, blocks)]) for v in (hours, values))
    (gain, offset), covariance = np.polyfit(hours, values, 1, cov=True)
    margin = student_t(blocks - 2) * covariance[0, 0] ** 0.5
    first = gain * hours[0] + offset
    return {"first": float(first), "an_hour": float(gain), "low": float(gain - margin), "high": float(gain + margin)}


def student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t, for two degrees of freedom and more.

    From the normal one by the expansion of Cornish and Fisher (Abramowitz and Stegun 26.7.5); within 1% of the truth.
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def warm(samples: list[dict]) -> list[dict]:
    """Those after the warm-up."""
    return [entry for entry in samples if entry["seconds"] >= WARM_UP * samples[-1]["seconds"]]


def slopes(samples: list[dict]) -> dict[str, dict[str, float]]:
    """Of each thing watched, after the warm-up."""
    late = warm(samples)
    times = np.array([entry["seconds"] for entry in late]) / 3600
    found = {name: slope(times, np.array([entry[name] for entry in late])) for name in WATCHED}
    steps, middles = np.diff([s["steps"] for s in late]), (times[1:] + times[:-1]) / 2
    rates = {"steps_per_second": "seconds", "steps_per_cpu_second": "cpu_seconds"}
    return found | {
        name: slope(middles, steps / np.diff([s[clock] for s in late]).clip(min=1e-3)) for name, clock in rates.items()
    }


def rates_of_thirds(samples: list[dict]) -> dict[str, float]:
    """Steps a second in the first and in the last third of the time after the warm-up."""
    late = warm(samples)
    begin, end = late[0]["seconds"], late[-1]["seconds"]
    first = [entry for entry in late if entry["seconds"] <= begin + (end - begin) / 3]
    last = [entry for entry in late if entry["seconds"] >= end - (end - begin) / 3]
    parts = {"first_third": (late[0], first[-1]), "last_third": (last[0], late[-1])}
    return {
        name: (b["steps"] - a["steps"]) / (b["seconds"] - a["seconds"]) if b["seconds"] > a["seconds"] else math.nan
        for name, (a, b) in parts.items()
    }


def draw(samples: list[dict], path: Path) -> None:
    """Four curves over time."""
    figure = new_figure(10, 6.5)
    minutes = [entry["seconds"] / 60 for entry in samples]
    curves = {
        "memory of all processes (PSS, MB)": [entry["memory_mb"] for entry in samples],
        "open file handles and threads": [entry["handles"] for entry in samples],
        "size of the run's folder (MB)": [entry["folder_mb"] for entry in samples],
        "steps a second and a CPU second, minute by minute": None,
    }
    for number, (title, values) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(2, 2, number)
        if values is None:
            edges = range(0, len(samples), max(1, round(60 / statistics.median(np.diff(minutes) * 60))))
            picked = [samples[i] for i in edges]
            for clock, label in (("seconds", "a second"), ("cpu_seconds", "a CPU second")):
                rates = np.diff([s["steps"] for s in picked]) / np.diff([s[clock] for s in picked])
                axes.plot([s["seconds"] / 60 for s in picked[1:]], rates, linewidth=0.8, label=label)
            axes.legend()
        else:
            axes.plot(minutes, values, linewidth=0.8, label="handles" if number == 2 else None)
        if number == 2:
            axes.plot(minutes, [entry["threads"] for entry in samples], linewidth=0.8, label="threads")
            axes.legend()
        axes.set(title=title, xlabel="minutes", ylim=(0, None))
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> None:
    """Run, sample, end, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=float, default=10, help="seconds between two samples")
    parser.add_argument("--folder", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--picture", type=Path, help="PNG")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} isn't empty")
    write_noise_coco(folder / "data", 100)
    recipe = write_recipe(folder, 1000, options.workers, seed=0)
    load_recipe(recipe, OVERRIDES).save(recipe)
    # Told to end (`timeout`), it ends its run.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run, log = folder / "run", folder / "run.log"
    result = {"machine": machine(), "commit": commit(), "minutes": options.minutes, "workers": options.workers}
    began, samples = time.monotonic(), []
    process = start(recipe, run, 1, log)
    try:
        while time.monotonic() - began < 60 * options.minutes and process.poll() is None:
            time.sleep(options.every)
            samples.append(sample(process.pid, run, log, began))
            if len(samples) % 30 == 0:
                print(samples[-1], flush=True)
        result |= ending(process, run, log)
    finally:
        if process.poll() is None:
            kill_all(process)
    text = log.read_text(errors="replace")
    result["evaluations"] = len(re.findall(r"^evaluation at step", text, re.MULTILINE))
    result["checkpoints_at_most"] = most_kept = max((entry["checkpoints"] for entry in samples), default=0)
    print(json.dumps(result, indent=1))
    samples = [entry for entry in samples if entry["steps"] > 0 and entry["processes"] > 0]  # the others: start, end
    problem = result["problem"]
    try:
        if not samples:
            raise ValueError(f"no sample shows a step:\n{text[-3000:]}")
        result |= {"slopes": slopes(samples), "steps_per_second": rates_of_thirds(samples)}
        print(table(result))
    except ValueError as error:
        problem = problem or str(error)
    if most_kept > KEPT + 1:
        problem = problem or f"{most_kept} checkpoints were kept"
    result |= {"problem": problem, "samples": samples}
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.output, json.dumps(result) + "\n")
    if options.picture and len(samples) > 1:
        draw(samples, options.picture)
    sys.exit(problem or 0)


def table(result: dict) -> str:
    """Slopes and rates, for people."""
    lines = [f"{'after the warm-up':<18} {'at first':>10} {'an hour':>9}   95%"]
    for name, values in result["slopes"].items():
        interval = f"{values['low']:+.3f} to {values['high']:+.3f} {UNITS[name]}"
        lines.append(f"{name:<18} {values['first']:>10.2f} {values['an_hour']:>+9.3f}   {interval}".rstrip())
    rates = result["steps_per_second"]
    lines.append(
        f"steps a second: {rates['first_third']:.3f} in the first third, {rates['last_third']:.3f} in the last"
    )
    return "\n".join(lines)


def ending(process: subprocess.Popen, run: Path, log: Path) -> dict[str, object]:
    """SIGTERM, and how the run ended: it has to save its last step, say so, and have the status 0."""
    early, began, problem = process.poll() is not None, time.monotonic(), ""
    if not early:
        process.send_signal(signal.SIGTERM)
    in_time = ends(process, GRACE)
    said = re.findall(r"ended by SIGTERM after step .*", log.read_text(errors="replace"))
    steps, saved = steps_logged(log), last_step(run)
    if early:
        problem = "it ended by itself, before its time"
    elif not in_time:
        problem = f"it didn't end within {GRACE} s after SIGTERM"
    elif process.returncode or not said:
        problem = f"status {process.returncode} after SIGTERM, {'' if said else 'not '}saying what it saved"
    elif saved < steps:
        problem = f"step {steps} was logged, {saved} is saved"
    seconds = round(time.monotonic() - began, 1)
    found = {"steps": steps, "saved": saved, "status": process.returncode, "seconds_to_end": seconds}
    # Without the folder, which is nobody's business where results are published.
    return found | {"last_words": [words.replace(f"{run}/", "") for words in said[:1]], "problem": problem}


if __name__ == "__main__":
    main()
