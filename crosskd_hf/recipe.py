"""Recipes: one flat YAML file with the sections `model teacher distillation data training`, read strictly.

A recipe is complete in itself: there is no inheritance between files, and no value names a class. Values are checked
against the fields below before anything is built, and all problems are reported together.
"""

import dataclasses
import difflib
import importlib.resources
import math
import types
import typing
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from .training_args import DetectionTrainingArguments

DETECTORS = ("gfl", "retinanet", "fcos", "atss")
RECIPE_PACKAGE = "crosskd_hf.recipes"


class RecipeError(ValueError):
    """A recipe that can't be run, with every problem found in it."""


def setting(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A recipe field: its default, what it is, and which values it takes."""
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ArchitectureSection:
    """What a detector is made of; shared by `model` and `teacher`."""

    detector: str = setting("gfl", "detector", choices=DETECTORS)
    backbone: str = setting("resnet50.tv_in1k", "timm model, with its tag of pretrained weights")
    backbone_style: str = setting("pytorch", "caffe: stride on each stage's first 1x1, BGR input", ("pytorch", "caffe"))
    drop_path_rate: float = setting(0.0, "stochastic depth of the backbone", minimum=0, maximum=1)
    frozen_stages: int = setting(1, "stages without gradient; 1 is stem and stage 1, 0 nothing", minimum=0, maximum=4)
    train_batchnorm: bool = setting(True, "train the scale and shift of the backbone's BatchNorm")
    freeze_batchnorm_statistics: bool = setting(True, "keep pretrained BatchNorm statistics; false to train from scratch")
    fpn_channels: int = setting(256, "channels of the FPN levels", minimum=1)
    fpn_extra_convs: str = setting("on_output", "P6 from P5 or from C5", ("on_output", "on_input"))
    fpn_relu_before_p7: bool = setting(False, "ReLU before the convolution of P7")
    head_channels: int = setting(256, "channels of the towers", minimum=1)
    head_blocks: int = setting(4, "convolution blocks a tower", minimum=1)


@dataclass
class ModelSection(ArchitectureSection):
    """The detector that is trained."""

    backbone_weights: str = setting("pretrained", "pretrained (by timm), random, or a file")
    checkpoint: str | None = setting(None, "start from a whole detector: folder, Hub id or MMDetection .pth")


@dataclass
class TeacherSection(ArchitectureSection):
    """The frozen teacher. Its architecture fields count for `.pth` and random checkpoints; a saved model has its own."""

    checkpoint: str = setting("", "folder, Hub id, MMDetection .pth by path or URL, or random (to try the machinery)")


@dataclass
class DistillationSection:
    """Which distillation terms there are. null takes the value published for the teacher's detector."""

    crosskd: float = setting(1.0, "weight of all CrossKD terms; 0: off", minimum=0)
    tap_index: int | None = setting(None, "tower blocks the student runs before the teacher's head", minimum=0)
    tap: str = setting("rectified", "tap after (rectified) or before (raw) the block's ReLU", ("rectified", "raw"))
    cls_weight: float | None = setting(None, "weight of kd_cls", minimum=0)
    box_weight: float | None = setting(None, "weight of kd_box", minimum=0)
    centerness_weight: float | None = setting(None, "weight of kd_centerness", minimum=0)
    pkd: float = setting(0.0, "weight of the PKD feature loss; 0: off", minimum=0)


@dataclass
class DataSection:
    """A data set in COCO layout, and how its images are resized."""

    path: str = setting("data/coco", "folder of the data set")
    train_split: str = setting("train2017", "split to train on")
    val_split: str = setting("val2017", "split to evaluate on")
    annotations: str = setting("annotations/instances_{split}.json", "annotation file inside the folder")
    images: str = setting("{split}", "image folder inside the folder")
    short_side: int = setting(800, "pixels that an image's short side is resized to", minimum=1)
    long_side: int = setting(1333, "pixels that its long side doesn't exceed", minimum=1)
    multiscale: str = setting("none", "training short side: fixed, from a range, or from a list", ("none", "range", "choice"))
    multiscale_short_sides: list[int] = setting([], "the range's two ends, or the list", minimum=1)
    flip_probability: float = setting(0.5, "probability of a horizontal flip", minimum=0, maximum=1)
    filter_empty: bool = setting(True, "leave training images without any annotation out")
    min_image_side: int = setting(32, "leave training images out whose short side is smaller", minimum=0)
    max_train_images: int | None = setting(None, "use only the first images", minimum=1)
    max_val_images: int | None = setting(None, "use only the first images", minimum=1)
    cache_dir: str | None = setting(None, "folder of the Arrow cache; null: that of datasets")


SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "teacher": TeacherSection,
    "distillation": DistillationSection,
    "data": DataSection,
}
OPTIONAL_SECTIONS = ("teacher", "distillation")


@dataclass
class Recipe:
    """A run: what to train, on what, with which teacher.

    Attributes:
        model, data: always there.
        teacher, distillation: both or neither.
        training: fields of `DetectionTrainingArguments`, checked and cast.
    """

    model: ModelSection
    data: DataSection
    teacher: TeacherSection | None = None
    distillation: DistillationSection | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def training_arguments(self) -> DetectionTrainingArguments:
        """The training arguments.

        Raises:
            RecipeError: if transformers refuses a value or a combination.
        """
        try:
            return DetectionTrainingArguments(**self.training)
        except (ValueError, TypeError, ImportError) as error:
            raise RecipeError(f"training: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Every field of the sections, and the training values that were given."""
        sections = {name: getattr(self, name) for name in SECTIONS}
        content = {name: section and dataclasses.asdict(section) for name, section in sections.items()}
        return {**content, "training": dict(self.training)}

    def save(self, path: str | Path) -> None:
        """Write the complete recipe; `load_recipe` reads the same recipe from it."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        Path(path).write_text("# The resolved recipe of this run; it runs again as it is.\n" + text, encoding="utf-8")


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name: path of a YAML file, or bare name of a recipe that the package carries (`gfl_r50_crosskd`).
        overrides: `section.key=value`, values as in YAML; `section=null` takes a section out.

    Raises:
        RecipeError: naming file, keys, values and the nearest valid names.
    """
    path = find_recipe(name)
    content = _read_yaml(path)
    for override in overrides:
        _apply_override(content, override)
    return parse_recipe(content, str(path))


def find_recipe(name: str | Path) -> Path:
    """Path of a recipe file, or of one that the package carries.

    Raises:
        RecipeError: if there is none, with close names.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        if path.is_file():
            return path
        raise RecipeError(f"recipe file {path} doesn't exist. {_nearest(path.stem, sorted(carried_recipes()))}")
    recipes = carried_recipes()
    if str(name) not in recipes:
        raise RecipeError(f"there is no recipe {str(name)!r}. {_nearest(str(name), sorted(recipes))}")
    return recipes[str(name)]


def carried_recipes() -> dict[str, Path]:
    """Name -> file of the recipes in the wheel, or in the checkout that the package lies in."""
    folders = [Path(__file__).parent.parent / "recipes"]
    try:
        folders.insert(0, Path(str(importlib.resources.files(RECIPE_PACKAGE))))
    except (ModuleNotFoundError, TypeError):
        pass
    for folder in folders:
        if found := {path.stem: path for path in folder.glob("*.yaml")}:
            return found
    return {}


def parse_recipe(content: dict[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from nested dicts.

    Raises:
        RecipeError: with all problems.
    """
    problems: list[str] = []
    names = [*SECTIONS, "training"]
    for key in content:
        if key not in names:
            problems.append(f"unknown section {key!r}. {_nearest(str(key), names)}")
    sections: dict[str, Any] = {}
    for name, section_class in SECTIONS.items():
        values = content.get(name)
        if values is None and name in OPTIONAL_SECTIONS:
            sections[name] = None
            continue
        fields = {f.name: f for f in dataclasses.fields(section_class)}
        cast = _cast_section(name, values, fields, typing.get_type_hints(section_class), problems)
        sections[name] = section_class(**cast)
    hints = typing.get_type_hints(DetectionTrainingArguments)
    fields = {f.name: f for f in dataclasses.fields(DetectionTrainingArguments) if f.init}
    training = _cast_section("training", content.get("training"), fields, hints, problems)
    recipe = Recipe(**sections, training=training)
    if not problems:
        problems += impossible_combinations(recipe)
    if problems:
        raise RecipeError(f"{source} can't be run:\n  - " + "\n  - ".join(problems))
    return recipe


def impossible_combinations(recipe: Recipe) -> list[str]:
    """What no single field shows to be wrong."""
    model, teacher, distillation, data = recipe.model, recipe.teacher, recipe.distillation, recipe.data
    problems = []
    if distillation and not teacher:
        problems.append("distillation needs a teacher: add the section teacher, or set distillation=null.")
    if teacher and not distillation:
        problems.append("there is a teacher but no distillation: add the section distillation, or set teacher=null.")
    if teacher and not teacher.checkpoint:
        problems.append("teacher.checkpoint is missing: a folder, a Hub id, or an MMDetection .pth by path or URL.")
    if distillation:
        if distillation.crosskd == 0 and distillation.pkd == 0:
            problems.append("distillation.crosskd and distillation.pkd are both 0: nothing would be distilled.")
        k = distillation.tap_index
        if k is not None and k > model.head_blocks:
            problems.append(f"distillation.tap_index is {k}, but model.head_blocks is {model.head_blocks}.")
    for name, section in (("model", model), ("teacher", teacher)):
        if section and section.backbone_style == "caffe" and "resnet" not in section.backbone:
            problems.append(f"{name}.backbone_style caffe is for ResNets, not {section.backbone!r}.")
    if data.long_side < data.short_side:
        problems.append(f"data.long_side {data.long_side} is below data.short_side {data.short_side}.")
    sides = data.multiscale_short_sides
    if data.multiscale == "range" and not (len(sides) == 2 and sides[0] <= sides[1]):
        problems.append(f"data.multiscale range needs multiscale_short_sides [lowest, highest], not {sides}.")
    if data.multiscale == "choice" and not sides:
        problems.append("data.multiscale choice needs values in multiscale_short_sides.")
    if data.multiscale == "none" and sides:
        problems.append(f"data.multiscale is none, but multiscale_short_sides is {sides}: set range or choice.")
    return problems


def describe_fields() -> str:
    """Every key of a recipe with type, default and meaning, a line each; `training` only what transformers lacks."""
    lines = []
    own = set(DetectionTrainingArguments.__annotations__)
    for section, section_class in (*SECTIONS.items(), ("training", DetectionTrainingArguments)):
        hints = typing.get_type_hints(section_class)
        for f in dataclasses.fields(section_class):
            if section == "training" and f.name not in own:
                continue
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            lines.append(f"{section}.{f.name} ({_type_name(hints[f.name])}, {default!r}): {f.metadata.get('help', '')}")
    return "\n".join(lines)


# Reading ------------------------------------------------------------------------------------------------------------


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, of which plain YAML keeps the last."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a single word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        # A SafeLoader: no tag of the file can make an object.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no UTF-8 text ({error}).") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as the date 2024-13-45
        raise RecipeError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold the sections {', '.join([*SECTIONS, 'training'])}, not {content!r:.50}.")
    return content


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) > 2 or not all(parts):
        raise RecipeError(f"override {override!r} must look like section.key=value, or section=null.")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader) if text else ""  # noqa: S506
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"override {override!r}: {text!r} is no valid YAML value ({error}).") from error
    if len(parts) == 1:
        if value is not None:
            raise RecipeError(f"override {override!r}: a whole section can only be set to null.")
        content[key] = None
        return
    section = content.get(parts[0])
    if section is None:
        section = content[parts[0]] = {}
    if not isinstance(section, dict):
        raise RecipeError(f"section {parts[0]} must hold keys and values, not {section!r}.")
    section[parts[1]] = value


# Checking -----------------------------------------------------------------------------------------------------------


def _cast_section(
    name: str, values: Any, fields: dict[str, dataclasses.Field], hints: dict[str, Any], problems: list[str]
) -> dict[str, Any]:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        problems.append(f"section {name} must hold keys and values, not {values!r}.")
        return {}
    cast = {}
    for key, value in values.items():
        if key not in fields:
            problems.append(f"unknown key {name}.{key} (value {value!r}). {_nearest(str(key), list(fields))}")
            continue
        try:
            cast[key] = _cast(value, hints[key])
            _check_range(cast[key], fields[key].metadata)
        except ValueError as error:
            problems.append(f"{name}.{key}: {value!r} {error}.")
            cast.pop(key, None)
    return cast


def _cast(value: Any, hint: Any) -> Any:
    """The value as the field's type. Raises ValueError, worded to follow the value."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _cast_union(value, arguments)
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"is no list of {_type_name(arguments[0])}")
        return [_cast(item, arguments[0]) for item in value]
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError("is neither true nor false")
    elif hint in (int, float):
        return _cast_number(value, hint)
    elif hint is str or (isinstance(hint, type) and issubclass(hint, Enum)):
        if not isinstance(value, str):
            raise ValueError("is no text")
        if hint is not str and value not in (allowed := [member.value for member in hint]):
            raise ValueError(f"is unknown. {_nearest(value, allowed)}".rstrip("."))
    elif origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise ValueError("is no mapping")
    return value


def _cast_union(value: Any, members: Sequence[Any]) -> Any:
    if value is None:
        if type(None) in members:
            return None
        raise ValueError("must not be null")
    members = [member for member in members if member is not type(None)]
    # A type that takes the value as it is goes before one that casts it.
    for member in members:
        if isinstance(member, type) and type(value) is member:
            return _cast(value, member)
    errors = []
    for member in members:
        try:
            return _cast(value, member)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(" and ".join(errors))


def _cast_number(value: Any, hint: type) -> Any:
    kind = "whole number" if hint is int else "number"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"is no {kind}")
    try:
        # YAML reads 1e-2 as text: it wants 1.0e-2.
        number = float(value)
    except ValueError:
        raise ValueError(f"is no {kind}") from None
    except OverflowError:
        raise ValueError("is too large") from None
    if not math.isfinite(number):
        raise ValueError("is not finite")
    if hint is int:
        if number != int(number) or (isinstance(value, float) and not number.is_integer()):
            raise ValueError("is no whole number")
        return int(value) if not isinstance(value, str) else int(number)
    return number


def _check_range(value: Any, metadata: typing.Mapping[str, Any]) -> None:
    choices, low, high = metadata.get("choices"), metadata.get("minimum"), metadata.get("maximum")
    for item in value if isinstance(value, list) else [value]:
        if item is None:
            continue
        if choices and item not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        if low is not None and item < low:
            raise ValueError(f"must be at least {low}")
        if high is not None and item > high:
            raise ValueError(f"must be at most {high}")


def _nearest(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {', '.join(close)}?"
    shown = ", ".join(list(valid)[:12])
    return f"Valid: {shown}{', ...' if len(valid) > 12 else ''}." if valid else "None are installed."


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
