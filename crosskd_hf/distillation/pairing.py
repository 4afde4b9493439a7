"""What a student and its teacher have in common, found once before training: classes, levels, widths, pixels."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..models.base import DenseDetector, DenseDetectorOutput, Predictions, Priors
from ..models.configuration import DenseDetectorConfig
from ..models.image_processing import DenseDetectorImageProcessor, pixel_style
from ..utils.label_names import coco_spelling, near_matches, spelling_problem
from ..utils.text import listed
from .adapters import Adapters
from .settings import DistillationSettings

PARTLY = "learnt without the teacher"  # what a user may not have meant


@dataclass(frozen=True)
class PixelChange:
    """The student's input -> the teacher's, where their normalisation or channel order differ.

    Attributes:
        flip: reverse the channels.
        scale, shift: (1, 3, 1, 1), applied after that.
    """

    flip: bool
    scale: Tensor
    shift: Tensor

    @classmethod
    def between(cls, mine: dict[str, Any], theirs: dict[str, Any]) -> "PixelChange | None":
        """The change between the students's and the teacher's `pixel_style`; None if they are the same."""
        if mine == theirs:
            return None
        flip = mine["do_flip_channel_order"] != theirs["do_flip_channel_order"]
        mean, std, other_mean, other_std = (
            torch.tensor(style[name], dtype=torch.float64).flip(0)
            if flip and style is mine
            else torch.tensor(style[name], dtype=torch.float64)
            for style in (mine, theirs)
            for name in ("image_mean", "image_std")
        )
        scale, shift = std / other_std, (mean - other_mean) / other_std
        return cls(flip, *(value.float().view(1, 3, 1, 1) for value in (scale, shift)))

    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
        """(N, 3, H, W) in the student's pixels, padded with 0 -> the same in the teacher's."""
        pixels = (pixel_values.flip(1) if self.flip else pixel_values) * self.scale + self.shift
        return pixels if pixel_mask is None else pixels * pixel_mask.unsqueeze(1).to(pixels.dtype)


@dataclass(frozen=True)
class Pairing:
    """What both models have. The default is a pair that agrees in everything.

    Attributes:
        labels: student's and teacher's indices (S,) of the class names that both know; None if their lists are equal.
        levels: student's and teacher's indices of the levels whose strides both have; None if all are.
        pixels: makes the teacher's input of the student's; None if they are the same.
        adapters: of widths that differ.
        notes: what a user should know of the pair, a line each.
    """

    labels: tuple[Tensor, Tensor] | None = None
    levels: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    pixels: PixelChange | None = None
    adapters: Adapters = field(default_factory=Adapters)
    notes: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Pairing":
        """The same with its tensors on a device."""
        labels = self.labels and (self.labels[0].to(device), self.labels[1].to(device))
        pixels = self.pixels and replace(
            self.pixels, scale=self.pixels.scale.to(device), shift=self.pixels.shift.to(device)
        )
        return replace(self, labels=labels, pixels=pixels, adapters=self.adapters.to(device))

    # What either model has of the shared things. STUDENT and TEACHER index both tuples.

    def shared_levels(self, maps: list[Tensor], whose: int) -> list[Tensor]:
        """Maps of all levels -> those of the shared ones."""
        return maps if self.levels is None else [maps[level] for level in self.levels[whose]]

    def shared_predictions(self, output: DenseDetectorOutput, whose: int) -> Predictions:
        """A model's own predictions at the shared levels."""
        if self.levels is None:
            return output.predictions
        sizes = output.priors.level_sizes
        found = output.predictions
        rows = (
            v if v is None else self.shared_rows(v, sizes, whose)
            for v in (found.logits, found.boxes, found.centerness)
        )
        return Predictions(*rows)

    def shared_priors(self, priors: Priors, whose: int) -> Priors:
        """Priors of the shared levels."""
        if self.levels is None:
            return priors
        kept = self.levels[whose]
        corners = self.shared_rows(priors.corners, priors.level_sizes, whose, dim=0)
        return Priors.of([priors.levels[i] for i in kept], [priors.level_strides[i] for i in kept], corners)

    def shared_rows(self, values: Tensor, level_sizes: list[int], whose: int, dim: int = 1) -> Tensor:
        """Values of all priors, along `dim` -> those of the shared levels."""
        if self.levels is None:
            return values
        parts = values.split(level_sizes, dim=dim)
        return torch.cat([parts[level] for level in self.levels[whose]], dim=dim)

    def shared_classes(self, predictions: Predictions, whose: int) -> Predictions:
        """Predictions with the logits of the shared classes only, in the student's order."""
        if self.labels is None:
            return predictions
        return replace(predictions, logits=predictions.logits.index_select(-1, self.labels[whose]))


STUDENT, TEACHER = 0, 1
SAME = Pairing()


def pair_up(
    student: DenseDetector,
    teacher: DenseDetector,
    settings: DistillationSettings,
    seed: int = 0,
    processor: DenseDetectorImageProcessor | None = None,
) -> Pairing:
    """Find what two models have in common, before any data is read.

    Args:
        student, teacher: any two detectors.
        settings: which terms there are, and the taps.
        seed: of the adapters' weights.
        processor: makes the student's input; None: the one that goes with the student. The teacher is taken to have
            the one that goes with it.

    Raises:
        ValueError: naming everything by which the pair can't work: no shared class name or stride, class names that
            differ in spelling only, taps beyond a tower, padding that doesn't suit the teacher, or predictions that
            can't be compared (mimic).
    """
    problems = _tap_problems(student.config, teacher.config, settings)
    labels, notes = _shared_labels(student.config, teacher.config, problems)
    levels = _shared_levels(student.config, teacher.config, problems, notes)
    divisor = student.config.size_divisor if processor is None else processor.size_divisor
    if divisor % teacher.config.size_divisor:
        problems.append(
            f"size_divisor: student {divisor}, teacher {teacher.config.size_divisor}: the batch "
            "is padded for the student, whose divisor must be a multiple of the teacher's"
        )
    if settings.mimic > 0 and student.head.spec.num_anchors != teacher.head.spec.num_anchors:
        problems.append(
            f"predictions (mimic): the student has {student.head.spec.num_anchors} priors a cell, the teacher "
            f"{teacher.head.spec.num_anchors}; CrossKD needs no equal ones: set mimic 0"
        )
    if problems:
        raise ValueError("this student can't learn from this teacher:\n  - " + "\n  - ".join(problems))
    mine, theirs = pixel_style(student.config), pixel_style(teacher.config)
    if processor is not None:
        given = {name: getattr(processor, name) for name in mine}
        mine = {name: value if isinstance(value, bool) else list(value) for name, value in given.items()}
    pixels = PixelChange.between(mine, theirs)
    if pixels is not None:
        notes.append("the teacher gets the input in its own normalisation and channel order")
    widths = _differing_widths(student.config, teacher.config, settings)
    for place, (mine, theirs) in widths.items():
        notes.append(f"adapter {place}: {mine} -> {theirs} channels, trained with the student and not saved with it")
    return Pairing(labels, levels, pixels, Adapters(widths, seed), tuple(notes))


def _tap_problems(mine: DenseDetectorConfig, theirs: DenseDetectorConfig, settings: DistillationSettings) -> list[str]:
    if not settings.crosskd:
        return []
    taps = (
        ("student", "student_tap_index", settings.student_tap_index, mine.head_blocks),
        ("teacher", "tap_index", settings.tap_index, theirs.head_blocks),
    )
    return [
        f"blocks: {name} is {tap}, the {role}'s towers have {blocks} blocks: set distillation.{name} to {blocks} or "
        "less"
        for role, name, tap, blocks in taps
        if tap > blocks
    ]


def _shared_labels(
    student: DenseDetectorConfig, teacher: DenseDetectorConfig, problems: list[str]
) -> tuple[tuple[Tensor, Tensor] | None, list[str]]:
    mine, theirs = coco_spelling(student.label_names), coco_spelling(teacher.label_names)
    if mine == theirs:
        return None, []
    if near := near_matches(mine, theirs):
        problems.append(spelling_problem(near, "student", "teacher"))
        return None, []
    shared = [name for name in mine if name in theirs]
    known = f"student {listed(mine)}; teacher {listed(theirs)}"
    if not shared:
        problems.append(
            f"label names, none of which both know ({known}): train the teacher on the student's data first, with "
            "model.checkpoint naming it, or give both the same names"
        )
        return None, []
    notes = [f"classes: {len(shared)} of the student's {len(mine)} are among the teacher's {len(theirs)}"]
    if missing := [name for name in mine if name not in theirs]:
        notes[0] += f"; {PARTLY}: {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}"
    indices = ([names.index(name) for name in shared] for names in (mine, theirs))
    first, second = (torch.tensor(index) for index in indices)
    return (first, second), notes


def _shared_levels(
    student: DenseDetectorConfig, teacher: DenseDetectorConfig, problems: list[str], notes: list[str]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    mine, theirs = list(student.strides), list(teacher.strides)
    if mine == theirs:
        return None
    shared = [stride for stride in mine if stride in theirs]
    if not shared:
        problems.append(f"strides, none of which both have: student {mine}, teacher {theirs}")
        return None
    notes.append(f"levels: distilled at the strides {shared} (student {mine}, teacher {theirs})")
    return tuple(mine.index(s) for s in shared), tuple(theirs.index(s) for s in shared)


def _differing_widths(
    student: DenseDetectorConfig, teacher: DenseDetectorConfig, settings: DistillationSettings
) -> dict[str, tuple[int, int]]:
    def tap_width(config: DenseDetectorConfig, tap: int) -> int:
        return config.head_channels if tap else config.fpn_channels

    widths = {}
    if settings.crosskd > 0:
        tap = tap_width(student, settings.student_tap_index), tap_width(teacher, settings.tap_index)
        widths |= {"cls": tap, "reg": tap}
    if settings.pkd > 0:
        widths["fpn"] = student.fpn_channels, teacher.fpn_channels
    return {place: (mine, theirs) for place, (mine, theirs) in widths.items() if mine != theirs}


def same_format(student: DenseDetector, teacher: DenseDetector) -> bool:
    """Whether two detectors' raw predictions mean the same, prior by prior."""

    def output_format(model: DenseDetector) -> tuple:
        deltas = getattr(model.config, "delta_scales", None)
        return model.matching_rule(), model.head.spec.box_channels, deltas and tuple(deltas)

    return output_format(student) == output_format(teacher)
