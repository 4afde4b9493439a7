"""ATSS: one anchor a cell, chosen by statistics, with centerness (Zhang et al., CVPR 2020, arXiv 1912.02424)."""

from torch import Tensor
from torch.nn import functional as F

from ..utils.distributed import mean_over_ranks
from .anchors import square_anchors
from .assigners import Assignment, atss_assign
from .base import DenseDetector
from .box_coding import centerness, deltas_to_distances
from .configuration import ATSSConfig
from .head import HeadSpec
from .losses import distance_overlaps, focal_loss
from .outputs import DetectionLosses, GroundTruth, HeadPredictions, Priors
from .targets import class_targets, matched_distances, positives_per_image


class ATSSForObjectDetection(DenseDetector):
    """ATSS detector; see `DenseDetector.forward` for inputs and outputs."""

    config: ATSSConfig

    @staticmethod
    def head_spec(config: ATSSConfig) -> HeadSpec:
        return HeadSpec.of(config, centerness_from="reg")

    def cell_priors(self, corners: Tensor, strides: Tensor) -> Tensor:
        return square_anchors(corners, strides, self.config.anchor_scale)

    def distances(self, boxes: Tensor, priors: Priors) -> Tensor:
        return deltas_to_distances(boxes, priors.extents, tuple(self.config.delta_scales))

    def assign(self, priors: Priors, valid: Tensor, truth: GroundTruth, predictions: HeadPredictions) -> Assignment:
        return atss_assign(priors.all, priors.level_sizes, valid, truth.boxes, truth.mask, self.config.assigner_topk)

    def matching_rule(self) -> tuple:
        config = self.config
        return config.model_type, tuple(config.strides), config.anchor_scale, config.assigner_topk

    def detection_losses(
        self, predictions: HeadPredictions, priors: Priors, assignment: Assignment, truth: GroundTruth
    ) -> DetectionLosses:
        config, positive = self.config, assignment.positive
        targets = matched_distances(truth, assignment, priors)
        weights = centerness(targets) * positive
        class_normalizer = mean_over_ranks(positives_per_image(positive))
        box_normalizer = mean_over_ranks(weights.sum()).clamp(min=1)

        labels = class_targets(truth, assignment, predictions.logits)
        cls_loss = focal_loss(predictions.logits, labels, config.focal_alpha, config.focal_gamma)
        _, giou = distance_overlaps(self.distances(predictions.boxes, priors), targets)
        # Of positives only, whose weights are their centerness.
        assert predictions.centerness is not None  # see `head_spec`
        centerness_loss = F.binary_cross_entropy_with_logits(predictions.centerness, weights, reduction="none")

        return DetectionLosses(
            terms={
                "loss_cls": cls_loss * (assignment.class_weights / class_normalizer),
                "loss_box": (1 - giou) * (weights * (config.box_loss_weight / box_normalizer)),
                "loss_centerness": centerness_loss * (positive / class_normalizer),
            },
            assignment=assignment,
            class_normalizer=class_normalizer,
            box_normalizer=box_normalizer,
        )
