"""What a detector is made of, as a recipe says it, and the configuration that follows from it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ..utils.recipe_fields import setting
from . import CONFIGS
from .configuration import DenseDetectorConfig

DETECTORS = tuple(CONFIGS)


@dataclass
class ArchitectureSection:
    """What a detector is made of; shared by a recipe's `model` and `teacher`.

    The defaults are those of the published GFL R50 student (CrossKD, arXiv 2306.11369, section 4).
    """

    detector: str = setting("gfl", "detector", choices=DETECTORS)
    backbone: str = setting("resnet50.tv_in1k", "timm model, with its tag of pretrained weights")
    backbone_style: str = setting("pytorch", "caffe: stride on a stage's first 1x1, BGR input", ("pytorch", "caffe"))
    drop_path_rate: float = setting(0.0, "stochastic depth of the backbone", minimum=0, maximum=1)
    frozen_stages: int = setting(1, "stages without gradient; 1 is stem and stage 1, 0 nothing", minimum=0, maximum=4)
    train_batchnorm: bool = setting(True, "train the scale and shift of the backbone's BatchNorm")
    freeze_batchnorm_statistics: bool = setting(True, "keep pretrained BatchNorm statistics; false: from scratch")
    fpn_channels: int = setting(256, "channels of the FPN levels", minimum=1, maximum=4096)
    fpn_extra_convs: str = setting("on_output", "P6 from P5 or from C5", ("on_output", "on_input"))
    fpn_relu_before_p7: bool = setting(False, "ReLU before the convolution of P7")
    head_channels: int = setting(256, "channels of the towers", minimum=1, maximum=4096)
    head_blocks: int = setting(4, "convolution blocks per tower", minimum=1, maximum=64)


def build_config(section: ArchitectureSection, label_names: Sequence[str]) -> DenseDetectorConfig:
    """A detector's configuration from the architecture and the data's labels.

    Raises:
        ValueError: a value that the configuration refuses; the message begins with its name.
    """
    names = [field.name for field in dataclasses.fields(ArchitectureSection) if field.name != "detector"]
    fields = {name: getattr(section, name) for name in names}
    return CONFIGS[section.detector](**fields, id2label=dict(enumerate(label_names)))
