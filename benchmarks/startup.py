"""How long the data of a large training set takes to be ready, and in how much memory.

    python benchmarks/startup.py
    python benchmarks/startup.py --images 5000 --boxes 35000     # a quick look

Writes a COCO file of so many images and boxes, the same at every call; the images are links to one small JPEG. Every
start is a process of its own. `first` reads and checks everything, and is shown its progress; `cached` maps what the
first has written. `seconds` are from the call of `load_coco` to a training set with its sampler, `rise MB` is the peak
of the process's resident memory in that time above what it was before, with all imports done. `imports s` and `before
MB` are theirs. `evaluator s` is what making an evaluator takes; it reads the boxes only when it computes metrics.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from reporting import add_output, finish, median_with_interval

SIZE = (640, 480)
CATEGORIES = 80


def write_data(root: Path, images: int, boxes: int) -> None:
    """A data set in COCO layout below `root`."""
    from PIL import Image

    draw = random.Random(0)
    (root / "annotations").mkdir()
    (root / "train").mkdir()
    Image.new("RGB", SIZE, (90, 120, 60)).save(root / "picture.jpg")
    names = [f"{number:012d}.jpg" for number in range(images)]
    for name in names:
        os.symlink(root / "picture.jpg", root / "train" / name)
    content = {
        "images": [
            {"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1]} for number, name in enumerate(names)
        ],
        "annotations": [annotation(number, draw.randrange(images), draw) for number in range(1, boxes + 1)],
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, CATEGORIES + 1)],
    }
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content), encoding="utf-8")


def annotation(number: int, image: int, draw: random.Random) -> dict:
    """One box with a small polygon."""
    x, y = round(draw.uniform(0, 500), 2), round(draw.uniform(0, 350), 2)
    w, h = round(draw.uniform(4, 130), 2), round(draw.uniform(4, 120), 2)
    return {
        "id": number,
        "image_id": image,
        "category_id": draw.randint(1, CATEGORIES),
        "bbox": [x, y, w, h],
        "area": round(w * h, 2),
        "iscrowd": int(draw.random() < 0.01),
        "segmentation": [[x, y, x + w, y, x + w, y + h]],
    }


def megabytes(name: str) -> float:
    """A figure of this process: VmRSS, or RssAnon of what no file is behind."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


class Peak(threading.Thread):
    """The most of a figure of memory since it started, looked at every few milliseconds."""

    def __init__(self, name: str) -> None:
        super().__init__(daemon=True)
        self.figure, self.over = name, threading.Event()
        self.before = self.peak = megabytes(name)

    def run(self) -> None:
        """Look."""
        while not self.over.wait(0.005):
            self.peak = max(self.peak, megabytes(self.figure))

    def rise(self) -> float:
        """Stop, and tell."""
        self.over.set()
        self.join()
        return max(self.peak, megabytes(self.figure)) - self.before


def start(root: str, evaluate: bool) -> None:
    """In a process of its own: get ready, and print the figures."""
    begin = time.perf_counter()
    from crosskd_hf.data.coco import load_coco
    from crosskd_hf.data.dataset import DetectionDataset
    from crosskd_hf.data.sampler import OrientationBatchSampler
    from crosskd_hf.data.split import keep_for_training
    from crosskd_hf.training.coco_metrics import CocoEvaluator

    row = {"imports s": time.perf_counter() - begin}
    all_memory, own_memory = Peak("VmRSS"), Peak("RssAnon")
    all_memory.start()
    own_memory.start()
    begin = time.perf_counter()
    split = load_coco(root, "train", cache_dir=f"{root}/cache")
    dataset = DetectionDataset(keep_for_training(split), train=True)
    next(iter(OrientationBatchSampler(dataset.orientations(), 2, seed=0)))
    row["seconds"] = time.perf_counter() - begin
    row |= {"rise MB": all_memory.rise(), "of it own MB": own_memory.rise(), "before MB": all_memory.before}
    if evaluate:
        begin = time.perf_counter()
        CocoEvaluator(split)
        row["evaluator s"] = time.perf_counter() - begin
    print(json.dumps(row))


def measured(root: Path, evaluate: bool) -> dict[str, float]:
    """The figures of one start."""
    words = [sys.executable, __file__, "--start", str(root), *(["--evaluate"] if evaluate else [])]
    return json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--boxes", type=int, default=850_000)
    parser.add_argument("--starts", type=int, default=5, help="from the cache")
    parser.add_argument("--start", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", action="store_true", help="also time the start of an evaluation")
    add_output(parser)
    arguments = parser.parse_args()
    if arguments.start:
        start(arguments.start, arguments.evaluate)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), arguments.images, arguments.boxes)
        data = {"data": f"{arguments.images} images, {arguments.boxes} boxes"}
        rows = [{"start": "first", **data, **measured(Path(folder), False)}]
        cached = [measured(Path(folder), arguments.evaluate) for _ in range(arguments.starts)]
    rows.append(
        {"start": "cached", **data, **{k: median_with_interval([row[k] for row in cached]) for k in cached[0]}}
    )
    finish(arguments, rows, ("start", "data"))


if __name__ == "__main__":
    main()
