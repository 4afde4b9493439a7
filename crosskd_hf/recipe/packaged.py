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
    path, recipes = Path(name), carried_recipes()
    is_path = path.suffix in (".yaml", ".yml") or path.parent != Path(".")
    if is_path and path.is_file():
        return path
    if not is_path and str(name) in recipes:
        return recipes[str(name)]
    if path.is_dir():
        files = ", ".join(str(file) for file in sorted(path.glob("*.y*ml"))[:5])
        raise RecipeError(f"recipe {path} is a folder: name a file{' in it, such as ' + files if files else ''}.")
    if path.is_file():
        raise RecipeError(f"the file {path} is no recipe: the name of one ends in .yaml or .yml.")
    problem = f"recipe file {path} doesn't exist" if is_path else f"there is no recipe {str(name)!r}"
    raise RecipeError(f"{problem}. {nearest(path.stem if is_path else str(name), sorted(recipes))}")


def carried_recipes() -> dict[str, Path]:
    """Name -> file of the recipes in the wheel, or in the checkout that the package lies in."""
    package = Path(str(importlib.resources.files("crosskd_hf")))
    # Not files("crosskd_hf.recipes"): a folder without __init__.py is a namespace package, whose path can't be used.
    for folder in (package / "recipes", package.parent / "recipes"):
        if recipes := {path.stem: path for path in folder.glob("*.yaml")}:
            return recipes
    return {}
