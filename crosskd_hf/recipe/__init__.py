"""Recipes, what they build, and the run folders they are run in."""

from .carried import carried_recipes
from .load import load_recipe, parse_recipe
from .reading import RecipeError
from .sections import DistillationSection, ModelSection, Recipe, TeacherSection

__all__ = [
    "DistillationSection",
    "ModelSection",
    "Recipe",
    "RecipeError",
    "TeacherSection",
    "carried_recipes",
    "load_recipe",
    "parse_recipe",
]
