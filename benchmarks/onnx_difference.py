"""How far exported files are from PyTorch: detectors on the images of a folder.

    python benchmarks/onnx_difference.py FOLDER --images 20 --output onnx_difference.json
    python benchmarks/onnx_difference.py FOLDER --detectors rt_detr rt_detr_v2 d_fine --formats onnx torch --batch 1 4

The dense detectors have a ResNet-18 and random weights, scaled so that they find up to 100 things in every image. Each
is exported with non-maximum suppression, for images resized as for COCO (800 x 1333). The ones of transformers are the
tests' tiny ones, with random weights, for images of 96 x 96.
Compared are their matched detections, in pixels of the network's input; unmatched are those that only one of the two
has: where scores are equal, as in areas of one colour, rounding says which candidate suppresses the other.
Needs `pip install -e ".[onnx]"`.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from crosskd_hf.inference.export import QUERY_FAMILIES, SUFFIXES, export_detector
from crosskd_hf.inference.export_check import Runner, compare, detections, detections_of_model, load_exported
from crosskd_hf.inference.image_files import find_images
from crosskd_hf.models import CONFIGS, MODELS, DenseDetector
from crosskd_hf.models.transformers_detectors import processor_of
from crosskd_hf.utils.images import load_rgb

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from query_models import query_model

LABELS = 80
QUERY_SIDE = 96  # pixels


@dataclass(frozen=True)
class Row:
    """A detector's differences over all images; times are means an image, in seconds, post-processing included."""

    detector: str
    format: str
    batch: int
    images: int
    sizes: int
    detections: int
    box: float
    score: float
    unmatched: int
    pytorch_seconds: float
    file_seconds: float


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


def detector_and_processor(name: str, seed: int) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A random detector in evaluation mode, and its image processor."""
    model = query_model(name, seed).eval() if name in QUERY_FAMILIES else random_detector(name, seed)
    processor = processor_of(model.config)
    if name in QUERY_FAMILIES:
        processor.size = {"height": QUERY_SIDE, "width": QUERY_SIDE}
    return model, processor


def measure(detector: str, format: str, batches: Sequence[int], images: Sequence[Image.Image], seed: int) -> list[Row]:
    """Export a detector and compare it with itself, in batches of each size."""
    model, processor = detector_and_processor(detector, seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{SUFFIXES[format]}"
        export_detector(model, processor, path, format=format)
        runner = load_exported(path, format)
        for batch in batches:
            expected, found, sizes, times = [], [], set(), []
            for one, other, size, seconds in run_both(model, processor, runner, images, batch):
                expected += one
                found += other
                sizes.add(size[-2:])
                times.append(seconds)
            pytorch, file = (sum(column) / len(images) for column in zip(*times, strict=True))
            counts = {"images": len(images), "sizes": len(sizes), **asdict(compare(expected, found))}
            rows.append(Row(detector, format, batch, **counts, pytorch_seconds=pytorch, file_seconds=file))
    return rows


@torch.inference_mode()
def run_both(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    runner: Runner,
    images: Sequence[Image.Image],
    batch: int,
) -> Iterator[tuple[list, list, torch.Size, tuple[float, float]]]:
    """Detections of PyTorch and of the file, the input's size, and the seconds that each took, batch by batch."""
    for i in range(0, len(images), batch):
        inputs = processor(list(images[i : i + batch]), return_tensors="pt")
        start = time.perf_counter()
        expected = detections_of_model(model, processor, inputs)
        middle = time.perf_counter()
        found = detections(runner(**inputs))
        times = middle - start, time.perf_counter() - middle
        yield expected, found, inputs["pixel_values"].shape, times


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| detector | format | batch | images (input sizes) | detections | box difference, px | score difference "
        "| unmatched | s PyTorch | s file |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.detector} | {row.format} | {row.batch} | {row.images} ({row.sizes}) | {row.detections} "
        f"| {row.box:.1e} | {row.score:.1e} | {row.unmatched} | {row.pytorch_seconds:.2f} | {row.file_seconds:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="images")
    parser.add_argument("--images", type=int, default=20, help="the first so many (default: 20)")
    parser.add_argument("--detectors", nargs="+", choices=(*MODELS, *QUERY_FAMILIES), default=tuple(MODELS))
    parser.add_argument("--formats", nargs="+", choices=tuple(SUFFIXES), default=("onnx",))
    parser.add_argument("--batch", nargs="+", type=int, default=(1,), metavar="N", help="images a batch (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    parser.add_argument("--output", help="JSON file for the results")
    arguments = parser.parse_args()
    images = [load_rgb(path) for path in find_images([arguments.folder])[: arguments.images]]
    rows = []
    for detector in arguments.detectors:
        for format in arguments.formats:
            rows += measure(detector, format, arguments.batch, images, arguments.seed)
            print(table(rows), flush=True)
    print(f"\n{table(rows)}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
