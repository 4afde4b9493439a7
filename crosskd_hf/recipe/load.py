"""Recipes from YAML files, read strictly: all problems are found before anything is built, and told together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.settings import DataSection
from ..utils.messages import nearest
from ..utils.strict_yaml import RecipeError, read_yaml
from .checks import impossible_combinations
from .distillation import read_distillation
from .overrides import apply_override, leave_out_methods
from .packaged import find_recipe
from .reading import cast_section
from .sections import OPTIONAL_SECTIONS, SECTIONS, Recipe
from .shorter_runs import follow_length


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: path of a YAML file, or bare name of a recipe that the package carries (`gfl_r50_crosskd`).
        overrides: `section.key=value`, `distillation.METHOD.key=value` or `model.config.KEY[.KEY ...]=value`, values
            as in YAML; `section=null` takes a section out.

    Raises:
        RecipeError: naming file, keys, values and the nearest valid names, all problems together.
    """
    path = find_recipe(name_or_path)
    content = _read_sections(path)
    before = content.get("training")  # overrides make a new one
    problems = []
    for override in overrides:
        try:
            apply_override(content, override)
        except RecipeError as error:
            problems.append(str(error))
    overridden = {override.partition("=")[0] for override in overrides}
    leave_out_methods(content, overridden)
    notes = [] if problems else follow_length(before, content.get("training"), overridden)
    recipe = parse_recipe(content, str(path), problems)
    recipe.notes, recipe.overridden = notes, overridden
    return recipe


def parse_recipe(content: dict[str, Any], source: str = "recipe", problems: Sequence[str] = ()) -> Recipe:
    """A recipe from nested dicts.

    Args:
        content: section -> key -> value.
        source: what the error message calls it.
        problems: of the overrides, to be told together with those of the content.

    Raises:
        RecipeError: with all problems.
    """
    all_problems = list(problems)
    refused: set[str] = set()
    for unknown in [key for key in content if key not in SECTIONS]:
        all_problems.append(f"unknown section {unknown!r}. {nearest(str(unknown), list(SECTIONS))}")
        refused.update(OPTIONAL_SECTIONS)  # it may be one of them, misspelt
    sections: dict[str, Any] = {}
    for name, section_class in SECTIONS.items():
        values = content.get(name)
        if values is None and name in OPTIONAL_SECTIONS:
            sections[name] = None
            continue
        if name == "distillation":
            sections[name] = read_distillation(values, all_problems, refused)
            continue
        cast = cast_section(name, values, section_class, all_problems, refused)
        sections[name] = cast if name == "training" else section_class(**cast)
    recipe = Recipe(**sections)
    if not problems:
        # A refused value stands at its default here, about which nothing must be said.
        for fields, message in impossible_combinations(recipe):
            if not any(f"{field}.".startswith(f"{name}.") for field in fields for name in refused):
                all_problems.append(message)
    if all_problems:
        raise RecipeError(f"{source} can't be run:\n  - " + "\n  - ".join(all_problems))
    return recipe


def load_data_section(name_or_path: str | Path) -> DataSection:
    """The data section of a recipe; an earlier version of the package may have written the others.

    Raises:
        RecipeError: see `load_recipe`, about this section.
    """
    path = find_recipe(name_or_path)
    return parse_recipe({"data": _read_sections(path).get("data")}, str(path)).data


def _read_sections(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        held = "nothing" if content is None else f"{content!r:.50}"
        raise RecipeError(f"{path} must hold the sections {', '.join(SECTIONS)}, but holds {held}.")
    return content
