"""Milestones and warm-up that follow a length of training which an override changes."""

import typing
from typing import Any

from ..training.arguments import DetectionTrainingArguments
from ..utils.casting import cast
from ..utils.recipe_fields import default_of, settings_of

NAMES = ("num_train_epochs", "max_steps", "lr_milestones", "warmup_steps")


def follow_length(before: Any, training: Any, overridden: set[str]) -> list[str]:
    """Fit milestones and warm-up to a length of training that an override changes, unless one gives them, too.

    Milestones keep their place in the training. A warm-up gets shorter with it, but not longer: the published
    schedules of 12 and of 24 epochs have the same. One that `max_steps` would cut off gets a tenth of the updates.

    Args:
        before: the section as the file has it.
        training: the same with all overrides; changed in place.
        overridden: `section.key` of each override.

    Returns:
        a line about each change; none if a value is no number, which is told later.
    """
    if not (isinstance(before, dict | None) and isinstance(training, dict)):
        return []
    try:
        old, now = _schedule_of(before or {}), _schedule_of(training)
    except ValueError:
        return []
    epochs, steps, milestones, warmup = now.values()
    if (epochs, steps) == (old["num_train_epochs"], old["max_steps"]):
        return []
    share = epochs / old["num_train_epochs"] if steps <= 0 < old["num_train_epochs"] else 1.0
    if milestones:
        now["lr_milestones"] = [round(milestone * share, 4) for milestone in milestones]
    if warmup >= 1:  # below 1 it is a part of all updates
        now["warmup_steps"] = steps // 10 if 0 < steps < warmup else round(warmup * min(share, 1.0))
    notes = []
    for name, value in (("lr_milestones", milestones), ("warmup_steps", warmup)):
        if now[name] != value and f"training.{name}" not in overridden:
            training[name] = now[name]
            length = f"{steps} updates" if steps > 0 else f"{epochs:g} epochs instead of {old['num_train_epochs']:g}"
            notes.append(f"training.{name} {now[name]} instead of {value}, since the training has {length}")
    return notes


def _schedule_of(training: dict[str, Any]) -> dict[str, Any]:
    """Length, milestones and warm-up of a recipe's `training`, as given or by default."""
    hints = typing.get_type_hints(DetectionTrainingArguments)
    defaults = {
        field.name: default_of(field) for field in settings_of(DetectionTrainingArguments) if field.name in NAMES
    }
    return {name: cast(training.get(name, defaults[name]), hints[name]) for name in NAMES}
