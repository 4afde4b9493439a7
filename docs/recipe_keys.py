"""Writes `recipe_keys.md` from the dataclasses: `python docs/recipe_keys.py`. A test compares them."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from crosskd_hf.data.settings import DataSection
from crosskd_hf.distillation.methods import method_class, method_names
from crosskd_hf.models.architecture import ArchitectureSection
from crosskd_hf.recipe.sections import ModelSection, TeacherSection
from crosskd_hf.training.arguments import DetectionTrainingArguments
from crosskd_hf.utils.recipe_fields import default_of, settings_of

PAGE = Path(__file__).with_name("recipe_keys.md")
HEAD = """# Recipe keys

Made from the code by `python docs/recipe_keys.py`. A recipe is flat YAML with the sections `model`, `teacher`,
`distillation`, `data` and `training`; on the command line `section.key=value` replaces a value. Unknown keys, wrong
types and values beyond their limits are errors that name the nearest valid ones.
"""
TRAINING = """## training

All of [`transformers.TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer); these are
new, or have another default:

"""


def shown(value: Any) -> str:
    """A default as YAML writes it."""
    names = {None: "null", True: "true", False: "false", "": '""'}
    if isinstance(value, str | bool | None):
        return f"`{names.get(value, value)}`"
    return f"`{getattr(value, 'value', value)}`"


def limits(metadata: dict[str, Any]) -> str:
    """What else is said of a value: its choices or its range."""
    low, high = metadata.get("minimum"), metadata.get("maximum")
    if choices := metadata.get("choices"):
        return f" ({', '.join(f'`{choice}`' for choice in choices)})"
    if low is not None and high is not None:
        return f" ({low:g} to {high:g})"
    return f" (at least {low:g})" if low is not None else ""


def table(fields: list[dataclasses.Field]) -> str:
    """A row a key."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for field in fields:
        text = str(field.metadata["help"]).rstrip(".") + limits(dict(field.metadata))
        rows.append(f"| `{field.name}` | {shown(default_of(field))} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def page() -> str:
    """The page."""
    shared = {field.name for field in settings_of(ArchitectureSection)}
    theirs = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    parts = [HEAD, "## model\n\n" + table(settings_of(ModelSection))]
    own = [field for field in settings_of(TeacherSection) if field.name not in shared]
    parts.append("## teacher\n\nThe first keys of `model`, for `.pth` and random checkpoints, and:\n\n" + table(own))
    parts.append("## distillation\n\n`methods` lists them; each has a section of its own.")
    for name in method_names():
        parts.append(f"### distillation.{name}\n\n" + table(settings_of(method_class(name).Settings)))
    parts.append("## data\n\n" + table(settings_of(DataSection)))
    changed = [
        field
        for field in settings_of(DetectionTrainingArguments)
        if field.name not in theirs or default_of(field) != default_of(theirs[field.name])
    ]
    parts.append(TRAINING + table([field for field in changed if "help" in field.metadata]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
