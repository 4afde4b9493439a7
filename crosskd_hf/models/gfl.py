"""GFL: Generalized Focal Loss (Li et al., NeurIPS 2020, arXiv 2006.04388).

A square anchor a cell; each side's distance is a distribution over bins; the class score learns the predicted box's
IoU. Assignment is ATSS.
"""

from torch import Tensor

from ..utils.distributed import mean_over_ranks
from .anchors import square_anchors
from .assigners import Assignment, atss_assign
from .base import DenseDetector
from .box_coding import expected_bins
from .configuration import GFLConfig
from .head import HeadSpec
from .losses import distance_overlaps, distribution_focal_loss, quality_focal_loss
from .outputs import DetectionLosses, GroundTruth, HeadPredictions, Priors
from .targets import class_targets, matched_distances, positives_per_image


class GFLForObjectDetection(DenseDetector):
    """GFL detector; see `DenseDetector.forward` for inputs and outputs."""

    config: GFLConfig

    @staticmethod
    def head_spec(config: GFLConfig) -> HeadSpec:
        return HeadSpec.of(config, box_channels=4 * (config.reg_max + 1))

    def cell_priors(self, corners: Tensor, strides: Tensor) -> Tensor:
        return square_anchors(corners, strides, self.config.anchor_scale)

    def distances(self, boxes: Tensor, priors: Priors) -> Tensor:
        return expected_bins(boxes) * priors.strides

    def bins(self, boxes: Tensor) -> Tensor:
        return boxes.unflatten(-1, (4, -1))

    def assign(self, priors: Priors, valid: Tensor, truth: GroundTruth, predictions: HeadPredictions) -> Assignment:
        return atss_assign(priors.all, priors.level_sizes, valid, truth.boxes, truth.mask, self.config.assigner_topk)

    def matching_rule(self) -> tuple:
        config = self.config
        return config.model_type, tuple(config.strides), config.anchor_scale, config.assigner_topk

    def detection_losses(
        self, predictions: HeadPredictions, priors: Priors, assignment: Assignment, truth: GroundTruth
    ) -> DetectionLosses:
        config = self.config
        targets = matched_distances(truth, assignment, priors)
        iou, giou = distance_overlaps(self.distances(predictions.boxes, priors), targets)
        # Boxes count as much as the detector already believes in them.
        confidence = predictions.logits.detach().amax(dim=-1).sigmoid() * assignment.positive
        class_normalizer = mean_over_ranks(positives_per_image(assignment.positive))
        box_normalizer = mean_over_ranks(confidence.sum()).clamp(min=1)
        weights = confidence / box_normalizer

        quality = iou.detach()
        if truth.scores is not None:
            quality = quality * truth.scores.gather(1, assignment.box_index)
        quality = class_targets(truth, assignment, predictions.logits, quality)
        cls_loss = quality_focal_loss(predictions.logits, quality, config.quality_focal_beta)
        bins = (targets / priors.strides).clamp(min=0, max=config.reg_max - 0.1)
        dfl_loss = distribution_focal_loss(self.bins(predictions.boxes), bins).mean(dim=-1)
        return DetectionLosses(
            terms={
                "loss_cls": cls_loss * (assignment.class_weights / class_normalizer),
                "loss_box": (1 - giou) * (weights * config.box_loss_weight),
                "loss_dfl": dfl_loss * (weights * config.dfl_loss_weight),
            },
            assignment=assignment,
            class_normalizer=class_normalizer,
            box_normalizer=box_normalizer,
        )
