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

Of transformers' detectors, those of `QUERY_FAMILIES` can be exported. Their file takes `pixel_values` alone, for any
N, but of the one height and width that their image processor resizes to. It gives the same three outputs, where K is
the number of queries and every row is a detection: the best of all pairs of a query and a class, without suppression,
as `processor.post_process_object_detection(outputs, threshold=0, target_sizes=[(H, W)] * N)` has them. Their boxes,
too, are in pixels of `pixel_values`, and may reach over the image's edge.

Suppression in ONNX is the operator NonMaxSuppression. PyTorch has none for a batch that torch.export could trace, so
that the program holds this module's operator `crosskd_hf::batched_nms_mask`: `import crosskd_hf.inference.export`
before `torch.export.load`. A program without suppression needs only PyTorch.

What a user must know to prepare images is in the file too, see `metadata`: as ONNX's `metadata_props`, or as the extra
file `crosskd.json` of a program.
"""

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from ..models.base import DenseDetector
from ..models.families import backbone_name, side_divisor
from ..models.image_processing import DenseDetectorImageProcessor
from ..models.transformers_detectors import pixel_style
from ..utils.files import is_disk_full, replacing
from ..utils.messages import first_line
from .export_check import Difference, check_export, need
from .export_graph import AXES, OUTPUTS, QUERY_AXES, ExportError, trace
from .image_files import words

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
QUERY_FAMILIES = ("rt_detr", "rt_detr_v2", "d_fine")
METADATA_FILE = "crosskd.json"
OPSET = 18
NEWEST_OPSET = 23
LARGEST_FILE = 2**31 - 1  # bytes of a protobuf message, which an ONNX file is
MOST_UNMATCHED = 0.05  # of the detections: rounding swaps some that lie at the IoU threshold or are the last to get in


def export_detector(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
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
        nms: do non-maximum suppression in the file; transformers' detectors need none.
        opset: of ONNX, 18 to 23.
        check: before the file appears, compare it with PyTorch on random images, in batches of 1 and 3.

    Returns:
        what the check gives, or None.

    Raises:
        ExportError: a wrong argument, an absent package, a file that can't be written, a model that can't be exported,
            or a file that gives other detections than PyTorch.
    """
    path = Path(path)
    _check_path(path, format)
    _check_model(model, processor, nms)
    if format == "onnx":
        _check_onnx(model, opset, check)
    difference = None
    try:
        with replacing(path) as unfinished, _quiet():
            program = trace(model, processor, nms)
            _save(program, unfinished, format, opset, metadata(model, processor, nms))
            if check:
                difference = check_export(model, processor, unfinished, format=format, nms=nms)
                if difference.unmatched > MOST_UNMATCHED * 2 * difference.detections:
                    raise ExportError(
                        f"the {format} file gives other detections than PyTorch ({difference}). It wasn't kept; "
                        "--no-check writes it all the same."
                    )
    except ExportError:
        raise
    except Exception as error:  # exporters raise whatever their parts do, and tracing runs any code of the backbone
        if isinstance(error, OSError) or is_disk_full(error):
            text = f"{path} can't be written ({words(error)}); choose another file with --output"
            raise ExportError(text) from error
        reason = first_line(error)
        raise ExportError(
            f"a {type(model).__name__} with backbone {backbone_name(model.config)!r} can't be exported "
            f"({reason.rstrip('.')}). Convolutional backbones such as ResNets can."
        ) from error
    return difference


def metadata(model: PreTrainedModel, processor: BaseImageProcessor, nms: bool) -> dict[str, str]:
    """What is stored in the file to prepare images and to read its output; what isn't text is JSON."""
    config = model.config
    values: dict[str, Any] = {
        "model_type": config.model_type,
        "backbone": backbone_name(config),
        "id2label": {str(label): name for label, name in config.id2label.items()},
    }
    if isinstance(processor, DenseDetectorImageProcessor):
        values |= {
            "size_divisor": processor.size_divisor,
            "short_side": processor.size["shortest_edge"],
            "long_side": processor.size["longest_edge"],
            "image_mean": list(map(float, processor.image_mean)),
            "image_std": list(map(float, processor.image_std)),
            "rescale_factor": processor.rescale_factor if processor.do_rescale else 1.0,
            "channel_order": "BGR" if processor.do_flip_channel_order else "RGB",
            "nms": nms,
        }
        for name in ("score_threshold", "nms_threshold", "max_candidates", "max_detections"):
            values[name] = getattr(processor, name)
    else:
        style = pixel_style(processor)  # of grey levels 0..255
        values |= {
            "height": processor.size["height"],
            "width": processor.size["width"],
            "image_mean": style["image_mean"],
            "image_std": style["image_std"],
            "channel_order": "RGB",
            "resample": int(processor.resample),  # Pillow's number
        }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _onnx_translations() -> dict[Callable, Callable]:
    """How `batched_nms_mask` is written in ONNX."""
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


def _save(
    program: torch.export.ExportedProgram, path: Path, format: str, opset: int, properties: dict[str, str]
) -> None:
    if format == "torch":
        # Through memory: where a disk is full, PyTorch's own writer ends the process.
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={METADATA_FILE: json.dumps(properties)})
        path.write_bytes(content.getbuffer())
        return
    axes = AXES if "pixel_mask" in program.graph_signature.user_inputs else QUERY_AXES
    converted = torch.onnx.export(
        program,
        dynamo=True,
        input_names=list(axes),
        output_names=list(OUTPUTS),
        dynamic_shapes=axes,
        opset_version=opset,
        custom_translation_table=_onnx_translations(),
        verbose=False,
    )
    converted.model.metadata_props.update(properties)
    converted.save(path, external_data=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _check_path(path: Path, format: str) -> None:
    if format not in SUFFIXES:
        raise ExportError(f"unknown format {format!r}; it must be one of {', '.join(SUFFIXES)}")
    if path.suffix != SUFFIXES[format]:
        raise ExportError(
            f"{path} doesn't end with {SUFFIXES[format]}, as a file of the format {format} does; rename it"
        )
    if path.is_dir():
        raise ExportError(f"{path} is a folder; name a file in it, such as {path / ('model' + SUFFIXES[format])}")


def _check_model(model: Any, processor: Any, nms: bool) -> None:
    if isinstance(model, DenseDetector):
        if not isinstance(processor, DenseDetectorImageProcessor):
            raise ExportError(
                f"the image processor must be a DenseDetectorImageProcessor, got a {type(processor).__name__}; make "
                "one with DenseDetectorImageProcessor.for_model(model.config)"
            )
        return
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in QUERY_FAMILIES:
        raise ExportError(
            f"a detector of the family {family} can't be exported; the dense detectors of this package can, and of "
            f"transformers' {', '.join(QUERY_FAMILIES)}"
        )
    if not nms:
        raise ExportError(f"{family} has no non-maximum suppression to leave out; export it without --no-nms")
    size, divisor = getattr(processor, "size", None) or {}, side_divisor(model.config)
    sides = size.get("height"), size.get("width")
    if not all(sides) or not processor.do_resize or processor.do_pad:
        raise ExportError(
            f"the image processor of a {family} must resize every image to one height and width without padding, got "
            f"{type(processor).__name__} with size {dict(size)}"
        )
    if sides[0] % divisor or sides[1] % divisor:
        raise ExportError(
            f"the image processor resizes to {sides[0]} x {sides[1]}; a {family} needs multiples of {divisor}"
        )


def _check_onnx(model: PreTrainedModel, opset: int, check: bool) -> None:
    if not OPSET <= opset <= NEWEST_OPSET:
        raise ExportError(f"the opset must be from {OPSET} to {NEWEST_OPSET}, got {opset}")
    weights = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    if weights > LARGEST_FILE:
        raise ExportError(f"an ONNX file holds 2 GB, but the weights take {weights / 1e9:.1f}; use the format torch")
    need("onnx", "onnxscript", *(["onnxruntime"] if check else []))
