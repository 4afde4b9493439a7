"""ATSS: one anchor a cell, chosen by statistics, with centerness (Zhang et al., CVPR 2020, arXiv 1912.02424)."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from ..assigners import Assignment, atss_assign
from ..distributed import mean_over_ranks
from ..losses import giou_loss
from .anchors import square_anchors
from .box_coding import box_centers, centerness, deltas_to_boxes
from .configuration_dense import ATSSConfig
from .head import HeadSpec
from .modeling_dense import (
    DenseDetector,
    DetectionLosses,
    DistillationSpec,
    GroundTruth,
    Predictions,
    Priors,
    class_targets,
    level_sums,
    matched_boxes,
    positives_per_image,
)


class ATSSForObjectDetection(DenseDetector):
    """ATSS detector; see `DenseDetector.forward` for inputs and outputs."""

    config_class = ATSSConfig
    distillation = DistillationSpec(
        tap_index=3, cls_weight=1.0, box_weight=1.0, box_loss="giou", normalizer="class", centerness=True
    )

    @staticmethod
    def head_spec(config: ATSSConfig) -> HeadSpec:
        return HeadSpec.of(config, centerness_from="reg")

    def prior_levels(self, sizes: list[tuple[int, int]], device: torch.device) -> list[Tensor]:
        return square_anchors(sizes, self.config.strides, self.config.anchor_scale, device)

    def decode(self, boxes: Tensor, priors: Priors) -> Tensor:
        return deltas_to_boxes(priors.all, boxes, tuple(self.config.delta_scales))

    def assign(self, priors: Priors, valid: Tensor, truth: GroundTruth) -> Assignment:
        return atss_assign(priors.levels, valid, truth.boxes, truth.mask, self.config.assigner_topk)

    def matching_rule(self) -> tuple:
        config = self.config
        return config.model_type, tuple(config.strides), config.anchor_scale, config.assigner_topk

    def detection_losses(
        self, predictions: Predictions, priors: Priors, assignment: Assignment, truth: GroundTruth
    ) -> DetectionLosses:
        config, positive = self.config, assignment.positive
        boxes = matched_boxes(truth, assignment, stand_in=priors.all)
        target = centerness(box_centers(priors.all), boxes)
        weights = target * positive
        class_normalizer = mean_over_ranks(positives_per_image(positive))
        box_normalizer = mean_over_ranks(weights.sum()).clamp(min=1)

        labels = class_targets(truth, assignment, config.num_labels)
        cls_loss = sigmoid_focal_loss(predictions.logits, labels, config.focal_alpha, config.focal_gamma)
        cls_loss = cls_loss.sum(dim=-1) * assignment.class_weights
        box_loss = giou_loss(self.decode(predictions.boxes, priors), boxes) * weights
        centerness_loss = F.binary_cross_entropy_with_logits(predictions.centerness, target, reduction="none")

        sizes = priors.level_sizes
        return DetectionLosses(
            terms={
                "loss_cls": level_sums(cls_loss, sizes) / class_normalizer,
                "loss_box": level_sums(box_loss, sizes) / box_normalizer * config.box_loss_weight,
                "loss_centerness": level_sums(centerness_loss * positive, sizes) / class_normalizer,
            },
            assignment=assignment,
            class_normalizer=class_normalizer,
            box_normalizer=box_normalizer,
        )
