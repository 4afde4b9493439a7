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
        train_batchnorm (`bool`): whether the backbone's BatchNorm scale and shift are trained. Its statistics never are.
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
