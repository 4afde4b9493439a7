"""What a saved detector is, what it costs, and where it came from."""

import contextlib
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import cached_file

from ..hub.upload import METRICS_FILE, RECIPE_FILE, read_recipe
from ..models.base import DenseDetector
from ..models.families import backbone_name, label_names_of
from ..training.coco_metrics import SETTINGS, SUMMARY_NAMES
from ..training.metric_table import percent
from ..training.step_monitor import memory_gb
from ..utils.escaping import printable
from ..utils.images import resized_size
from ..utils.redact import without_credentials
from ..weights.loading import count_parameters

ASPECT = 4 / 3  # of the image that costs are told for: COCO's most frequent
SHOWN_LABELS = 12


@dataclass
class ModelInfo:
    """What `describe_model` finds; the fields are those of `crosskd info --json`.

    Attributes:
        source: what it was loaded from.
        detector, backbone: model type and timm name.
        parameters, trained_parameters: all, and those that a training run changes.
        parts: parameters of backbone, FPN and head.
        weight_mb: memory of the weights, in 10^6 bytes.
        input_size: (batch, 3, height, width) that the costs below are for.
        gflops: 10^9 floating-point operations of a forward pass, a multiply-add being 2.
        latency_ms: median milliseconds of a forward pass and its post-processing.
        peak_memory_mb: what the first such pass needs beside the weights, in 10^6 bytes; 0 if less than before.
        device: that latency and memory were measured on.
        labels: class names.
        origin: what is known of how it was made: a line each.
        metrics: COCO metrics that lie beside it, 0..1: those of its run, else of the latest `crosskd evaluate`.
        evaluation: of which images, and how, they are, where the file says so.
    """

    source: str
    detector: str
    backbone: str
    parameters: int
    trained_parameters: int
    parts: dict[str, int]
    weight_mb: float
    input_size: tuple[int, int, int, int]
    gflops: float
    latency_ms: float
    peak_memory_mb: float
    device: str
    labels: list[str]
    origin: list[str]
    metrics: dict[str, float]
    evaluation: dict[str, Any]


def describe_model(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    source: str,
    size: tuple[int, int] | None = None,
    batch_size: int = 1,
    runs: int = 5,
) -> ModelInfo:
    """Count, measure and look up.

    Args:
        model: on the device to measure on; put into evaluation mode.
        processor: the model's.
        source: the folder or Hub id it came from, in which recipe and metrics are looked for.
        size: (height, width) of the image; None takes a 4:3 one as the processor resizes it.
        batch_size: images a pass.
        runs: timed passes.
    """
    model.eval()
    if size is None:
        size = _usual_size(processor)
    divisor = getattr(processor, "size_divisor", None) or 1
    height, width = (-(-side // divisor) * divisor for side in size)
    pixels = torch.rand(batch_size, 3, height, width, device=model.device)
    before = memory_gb(model.device)
    with torch.inference_mode():
        counter = FlopCounterMode(display=False)
        with counter:
            model(pixels)
        peak = memory_gb(model.device) - before
        seconds = [_timed(model, processor, pixels) for _ in range(runs + 1)][1:]
    total, trained = count_parameters(model)
    metrics = _metrics(source)
    evaluation = metrics.pop(SETTINGS, {})
    return ModelInfo(
        source=source,
        detector=model.config.model_type,
        backbone=backbone_name(model.config),
        parameters=total,
        trained_parameters=trained,
        parts={name: count_parameters(part)[0] for name, part in _parts(model).items()},
        weight_mb=sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e6,
        input_size=tuple(pixels.shape),
        gflops=counter.get_total_flops() / 1e9,
        latency_ms=1000 * statistics.median(seconds),
        peak_memory_mb=1000 * max(0.0, peak),
        device=_device_name(model.device),
        labels=label_names_of(model.config),
        origin=_origin(model, source),
        metrics=metrics,
        evaluation=evaluation,
    )


def _usual_size(processor: Any) -> tuple[int, int]:
    if processor.size.height:
        return processor.size.height, processor.size.width
    if processor.size.max_height:
        return processor.size.max_height, processor.size.max_width
    short, long = processor.size["shortest_edge"], processor.size["longest_edge"]
    return resized_size(short, round(short * ASPECT), short, long)


def _parts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """A dense detector's parts; those of transformers' under the names that they have there."""
    if isinstance(model, DenseDetector):
        return {"backbone": model.backbone, "FPN": model.fpn, "head": model.head}
    inner = getattr(model, model.base_model_prefix)
    return {**dict(inner.named_children()), **{name: p for name, p in model.named_children() if p is not inner}}


def format_info(info: ModelInfo) -> str:
    """A line each."""
    batch, _, height, width = info.input_size
    parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in info.parts.items())
    labels = ", ".join(info.labels[:SHOWN_LABELS]) + (", ..." if len(info.labels) > SHOWN_LABELS else "")
    lines = [
        ("model", f"{info.source}: {info.detector}, {info.backbone}"),
        ("parameters", f"{info.parameters / 1e6:.2f} M ({parts}); {info.trained_parameters / 1e6:.2f} M trained"),
        ("input", f"{batch} x 3 x {height} x {width}"),
        ("computation", f"{info.gflops:.1f} GFLOPs (a multiply-add is 2)"),
        ("latency", f"{info.latency_ms:.0f} ms, with post-processing, on {info.device}"),
        ("memory", f"weights {info.weight_mb:.0f} MB, a pass {info.peak_memory_mb:.0f} MB more"),
        ("labels", f"{len(info.labels)}: {labels}"),
        *(("made" if i == 0 else "", line) for i, line in enumerate(info.origin)),
    ]
    shown = [f"{name} {percent(info.metrics[name])}" for name in SUMMARY_NAMES[:6] if name in info.metrics]
    if shown:
        evaluation = info.evaluation
        images = f"  ({evaluation['split']}, {evaluation['images']} images)" if evaluation else ""
        lines.append(("measured", "  ".join(shown) + images))
    return "\n".join(f"{name:<14}{printable(text)}" for name, text in lines)


def _timed(model: PreTrainedModel, processor: Any, pixels: torch.Tensor) -> float:
    start = time.perf_counter()
    processor.post_process_object_detection(model(pixels), threshold=0.0)
    if pixels.is_cuda:
        torch.cuda.synchronize(pixels.device)
    return time.perf_counter() - start


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def _beside(source: str, name: str) -> Path | None:
    """A file that lies beside a model's weights, in a folder or on the Hub."""
    with contextlib.suppress(OSError):  # no network
        if path := cached_file(source, name, _raise_exceptions_for_missing_entries=False):
            return Path(path)
    return None


def _origin(model: PreTrainedModel, source: str) -> list[str]:
    saved_by = getattr(model.config, "transformers_version", None)
    lines = [f"saved by transformers {saved_by}"] if saved_by else []
    path = _beside(source, RECIPE_FILE)
    if path is None:
        return [*lines, f"no {RECIPE_FILE} beside it: not known how it was trained"]
    recipe = read_recipe(path.parent)
    if recipe is None:  # which is logged
        return lines
    # Plain values, not a checked recipe: an earlier version may have written it.
    section, data, teacher = (recipe.get(name) or {} for name in ("model", "data", "teacher"))
    weights = (
        section.get("checkpoint")
        or section.get("pretrained")
        or f"{section.get('backbone_weights', 'pretrained')} backbone weights"
    )
    images = data.get("path") or data.get("layout", "data that it doesn't name")
    if data.get("layout") == "shapes":
        images = "generated images"
    lines.append(f"trained on {images} ({data.get('train_split')}), from {without_credentials(str(weights))}")
    if teacher.get("checkpoint"):
        methods = ", ".join(map(str, (recipe.get("distillation") or {}).get("methods", [])))
        lines.append(f"distilled ({methods}) from {without_credentials(str(teacher['checkpoint']))}")
    return lines


def _metrics(source: str) -> dict[str, Any]:
    path = _beside(source, METRICS_FILE)
    if path is None:  # a model that no run made
        files = Path(source, METRICS_FILE).parent.glob("evaluate_*_metrics.json")
        path = max(files, key=lambda file: file.stat().st_mtime, default=None)
    try:
        return {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # no JSON: somebody else's file
        return {}
