"""COCO-format annotations as a memory-mapped Arrow dataset of image paths and boxes."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

SPLIT_NAME = "images"  # one annotation file is one split: its COCO name need not be a valid `datasets` split name

Record = dict[str, Any]


@dataclass(frozen=True)
class DetectionSplit:
    """One split of a detection data set.

    Attributes:
        dataset: columns `image_id`, `image` (decoded when read), `file_name`, `width`, `height` (pixels) and
            `objects`, a dict of equally long lists: `id`, `bbox` ([x, y, w, h], absolute pixels, as in the file),
            `category` (label 0..C-1), `area` (pixels^2), `iscrowd`.
        label_names: the C class names, by label.
        category_ids: the C COCO category ids, by label, in increasing order.
    """

    dataset: datasets.Dataset
    label_names: tuple[str, ...]
    category_ids: tuple[int, ...]

    @property
    def id2label(self) -> dict[int, str]:
        """Label -> class name, as a transformers config takes it."""
        return dict(enumerate(self.label_names))

    @property
    def label2id(self) -> dict[str, int]:
        """Class name -> label, as a transformers config takes it."""
        return {name: label for label, name in self.id2label.items()}


@dataclass
class CocoConfig(datasets.BuilderConfig):
    """What one Arrow cache is made from; any change gives another cache.

    Attributes:
        annotation_file: absolute path of the JSON file.
        image_dir: absolute path of the folder that `file_name` is relative to.
        fingerprint: size and modification time of the file, so that an edited file is read again.
    """

    annotation_file: str = ""
    image_dir: str = ""
    fingerprint: str = ""


@dataclass(frozen=True)
class CocoAnnotations:
    """A checked annotation file: images in the file's order, their annotations by image id, the categories by id."""

    images: list[Record]
    annotations: dict[int, list[Record]]
    categories: dict[int, str]


class CocoDetection(datasets.GeneratorBasedBuilder):
    """Writes a COCO annotation file to Arrow: paths instead of pixels, see `DetectionSplit` for the columns.

    The file is parsed once, by one process: `datasets` holds a file lock while it writes. Later calls, and the other
    ranks, map the Arrow file. Raises ValueError for a file that is not sound, naming the record.
    """

    VERSION = datasets.Version("1.0.0")  # part of the cache's path: raise it whenever the columns change
    BUILDER_CONFIG_CLASS = CocoConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()  # the class names are known once the file is read

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        # Checked here and not while the examples are written, where `datasets` would hide the error inside its own.
        content = read_annotations(Path(self.config.annotation_file))
        check_image_files(content.images, Path(self.config.image_dir), Path(self.config.annotation_file))
        self.info.features = _features(list(content.categories.values()))
        # The one free text that is saved beside the Arrow file and read back with it.
        self.info.description = json.dumps({"category_ids": list(content.categories)})
        return [datasets.SplitGenerator(name=SPLIT_NAME, gen_kwargs={"content": content})]

    def _generate_examples(self, content: CocoAnnotations) -> Iterator[tuple[int, Record]]:
        labels = {category_id: label for label, category_id in enumerate(content.categories)}
        for image in content.images:
            objects = content.annotations.get(image["id"], [])
            yield (
                image["id"],
                {
                    "image_id": image["id"],
                    "image": {"path": os.path.join(self.config.image_dir, image["file_name"]), "bytes": None},
                    "file_name": image["file_name"],
                    "width": image["width"],
                    "height": image["height"],
                    "objects": {
                        "id": [obj["id"] for obj in objects],
                        "bbox": [obj["bbox"] for obj in objects],
                        "category": [labels[obj["category_id"]] for obj in objects],
                        "area": [obj["area"] for obj in objects],
                        "iscrowd": [obj["iscrowd"] for obj in objects],
                    },
                },
            )


def load_coco(
    path: str | os.PathLike[str],
    split: str,
    *,
    annotations: str = "annotations/instances_{split}.json",
    images: str = "{split}",
    cache_dir: str | os.PathLike[str] | None = None,
) -> DetectionSplit:
    """Load one split of a data set in COCO layout, from the Arrow cache when its annotation file has not changed.

    Args:
        path: folder that holds the annotations and the images.
        split: name put in place of `{split}` in the two patterns, such as "train2017".
        annotations: annotation file, relative to `path`.
        images: image folder, relative to `path`.
        cache_dir: where the Arrow file goes; by default the cache of `datasets`.

    Raises:
        FileNotFoundError: the folder, the annotation file, the image folder or an image in it is missing.
        ValueError: the annotation file is not sound (see `read_annotations`).
    """
    root = Path(path).expanduser().resolve()
    annotation_file = root / annotations.format(split=split)
    image_dir = root / images.format(split=split)
    hint = "data.path should be the folder that holds annotations/ and the image folders"
    if not root.is_dir():
        raise FileNotFoundError(f"data set folder {root} does not exist; {hint}")
    if not annotation_file.is_file():
        raise FileNotFoundError(f"annotation file {annotation_file} does not exist; {hint}")
    if not image_dir.is_dir():
        raise FileNotFoundError(f"image folder {image_dir} does not exist; {hint}")

    status = annotation_file.stat()
    builder = CocoDetection(
        cache_dir=None if cache_dir is None else str(cache_dir),
        dataset_name="coco_detection",
        annotation_file=str(annotation_file),
        image_dir=str(image_dir),
        fingerprint=f"{status.st_size}-{status.st_mtime_ns}",
    )
    builder.download_and_prepare()
    dataset = builder.as_dataset(split=SPLIT_NAME)
    return DetectionSplit(
        dataset=dataset,
        label_names=tuple(dataset.features["objects"]["category"].feature.names),
        category_ids=tuple(json.loads(dataset.info.description)["category_ids"]),
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
            "pixels or has no annotation; check the annotation file, or set filter_empty=False"
        )
    return DetectionSplit(split.dataset.select(indices.to_pylist()), split.label_names, split.category_ids)


def read_annotations(path: Path) -> CocoAnnotations:
    """Read and check a COCO annotation file; segmentations are dropped while it is parsed.

    An annotation without `iscrowd` is no crowd, one without `area` gets the area of its box.

    Raises:
        ValueError: no JSON, a missing list or key, no image or category, a duplicate id, an annotation of an unknown
            image or category, a box that is not four finite numbers, a `file_name` outside the image folder.
    """
    try:
        with path.open("rb") as file:
            content = json.load(file, object_hook=_without_segmentation)
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    missing = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(content, dict) or not isinstance(content.get(key), list)
    ]
    if missing:
        raise ValueError(f"{path} has no list {', '.join(missing)}: it is not a COCO instances file")
    categories = _check_categories(content["categories"], path)
    images = _check_images(content["images"], path)
    annotations = _check_annotations(content["annotations"], {image["id"] for image in images}, categories, path)
    return CocoAnnotations(images, annotations, categories)


def check_image_files(images: list[Record], image_dir: Path, annotation_file: Path) -> None:
    """Raise FileNotFoundError if an image is missing: better now, once, than in the middle of an epoch."""
    missing = [image for image in images if not os.path.isfile(os.path.join(image_dir, image["file_name"]))]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(images)} images that {annotation_file} lists are not in {image_dir}, "
            f"the first is {missing[0]['file_name']} (image id {missing[0]['id']})"
        )


def _features(names: list[str]) -> datasets.Features:
    return datasets.Features(
        {
            "image_id": datasets.Value("int64"),
            "image": datasets.Image(),
            "file_name": datasets.Value("string"),
            "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
            "objects": {
                "id": datasets.List(datasets.Value("int64")),
                "bbox": datasets.List(datasets.List(datasets.Value("float64"), length=4)),
                "category": datasets.List(datasets.ClassLabel(names=names)),
                "area": datasets.List(datasets.Value("float64")),
                "iscrowd": datasets.List(datasets.Value("bool")),
            },
        }
    )


def _without_segmentation(record: Record) -> Record:
    # The polygons are most of COCO's 450 MB, and no detector here reads them.
    record.pop("segmentation", None)
    return record


def _integer(record: Any, key: str, where: str) -> int:
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        raise ValueError(f"{where}: {key} must be an integer, got {value!r}")
    return int(value)


def _check_categories(records: list[Record], path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for position, record in enumerate(records):
        category_id = _integer(record, "id", f"{path}: category number {position}")
        if not isinstance(record.get("name"), str):
            raise ValueError(f"{path}: category {category_id} has no name")
        if category_id in names:
            raise ValueError(f"{path}: category id {category_id} appears twice")
        if record["name"] in names.values():
            raise ValueError(f"{path}: two categories are named {record['name']!r}; rename one of them")
        names[category_id] = record["name"]
    if not names:
        raise ValueError(f"{path} lists no categories")
    return dict(sorted(names.items()))


def _check_images(records: list[Record], path: Path) -> list[Record]:
    images = {}
    for position, record in enumerate(records):
        image_id = _integer(record, "id", f"{path}: image number {position}")
        where = f"{path}: image {image_id}"
        if image_id in images:
            raise ValueError(f"{path}: image id {image_id} appears twice; image ids must be unique")
        width, height = _integer(record, "width", where), _integer(record, "height", where)
        if min(width, height) < 1:
            raise ValueError(f"{where}: width and height must be at least 1, got {width} x {height}")
        file_name = record.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            raise ValueError(f"{where}: file_name must be the image's path in the image folder, got {file_name!r}")
        if any(p.is_absolute() or ".." in p.parts for p in (PurePosixPath(file_name), PureWindowsPath(file_name))):
            raise ValueError(f"{where}: file_name {file_name!r} leaves the image folder; make it relative, without ..")
        images[image_id] = {"id": image_id, "file_name": file_name, "width": width, "height": height}
    if not images:
        raise ValueError(f"{path} lists no images")
    return list(images.values())


def _check_annotations(
    records: list[Record], image_ids: set[int], categories: dict[int, str], path: Path
) -> dict[int, list[Record]]:
    by_image: dict[int, list[Record]] = {}
    seen: set[int] = set()
    for position, record in enumerate(records):
        annotation_id = _integer(record, "id", f"{path}: annotation number {position}")
        where = f"{path}: annotation {annotation_id}"
        if annotation_id in seen:
            raise ValueError(f"{path}: annotation id {annotation_id} appears twice; annotation ids must be unique")
        seen.add(annotation_id)
        image_id, category_id = _integer(record, "image_id", where), _integer(record, "category_id", where)
        if image_id not in image_ids:
            raise ValueError(f"{where} is of image {image_id}, which is not in the list of images")
        if category_id not in categories:
            raise ValueError(f"{where} is of category {category_id}, which is not in the list of categories")
        bbox = record.get("bbox")
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_finite, bbox)):
            raise ValueError(f"{where}: bbox must be four finite numbers [x, y, width, height], got {bbox!r}")
        area = record.get("area", bbox[2] * bbox[3])
        if not _is_finite(area):
            raise ValueError(f"{where}: area must be a finite number, got {area!r}")
        by_image.setdefault(image_id, []).append(
            {
                "id": annotation_id,
                "bbox": bbox,
                "category_id": category_id,
                "area": area,
                "iscrowd": bool(record.get("iscrowd", 0)),
            }
        )
    return by_image


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
