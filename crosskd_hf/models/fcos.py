"""FCOS: a point a cell, no anchors (Tian et al., ICCV 2019, arXiv 1904.01355)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..utils.distributed import mean_over_ranks
from .anchors import cell_centers
from .assigners import Assignment, point_assign
from .base import DenseDetector
from .box_coding import centerness
from .configuration import FCOSConfig
from .head import HeadSpec
from .losses import EPS, distance_overlaps, focal_loss
from .outputs import DetectionLosses, GroundTruth, HeadPredictions, Priors
from .targets import class_targets, matched_distances


class FCOSForObjectDetection(DenseDetector):
    """FCOS detector; see `DenseDetector.forward` for inputs and outputs."""

    config: FCOSConfig

    @staticmethod
    def head_spec(config: FCOSConfig) -> HeadSpec:
        return HeadSpec.of(config, exp_boxes=True, centerness_from="cls")

    def cell_priors(self, corners: Tensor, strides: Tensor) -> Tensor:
        return cell_centers(corners, strides)

    def distances(self, boxes: Tensor, priors: Priors) -> Tensor:
        return boxes

    def assign(self, priors: Priors, valid: Tensor, truth: GroundTruth, predictions: HeadPredictions) -> Assignment:
        # FCOS doesn't look at validity: points on padding are background like any other.
        levels = list(zip(priors.level_sizes, self.config.regress_ranges, strict=True))
        lower, upper = (
            torch.cat([priors.all.new_full((size,), limits[end]) for size, limits in levels]) for end in (0, 1)
        )
        return point_assign(priors.all, lower, upper, truth.boxes, truth.mask)

    def class_weights(self, valid: Tensor) -> Tensor:
        return torch.ones_like(valid, dtype=torch.float32)

    def matching_rule(self) -> tuple:
        config = self.config
        return config.model_type, tuple(config.strides), tuple(map(tuple, config.regress_ranges))

    def detection_losses(
        self, predictions: HeadPredictions, priors: Priors, assignment: Assignment, truth: GroundTruth
    ) -> DetectionLosses:
        config, positive = self.config, assignment.positive
        targets = matched_distances(truth, assignment, priors)
        weights = centerness(targets) * positive
        class_normalizer = mean_over_ranks(positive.sum().float()).clamp(min=1)
        box_normalizer = mean_over_ranks(weights.sum()).clamp(min=EPS)

        labels = class_targets(truth, assignment, predictions.logits)
        cls_loss = focal_loss(predictions.logits, labels, config.focal_alpha, config.focal_gamma)
        iou, _ = distance_overlaps(predictions.boxes, targets)
        # Of positives only, whose weights are their centerness.
        assert predictions.centerness is not None  # see `head_spec`
        centerness_loss = F.binary_cross_entropy_with_logits(predictions.centerness, weights, reduction="none")

        return DetectionLosses(
            terms={
                "loss_cls": cls_loss / class_normalizer,
                "loss_box": -iou.clamp(min=EPS).log() * (weights / box_normalizer),
                "loss_centerness": centerness_loss * (positive / class_normalizer),
            },
            assignment=assignment,
            class_normalizer=class_normalizer,
            box_normalizer=box_normalizer,
        )
