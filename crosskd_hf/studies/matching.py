"""Detections matched with the ground truth of an image: what was found, confused, missed and made up."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou


@dataclass(frozen=True)
class Matches:
    """The outcome of an image with G boxes and K detections.

    Attributes:
        of_truth: (G,) detection that a box was found by, whatever its class; -1: missed.
        of_detections: (K,) box that a detection found; -1: none.
        double: (K,) bool, whether it found none, but lies on a box that another one has found.
        labels, found: classes of the boxes (G,) and of the detections (K,).
    """

    of_truth: Tensor
    of_detections: Tensor
    double: Tensor
    labels: Tensor
    found: Tensor

    @property
    def right(self) -> int:
        """Boxes found with their class."""
        hit = self.of_truth >= 0
        return int((self.found[self.of_truth[hit]] == self.labels[hit]).sum())

    @property
    def made_up(self) -> Tensor:
        """(K,) bool: detections of nothing."""
        return (self.of_detections < 0) & ~self.double

    @property
    def errors(self) -> int:
        """Boxes missed or of another class, and detections made up."""
        return len(self.labels) - self.right + int(self.made_up.sum())


def match(boxes: Tensor, labels: Tensor, found_boxes: Tensor, found_labels: Tensor, iou: float = 0.5) -> Matches:
    """Match each box with at most one detection: those of its class first, then those of another.

    Args:
        boxes, labels: of the ground truth, (G, 4) xyxy and (G,).
        found_boxes, found_labels: detections, (K, 4) and (K,), best first.
        iou: overlap from which on a detection has found a box.
    """
    of_truth = torch.full((len(labels),), -1)
    of_detections = torch.full((len(found_labels),), -1)
    overlaps = box_iou(found_boxes.double(), boxes.double())
    same = found_labels[:, None] == labels
    for allowed in (same, ~same):
        for k in range(len(found_labels)):
            free = overlaps[k] * (allowed[k] & (of_truth < 0))
            if of_detections[k] < 0 and len(labels) and free.max() >= iou:
                of_detections[k] = free.argmax()
                of_truth[free.argmax()] = k
    double = (of_detections < 0) & (overlaps >= iou).any(1)
    return Matches(of_truth, of_detections, double, labels, found_labels)


def confusion(matches: list[Matches], classes: int) -> Tensor:
    """(classes + 1, classes + 1) counts: row the true class, column the detected one; the last row is made up, the
    last column missed."""
    table = torch.zeros(classes + 1, classes + 1, dtype=torch.int64)
    for one in matches:
        columns = torch.cat([one.found, torch.tensor([classes])])[one.of_truth]  # -1 is the last: missed
        table.index_put_((one.labels, columns), torch.ones_like(columns), accumulate=True)
        made_up = one.found[one.made_up]
        table[classes].scatter_add_(0, made_up, torch.ones_like(made_up))
    return table
