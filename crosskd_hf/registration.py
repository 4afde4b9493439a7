"""Registration with transformers: each part as soon as the module of transformers that it belongs to is imported.

So a program may import the two packages in either order, and `crosskd --help` imports neither transformers nor torch.
"""

import importlib.abc
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def _configurations() -> None:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from .models.configuration import CONFIGS

    for name, config in CONFIGS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        if name not in CONFIG_MAPPING:  # AutoConfig.for_model("gfl")
            CONFIG_MAPPING.register(name, config)


def _models() -> None:
    from transformers import AutoModel, AutoModelForObjectDetection
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

    from .models import MODELS

    for model in MODELS.values():
        for auto_class in (AutoModel, AutoModelForObjectDetection):
            auto_class.register(model.config_class, model, exist_ok=True)
        # The pipeline looks names up here, and warns about models that it doesn't find.
        MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[model.config_class.model_type] = model.__name__


def _image_processors() -> None:
    from transformers import AutoImageProcessor

    from .models.configuration import CONFIGS
    from .models.image_processing import DenseDetectorImageProcessor

    for config in CONFIGS.values():
        AutoImageProcessor.register(config, fast_image_processor_class=DenseDetectorImageProcessor, exist_ok=True)


def _pipeline() -> None:
    from .inference.pipeline import register

    register()


AFTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _configurations,
    "transformers.models.auto.modeling_auto": _models,
    "transformers.models.auto.image_processing_auto": _image_processors,
    "transformers.pipelines": _pipeline,
}


PACKAGES = ("transformers.", "crosskd_hf.")


class _Importing(threading.local):
    """The modules of `PACKAGES` that this thread is in the middle of importing, and registrations that wait for them:
    a module that isn't complete can't be used by what is registered.
    """

    depth = 0

    def __init__(self) -> None:
        self.waiting: list[str] = []

    def module(self, name: str, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        """Execute a module; register what has waited for it."""
        self.depth += 1
        try:
            execute(module)
        finally:
            self.depth -= 1
        if name in AFTER:
            self.waiting.append(name)
        while self.waiting and not self.depth:
            AFTER[self.waiting.pop(0)]()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as Python does, and sees when they are complete."""

    def __init__(self) -> None:
        self.importing = _Importing()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname.startswith(PACKAGES) else None
        if spec is not None and spec.loader is not None:
            execute = partial(self.importing.module, fullname, spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register with what of transformers is imported already, and with the rest when it is imported."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name, register in AFTER.items():
        if name in sys.modules:
            register()
