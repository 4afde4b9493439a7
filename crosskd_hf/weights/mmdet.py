"""MMDetection checkpoints -> this package. Nothing in a `.pth` file is ever executed."""

import contextlib
import pickle
import pickletools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..models.base import DenseDetector
from ..models.swin import merge_order
from ..utils.label_names import coco_spelling
from ..utils.messages import first_line, listed

# What the names of each detector's prediction convolutions begin with; they end with the second dictionary's.
PREFIXES = {"crosskd_gfl": "gfl", "crosskd_retinanet": "retina", "crosskd_fcos": "conv", "crosskd_atss": "atss"}
PREDICTORS = {"cls_predictor": "cls", "box_predictor": "reg", "centerness_predictor": "centerness"}
# Buffers a checkpoint may hold that carry nothing: counters and constants that are computed here.
IGNORED_KEYS = re.compile(
    r".*\.num_batches_tracked|bbox_head\.integral\.project|.*\.relative_position_index|data_preprocessor\..*"
)
LEGACY_FCOS = re.compile(r"^bbox_head\.fcos_(cls|reg|centerness)\.")
# Packages whose objects MMDetection 3.x leaves beside the weights. They become inert stand-ins; nothing is imported.
FOREIGN_PACKAGES = ("mmengine", "mmcv", "mmdet", "numpy")
# getattr: how mmengine's HistoryBuffer pickles its own methods; as a stand-in it looks nothing up.
FOREIGN_NAMES = ("_codecs.encode", "builtins.getattr")
# Magic number, protocol, platform, content: the pickles of the format before torch 1.6.
LEGACY_PICKLES = 4


class CheckpointError(ValueError):
    """A checkpoint that can't be used, with what is wrong and what to do."""


def reference_key(key: str, model: DenseDetector) -> str:
    """MMDetection's name of one of this package's parameters or buffers."""
    prefix = PREFIXES[model.config.model_type]
    num_laterals = len(model.fpn.lateral_convs)
    rules = (
        (r"backbone\.norms\.(\d+)\.(.+)", lambda m: f"backbone.norm{int(m[1]) + 1}.{m[2]}"),
        (r"backbone\.body\.(.+)", lambda m: f"backbone.{_swin_key(m[1]) if model.backbone.is_swin else m[1]}"),
        (r"fpn\.lateral_convs\.(\d+)\.(.+)", lambda m: f"neck.lateral_convs.{m[1]}.conv.{m[2]}"),
        (r"fpn\.output_convs\.(\d+)\.(.+)", lambda m: f"neck.fpn_convs.{m[1]}.conv.{m[2]}"),
        (r"fpn\.extra_convs\.(\d+)\.(.+)", lambda m: f"neck.fpn_convs.{int(m[1]) + num_laterals}.conv.{m[2]}"),
        (r"head\.(cls|reg)_tower\.(\d+)\.conv\.(.+)", lambda m: f"bbox_head.{m[1]}_convs.{m[2]}.conv.{m[3]}"),
        (r"head\.(cls|reg)_tower\.(\d+)\.norm\.(.+)", lambda m: f"bbox_head.{m[1]}_convs.{m[2]}.gn.{m[3]}"),
        (r"head\.(\w+_predictor)\.(.+)", lambda m: f"bbox_head.{prefix}_{PREDICTORS[m[1]]}.{m[2]}"),
        (r"head\.scales\.(\d+)", lambda m: f"bbox_head.scales.{m[1]}.scale"),
    )
    for pattern, name in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return name(match)
    raise KeyError(f"{key} has no counterpart in MMDetection")


SWIN_NAMES = (
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"layers_(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
    (r"layers_(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.attn\.", ".attn.w_msa."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
)


def _swin_key(key: str) -> str:
    for pattern, name in SWIN_NAMES:
        key = re.sub(pattern, name, key)
    return key


def from_reference(key: str, value: Tensor) -> Tensor:
    """A reference tensor in this package's order: Swin's patch merging numbers the four neighbours differently."""
    if re.fullmatch(r"backbone\.body\.layers_\d+\.downsample\.(norm\..*|reduction\.weight)", key):
        return value[..., merge_order(value.shape[-1] // 4)]
    return value


def to_reference(key: str, value: Tensor) -> Tensor:
    """Inverse of `from_reference`."""
    if re.fullmatch(r"backbone\.body\.layers_\d+\.downsample\.(norm\..*|reduction\.weight)", key):
        return value[..., torch.tensor(merge_order(value.shape[-1] // 4)).argsort()]
    return value


def reference_keys(model: DenseDetector) -> dict[str, str]:
    """Our state key -> MMDetection's, for every tensor that carries values."""
    return {key: reference_key(key, model) for key in model.state_dict() if not IGNORED_KEYS.fullmatch(key)}


def load_reference_state(model: DenseDetector, state: dict[str, Tensor], source: str = "the checkpoint") -> None:
    """Copy an MMDetection state dict into a model, using every key exactly once.

    Raises:
        CheckpointError: listing missing, unexpected and mis-shaped keys, or those that hold NaN or infinity.
    """
    names = reference_keys(model)
    model_state = model.state_dict()
    state = {LEGACY_FCOS.sub(r"bbox_head.conv_\1.", key): value for key, value in state.items()}
    missing = sorted(set(names.values()) - set(state))
    unexpected = sorted(key for key in set(state) - set(names.values()) if not IGNORED_KEYS.fullmatch(key))
    misshaped = [
        f"{name}: {tuple(state[name].shape)}, the model has {tuple(model_state[key].shape)}"
        for key, name in names.items()
        if name in state and state[name].shape != model_state[key].shape
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
    check_finite({name: state[name] for name in names.values()}, source)
    values = {key: from_reference(key, state[name]).to(model_state[key].dtype) for key, name in names.items()}
    model.load_state_dict(values, strict=False)


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that hold NaN or infinity, and negative variances of a BatchNorm.

    Args:
        state: parameters and buffers by name.
        source: what they were read from.

    Raises:
        CheckpointError: naming the tensors.
    """
    wrong = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if wrong:
        raise CheckpointError(
            f"{source} holds NaN or infinity in {len(wrong)} of {len(state)} tensors: {listed(wrong, 3)}. It "
            "is damaged, or of a run that diverged: fetch it again, or take an earlier checkpoint."
        )
    negative = [name for name, value in state.items() if name.endswith("running_var") and (value < 0).any()]
    if negative:
        raise CheckpointError(
            f"{source} holds negative variances, of which the square root is NaN: {listed(negative, 3)}. It is "
            "damaged: fetch it again, or take an earlier checkpoint."
        )


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
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise _refusal(path, [refused[1]]) from error
        # torch advises to read it without that.
        reason = "it is no such file." if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise CheckpointError(
            f"checkpoint {path} can't be read safely (weights_only=True): {reason} "
            "It is damaged, incomplete, or holds objects other than weights; fetch it again from its publisher."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    ):
        raise CheckpointError(f"checkpoint {path} holds no state dict of tensors.")
    return dict(state), _class_names(content.get("meta"))


def _class_names(meta: object) -> tuple[str, ...] | None:
    """Class names from a checkpoint's `meta`: `CLASSES` in 2.x, `dataset_meta.classes` (any case) in 3.x.

    COCO's are spelt as COCO does.
    """
    if not isinstance(meta, dict):
        return None
    dataset = meta.get("dataset_meta")
    for place in (meta, dataset if isinstance(dataset, dict) else {}):
        for key, names in place.items():
            if isinstance(key, str) and key.lower() == "classes" and isinstance(names, (list, tuple)):
                return tuple(coco_spelling([str(name) for name in names]))
    return None


@contextlib.contextmanager
def _inert_foreign_classes(path: Path) -> Iterator[None]:
    """Let the unpickler build empty stand-ins for MMDetection's own classes, and for nothing else."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch lists only zip files
        # Of an older one the names that need a stand-in are found here; the loader refuses all others.
        names = [name for name in _names_in_legacy_file(path) if _is_foreign(name)]
    refused = [name for name in names if not _is_foreign(name)]
    if refused:
        raise _refusal(path, refused)
    with torch.serialization.safe_globals([(_stand_in(name), name) for name in names]):
        yield


def _refusal(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} refused: besides weights it names {', '.join(sorted(names))}, which MMDetection never "
        "stores; loading it could run code. Nothing was executed. Get the file from its publisher."
    )


def _is_foreign(name: str) -> bool:
    return name.split(".")[0] in FOREIGN_PACKAGES or name in FOREIGN_NAMES


def _names_in_legacy_file(path: Path) -> set[str]:
    """What the pickles of a `_use_new_zipfile_serialization=False` file name, read without running them."""
    names = set()
    try:
        with open(path, "rb") as file:
            for _ in range(LEGACY_PICKLES):
                for opcode, argument, _ in pickletools.genops(file):
                    if opcode.name == "GLOBAL":
                        names.add(re.sub(r"^__builtin__\.", "builtins.", argument.replace(" ", ".")))
    except Exception:  # damaged, or no checkpoint: the loader says so
        pass
    return names


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
