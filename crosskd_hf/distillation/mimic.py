"""Prediction mimicking: the student's *own* predictions mimic the teacher's.

The paper's counter-example (CrossKD, arXiv 2306.11369, section 3.1): ground truth and teacher pull at one output.
"""

import torch
from torch import Tensor

from ..models.modeling_dense import DenseDetector, DenseDetectorOutput
from .crosskd import kd_targets
from .losses import prediction_kd_losses
from .settings import DistillationSettings


def mimic_losses(
    student: DenseDetector,
    student_output: DenseDetectorOutput,
    teacher: DenseDetector,
    teacher_output: DenseDetectorOutput,
    settings: DistillationSettings,
) -> dict[str, Tensor]:
    """`mimic_cls`, `mimic_box`, `mimic_centerness`: CrossKD's losses without the cross pass, a (levels,) tensor each.

    Args:
        student, teacher: a pair with the same head outputs on the same priors (`check_pair` sees to it).
        student_output, teacher_output: of forwards with `output_distillation=True`, the student's with labels.
        settings: weights.
    """
    targets = kd_targets(student, student_output, teacher, teacher_output)
    mine, own = student.flatten(student_output.head), teacher.flatten(teacher_output.head)
    with torch.autocast(mine.logits.device.type, enabled=False):
        terms = prediction_kd_losses(teacher, mine, own, targets, settings)
    return {f"mimic_{name}": settings.mimic * term for name, term in terms.items()}
