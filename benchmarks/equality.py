"""Is a step the same, however its images are spread? Gradients, evaluations and whole runs, compared.

    python benchmarks/equality.py --output EQUALITY.json

Four images of one size, as one batch and as two processes' (gloo): the gradients of what is trained, of the detection
losses and of CrossKD with PKD. In double precision, where sums in another order differ by 1e-12 and anything else by
much more. RetinaNet's normaliser and all of the distillation's statistics are a process' own, as published: those rows
may differ. Then the files of an evaluation by 1, 2 and 3 processes, and two runs of one recipe in fp32, byte for byte.
Exit status 1 if a row that must be equal isn't.
"""

import argparse
import contextlib
import hashlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import torch.multiprocessing as mp
from reporting import add_output, finish
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from tiny import tiny_args, tiny_batch, tiny_model, tiny_processor, tiny_split  # noqa: E402

from crosskd_hf.data.coco import load_coco  # noqa: E402
from crosskd_hf.data.dataset import DetectionDataset  # noqa: E402
from crosskd_hf.distillation import PKD, CrossKD, DistillationPair  # noqa: E402
from crosskd_hf.training.distillation_trainer import DistillationTrainer  # noqa: E402
from crosskd_hf.training.trainer import DetectionTrainer  # noqa: E402

DETECTORS = ("gfl", "retinanet", "fcos", "atss")
EQUAL = 1e-8  # relative to a gradient's norm
IMAGES = 4


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Have the losses, which are computed in fp32 whatever the networks run in, stay in double precision."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def share(batch: dict, first: int, count: int) -> dict:
    """Some images of a batch."""
    part = slice(first, first + count)
    return {"pixel_values": batch["pixel_values"][part].double(), "labels": batch["labels"][part]}


class Terms(torch.nn.Module):
    """Some terms of a pair. The others count 0 times, since DDP would wait for their parameters."""

    def __init__(self, detector: str, distil: bool):
        super().__init__()
        self.distil = distil
        student, teacher = tiny_model(detector, seed=1), tiny_model(detector, seed=2)
        methods = [CrossKD(), PKD(PKD.Settings(weight=2.0))] if distil else []
        self.pair = DistillationPair(student, teacher, methods).double().train()

    def forward(self, **batch) -> torch.Tensor:
        terms = self.pair(**batch).loss_dict
        return sum(term * (name.startswith("kd_") == self.distil) for name, term in terms.items())


def gradients(detector: str, distil: bool, rank: int, processes: int) -> dict:
    """Name -> gradient of a step of `IMAGES` images, of which this process has its share."""
    torch.set_num_threads(1)
    terms = Terms(detector, distil)
    model = DistributedDataParallel(terms) if processes > 1 else terms
    size = IMAGES // processes
    with double_precision():
        model(**share(tiny_batch(IMAGES), rank * size, size)).backward()
    return {name: p.grad for name, p in terms.pair.named_parameters() if p.grad is not None}


def in_process(rank: int, port: int, detector: str, output: str) -> None:
    """One of two."""
    join(rank, 2, port)
    torch.distributed.init_process_group("gloo")
    found = {distil: gradients(detector, distil, rank, 2) for distil in (False, True)}
    if rank == 0:
        torch.save(found, output)
    torch.distributed.destroy_process_group()


def join(rank: int, world: int, port: int) -> None:
    """What a launcher tells a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)


def free_port() -> int:
    """One on which processes can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def error(one: dict, other: dict) -> float:
    """The largest difference of a parameter's gradient, relative to its norm (tiny ones: to the largest of all)."""
    floor = 1e-6 * max(float(g.norm()) for g in one.values())
    return max(float((g - other[name]).norm()) / max(float(g.norm()), floor) for name, g in one.items())


def gradient_rows(folder: Path) -> list[dict]:
    """Every detector, with and without teacher."""
    rows = []
    for detector in DETECTORS:
        path = folder / f"{detector}.pt"
        mp.spawn(in_process, (free_port(), detector, str(path)), nprocs=2)
        found = torch.load(path, weights_only=True)
        for distil in (False, True):
            largest = error(gradients(detector, distil, 0, 1), found[distil])
            rows.append(
                {
                    "what": "gradients of " + ("the distillation" if distil else "the detection losses"),
                    "detector": detector,
                    "spread over": "2 processes",
                    "largest error": largest,
                    "must be equal": not (distil or detector == "retinanet"),
                    "equal": largest < EQUAL,
                }
            )
    return rows


def evaluate_share(rank: int, world: int, port: int, folder: str, images: int) -> None:
    """One of the processes of an evaluation."""
    if world > 1:
        join(rank, world, port)
    torch.set_num_threads(1)
    data = Path(folder) / f"data{images}"
    split = load_coco(data, "mini", cache_dir=str(data / "cache"))
    args = tiny_args(Path(folder) / f"run{images}_{world}", per_device_eval_batch_size=2)
    model = tiny_model()
    trainer = DetectionTrainer(model, args, eval_dataset=split, processing_class=tiny_processor(model))
    assert trainer.accelerator.num_processes == world
    trainer.evaluate()
    if world > 1:
        torch.distributed.destroy_process_group()


def evaluation_rows(folder: Path) -> list[dict]:
    """Files of evaluations of 5, 6 and 7 images in batches of 2, by 1, 2 and 3 processes."""
    rows = []
    for images in (5, 6, 7):
        tiny_split(folder / f"data{images}", images=images)
        digests = []
        for world in (1, 2, 3):
            mp.spawn(evaluate_share, (world, free_port(), str(folder), images), nprocs=world)
            found = sorted((folder / f"run{images}_{world}" / "evaluation").glob("*.json"))
            digests.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in found])
        equal = digests[0] == digests[1] == digests[2] and len(digests[0]) >= 2
        what = f"evaluation files, {images} images in batches of 2"
        rows.append({"what": what, "spread over": "1, 2 and 3 processes", "must be equal": True, "equal": equal})
    return rows


def run_row(folder: Path) -> dict:
    """Two runs of 6 steps in fp32, all weights."""
    digests = []
    for name in ("one", "two"):
        torch.manual_seed(0)
        model = tiny_model(seed=1, backbone="test_resnet", drop_path_rate=0.5, frozen_stages=0)
        split = tiny_split(folder / "run_data", images=7)
        data = DetectionDataset(split, train=True, short_side=64, long_side=96)
        args = tiny_args(folder / name, max_steps=6, gradient_accumulation_steps=2)
        teacher = tiny_model(seed=2, backbone="test_resnet")
        DistillationTrainer(model, teacher, args, train_dataset=data, processing_class=tiny_processor(model)).train()
        digest = hashlib.sha256()
        for value in model.state_dict().values():
            digest.update(value.contiguous().numpy().tobytes())
        digests.append(digest.hexdigest())
    equal = digests[0] == digests[1]
    return {
        "what": "weights after 6 steps of CrossKD in fp32",
        "spread over": "two runs",
        "must be equal": True,
        "equal": equal,
    }


def main() -> None:
    """Compare all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output(parser)
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        rows = [*gradient_rows(folder), *evaluation_rows(folder), run_row(folder)]
    finish(arguments, rows, ("what", "detector", "spread over"))
    wrong = [row for row in rows if row["must be equal"] and not row["equal"]]
    print(f"{len(rows)} rows, {sum(row['must be equal'] for row in rows)} must be equal, {len(wrong)} of them aren't")
    print(json.dumps(wrong)) if wrong else None
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
