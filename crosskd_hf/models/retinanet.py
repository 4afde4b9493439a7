"""RetinaNet: focal loss on nine anchors a cell (Lin et al., ICCV 2017, arXiv 1708.02002)."""

from torch import Tensor

from .anchors import octave_anchors
from .assigners import Assignment, max_iou_assign
from .base import DenseDetector
from .box_coding import deltas_to_distances, distances_to_deltas
from .configuration import RetinaNetConfig
from .head import HeadSpec
from .losses import focal_loss
from .outputs import DetectionLosses, GroundTruth, HeadPredictions, Priors
from .targets import class_targets, matched_distances, positives_per_image


class RetinaNetForObjectDetection(DenseDetector):
    """RetinaNet detector; see `DenseDetector.forward` for inputs and outputs."""

    config: RetinaNetConfig

    @staticmethod
    def head_spec(config: RetinaNetConfig) -> HeadSpec:
        num_anchors = len(config.anchor_ratios) * config.anchor_scales_per_octave
        return HeadSpec.of(config, num_anchors=num_anchors, group_norm=False, scale_boxes=False)

    def cell_priors(self, corners: Tensor, strides: Tensor) -> Tensor:
        config = self.config
        ratios, scales = config.anchor_ratios, config.anchor_scales_per_octave
        return octave_anchors(corners, strides, config.anchor_base_scale, ratios, scales)

    def distances(self, boxes: Tensor, priors: Priors) -> Tensor:
        return deltas_to_distances(boxes, priors.extents)

    def assign(self, priors: Priors, valid: Tensor, truth: GroundTruth, predictions: HeadPredictions) -> Assignment:
        config = self.config
        return max_iou_assign(priors.all, valid, truth.boxes, truth.mask, config.positive_iou, config.negative_iou)

    def matching_rule(self) -> tuple:
        config = self.config
        anchors = (config.anchor_base_scale, tuple(config.anchor_ratios), config.anchor_scales_per_octave)
        return config.model_type, tuple(config.strides), anchors, config.positive_iou, config.negative_iou

    def detection_losses(
        self, predictions: HeadPredictions, priors: Priors, assignment: Assignment, truth: GroundTruth
    ) -> DetectionLosses:
        config = self.config
        targets = class_targets(truth, assignment, predictions.logits)
        cls_loss = focal_loss(predictions.logits, targets, config.focal_alpha, config.focal_gamma)
        distances = matched_distances(truth, assignment, priors)
        box_loss = (predictions.boxes - distances_to_deltas(distances, priors.extents)).abs().sum(dim=-1)
        normalizer = positives_per_image(assignment.positive)  # on this rank only, as in the reference
        return DetectionLosses(
            terms={
                "loss_cls": cls_loss * (assignment.class_weights / normalizer),
                "loss_box": box_loss * (assignment.positive / normalizer),
            },
            assignment=assignment,
            class_normalizer=normalizer,
            box_normalizer=normalizer,
        )
