"""A recipe and its sections `model teacher distillation data training`.

A recipe is complete in itself: there is no inheritance between files, and no value names a class.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..data.settings import DataSection
from ..models.architecture import ArchitectureSection
from ..training.arguments import DetectionTrainingArguments
from ..utils.files import write_atomically
from ..utils.recipe_fields import default_of, setting, settings_of
from ..utils.strict_yaml import RecipeError
from .distillation import DistillationSection


@dataclass
class ModelSection(ArchitectureSection):
    """The detector that is trained."""

    backbone_weights: str | None = setting("pretrained", "pretrained (by timm), random, or a file or URL")
    checkpoint: str | None = setting(None, "start from a complete detector: folder, Hub id or MMDetection .pth")
    pretrained: str | None = setting(None, "the same for a detector of transformers, under the name it has there")
    # setting() copies a list.
    inherit: list[str] = setting([], "parts that start from the teacher's weights where they fit", ("neck", "head"))  # noqa: RUF009

    @property
    def saved(self) -> str | None:
        """The complete detector that training starts from, if any."""
        return self.checkpoint or self.pretrained


@dataclass
class TeacherSection(ArchitectureSection):
    """The frozen teacher. Its architecture counts for `.pth` and random checkpoints; a saved model has its own."""

    checkpoint: str = setting("", "folder, Hub id, MMDetection .pth by path or URL, or random (to try the machinery)")


SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "teacher": TeacherSection,
    "distillation": DistillationSection,
    "data": DataSection,
    "training": DetectionTrainingArguments,
}
OPTIONAL_SECTIONS = ("teacher", "distillation")


@dataclass
class Recipe:
    """A run: what to train, on what, with which teacher.

    Attributes:
        model, data: always there.
        teacher, distillation: both or neither.
        training: fields of `DetectionTrainingArguments`, checked and cast.
        notes: what the reading changed for the overrides' sake, to be told.
        overridden: `section.key` of each override.
    """

    model: ModelSection
    data: DataSection
    teacher: TeacherSection | None = None
    distillation: DistillationSection | None = None
    training: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list, compare=False)
    overridden: set[str] = field(default_factory=set, compare=False)

    def training_arguments(self) -> DetectionTrainingArguments:
        """The training arguments.

        Raises:
            RecipeError: if transformers refuses a value or a combination.
        """
        try:
            return DetectionTrainingArguments(**self.training)
        except (ValueError, TypeError, ImportError) as error:
            raise RecipeError(f"training: {error}") from error

    def training_values(self) -> dict[str, Any]:
        """Every field of `DetectionTrainingArguments`: as given, or its default."""
        return {f.name: default_of(f) for f in settings_of(DetectionTrainingArguments)} | self.training

    def to_dict(self) -> dict[str, Any]:
        """Every field of the sections, and the training values that were given."""
        return {
            "model": dataclasses.asdict(self.model),
            "teacher": self.teacher and dataclasses.asdict(self.teacher),
            "distillation": self.distillation and self.distillation.to_dict(),
            "data": dataclasses.asdict(self.data),
            "training": dict(self.training),
        }

    def to_yaml(self) -> str:
        """The complete recipe as text."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return "# The resolved recipe of this run; it runs again as it is.\n" + text

    def save(self, path: str | Path) -> None:
        """Write the complete recipe; `load_recipe` reads the same recipe from it."""
        # All of it or nothing: the next start of an interrupted run compares with it.
        write_atomically(Path(path), self.to_yaml())
