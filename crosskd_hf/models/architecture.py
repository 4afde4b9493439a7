"""What a detector is made of, as a recipe says it, and the configuration that follows from it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from ..utils.messages import nearest
from ..utils.recipe_fields import Problem, default_of, setting, settings_of
from .configuration import CONFIGS, DenseDetectorConfig
from .families import FAMILIES

DETECTORS = (*CONFIGS, *FAMILIES)


@dataclass
class ArchitectureSection:
    """What a detector is made of; shared by a recipe's `model` and `teacher`.

    The defaults are those of the published GFL R50 student (CrossKD, arXiv 2306.11369, section 4).
    """

    detector: str = setting("gfl", "detector; those with a name of transformers are transformers'", choices=DETECTORS)
    # setting() copies a dict.
    config: dict[str, Any] = setting(  # noqa: RUF009
        {}, "detectors of transformers: keys of their configuration; the keys below are for the others"
    )
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


NOT_DENSE = ("detector", "config")


def build_config(section: ArchitectureSection, label_names: Sequence[str]) -> DenseDetectorConfig:
    """A dense detector's configuration from the architecture and the data's labels.

    Raises:
        ValueError: a value that the configuration refuses; the message begins with its name.
    """
    names = [field.name for field in dataclasses.fields(ArchitectureSection) if field.name not in NOT_DENSE]
    fields = {name: getattr(section, name) for name in names}
    return CONFIGS[section.detector](**fields, id2label=dict(enumerate(label_names)))


def build_transformers_config(section: ArchitectureSection, label_names: Sequence[str]) -> PretrainedConfig:
    """The configuration of a detector of transformers, from `config` and the data's labels.

    Raises:
        ValueError: a value that the configuration refuses; the message begins with "config".
    """
    default = AutoConfig.for_model(section.detector)
    known = [field.name for field in dataclasses.fields(type(default))]
    for key in section.config:
        if key not in known:
            raise ValueError(f"config has a key that {section.detector} doesn't have, {key!r}. {nearest(key, known)}")
    try:
        return AutoConfig.for_model(section.detector, **section.config, id2label=dict(enumerate(label_names)))
    except Exception as error:  # each family checks in its own way
        raise ValueError(f"config is refused by {section.detector}: {error}") from error


def architecture_problems(section: ArchitectureSection, name: str) -> list[Problem]:
    """Keys that are for the other kind of detector.

    Args:
        section: of a recipe.
        name: of the section.
    """
    if section.detector in CONFIGS:
        if not section.config:
            return []
        text = f"{name}.config is for detectors of transformers, but {name}.detector is {section.detector}."
        return [((f"{name}.config", f"{name}.detector"), text)]
    given = [
        f"{name}.{field.name}"
        for field in settings_of(ArchitectureSection)
        if field.name not in NOT_DENSE and getattr(section, field.name) != default_of(field)
    ]
    if not given:
        return []
    text = (
        f"{', '.join(given)}: {section.detector} is a detector of transformers, whose architecture is set by "
        f"{name}.config."
    )
    return [(tuple(given), text)]
