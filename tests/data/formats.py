"""One small data set in the formats that are read: the same images, boxes and classes in each."""

import json
import shutil
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import datasets
import numpy as np
import yaml
from PIL import Image

CLASSES = ("cat", "dog")
# Image -> size as it is stored, EXIF orientation, boxes (class, xmin, ymin, width, height) of the upright image.
SCENES: dict[str, tuple[tuple[int, int], int, list[tuple[int, int, int, int, int]]]] = {
    "a": ((96, 64), 1, [(0, 10, 7, 33, 21), (1, 50, 30, 40, 30)]),
    "b": ((64, 96), 6, [(1, 3, 5, 60, 40)]),  # lies on its side: people see 96 x 64
    "c": ((70, 90), 1, []),
    "d": ((90, 90), 1, [(0, 1, 1, 88, 87)]),
}


def write_image(folder: Path, name: str) -> Path:
    """A JPEG file."""
    size, orientation, _ = SCENES[name]
    pixels = np.random.default_rng(ord(name)).integers(0, 255, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jpg"
    Image.fromarray(pixels).resize(size).save(file, quality=95, exif=exif)
    return file


def upright_size(name: str) -> tuple[int, int]:
    """Width and height as people see the image."""
    size, orientation, _ = SCENES[name]
    return size[::-1] if orientation == 6 else size


def write_coco(root: Path) -> None:
    content: dict = {"images": [], "annotations": []}
    content["categories"] = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    for index, name in enumerate(SCENES):
        file, (width, height) = write_image(root / "train", name), upright_size(name)
        content["images"].append({"id": index, "file_name": file.name, "width": width, "height": height})
        for label, *box in SCENES[name][2]:
            number = len(content["annotations"])
            record = {"id": number, "image_id": index, "category_id": label + 1, "bbox": box}
            content["annotations"].append({**record, "area": box[2] * box[3]})
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))


def write_roboflow_coco(root: Path) -> None:
    write_coco(root)
    (root / "annotations" / "instances_train.json").rename(root / "train" / "_annotations.coco.json")
    (root / "annotations").rmdir()


def write_yolo(root: Path) -> None:
    for name, (_, _, boxes) in SCENES.items():
        write_image(root / "images" / "train", name)
        width, height = upright_size(name)
        lines = [
            f"{c} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}" for c, x, y, w, h in boxes
        ]
        (root / "labels" / "train").mkdir(parents=True, exist_ok=True)
        if lines:  # an image without a label file has no box
            (root / "labels" / "train" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    content = {"path": ".", "train": "images/train", "val": "images/train", "names": dict(enumerate(CLASSES))}
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def write_roboflow_yolo(root: Path) -> None:
    write_yolo(root)
    for kind in ("images", "labels"):
        (root / kind / "train").rename(root / f"{kind}2")
        (root / kind).rmdir()
    (root / "train").mkdir()
    for kind in ("images", "labels"):
        (root / f"{kind}2").rename(root / "train" / kind)
    content = {"train": "../train/images", "val": "../train/images", "nc": 2, "names": list(CLASSES)}
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def xml_of(name: str) -> str:
    tree = ElementTree.Element("annotation")
    ElementTree.SubElement(tree, "filename").text = f"{name}.jpg"
    size = ElementTree.SubElement(tree, "size")
    for side, value in zip(("width", "height"), upright_size(name), strict=True):
        ElementTree.SubElement(size, side).text = str(value)
    for label, x, y, w, h in SCENES[name][2]:
        element = ElementTree.SubElement(tree, "object")
        ElementTree.SubElement(element, "name").text = CLASSES[label]
        box = ElementTree.SubElement(element, "bndbox")
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h), strict=True):
            ElementTree.SubElement(box, side).text = str(value)
    return ElementTree.tostring(tree, encoding="unicode")


def write_voc(root: Path) -> None:
    (root / "Annotations").mkdir(parents=True)
    for name in SCENES:
        write_image(root / "JPEGImages", name)
        (root / "Annotations" / f"{name}.xml").write_text(xml_of(name))
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n".join(SCENES) + "\n")


def write_roboflow_voc(root: Path) -> None:
    for name in SCENES:
        write_image(root / "train", name)
        (root / "train" / f"{name}.xml").write_text(xml_of(name))


def rows(folder: Path) -> list[dict]:
    """Of the columns `image` and `objects`."""
    return [
        {
            "image": {"path": None, "bytes": write_image(folder, name).read_bytes()},
            "image_id": index,
            "objects": {"bbox": [list(box) for _, *box in boxes], "category": [label for label, *_ in boxes]},
        }
        for index, (name, (_, _, boxes)) in enumerate(SCENES.items())
    ]


def in_memory(folder: Path) -> datasets.Dataset:
    """The columns as a data set; images are written to a folder on the way."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "image_id": datasets.Value("int64"),
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
                "category": datasets.List(datasets.ClassLabel(names=list(CLASSES))),
            },
        }
    )
    return datasets.Dataset.from_list(rows(folder), features=features)


def write_parquet(root: Path) -> None:
    root.mkdir()
    in_memory(root / "images").to_parquet(str(root / "train-00000-of-00001.parquet"))
    shutil.rmtree(root / "images")


def write_flat_parquet(root: Path) -> None:
    """`boxes` and `labels` are columns of their own, as xyxy."""
    root.mkdir()
    content = in_memory(root / "images").to_list()
    flat = []
    for row in content:
        boxes = [[x, y, x + w, y + h] for x, y, w, h in row["objects"]["bbox"]]
        names = [CLASSES[label] for label in row["objects"]["category"]]
        flat.append({"picture": row["image"], "boxes": boxes, "names": names})
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "boxes": datasets.List(datasets.List(datasets.Value("float32"))),
            "names": datasets.List(datasets.Value("string")),
        }
    )
    datasets.Dataset.from_list(flat, features=features).to_parquet(str(root / "train-00000-of-00001.parquet"))
    shutil.rmtree(root / "images")


def write_webdataset(root: Path) -> None:
    """A tar file of images and JSON files."""
    with tarfile.open(root.with_name("made.tar"), "w") as tar:
        for name, (_, _, boxes) in SCENES.items():
            file = write_image(root, name)
            content = {"boxes": [box for _, *box in boxes], "labels": [CLASSES[label] for label, *_ in boxes]}
            file.with_suffix(".json").write_text(json.dumps(content))
            for member in (file, file.with_suffix(".json")):
                tar.add(member, member.name)
    shutil.rmtree(root)
    root.mkdir()
    root.with_name("made.tar").rename(root / "train-000000.tar")


WRITERS = {
    "coco": write_coco,
    "Roboflow coco": write_roboflow_coco,
    "yolo": write_yolo,
    "Roboflow yolo": write_roboflow_yolo,
    "voc": write_voc,
    "Roboflow voc": write_roboflow_voc,
    "datasets": write_parquet,
    "flat datasets": write_flat_parquet,
    "webdataset datasets": write_webdataset,
}
# Further settings that a format needs.
SETTINGS = {
    "flat datasets": {"columns": {"image": "picture", "boxes": "boxes", "labels": "names"}, "box_format": "xyxy"},
    "webdataset datasets": {"columns": {"image": "jpg", "boxes": "json.boxes", "labels": "json.labels"}},
}
