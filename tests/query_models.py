"""Tiny query-based detectors of transformers, every parameter drawn at random.

Initial box heads are nearly constant and would hide errors.
"""

import torch
from transformers import (
    AutoModelForObjectDetection,
    ConditionalDetrConfig,
    DabDetrConfig,
    DeformableDetrConfig,
    Deimv2Config,
    DetrConfig,
    DFineConfig,
    HGNetV2Config,
    LwDetrConfig,
    PreTrainedModel,
    ResNetConfig,
    RfDetrConfig,
    RTDetrConfig,
    RTDetrResNetConfig,
    RTDetrV2Config,
    YolosConfig,
)

LABELS = {0: "cat", 1: "dog", 2: "emu"}
QUERIES = 12


def rt_detr_options(**options) -> dict:
    """Of RT-DETR and RT-DETRv2."""
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[2, 3, 4]
    )
    return {
        "backbone_config": backbone,
        "encoder_in_channels": [8, 16, 16],
        "encoder_hidden_dim": 16,
        "encoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_in_channels": [16, 16, 16],
        "d_model": 16,
        "decoder_ffn_dim": 16,
        "decoder_attention_heads": 2,
        "decoder_layers": 3,
        "num_queries": QUERIES,
        "num_denoising": 8,
    } | options


def hgnet(*stages: str) -> HGNetV2Config:
    """A backbone that gives the maps of these stages, with 16 channels each."""
    return HGNetV2Config(
        stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, False, False],
        stage_kernel_size=[3, 3, 3, 3],
        stem_channels=[3, 8, 8],
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=list(stages),
    )


def d_fine_options(**options) -> dict:
    """Of D-FINE and DEIMv2."""
    backbone = hgnet("stage2", "stage3", "stage4")
    return rt_detr_options(backbone_config=backbone, encoder_in_channels=[16, 16, 16], max_num_bins=8) | options


def two_levels() -> dict:
    """Options of a D-FINE with the levels of its nano size."""
    return {
        "backbone_config": hgnet("stage3", "stage4"),
        "feat_strides": [16, 32],
        "num_feature_levels": 2,
        "encoder_in_channels": [16, 16],
        "decoder_in_channels": [16, 16],
        "encode_proj_layers": [1],
    }


def deformable_options(**options) -> dict:
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return {
        "backbone_config": backbone,
        "use_timm_backbone": False,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "num_queries": QUERIES,
        "two_stage_num_proposals": QUERIES,
        "auxiliary_loss": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    } | options


def detr_options(**options) -> dict:
    """Of DETR, Conditional DETR and DAB-DETR."""
    names = ("encoder_ffn_dim", "decoder_ffn_dim", "num_queries")
    common = {name: value for name, value in deformable_options(**options).items() if name in (*names, *options)}
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    sizes = {"d_model": 16, "hidden_size": 16, "encoder_layers": 1, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return {"backbone_config": backbone, "use_timm_backbone": False, "dropout": 0.0, **sizes, **heads, **common}


def lw_detr_options(**options) -> dict:
    """Of LW-DETR."""
    return {
        "backbone_config": {
            "model_type": "lw_detr_vit",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "window_block_indices": [0],
            "out_indices": [1, 2],
            "image_size": 64,
            "patch_size": 16,
            "pretrain_image_size": 64,
            "num_windows": 4,
        },
        "projector_scale_factors": [1.0],
        "d_model": 16,
        "decoder_ffn_dim": 16,
        "decoder_layers": 3,
        "decoder_self_attention_heads": 2,
        "decoder_cross_attention_heads": 2,
        "decoder_n_points": 2,
        "num_queries": QUERIES,
        "group_detr": 3,
        "num_feature_levels": 1,
        "dropout": 0.0,
    } | options


def rf_detr_options(**options) -> dict:
    backbone = {
        "model_type": "rf_detr_dinov2",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "num_windows": 2,
        "num_register_tokens": 0,
        "out_features": ["stage1", "stage2"],
    }
    options = lw_detr_options(**{"backbone_config": backbone} | options)
    del options["projector_scale_factors"]
    return options


CONFIGS = {
    "rt_detr": lambda **o: RTDetrConfig(**rt_detr_options(**o)),
    "rt_detr_v2": lambda **o: RTDetrV2Config(**rt_detr_options(**o)),
    "d_fine": lambda **o: DFineConfig(**d_fine_options(**o)),
    "deimv2": lambda **o: Deimv2Config(**d_fine_options(**o)),
    "deimv2 shared": lambda **o: Deimv2Config(**d_fine_options(share_bbox_head=True, **o)),
    "deformable_detr": lambda **o: DeformableDetrConfig(**deformable_options(**o)),
    "deformable_detr refined": lambda **o: DeformableDetrConfig(**deformable_options(with_box_refine=True, **o)),
    "deformable_detr two-stage": lambda **o: DeformableDetrConfig(
        **deformable_options(with_box_refine=True, two_stage=True, **o)
    ),
    "lw_detr": lambda **o: LwDetrConfig(**lw_detr_options(**o)),
    "rf_detr": lambda **o: RfDetrConfig(**rf_detr_options(**o)),
}


# Families without a decoder that can be distilled.
DECODERLESS = {
    "detr": lambda **o: DetrConfig(**detr_options(**o)),
    "conditional_detr": lambda **o: ConditionalDetrConfig(**detr_options(**o)),
    "dab_detr": lambda **o: DabDetrConfig(**detr_options(**o)),
    "yolos": lambda **o: YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[64, 96],
        patch_size=16,
        num_detection_tokens=QUERIES,
        **o,
    ),
}


def query_model(family: str, seed: int = 0, labels: dict[int, str] = LABELS, **options) -> PreTrainedModel:
    """A detector of a family, in training mode."""
    torch.manual_seed(seed)
    model = AutoModelForObjectDetection.from_config((CONFIGS | DECODERLESS)[family](id2label=labels, **options))
    generator = torch.Generator().manual_seed(seed)
    if family.startswith("deformable"):
        model.model.backbone.requires_grad_(True)  # transformers freezes all of a ResNet of its own, not of timm's
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
            elif parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def query_batch() -> dict:
    """Two images of 64 x 96, the second of which is padded from column 70 on, with labels."""
    generator = torch.Generator().manual_seed(0)
    pixels, mask = torch.randn(2, 3, 64, 96, generator=generator), torch.ones(2, 64, 96, dtype=torch.long)
    pixels[1, :, :, 70:], mask[1, :, 70:] = 0, 0
    labels = [
        {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.3, 0.1, 0.1]])},
        {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.3, 0.5, 0.4, 0.4]])},
    ]
    return {"pixel_values": pixels, "pixel_mask": mask, "labels": labels}
