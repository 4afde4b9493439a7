"""`crosskd new`: a recipe that fits a data set: splits, classes, image sizes, length, a batch for the memory."""

import math
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data.errors import DataError
from ..data.layouts import with_layout
from ..data.load import load_split
from ..data.settings import DataSection
from ..data.split import DetectionSplit
from ..models.configuration import CONFIGS
from ..recipe.load import load_recipe
from ..utils.files import write_atomically

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

TEMPLATE = """\
# {images} images of {classes} classes to train on, {val_images} to evaluate on: {names}.
# Look at the data first:
#   crosskd check-data {recipe}
{teacher_help}# Then the student with its teacher, alone, and the two side by side:
#   accelerate launch -m crosskd_hf train {recipe}
#   accelerate launch -m crosskd_hf train {recipe} teacher=null distillation=null training.output_dir={output}_alone
#   crosskd report {output}_alone {output}
model:
{student}
teacher:
  checkpoint: {teacher}
distillation:
  methods: [{method}]
data:
{data}
training:
  output_dir: {output}
  num_train_epochs: {epochs}
  per_device_train_batch_size: {batch}
  gradient_accumulation_steps: {accumulation}
  per_device_eval_batch_size: {batch}
{optimizer}
  dataloader_num_workers: {workers}
  eval_strategy: epoch
  save_strategy: epoch
  logging_steps: 50
  seed: 0
"""
TEACHER_HELP = """\
# Train the teacher:
#   accelerate launch -m crosskd_hf train {recipe} teacher=null distillation=null {overrides}
#     training.output_dir={output}     (one line)
"""
DENSE_OPTIMIZER = """\
  base_batch_size: 16
  learning_rate: 0.01
  warmup_steps: {warmup}
  lr_milestones: [{first}, {second}]"""
QUERY_OPTIMIZER = """\
  base_batch_size: 16
  optim: adamw_torch
  learning_rate: 1.0e-4
  backbone_lr_factor: 0.5
  no_decay: norms_and_biases
  max_grad_norm: 0.1
  ema_decay: 0.999
  ema_warmup_steps: {warmup}
  warmup_steps: {warmup}
  lr_milestones: []
  group_by_orientation: false # all images have one size"""


@dataclass(frozen=True)
class Detector:
    """A detector as it is named: `gfl/resnet18.tv_in1k`, or the folder or Hub id of a saved one.

    Attributes:
        text: how it was named.
        detector, backbone: of a new dense one; None of a saved one.
    """

    text: str
    detector: str | None = None
    backbone: str | None = None

    @classmethod
    def named(cls, text: str) -> "Detector":
        """By its name. A folder goes first; else what begins with a dense detector's name is one."""
        detector, slash, backbone = text.partition("/")
        if slash and backbone and detector in CONFIGS and not Path(text).exists():
            return cls(text, detector, backbone)
        return cls(text)

    @property
    def dense(self) -> bool:
        """Whether it is known to be one of the dense detectors."""
        return self.detector is not None

    def overrides(self) -> str:
        """`section.key=value`, for a command line."""
        if self.dense:
            return f"model.detector={self.detector} model.backbone={self.backbone}"
        return f"model.pretrained={self.text}"

    def section(self) -> str:
        """The recipe's lines."""
        if self.dense:
            return f"  detector: {self.detector}\n  backbone: {self.backbone}"
        return f"  pretrained: {self.text}"


def write_recipe(path: Path, data: DataSection, student: str = STUDENT, teacher: str = TEACHER) -> list[str]:
    """Write a recipe, and check it as a run does.

    Args:
        path: of the new file.
        data: where the data is, with `train_split` and `val_split` where they can't be guessed.
        student, teacher: see `Detector`. A teacher that isn't trained yet is trained first: the recipe says how.

    Returns:
        what was found and chosen, in lines.

    Raises:
        DataError, FileNotFoundError, ValueError: there is no data to train on.
        RecipeError: the recipe can't run.
    """
    train, val, data = splits_of(data)
    pupil, master = Detector.named(student), Detector.named(teacher)
    output = f"runs/{path.stem}"
    trained = f"{output}_teacher" if master.dense else master.text
    short, long = sides(train)
    batch, accumulation = batches(short * long, len(train))
    epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(STEPS * batch * accumulation / len(train))))
    optimizer = DENSE_OPTIMIZER if pupil.dense else QUERY_OPTIMIZER
    steps = math.ceil(len(train) / (batch * accumulation)) * epochs
    help_ = TEACHER_HELP.format(recipe=path, overrides=master.overrides(), output=trained) if master.dense else ""
    names = ", ".join(train.label_names[:8]) + (", ..." if len(train.label_names) > 8 else "")
    text = TEMPLATE.format(
        recipe=path,
        images=len(train),
        val_images=len(val),
        classes=len(train.label_names),
        names=" ".join(names.split()),
        teacher_help=help_,
        teacher=trained,
        student=pupil.section(),
        method="crosskd" if pupil.dense and master.dense else "query_crosskd" if not pupil.dense else "mimic",
        data=_data_lines(data, pupil, (short, long)),
        output=output,
        epochs=epochs,
        batch=batch,
        accumulation=accumulation,
        optimizer=optimizer.format(
            warmup=min(500, max(1, steps // 10)), first=round(epochs * 2 / 3), second=round(epochs * 11 / 12)
        ),
        workers=min(4, max(1, (os.cpu_count() or 1) // 2)),
    )
    write_atomically(path, text)
    load_recipe(path, [])
    return [
        f"data       {len(train)} images of {data.train_split}, {len(val)} of {data.val_split}; {data.layout}",
        f"classes    {len(train.label_names)}: {names}",
        f"images     resized to {short} x {long} at most",
        f"training   {epochs} epochs, {steps} steps of {batch} x {accumulation} images",
        f"student    {pupil.text}",
        f"teacher    {master.text}" + (", to be trained first" if master.dense else ""),
    ]


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


def _data_lines(data: DataSection, pupil: Detector, size: tuple[int, int]) -> str:
    default, lines = DataSection(), [f"  layout: {data.layout}", f"  path: {data.path}"]
    lines += [f"  train_split: {data.train_split}", f"  val_split: {data.val_split}"]
    lines += [
        f'  {name}: "{getattr(data, name)}"'
        for name in ("annotations", "images")
        if getattr(data, name) != getattr(default, name)
    ]
    if data.box_format != default.box_format or data.box_unit != default.box_unit:
        lines += [f"  box_format: {data.box_format}", f"  box_unit: {data.box_unit}"]
    if pupil.dense:
        lines += [f"  short_side: {size[0]}", f"  long_side: {size[1]}", "  flip_probability: 0.5"]
    else:
        side = min(640, max(size))
        lines += [f"  size: [{side}, {side}]", "  augment: [photometric_distort, zoom_out, iou_crop, flip]"]
    return "\n".join([*lines, "  filter_empty: true", "  on_error: stop"])
