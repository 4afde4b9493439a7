"""What a CrossKD step costs as its inputs grow: boxes, images, classes, pixels, processes. Draws a PNG.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --detectors gfl --axes boxes classes --runs 3      # a part of it

One axis is changed at a time, the rest stays at 2 images of 128 x 160 pixels with 8 boxes each and 80 classes, an R18
and an R18 teacher. Steps and floors (the convolutions alone, see step.py) run in turn; `time / floor` is the median of
their ratios. `beyond` counts operators beyond the floor. Processes train together on the CPU (gloo), each with a
thread and a batch of its own; `synchronising` is what a step takes longer with the exchange of gradients than without,
over the whole step.
"""

import argparse
import os
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from matplotlib import pyplot
from reporting import add_output, finish, median_with_interval
from step import Step, count, interleaved
from torch.nn.parallel import DistributedDataParallel

from crosskd_hf.models import CONFIGS


@dataclass(frozen=True)
class Load:
    """What a step is given. `side` is the height; images are a quarter wider."""

    boxes: int = 8
    images: int = 2
    classes: int = 80
    side: int = 128

    def step(self, detector: str) -> Step:
        """The step with that load."""
        backbones = ("resnet18", "resnet18")
        return Step.build(
            detector, self.images, self.boxes, (self.side, self.side * 5 // 4), backbones, num_labels=self.classes
        )


AXES = {
    "boxes": (0, 8, 32, 128, 500),
    "images": (1, 2, 4, 8),
    "classes": (3, 80, 1203),
    "side": (64, 128, 256, 512),
}
PROCESSES = (1, 2)


def measure(detector: str, axis: str, runs: int) -> list[dict]:
    """Rows of an axis."""
    rows = []
    for value in AXES[axis]:
        step = replace(Load(), **{axis: value}).step(detector)
        full, folded = count(step, step.full), count(step, step.folded_floor)
        times = list(interleaved(step, runs))
        rows.append(
            {
                "detector": detector,
                "axis": axis,
                "value": value,
                "beyond": full.total - folded.total,
                "syncs": full.syncs,
                "seconds": median_with_interval([mine for mine, _ in times]),
                "time / floor": median_with_interval([mine / floor for mine, floor in times]),
                "memory / floor": full.peak / count(step, step.floor).peak,
            }
        )
    return rows


def measure_processes(detector: str, runs: int) -> list[dict]:
    """Rows of training together."""
    rows = []
    for processes in PROCESSES:
        results = multiprocessing.get_context("spawn").SimpleQueue()
        arguments = (processes, _free_port(), detector, runs, results)
        multiprocessing.spawn(_train_together, arguments, nprocs=processes)
        pairs = results.get()
        rows.append(
            {
                "detector": detector,
                "axis": "processes",
                "value": processes,
                "seconds": median_with_interval([mine for mine, _ in pairs]),
                "synchronising": median_with_interval([1 - alone / mine for mine, alone in pairs]),
            }
        )
    return rows


def _train_together(rank: int, processes: int, port: int, detector: str, runs: int, results) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    step = Load().step(detector)
    model = DistributedDataParallel(step.pair)
    pairs = []
    for _ in range(runs + 1):
        seconds = []
        for synchronise in (True, False):
            dist.barrier()
            start = time.perf_counter()
            if synchronise:
                model(**step.inputs).loss.backward()
            else:
                with model.no_sync():
                    model(**step.inputs).loss.backward()
            dist.barrier()
            seconds.append(time.perf_counter() - start)
            model.zero_grad()
        pairs.append(tuple(seconds))
    if rank == 0:
        results.put(pairs[1:])
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def draw(rows: list[dict], path: Path) -> None:
    """Ratios to the floor along each axis, and the share of synchronising."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = pyplot.subplots(1, len(axes), figsize=(3.4 * len(axes), 3.2), squeeze=False)
    for axis, panel in zip(axes, panels[0], strict=True):
        quantity = "synchronising" if axis == "processes" else "time / floor"
        for detector in dict.fromkeys(row["detector"] for row in rows):
            mine = [row for row in rows if row["axis"] == axis and row["detector"] == detector]
            middle = [row[quantity]["median"] for row in mine]
            spread = [
                [m - row[quantity]["low"] for m, row in zip(middle, mine, strict=True)],
                [row[quantity]["high"] - m for m, row in zip(middle, mine, strict=True)],
            ]
            panel.errorbar([str(row["value"]) for row in mine], middle, spread, marker="o", capsize=3, label=detector)
        panel.set_xlabel(axis)
        panel.set_ylabel("share of a step" if axis == "processes" else quantity)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", default=sorted(CONFIGS), choices=sorted(CONFIGS))
    parser.add_argument("--axes", nargs="+", default=[*AXES, "processes"], choices=[*AXES, "processes"])
    parser.add_argument("--runs", type=int, default=5, help="pairs of step and floor a value (default: 5)")
    parser.add_argument("--picture", type=Path, default=Path("scaling.png"), help="the PNG (default: scaling.png)")
    add_output(parser)
    arguments = parser.parse_args()
    rows = []
    for detector in arguments.detectors:
        for axis in arguments.axes:
            rows += (
                measure_processes(detector, arguments.runs)
                if axis == "processes"
                else measure(detector, axis, arguments.runs)
            )
            print(f"{detector}, {axis}: done", flush=True)
    draw(rows, arguments.picture)
    finish(arguments, rows, ("detector", "axis", "value"))


if __name__ == "__main__":
    main()
