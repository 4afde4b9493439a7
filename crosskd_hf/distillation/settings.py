"""Settings of a distillation, and whether two models can be a pair."""

from dataclasses import dataclass

from ..models.image_processing_dense import pixel_style
from ..models.modeling_dense import DenseDetector
from ..recipe import DistillationSection


@dataclass(frozen=True)
class DistillationSettings:
    """Weights and tap with every default filled in from the teacher's published values.

    Attributes:
        crosskd: factor on every CrossKD term; 0 turns the cross pass off.
        tap_index: tower blocks the student runs.
        raw_taps: tap before the ReLU.
        cls_weight, box_weight, centerness_weight: weights of the terms.
        pkd: weight of the feature loss; 0 turns it off.
        mimic: factor on the terms that the student's own predictions mimic the teacher's with; 0 turns them off.
    """

    crosskd: float
    tap_index: int
    raw_taps: bool
    cls_weight: float
    box_weight: float
    centerness_weight: float
    pkd: float
    mimic: float = 0.0


def resolve_settings(section: DistillationSection, teacher: DenseDetector) -> DistillationSettings:
    """Fill what the recipe leaves open with the values published for the teacher's detector."""
    published = teacher.distillation

    def given(value, default):
        return default if value is None else value

    return DistillationSettings(
        crosskd=section.crosskd,
        tap_index=given(section.tap_index, published.tap_index),
        # The published code means to tap before the ReLU, but its in-place ReLU overwrites the tap: its results are
        # those of the rectified one, which is therefore the default.
        raw_taps=section.tap == "raw",
        cls_weight=given(section.cls_weight, published.cls_weight),
        box_weight=given(section.box_weight, published.box_weight),
        centerness_weight=given(section.centerness_weight, published.centerness_weight),
        pkd=section.pkd,
        mimic=section.mimic,
    )


def check_pair(student: DenseDetector, teacher: DenseDetector, settings: DistillationSettings) -> None:
    """Refuse a pair that can't work, before any data is read.

    Raises:
        ValueError: naming everything that differs: strides, label names, pixels, blocks, tap or FPN channels.
    """
    mine, theirs, k = student.config, teacher.config, settings.tap_index
    problems = []
    if list(mine.strides) != list(theirs.strides):
        problems.append(f"strides: student {list(mine.strides)}, teacher {list(theirs.strides)}")
    if mine.size_divisor != theirs.size_divisor:
        problems.append(f"size_divisor: student {mine.size_divisor}, teacher {theirs.size_divisor}")
    problems += _label_problems(mine.id2label, theirs.id2label)
    styles = pixel_style(mine), pixel_style(theirs)
    if styles[0] != styles[1]:
        problems.append(f"pixels, which both get alike: student {styles[0]}, teacher {styles[1]}")
    if settings.crosskd > 0:
        for role, config in (("student", mine), ("teacher", theirs)):
            if k > config.head_blocks:
                problems.append(f"blocks: tap_index is {k}, the {role}'s towers have {config.head_blocks} blocks")
        name = "fpn_channels" if k == 0 else "head_channels"
        if getattr(mine, name) != getattr(theirs, name):
            problems.append(f"tap shape ({name}): student {getattr(mine, name)}, teacher {getattr(theirs, name)}")
    if settings.pkd > 0 and mine.fpn_channels != theirs.fpn_channels:
        problems.append(f"FPN shape (fpn_channels, pkd): student {mine.fpn_channels}, teacher {theirs.fpn_channels}")
    if settings.mimic > 0 and _output_format(student) != _output_format(teacher):
        problems.append("predictions (mimic): student and teacher are no detectors of one kind on the same priors")
    if problems:
        raise ValueError("this student can't learn from this teacher; they differ in:\n  - " + "\n  - ".join(problems))


def _output_format(model: DenseDetector) -> tuple:
    deltas = getattr(model.config, "delta_scales", None)
    return model.matching_rule(), model.head.spec.box_channels, deltas and tuple(deltas)


def _label_problems(mine: dict[int, str], theirs: dict[int, str]) -> list[str]:
    hint = "; train the teacher on the student's data first, with model.checkpoint naming it"
    if len(mine) != len(theirs):
        student, teacher = (f"{len(names)} ({', '.join(list(names.values())[:3])}, ...)" for names in (mine, theirs))
        return [f"number of labels: student {student}, teacher {teacher}{hint}"]
    different = [i for i in sorted(mine) if mine[i] != theirs.get(i)]
    if not different:
        return []
    shown = ", ".join(f"{i}: student {mine[i]!r}, teacher {theirs.get(i)!r}" for i in different[:3])
    return [f"label names, {len(different)} of {len(mine)} ({shown}){hint}"]
