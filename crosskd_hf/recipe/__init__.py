"""Recipes, and the run folders they are run in."""
