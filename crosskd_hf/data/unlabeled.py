"""Unlabelled images: a folder of image files, some of it as a COCO file lists them, or a `datasets` data set."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import Dataset

from ..utils.images import ImageSource
from .annotation_files import files_hash, images_in, leaves_folder
from .cache import CacheDir, cached_rows
from .checks import ImageRecord, arrow_row, cache_note, check_records, read_cache_note
from .columns import open_split, refuse_foreign_paths, sources_of
from .dataset import DetectionDataset
from .errors import DataError, Problems
from .items import Item
from .sampler import SampleKey
from .split import DetectionSplit, annotation_features


class MixedDataset(Dataset[Item]):
    """Labelled items, and behind them unlabelled ones, which have no boxes.

    Args:
        labeled: a training set.
        unlabeled: a training set; boxes that it has are left out.
    """

    def __init__(self, labeled: DetectionDataset, unlabeled: DetectionDataset) -> None:
        self.labeled = labeled
        self.unlabeled = unlabeled

    def __len__(self) -> int:
        return len(self.labeled) + len(self.unlabeled)

    def __getitem__(self, key: SampleKey) -> Item:
        """See `DetectionDataset`."""
        if key.index < len(self.labeled):
            return self.labeled[key]
        item = self.unlabeled[key._replace(index=key.index - len(self.labeled))]
        return Item({name: value for name, value in item.items() if name not in ("boxes", "class_labels")})

    def set_epochs(self, epochs: int) -> None:
        """See `DetectionDataset.set_epochs`."""
        self.labeled.set_epochs(epochs)
        self.unlabeled.set_epochs(epochs)


def load_unlabeled(
    path: str,
    split: str = "train",
    images: str | None = None,
    *,
    on_error: str = "stop",
    cache_dir: CacheDir = None,
) -> DetectionSplit:
    """Load unlabelled images, as a split without classes. Boxes that the source has are not looked at.

    Args:
        path: folder of images, which may lie in folders of it; otherwise a data set with a column `image`: Hub id, or
            folder of Parquet files or of `save_to_disk`.
        split: of such a data set, or a slice of it.
        images: COCO file inside the folder: only the images that it lists are taken, by their `file_name`.
        on_error: `stop` at images that can't be read, or `skip` and report them.
        cache_dir: where Arrow files go; by default the cache of `datasets`.

    Raises:
        DataError: there are no images, or some can't be read.
        CacheError: see `open_cache`.
    """
    folder = Path(path).expanduser()
    files = _listed(folder, images) if images else images_in(folder)
    where, made_from = f"unlabelled images of {path}", (path, split, images, on_error)
    if files:
        names = [os.path.relpath(file, folder) for file in files]
        sources: Sequence[ImageSource] | datasets.Dataset = [str(file.resolve()) for file in files]
        fingerprint = files_hash(folder)
    else:
        sources = open_split(path, split, None, cache_dir, needed=("image",))
        refuse_foreign_paths(sources, where, path, cache_dir)
        names, fingerprint = [f"row {row}" for row in range(len(sources))], sources._fingerprint

    def make_rows() -> tuple[datasets.Features, str, Iterator[dict[str, Any]]]:
        problems = Problems()
        records = [ImageRecord(row, name, None, None) for row, name in enumerate(names)]
        opened = sources_of(sources) if isinstance(sources, datasets.Dataset) else sources
        checked = check_records(records, opened, problems, where, on_error)
        columns = {**annotation_features(()), "row": datasets.Value("int64")}
        rows = ({**arrow_row(record), "row": row} for row, record in checked)
        return datasets.Features(columns), cache_note((), problems), rows

    rows = cached_rows("crosskd_unlabeled", (*made_from, fingerprint), make_rows, cache_dir)
    kept = rows["row"][:]
    if isinstance(sources, datasets.Dataset):
        pictures = sources.select_columns(["image"]).select(kept)
    else:
        pictures = datasets.Dataset.from_dict({"image": [sources[row] for row in kept]})
    joined = datasets.concatenate_datasets([rows.remove_columns(["row"]), pictures], axis=1)
    dataset = joined.cast_column("image", datasets.Image())
    return DetectionSplit(dataset, (), *read_cache_note(rows.info, where), split, path)


def _listed(folder: Path, images: str) -> list[Path]:
    """Image files that a COCO file lists."""
    file = folder / images
    try:
        names = [image["file_name"] for image in json.loads(file.read_bytes())["images"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no COCO file with a list of images ({type(error).__name__}: {error})") from error
    if wrong := [name for name in names if leaves_folder(name)]:
        raise DataError(f"{file}: file_name {wrong[0]!r} leaves the folder")
    if not names:
        raise DataError(f"{file} lists no image")
    return [folder / name for name in names]
