"""Configurations of the dense detectors: one shared base, one small subclass a detector."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

BACKBONE_STYLES = ("pytorch", "caffe")
EXTRA_CONVS = ("on_output", "on_input")


@strict
class DenseDetectorConfig(PreTrainedConfig):
    r"""
    What the four detectors share: timm backbone -> FPN -> two-tower head on five levels.

    Args:
        backbone (`str`): name of any timm model with `features_only` maps of strides 8, 16 and 32.
        backbone_style (`str`): `"pytorch"`, or `"caffe"`: ResNets with the stride on each stage's first 1x1
            convolution, as the FCOS checkpoints were trained.
        drop_path_rate (`float`): stochastic depth of the backbone.
        frozen_stages (`int`): stages that get no gradient, stem included; 0 freezes nothing, 1 the stem and stage 1.
        train_batchnorm (`bool`): whether the backbone's BatchNorm scale and shift are trained.
        freeze_batchnorm_statistics (`bool`): BatchNorm keeps its pretrained mean and variance while training. False is
            for training from scratch, where there are none.
        fpn_channels (`int`): channels of every FPN level.
        fpn_extra_convs (`str`): P6 is made `"on_output"` (from P5) or `"on_input"` (from C5).
        fpn_relu_before_p7 (`bool`): ReLU on P6 before the convolution that makes P7 (FCOS).
        head_channels (`int`): channels of the towers.
        head_blocks (`int`): convolution blocks a tower.
        strides (`list[int]`): pixels between two cells of each level.
        size_divisor (`int`): an image's own size is rounded up to this; cells beyond have class weight 0.
        nms_threshold (`float`): IoU above which the lower-scored of two boxes of a class is dropped.
    """

    backbone: str = "resnet50"
    backbone_style: str = "pytorch"
    drop_path_rate: float = 0.0
    frozen_stages: int = 1
    train_batchnorm: bool = True
    freeze_batchnorm_statistics: bool = True
    fpn_channels: int = 256
    fpn_extra_convs: str = "on_output"
    fpn_relu_before_p7: bool = False
    head_channels: int = 256
    head_blocks: int = 4
    strides: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    size_divisor: int = 32
    nms_threshold: float = 0.6

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.id2label and not self.label2id:
            self.label2id = {name: label for label, name in self.id2label.items()}
        for name, allowed in (("backbone_style", BACKBONE_STYLES), ("fpn_extra_convs", EXTRA_CONVS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        if self.head_blocks < 1:
            raise ValueError(f"head_blocks is {self.head_blocks}; a tower needs at least 1 block.")
        if len(self.strides) < 3 or self.strides[:3] != [8, 16, 32]:
            raise ValueError(f"strides is {self.strides}; the FPN's first three levels have strides 8, 16 and 32.")


@strict
class GFLConfig(DenseDetectorConfig):
    r"""
    Generalized Focal Loss detector (Li et al., NeurIPS 2020, arXiv 2006.04388).

    Args:
        reg_max (`int`): last bin of a side's distance distribution; there are `reg_max + 1` bins a side.
        anchor_scale (`int`): side of the square anchor, in strides.
        assigner_topk (`int`): ATSS candidates a level and box.
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


@strict
class ATSSConfig(DenseDetectorConfig):
    r"""
    ATSS (Zhang et al., CVPR 2020, arXiv 1912.02424).

    Args:
        anchor_scale (`int`): side of the square anchor, in strides.
        assigner_topk (`int`): candidates a level and box.
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
