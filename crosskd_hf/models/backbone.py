"""A timm feature extractor as the backbone of a detector."""

import difflib
from collections.abc import Iterator
from typing import Any

import timm
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .configuration import DenseDetectorConfig
from .swin import is_swin, pad_before_shifting, pad_to_patches

STRIDES = (8, 16, 32)


class Backbone(nn.Module):
    """C3, C4 and C5 of a timm `features_only` model.

    Args:
        config: `backbone`, `backbone_style`, `drop_path_rate`, `frozen_stages`, `train_batchnorm` are read.
        pretrained: let timm load its ImageNet weights (over the network or from its cache).

    Raises:
        ValueError: if timm doesn't know the name, the model has no maps of strides 8, 16 and 32, or the style or
            the number of frozen stages doesn't fit it.
    """

    body: Any  # one of timm's classes, with `feature_info`

    def __init__(self, config: DenseDetectorConfig, pretrained: bool = False):
        super().__init__()
        self.freeze_statistics = config.freeze_batchnorm_statistics
        self.body = _create_body(config, pretrained)
        reductions = self.body.feature_info.reduction()
        # The deepest map of a stride: some models have several.
        self.indices = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]
        self.channels: list[int] = [self.body.feature_info.channels()[i] for i in self.indices]
        self.channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
        self.is_swin = is_swin(config.backbone)
        if self.is_swin:
            pad_before_shifting(self.body)
            # Swin's blocks leave their sum unnormalised; detectors put a norm on each map that they use.
            self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)
        if config.backbone_style == "caffe":
            _stride_on_first_convolution(self.body, config.backbone)
        for parameter in frozen_parameters(self.body, config):
            parameter.requires_grad_(False)
        # from_pretrained builds the model on the meta device and then initialises what no checkpoint filled: timm has
        # its own initialisation, which must stand.
        for tensor in (*self.body.parameters(), *self.body.buffers()):
            if not tensor.is_meta:
                tensor._is_hf_initialized = True

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> three maps (N, C_i, H / s, W / s), s = 8, 16, 32, rounded up (ConvNeXt: down)."""
        maps = self.body(pad_to_patches(pixel_values) if self.is_swin else pixel_values)
        features = [maps[i] for i in self.indices]
        if self.is_swin:
            features = [norm(feature) for norm, feature in zip(self.norms, features, strict=True)]
        if self.channels_last:
            features = [feature.permute(0, 3, 1, 2).contiguous() for feature in features]
        return features

    def checkpoint_activations(self, enable: bool = True) -> None:
        """Keep only the input of each stage for the backward pass, which computes the stage again.

        Raises:
            ValueError: if timm can't for this model, or BatchNorm statistics are learnt: a stage that runs twice would
                count its batch twice.
        """
        if enable and not self.freeze_statistics and next(batchnorms(self.body), None) is not None:
            raise ValueError(
                "activation checkpointing needs freeze_batchnorm_statistics: true, since a stage that is computed "
                "twice would count its batch twice in BatchNorm's statistics."
            )
        if hasattr(self.body, "set_grad_checkpointing"):
            self.body.set_grad_checkpointing(enable)
        elif enable:
            raise ValueError(f"timm has no activation checkpointing for {type(self.body).__name__}; turn it off.")

    def train(self, mode: bool = True) -> "Backbone":
        """BatchNorm keeps its ImageNet statistics while training (`norm_eval`): detector batches are too small."""
        super().train(mode)
        for module in batchnorms(self.body):
            frozen = not any(parameter.requires_grad for parameter in module.parameters())
            if self.freeze_statistics or frozen:
                module.eval()
        return self


def _create_body(config: DenseDetectorConfig, pretrained: bool) -> Any:
    name = config.backbone
    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5)
        raise ValueError(f"backbone {name!r} is no timm model. Close names: {', '.join(close) or 'none'}.")
    options: dict = {"strict_img_size": False, "always_partition": True} if is_swin(name) else {}
    # Given even if 0: some models have a rate of their own (Swin 0.1). Others don't know the word.
    options["drop_path_rate"] = config.drop_path_rate
    try:
        try:
            body: Any = timm.create_model(name, pretrained=pretrained, features_only=True, **options)
        except TypeError:
            if options.pop("drop_path_rate"):
                raise
            body = timm.create_model(name, pretrained=pretrained, features_only=True, **options)
    except (AttributeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"backbone {name!r} can't be used: timm builds no features_only version of it with drop_path_rate "
            f"{config.drop_path_rate} ({error})."
        ) from error
    reductions = body.feature_info.reduction()
    missing = [stride for stride in STRIDES if stride not in reductions]
    if missing:
        raise ValueError(
            f"backbone {name!r} has maps of strides {reductions}; strides {missing} are missing: use one "
            "that has them, such as resnet50."
        )
    return body


def batchnorms(module: nn.Module) -> Iterator[_BatchNorm]:
    """Every BatchNorm inside `module`, timm's fused one included."""
    for child in module.modules():
        if isinstance(child, (_BatchNorm, BatchNormAct2d)):
            yield child


def frozen_parameters(body: Any, config: DenseDetectorConfig) -> Iterator[nn.Parameter]:
    """Parameters that get no gradient: the stem and the first stages, and BatchNorm's if it isn't trained.

    Raises:
        ValueError: if the model has no stage with the stride that `frozen_stages` names.
    """
    if not config.train_batchnorm:
        for norm in batchnorms(body):
            yield from norm.parameters()
    if config.frozen_stages < 1:
        return
    # Stage i ends at stride 2 ** (i + 1): 4, 8, 16, 32. timm may nest stages in one module, and flattens some names.
    stride = 2 ** (config.frozen_stages + 1)
    ends = [info["module"] for info in body.feature_info.info if info["reduction"] == stride]
    prefixes = tuple(f"{name}." for end in ends[-1:] for name in (end, end.replace(".", "_")))
    parameters = list(body.named_parameters())
    inside = [i for i, (name, _) in enumerate(parameters) if name.startswith(prefixes)]
    if not prefixes or not inside:
        raise ValueError(
            f"frozen_stages is {config.frozen_stages}, but backbone {config.backbone!r} has no stage of stride "
            f"{stride} to freeze up to; set frozen_stages to 0."
        )
    # timm registers modules in the order that they run.
    yield from (parameter for _, parameter in parameters[: inside[-1] + 1])


def _stride_on_first_convolution(body: nn.Module, name: str) -> None:
    """Turn timm's ResNet into the "caffe" one: stages 2-4 subsample in their first 1x1 convolution, not in the 3x3."""
    for stage in ("layer2", "layer3", "layer4"):
        block = getattr(body, stage, [None])[0]
        if not hasattr(block, "conv3") or not hasattr(block, "conv1"):
            raise ValueError(f"backbone_style 'caffe' needs a bottleneck ResNet such as resnet50, not {name!r}.")
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
