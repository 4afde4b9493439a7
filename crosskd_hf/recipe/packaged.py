"""Recipe files by path, and by name those that the package carries."""

import importlib.resources
from pathlib import Path

from ..utils.messages import nearest
from ..utils.strict_yaml import RecipeError


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
