"""What no single field of a recipe shows to be wrong."""

from pathlib import Path

from ..data.settings import data_problems
from ..distillation.methods.crosskd import Settings
from ..models.architecture import architecture_problems
from ..training.arguments import training_problems
from ..utils.recipe_fields import Problem
from .distillation import distillation_problems
from .sections import ModelSection, Recipe


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
    problems = [*_model_problems(recipe), *_distillation_problems(recipe), *data_problems(recipe.data), *training]
    plain, epochs = recipe.data.plain_epochs, values["num_train_epochs"]
    # Without training, the data section is read alone; how many epochs max_steps are, only the trainer knows.
    if recipe.training and values["max_steps"] <= 0 and 0 < epochs <= plain:
        text = (
            f"data.plain_epochs is {plain}, but training.num_train_epochs {epochs:g}: data.augment would never be "
            "applied. Lower plain_epochs; 0 is none."
        )
        problems.append((("data.plain_epochs", "training.num_train_epochs", "training.max_steps"), text))
    return problems


def _model_problems(recipe: Recipe) -> list[Problem]:
    problems: list[Problem] = []
    for name, section in (("model", recipe.model), ("teacher", recipe.teacher)):
        if section and not (section is recipe.model and recipe.model.pretrained):
            problems += architecture_problems(section, name)
    if recipe.model.pretrained and (recipe.model.config or recipe.model.detector != ModelSection.detector):
        text = "model.pretrained has its own architecture: leave model.detector and model.config out."
        problems.append((("model.pretrained", "model.detector", "model.config"), text))
    if recipe.model.pretrained and recipe.model.checkpoint:
        text = "model.pretrained and model.checkpoint say the same: leave one of them out."
        problems.append((("model.pretrained", "model.checkpoint"), text))
    weights = recipe.model.backbone_weights
    # Names of files and URLs have a dot; none, imagenet, ... have not.
    known = weights in ("pretrained", "random") or (weights and ("." in weights or Path(weights).is_file()))
    if not (known or recipe.model.saved):
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
    if recipe.model.inherit and recipe.model.saved:
        text = "model.inherit and model.checkpoint both say where the weights come from: leave one of them out."
        problems.append((("model.inherit", "model.checkpoint"), text))
    return problems


def _distillation_problems(recipe: Recipe) -> list[Problem]:
    teacher, distillation = recipe.teacher, recipe.distillation
    problems: list[Problem] = []
    if recipe.data.unlabeled and not (teacher and distillation):
        text = (
            "data.unlabeled needs a teacher to learn from: add the sections teacher and distillation, or set it null."
        )
        problems.append((("data.unlabeled", "teacher", "distillation"), text))
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
    # A saved detector knows its own kind.
    if teacher:
        saved = teacher.checkpoint not in ("", "random") and not teacher.checkpoint.endswith(".pth")
        problems += distillation_problems(distillation, centerness=saved or teacher.detector == "atss")
    if crosskd := distillation.methods.get("crosskd"):
        problems += _tap_problems(recipe, crosskd)
    return problems


def _tap_problems(recipe: Recipe, crosskd: Settings) -> list[Problem]:
    problems: list[Problem] = []
    student_tap = "tap_index" if crosskd.student_tap_index is None else "student_tap_index"
    for name, section, tap in (("model", recipe.model, student_tap), ("teacher", recipe.teacher, "tap_index")):
        k = getattr(crosskd, tap)
        if section is None or k is None or k <= section.head_blocks:
            continue
        # A saved detector carries its own number of blocks: the trainer compares that.
        if section.checkpoint in (None, "", "random") or section.checkpoint.endswith(".pth"):
            other = " or set student_tap_index" if name == "model" and tap == "tap_index" else ""
            key = f"distillation.crosskd.{tap}"
            text = f"{key} is {k}, but {name}.head_blocks {section.head_blocks}: lower {tap}{other}."
            problems.append(((key, f"{name}.head_blocks"), text))
    return problems
