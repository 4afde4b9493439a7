"""MMDetection checkpoints -> this package. Nothing in a `.pth` file is ever executed."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .models.modeling_dense import DenseDetector

PREDICTORS = {
    "crosskd_gfl": {"cls_predictor": "gfl_cls", "box_predictor": "gfl_reg"},
}
# Buffers a checkpoint may hold that carry nothing: counters and constants that are computed here.
IGNORED_KEYS = re.compile(
    r".*\.num_batches_tracked|bbox_head\.integral\.project|.*\.relative_position_index|data_preprocessor\..*"
)
# Packages whose objects MMDetection 3.x leaves beside the weights. They become inert stand-ins; nothing is imported.
FOREIGN_PACKAGES = ("mmengine", "mmcv", "mmdet", "numpy")
FOREIGN_NAMES = ("_codecs.encode",)
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[^.]+$")


class CheckpointError(ValueError):
    """A checkpoint that can't be used, with what is wrong and what to do."""


def reference_key(key: str, model: DenseDetector) -> str:
    """MMDetection's name of one of this package's parameters or buffers."""
    predictors = PREDICTORS[model.config.model_type]
    num_laterals = len(model.fpn.lateral_convs)
    rules = (
        (r"backbone\.body\.(.+)", lambda m: f"backbone.{m[1]}"),
        (r"fpn\.lateral_convs\.(\d+)\.(.+)", lambda m: f"neck.lateral_convs.{m[1]}.conv.{m[2]}"),
        (r"fpn\.output_convs\.(\d+)\.(.+)", lambda m: f"neck.fpn_convs.{m[1]}.conv.{m[2]}"),
        (r"fpn\.extra_convs\.(\d+)\.(.+)", lambda m: f"neck.fpn_convs.{int(m[1]) + num_laterals}.conv.{m[2]}"),
        (r"head\.(cls|reg)_tower\.(\d+)\.conv\.(.+)", lambda m: f"bbox_head.{m[1]}_convs.{m[2]}.conv.{m[3]}"),
        (r"head\.(cls|reg)_tower\.(\d+)\.norm\.(.+)", lambda m: f"bbox_head.{m[1]}_convs.{m[2]}.gn.{m[3]}"),
        (r"head\.(\w+_predictor)\.(.+)", lambda m: f"bbox_head.{predictors[m[1]]}.{m[2]}"),
        (r"head\.scales\.(\d+)", lambda m: f"bbox_head.scales.{m[1]}.scale"),
    )
    for pattern, name in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return name(match)
    raise KeyError(f"{key} has no counterpart in MMDetection")


def reference_keys(model: DenseDetector) -> dict[str, str]:
    """Our state key -> MMDetection's, for every tensor that carries values."""
    return {key: reference_key(key, model) for key in model.state_dict() if not IGNORED_KEYS.fullmatch(key)}


def load_reference_state(model: DenseDetector, state: dict[str, Tensor], source: str = "the checkpoint") -> None:
    """Copy an MMDetection state dict into a model, using every key exactly once.

    Raises:
        CheckpointError: listing missing, unexpected and mis-shaped keys.
    """
    names = reference_keys(model)
    own = model.state_dict()
    missing = sorted(set(names.values()) - set(state))
    unexpected = sorted(key for key in set(state) - set(names.values()) if not IGNORED_KEYS.fullmatch(key))
    misshaped = [
        f"{name}: {tuple(state[name].shape)}, the model has {tuple(own[key].shape)}"
        for key, name in names.items()
        if name in state and state[name].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {title} keys:\n    " + "\n    ".join(keys[:10] + ["..."] * (len(keys) > 10))
        for title, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{source} doesn't hold this model ({model.config.model_type}, {model.config.backbone}, "
            f"{model.config.num_labels} labels); check the recipe's architecture fields.\n  " + "\n  ".join(problems)
        )
    model.load_state_dict({key: state[name].to(own[key].dtype) for key, name in names.items()}, strict=False)


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """State dict, and class names if there are any, of an MMDetection 2.x or 3.x `.pth` file, read with
    `weights_only=True`.

    Raises:
        CheckpointError: for a file that is missing, damaged, holds no state dict, or names code outside
            MMDetection's own packages. Such a file is refused before anything in it is looked at.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} doesn't exist.")
    try:
        with _inert_foreign_classes(path):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path} can't be read safely (weights_only=True): {str(error).splitlines()[0]} "
            "It is damaged, incomplete, or holds objects other than weights; fetch it again from its publisher."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"checkpoint {path} holds no state dict of tensors.")
    return dict(state), _class_names(content.get("meta"))


def _class_names(meta: object) -> tuple[str, ...] | None:
    """Class names from a checkpoint's `meta`: `CLASSES` in 2.x, `dataset_meta.classes` (any case) in 3.x."""
    if not isinstance(meta, dict):
        return None
    dataset = meta.get("dataset_meta")
    for place in (meta, dataset if isinstance(dataset, dict) else {}):
        for key, names in place.items():
            if isinstance(key, str) and key.lower() == "classes" and isinstance(names, (list, tuple)):
                return tuple(map(str, names))
    return None


@contextlib.contextmanager
def _inert_foreign_classes(path: Path) -> Iterator[None]:
    """Let the unpickler build empty stand-ins for MMDetection's own classes, and for nothing else."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a pre-1.6 file, which torch can't list: the loader itself refuses what it doesn't know
        names = []
    refused = [n for n in names if n.split(".")[0] not in FOREIGN_PACKAGES and n not in FOREIGN_NAMES]
    if refused:
        raise CheckpointError(
            f"checkpoint {path} refused: besides weights it names {', '.join(refused)}, which MMDetection never "
            "stores; loading it could run code. Nothing was executed. Get the file from its publisher."
        )
    with torch.serialization.safe_globals([(_stand_in(name), name) for name in names]):
        yield


def _stand_in(name: str) -> type:
    """An empty class that swallows whatever state it is given."""

    class StandIn:
        def __new__(cls, *args, **kwargs):
            return object.__new__(cls)

        def __init__(self, *args, **kwargs):
            pass

        def __setstate__(self, state):
            pass

    StandIn.__name__ = StandIn.__qualname__ = name.rsplit(".", 1)[-1]
    return StandIn


def check_hash(path: str | Path) -> None:
    """Compare a file with the hash in its name (`...-dd12f847.pth`: the first digits of its SHA-256).

    Raises:
        CheckpointError: if they differ. A name without a hash is taken as it is.
    """
    path = Path(path)
    match = HASH_IN_NAME.search(path.name)
    if not match:
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(match[1]):
        raise CheckpointError(
            f"{path} has SHA-256 {digest.hexdigest()[: len(match[1])]}..., but its name promises {match[1]}: the download "
            "is damaged or the file was changed. Delete it and fetch it again."
        )


def fetch(url: str, folder: str | Path) -> Path:
    """Download a checkpoint once into `folder`, checking the hash in its name; returns its path.

    Raises:
        CheckpointError: if the address can't be reached or the content doesn't match the hash.
    """
    folder = Path(folder)
    target = folder / url.rsplit("/", 1)[-1]
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"partial-{target.name}")
        try:
            torch.hub.download_url_to_file(url, str(partial), progress=False)
            check_hash(partial)
            partial.replace(target)
        except OSError as error:
            raise CheckpointError(
                f"{url} can't be fetched ({error}). Without network, download it elsewhere and give its path instead."
            ) from error
        finally:
            partial.unlink(missing_ok=True)
    check_hash(target)
    return target
