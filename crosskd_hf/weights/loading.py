"""Detectors and their image processors from folders, the Hub, and MMDetection checkpoints."""

import contextlib
import copy
import hashlib
import logging
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from ..models import CONFIGS, MODELS, DenseDetectorConfig
from ..models.architecture import ArchitectureSection, build_config
from ..models.base import DenseDetector
from ..models.families import FAMILIES, PROCESSORS, backbone_name, is_dense, label_names_of
from ..models.image_processing import DenseDetectorImageProcessor
from ..models.transformers_detectors import prepare_new
from ..utils.checksums import MARKER, damage
from ..utils.label_names import COCO_CLASSES, coco_spelling, loosely, near_matches, spelling_problem
from ..utils.messages import first_line
from ..utils.redact import public_url, without_credentials
from .download import check_hash, fetch
from .mmdet import CheckpointError, check_finite, load_reference_state, read_checkpoint

logger = logging.getLogger(__name__)
CACHE = Path(HF_HOME) / "crosskd_hf"
OF_DETECTORS = frozenset(PROCESSORS.values())


def for_labels(model: PreTrainedModel, label_names: Sequence[str]) -> PreTrainedModel:
    """A detector for other classes: everything is kept but the class predictor, which is new.

    Args:
        model: a trained detector.
        label_names: of the data that it is to be trained on; if they are its own, it is returned as it is, but that
            COCO's are spelt as the data does.

    Raises:
        CheckpointError: its classes are the data's, but for case, blanks, underscores or hyphens.
    """
    known, given = label_names_of(model.config), list(label_names)
    if coco_spelling(known) == coco_spelling(given):
        set_labels(model.config, given)
        return model
    near = near_matches(coco_spelling(known), coco_spelling(given))
    if near and list(map(loosely, known)) == list(map(loosely, given)):  # others would be replaced anyhow
        raise CheckpointError(f"the checkpoint and the data have {spelling_problem(near, 'checkpoint', 'data')}.")
    logger.warning(
        "the checkpoint knows %d classes (%s, ...), the data has %d (%s, ...): its class predictor is replaced by a "
        "new one, which has to be trained",
        *(len(known), ", ".join(known[:3]), len(given), ", ".join(given[:3])),
    )
    config = copy.deepcopy(model.config)
    set_labels(config, given)
    new = AutoModelForObjectDetection.from_config(config)
    per_class = class_weights(config)
    kept = {name: value for name, value in model.state_dict().items() if name not in per_class}
    missing, unexpected = new.load_state_dict(kept, strict=False)
    assert not unexpected and set(missing) <= per_class, (missing, unexpected)
    if not is_dense(config):
        prepare_new(new)
        _copy_known_classes(model, new, per_class)
    return new


@torch.no_grad()
def _copy_known_classes(model: PreTrainedModel, new: PreTrainedModel, names: set[str]) -> None:
    """Copy the rows of classes that both know by name, such as COCO's 80 among the 91 ids of DETR."""
    known, given = map(coco_spelling, map(label_names_of, (model.config, new.config)))
    shared = [name for name in given if name in known and name != "N/A"]
    rows, places = [known.index(name) for name in shared], [given.index(name) for name in shared]
    before, after = model.state_dict(), new.state_dict()
    for name in names:
        after[name][places] = before[name][rows]


def set_labels(config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Give a configuration these classes."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}


def class_weights(config: PreTrainedConfig) -> set[str]:
    """The weights of a detector that belong to classes: predictors, and embeddings of noisy classes."""
    shapes = []
    for count in (2, 3):
        config = copy.deepcopy(config)
        set_labels(config, [str(label) for label in range(count)])
        with torch.device("meta"):
            model = AutoModelForObjectDetection.from_config(config)
        shapes.append({name: value.shape for name, value in model.state_dict().items()})
    return {name for name, shape in shapes[0].items() if shape != shapes[1][name]}


def timm_backbone(model: PreTrainedModel) -> nn.Module:
    """The module of timm inside a detector.

    Raises:
        CheckpointError: there is none: the backbone is transformers' own.
    """
    if isinstance(model, DenseDetector):
        return model.backbone.body
    for module in model.modules():  # parents before their children
        if type(module).__module__.startswith("timm."):
            return module
    raise CheckpointError(
        f"model.backbone_weights: the backbone of this {model.config.model_type} is transformers' own, of which there "
        "are no weights alone: name a backbone of timm in model.config (backbone_config: {model_type: "
        "timm_backbone, backbone: ..., out_indices: [...]}), start from model.pretrained, or set "
        "model.backbone_weights=random."
    )


def load_pretrained_backbone(model: PreTrainedModel) -> None:
    """Fill a backbone of timm in a detector of transformers with timm's pretrained weights, which are downloaded.

    Raises:
        CheckpointError: the backbone is transformers' own.
        OSError, RuntimeError: they can't be fetched, or there are none.
    """
    body, name = timm_backbone(model), backbone_name(model.config)
    fill_backbone(body, timm.create_model(name, pretrained=True).state_dict(), f"timm's {name}")


def load_backbone_weights(model: PreTrainedModel, path: str) -> None:
    """Fill the backbone from a file with timm's or torchvision's names (`.safetensors` or `.pth`), or from its URL.

    Raises:
        CheckpointError: if the file can't be read, a key of the backbone is missing or has another shape, or weights
            aren't finite.
    """
    if "://" in path:
        path = str(fetch(path, CACHE / "downloads"))
    if not Path(path).is_file():
        raise CheckpointError(f"model.backbone_weights {path} is no file.")
    if path.endswith(".safetensors"):
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the backbone weights {path} can't be read ({error}).") from error
    else:
        state, _ = read_checkpoint(path)
    fill_backbone(timm_backbone(model), state, path)


def fill_backbone(body: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Fill timm's module from weights of timm's or torchvision's names.

    Args:
        body: timm's module.
        state: name -> weight.
        path: where they come from, for messages.

    Raises:
        CheckpointError: a key of the module is missing or has another shape, or weights aren't finite.
    """
    expected = body.state_dict()
    # timm's feature extractors say layers_0 for what its whole models call layers.0.
    given = {key.replace(".", "_"): value for key, value in state.items()}
    state = {key: given[name] for key in expected if (name := key.replace(".", "_")) in given}
    wrong = [
        k for k, v in expected.items() if "num_batches" not in k and (k not in state or state[k].shape != v.shape)
    ]
    if wrong:
        raise CheckpointError(
            f"{path} doesn't hold the weights of this backbone: {len(wrong)} keys are missing or have another shape, "
            f"such as {', '.join(wrong[:3])}."
        )
    check_finite(state, path)
    body.load_state_dict(state, strict=False)


def load_detector(
    source: str, section: ArchitectureSection | None = None, label_names: Sequence[str] = ()
) -> PreTrainedModel:
    """A detector from a folder, a Hub id, or an MMDetection `.pth` by path or URL.

    Args:
        source: where it is.
        section: the architecture that a `.pth` has; a saved model has its own.
        label_names: the classes of a `.pth` that doesn't name them.

    Raises:
        CheckpointError: if it can't be read, isn't a detector that is known here, lacks weights, has some that
            aren't finite, or its configuration holds what no detector can be built with.
    """
    shown = public_url(source) if "://" in source else source
    if source.endswith(".pth"):
        if section is None:
            raise CheckpointError(f"{shown!r} doesn't say which detector it holds: name it in a recipe instead.")
        return _convert(source, section, label_names)
    _check_folder(Path(source).expanduser(), shown)
    _check_config(source, shown)
    if (Path(source) / MARKER).is_file() and (problem := damage(Path(source))):
        raise CheckpointError(f"the checkpoint {shown!r} is damaged: {problem}. Use another one of its run.")
    model, info = _load_saved(source, shown)
    if mismatched := sorted(info["mismatched_keys"]):
        key, given, expected = mismatched[0]
        raise CheckpointError(
            f"{shown!r} can't be loaded as a detector: its config.json doesn't fit {len(mismatched)} of its weights, "
            f"such as {key}, which is {tuple(given)} and would have to be {tuple(expected)}."
        )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{shown!r} lacks {len(missing)} weights of its model, such as {', '.join(missing[:3])}: save it again."
        )
    # What transformers' checkpoints have too many is theirs.
    if (unexpected := sorted(info["unexpected_keys"])) and isinstance(model, DenseDetector):
        raise CheckpointError(
            f"{shown!r} can't be loaded as a detector: its config.json describes a model without {len(unexpected)} of "
            f"its weights, such as {', '.join(unexpected[:3])}."
        )
    check_finite(model.state_dict(), repr(shown))
    return model


def _check_folder(folder: Path, shown: str) -> None:
    """Raise CheckpointError for what is neither the folder of a saved model nor a Hub id."""
    if folder.is_file():
        raise CheckpointError(
            f"{shown!r} is a file, but a detector is a folder with config.json and model.safetensors. If it is an "
            "MMDetection checkpoint, let its name end with .pth. If it holds weights of a model of this package, put "
            "them into the model with load_state_dict, and save it with save_pretrained."
        )
    if folder.is_absolute() or (folder.parent != Path() and folder.parent.is_dir()):
        if not folder.is_dir():  # before the Hub is asked for it, again and again
            raise CheckpointError(f"{shown!r} can't be loaded as a detector: there is no such folder.")
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{shown!r} can't be loaded as a detector: that folder holds no config.json. If a run writes to it, "
                "it isn't finished. Of MMDetection's folders, give the .pth file."
            )


def _check_config(source: str, shown: str) -> None:
    """Raise CheckpointError if the config.json of a folder or Hub id describes no detector that can be built."""
    try:
        try:
            content = PreTrainedConfig.get_config_dict(source)[0]
        except (OSError, ValueError):
            return  # loading tells what is wrong
        model_type = content.get("model_type")
        config_class = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else PreTrainedConfig
        if not issubclass(config_class, DenseDetectorConfig) and model_type not in FAMILIES:
            known = ", ".join([*(config.model_type for config in CONFIGS.values()), *FAMILIES])
            raise ValueError(
                f"its model type, {model_type!r}, isn't one of those that are known here ({known}). Code that a model "
                "brings is never run here."
            )
        names = label_names_of(config_class.from_dict(content))
        # DETR's and its kin's classes are COCO's 91 ids, of which 11 mean nothing.
        if twice := [name for name, count in Counter(names).items() if count > 1 and name != "N/A"]:
            raise ValueError(f"id2label gives several labels the same name, such as {twice[0]!r}")
    except Exception as error:  # whatever a file may hold
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{shown!r} can't be loaded as a detector (config.json: {reason})") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own report of missing weights, which advises to train: here they are an error."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _load_saved(source: str, shown: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """transformers' model of a folder or Hub id, and what it says of the weights' names and shapes."""
    try:
        with _quiet_transformers():
            return AutoModelForObjectDetection.from_pretrained(
                source,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `load_detector` tells them, with the shapes
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = without_credentials(first_line(error))
        if isinstance(error, pickle.UnpicklingError):  # torch advises to execute it
            reason = "its weights are a pickle that holds more than tensors; nothing in it was executed"
        elif not os.path.exists(source):
            reason = f"there is no such folder here, and as a Hub id: {reason}"
        raise CheckpointError(
            f"{shown!r} can't be loaded as a detector ({reason}). Give the folder of a saved model, a Hub id, "
            "or an MMDetection .pth file."
        ) from error


def _model_type(source: str) -> str | None:
    """Of the config.json beside a processor, if there is one."""
    try:
        return PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    except (OSError, ValueError):
        return None


def load_processor(source: str) -> BaseImageProcessor:
    """The image processor beside a saved detector, by its folder or Hub id.

    Raises:
        CheckpointError: if there is none, or it can't be read.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        kind, dense = type(processor).__name__, isinstance(processor, DenseDetectorImageProcessor)
        if not dense and kind not in OF_DETECTORS:
            raise ValueError(f"image_processor_type is {kind}, which is no detector's known here")
        model_type = _model_type(source)
        if model_type and dense == (model_type in FAMILIES):
            raise ValueError(f"image_processor_type is {kind}, which doesn't go with the model, {model_type}")
        return processor
    except Exception as error:  # whatever a file may hold
        text = getattr(error, "strerror", None) or without_credentials(first_line(error))
        reason = f"{type(error).__name__}: {text}"
        if isinstance(error, OSError) and not os.path.isdir(source):
            raise CheckpointError(f"the image processor of {source!r} can't be fetched ({reason}).") from error
        if "trust_remote_code" in str(error):  # transformers advises to trust the code
            reason = "it is code of the model's own, which is never run here"
        raise CheckpointError(
            f"{source!r} has no image processor that can be read (preprocessor_config.json: {reason}). Correct it, or "
            "save a new one with DenseDetectorImageProcessor.for_model(model.config).save_pretrained(...)."
        ) from error


def convert_checkpoint(
    checkpoint: str, folder: Path, section: ArchitectureSection, short_side: int, long_side: int
) -> DenseDetector:
    """Save an MMDetection checkpoint as a model and image processor of this package.

    Args:
        checkpoint: path or URL of a `.pth` file.
        folder: where to; must not hold a model.
        section: the detector's architecture.
        short_side, long_side: pixels that its images are resized to.

    Raises:
        CheckpointError: if the file can't be used, doesn't hold the section's model, or the folder is taken.
    """
    if (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds a model already: name another folder.")
    model = _convert(checkpoint, section, COCO_CLASSES)
    model.save_pretrained(folder)
    DenseDetectorImageProcessor.for_model(model.config, short_side, long_side).save_pretrained(folder)
    return model


def _convert(source: str, section: ArchitectureSection, label_names: Sequence[str]) -> DenseDetector:
    """The model in an MMDetection checkpoint, by path or URL; `label_names` if the file names no classes.

    Raises:
        CheckpointError: if the file can't be read, isn't what its name promises, or doesn't hold the section's model.
    """
    path = fetch(source, CACHE / "downloads") if "://" in source else Path(source)
    if path.is_file():
        check_hash(path)
    state, names = read_checkpoint(path)
    model = MODELS[section.detector](build_config(section, names or label_names))
    load_reference_state(model, state, source=str(path))
    return model.eval()


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(all, trained) parameters."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
