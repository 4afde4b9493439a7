"""The distillation methods, one file each: the file's name is what recipes call the method."""

import importlib
import pkgutil

from ..method import KDMethod


def method_names() -> list[str]:
    """Methods that recipes can name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def method_class(name: str) -> type[KDMethod]:
    """The method of a file in this folder.

    Args:
        name: one of `method_names`.
    """
    module = importlib.import_module(f"{__name__}.{name}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, KDMethod) and value.__module__ == module.__name__
    )
