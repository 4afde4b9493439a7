"""Names of a package that are imported when they are first used: no command waits for what it doesn't need."""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562). Modules inside it are found, too.

    Args:
        package: its `__name__`.
        homes: module inside the package -> the names that it holds.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            inside = f"{package}.{name}"
            if not name.startswith("_") and importlib.util.find_spec(inside):
                return importlib.import_module(inside)
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{home[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return get, names
