"""What this package has to know of transformers' own detectors. Their forwards, losses and processors are theirs."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel
from transformers.loss import loss_for_object_detection

from .configuration import DenseDetectorConfig
from .families import FROZEN_STEM, PROCESSORS, backbone_name
from .image_processing import DenseDetectorImageProcessor

TransformersLabels = Sequence[Mapping[str, Tensor]]


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
    if not any(len(label["boxes"]) for label in labels):
        # Denoising trains some weights only where there are boxes, and DDP waits for a gradient of every one.
        terms["loss_detection"] = outputs.loss + 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
    if model.config.model_type == "deformable_detr" and model.config.two_stage:
        config, (logits, boxes) = model.config, (outputs.enc_outputs_class, outputs.enc_outputs_coord_logits.sigmoid())
        objects = [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
        alone = copy.copy(config)
        alone.auxiliary_loss = False
        terms["loss_encoder"] = model.loss_function(logits, objects, logits.device, boxes, alone)[0]
    return terms


def prepare_new(model: PreTrainedModel, frozen_stem: bool = False) -> None:
    """Set right what a new detector of transformers needs to be trained.

    Masks that only a vision transformer's own pretraining uses are frozen: DDP would wait for their gradient. A new
    class head of Deformable DETR begins at a probability of 0.01 (focal loss, arXiv 1708.02002, section 4.1), as in
    the other families.

    Args:
        model: the detector.
        frozen_stem: freeze stem and first stage of a ResNet of timm in Deformable DETR and DETR, whose weights are
            pretrained: transformers does so with its own ResNets.
    """
    resnet = frozen_stem and model.config.model_type in FROZEN_STEM and "resnet" in backbone_name(model.config)
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token"):
            parameter.requires_grad_(False)
        first = any(f".{part}." in f".{name}" for part in ("conv1", "bn1", "layer1"))
        if resnet and first and "backbone" in name and not any(f".layer{i}." in name for i in (2, 3, 4)):
            parameter.requires_grad_(False)
        if model.config.model_type == "deformable_detr" and "class_embed" in name and name.endswith("bias"):
            nn.init.constant_(parameter, -math.log(99))


def use_fp32_losses(model: PreTrainedModel) -> None:
    """Have a detector of transformers compute its losses in fp32, also under autocast, on any number of processes.

    Matching doesn't work in bfloat16, and a pixel of a large box is more than it resolves.
    """
    of_family = model.loss_function
    if hasattr(of_family, "of_family"):  # it does already
        return

    def loss_function(*args: Any, **kwargs: Any) -> Any:
        device = args[0].device.type
        with torch.autocast(device, enabled=False):
            with _boxes_of_all_processes():
                return of_family(*map(_in_fp32, args), **{name: _in_fp32(v) for name, v in kwargs.items()})

    loss_function.of_family = of_family  # type: ignore[attr-defined]
    model.loss_function = loss_function


@contextmanager
def _boxes_of_all_processes() -> Iterator[None]:
    """Let the losses of DETR and its kin not grow with the number of processes.

    They divide by the boxes of a process. transformers takes the mean over processes (accelerate's default), and
    divides it by their number once more; of the sum, that is the mean.
    """
    mean = loss_for_object_detection.reduce
    loss_for_object_detection.reduce = partial(mean, reduction="sum")
    try:
        yield
    finally:
        loss_for_object_detection.reduce = mean


def _in_fp32(value: Any) -> Any:
    """Half-precision tensors, also in lists and dicts, as fp32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    if isinstance(value, list | tuple):
        return type(value)(map(_in_fp32, value))
    return {name: _in_fp32(item) for name, item in value.items()} if isinstance(value, dict) else value
