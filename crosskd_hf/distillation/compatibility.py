"""What a student and its teacher have in common, found once before training: classes, levels, pixels."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PretrainedConfig

from ..models.families import is_dense, label_names_of, side_divisor, strides_of
from ..models.transformers_detectors import pixel_style, processor_of, size_divisor
from ..utils.label_names import coco_spelling, near_matches, spelling_problem
from ..utils.messages import listed

PARTLY = "learnt without the teacher"  # what a user may not have meant


class PixelChange(nn.Module):
    """The student's input -> the teacher's, where their normalisation or channel order differ.

    Args:
        student, teacher: `pixel_style` of each.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, student: dict[str, Any], teacher: dict[str, Any]):
        super().__init__()
        self.flip = student["do_flip_channel_order"] != teacher["do_flip_channel_order"]
        mean, std, teacher_mean, teacher_std = (
            torch.tensor(style[name], dtype=torch.float64).flip(0 if self.flip and style is student else ())
            for style in (student, teacher)
            for name in ("image_mean", "image_std")
        )
        for name, value in (("scale", std / teacher_std), ("shift", (mean - teacher_mean) / teacher_std)):
            self.register_buffer(name, value.float().view(1, 3, 1, 1), persistent=False)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
        """(N, 3, H, W) in the student's pixels, padded with 0 -> the same in the teacher's."""
        pixels = (pixel_values.flip(1) if self.flip else pixel_values) * self.scale + self.shift
        return pixels if pixel_mask is None else pixels * pixel_mask.unsqueeze(1).to(pixels.dtype)


@dataclass(frozen=True)
class Pairing:
    """What both models have. The default is a pair that agrees in everything.

    Attributes:
        classes: student's and teacher's indices (S,) of the class names that both know; None if their lists are equal.
        levels: student's and teacher's indices of the levels whose strides both have; None if all are.
        pixels: makes the teacher's input of the student's; None if they are the same.
        notes: what a user should know of the pair, a line each.
        problems: why the pair can't work, a line each.
    """

    classes: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    levels: tuple[tuple[int, ...], tuple[int, ...]] | tuple[None, None] = (None, None)
    pixels: PixelChange | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def pair_up(
    student: PretrainedConfig,
    teacher: PretrainedConfig,
    processor: BaseImageProcessor | None = None,
    teacher_processor: BaseImageProcessor | None = None,
) -> Pairing:
    """Find what two models have in common, before any data is read.

    Args:
        student, teacher: configurations of any two detectors.
        processor, teacher_processor: make the input of each; None: the one that goes with the model.

    Returns:
        the pairing, with all problems: no shared class name or stride, class names that differ in spelling only,
        padding that doesn't suit the teacher.
    """
    problems: list[str] = []
    notes: list[str] = []
    classes = _shared_classes(student, teacher, problems, notes)
    levels = _shared_levels(student, teacher, problems, notes)
    known = processor is not None
    processor, teacher_processor = processor or processor_of(student), teacher_processor or processor_of(teacher)
    divisor, teacher_divisor = size_divisor(processor), side_divisor(teacher)
    if not known and not is_dense(student):  # whoever makes the input knows
        divisor = teacher_divisor
    if divisor % teacher_divisor:
        problems.append(
            f"size_divisor: student {divisor}, teacher {teacher_divisor}: the batch "
            "is padded for the student, whose divisor must be a multiple of the teacher's"
            + ("" if is_dense(student) else ": set data.size to multiples of the teacher's")
        )
    student_style, teacher_style, pixels = pixel_style(processor), pixel_style(teacher_processor), None
    if student_style != teacher_style:
        pixels = PixelChange(student_style, teacher_style)
        notes.append("the teacher gets the input in its own normalisation and channel order")
    return Pairing(classes, levels, pixels, tuple(notes), tuple(problems))


def _shared_classes(
    student: PretrainedConfig, teacher: PretrainedConfig, problems: list[str], notes: list[str]
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    student_names, teacher_names = map(coco_spelling, (label_names_of(student), label_names_of(teacher)))
    if student_names == teacher_names:
        return None, None
    if near := near_matches(student_names, teacher_names):
        problems.append(spelling_problem(near, "student", "teacher"))
        return None, None
    shared = [name for name in student_names if name in teacher_names]
    known = f"student {listed(student_names)}; teacher {listed(teacher_names)}"
    if not shared:
        problems.append(
            f"label names, none of which both know ({known}): train the teacher on the student's data first, with "
            "model.checkpoint or model.pretrained naming it, or give both the same names"
        )
        return None, None
    note = f"classes: {len(shared)} of the student's {len(student_names)} are among the teacher's {len(teacher_names)}"
    if missing := [name for name in student_names if name not in teacher_names]:
        note += f"; {PARTLY}: {listed(missing, 8)}"
    notes.append(note)
    first, second = (torch.tensor([names.index(name) for name in shared]) for names in (student_names, teacher_names))
    return first, second


def _shared_levels(
    student: PretrainedConfig, teacher: PretrainedConfig, problems: list[str], notes: list[str]
) -> tuple[tuple[int, ...], tuple[int, ...]] | tuple[None, None]:
    student_strides, teacher_strides = list(strides_of(student)), list(strides_of(teacher))
    if student_strides == teacher_strides:
        return None, None
    shared = [stride for stride in student_strides if stride in teacher_strides]
    if not shared and not (is_dense(student) and is_dense(teacher)):
        return (), ()  # methods that need none can work
    if not shared:
        problems.append(f"strides, none of which both have: student {student_strides}, teacher {teacher_strides}")
        return None, None
    notes.append(f"levels: distilled at the strides {shared} (student {student_strides}, teacher {teacher_strides})")
    return tuple(student_strides.index(s) for s in shared), tuple(teacher_strides.index(s) for s in shared)
