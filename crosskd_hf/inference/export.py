"""Detectors as ONNX or torch.export files.

Used like this:

    export_detector(model, processor, "model.onnx", format="onnx")

    session = onnxruntime.InferenceSession("model.onnx")
    scores, labels, boxes = session.run(None, dict(processor(images, return_tensors="np")))

The file takes what the image processor gives: `pixel_values` (N, 3, H, W) float32 and `pixel_mask` (N, H, W) bool, for
any N, H and W that it gives: sides are multiples of `size_divisor`. Decoding and the cut to candidates are in it. It
gives, best first,

* `scores` (N, K) float32, 0 where there is no detection,
* `labels` (N, K) int64, -1 there,
* `boxes` (N, K, 4) float32 xyxy in pixels of `pixel_values`, cut to each image's own area, 0 there.

With non-maximum suppression in it, K is the processor's `max_detections`, and the detections are those of
`processor.post_process_object_detection(outputs, threshold=0)`. Without, K is levels * `max_candidates`, and they are
the candidates that suppression would see; it is then the user's to do, class by class. Divide boxes by the resize's
factors for pixels of the original image. Which of several candidates with equal scores (of areas where an image has
one colour) come first is chance, in PyTorch as here; then other ones of them may be kept.

Suppression in ONNX is the operator NonMaxSuppression. PyTorch has none for a batch that torch.export could trace, so
that the program holds this module's operator `crosskd_hf::batched_nms_mask`: `import crosskd_hf.inference.export`
before `torch.export.load`. A program without suppression needs only PyTorch.

What a user must know to prepare images is in the file too, see `metadata`: as ONNX's `metadata_props`, or as the extra
file `crosskd.json` of a program.
"""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.fx.experimental._config as symbolic_config
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms as nms_of_one_class

from ..models.base import DenseDetector, Priors, unpadded_sizes
from ..models.head import HeadOutput, flatten_levels
from ..models.image_processing import DenseDetectorImageProcessor
from ..utils.files import flush_to_disk, is_disk_full
from .image_files import words

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
OUTPUTS = ("scores", "labels", "boxes")
METADATA_FILE = "crosskd.json"
OPSET = 18
NEWEST_OPSET = 23
LARGEST_FILE = 2**31 - 1  # bytes of a protobuf message, which an ONNX file is
AXES = {"pixel_values": {0: "batch", 2: "height", 3: "width"}, "pixel_mask": {0: "batch", 1: "height", 2: "width"}}
# Two detections are the same one if they differ by less: pixels and score. More is a wrong file, not rounding.
SAME_BOX, SAME_SCORE = 1.0, 0.01
MOST_UNMATCHED = 0.05  # of the detections: rounding swaps some that lie at the IoU threshold or are the last to get in

Detections = dict[str, Tensor]
Runner = Callable[[Tensor, Tensor], Sequence[Tensor]]


class ExportError(ValueError):
    """An export that can't be made, and what to do about it."""


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


def export_detector(
    model: DenseDetector,
    processor: DenseDetectorImageProcessor,
    path: str | os.PathLike[str],
    *,
    format: str = "onnx",
    nms: bool = True,
    opset: int = OPSET,
    check: bool = False,
) -> Difference | None:
    """Write a detector as one file, that appears complete or not at all.

    Args:
        model: on any device and in any mode; what is exported is a float32 copy on the CPU.
        processor: the model's; its thresholds and numbers of candidates and detections go into the file.
        path: ends with .onnx or .pt2; its folder is made.
        format: "onnx", or "torch" for a torch.export program.
        nms: do non-maximum suppression in the file.
        opset: of ONNX, 18 to 23.
        check: before the file appears, compare it with PyTorch on random images of several sizes.

    Returns:
        what the check found, or None.

    Raises:
        ExportError: a wrong argument, an absent package, a file that can't be written, a model that can't be exported,
            or a file that gives other detections than PyTorch.
    """
    path = Path(path)
    _check_arguments(model, processor, path, format, opset, check)
    with _appearing(path) as unfinished:
        program = _trace(model, processor, nms)
        try:
            with _quiet():
                _save(program, unfinished, format, opset, metadata(model, processor, nms))
        except Exception as error:  # exporters raise whatever their parts do
            if isinstance(error, OSError) or is_disk_full(error):
                raise _unwritable(path, error) from error
            raise _not_exportable(model, error) from error
        if not check:
            return None
        difference = check_export(model, processor, unfinished, format=format, nms=nms)
        if difference.unmatched > MOST_UNMATCHED * 2 * difference.detections:
            raise ExportError(
                f"the {format} file gives other detections than PyTorch ({difference}). It wasn't kept; --no-check "
                "writes it all the same."
            )
    return difference


def metadata(model: DenseDetector, processor: DenseDetectorImageProcessor, nms: bool) -> dict[str, str]:
    """What is stored in the file to prepare images and to read its output; what isn't text is JSON."""
    config, size = model.config, processor.size
    mean, std = (list(map(float, values)) for values in (processor.image_mean, processor.image_std))
    values: dict[str, Any] = {
        "model_type": config.model_type,
        "backbone": config.backbone,
        "id2label": {str(label): name for label, name in config.id2label.items()},
        "size_divisor": processor.size_divisor,
        "short_side": size["shortest_edge"],
        "long_side": size["longest_edge"],
        "image_mean": mean,
        "image_std": std,
        "rescale_factor": processor.rescale_factor if processor.do_rescale else 1.0,
        "channel_order": "BGR" if processor.do_flip_channel_order else "RGB",
        "score_threshold": processor.score_threshold,
        "nms_threshold": processor.nms_threshold,
        "max_candidates": processor.max_candidates,
        "max_detections": processor.max_detections,
        "nms": nms,
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def load_exported(path: str | os.PathLike[str], format: str = "onnx") -> Runner:
    """An exported file as a function of `pixel_values` and `pixel_mask`, that gives scores, labels and boxes.

    Raises:
        ExportError: onnxruntime isn't installed.
    """
    if format == "torch":
        module = torch.export.load(path).module()
        return lambda pixel_values, pixel_mask: module(pixel_values=pixel_values, pixel_mask=pixel_mask)
    _need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])

    def run_session(pixel_values: Tensor, pixel_mask: Tensor) -> list[Tensor]:
        inputs = {"pixel_values": pixel_values.numpy(), "pixel_mask": pixel_mask.numpy()}
        return [torch.from_numpy(output) for output in session.run(list(OUTPUTS), inputs)]

    return run_session


def check_export(
    model: DenseDetector,
    processor: DenseDetectorImageProcessor,
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
    model, runner = _portable(model), load_exported(path, format)
    expected: list[Detections] = []
    found: list[Detections] = []
    for sizes in ([(480, 320)], [(240, 400), (300, 400), (200, 330)]):
        inputs = processor([_random_image(height, width) for height, width in sizes], return_tensors="pt")
        with torch.no_grad():
            expected += processor.post_process_object_detection(model(**inputs), threshold=0.0)
        found += detections(runner(**inputs), None if nms else Selection.of(processor, nms))
    return compare(expected, found)


def detections(outputs: Sequence[Tensor], suppress: "Selection | None" = None) -> list[Detections]:
    """An exported file's output as a dict an image, `scores` (K,), `labels` (K,) and `boxes` (K, 4), without padding.

    Args:
        outputs: scores (N, K), labels (N, K), boxes (N, K, 4).
        suppress: do the non-maximum suppression that the file doesn't do.
    """
    scores, labels, boxes = outputs
    keep = scores > 0
    if suppress:
        keep = batched_nms_mask(boxes, scores, labels, suppress.nms_threshold, int(labels.max()) + 1)
    most = suppress.max_detections if suppress else scores.shape[1]
    return [
        {"scores": scores[i, kept][:most], "labels": labels[i, kept][:most], "boxes": boxes[i, kept][:most]}
        for i, kept in enumerate(keep)
    ]


def compare(expected: Sequence[Detections], found: Sequence[Detections]) -> Difference:
    """Differences of the detections of N images, in pixels of the boxes.

    A detection is matched with the nearest of its label, if it lies within a pixel and a hundredth of the score.
    """
    box = score = 0.0
    unmatched = 0
    for one, other in zip(expected, found, strict=True):
        free = torch.ones_like(other["scores"], dtype=torch.bool)
        for i in range(len(one["scores"])):
            box_gap = (other["boxes"] - one["boxes"][i]).abs().amax(dim=1)
            score_gap = (other["scores"] - one["scores"][i]).abs()
            same = free & (other["labels"] == one["labels"][i]) & (box_gap < SAME_BOX) & (score_gap < SAME_SCORE)
            if not same.any():
                unmatched += 1
                continue
            # The sum in units of what is allowed: boxes that are cut by the image may be the same ones.
            nearest = torch.where(same, box_gap / SAME_BOX + score_gap / SAME_SCORE, torch.inf).argmin()
            free[nearest] = False
            box, score = max(box, box_gap[nearest].item()), max(score, score_gap[nearest].item())
        unmatched += int(free.sum())
    return Difference(sum(len(one["scores"]) for one in expected), box, score, unmatched)


# Non-maximum suppression as an operator ---------------------------------------------------------------------------


@torch.library.custom_op("crosskd_hf::batched_nms_mask", mutates_args=())
def batched_nms_mask(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, num_labels: int) -> Tensor:
    """Which candidates non-maximum suppression keeps, class by class.

    Classes are kept apart by running one after another, not by moving their boxes apart: that would round coordinates.

    Args:
        boxes: (N, C, 4) xyxy.
        scores: (N, C). Candidates with score 0 aren't any.
        labels: (N, C) int64.
        iou_threshold: IoU above which the worse of two boxes of a class goes.
        num_labels: labels are below this.

    Returns:
        (N, C) bool.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for image in range(len(scores)):
        candidate = scores[image] > 0
        for label in labels[image][candidate].unique():
            index = (candidate & (labels[image] == label)).nonzero().squeeze(1)
            keep[image, index[nms_of_one_class(boxes[image, index], scores[image, index], iou_threshold)]] = True
    return keep


@batched_nms_mask.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, num_labels: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def _onnx_translations() -> dict[Callable, Callable]:
    """How `batched_nms_mask` is said in ONNX."""
    from onnxscript import FLOAT, INT64
    from onnxscript import opset18 as op

    def nms_mask(boxes: FLOAT, scores: FLOAT, labels: INT64, iou_threshold: float, num_labels: int):
        classes = op.Constant(value_ints=list(range(num_labels)))
        of_class = op.Equal(op.Unsqueeze(labels, [1]), op.Unsqueeze(classes, [0, 2]))  # (N, labels, C)
        by_class = op.Where(of_class, op.Unsqueeze(scores, [1]), op.Constant(value_float=0.0))
        everything = op.Constant(value_ints=[torch.iinfo(torch.int64).max])
        # Rows of image, class, candidate; only scores above the last argument take part.
        chosen = op.NonMaxSuppression(
            boxes, by_class, everything, op.Constant(value_floats=[iou_threshold]), op.Constant(value_floats=[0.0])
        )
        position = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)
        ones = op.Expand(op.Constant(value_int=1), op.Shape(chosen, start=0, end=1))
        none = op.Expand(op.Constant(value_int=0), op.Shape(scores))
        return op.Cast(op.ScatterND(none, position, ones), to=9)  # 9 is ONNX's bool

    return {torch.ops.crosskd_hf.batched_nms_mask.default: nms_mask}


# The graph --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """How predictions are cut down: the image processor's numbers, and whether by non-maximum suppression too."""

    score_threshold: float
    nms_threshold: float
    max_candidates: int
    max_detections: int
    nms: bool

    @classmethod
    def of(cls, processor: DenseDetectorImageProcessor, nms: bool) -> "Selection":
        """The numbers of an image processor."""
        # Rounded as the IoUs are, see `select_detections`.
        iou = torch.tensor(processor.nms_threshold, dtype=torch.float32).item()
        return cls(processor.score_threshold, iou, processor.max_candidates, processor.max_detections, nms)


class ExportableDetector(nn.Module):
    """A detector and the selection of its detections, for batches of any size, in operations that can be traced.

    Nothing in it depends on the data but inside the suppression: candidates that drop out get score 0.
    """

    def __init__(self, model: DenseDetector, selection: Selection):
        super().__init__()
        self.model = model
        self.selection = selection

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) and (N, H, W) -> scores (N, K), labels (N, K), boxes (N, K, 4), as the module describes."""
        model, selection = self.model, self.selection
        head = model.head(model.fpn(model.backbone(pixel_values)))
        score, label, boxes = self._candidates(head, unpadded_sizes(pixel_values, pixel_mask))
        count = score.shape[1]
        if selection.nms:
            keep = batched_nms_mask(boxes, score, label, selection.nms_threshold, model.config.num_labels)
            score = score * keep
            missing = max(selection.max_detections - count, 0)
            count = selection.max_detections
            score, label = F.pad(score, (0, missing)), F.pad(label, (0, missing))
            boxes = F.pad(boxes, (0, 0, 0, missing))
        score, order = score.topk(count)
        found = score > 0
        label = torch.where(found, label.gather(1, order), -1)
        return score, label, _rows(boxes, order) * found.unsqueeze(-1)

    def _candidates(self, head: HeadOutput, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (N, C), labels (N, C) and clipped boxes (N, C, 4), C = levels * max_candidates; see
        `select_detections`, which leaves out what has score 0 here."""
        predictions = self.model.flatten(head)
        score, pair = self._best_pairs(head)
        num_labels = self.model.head.spec.num_labels
        prior, label = pair // num_labels, pair % num_labels
        if predictions.centerness is not None:
            score = score * predictions.centerness.sigmoid().gather(1, prior)
        boxes = _rows(self.model.decode(predictions.boxes, self._priors(head)), prior)
        height, width = image_sizes[:, None, :1], image_sizes[:, None, 1:]
        boxes = torch.minimum(boxes.clamp(min=0), torch.cat([width, height, width, height], dim=-1))
        has_area = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
        return score * has_area, label, boxes

    def _best_pairs(self, head: HeadOutput) -> tuple[Tensor, Tensor]:
        """Class scores and (prior, class) numbers, both (N, levels * max_candidates), of each level's best pairs."""
        spec, most = self.model.head.spec, self.selection.max_candidates
        scores, pairs, start = [], [], 0
        for level in head.logits:
            flat = flatten_levels([level], spec.num_labels).float().sigmoid().flatten(1)
            best, index = F.pad(flat, (0, most), value=-1.0).topk(most)  # padded, since levels may have fewer
            keep = best > self.selection.score_threshold
            scores.append(best * keep)
            pairs.append(torch.where(keep, index, 0) + start)
            start = start + flat.shape[1]
        return torch.cat(scores, dim=1), torch.cat(pairs, dim=1)

    def _priors(self, head: HeadOutput) -> Priors:
        # The model's own method keeps them by size, which is a symbol here.
        sizes = [(level.shape[2], level.shape[3]) for level in head.logits]
        return self.model.build_priors(sizes, head.logits[0].device)


def _rows(boxes: Tensor, index: Tensor) -> Tensor:
    """Boxes (N, P, 4) and numbers (N, C) -> boxes (N, C, 4)."""
    return boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))


# Writing ----------------------------------------------------------------------------------------------------------


def _trace(model: DenseDetector, processor: DenseDetectorImageProcessor, nms: bool) -> torch.export.ExportedProgram:
    """The graph, for any number and size of images."""
    exportable = ExportableDetector(_portable(model), Selection.of(processor, nms)).eval()
    # No map of this batch has a side of 1, and no two sizes are the same: both would be taken for rules.
    multiple, stride = processor.size_divisor, model.config.strides[-1]
    cells = -(-2 * stride // multiple)
    pixel_values = torch.zeros(2, 3, cells * multiple, (cells + -(-stride // multiple)) * multiple)
    inputs = {"pixel_values": pixel_values, "pixel_mask": torch.ones_like(pixel_values[:, 0], dtype=torch.bool)}
    # Some backbones (ResNet-D's pooling) have maps of other sizes where a side isn't a multiple of 32.
    sizes = {
        "batch": torch.export.Dim("batch"),
        "height": multiple * torch.export.Dim("rows"),
        "width": multiple * torch.export.Dim("columns"),
    }
    shapes = {name: {axis: sizes[size] for axis, size in axes.items()} for name, axes in AXES.items()}
    try:
        with _quiet(), torch.no_grad(), _any_size():
            program = torch.export.export(exportable, (), inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # tracing runs any code of the backbone
        raise _not_exportable(model, error) from error
    # With an example, a loaded program refuses sizes for which PyTorch would lay out memory otherwise than for it
    # (1 x 1 maps, 16 images), although it computes them.
    program.example_inputs = None
    return program


def _any_size() -> contextlib.AbstractContextManager:
    """Let tracing not assume that maps have sides above 1: P7 of a small image has 1."""
    if hasattr(symbolic_config, "backed_size_oblivious"):  # PyTorch 2.7
        return symbolic_config.patch(backed_size_oblivious=True)
    return contextlib.nullcontext()


def _save(
    program: torch.export.ExportedProgram, path: Path, format: str, opset: int, properties: dict[str, str]
) -> None:
    if format == "torch":
        # Through memory: where a disk is full, PyTorch's own writer ends the process.
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={METADATA_FILE: json.dumps(properties)})
        path.write_bytes(content.getbuffer())
        return
    converted = torch.onnx.export(
        program,
        dynamo=True,
        input_names=list(AXES),
        output_names=list(OUTPUTS),
        dynamic_shapes=AXES,
        opset_version=opset,
        custom_translation_table=_onnx_translations(),
        verbose=False,
    )
    converted.model.metadata_props.update(properties)
    converted.save(path, external_data=False)


def _portable(model: DenseDetector) -> DenseDetector:
    """A copy in evaluation mode, that doesn't touch the user's."""
    return copy.deepcopy(model).to("cpu", torch.float32).eval()


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A file beside `path` that is moved there if the block ends well, and removed otherwise."""
    # The suffix stays: PyTorch asks for it.
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield unfinished
        try:
            flush_to_disk(unfinished)
            os.replace(unfinished, path)
        except OSError as error:
            raise _unwritable(path, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# Checking ---------------------------------------------------------------------------------------------------------


def _random_image(height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: coloured patches, always the same ones for a size."""
    patches = np.random.default_rng(height * width).integers(0, 256, (-(-height // 40), -(-width // 40), 3))
    return patches.astype(np.uint8).repeat(40, axis=0).repeat(40, axis=1)[:height, :width]


def _check_arguments(model: Any, processor: Any, path: Path, format: str, opset: int, check: bool) -> None:
    if format not in SUFFIXES:
        raise ExportError(f"unknown format {format!r}; it must be one of {', '.join(SUFFIXES)}")
    if path.suffix != SUFFIXES[format]:
        raise ExportError(
            f"{path} doesn't end with {SUFFIXES[format]}, as a file of the format {format} does; rename it"
        )
    if path.is_dir():
        raise ExportError(f"{path} is a folder; name a file in it, such as {path / ('model' + SUFFIXES[format])}")
    if not isinstance(model, DenseDetector):
        raise ExportError(f"only the dense detectors of this package can be exported, got a {type(model).__name__}")
    if model.backbone.is_swin:  # PyTorch would try for hours to prove that windows of any size fit together
        raise ExportError(
            f"backbone {model.config.backbone!r} can't be exported: PyTorch can't trace Swin's windows for images of "
            "any size. Convolutional backbones can."
        )
    if not isinstance(processor, DenseDetectorImageProcessor):
        raise ExportError(
            f"the image processor must be a DenseDetectorImageProcessor, got a {type(processor).__name__}; make one "
            "with DenseDetectorImageProcessor.for_model(model.config)"
        )
    if format != "onnx":
        return
    if not OPSET <= opset <= NEWEST_OPSET:
        raise ExportError(f"the opset must be from {OPSET} to {NEWEST_OPSET}, got {opset}")
    weights = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    if weights > LARGEST_FILE:
        raise ExportError(f"an ONNX file holds 2 GB, but the weights take {weights / 1e9:.1f}; use the format torch")
    _need("onnx", "onnxscript", *(["onnxruntime"] if check else []))


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}, or, in a clone of the repository, "
            'pip install -e ".[onnx]"'
        )


def _unwritable(path: Path, error: Exception) -> ExportError:
    return ExportError(f"{path} can't be written ({words(error)}); choose another file with --output")


def _not_exportable(model: DenseDetector, error: Exception) -> ExportError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return ExportError(
        f"a {type(model).__name__} with backbone {model.config.backbone!r} can't be exported ({reason.rstrip('.')}). "
        "Convolutional backbones such as ResNets can."
    )
