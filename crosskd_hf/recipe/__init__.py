"""Recipes, what they build, and the run folders they are run in."""

from ..utils.strict_yaml import RecipeError
from .distillation import DistillationSection
from .load import load_recipe, parse_recipe
from .packaged import carried_recipes
from .sections import ModelSection, Recipe, TeacherSection

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
