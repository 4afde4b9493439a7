"""Prediction mimicking: the student's *own* predictions mimic the teacher's.

The paper's counter-example (CrossKD, arXiv 2306.11369, section 3.1): ground truth and teacher pull at one output.
"""

import torch
from torch import Tensor

from ..models.base import DenseDetector, DenseDetectorOutput
from ..models.box_coding import boxes_to_distances
from .crosskd import kd_targets
from .losses import prediction_kd_losses
from .pairing import SAME, STUDENT, TEACHER, Pairing, same_format
from .settings import DistillationSettings


def mimic_losses(
    student: DenseDetector,
    student_output: DenseDetectorOutput,
    teacher: DenseDetector,
    teacher_output: DenseDetectorOutput,
    settings: DistillationSettings,
    pairing: Pairing = SAME,
) -> dict[str, Tensor]:
    """`mimic_cls`, `mimic_box`, `mimic_centerness`: CrossKD's losses without the cross pass, a (N, P) tensor each.

    Detectors of different kinds are compared by their class scores and boxes.

    Args:
        student, teacher: a pair with as many priors a cell (`pair_up` sees to it).
        student_output, teacher_output: of forwards with `output_distillation=True`, the student's with labels.
        settings: weights.
        pairing: of the two.
    """
    targets = kd_targets(student, student_output, teacher, teacher_output, pairing)
    mine = pairing.shared_predictions(student_output, STUDENT)
    own = pairing.shared_predictions(teacher_output, TEACHER)
    mine, own = pairing.shared_classes(mine, STUDENT), pairing.shared_classes(own, TEACHER)
    with torch.autocast(mine.logits.device.type, enabled=False):
        distances = None
        if not same_format(student, teacher):
            priors = pairing.shared_priors(student_output.priors, STUDENT)
            distances = boxes_to_distances(targets.priors.centers, student.decode(mine.boxes, priors))
        terms = prediction_kd_losses(teacher, mine, own, targets, settings, settings.mimic, distances)
    return {f"mimic_{name}": term for name, term in terms.items()}
