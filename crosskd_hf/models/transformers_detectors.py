"""What this package has to know of transformers' own detectors. Their forwards, losses and processors are theirs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel

from .configuration import DenseDetectorConfig
from .image_processing import DenseDetectorImageProcessor

# Model type -> the image processor of its published checkpoints.
PROCESSORS = {
    "rt_detr": "RTDetrImageProcessor",
    "rt_detr_v2": "RTDetrImageProcessor",
    "d_fine": "RTDetrImageProcessor",
    "deimv2": "RTDetrImageProcessor",
    "deformable_detr": "DeformableDetrImageProcessor",
    "lw_detr": "DeformableDetrImageProcessor",
    "rf_detr": "RfDetrImageProcessor",
    "dab-detr": "ConditionalDetrImageProcessor",
    "conditional_detr": "ConditionalDetrImageProcessor",
    "detr": "DetrImageProcessor",
    "yolos": "YolosImageProcessor",
}
FAMILIES = tuple(PROCESSORS)

TransformersLabels = Sequence[Mapping[str, Tensor]]


def is_dense(config: PretrainedConfig) -> bool:
    """Whether the detector is one of this package's dense ones, and not transformers' own."""
    return isinstance(config, DenseDetectorConfig)


def label_names_of(config: PretrainedConfig) -> list[str]:
    """Class names by label."""
    return [name for _, name in sorted((config.id2label or {}).items())]


def backbone_name(config: PretrainedConfig) -> str:
    """What a detector's backbone is called: the timm model, or the type of transformers' own."""
    backbone = getattr(config, "backbone", None) or getattr(config, "backbone_config", None)
    if backbone is None:
        return config.model_type  # YOLOS is its own backbone
    if isinstance(backbone, PretrainedConfig):
        return getattr(backbone, "backbone", None) or backbone.model_type
    return str(backbone)


def strides_of(config: PretrainedConfig) -> tuple[int, ...]:
    """Pixels per cell of the levels that a detector's decoder or head looks at; none of those that have no such."""
    if is_dense(config):
        return tuple(config.strides)
    if hasattr(config, "feat_strides"):
        return tuple(config.feat_strides)
    if config.model_type == "lw_detr":
        return tuple(int(config.backbone_config.patch_size / scale) for scale in config.projector_scale_factors)
    if config.model_type == "rf_detr":
        return (config.backbone_config.patch_size,)
    if config.model_type == "deformable_detr":
        levels = config.num_feature_levels
        return tuple(8 * 2**i for i in range(levels)) if levels > 1 else (32,)
    return ()


def processor_of(config: PretrainedConfig) -> BaseImageProcessor:
    """The image processor that goes with a detector, as it is without a checkpoint's own settings."""
    if isinstance(config, DenseDetectorConfig):
        return DenseDetectorImageProcessor.for_model(config)
    return getattr(transformers, PROCESSORS[config.model_type])()


def pixel_style(processor: Any) -> dict[str, Any]:
    """What a processor does to grey levels of 0..255: mean and std, and whether channels are BGR."""
    if isinstance(processor, DenseDetectorImageProcessor):
        return processor.pixel_style()
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    mean, std = ([round(value / factor, 4) for value in values] for values in (mean, std))
    return {"image_mean": mean, "image_std": std, "do_flip_channel_order": False}


def size_divisor(processor: Any) -> int:
    """What divides the height and width of every batch."""
    if divisor := getattr(processor, "size_divisor", None):
        return divisor
    size = processor.pad_size or processor.size
    return math.gcd(size["height"], size["width"]) if size.get("height") and size.get("width") else 1


def side_divisor(config: PretrainedConfig) -> int:
    """What the sides of every image must be multiples of; 1 for detectors that pad for themselves."""
    if config.model_type in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2"):
        return max(config.feat_strides)  # maps of neighbouring levels are joined
    if config.model_type in ("lw_detr", "rf_detr"):
        backbone = config.backbone_config
        lw_detr = config.model_type == "lw_detr"  # whose number of windows is that of both directions together
        return backbone.patch_size * (backbone.num_windows_side if lw_detr else backbone.num_windows)
    return 1


def detection_losses(model: PreTrainedModel, outputs: Any, labels: TransformersLabels) -> dict[str, Tensor]:
    """The loss terms of a detector of transformers: name -> scalar. Their sum is what is trained.

    Two-stage Deformable DETR gets the term of its encoder's proposals (arXiv 2010.04159, appendix A.4), which
    transformers' loss leaves out, so that their heads would never be trained: every object is of class 0 there.

    Args:
        model: the detector.
        outputs: of a batch with labels.
        labels: a dict per image: `class_labels` (G,) and `boxes` (G, 4), cxcywh, relative.
    """
    terms = {"loss_detection": outputs.loss}
    if model.config.model_type == "deformable_detr" and model.config.two_stage:
        config, (logits, boxes) = model.config, (outputs.enc_outputs_class, outputs.enc_outputs_coord_logits.sigmoid())
        objects = [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
        losses = model.loss_function(logits, objects, logits.device, boxes, _without_auxiliary_losses(config))
        terms["loss_encoder"] = losses[0]
    return terms


def use_fp32_losses(model: PreTrainedModel) -> None:
    """Have a detector of transformers compute its losses in fp32, also under autocast.

    Matching doesn't work in bfloat16, and a pixel of a large box is more than it resolves.
    """
    of_family = model.loss_function
    if hasattr(of_family, "of_family"):  # it does already
        return

    def loss_function(*args: Any, **kwargs: Any) -> Any:
        device = args[0].device.type
        with torch.autocast(device, enabled=False):
            return of_family(*map(_in_fp32, args), **{name: _in_fp32(value) for name, value in kwargs.items()})

    loss_function.of_family = of_family  # type: ignore[attr-defined]
    model.loss_function = loss_function


def _in_fp32(value: Any) -> Any:
    """Half-precision tensors, also in lists and dicts, as fp32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    if isinstance(value, list | tuple):
        return type(value)(map(_in_fp32, value))
    return {name: _in_fp32(item) for name, item in value.items()} if isinstance(value, dict) else value


def _without_auxiliary_losses(config: PretrainedConfig) -> PretrainedConfig:
    values = {**config.to_dict(), "auxiliary_loss": False}
    return type(config).from_dict(values)
