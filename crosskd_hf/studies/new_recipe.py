"""`crosskd new`: a recipe that fits a data set: splits, classes, image sizes, length, a batch for the memory."""

import copy
import math
import os
import shlex
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from transformers import AutoConfig

from ..data.errors import DataError
from ..data.layouts import with_layout
from ..data.load import load_split
from ..data.settings import DataSection
from ..data.split import DetectionSplit
from ..models.configuration import CONFIGS
from ..models.families import is_dense
from ..recipe.load import parse_recipe
from ..utils.escaping import printable
from ..utils.files import write_atomically
from ..utils.messages import first_line
from ..utils.redact import without_credentials

TRAIN_NAMES = ("train", "train2017", "training", "trainval")
VAL_NAMES = ("val", "valid", "validation", "val2017", "dev", "test")
LARGEST = (800, 1333)  # pixels that images are resized to at most: as published
MULTIPLE = 32  # of sides
STEPS = 6000  # of optimizer steps, about: what small data sets take to converge from pretrained backbones
FEWEST_EPOCHS, MOST_EPOCHS = 12, 100  # 12: as published
BATCH = 16  # images a step, as published; at most this many per device
# Of a CrossKD step, R101 -> R50 at 800 x 1333: measured with `benchmarks/precision_and_memory.py`.
GIGABYTES_PER_IMAGE = 5.0
PIXELS = 800 * 1333
STUDENT, TEACHER = "gfl/resnet18.tv_in1k", "gfl/resnet50.tv_in1k"

COMMAND = "accelerate launch -m crosskd_hf train"
HEADER = """\
# {images} images of {classes} classes to train on, {val_images} to evaluate on: {names}.
# Look at the data first:
#   crosskd check-data {recipe}
{teacher_help}# Then the student alone, and with its teacher: the second run's report has both.
#   accelerate launch -m crosskd_hf train {recipe} teacher=null distillation=null training.output_dir={output}_alone
#   accelerate launch -m crosskd_hf train {recipe}
"""
TEACHER_HELP = """\
# Train the teacher:
#   {command} {recipe} teacher=null distillation=null {overrides} training.output_dir={output}
"""


@dataclass(frozen=True)
class Detector:
    """A detector as it is named: `gfl/resnet18.tv_in1k`, or the folder or Hub id of a saved one.

    Attributes:
        text: how it was named.
        dense: whether it is one of the dense detectors.
        detector, backbone: of a new one; None of a saved one.
    """

    text: str
    dense: bool
    detector: str | None = None
    backbone: str | None = None

    @classmethod
    def named(cls, text: str) -> "Detector":
        """By its name. A folder goes first; else what begins with a dense detector's name is one.

        Raises:
            ValueError: timm has no such backbone, or no configuration can be read.
        """
        detector, slash, backbone = text.partition("/")
        if slash and backbone and detector in CONFIGS and not Path(text).exists():
            if not timm.is_model(backbone.partition(".")[0]):
                raise ValueError(f"timm has no backbone {backbone!r} (of {text}): see timm.list_models()")
            return cls(text, True, detector, backbone)
        try:
            config = AutoConfig.from_pretrained(text, trust_remote_code=False)
        except Exception as error:  # whatever a file may hold
            raise ValueError(
                f"{text!r} is no DETECTOR/BACKBONE ({', '.join(CONFIGS)}), and no folder or Hub id of a detector "
                f"that can be read ({without_credentials(first_line(error))})"
            ) from error
        return cls(text, is_dense(config))

    @property
    def new(self) -> bool:
        """Whether it isn't trained yet."""
        return self.detector is not None

    def section(self) -> dict[str, str]:
        """The recipe's section `model`."""
        if self.detector is None or self.backbone is None:
            return {"pretrained": self.text}
        return {"detector": self.detector, "backbone": self.backbone}


def write_recipe(path: Path, data: DataSection, student: str = STUDENT, teacher: str = TEACHER) -> list[str]:
    """Write a recipe, checked as a run does it.

    Args:
        path: of the new file.
        data: where the data is, with `train_split` and `val_split` where they can't be guessed. What differs from the
            defaults is kept.
        student, teacher: see `Detector`. A teacher that isn't trained yet is trained first: the recipe says how.

    Returns:
        what was found and chosen, in lines.

    Raises:
        DataError, FileNotFoundError, ValueError: there is no data to train on, or no such detector.
        RecipeError: the recipe can't run. Nothing is written.
    """
    pupil, master = Detector.named(student), Detector.named(teacher)
    train, val, data = splits_of(data)
    default = DataSection()
    short, long = sides(train)
    size = (
        short if data.short_side == default.short_side else data.short_side,
        long if data.long_side == default.long_side else data.long_side,
    )
    batch, accumulation = batches(size[0] * size[1], len(train))
    epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(STEPS * batch * accumulation / len(train))))
    steps = math.ceil(len(train) / (batch * accumulation)) * epochs
    output = f"runs/{path.stem}"
    trained = f"{output}_teacher" if master.new else master.text
    method = ("crosskd" if pupil.dense else "query_crosskd") if pupil.dense == master.dense else "soft_boxes"
    content = {
        "model": pupil.section(),
        "teacher": {"checkpoint": trained},
        "distillation": {"methods": [method]},
        "data": _data_section(data, pupil, size),
        "training": {
            "output_dir": output,
            "num_train_epochs": epochs,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "per_device_eval_batch_size": batch,
            **_optimizer(pupil, epochs, min(500, max(1, steps // 10))),
            "dataloader_num_workers": min(4, max(1, (os.cpu_count() or 1) // 2)),
            **{"eval_strategy": "epoch", "save_strategy": "epoch", "logging_steps": 50, "seed": 0},
        },
    }
    parse_recipe(copy.deepcopy(content), str(path))
    names = printable(", ".join(train.label_names[:8]) + (", ..." if len(train.label_names) > 8 else ""))
    counts = {"images": len(train), "classes": len(train.label_names), "val_images": len(val), "names": names}
    header = HEADER.format(**counts, **_commands(path, output, trained, master))
    write_atomically(path, header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return [
        f"data       {len(train)} images of {data.train_split}, {len(val)} of {data.val_split}; {data.layout}",
        f"classes    {len(train.label_names)}: {names}",
        f"images     resized to {size[0]} x {size[1]} at most",
        f"training   {epochs} epochs, {steps} steps of {batch} x {accumulation} images",
        f"student    {pupil.text}",
        f"teacher    {master.text}" + (", to be trained first" if master.new else ""),
        f"method     {method}",
    ]


def _commands(path: Path, output: str, trained: str, master: Detector) -> dict[str, str]:
    """What the header's commands name, quoted for a shell, and how to train a new teacher."""
    quoted = {name: printable(shlex.quote(str(word))) for name, word in (("recipe", path), ("output", output))}
    overrides = " ".join(f"model.{name}={value}" for name, value in master.section().items())
    first = TEACHER_HELP.format(
        command=COMMAND, recipe=quoted["recipe"], overrides=overrides, output=printable(shlex.quote(trained))
    )
    return {**quoted, "teacher_help": first if master.new else ""}


def splits_of(data: DataSection) -> tuple[DetectionSplit, DetectionSplit, DataSection]:
    """The two splits, and the section with their names.

    Raises:
        DataError, FileNotFoundError, ValueError: none of the usual names is a split; the last one's error.
    """
    default = DataSection()
    trains = TRAIN_NAMES if data.train_split == default.train_split else (data.train_split,)
    vals = VAL_NAMES if data.val_split == default.val_split else (data.val_split,)
    train_name, train = _first_split(data, trains)
    val_name, val = _first_split(replace(data, train_split=train_name), vals)
    return train, val, with_layout(replace(data, train_split=train_name, val_split=val_name))


def _first_split(data: DataSection, names: tuple[str, ...]) -> tuple[str, DetectionSplit]:
    errors = []
    for name in names:
        try:
            return name, load_split(replace(data, train_split=name, val_split=name), name)
        except (FileNotFoundError, DataError, ValueError) as error:
            errors.append(error)
    # What the data itself has against it says more than that a name isn't there.
    raise next((error for error in errors if isinstance(error, DataError)), errors[0])


def sides(split: DetectionSplit) -> tuple[int, int]:
    """(short, long) pixels: those of the median image, rounded up, and no more than published."""
    table = split.dataset.with_format("arrow", columns=["width", "height"])[:].to_pydict()
    pairs = [sorted(pair) for pair in zip(table["width"], table["height"], strict=True)]
    short, long = (statistics.median(sides) for sides in zip(*pairs, strict=True))
    shrink = min(1.0, LARGEST[0] / short, LARGEST[1] / long)
    if shrink < 1:
        return LARGEST
    return tuple(math.ceil(side / MULTIPLE) * MULTIPLE for side in (short, long))  # type: ignore[return-value]


def batches(pixels: int, images: int) -> tuple[int, int]:
    """Images per device, and batches that are accumulated, for the memory of this machine's device."""
    needed = GIGABYTES_PER_IMAGE * pixels / PIXELS
    batch = max(1, min(BATCH, int(_gigabytes() / needed), images))
    batch = 2 ** int(math.log2(batch))
    wanted = min(BATCH, 2 ** int(math.log2(max(1, images // 8))))  # an epoch of a few images has some steps, too
    return batch, max(1, wanted // batch)


def _gigabytes() -> float:
    """Of the device that trains; of a machine without a GPU half the memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1] / 2**30 * 0.9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 / 2


def _data_section(data: DataSection, pupil: Detector, size: tuple[int, int]) -> dict[str, Any]:
    """What differs from the defaults, and sizes and augmentation where the user says nothing of them."""
    given, default = asdict(data), asdict(DataSection())
    section = {name: given[name] for name in ("layout", "path", "train_split", "val_split")}
    if pupil.dense:
        section |= {"short_side": size[0], "long_side": size[1]}
    else:
        side = min(640, max(size))
        section |= {"size": [side, side], "augment": ["photometric_distort", "zoom_out", "iou_crop", "flip"]}
    return section | {name: value for name, value in given.items() if value != default[name]}


def _optimizer(pupil: Detector, epochs: int, warmup: int) -> dict[str, Any]:
    """SGD as published for dense detectors; AdamW as the authors of D-FINE and RT-DETR fine-tune."""
    if pupil.dense:
        milestones = [round(epochs * 2 / 3), round(epochs * 11 / 12)]
        return {"base_batch_size": 16, "learning_rate": 0.01, "warmup_steps": warmup, "lr_milestones": milestones}
    return {
        **{"base_batch_size": 16, "optim": "adamw_torch", "learning_rate": 1e-4, "backbone_lr_factor": 0.5},
        **{"no_decay": "norms_and_biases", "max_grad_norm": 0.1, "ema_decay": 0.999, "ema_warmup_steps": warmup},
        **{"warmup_steps": warmup, "lr_milestones": [], "group_by_orientation": False},
    }
