"""The distillation methods, one file each: the file's name is what recipes call the method.

Files whose name begins with an underscore hold what methods share.
"""

import importlib
import pkgutil

from ..method import KDMethod


def method_names() -> list[str]:
    """Methods that recipes can name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def method_class(name: str) -> type[KDMethod]:
    """The method of a file in this folder.

    Args:
        name: one of `method_names`.
    """
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, KDMethod)]
    return next(value for value in classes if value.__module__ == module.__name__ and value.name == name)
