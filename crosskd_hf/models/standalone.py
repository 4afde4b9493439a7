"""Checkpoints that transformers reads without `import crosskd_hf`: they carry a module that imports it.

`save_pretrained(folder, standalone=True)` writes `modeling_crosskd.py` and an `auto_map` that names its classes. With
`trust_remote_code=True` transformers' auto classes then import the package themselves, or say that it is missing. What
was saved so stays so when it is loaded and saved again.
"""

import os
from pathlib import Path
from typing import Any

MODULE = "modeling_crosskd"
CODE = '''"""The classes of this checkpoint. They are part of the package crosskd_hf: pip install crosskd_hf"""

from crosskd_hf import {names}

__all__ = [{quoted}]
'''


def mark(owner: Any, **classes: type) -> None:
    """Have a configuration or an image processor name its classes when it is saved.

    Args:
        owner: whose `auto_map` is set.
        classes: auto class of transformers -> class of this package.
    """
    owner.auto_map = {auto_class: f"{MODULE}.{one.__name__}" for auto_class, one in classes.items()}


def write_module(folder: str | os.PathLike[str], owner: Any) -> None:
    """Write the module that an `auto_map` of `mark` names, with the classes that one in the folder has already.

    Args:
        folder: is made if it doesn't exist.
        owner: of the `auto_map`; without one nothing is written.
    """
    auto_map = getattr(owner, "auto_map", None) or {}
    names = {name.split(".")[-1] for name in auto_map.values() if name.startswith(f"{MODULE}.")}
    if not names:
        return
    path = Path(folder) / f"{MODULE}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        line = next((line for line in path.read_text().splitlines() if line.startswith("from crosskd_hf import ")), "")
        names |= {name.strip() for name in line.removeprefix("from crosskd_hf import ").split(",") if line}
    ordered = sorted(names)
    path.write_text(CODE.format(names=", ".join(ordered), quoted=", ".join(f'"{name}"' for name in ordered)))
