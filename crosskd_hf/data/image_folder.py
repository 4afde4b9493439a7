"""Image folders with a `metadata.jsonl`, as `datasets` knows them: read, and checked line by line."""

import json
import os
from pathlib import Path

import datasets

from ..utils.files import sha256
from ..utils.images import IMAGE_EXTENSIONS
from .annotation_files import leaves_folder
from .cache import CacheDir, open_cache
from .coco import unique_keys
from .errors import DataError
from .split import split_and_part

METADATA = "metadata.jsonl"


def open_image_folder(folder: Path, cache_dir: CacheDir) -> datasets.Dataset:
    """The rows of a `metadata.jsonl`. An image that isn't there is one that can't be read, found later with others."""
    file = folder / METADATA
    # The name is a part of the cache's: `datasets` itself knows a file by its time of modification.
    name = f"metadata-{sha256(file)[:16]}"
    builder = open_cache(
        lambda: datasets.load_dataset_builder("json", name, data_files=str(file), cache_dir=cache_dir), cache_dir
    )
    rows = builder.as_dataset(split="train")
    names = rows["file_name"]
    images = datasets.Dataset.from_dict({"image": [str(folder / name) for name in names]})
    images = images.cast_column("image", datasets.Image(decode=False))
    return datasets.concatenate_datasets([images, rows], axis=1)


def check_metadata(folder: Path) -> None:
    """Name all lines of an image folder's metadata that are wrong; `datasets` names neither line nor file.

    Raises:
        DataError: with the first of them.
    """
    wrong = []
    for file in sorted(folder.rglob(METADATA)):
        lines = file.read_text(encoding="utf-8").splitlines()
        faults = ((number, _metadata_fault(line)) for number, line in enumerate(lines, start=1))
        wrong += [f"{file}, line {number}{fault}" for number, fault in faults if fault]
        if not any(map(str.strip, lines)):
            wrong.append(f"{file} is empty: it needs a line for each image, with file_name and objects")
    if wrong:
        more = f"\n  - and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(f"{folder} cannot be used as it is:\n  - " + "\n  - ".join(wrong[:5]) + more)


def _metadata_fault(line: str) -> str | None:
    """What is wrong with a line, worded to follow its number."""
    if not line.strip():
        return None
    try:
        name = json.loads(line, object_pairs_hook=unique_keys).get("file_name")
    except DataError as error:
        return f": {error}"
    except (ValueError, AttributeError) as error:
        return f" is no JSON object: {error}"
    if not isinstance(name, str) or not name:
        return f" has no file_name, the image's path relative to {METADATA}"
    if leaves_folder(name):
        return f": file_name {name!r} leaves the image folder; make it relative, without .."
    return None


def images_without_row(path: str, split: str) -> list[str]:
    """Image files in a split's folder that its metadata doesn't name; none where it isn't such a folder."""
    folder = Path(path).expanduser() / split_and_part(split)[0]
    if not (folder / METADATA).is_file():
        return []
    lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
    named = {os.path.normpath(json.loads(line)["file_name"]) for line in lines if line.strip()}
    files = (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMAGE_EXTENSIONS)
    return [name for name in (str(file.relative_to(folder)) for file in files) if name not in named]
