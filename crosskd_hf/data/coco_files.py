"""A split written in COCO layout, whatever it was read from."""

import json
from pathlib import Path
from typing import Any

import datasets

from ..utils.files import write_atomically
from ..utils.images import IMAGE_EXTENSIONS
from .annotation_files import leaves_folder
from .split import DetectionSplit


def write_coco(split: DetectionSplit, folder: Path, name: str) -> int:
    """Write `annotations/instances_NAME.json`, and the image files as they are into `NAME/`.

    Args:
        split: whose images are undecoded files or bytes.
        folder: of the data set.
        name: of the split.

    Returns:
        the number of images.

    Raises:
        OSError: the files can't be written.
    """
    content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    ids = split.category_ids
    content["categories"] = [{"id": i, "name": n} for i, n in zip(ids, split.label_names, strict=True)]
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    names = split.dataset["file_name"][:]
    are_names = len(set(names)) == len(names) and not any(map(leaves_folder, names))
    number = 0
    for row in split.dataset.cast_column("image", datasets.Image(decode=False)):
        image = row["image"]
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        stem = row["file_name"] if are_names else str(row["image_id"])
        file_name = stem if Path(stem).suffix.lower() in IMAGE_EXTENSIONS else f"{stem}{_extension(data)}"
        file = folder / name / file_name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        size = {"width": row["width"], "height": row["height"]}
        content["images"].append({"id": row["image_id"], "file_name": file_name, **size})
        objects = row["objects"]
        for box, label, area, crowd in zip(
            *(objects[k] for k in ("bbox", "category", "area", "iscrowd")), strict=True
        ):
            number += 1
            where = {"id": number, "image_id": row["image_id"], "category_id": ids[label]}
            content["annotations"].append({**where, "bbox": box, "area": area, "iscrowd": int(crowd)})
    write_atomically(folder / "annotations" / f"instances_{name}.json", json.dumps(content))
    return len(content["images"])


def _extension(data: bytes) -> str:
    """Of an image whose name has none: one of the two formats that data sets hold."""
    return ".png" if data.startswith(b"\x89PNG") else ".jpg"
