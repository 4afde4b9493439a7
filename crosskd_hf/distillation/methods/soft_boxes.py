"""Soft boxes: the teacher's detections are further targets of the student's own assigner or matcher.

For any teacher and any student: they meet in boxes, not inside their heads. A GFL student learns the teacher's score,
too: its class target at a soft box is IoU times that score. To all others a soft box is a box like any other.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...models.families import label_names_of
from ...models.losses import box_iou
from ...models.outputs import GroundTruth
from ...utils.recipe_fields import setting
from ..method import KDMethod
from ..observation import Observation, Observer


@dataclass
class Settings:
    """Which of the teacher's detections are learnt."""

    score_threshold: float = setting(0.5, "a teacher's detection needs a higher score", minimum=0, maximum=1)
    max_boxes: int = setting(100, "an image's best detections that are learnt", minimum=1, maximum=1000)
    iou_threshold: float = setting(
        0.5,
        "a detection with at least this IoU with a labelled box of its class repeats it: left out",
        minimum=0,
        maximum=1,
    )


class SoftBoxes(KDMethod):
    """No terms: the student's own losses learn the boxes. The host waits for the teacher's post-processing."""

    name = "soft_boxes"
    Settings = Settings
    student_labels: Tensor

    def connect(self, student: Observer, teacher: Observer) -> None:
        """Ask for the teacher's detections; note which label of the student's each of its labels is."""
        teacher.ask_for_detections()
        labels = torch.arange(len(label_names_of(teacher.model.config)))
        if teacher.classes is not None and student.classes is not None:
            labels = torch.full_like(labels, -1)
            labels[teacher.classes] = student.classes
        self.register_buffer("student_labels", labels, persistent=False)

    def labels(self, labels: Any, teacher: Observation, student_observer: Observer, teacher_observer: Observer) -> Any:
        """With the teacher's boxes; see `KDMethod.labels`."""
        settings, sizes = self.resolved, teacher.image_sizes
        assert sizes is not None
        soft = teacher_observer.detections(teacher, settings.score_threshold, settings.max_boxes)
        classes = self.student_labels[soft.labels]
        soft = replace(soft, labels=classes.clamp(min=0), mask=soft.mask & (classes >= 0))
        if labels is not None:
            truth = student_observer.ground_truth(labels, sizes)
            soft = replace(soft, mask=soft.mask & ~repetitions(soft, truth, settings.iou_threshold))
        return student_observer.labels_with(labels, soft, sizes)

    def terms(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        """None."""
        return {}


def repetitions(soft: GroundTruth, truth: GroundTruth, iou_threshold: float) -> Tensor:
    """(N, K) bool, True for boxes whose IoU with a ground-truth box of their class is at least the threshold.

    Args:
        soft: N images of K boxes.
        truth: N images of G boxes.
    """
    same = (soft.labels[:, :, None] == truth.labels[:, None]) & truth.mask[:, None]
    return (same & (box_iou(soft.boxes[:, :, None], truth.boxes[:, None]) >= iou_threshold)).any(-1)
