"""Exported files run on this machine, and their detections compared with PyTorch's."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature, PreTrainedModel

from ..models.image_processing import DenseDetectorImageProcessor
from ..models.postprocess import check_outputs
from ..models.targets import unpadded_sizes
from .export_graph import OUTPUTS, ExportError, portable, suppress

# Two detections are the same one if they differ by less: pixels and score. More is a wrong file, not rounding.
SAME_BOX, SAME_SCORE = 1.0, 0.01

Detections = dict[str, Tensor]
Runner = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Difference:
    """How detections of an exported file differ from PyTorch's.

    Attributes:
        detections: of PyTorch.
        box: largest difference of a coordinate of matched detections, in pixels.
        score: largest difference of their scores.
        unmatched: detections, of either, that the other one doesn't have.
    """

    detections: int
    box: float
    score: float
    unmatched: int

    def __str__(self) -> str:
        if not self.detections + self.unmatched:
            return "no detections to compare: the model finds nothing in random images"
        return (
            f"{self.detections} detections, {self.unmatched} unmatched; largest difference of matched ones: boxes "
            f"{self.box:.1e} pixels, scores {self.score:.1e}"
        )


def load_exported(path: str | os.PathLike[str], format: str = "onnx") -> Runner:
    """An exported file as a function of `pixel_values` and, if it takes one, `pixel_mask`: scores, labels and boxes.

    Raises:
        ExportError: onnxruntime isn't installed.
    """
    if format == "torch":
        module = torch.export.load(path).module()
        return lambda *inputs, **named: module(**_by_name(*inputs, **named))
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])

    def run_session(*inputs: Tensor, **named: Tensor) -> list[Tensor]:
        arrays = {name: value.numpy() for name, value in _by_name(*inputs, **named).items()}
        return [torch.from_numpy(output) for output in session.run(list(OUTPUTS), arrays)]

    return run_session


def _by_name(pixel_values: Tensor, pixel_mask: Tensor | None = None) -> dict[str, Tensor]:
    return {"pixel_values": pixel_values} | ({} if pixel_mask is None else {"pixel_mask": pixel_mask})


def check_export(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    path: str | os.PathLike[str],
    *,
    format: str = "onnx",
    nms: bool = True,
) -> Difference:
    """Compare an exported file with PyTorch on random images: one alone, and three of other sizes in a batch.

    Without suppression in the file, its candidates are suppressed here before they are compared.

    Raises:
        ExportError: onnxruntime isn't installed.
    """
    model, runner = portable(model), load_exported(path, format)
    expected: list[Detections] = []
    exported: list[Detections] = []
    for sizes in ([(480, 320)], [(240, 400), (300, 400), (200, 330)]):
        inputs = processor([_random_image(height, width) for height, width in sizes], return_tensors="pt")
        expected += detections_of_model(model, processor, inputs)
        exported += detections(runner(**inputs), None if nms else processor)
    return compare(expected, exported, cut=not isinstance(processor, DenseDetectorImageProcessor))


@torch.no_grad()
def detections_of_model(
    model: PreTrainedModel, processor: BaseImageProcessor, inputs: BatchFeature
) -> list[Detections]:
    """What PyTorch finds in a batch: one dict per image, with boxes in pixels of `pixel_values`."""
    sizes = unpadded_sizes(inputs["pixel_values"], inputs.get("pixel_mask"))
    return processor.post_process_object_detection(check_outputs(model(**inputs)), threshold=0.0, target_sizes=sizes)


def detections(outputs: Sequence[Tensor], processor: DenseDetectorImageProcessor | None = None) -> list[Detections]:
    """An exported file's output without padding: one dict per image, `scores` (K,), `labels` (K,), `boxes` (K, 4).

    Args:
        outputs: scores (N, K), labels (N, K), boxes (N, K, 4).
        processor: do the non-maximum suppression that the file doesn't do, by these thresholds and numbers.
    """
    scores, labels, boxes = outputs
    keep = scores > 0
    if processor:
        keep = suppress(processor, boxes, scores, labels, int(labels.max()) + 1)
    most = processor.max_detections if processor else scores.shape[1]
    return [
        {"scores": scores[i, kept][:most], "labels": labels[i, kept][:most], "boxes": boxes[i, kept][:most]}
        for i, kept in enumerate(keep)
    ]


def compare(expected: Sequence[Detections], exported: Sequence[Detections], cut: bool = False) -> Difference:
    """Differences of the detections of N images, in pixels of the boxes.

    A detection is matched with the nearest of its label, if it lies within a pixel and a hundredth of the score.

    Args:
        expected, exported: one dict per image.
        cut: each is the best of many more. Unmatched ones whose score is within a hundredth of the lowest don't count:
            rounding decides which of them are among the best.
    """
    box = score = 0.0
    unmatched = 0
    for one, other in zip(expected, exported, strict=True):
        lowest = max((d["scores"].min().item() for d in (one, other) if len(d["scores"])), default=0.0)
        floor = lowest + SAME_SCORE if cut else 0.0
        free = torch.ones_like(other["scores"], dtype=torch.bool)
        for i in range(len(one["scores"])):
            box_gap = (other["boxes"] - one["boxes"][i]).abs().amax(dim=1)
            score_gap = (other["scores"] - one["scores"][i]).abs()
            same = free & (other["labels"] == one["labels"][i]) & (box_gap < SAME_BOX) & (score_gap < SAME_SCORE)
            if not same.any():
                unmatched += int(one["scores"][i] >= floor)
                continue
            # The sum in units of what is allowed: boxes that are cut by the image may be the same ones.
            nearest = torch.where(same, box_gap / SAME_BOX + score_gap / SAME_SCORE, torch.inf).argmin()
            free[nearest] = False
            box, score = max(box, box_gap[nearest].item()), max(score, score_gap[nearest].item())
        unmatched += int((free & (other["scores"] >= floor)).sum())
    return Difference(sum(len(one["scores"]) for one in expected), box, score, unmatched)


def _random_image(height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: coloured patches, always the same ones for a size."""
    patches = np.random.default_rng(height * width).integers(0, 256, (-(-height // 40), -(-width // 40), 3))
    return patches.astype(np.uint8).repeat(40, axis=0).repeat(40, axis=1)[:height, :width]


def need(*packages: str) -> None:
    """Raise ExportError if a package isn't installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}, or, in a clone of the repository, "
            'pip install -e ".[onnx]"'
        )
