"""Milestones and warm-up that follow a length of training which an override changes."""

import typing
from pathlib import Path
from typing import Any

from ..hub.upload import RECIPE_FILE
from ..training.arguments import DetectionTrainingArguments
from ..utils.recipe_fields import default_of, settings_of
from ..utils.strict_yaml import read_yaml
from .reading import cast

NAMES = ("num_train_epochs", "max_steps", "lr_milestones", "warmup_steps")


def follow_length(before: Any, training: Any, overridden: set[str]) -> list[str]:
    """Fit milestones and warm-up to a length of training that an override changes, unless one gives them, too.

    A run in the output folder that was begun without that keeps what it was begun with. Else milestones keep their
    place in the training. A warm-up gets shorter with it, but not longer: the published
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
    begun = _begun_schedule(training.get("output_dir"))
    same_length = begun is not None and (begun["num_train_epochs"], begun["max_steps"]) == (epochs, steps)
    for name, value in (("lr_milestones", milestones), ("warmup_steps", warmup)):
        if now[name] != value and f"training.{name}" not in overridden:
            if same_length and begun[name] == value:
                continue
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


def _begun_schedule(output_dir: Any) -> dict[str, Any] | None:
    """The schedule that the run in a folder was begun with; None if it holds none that can be read."""
    path = Path(str(output_dir or "trainer_output")).expanduser() / RECIPE_FILE  # transformers' own default
    try:
        return _schedule_of(read_yaml(path)["training"]) if path.is_file() else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # told where the folder is checked
        return None
