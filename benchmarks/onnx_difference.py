"""How far ONNX files are from PyTorch: the four detectors, at full size, on the images of a folder.

    python benchmarks/onnx_difference.py FOLDER --images 20 --output onnx_difference.json

The detectors have a ResNet-18 and random weights, scaled so that they find up to 100 things in every image. Each is
exported to ONNX with non-maximum suppression, and both run on each image alone, resized as for COCO (800 x 1333).
Compared are their matched detections, in pixels of the network's input; unmatched are those that only one of the two
has: where scores are equal, as in areas of one colour, rounding says which candidate suppresses the other.
Needs `pip install -e ".[onnx]"`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from crosskd_hf.inference.export import export_detector
from crosskd_hf.inference.export_check import Runner, compare, detections, load_exported
from crosskd_hf.inference.image_files import find_images
from crosskd_hf.models import CONFIGS, MODELS, DenseDetector
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor
from crosskd_hf.utils.images import load_rgb

LABELS = 80


@dataclass(frozen=True)
class Row:
    """A detector's differences over all images; times are means an image, in seconds, post-processing included."""

    detector: str
    images: int
    sizes: int
    detections: int
    box: float
    score: float
    unmatched: int
    pytorch_seconds: float
    onnx_seconds: float


def random_detector(detector: str, seed: int) -> DenseDetector:
    """A detector whose weights are drawn so that activations stay near unit scale from layer to layer."""
    torch.manual_seed(seed)
    labels = {i: f"class {i}" for i in range(LABELS)}
    model = MODELS[detector](CONFIGS[detector](backbone="resnet18", id2label=labels))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                gain = 0.3 if name.startswith("backbone") else 1.0
                scale = gain * (2 / parameter[0].numel()) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.head.cls_predictor.bias.fill_(-2.0)
    return model.eval()


def measure(detector: str, images: Sequence[Image.Image], seed: int) -> Row:
    """Export a detector and compare it with itself."""
    model = random_detector(detector, seed)
    processor = DenseDetectorImageProcessor.for_model(model.config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_detector(model, processor, path)
        runner = load_exported(path)
        expected, found, sizes, times = [], [], set(), []
        for one, other, size, seconds in run_both(model, processor, runner, images):
            expected += one
            found += other
            sizes.add(size)
            times.append(seconds)
    difference = compare(expected, found)
    pytorch, onnx = (sum(column) / len(images) for column in zip(*times, strict=True))
    return Row(detector, len(images), len(sizes), **asdict(difference), pytorch_seconds=pytorch, onnx_seconds=onnx)


@torch.inference_mode()
def run_both(
    model: DenseDetector, processor: DenseDetectorImageProcessor, runner: Runner, images: Sequence[Image.Image]
) -> Iterator[tuple[list, list, torch.Size, tuple[float, float]]]:
    """Detections of PyTorch and of the file, the input's size, and the seconds that each took, image by image."""
    for image in images:
        inputs = processor(image, return_tensors="pt")
        start = time.perf_counter()
        expected = processor.post_process_object_detection(model(**inputs), threshold=0.0)
        middle = time.perf_counter()
        found = detections(runner(**inputs))
        times = middle - start, time.perf_counter() - middle
        yield expected, found, inputs["pixel_values"].shape, times


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| detector | images (input sizes) | detections | box difference, px | score difference | unmatched "
        "| s PyTorch | s ONNX |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.detector} | {row.images} ({row.sizes}) | {row.detections} | {row.box:.1e} | {row.score:.1e} | "
        f"{row.unmatched} | {row.pytorch_seconds:.2f} | {row.onnx_seconds:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="images")
    parser.add_argument("--images", type=int, default=20, help="the first so many (default: 20)")
    parser.add_argument("--detectors", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    parser.add_argument("--output", help="JSON file for the results")
    arguments = parser.parse_args()
    images = [load_rgb(path) for path in find_images([arguments.folder])[: arguments.images]]
    rows = []
    for detector in arguments.detectors:
        rows.append(measure(detector, images, arguments.seed))
        print(table(rows[-1:]), flush=True)
    print(f"\n{table(rows)}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
