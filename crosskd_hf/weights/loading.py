"""Detectors and their image processors from folders, the Hub, and MMDetection checkpoints."""

import copy
import hashlib
import logging
import os
import pickle
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel

from ..models import CONFIGS, MODELS
from ..models.architecture import ArchitectureSection, build_config
from ..models.base import DenseDetector
from ..models.image_processing import DenseDetectorImageProcessor
from ..utils.files import CacheError, cache_explained, replacing, sha256
from ..utils.label_names import COCO_CLASSES, coco_spelling, loosely, near_matches, spelling_problem
from ..utils.redact import public_url, without_credentials
from .download import check_hash, fetch
from .mmdet import CheckpointError, check_finite, first_line, load_reference_state, read_checkpoint

logger = logging.getLogger(__name__)
CACHE = Path(HF_HOME) / "crosskd_hf"
PICKLES = (".pth", ".pt", ".pkl", ".bin", ".ckpt")
# What a run itself writes beside a model.
RUN_FILES = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler)\.pt|rng_state.*\.pth")


def for_labels(model: DenseDetector, label_names: Sequence[str]) -> DenseDetector:
    """A detector for other classes: everything is kept but the class predictor, which is new.

    Args:
        model: a trained detector.
        label_names: of the data that it is to be trained on; if they are its own, it is returned as it is, but that
            COCO's are spelt as the data does.

    Raises:
        CheckpointError: its classes are the data's, but for case, blanks, underscores or hyphens.
    """
    own, given = model.config.label_names, list(label_names)
    if coco_spelling(own) == coco_spelling(given):
        model.config.id2label = dict(enumerate(given))
        model.config.label2id = {name: label for label, name in enumerate(given)}
        return model
    near = near_matches(coco_spelling(own), coco_spelling(given))
    if near and list(map(loosely, own)) == list(map(loosely, given)):  # others would be replaced anyhow
        raise CheckpointError(f"the checkpoint and the data have {spelling_problem(near, 'checkpoint', 'data')}.")
    logger.warning(
        "the checkpoint knows %d classes (%s, ...), the data has %d (%s, ...): its class predictor is replaced by a "
        "new one, which has to be trained",
        *(len(own), ", ".join(own[:3]), len(label_names), ", ".join(label_names[:3])),
    )
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: label for label, name in enumerate(label_names)}
    new = type(model)(config)
    kept = {name: value for name, value in model.state_dict().items() if "cls_predictor" not in name}
    missing, unexpected = new.load_state_dict(kept, strict=False)
    assert not unexpected and all("cls_predictor" in name for name in missing), (missing, unexpected)
    return new


def load_backbone_weights(model: DenseDetector, path: str) -> None:
    """Fill the backbone from a file with timm's or torchvision's names (`.safetensors` or `.pth`), or from its URL.

    Raises:
        CheckpointError: if the file can't be read, a key of the backbone is missing or has another shape, or weights
            aren't finite.
    """
    if "://" in path:
        with PartialState().local_main_process_first():
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
    body = model.backbone.body
    own = body.state_dict()
    # timm's feature extractors say layers_0 for what its whole models call layers.0.
    given = {key.replace(".", "_"): value for key, value in state.items()}
    state = {key: given[name] for key in own if (name := key.replace(".", "_")) in given}
    wrong = [k for k, v in own.items() if "num_batches" not in k and (k not in state or state[k].shape != v.shape)]
    if wrong:
        raise CheckpointError(
            f"{path} doesn't hold the weights of {model.config.backbone}: {len(wrong)} keys are missing or have "
            f"another shape, such as {', '.join(wrong[:3])}."
        )
    check_finite(state, path)
    body.load_state_dict(state, strict=False)


def load_detector(source: str, section: ArchitectureSection | None, label_names: Sequence[str]) -> DenseDetector:
    """A detector from a folder, a Hub id, or an MMDetection `.pth` by path or URL (converted once and cached).

    Args:
        source: where it is.
        section: the architecture that a `.pth` has; a saved model has its own.
        label_names: the classes of a `.pth` that doesn't name them.

    Raises:
        CheckpointError: if it can't be read, isn't one of this package's detectors, lacks weights, has some that
            aren't finite, or its configuration holds what no detector can be built with.
    """
    if source.endswith(".pth"):
        return _load_reference(source, section, label_names)
    shown = public_url(source) if "://" in source else source
    hint = _check_folder(Path(source).expanduser(), shown)
    _check_config(source, shown)
    model, info = _load_saved(source, shown, hint)
    if not isinstance(model, DenseDetector):
        raise CheckpointError(
            f"{shown!r} is a {type(model).__name__}; only the dense detectors of this package can be used."
        )
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
    check_finite(model.state_dict(), repr(shown))
    return model


def _load_reference(source: str, section: ArchitectureSection | None, label_names: Sequence[str]) -> DenseDetector:
    shown = public_url(source) if "://" in source else source
    if section is None:
        raise CheckpointError(f"{shown!r} doesn't say which detector it holds: name it in a recipe instead.")
    # One process of each machine downloads and converts, the others then find the result.
    with PartialState().local_main_process_first():
        folder = converted(_local_file(source), section, label_names)
    model = AutoModelForObjectDetection.from_pretrained(folder, trust_remote_code=False)
    check_finite(model.state_dict(), repr(shown))  # an earlier version may have converted it
    return model


def _local_file(source: str) -> Path:
    """The file of a path or URL, downloaded if need be, compared with the hash in its name if there is one."""
    path = fetch(source, CACHE / "downloads") if "://" in source else Path(source)
    if path.is_file():
        check_hash(path)
    return path


def _check_folder(folder: Path, shown: str) -> str:
    """Refuse what is no folder of a saved model, if it isn't a Hub id.

    Returns:
        what to do with a pickle that lies in the folder, for a message; else nothing.

    Raises:
        CheckpointError: it is a file, isn't there, or holds no config.json.
    """
    if folder.is_file():
        raise CheckpointError(
            f"{shown!r} is a file, but a detector is a folder with config.json and model.safetensors. "
            + _to_model(folder)
        )
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    pickles = [path for path in files if path.suffix in PICKLES and not RUN_FILES.fullmatch(path.name)]
    hint = f" It holds {pickles[0].name}, which isn't a model's file. {_to_model(pickles[0])}" if pickles else ""
    if folder.is_absolute() or (folder.parent != Path() and folder.parent.is_dir()):
        if not folder.is_dir():  # before the Hub is asked for it, again and again
            raise CheckpointError(f"{shown!r} can't be loaded as a detector: there is no such folder.")
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{shown!r} can't be loaded as a detector: that folder holds no config.json."
                + (hint or " If a run writes to it, it isn't finished.")
            )
    return hint


def _load_saved(source: str, shown: str, hint: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """transformers' model of a folder or Hub id, and what it says of the weights' names and shapes."""
    try:
        return AutoModelForObjectDetection.from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `load_detector` tells them, with the shapes
            trust_remote_code=False,
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{shown!r} can't be loaded as a detector: its weights are a pickle that holds more than tensors. "
            "Nothing in it was executed. Get the model as safetensors, from a source that you trust."
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ValueError) and (problem := _foreign_type(source)):
            raise CheckpointError(f"{shown!r} can't be loaded as a detector: {problem}") from error
        reason = without_credentials(first_line(error))
        absent = "" if os.path.exists(source) else "there is no such folder here, and as a Hub id: "
        without_weights = "no file named" in reason
        if without_weights and Path(source).expanduser().is_dir():
            absent = "its weights are missing: "
        raise CheckpointError(
            f"{shown!r} can't be loaded as a detector ({absent}{reason}). Give the folder of a saved model, a Hub id, "
            f"or an MMDetection .pth file.{hint if without_weights else ''}"
        ) from error


def _to_model(path: Path) -> str:
    """How the weights in a file become a model of this package."""
    return (
        f"If {path.name} is an MMDetection checkpoint, let its name end with .pth and give its path. If it holds the "
        "weights of a model of this package, read them with torch.load(..., weights_only=True), or load_file of "
        "safetensors.torch, put them into the model with load_state_dict, and save it with save_pretrained."
    )


def _check_config(source: str, shown: str) -> None:
    """Raise CheckpointError if the config.json of a folder or Hub id describes no detector that can be built."""
    try:
        try:
            content = PreTrainedConfig.get_config_dict(source)[0]
        except (OSError, ValueError):
            return  # loading tells what is wrong
        own = {config.model_type: config for config in CONFIGS.values()}
        if content.get("model_type") in own:
            names = own[content["model_type"]].from_dict(content).label_names
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"id2label gives several labels the same name, such as {twice[0]!r}")
    except Exception as error:  # whatever a file may hold
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{shown!r} can't be loaded as a detector (config.json: {reason})") from error


def _foreign_type(source: str) -> str | None:
    """What is wrong with the model type of a folder or Hub id; None if nothing is, or it isn't known."""
    try:
        model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    except (OSError, ValueError):
        return None
    own = [config.model_type for config in CONFIGS.values()]
    if model_type in own:
        return None
    return (
        f"its model type, {model_type!r}, isn't one of this package's ({', '.join(own)}). Code that a model brings is "
        "never run here."
    )


def load_processor(source: str) -> DenseDetectorImageProcessor:
    """The image processor beside a saved detector, by its folder or Hub id.

    Raises:
        CheckpointError: if there is none, or it can't be read.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        if not isinstance(processor, DenseDetectorImageProcessor):
            raise ValueError(f"image_processor_type is {type(processor).__name__}, which isn't this package's")
        return processor
    except Exception as error:  # whatever a file may hold
        text = getattr(error, "strerror", None) or without_credentials(first_line(error))
        reason = f"{type(error).__name__}: {text}"
        if isinstance(error, OSError) and not os.path.isdir(source):
            raise CheckpointError(f"the image processor of {source!r} can't be fetched ({reason}).") from error
        if "trust_remote_code" in str(error):  # transformers advises to trust the code
            reason = "it is code of the model's own, which is never run here"
        raise CheckpointError(
            f"{source!r} has no image processor that can be read (preprocessor_config.json: {reason}). Save it beside "
            "the model with DenseDetectorImageProcessor.for_model(model.config).save_pretrained(...)."
        ) from error


def converted(path: Path, section: ArchitectureSection, label_names: Sequence[str]) -> Path:
    """Folder with the converted checkpoint; made on the first call, found again by the content's hash after that.

    Raises:
        CheckpointError: if the file doesn't hold the section's model.
    """
    state, names = read_checkpoint(path)
    config = build_config(section, names or label_names)
    key = hashlib.sha256(config.to_json_string(use_diff=False).encode())
    key.update(bytes.fromhex(sha256(path)))
    folder = CACHE / "converted" / f"{path.stem}-{key.hexdigest()[:16]}"
    if (folder / "config.json").is_file():
        return folder
    model = MODELS[section.detector](config)
    load_reference_state(model, state, source=str(path))
    try:
        with cache_explained(CACHE, "HF_HOME"), replacing(folder) as unfinished:
            model.save_pretrained(unfinished)
            DenseDetectorImageProcessor.for_model(config).save_pretrained(unfinished)
    except CacheError:
        if not (folder / "config.json").is_file():  # else another process was faster
            raise
    return folder


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
    path = _local_file(checkpoint)
    state, names = read_checkpoint(path)
    config = build_config(section, names or COCO_CLASSES)
    model = MODELS[section.detector](config)
    load_reference_state(model, state, source=str(path))
    model.save_pretrained(folder)
    DenseDetectorImageProcessor.for_model(config, short_side, long_side).save_pretrained(folder)
    return model


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
