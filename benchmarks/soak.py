"""Trains for an hour and watches memory, file handles, threads, checkpoints and throughput.

    python benchmarks/soak.py --minutes 60 --workers 2 --folder DIR --output SOAK.json --picture SOAK.png

A small CrossKD run on generated noise images, with evaluations and checkpoints every minute or so, by the ordinary
command in a process of its own. It is sampled from outside (/proc, so Linux only) and ended by SIGTERM. Slopes are of
straight lines through the samples after a warm-up of a fifth of the time, with 95% intervals that allow for the
samples' correlation. Exit status 1 if the run ended early or badly, or kept too many checkpoints.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from kill_and_resume import descendants, ends, start, steps_logged, write_noise_coco, write_recipe
from reporting import commit, machine

from crosskd_hf.checkpoints import checkpoint_folders
from crosskd_hf.files import write_atomically
from crosskd_hf.plots import new_figure, save_figure
from crosskd_hf.recipe import load_recipe

KEPT = 2  # save_total_limit
OVERRIDES = ("training.max_steps=10000000", "training.save_steps=100", "training.eval_steps=150")
WARM_UP = 0.2  # of the time
BLOCKS = 20  # means of which stand for independent samples
UNITS = {"memory_mb": "MB"}


def sample(pid: int, folder: Path, log: Path, began: float) -> dict[str, float]:
    """What a run and all its workers hold at this moment. Memory that they share counts once (PSS)."""
    found = {"seconds": time.monotonic() - began, "memory_mb": 0.0, "handles": 0, "threads": 0, "processes": 0}
    found["cpu_seconds"] = 0.0  # other programs on the machine don't change it much
    for member in descendants(pid):
        process = Path(f"/proc/{member}")
        try:
            pss = re.search(r"^Pss:\s+(\d+) kB", (process / "smaps_rollup").read_text(), re.MULTILINE)
            threads = re.search(r"^Threads:\s+(\d+)", (process / "status").read_text(), re.MULTILINE)
            handles = len(list((process / "fd").iterdir()))
            times = (process / "stat").read_text().rpartition(")")[2].split()[11:15]
        except OSError:  # a worker has just ended
            continue
        if pss is None or threads is None:
            continue
        found["memory_mb"] += int(pss.group(1)) / 1024
        # Its own time, and that of its children which have ended.
        found["cpu_seconds"] += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        found["threads"] += int(threads.group(1))
        found["handles"] += handles
        found["processes"] += 1
    found["checkpoints"] = len(checkpoint_folders(folder))
    found["folder_mb"] = sum(_size(path) for path in folder.rglob("*")) / 1e6
    found["steps"] = steps_logged(log)
    return {name: round(value, 2) for name, value in found.items()}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def slope(hours: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Change an hour with its 95% interval: from means of blocks, neighbouring samples being alike."""
    if len(values) < BLOCKS:
        raise SystemExit(f"only {len(values)} samples after the warm-up: let it run longer")
    hours, values = (np.array([block.mean() for block in np.array_split(v, BLOCKS)]) for v in (hours, values))
    (gain, start_value), covariance = np.polyfit(hours, values, 1, cov=True)
    margin = 2.1 * covariance[0, 0] ** 0.5  # Student's t of 18 degrees of freedom
    return {"start": start_value, "an_hour": gain, "low": gain - margin, "high": gain + margin}


def summary(samples: list[dict]) -> dict[str, dict[str, float]]:
    """Slope of each thing watched, after the warm-up."""
    last = samples[-1]["seconds"]
    late = [entry for entry in samples if entry["seconds"] >= WARM_UP * last]
    times = np.array([entry["seconds"] for entry in late]) / 3600
    found = {name: slope(times, np.array([s[name] for s in late])) for name in ("memory_mb", "handles", "threads")}
    steps, middles = np.diff([s["steps"] for s in late]), (times[1:] + times[:-1]) / 2
    rates = {"steps_per_second": "seconds", "steps_per_cpu_second": "cpu_seconds"}
    return found | {
        name: slope(middles, steps / np.diff([s[clock] for s in late]).clip(min=1e-3)) for name, clock in rates.items()
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
    write_noise_coco(folder / "data", 100)
    recipe = write_recipe(folder, 1000, options.workers, seed=0)
    load_recipe(recipe, OVERRIDES).save(recipe)
    run, log = folder / "run", folder / "run.log"
    began, samples, most_kept = time.monotonic(), [], 0
    process = start(recipe, run, 1, log)
    while time.monotonic() - began < 60 * options.minutes and process.poll() is None:
        time.sleep(options.every)
        samples.append(sample(process.pid, run, log, began))
        most_kept = max(most_kept, samples[-1]["checkpoints"])
        if len(samples) % 30 == 0:
            print(samples[-1], flush=True)
    early = process.poll() is not None
    finish_status(process)
    text = log.read_text(errors="replace")
    said = re.findall(r"ended by SIGTERM .*", text)
    samples = [entry for entry in samples if entry["steps"] > 0]
    result = {
        **{"machine": machine(), "commit": commit(), "minutes": options.minutes, "workers": options.workers},
        **{"steps": steps_logged(log), "evaluations": len(re.findall(r"^evaluation at step", text, re.MULTILINE))},
        **{"checkpoints_at_most": most_kept, "status": process.returncode, "last_words": said[:1]},
        **{"slopes": summary(samples), "log_mb": round(len(text) / 1e6, 2), "samples": samples},
    }
    print(f"{'':<18} {'at the start':>12} {'an hour':>9}   95%")
    for name, values in result["slopes"].items():
        low, high = values["low"], values["high"]
        print(
            f"{name:<18} {values['start']:>12.2f} {values['an_hour']:>+9.3f}   {low:+.3f} to {high:+.3f} {UNITS[name]}"
        )
    print({name: result[name] for name in ("steps", "evaluations", "checkpoints_at_most", "status", "last_words")})
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.output, json.dumps(result) + "\n")
    if options.picture:
        draw(samples, options.picture)
    sys.exit(early or process.returncode != 0 or not said or most_kept > KEPT + 1)


def finish_status(process: subprocess.Popen) -> None:
    """SIGTERM, and a minute to save."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        ends(process, 60)


if __name__ == "__main__":
    main()
