"""Pascal VOC's format: an XML file per image, as in VOC 2007 and 2012, or beside the images as Roboflow exports it.

Boxes there are xmin, ymin, xmax, ymax, and the first pixel is number 1: a box around the whole image is 1, 1, width,
height (VOC 2012 development kit). Objects marked as difficult don't count in evaluation; they become crowds.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from .annotation_files import Annotations, contents_hash, files_hash, images_by_stem, leaves_folder, split_of_files
from .cache import CacheDir
from .checks import ImageRecord, ObjectRecord
from .errors import DataError, Kind, Problems
from .split import DetectionSplit, no_such_split, split_and_part

LISTS, XML, IMAGES = "ImageSets/Main", "Annotations", "JPEGImages"


def load_voc(
    path: str | os.PathLike[str],
    split: str,
    *,
    label_names: Sequence[str] = (),
    first_pixel: int = 1,
    on_error: str = "stop",
    cache_dir: CacheDir = None,
) -> DetectionSplit:
    """Load one split of a data set in Pascal VOC's format.

    Args:
        path: folder with `Annotations`, `JPEGImages` and `ImageSets/Main`; or one with a folder per split, in which
            XML files lie beside the images.
        split: a list in `ImageSets/Main`, or such a folder; or a slice of it, such as "train[:80%]".
        label_names: class names by label; by default all names of the data set, sorted.
        first_pixel: 1 as in VOC, or 0 where the tool that wrote the boxes counts from 0.
        on_error: `stop` at images that can't be read and boxes that can't be, or `skip` and report them.
        cache_dir: where the Arrow file goes; by default the cache of `datasets`.

    Raises:
        FileNotFoundError: the folder is missing.
        DataError: no such split; files, images or boxes that can't be used; boxes at pixel 0 where the first is 1.
        CacheError: see `open_cache`.
    """
    split, part = split_and_part(split)
    root = Path(path).expanduser().resolve()
    files = split_files(root, split)
    # Classes are those of all splits, which must agree on their labels.
    contents = {file: file.read_bytes() for file in {*files, *(root / XML).glob("*.xml"), *root.glob("*/*.xml")}}
    relative = {file: file.relative_to(root).as_posix() for file in contents}
    ordered = sorted(contents, key=relative.__getitem__)
    fingerprint = contents_hash((relative[file], contents[file]) for file in ordered)
    if on_error == "skip":  # images that were left out may be put right later
        fingerprint += f"-{files_hash(root / IMAGES if (root / IMAGES).is_dir() else root / split)}"

    def read(problems: Problems) -> Annotations:
        trees = {file: parse_xml(contents[file], relative[file]) for file in ordered}
        names = list(label_names) or sorted({name for tree in trees.values() for name in names_in(tree)})
        if not names:
            raise DataError(f"{root} has no object of any class")
        return annotations_of({file: trees[file] for file in files}, root, names, first_pixel, problems)

    made_from = (str(root), split, tuple(label_names), first_pixel, tuple(relative[f] for f in files), fingerprint)
    found = split_of_files(
        read,
        split,
        root,
        name="voc_detection",
        where=f"{root}, split {split!r}",
        made_from=made_from,
        on_error=on_error,
        cache_dir=cache_dir,
        box_format="xyxy",
    )
    return found.part(part)


def annotations_of(
    trees: dict[Path, ElementTree.Element], root: Path, names: Sequence[str], first_pixel: int, problems: Problems
) -> Annotations:
    """The images of annotation files, with their objects.

    Args:
        trees: of each file.
        root: folder that names of files are relative to.
        names: class names by label.
        first_pixel: the number of the first pixel.
        problems: takes objects that can't be used.
    """
    images = {folder: images_by_stem(folder) for folder in {image_folder(file) for file in trees}}
    records, paths, count = [], [], 0
    for index, (file, tree) in enumerate(trees.items()):
        image = images[image_folder(file)].get(file.stem) or stated_image(file, tree)
        objects = objects_of(tree, names, first_pixel, file.relative_to(root).as_posix(), count, problems)
        count += len(objects)
        size = [_number(tree, f"size/{side}") for side in ("width", "height")]
        width, height = (int(side) if side else None for side in size)  # some tools write 0
        records.append(ImageRecord(index, image.relative_to(root).as_posix(), width, height, objects))
        paths.append(str(image))
    return Annotations(records, paths, dict(enumerate(names)))


def split_files(root: Path, split: str) -> list[Path]:
    """The XML files of a split, in the order of its list, or sorted.

    Raises:
        FileNotFoundError: the folder is missing.
        DataError: no such split, a file that it lists is missing, or it is empty.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data set folder {root} does not exist")
    lists = {file.stem: file for file in (root / LISTS).glob("*.txt")}
    folders = {file.parent.name for file in root.glob("*/*.xml")} - {XML}
    if split in lists:
        lines = lists[split].read_text(encoding="utf-8").splitlines()
        files = [root / XML / f"{line.split()[0]}.xml" for line in lines if line.strip()]
        if missing := [file.name for file in files if leaves_folder(file.stem) or not file.is_file()]:
            raise DataError(f"{lists[split]} lists {len(missing)} images without an XML file, the first {missing[0]}")
    elif split in folders:
        files = sorted((root / split).glob("*.xml"))
    else:
        raise DataError(no_such_split(root, split, sorted(lists) or sorted(folders)))
    if not files:
        raise DataError(f"{lists[split]} lists no image: the split is empty")
    return files


def parse_xml(content: bytes, name: str) -> ElementTree.Element:
    """An annotation file.

    Raises:
        DataError: it is no XML, or defines entities, which no tool writes.
    """
    if b"<!ENTITY" in content or b"<!DOCTYPE" in content:
        raise DataError(f"{name} has a document type: it is no annotation file of VOC")
    try:
        return ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise DataError(f"{name} is not an XML file: {error}") from error


def names_in(tree: ElementTree.Element) -> list[str]:
    """Class names of an image's objects."""
    return [name.text.strip() for name in tree.findall("object/name") if name.text and name.text.strip()]


def image_folder(file: Path) -> Path:
    """Where the image of an annotation file is: in `JPEGImages`, or beside it."""
    return file.parent.parent / IMAGES if file.parent.name == XML else file.parent


def stated_image(file: Path, tree: ElementTree.Element) -> Path:
    """The image that an annotation file states, where none has the file's own name."""
    stated = (tree.findtext("filename") or "").strip()
    return image_folder(file) / (stated if stated and not leaves_folder(stated) else f"{file.stem}.jpg")


def objects_of(
    tree: ElementTree.Element, names: Sequence[str], first_pixel: int, where: str, first_id: int, problems: Problems
) -> list[ObjectRecord]:
    """The objects of an image, boxes xyxy in pixels.

    Args:
        tree: of its annotation file, which messages call `where`.
        names: class names by label.
        first_pixel: the number of the first pixel.
        first_id: of the annotations.
        problems: takes objects that can't be used.
    """
    objects: list[ObjectRecord] = []
    for position, element in enumerate(tree.findall("object"), start=1):
        name, where_one = (element.findtext("name") or "").strip(), f"object {position} of {where}"
        corners = [_number(element, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        if name not in names:
            problems.add(Kind.CATEGORY, f"{where_one}: {name!r}")
        elif None in corners:
            problems.add(Kind.BOX, where_one)
        elif min(corners[:2]) < first_pixel:
            problems.add(Kind.FIRST_PIXEL, f"{where_one}: {corners}")
        else:
            box = [corners[0] - first_pixel, corners[1] - first_pixel, *corners[2:]]
            difficult = bool(_number(element, "difficult"))
            objects.append(ObjectRecord(first_id + len(objects), box, names.index(name), None, difficult))
    return objects


def _number(element: ElementTree.Element, path: str) -> float | None:
    """The finite number at a path; None where there is none."""
    try:
        value = float(element.findtext(path) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
