"""Checkpoints that transformers reads without `import crosskd_hf`: they carry a module that imports it.

`save_pretrained(folder, standalone=True)` writes `modeling_crosskd.py` and an `auto_map` that names its classes. With
`trust_remote_code=True` transformers' auto classes then import the package themselves, or say that it is missing.
"""

import os
import re
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

    Raises:
        ValueError: a class isn't of this package, which a checkpoint couldn't import then.
    """
    if foreign := [one.__name__ for one in classes.values() if one.__name__ not in _known_names()]:
        raise ValueError(
            f"standalone: {foreign[0]} is no class of crosskd_hf, from which the checkpoint would import it"
        )
    owner.auto_map = {auto_class: f"{MODULE}.{one.__name__}" for auto_class, one in classes.items()}


def is_marked(owner: Any) -> bool:
    """Whether `mark` was called for it, or for what it was loaded from."""
    auto_map = getattr(owner, "auto_map", None)
    return isinstance(auto_map, dict) and any(str(name).startswith(f"{MODULE}.") for name in auto_map.values())


def write_module(folder: str | os.PathLike[str], classes: set[str]) -> None:
    """Write the module, with the classes that one in the folder has already.

    Args:
        folder: exists.
        classes: names of classes of this package.
    """
    path = Path(folder) / f"{MODULE}.py"
    # Only names that are known: a file and an `auto_map` may come from elsewhere, and this one may be run.
    written = set(re.findall(r"\w+", path.read_text(errors="replace"))) if path.is_file() else set()
    names = sorted((classes | written) & _known_names())
    path.write_text(CODE.format(names=", ".join(names), quoted=", ".join(f'"{name}"' for name in names)))


def _known_names() -> set[str]:
    from .configuration import CONFIGS
    from .detectors import MODELS

    return {one.__name__ for one in (*CONFIGS.values(), *MODELS.values())} | {"DenseDetectorImageProcessor"}


class Standalone:
    """What a model and an image processor share: they can be saved with the module.

    `standalone` is True or False, or None for what it was the last time, or in the folder that this was loaded from.
    """

    def _auto_classes(self) -> tuple[Any, dict[str, type]]:
        """What holds the `auto_map`, and auto class of transformers -> class of this package."""
        raise NotImplementedError

    def mark_standalone(self, standalone: bool | None) -> bool:
        """Set or remove the mark; whether there is one now."""
        owner, classes = self._auto_classes()
        if standalone or (standalone is None and is_marked(owner)):
            mark(owner, **classes)
            return True
        if is_marked(owner):
            del owner.auto_map
        return False

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        standalone: bool | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Save; see transformers.

        Args:
            save_directory, *args, push_to_hub, **kwargs: as in transformers.
            standalone: have transformers load it without `import crosskd_hf`, with `trust_remote_code=True`.
        """
        marked = self.mark_standalone(standalone)
        push_here = push_to_hub and marked  # transformers would upload before the module is written
        saved = super().save_pretrained(  # type: ignore[misc]
            save_directory, *args, push_to_hub=push_to_hub and not marked, **kwargs
        )
        is_main_process = kwargs.get("is_main_process", args[0] if args else True)
        if marked and is_main_process:
            write_module(save_directory, {one.__name__ for one in self._auto_classes()[1].values()})
        if push_here:
            given = {name: kwargs[name] for name in ("token", "commit_message", "private") if name in kwargs}
            self.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **given)
        return saved

    def push_to_hub(self, repo_id: str, *, standalone: bool | None = None, **kwargs: Any) -> Any:
        """Upload; see transformers, and `save_pretrained` for `standalone`."""
        self.mark_standalone(standalone)
        return super().push_to_hub(repo_id, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing. transformers would copy this module, without what it imports, into each folder it saves."""
