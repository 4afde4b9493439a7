"""Image files by name, folder and pattern, and their ids in COCO results."""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from ..utils.escaping import file_name, printable
from ..utils.images import IMAGE_EXTENSIONS
from ..utils.label_names import coco_spelling
from ..utils.messages import first_line
from ..weights.download import fetch
from ..weights.mmdet import CheckpointError

URLS = ("http://", "https://")
PICTURE_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


class PredictionError(ValueError):
    """Predictions that can't be made or written, and what to do about it."""


@dataclass(frozen=True)
class ImageEntry:
    """What an image is called in the results. `size` is the annotated (width, height), where there is one."""

    image_id: int
    file_name: str
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Annotated:
    """Images and category ids of a COCO file: its images by `file_name`, its category ids by name."""

    images: Mapping[str, ImageEntry]
    category_ids: Mapping[str, int]


def find_images(sources: Sequence[str], recursive: bool = False) -> list[Path]:
    """The image files that sources name, sorted and each once.

    Args:
        sources: image files; folders, whose images are taken; and glob patterns, in which `**` stands for folders.
            Folders and patterns find names that end as `IMAGE_EXTENSIONS` do, in any case, and don't begin with a dot.
        recursive: take the images in folders of folders, too.

    Raises:
        PredictionError: a source that matches no image, or a folder that can't be listed.
    """
    images = {os.path.abspath(path): path for source in reversed(sources) for path in _matches(source, recursive)}
    return sorted(images.values())


def fetch_images(sources: Sequence[str], folder: Path) -> list[str]:
    """Sources as they are, except for URLs: those are downloaded once, and the files take their places.

    Args:
        sources: see `find_images`.
        folder: of downloaded files; made when there are some.

    Raises:
        PredictionError: an address can't be reached.
    """
    try:
        return [str(fetch(source, folder)) if source.startswith(URLS) else source for source in sources]
    except CheckpointError as error:
        raise PredictionError(str(error)) from None  # what it hides of the URL stays hidden


def number_images(names: Sequence[str]) -> list[ImageEntry]:
    """Image ids without an annotation file.

    They are the file names' stems if all of them are different whole numbers (000000397133.jpg is image 397133), as in
    COCO; otherwise 1, 2, ... in the order of the names.
    """
    stems = [PurePath(name).stem for name in names]
    numbers = [int(stem) for stem in stems if re.fullmatch("[0-9]+", stem)]
    ids = numbers if len(set(numbers)) == len(names) else range(1, len(names) + 1)
    return [ImageEntry(image_id, name) for image_id, name in zip(ids, names, strict=True)]


def read_annotated(path: str | os.PathLike[str]) -> Annotated:
    """The images and the categories of a COCO instances file. Its annotations are not looked at.

    Raises:
        PredictionError: the file is missing, no JSON or no COCO file, or lists a name twice.
    """
    try:
        with open(path, "rb") as file:
            content = json.load(file)
    except OSError as error:
        raise PredictionError(f"the annotation file {path} can't be read ({words(error)}).") from error
    except (ValueError, RecursionError) as error:
        raise PredictionError(f"the annotation file {path} is no JSON ({error}).") from error
    try:
        images = [ImageEntry(i["id"], i["file_name"], (i["width"], i["height"])) for i in content["images"]]
        categories = [(category["name"], category["id"]) for category in content["categories"]]
    except (KeyError, TypeError) as error:
        raise PredictionError(
            f"{path} is no COCO instances file: it needs a list of images with id, file_name, width and height, and a "
            f"list of categories with id and name ({type(error).__name__}: {error})."
        ) from error
    names = {"file_name": [image.file_name for image in images], "category": [name for name, _ in categories]}
    for what, values in names.items():
        if len(set(values)) < len(values):
            twice = Counter(values).most_common(1)[0][0]
            raise PredictionError(f"{path} lists the {what} {twice!r} twice, so that its id is open.")
    return Annotated({image.file_name: image for image in images}, dict(categories))


def match_images(paths: Sequence[Path], annotated: Annotated) -> list[ImageEntry]:
    """The annotated image of each file.

    A file is the image whose `file_name` is the end of its path; of several, the longest.

    Raises:
        PredictionError: a file that isn't annotated, or two files of one image.
    """
    entries, owners = [], {}
    for path in paths:
        parts = Path(os.path.abspath(path)).parts[1:]
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        entry = next((annotated.images[end] for end in ends if end in annotated.images), None)
        if entry is None:
            raise PredictionError(
                f"{printable(path)} is not an image of the annotation file: no file_name in it is the end of this "
                "path. Leave the image out, or name the annotation file that lists it."
            )
        if (first := owners.setdefault(entry.file_name, path)) is not path:
            raise PredictionError(
                f"{printable(first)} and {printable(path)} are both {entry.file_name!r} of the annotation file."
            )
        entries.append(entry)
    return entries


def category_ids_of(id2label: Mapping[int, str], annotated: Annotated | None) -> dict[int, int]:
    """The COCO category id of each label."""
    if annotated is None:
        return {label: label for label in id2label}
    known = dict(zip(coco_spelling(list(annotated.category_ids)), annotated.category_ids.values(), strict=True))
    names = dict(zip(id2label, coco_spelling(list(id2label.values())), strict=True))
    if unknown := [name for name in names.values() if name not in known]:
        raise PredictionError(
            f"the model has {len(unknown)} labels that aren't categories of the annotation file, such as "
            f"{unknown[0]!r}; its categories are {', '.join(map(printable, list(known)[:8]))}. Leave --annotations "
            "out, or rename one."
        )
    return {label: known[name] for label, name in names.items()}


def _matches(source: str, recursive: bool) -> list[Path]:
    path = Path(source).expanduser()
    endings = " ".join(IMAGE_EXTENSIONS)
    if path.is_dir():
        images, hint = _images_in(path, recursive), "" if recursive else "; --recursive looks into its folders, too"
        problem = f"the folder {source} holds no images ({endings}){hint}."
    elif path.exists():
        return [path]
    elif glob.has_magic(source):
        matches = map(Path, glob.glob(str(path), recursive=True))
        images = [match for match in matches if _is_image_name(match) and match.is_file()]
        problem = f"the pattern {source} matches no images ({endings})."
    else:
        raise PredictionError(f"there is no file or folder {source}: give an image, a folder, or a pattern in quotes.")
    if not images:
        raise PredictionError(problem)
    return images


def _images_in(folder: Path, recursive: bool) -> list[Path]:
    def fail(error: OSError) -> None:
        raise PredictionError(f"the folder {error.filename} can't be listed ({words(error)}).") from error

    images: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=fail):
        images += filter(_is_image_name, (Path(place, name) for name in files))
        if not recursive:
            folders.clear()
    return images


def _is_image_name(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")


def relative_names(paths: Sequence[Path]) -> list[str]:
    """Names from the deepest folder on that all files share: different, since the paths are."""
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [Path(os.path.relpath(path, root)).as_posix() for path in absolute]


def picture_names(
    names: Sequence[str], extensions: Collection[str] = tuple(PICTURE_FORMATS), extension: str = ".png"
) -> list[str]:
    """The names of pictures: those of the images, with an extension added where it isn't one that pictures have.

    Each part is made a `file_name`; where two would then be one, the extension is added, too.

    Args:
        names: of images, or of videos.
        extensions: that pictures have, in lower case.
        extension: that is added.
    """
    taken = set(names)
    pictures = []
    for name in names:
        picture = "/".join(map(file_name, name.split("/")))
        if PurePath(picture).suffix.lower() not in extensions:
            picture += extension
        while picture != name and picture in taken:  # x.bmp beside an image x.bmp.png
            picture += extension
        taken.add(picture)
        pictures.append(picture)
    return pictures


def words(error: Exception) -> str:
    """An error's own words, without number and file name."""
    return getattr(error, "strerror", None) or first_line(error)
