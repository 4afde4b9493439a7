"""GFL: Generalized Focal Loss (Li et al., NeurIPS 2020, arXiv 2006.04388).

A square anchor a cell; each side's distance is a distribution over bins; the class score learns the predicted box's
IoU. Assignment is ATSS.
"""

import torch
from torch import Tensor

from ..assigners import Assignment, atss_assign
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
    class_targets,
    level_sums,
    matched_boxes,
    positives_per_image,
)


class GFLForObjectDetection(DenseDetector):
    """GFL detector; see `DenseDetector.forward` for inputs and outputs."""

    config_class = GFLConfig
    distillation = DistillationSpec(tap_index=3, cls_weight=1.0, box_weight=4.0, box_loss="bin_kl", normalizer="class")

    @staticmethod
    def head_spec(config: GFLConfig) -> HeadSpec:
        return HeadSpec.of(config, box_channels=4 * (config.reg_max + 1))

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
        targets = matched_boxes(truth, assignment, stand_in=priors.all)
        class_normalizer = mean_over_ranks(positives_per_image(positive))
        # Boxes count as much as the detector already believes in them.
        weights = predictions.logits.detach().sigmoid().amax(dim=-1) * positive
        box_normalizer = mean_over_ranks(weights.sum()).clamp(min=1)

        quality = box_iou(boxes.detach(), targets).unsqueeze(-1)
        quality = quality * class_targets(truth, assignment, config.num_labels)
        cls_loss = quality_focal_loss(predictions.logits, quality, config.quality_focal_beta)
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
