"""Recipes: one flat YAML file with the sections `model teacher distillation data training`, read strictly.

A recipe is complete in itself: there is no inheritance between files, and no value names a class. Values are checked
against the fields below before anything is built, and all problems are reported together.
"""

import dataclasses
import importlib.resources
import string
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..training.arguments import FIXED, DetectionTrainingArguments, Problem, training_problems
from ..utils.files import write_atomically
from .reading import RecipeError, cast, check_range, nearest, parse_yaml, type_name

MOST_PIXELS = 16384  # of a side
RECIPE_FILE = "recipe.yaml"  # the resolved recipe, in a run's output folder
DETECTORS = ("gfl", "retinanet", "fcos", "atss")


def setting(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A recipe field.

    Args:
        default: value of a recipe that doesn't name the field; a list is copied.
        help: what the field is, with its unit.
        choices: the only values it takes.
        minimum, maximum: limits of a number, both allowed; of each item of a list.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ArchitectureSection:
    """What a detector is made of; shared by `model` and `teacher`.

    The defaults are those of the published GFL R50 student (CrossKD, arXiv 2306.11369, section 4).
    """

    detector: str = setting("gfl", "detector", choices=DETECTORS)
    backbone: str = setting("resnet50.tv_in1k", "timm model, with its tag of pretrained weights")
    backbone_style: str = setting("pytorch", "caffe: stride on a stage's first 1x1, BGR input", ("pytorch", "caffe"))
    drop_path_rate: float = setting(0.0, "stochastic depth of the backbone", minimum=0, maximum=1)
    frozen_stages: int = setting(1, "stages without gradient; 1 is stem and stage 1, 0 nothing", minimum=0, maximum=4)
    train_batchnorm: bool = setting(True, "train the scale and shift of the backbone's BatchNorm")
    freeze_batchnorm_statistics: bool = setting(True, "keep pretrained BatchNorm statistics; false: from scratch")
    fpn_channels: int = setting(256, "channels of the FPN levels", minimum=1, maximum=4096)
    fpn_extra_convs: str = setting("on_output", "P6 from P5 or from C5", ("on_output", "on_input"))
    fpn_relu_before_p7: bool = setting(False, "ReLU before the convolution of P7")
    head_channels: int = setting(256, "channels of the towers", minimum=1, maximum=4096)
    head_blocks: int = setting(4, "convolution blocks a tower", minimum=1, maximum=64)


@dataclass
class ModelSection(ArchitectureSection):
    """The detector that is trained."""

    backbone_weights: str | None = setting("pretrained", "pretrained (by timm), random, or a file or URL")
    checkpoint: str | None = setting(None, "start from a whole detector: folder, Hub id or MMDetection .pth")
    # setting() copies a list.
    inherit: list[str] = setting([], "parts that start from the teacher's weights where they fit", ("neck", "head"))  # noqa: RUF009


@dataclass
class TeacherSection(ArchitectureSection):
    """The frozen teacher. Its architecture counts for `.pth` and random checkpoints; a saved model has its own."""

    checkpoint: str = setting("", "folder, Hub id, MMDetection .pth by path or URL, or random (to try the machinery)")


@dataclass
class DistillationSection:
    """Which distillation terms there are. null takes the value published for the teacher's detector.

    Source: CrossKD, arXiv 2306.11369, section 3 and its training settings; PKD, arXiv 2207.02039.
    """

    crosskd: float = setting(1.0, "weight of all CrossKD terms; 0: off", minimum=0, maximum=1e6)
    tap_index: int | None = setting(None, "tower blocks of the teacher that the student's stand in for", minimum=0)
    tap: str = setting("rectified", "tap after (rectified) or before (raw) the block's ReLU", ("rectified", "raw"))
    cls_weight: float | None = setting(None, "weight of kd_cls", minimum=0, maximum=1e6)
    box_weight: float | None = setting(None, "weight of kd_box", minimum=0, maximum=1e6)
    centerness_weight: float | None = setting(None, "weight of kd_centerness", minimum=0, maximum=1e6)
    pkd: float = setting(0.0, "weight of the PKD feature loss; 0: off", minimum=0, maximum=1e6)
    mimic: float = setting(0.0, "weight of mimicking by the student's own predictions; 0: off", minimum=0, maximum=1e6)
    student_tap_index: int | None = setting(None, "tower blocks the student runs; null: tap_index", minimum=0)


@dataclass
class DataSection:
    """A data set, and how its images are resized."""

    layout: str = setting(
        "coco",
        "coco: annotation files and image folders; datasets: a Hub id, or a folder of Parquet files, of save_to_disk "
        "or of images with metadata.jsonl; shapes: generated images",
        ("coco", "datasets", "shapes"),
    )
    path: str = setting("data/coco", "folder of the data set, or its Hub id")
    train_split: str = setting("train2017", "split to train on")
    val_split: str = setting("val2017", "split to evaluate on")
    annotations: str = setting("annotations/instances_{split}.json", "annotation file inside the folder")
    images: str = setting("{split}", "image folder inside the folder")
    config: str | None = setting(None, "layout datasets: configuration of a Hub data set that has several")
    box_format: str = setting("xywh", "layout datasets: order of a box's numbers", ("xywh", "xyxy", "cxcywh"))
    box_unit: str = setting("pixel", "layout datasets: pixel, or relative to the image (0..1)", ("pixel", "relative"))
    # setting() copies a list.
    label_names: list[str] = setting([], "layout datasets: class names by label, where the data has none")  # noqa: RUF009
    category_ids: list[int] = setting([], "layout datasets: the data's number of each of label_names")  # noqa: RUF009
    on_error: str = setting(
        "stop", "an unreadable image or impossible box: stop, or skip and report", ("stop", "skip")
    )
    shapes_side: int = setting(
        128, "layout shapes: longer side of a generated image, in pixels", minimum=32, maximum=MOST_PIXELS
    )
    shapes_difficulty: float = setting(0.5, "layout shapes: 0 is easy, 1 hard", minimum=0, maximum=1)
    shapes_seed: int = setting(0, "layout shapes: seed of the generated images", minimum=0)
    short_side: int = setting(800, "pixels that an image's short side is resized to", minimum=1, maximum=MOST_PIXELS)
    long_side: int = setting(1333, "pixels that its long side doesn't exceed", minimum=1, maximum=MOST_PIXELS)
    multiscale: str = setting("none", "training short side: fixed, of a range, of a list", ("none", "range", "choice"))
    # setting() copies a list.
    multiscale_short_sides: list[int] = setting(  # noqa: RUF009
        [], "pixels: the range's two ends, or the list", minimum=1, maximum=MOST_PIXELS
    )
    flip_probability: float = setting(0.5, "probability of a horizontal flip", minimum=0, maximum=1)
    filter_empty: bool = setting(True, "leave training images without any annotation out")
    min_image_side: int = setting(32, "pixels; training images with a shorter side are left out", minimum=0)
    max_train_images: int | None = setting(None, "train on the first images only", minimum=1)
    max_val_images: int | None = setting(None, "evaluate on the first images only", minimum=1)
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
        return {f.name: _default(f) for f in _fields(DetectionTrainingArguments)} | self.training

    def to_dict(self) -> dict[str, Any]:
        """Every field of the sections, and the training values that were given."""
        sections = {name: getattr(self, name) for name in SECTIONS}
        content = {name: section and dataclasses.asdict(section) for name, section in sections.items()}
        return {**content, "training": dict(self.training)}

    def save(self, path: str | Path) -> None:
        """Write the complete recipe; `load_recipe` reads the same recipe from it."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        # Whole or not at all: the next start of an interrupted run compares with it.
        write_atomically(Path(path), "# The resolved recipe of this run; it runs again as it is.\n" + text)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: path of a YAML file, or bare name of a recipe that the package carries (`gfl_r50_crosskd`).
        overrides: `section.key=value`, values as in YAML; `section=null` takes a section out.

    Raises:
        RecipeError: naming file, keys, values and the nearest valid names, all problems together.
    """
    path = find_recipe(name_or_path)
    content = _read_yaml(path)
    before = content.get("training")  # overrides make a new one
    problems = []
    for override in overrides:
        try:
            _apply_override(content, override)
        except RecipeError as error:
            problems.append(str(error))
    overridden = {override.partition("=")[0] for override in overrides}
    notes = [] if problems else _follow_length(before, content.get("training"), overridden)
    recipe = parse_recipe(content, str(path), problems)
    recipe.notes, recipe.overridden = notes, overridden
    return recipe


def find_recipe(name: str | Path) -> Path:
    """Path of a recipe file, or of one that the package carries.

    Args:
        name: anything with a folder or ending in .yaml or .yml is a path, anything else a bare name.

    Raises:
        RecipeError: if there is none, with close names.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        if path.is_file():
            return path
        if path.is_dir():
            raise RecipeError(_not_a_folder(path))
        raise RecipeError(f"recipe file {path} doesn't exist. {nearest(path.stem, sorted(carried_recipes()))}")
    recipes = carried_recipes()
    if str(name) not in recipes:
        if path.is_dir():
            raise RecipeError(_not_a_folder(path))
        if path.is_file():
            raise RecipeError(f"the file {path} is no recipe: the name of one ends in .yaml or .yml.")
        raise RecipeError(f"there is no recipe {str(name)!r}. {nearest(str(name), sorted(recipes))}")
    return recipes[str(name)]


def _not_a_folder(path: Path) -> str:
    found = [str(file) for file in sorted(path.glob("*.y*ml"))[:5]]
    return f"recipe {path} is a folder: name a file{' in it, such as ' + ', '.join(found) if found else ''}."


def carried_recipes() -> dict[str, Path]:
    """Name -> file of the recipes in the wheel, or in the checkout that the package lies in."""
    package = Path(str(importlib.resources.files("crosskd_hf")))
    # Not files("crosskd_hf.recipes"): a folder without __init__.py is a namespace package, whose path can't be used.
    for folder in (package / "recipes", package.parent / "recipes"):
        if found := {path.stem: path for path in folder.glob("*.yaml")}:
            return found
    return {}


def parse_recipe(content: dict[str, Any], source: str = "recipe", problems: Sequence[str] = ()) -> Recipe:
    """A recipe from nested dicts.

    Args:
        content: section -> key -> value.
        source: what the error message calls it.
        problems: found before, to be told together with those found here.

    Raises:
        RecipeError: with all problems.
    """
    found = list(problems)
    refused: set[str] = set()
    names = [*SECTIONS, "training"]
    for unknown in [key for key in content if key not in names]:
        found.append(f"unknown section {unknown!r}. {nearest(str(unknown), names)}")
        refused.update(OPTIONAL_SECTIONS)  # it may be one of them, misspelt
    sections: dict[str, Any] = {}
    for name, section_class in (*SECTIONS.items(), ("training", DetectionTrainingArguments)):
        values = content.get(name)
        if values is None and name in OPTIONAL_SECTIONS:
            sections[name] = None
            continue
        cast = _cast_section(name, values, section_class, found, refused)
        sections[name] = cast if name == "training" else section_class(**cast)
    recipe = Recipe(**sections)
    if not problems:
        # A refused value stands at its default here, about which nothing must be said.
        for fields, message in impossible_combinations(recipe):
            if refused.isdisjoint([*fields, *(name.partition(".")[0] for name in fields)]):
                found.append(message)
    if found:
        raise RecipeError(f"{source} can't be run:\n  - " + "\n  - ".join(found))
    return recipe


def impossible_combinations(recipe: Recipe) -> list[Problem]:
    """What no single field shows to be wrong.

    Returns:
        the fields (`section.key`, or a section) and the text of each problem.
    """
    values = recipe.training_values()
    training: list[Problem] = [
        (tuple(f"training.{name}" for name in names), f"training.{message}")
        for names, message in training_problems(values)
    ]
    if values["hub_token"]:
        text = (
            "training.hub_token would be written into recipe.yaml, which is pushed with the model: leave it out, and "
            "run `hf auth login` or set HF_TOKEN."
        )
        training.append((("training.hub_token",), text))
    return [*_model_problems(recipe), *_distillation_problems(recipe), *_data_problems(recipe.data), *training]


def _model_problems(recipe: Recipe) -> list[Problem]:
    problems: list[Problem] = []
    weights = recipe.model.backbone_weights
    # Names of files and URLs have a dot; none, imagenet, ... have not.
    known = weights in ("pretrained", "random") or (weights and ("." in weights or Path(weights).is_file()))
    if not (known or recipe.model.checkpoint):
        text = (
            f"model.backbone_weights is {'null' if weights is None else repr(weights)}; it must be pretrained (by "
            "timm), random (from scratch), or the path or URL of a file."
        )
        problems.append((("model.backbone_weights",), text))
    for name, section in (("model", recipe.model), ("teacher", recipe.teacher)):
        if section and section.backbone_style == "caffe" and "resnet" not in section.backbone:
            text = f"{name}.backbone_style caffe is for ResNets, not {section.backbone!r}: set pytorch."
            problems.append(((f"{name}.backbone_style", f"{name}.backbone"), text))
    if recipe.model.inherit and not recipe.teacher:
        text = "model.inherit needs a teacher to inherit from: add the section teacher, or set model.inherit=[]."
        problems.append((("model.inherit", "teacher"), text))
    if recipe.model.inherit and recipe.model.checkpoint:
        text = "model.inherit and model.checkpoint both say where the weights come from: leave one of them out."
        problems.append((("model.inherit", "model.checkpoint"), text))
    return problems


def _distillation_problems(recipe: Recipe) -> list[Problem]:
    teacher, distillation = recipe.teacher, recipe.distillation
    problems: list[Problem] = []
    if distillation and not teacher:
        text = "distillation needs a teacher: add the section teacher, or set distillation=null."
        problems.append((("teacher",), text))
    if teacher and not distillation:
        text = "there is a teacher but no distillation: add the section distillation, or set teacher=null."
        problems.append((("distillation",), text))
    if teacher and not teacher.checkpoint:
        text = "teacher.checkpoint is missing: a folder, a Hub id, or an MMDetection .pth by path or URL."
        problems.append((("teacher.checkpoint",), text))
    if not distillation:
        return problems
    terms = ("cls_weight", "box_weight", "centerness_weight")
    # Published for a teacher without centerness: none.
    off = [
        weight == 0 or (weight is None and name == "centerness_weight" and teacher and teacher.detector != "atss")
        for name, weight in ((name, getattr(distillation, name)) for name in terms)
    ]
    switches = ("crosskd", "pkd", "mimic")
    if not any(getattr(distillation, name) for name in switches):
        text = "distillation: crosskd, pkd and mimic are all 0: nothing would be distilled."
        problems.append((tuple(f"distillation.{name}" for name in switches), text))
    elif distillation.pkd == 0 and all(off):
        text = "distillation: cls_weight, box_weight, centerness_weight and pkd are all 0: nothing would be distilled."
        problems.append((tuple(f"distillation.{name}" for name in (*terms, "pkd")), text))
    k = distillation.student_tap_index
    own_tap = ("tap_index", distillation.tap_index) if k is None else ("student_tap_index", k)
    for name, section, (tap, k) in (
        ("model", recipe.model, own_tap),
        ("teacher", teacher, ("tap_index", distillation.tap_index)),
    ):
        if section is None or k is None or k <= section.head_blocks:
            continue
        # A saved detector carries its own number of blocks: the trainer compares that.
        if section.checkpoint in (None, "", "random") or section.checkpoint.endswith(".pth"):
            other = " or set student_tap_index" if name == "model" and tap == "tap_index" else ""
            text = f"distillation.{tap} is {k}, but {name}.head_blocks {section.head_blocks}: lower {tap}{other}."
            problems.append(((f"distillation.{tap}", f"{name}.head_blocks"), text))
    return problems


def _data_problems(data: DataSection) -> list[Problem]:
    problems: list[Problem] = _layout_problems(data)
    sides = data.multiscale_short_sides
    names = ("data.multiscale", "data.multiscale_short_sides")
    if data.multiscale == "range" and not (len(sides) == 2 and sides[0] < sides[1]):
        problems.append((names, f"data.multiscale range needs multiscale_short_sides [lowest, highest], not {sides}."))
    if data.multiscale == "choice" and not sides:
        problems.append((names, "data.multiscale choice needs values in multiscale_short_sides."))
    if data.multiscale == "none" and sides:
        text = f"data.multiscale is none, but multiscale_short_sides is {sides}: set range or choice."
        problems.append((names, text))
    if data.long_side < data.short_side:
        text = f"data.long_side {data.long_side} is below data.short_side {data.short_side}."
        problems.append((("data.long_side", "data.short_side"), text))
    if sides and max(sides) > data.long_side:
        text = f"data.multiscale_short_sides goes up to {max(sides)}, above data.long_side {data.long_side}."
        problems.append((("data.multiscale_short_sides", "data.long_side"), text))
    for name in ("annotations", "images"):
        try:
            placeholders = {field for _, field, _, _ in string.Formatter().parse(getattr(data, name))} - {None}
        except ValueError:
            placeholders = {"?"}
        if not placeholders <= {"split"}:
            text = f"data.{name} {getattr(data, name)!r} may only have the placeholder {{split}}."
            problems.append(((f"data.{name}",), text))
    return problems


def _layout_problems(data: DataSection) -> list[Problem]:
    problems: list[Problem] = []
    if data.layout == "shapes":
        for name in ("max_train_images", "max_val_images"):
            if getattr(data, name) is None:
                problems.append(
                    ((f"data.{name}",), f"data.{name} is missing: layout shapes generates that many images.")
                )
    if data.layout != "datasets":
        for f in _fields(DataSection):
            only = f.metadata["help"].startswith("layout datasets") and getattr(data, f.name) != _default(f)
            if only:
                text = f"data.{f.name} is for layout datasets, but data.layout is {data.layout}."
                problems.append(((f"data.{f.name}", "data.layout"), text))
    if data.category_ids and len(data.category_ids) != len(data.label_names):
        text = (
            f"data.category_ids has {len(data.category_ids)} numbers, but label_names {len(data.label_names)} names."
        )
        problems.append((("data.category_ids", "data.label_names"), text))
    for name in ("category_ids", "label_names"):
        values = getattr(data, name)
        if len(set(values)) != len(values):
            problems.append(((f"data.{name}",), f"data.{name} has a value twice: {values}."))
    return problems


def describe_fields() -> str:
    """Every key of a recipe with type, default and meaning, a line each; `training` only what transformers lacks."""
    lines = []
    own = set(DetectionTrainingArguments.__annotations__)
    for section, section_class in (*SECTIONS.items(), ("training", DetectionTrainingArguments)):
        hints = typing.get_type_hints(section_class)
        for f in _fields(section_class):
            if section == "training" and f.name not in own:
                continue
            kind, text = type_name(hints[f.name]), f.metadata.get("help", "")
            if f.metadata.get("choices"):
                kind = " | ".join(f.metadata["choices"])
            lines.append(f"{section}.{f.name} ({kind}, {_default(f)!r}): {text}")
    return "\n".join(lines)


def _fields(section_class: type) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(section_class) if f.init]


def _default(f: dataclasses.Field) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    factory: Callable[[], Any] = f.default_factory  # type: ignore[assignment]
    return factory()


# Reading ------------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path} can't be read ({error.strerror}).") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}, line {line}: no UTF-8 text ({error.reason}); save it as UTF-8.") from error
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"{content!r:.50}"
        raise RecipeError(f"{path} must hold the sections {', '.join([*SECTIONS, 'training'])}, but holds {found}.")
    return content


def _apply_override(content: dict[str, Any], override: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in override):  # how Python keeps bytes that it can't decode
        raise RecipeError(
            f"override {override!a} is no text in the encoding of this locale, {sys.getfilesystemencoding()}: "
            "set PYTHONUTF8=1 or LC_ALL=C.UTF-8, or rename what is no UTF-8."
        )
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) > 2 or not all(parts):
        raise RecipeError(f"override {override!r} must look like section.key=value, or section=null.")
    value = _override_value(parts, text, override) if text else ""
    if len(parts) == 1:
        if value is not None:
            raise RecipeError(f"override {override!r}: a whole section can only be set to null.")
        if key not in OPTIONAL_SECTIONS:
            choice = " and ".join(OPTIONAL_SECTIONS)
            raise RecipeError(f"override {override!r}: only {choice} can be taken out of a recipe.")
        content[key] = None
        return
    section = content.get(parts[0])
    if not isinstance(section, dict | None):
        raise RecipeError(f"override {override!r}: section {parts[0]} must hold keys and values, not {section!r}.")
    # A copy: a YAML alias makes one dict of two sections.
    content[parts[0]] = {**(section or {}), parts[1]: value}


def _override_value(parts: list[str], text: str, override: str) -> Any:
    """The YAML value; where a key takes text, what YAML reads as something else ({split}, 007, no) is that text."""
    section_class = {**SECTIONS, "training": DetectionTrainingArguments}.get(parts[0])
    hint = typing.get_type_hints(section_class).get(parts[1]) if section_class and len(parts) == 2 else None
    takes_text = hint in (str, str | None)
    try:
        value = parse_yaml(text, f"override {override!r}")
    except RecipeError:
        if takes_text and not text.lstrip().startswith("!"):  # a tag asks for an object
            return text
        raise
    return text if takes_text and not isinstance(value, str | None) else value


def _follow_length(before: Any, training: Any, overridden: set[str]) -> list[str]:
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
    hints = typing.get_type_hints(DetectionTrainingArguments)
    names = ("num_train_epochs", "max_steps", "lr_milestones", "warmup_steps")
    defaults = {f.name: _default(f) for f in _fields(DetectionTrainingArguments) if f.name in names}
    try:
        old, now = ({n: cast(v.get(n, defaults[n]), hints[n]) for n in names} for v in (before or {}, training))
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
    begun = _begun_training(training.get("output_dir"))
    same_length = begun is not None and (begun["num_train_epochs"], begun["max_steps"]) == (epochs, steps)
    for name, value in (("lr_milestones", milestones), ("warmup_steps", warmup)):
        if now[name] != value and f"training.{name}" not in overridden:
            if same_length and begun[name] == value:
                continue
            training[name] = now[name]
            length = f"{steps} updates" if steps > 0 else f"{epochs:g} epochs instead of {old['num_train_epochs']:g}"
            notes.append(f"training.{name} {now[name]} instead of {value}, since the training has {length}")
    return notes


def _begun_training(output_dir: Any) -> dict[str, Any] | None:
    """The training values that the run in a folder was begun with; None if it holds none that can be read."""
    path = Path(str(output_dir or "trainer_output")).expanduser() / RECIPE_FILE  # transformers' own default
    try:
        return load_recipe(path).training_values() if path.is_file() else None
    except (RecipeError, OSError):  # told where the folder is checked
        return None


def _cast_section(
    name: str, values: Any, section_class: type, problems: list[str], refused: set[str]
) -> dict[str, Any]:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        problems.append(f"section {name} must hold keys and values, not {values!r}.")
        refused.add(name)
        return {}
    fields, hints = {f.name: f for f in _fields(section_class)}, typing.get_type_hints(section_class)
    values_cast = {}
    for key, value in values.items():
        if key not in fields:
            problems.append(f"unknown key {name}.{key} (value {value!r}). {nearest(str(key), list(fields))}")
            continue
        try:
            # Of what can't be changed, the reason says more than the type.
            checked = value if name == "training" and key in FIXED else cast(value, hints[key])
            # transformers' fields may have choices of their own, in the same place.
            check_range(checked, fields[key].metadata)
            values_cast[key] = checked
        except ValueError as error:
            problems.append(f"{name}.{key}: {value!r} {error}.")
            refused.add(f"{name}.{key}")
    return values_cast
