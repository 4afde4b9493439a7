"""What configurations say of detectors: this package's dense ones, and transformers' own."""

from transformers import PretrainedConfig

from .configuration import DenseDetectorConfig

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

# Families whose ResNets' first stage isn't trained.
FROZEN_STEM = ("deformable_detr", "detr", "conditional_detr", "dab-detr")
# Families that know of no padding: their boxes are relative to the padded input.
BLIND_TO_PADDING = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "yolos")


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


def side_divisor(config: PretrainedConfig) -> int:
    """What the sides of every image must be multiples of; 1 for detectors that pad for themselves."""
    if isinstance(config, DenseDetectorConfig):
        return config.size_divisor
    if config.model_type in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2"):
        return max(config.feat_strides)  # maps of neighbouring levels are joined
    if config.model_type in ("lw_detr", "rf_detr"):
        backbone = config.backbone_config
        lw_detr = config.model_type == "lw_detr"  # whose number of windows is that of both directions together
        return backbone.patch_size * (backbone.num_windows_side if lw_detr else backbone.num_windows)
    return 1
