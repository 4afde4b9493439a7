"""What a dense detector gives: priors, head predictions, losses, and the output of `forward`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .assigners import Assignment
from .box_coding import box_centers, boxes_to_distances


@dataclass(frozen=True)
class Priors:
    """Anchors or points of a batch, level by level. Made by `Priors.of`.

    Attributes:
        all: (P, 4) xyxy anchors, or (P, 2) points.
        level_sizes: priors per level.
        strides: (P, 1) pixels per cell.
        corners: (P, 2) xy pixel of the top left corner of each prior's cell.
        centers: (P, 2) xy, the points themselves where priors are points.
        extents: (P, 4) from the centre to the prior's own left, top, right, bottom sides; 0 of points.
    """

    all: Tensor
    level_sizes: list[int]
    strides: Tensor
    corners: Tensor
    centers: Tensor
    extents: Tensor

    @classmethod
    def of(cls, priors: Tensor, level_sizes: list[int], strides: Tensor, corners: Tensor) -> "Priors":
        """From all anchors or points, and the stride and corner of each one's cell."""
        boxes = priors if priors.shape[1] == 4 else priors.repeat(1, 2)
        centers = box_centers(boxes)
        return cls(priors, level_sizes, strides, corners, centers, boxes_to_distances(centers, boxes))

    def at_levels(self, indices: Sequence[int]) -> "Priors":
        """Those of some levels only."""

        def rows(values: Tensor) -> Tensor:
            levels = values.split(self.level_sizes)
            return torch.cat([levels[i] for i in indices])

        sizes = [self.level_sizes[i] for i in indices]
        return Priors.of(rows(self.all), sizes, rows(self.strides), rows(self.corners))


@dataclass(frozen=True)
class HeadPredictions:
    """A head's output, flattened over levels, in fp32.

    Attributes:
        logits: (N, P, labels).
        boxes: (N, P, box_channels), as the head gives them.
        centerness: (N, P) logits, or None.
    """

    logits: Tensor
    boxes: Tensor
    centerness: Tensor | None


@dataclass(frozen=True)
class GroundTruth:
    """Padded boxes of a batch.

    Attributes:
        boxes: (N, G, 4) xyxy pixels.
        labels: (N, G).
        mask: (N, G) bool, True for real boxes.
        scores: (N, G) 0..1, how sure each box is; None: all are.
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True)
class DetectionLosses:
    """A detector's own losses and what distillation takes from them.

    Attributes:
        terms: loss name -> (N, P) tensor, weighted and normalised; the sum of all is the loss.
        assignment: which prior learnt which box.
        class_normalizer, box_normalizer: scalars, without gradient.
    """

    terms: dict[str, Tensor]
    assignment: Assignment
    class_normalizer: Tensor
    box_normalizer: Tensor


@dataclass
class DenseDetectorOutput(ModelOutput):
    """Output of a dense detector, in the terms of DETR. P counts the priors of all levels.

    `logits` and `pred_boxes` are all that post-processing needs. With `centerness` and `level_sizes` it chooses its
    candidates exactly as published.

    Attributes:
        loss: scalar, with labels only.
        loss_dict: name -> scalar, with labels only.
        logits: (N, P, labels), whose sigmoid is the score: of detectors with centerness, class score times centerness.
        pred_boxes: (N, P, 4) cxcywh, relative to the image without padding; not clipped.
        centerness: (N, P) logits, of detectors that have it.
        level_sizes: (N, levels) priors per level, the same for every image.
        hidden_states: when `output_hidden_states`: the backbone's maps C3, C4, C5, then the FPN's levels P3 to P7,
            each (N, C, H, W).
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    centerness: Tensor | None = None
    level_sizes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
