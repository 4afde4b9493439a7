"""One split of a detection data set, whatever it was read from."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from .errors import DataError, Problems


@dataclass(frozen=True)
class DetectionSplit:
    """One split of a detection data set.

    Attributes:
        dataset: columns `image_id`, `image` (decoded when read), `file_name`, `width`, `height` (pixels, as people see
            the image) and `objects`, a dict of equally long lists: `id`, `bbox` ([x, y, w, h], absolute pixels),
            `category` (label 0..C-1), `area` (pixels^2), `iscrowd`.
        label_names: the C class names, by label.
        category_ids: the C COCO category ids, by label.
        problems: what was wrong with the whole split; with `on_error="skip"` it is left out.
        name: the split's name, and `source` the folder or Hub id that it was read from; "" if not known.
    """

    dataset: datasets.Dataset
    label_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    problems: Problems = field(default_factory=Problems)
    name: str = ""
    source: str = ""

    @property
    def id2label(self) -> dict[int, str]:
        """Label -> class name, as a transformers config takes it."""
        return dict(enumerate(self.label_names))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset)

    def first(self, count: int | None) -> "DetectionSplit":
        """The first images; all if `count` is None."""
        if count is None or count >= len(self):
            return self
        return replace(self, dataset=self.dataset.select(range(count)))

    def part(self, part: str) -> "DetectionSplit":
        """The images of a slice such as "[:80%]"; all if it is empty text.

        Raises:
            DataError: see `take_part`.
        """
        return replace(self, dataset=take_part(self.dataset, part), name=f"{self.name}{part}")


def split_and_part(name: str) -> tuple[str, str]:
    """A split's own name and the slice of it: "train[:80%]" -> ("train", "[:80%]"); "train" -> ("train", "").

    Raises:
        DataError: a bracket is missing.
    """
    if re.search(r"[\[\]]", re.sub(r"\[[^\[\]]*\]", "", name)):
        raise DataError(f"the split {name!r} lacks a bracket of its slice; write it as train[:80%] or train[100:200]")
    match = re.fullmatch(r"(.+?)(\[[^\[\]]*\])", name)
    return (match[1], match[2]) if match else (name, "")


def take_part(dataset: datasets.Dataset, part: str) -> datasets.Dataset:
    """The rows of a slice as `datasets` writes it: "[:80%]", "[100:200]", "[-5:]"; all if it is empty text.

    Raises:
        DataError: it is no slice, or there is no row in it.
    """
    if not part:
        return dataset
    try:
        (part_rows,) = datasets.ReadInstruction.from_spec(f"rows{part}").to_absolute({"rows": len(dataset)})
    except (ValueError, AssertionError) as error:
        text = f"{part} is no slice of {len(dataset)} images ({error}); write it as [:80%] or [100:200]"
        raise DataError(text) from error
    rows = range(part_rows.from_, part_rows.to)
    if not rows:
        raise DataError(f"the slice {part} of {len(dataset)} images is empty: it has no image")
    return dataset.select(rows)


def no_such_split(where: object, split: str, there: Sequence[str]) -> str:
    """The message for a split that isn't there: which are, and how to do without one."""
    if not there:
        return f"{where} has no split {split!r}, and no other"
    base = "train" if "train" in there else there[0]
    return (
        f"{where} has no split {split!r}; it has {', '.join(there)}. Without a split to evaluate on, divide one: "
        f"'data.train_split={base}[:80%]' 'data.val_split={base}[80%:]'"
    )


def detection_features(names: Sequence[str]) -> datasets.Features:
    """The columns of a `DetectionSplit` with these class names."""
    return datasets.Features({**annotation_features(names), "image": datasets.Image()})


def annotation_features(names: Sequence[str]) -> datasets.Features:
    """The columns of a `DetectionSplit` but the images."""
    return datasets.Features(
        {
            "image_id": datasets.Value("int64"),
            "file_name": datasets.Value("string"),
            "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
            "objects": {
                "id": datasets.List(datasets.Value("int64")),
                "bbox": datasets.List(datasets.List(datasets.Value("float64"), length=4)),
                "category": datasets.List(datasets.ClassLabel(names=list(names))),
                "area": datasets.List(datasets.Value("float64")),
                "iscrowd": datasets.List(datasets.Value("bool")),
            },
        }
    )


def keep_for_training(split: DetectionSplit, *, filter_empty: bool = True, min_image_side: int = 32) -> DetectionSplit:
    """Leave out the images that the published training leaves out. No image is decoded.

    Args:
        split: the split to filter; it is not changed.
        filter_empty: drop images without any annotation. One with only crowd boxes stays, as background.
        min_image_side: drop images whose shorter side is below this, in pixels.

    Raises:
        ValueError: no image is left.
    """
    # Arrow columns, not `Dataset.filter`: this is one vectorised pass, and leaves no cache file for ranks to race for.
    columns: pa.Table = split.dataset.with_format("arrow", columns=["width", "height", "objects"])[:]
    keep = pc.greater_equal(pc.min_element_wise(columns["width"], columns["height"]), min_image_side)
    if filter_empty:
        number_of_objects = pc.list_value_length(pc.struct_field(columns["objects"], "id"))
        keep = pc.and_(keep, pc.greater(number_of_objects, 0))
    indices = pc.indices_nonzero(keep)
    if len(indices) == 0:
        raise ValueError(
            f"none of the {len(split.dataset)} images is left for training: each is narrower than {min_image_side} "
            "pixels (data.min_image_side) or has no box; lower that, check the boxes, or set data.filter_empty=false"
        )
    return replace(split, dataset=split.dataset.select(indices.to_pylist()))
