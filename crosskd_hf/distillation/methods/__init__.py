"""Distillation methods, one file each: a recipe names them in `distillation.methods`."""
