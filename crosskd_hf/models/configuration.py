"""Configurations of the dense detectors: one shared base, one small subclass a detector."""

from collections.abc import Iterator, Sequence
from dataclasses import field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Lowest and highest value of a number, or of each item of a list. A file with more than these is damaged, and would
# take hours or all memory to build.
LIMITS = {
    "drop_path_rate": (0, 1),
    "frozen_stages": (-1, 10),
    "fpn_channels": (1, 4096),
    "head_channels": (1, 4096),
    "head_blocks": (1, 64),
    "size_divisor": (1, 4096),
    "nms_threshold": (0, 1),
    "reg_max": (1, 1000),
    "anchor_scale": (1, 1000),
    "anchor_base_scale": (1, 1000),
    "anchor_ratios": (1e-3, 1e3),
    "anchor_scales_per_octave": (1, 100),
    "assigner_topk": (1, 10_000),
    "positive_iou": (0, 1),
    "negative_iou": (0, 1),
    "regress_ranges": (-1, float("inf")),
    "delta_scales": (1e-6, 1e6),
    "quality_focal_beta": (0, 100),
    "focal_alpha": (0, 1),
    "focal_gamma": (0, 100),
    "box_loss_weight": (0, 1e6),
    "dfl_loss_weight": (0, 1e6),
    # Of the image processor
    "score_threshold": (0, 1),
    "max_candidates": (1, 1_000_000),
    "max_detections": (1, 1_000_000),
    "image_mean": (-1e6, 1e6),
    "image_std": (1e-6, 1e6),
    "rescale_factor": (1e-9, 1e6),
}
MOST_LABELS = 100_000
MOST_LEVELS = 12


def check_number(name: str, value: Any, whole: bool = False) -> None:
    """Compare a number, or every number of a list, with `LIMITS`.

    Raises:
        ValueError: it is outside of them, NaN, or no number; or, if `whole`, no whole one.
    """
    low, high = LIMITS[name]
    for item in _flat(value):
        number = isinstance(item, Integral if whole else Real) and not isinstance(item, bool)
        if not (number and low <= item <= high):  # NaN fails here as well
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{name} is {value!r}; it must be {kind} from {low:g} to {high:g}.")


def _flat(value: Any) -> Iterator[Any]:
    if not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _flat(item)


@strict
class DenseDetectorConfig(PreTrainedConfig):
    r"""
    What the four detectors share: timm backbone -> FPN -> two-tower head on five levels.

    Args:
        backbone (`str`): name of any timm model with `features_only` maps of strides 8, 16 and 32.
        backbone_style (`str`): `"pytorch"`, or `"caffe"`: ResNets with the stride on each stage's first 1x1
            convolution, as the FCOS checkpoints were trained.
        drop_path_rate (`float`): stochastic depth of the backbone.
        frozen_stages (`int`): stages that get no gradient, stem included; 0 (in MMDetection -1) freezes nothing, 1 the
            stem and stage 1.
        train_batchnorm (`bool`): whether the backbone's BatchNorm scale and shift are trained.
        freeze_batchnorm_statistics (`bool`): BatchNorm keeps its pretrained mean and variance while training. False is
            for training from scratch, where there are none.
        fpn_channels (`int`): channels of every FPN level.
        fpn_extra_convs (`str`): P6 is made `"on_output"` (from P5) or `"on_input"` (from C5).
        fpn_relu_before_p7 (`bool`): ReLU on P6 before the convolution that makes P7 (FCOS).
        head_channels (`int`): channels of the towers.
        head_blocks (`int`): convolution blocks per tower.
        strides (`list[int]`): pixels between two cells of each level.
        size_divisor (`int`): an image's own size is rounded up to this; cells beyond have class weight 0.
        nms_threshold (`float`): IoU above which the lower-scored of two boxes of a class is dropped.

    Raises:
        ValueError: a value that no detector can be built with, by the name of its key.
        StrictDataclassFieldValidationError: one of another type, or no choice, by the name of its key.
    """

    if TYPE_CHECKING:
        id2label: dict[int, str] = field(default_factory=dict)  # transformers fills it in

    backbone: str = "resnet50"
    backbone_style: Literal["pytorch", "caffe"] = "pytorch"
    drop_path_rate: float = 0.0
    frozen_stages: int = 1
    train_batchnorm: bool = True
    freeze_batchnorm_statistics: bool = True
    fpn_channels: int = 256
    fpn_extra_convs: Literal["on_output", "on_input"] = "on_output"
    fpn_relu_before_p7: bool = False
    head_channels: int = 256
    head_blocks: int = 4
    strides: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    size_divisor: int = 32
    nms_threshold: float = 0.6

    @property
    def label_names(self) -> list[str]:
        """Class names, by label."""
        return [self.id2label[label] for label in range(len(self.id2label))]

    @label_names.setter
    def label_names(self, names: Sequence[str]) -> None:
        self.id2label = dict(enumerate(names))
        self.label2id = {name: label for label, name in enumerate(names)}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing; see `DenseDetector.register_for_auto_class`."""

    def __post_init__(self, **kwargs):
        self._check_labels(kwargs.get("num_labels"))
        super().__post_init__(**kwargs)
        if self.id2label and not self.label2id:
            self.label2id = {name: label for label, name in self.id2label.items()}
        for name in LIMITS:
            if hasattr(self, name):
                check_number(name, getattr(self, name))
        levels = len(self.strides)
        if not 3 <= levels <= MOST_LEVELS or self.strides != [8 * 2**level for level in range(levels)]:
            raise ValueError(
                f"strides is {self.strides}; the FPN's levels have strides 8, 16, 32, and on by factors of 2."
            )

    def _check_labels(self, num_labels: int | None) -> None:
        if num_labels is not None and not (isinstance(num_labels, Integral) and 1 <= num_labels <= MOST_LABELS):
            raise ValueError(f"num_labels is {num_labels!r}; it must be a whole number from 1 to {MOST_LABELS}.")
        if self.id2label is None:
            return
        if not (isinstance(self.id2label, dict) and all(isinstance(name, str) for name in self.id2label.values())):
            raise ValueError(f"id2label is {self.id2label!r:.200}; it must give each label its name.")
        count = len(self.id2label)
        if not count or {str(label) for label in self.id2label} != {str(label) for label in range(count)}:
            labels = ", ".join(map(str, list(self.id2label)[:5])) or "none"
            raise ValueError(f"id2label has the labels {labels}; they must count from 0 without gaps.")


@strict
class GFLConfig(DenseDetectorConfig):
    r"""
    Generalized Focal Loss detector (Li et al., NeurIPS 2020, arXiv 2006.04388).

    Args:
        reg_max (`int`): last bin of a side's distance distribution; there are `reg_max + 1` bins a side.
        anchor_scale (`int`): side of the square anchor, in strides.
        assigner_topk (`int`): ATSS candidates per level and box.
        quality_focal_beta (`float`): exponent of the quality focal loss.
        box_loss_weight (`float`): weight of the GIoU loss.
        dfl_loss_weight (`float`): weight of the distribution focal loss.
    """

    model_type = "crosskd_gfl"

    reg_max: int = 16
    anchor_scale: int = 8
    assigner_topk: int = 9
    quality_focal_beta: float = 2.0
    box_loss_weight: float = 2.0
    dfl_loss_weight: float = 0.25


@strict
class RetinaNetConfig(DenseDetectorConfig):
    r"""
    RetinaNet (Lin et al., ICCV 2017, arXiv 1708.02002).

    Args:
        anchor_base_scale (`int`): side of the first square anchor, in strides.
        anchor_ratios (`list[float]`): height / width of the anchors.
        anchor_scales_per_octave (`int`): scales between two levels.
        positive_iou (`float`): an anchor with this IoU or more is positive.
        negative_iou (`float`): one below this is background; one between the two is ignored.
        focal_alpha (`float`): weight of positives in the focal loss.
        focal_gamma (`float`): exponent of the focal loss.
    """

    model_type = "crosskd_retinanet"

    nms_threshold: float = 0.5
    anchor_base_scale: int = 4
    anchor_ratios: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    anchor_scales_per_octave: int = 3
    positive_iou: float = 0.5
    negative_iou: float = 0.4
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not self.anchor_ratios:
            raise ValueError("anchor_ratios is empty; there must be an anchor.")
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou is {self.negative_iou}, above positive_iou, {self.positive_iou}.")


@strict
class FCOSConfig(DenseDetectorConfig):
    r"""
    FCOS (Tian et al., ICCV 2019, arXiv 1904.01355), as MMDetection trained it: without its later tricks.

    Args:
        regress_ranges (`list[list[float]]`): lowest and highest distance to a side that each level learns, inclusive;
            the last level's upper end is unbounded.
        focal_alpha (`float`): weight of positives in the focal loss.
        focal_gamma (`float`): exponent of the focal loss.
    """

    model_type = "crosskd_fcos"

    nms_threshold: float = 0.5
    regress_ranges: list[list[float]] = field(
        default_factory=lambda: [[-1.0, 64.0], [64.0, 128.0], [128.0, 256.0], [256.0, 512.0], [512.0, 1e8]]
    )
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not all(len(limits) == 2 and limits[0] < limits[1] for limits in self.regress_ranges):
            raise ValueError(f"regress_ranges is {self.regress_ranges}; it must hold [lowest, highest] of each level.")
        if len(self.regress_ranges) != len(self.strides):
            raise ValueError(
                f"regress_ranges has {len(self.regress_ranges)} ranges for the {len(self.strides)} strides "
                f"{self.strides}; it must have one for each."
            )


@strict
class ATSSConfig(DenseDetectorConfig):
    r"""
    ATSS (Zhang et al., CVPR 2020, arXiv 1912.02424).

    Args:
        anchor_scale (`int`): side of the square anchor, in strides.
        assigner_topk (`int`): candidates per level and box.
        delta_scales (`list[float]`): what the box deltas are multiplied by before they are decoded.
        focal_alpha (`float`): weight of positives in the focal loss.
        focal_gamma (`float`): exponent of the focal loss.
        box_loss_weight (`float`): weight of the GIoU loss.
    """

    model_type = "crosskd_atss"

    anchor_scale: int = 8
    assigner_topk: int = 9
    delta_scales: list[float] = field(default_factory=lambda: [0.1, 0.1, 0.2, 0.2])
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    box_loss_weight: float = 2.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if len(self.delta_scales) != 4:
            raise ValueError(f"delta_scales is {self.delta_scales}; there must be one of each of the 4 deltas.")


CONFIGS: dict[str, type[DenseDetectorConfig]] = {
    "gfl": GFLConfig,
    "retinanet": RetinaNetConfig,
    "fcos": FCOSConfig,
    "atss": ATSSConfig,
}
