"""COCO metrics of 5,000 images with 100 detections each: pycocotools against faster-coco-eval.

    python benchmarks/evaluation.py               # 3 interleaved pairs: about 4 minutes
    python benchmarks/evaluation.py --images 500 --pairs 9

Images are synthetic: 80 classes, 7 boxes an image on average, sizes and class frequencies spread as widely as COCO's;
detections are moved ground truth and false positives. Seconds are of what an evaluation does with them: `update` takes
detections batch by batch, `ground truth` makes COCO's annotations of the split, and the name of a package is
everything from the collected detections to the metrics, `ground truth` included. The largest difference is that
of all 92 numbers.

Then post-processing alone, on made-up outputs for images of 1333x800: with about 850 (prior, class) pairs of an image
above 0.05, as of a trained detector, and with all of them above it.
"""

import argparse
import contextlib
import io
import itertools
import time
from collections import defaultdict

import datasets
import numpy as np
import torch
from reporting import add_output, finish, median_with_interval

from crosskd_hf.data.split import DetectionSplit, annotation_features
from crosskd_hf.models.base import DenseDetectorOutput
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor
from crosskd_hf.training.coco_metrics import CocoEvaluator

BACKENDS = ("pycocotools", "faster")
CLASSES = 80
SIDE = 640
BATCH = 8
POST_PROCESSING_RUNS = 15


def synthetic_split(images: int, rng: np.random.Generator) -> DetectionSplit:
    """Ground truth: 0 to about 30 boxes an image, of 4 to 640 pixels a side."""
    frequency = 1 / np.arange(1, CLASSES + 1)
    rows: list[dict] = []
    for image_id in range(1, images + 1):
        count = rng.geometric(1 / 8) - 1
        size = np.exp(rng.uniform(np.log(4), np.log(SIDE), (count, 2)))
        corner = rng.random((count, 2)) * (SIDE - size)
        objects = {
            "id": list(range(count)),
            "bbox": np.concatenate([corner, size], axis=1).tolist(),
            "category": rng.choice(CLASSES, count, p=frequency / frequency.sum()).tolist(),
            "area": (size.prod(axis=1) * rng.uniform(0.4, 1, count)).tolist(),
            "iscrowd": (rng.random(count) < 0.01).tolist(),
        }
        name = {"image_id": image_id, "file_name": f"{image_id}.jpg", "width": SIDE, "height": SIDE}
        rows.append({**name, "objects": objects})
    names = tuple(f"class {label}" for label in range(CLASSES))
    dataset = datasets.Dataset.from_list(rows, features=annotation_features(names))
    return DetectionSplit(dataset, names, tuple(range(1, CLASSES + 1)))


def synthetic_detections(split: DetectionSplit, count: int, rng: np.random.Generator) -> list[dict]:
    """`count` detections an image: each box two or three times, moved, with good scores, and false positives."""
    found = []
    for objects in split.dataset["objects"]:
        truth = np.array(objects["bbox"]).reshape(-1, 4)
        right = rng.permutation(np.repeat(np.arange(len(truth)), 3))[: count * 3 // 4]
        wrong = count - len(right)
        size = np.exp(rng.uniform(np.log(4), np.log(SIDE / 2), (wrong, 2)))
        anywhere = np.concatenate([rng.random((wrong, 2)) * (SIDE - size), size], axis=1)
        near = truth[right] + rng.normal(0, 0.08, (len(right), 4)) * np.tile(truth[right, 2:], 2)
        xywh = np.concatenate([near, anywhere])
        own = np.array(objects["category"], dtype=np.int64)[right]
        labels = np.concatenate([own, rng.integers(CLASSES, size=wrong)])
        scores = np.concatenate([rng.beta(3, 3, len(right)), rng.beta(1, 8, wrong)])
        order = (-scores).argsort()
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:].clip(0)], axis=1)
        found.append(
            {
                "scores": torch.tensor(scores[order], dtype=torch.float32),
                "labels": torch.tensor(labels[order]),
                "boxes": torch.tensor(boxes[order], dtype=torch.float32),
            }
        )
    return found


def evaluate(
    split: DetectionSplit, detections: list[dict], backend: str, seconds: dict[str, list[float]]
) -> dict[str, float]:
    """The metrics; how long each part took is appended to `seconds`."""
    image_ids = list(split.dataset["image_id"])
    evaluator = CocoEvaluator(split, backend)
    times = [time.perf_counter()]
    for start in range(0, len(image_ids), BATCH):
        evaluator.update(image_ids[start : start + BATCH], detections[start : start + BATCH])
    times.append(time.perf_counter())
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator._ground_truth()
    times.append(time.perf_counter())
    metrics = evaluator.compute()
    times.append(time.perf_counter())
    for part, start, end in zip(("update", "ground truth", backend), times, times[1:], strict=False):
        seconds[part].append(end - start)
    return metrics


def synthetic_outputs(anchors: int, images: int, everything: bool) -> DenseDetectorOutput:
    """Of a detector with so many anchors a cell, for images of 1333x800."""
    draw = torch.Generator().manual_seed(0)
    level_sizes = [height * width * anchors for height, width in ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))]
    shape = images, sum(level_sizes), CLASSES
    logits = torch.randn(shape, generator=draw) * 0.6 - (0 if everything else 6)
    for image in range(images):
        for _ in range(15):  # objects, that 60 neighbouring priors see
            start = int(torch.randint(shape[1] - 60, (), generator=draw))
            label = int(torch.randint(CLASSES, (), generator=draw))
            logits[image, start : start + 60, label] = torch.randn(60, generator=draw) * 1.5 - 1
    centers = torch.rand(*shape[:2], 2, generator=draw) * torch.tensor([1333.0, 800.0])
    sides = torch.rand(*shape[:2], 2, generator=draw) * 200 + 8
    return DenseDetectorOutput(
        logits=logits,
        pred_boxes=torch.cat([centers, sides], dim=-1) / torch.tensor([1333.0, 800.0] * 2),
        level_sizes=torch.tensor([level_sizes] * images),
    )


def post_processing(runs: int) -> list[dict]:
    """Rows of images a second."""
    processor = DenseDetectorImageProcessor()
    rows = []
    for anchors, images, everything in itertools.product((1, 9), (1, 8), (False, True)):
        outputs = synthetic_outputs(anchors, images, everything)
        rates = []
        for _ in range(runs + 1):
            start = time.perf_counter()
            processor.post_process_object_detection(outputs, 0.0, [(600, 1000)] * images)
            rates.append(images / (time.perf_counter() - start))
        name = f"post-processing, {anchors} anchors a cell, batch {images}, {'all' if everything else 'few'} above"
        rows.append({"work": name, "images/s": median_with_interval(rates[1:])})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="an image")
    parser.add_argument("--pairs", type=int, default=3)
    add_output(parser)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    split = synthetic_split(arguments.images, rng)
    detections = synthetic_detections(split, arguments.detections, rng)

    seconds: dict[str, list[float]] = defaultdict(list)
    metrics: dict[str, dict[str, float]] = {}
    for pair in range(arguments.pairs):
        for backend in BACKENDS if pair % 2 else reversed(BACKENDS):
            metrics[backend] = evaluate(split, detections, backend, seconds)
        print(f"pair {pair + 1} of {arguments.pairs}: done", flush=True)

    work = f"{arguments.images} images x {arguments.detections}"
    parts = ("update", "ground truth", *BACKENDS)
    rows = [{"work": f"{work}: {part}", "seconds": median_with_interval(seconds[part])} for part in parts]
    slow, fast = (metrics[backend] for backend in BACKENDS)
    ratios = [a / b for a, b in zip(*(seconds[backend] for backend in BACKENDS), strict=True)]
    rows[-2]["AP"], rows[-1]["AP"] = slow["AP"], fast["AP"]
    rows[-1]["times faster"] = median_with_interval(ratios)
    rows[-1]["largest difference"] = max(abs(slow[name] - fast[name]) for name in slow)
    rows += post_processing(POST_PROCESSING_RUNS)
    finish(arguments, rows, ("work",))


if __name__ == "__main__":
    main()
