"""GFL: Generalized Focal Loss (Li et al., NeurIPS 2020, arXiv 2006.04388).

A square anchor a cell; each side's distance is a distribution over bins; the class score learns the predicted box's
IoU. Assignment is ATSS.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..assigners import Assignment, atss_assign, gather_boxes, gather_labels
from ..distributed import mean_over_ranks
from ..losses import box_iou, distribution_focal_loss, giou_loss, quality_focal_loss
from .anchors import square_anchors
from .box_coding import box_centers, boxes_to_distances, distances_to_boxes, expected_bins
from .configuration_dense import GFLConfig
from .head import HeadSpec
from .modeling_dense import (
    DenseDetector,
    DetectionLosses,
    DistillationSpec,
    GroundTruth,
    Predictions,
    Priors,
    level_sums,
    positives_per_image,
)


class GFLForObjectDetection(DenseDetector):
    """GFL detector; see `DenseDetector.forward` for inputs and outputs."""

    config_class = GFLConfig
    distillation = DistillationSpec(tap_index=3, cls_weight=1.0, box_weight=4.0, box_loss="bin_kl", normalizer="class")

    @staticmethod
    def head_spec(config: GFLConfig) -> HeadSpec:
        return HeadSpec(
            num_labels=config.num_labels,
            in_channels=config.fpn_channels,
            channels=config.head_channels,
            num_blocks=config.head_blocks,
            num_levels=len(config.strides),
            num_anchors=1,
            box_channels=4 * (config.reg_max + 1),
            group_norm=True,
            scale_boxes=True,
        )

    def prior_levels(self, sizes: list[tuple[int, int]], device: torch.device) -> list[Tensor]:
        return square_anchors(sizes, self.config.strides, self.config.anchor_scale, device)

    def decode(self, boxes: Tensor, priors: Priors) -> Tensor:
        return distances_to_boxes(box_centers(priors.all), expected_bins(boxes) * priors.strides)

    def assign(self, priors: Priors, valid: Tensor, truth: GroundTruth) -> Assignment:
        return atss_assign(priors.levels, valid, truth.boxes, truth.mask, self.config.assigner_topk)

    def matching_rule(self) -> tuple:
        config = self.config
        return config.model_type, tuple(config.strides), config.anchor_scale, config.assigner_topk

    def detection_losses(
        self, predictions: Predictions, priors: Priors, assignment: Assignment, truth: GroundTruth
    ) -> DetectionLosses:
        config, positive = self.config, assignment.positive
        centers = box_centers(priors.all)
        boxes = self.decode(predictions.boxes, priors)
        # A prior without a box gets its own anchor as a stand-in: finite everywhere, weighted by 0.
        targets = torch.where(
            positive.unsqueeze(-1), gather_boxes(truth.boxes, assignment.box_index), priors.all.expand_as(boxes)
        )
        class_normalizer = mean_over_ranks(positives_per_image(positive))
        # Boxes count as much as the detector already believes in them.
        weights = predictions.logits.detach().sigmoid().amax(dim=-1) * positive
        box_normalizer = mean_over_ranks(weights.sum()).clamp(min=1)

        quality = box_iou(boxes.detach(), targets) * positive
        labels = F.one_hot(gather_labels(truth.labels, assignment.box_index), config.num_labels)
        cls_loss = quality_focal_loss(predictions.logits, labels * quality.unsqueeze(-1), config.quality_focal_beta)
        cls_loss = cls_loss.sum(dim=-1) * assignment.class_weights

        bins = (boxes_to_distances(centers, targets) / priors.strides).clamp(min=0, max=config.reg_max - 0.1)
        dfl_loss = distribution_focal_loss(predictions.boxes.unflatten(-1, (4, -1)), bins).mean(dim=-1) * weights
        box_loss = giou_loss(boxes, targets) * weights

        sizes = priors.level_sizes
        return DetectionLosses(
            terms={
                "loss_cls": level_sums(cls_loss, sizes) / class_normalizer,
                "loss_box": level_sums(box_loss, sizes) / box_normalizer * config.box_loss_weight,
                "loss_dfl": level_sums(dfl_loss, sizes) / box_normalizer * config.dfl_loss_weight,
            },
            assignment=assignment,
            class_normalizer=class_normalizer,
            box_normalizer=box_normalizer,
        )
