"""Tiny models and data sets for tests of the training machinery."""

import contextlib
import copy
import io
import json
import os
import signal
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from crosskd_hf.data.coco import load_coco
from crosskd_hf.data.split import DetectionSplit
from crosskd_hf.models import CONFIGS, MODELS, DenseDetector
from crosskd_hf.training.arguments import DetectionTrainingArguments

LABELS = {0: "cat", 1: "dog"}
DRAWN: OrderedDict[str, tuple[DenseDetector, torch.Tensor]] = OrderedDict()  # models and the random state after them


def tiny_model(detector: str = "gfl", seed: int = 0, **options) -> DenseDetector:
    """A detector with 32 channels on a ResNet-18, its weights drawn so that activations stay near unit scale.

    A copy of its own for each caller: drawing takes five times as long as copying, so the last eight are kept.
    """
    key = repr((detector, seed, sorted(options.items())))
    if key not in DRAWN:
        DRAWN[key] = draw_model(detector, seed, options), torch.get_rng_state()
    DRAWN.move_to_end(key)
    if len(DRAWN) > 8:
        DRAWN.popitem(last=False)
    model, random_state = DRAWN[key]
    torch.set_rng_state(random_state)
    return copy.deepcopy(model)


def draw_model(detector: str, seed: int, options: dict) -> DenseDetector:
    """The model itself."""
    torch.manual_seed(seed)
    settings = {
        "backbone": "resnet18",
        "fpn_channels": 32,
        "head_channels": 32,
        "frozen_stages": 1,
        "id2label": LABELS,
    }
    model = MODELS[detector](CONFIGS[detector](**{**settings, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                gain = 0.3 if name.startswith("backbone") else 1.0
                scale = gain * (2 / parameter[0].numel()) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.head.cls_predictor.bias.fill_(-2.0)
    return model


def tiny_batch(images: int = 2, height: int = 64, width: int = 96, seed: int = 0) -> dict:
    """Random images without padding, one to three boxes each, as DETR has them."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for i in range(images):
        count = i % 3 + 1
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width / 2, height / 2])
        size = 16 + torch.rand(count, 2, generator=generator) * 24
        classes = torch.randint(0, 2, (count,), generator=generator)
        boxes = torch.cat([corner + size / 2, size], dim=1) / torch.tensor([width, height] * 2)
        labels.append({"boxes": boxes, "class_labels": classes})
    return {"pixel_values": torch.randn(images, 3, height, width, generator=generator), "labels": labels}


def tiny_split(folder: Path, images: int = 5, name: str = "mini") -> DetectionSplit:
    """A COCO layout of noise images with one or two boxes each, loaded."""
    write_tiny_coco(folder, images, name)
    return load_coco(folder, name, cache_dir=str(folder / "cache"))


def write_tiny_coco(folder: Path, images: int = 5, name: str = "mini") -> None:
    """Noise images of several sizes with one or two boxes each, in COCO layout.

    What is there already stays untouched, so that a process may call this while another reads what it wrote.
    """
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / name).mkdir(exist_ok=True)
    content: dict = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    for i in range(1, images + 1):
        width, height = (96, 64) if i % 2 else (64, 90)
        pixels = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(pixels).resize((width, height)).save(encoded, "png")
        write_if_changed(folder / name / f"{i}.png", encoded.getvalue())
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        for j in range(1 + i % 2):
            box = [5 + 10 * j, 8, 30 + i, 25 + j]
            record = {"id": 10 * i + j, "image_id": i, "category_id": 3 if j else 7, "bbox": box}
            content["annotations"].append(record | {"area": box[2] * box[3], "iscrowd": 0})
    write_if_changed(folder / "annotations" / f"instances_{name}.json", json.dumps(content).encode())


def write_tiny_recipe(folder: Path, **training) -> Path:
    """A recipe of CrossKD, GFL -> GFL, on five noise images, three steps; and the images."""
    write_tiny_coco(folder / "data")
    small = {"backbone": "resnet18", "fpn_channels": 32, "head_channels": 32}
    splits = {"path": str(folder / "data"), "train_split": "mini", "val_split": "mini"}
    steps = {"max_steps": 3, "warmup_steps": 0, "learning_rate": 1e-4, "save_strategy": "no", "logging_steps": 1}
    content = {
        "model": {"detector": "gfl", "backbone_weights": "random", **small},
        "teacher": {"checkpoint": "random", "detector": "gfl", **small},
        "distillation": {"crosskd": {"tap_index": 3}},
        "data": {**splits, "short_side": 64, "long_side": 96, "cache_dir": str(folder / "cache")},
        "training": {"output_dir": str(folder / "run"), "use_cpu": True, "disable_tqdm": True, **steps, **training},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def write_if_changed(path: Path, content: bytes) -> None:
    """Writes a file whole, in one move, unless it has this content."""
    if path.is_file() and path.read_bytes() == content:
        return
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)


def tiny_args(output: Path, **options) -> DetectionTrainingArguments:
    """A few steps on the CPU."""
    settings = {
        "output_dir": str(output),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "base_batch_size": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }
    return DetectionTrainingArguments(**{**settings, **options})


def tiny_processor(model: DenseDetector):
    """Images of at most 96 x 64 pixels."""
    from crosskd_hf.models.image_processing import DenseDetectorImageProcessor

    size = {"shortest_edge": 64, "longest_edge": 96}
    return DenseDetectorImageProcessor(size=size, nms_threshold=model.config.nms_threshold)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What is longer, in bytes, can't be written, as on a full disk."""
    resource = pytest.importorskip("resource")
    previous, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)


def filled(model: DenseDetector) -> DenseDetector:
    """The model with weights that no initialisation gives, all of them different."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return model


def reference_state(model: DenseDetector) -> OrderedDict[str, torch.Tensor]:
    """What MMDetection would have saved of the same model: its names, and buffers that carry nothing."""
    from crosskd_hf.weights.mmdet import reference_keys, to_reference

    values = model.state_dict()
    state = OrderedDict((name, to_reference(key, values[key]).clone()) for key, name in reference_keys(model).items())
    state["backbone.bn1.num_batches_tracked"] = torch.tensor(7)
    state["bbox_head.integral.project"] = torch.arange(17.0)
    return state


def assert_equal_weights(module: torch.nn.Module, other: torch.nn.Module) -> None:
    """Parameters and buffers are equal, but for counters of batches."""
    state, expected = module.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        if "num_batches_tracked" not in key:
            assert torch.equal(state[key], tensor), key
