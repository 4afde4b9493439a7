"""What `datasets` knows, opened: a split as a whole, in the Arrow cache, or as a stream."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import datasets

from ..utils.files import CacheError
from ..utils.messages import first_line
from .cache import CacheDir, cached_rows, open_cache
from .errors import DataError
from .image_folder import METADATA, check_metadata, open_image_folder
from .split import no_such_split, split_and_part, take_part

STREAMS = (datasets.IterableDataset, datasets.IterableDatasetDict)
GIVEN = "the given stream"
SHARDS = 64  # of a data set that was saved whole
Row = TypeVar("Row")


def open_whole(path: str, split: str, config: str | None, cache_dir: CacheDir, where: str) -> datasets.Dataset:
    """A split of a folder or Hub id, in the Arrow cache.

    Raises:
        DataError: there is no such data set or split, or it can't be read.
        CacheError: see `open_cache`.
    """
    try:
        return _open_anything(path, split, config, cache_dir)
    except (DataError, CacheError):
        raise
    except datasets.exceptions.DatasetGenerationError as error:
        raise DataError(f"{where} can't be read: {error.__cause__ or error}") from error
    except Exception as error:  # the library raises a dozen kinds of its own
        raise cannot_open(path, where, error) from error


def cannot_open(path: str, where: str, error: Exception) -> DataError:
    """The error of a path that `datasets` can't make anything of."""
    text = first_line(error)
    if isinstance(error, FileNotFoundError) and not Path(path).expanduser().exists():
        return DataError(f"{where} can't be opened as a data set ({text}).")
    if not Path(path).expanduser().is_dir():
        text = f"there is no such folder here, and as a Hub id: {text}"
    return DataError(
        f"{where} can't be opened as a data set ({text}). data.path must be a Hub id, or a folder of Parquet files, "
        "of save_to_disk, of images with metadata.jsonl, or in the layout of COCO, YOLO or Pascal VOC (data.layout)."
    )


def _open_anything(path: str, split: str, config: str | None, cache_dir: CacheDir) -> datasets.Dataset:
    folder = Path(path).expanduser()
    base, part = split_and_part(split)
    if folder.is_dir():
        if _is_saved(path):
            return take_part(split_of(datasets.load_from_disk(str(folder)), base, folder), part)
        check_metadata(folder)
        if base in {file.parent.name for file in folder.glob(f"*/{METADATA}")}:
            return take_part(open_image_folder(folder / base, cache_dir), part)
        path = str(folder)  # `datasets` knows more names of splits, such as validation for val/, and sums of them
    elif folder.is_absolute() or (folder.parent.is_dir() and folder.parent != Path()):
        raise FileNotFoundError("there is no such folder")  # before the Hub is asked for it, again and again
    builder = open_cache(lambda: datasets.load_dataset_builder(path, config, cache_dir=cache_dir), cache_dir)
    if base not in (*builder.info.splits, "all") and "+" not in split:
        raise DataError(no_such_split(path, split, list(builder.info.splits)))
    return builder.as_dataset(split=split)


def split_of(saved: datasets.Dataset | datasets.DatasetDict, split: str, where: object) -> datasets.Dataset:
    """A split by its name; a data set without splits is train."""
    if isinstance(saved, datasets.Dataset):  # without splits
        saved = datasets.DatasetDict(train=saved)
    if split not in saved:
        raise DataError(no_such_split(where, split, list(saved)))
    return saved[split]


def open_stream(
    path: str | datasets.IterableDataset | datasets.IterableDatasetDict,
    split: str,
    config: str | None,
    columns: Mapping[str, str] | None,
    where: str,
) -> datasets.IterableDataset:
    """A split as a stream, that gives images as they are stored and knows its features.

    Args:
        path: folder, Hub id, or a stream that is open already.
        split, config, columns: see `load_columns`; a stream has no slices.
        where: what messages call it.

    Raises:
        DataError: there is no such data set or split, or it is a slice.
    """
    rows = path if isinstance(path, datasets.IterableDataset) else _stream_of(path, split, config, where)
    features = rows.features or rows._resolve_features().features
    column = (columns or {}).get("image", "image")
    if column in features:  # otherwise it is told where all columns are looked for
        features = {**features, column: datasets.Image(decode=False)}
    return rows.cast(datasets.Features(features))


def _stream_of(
    path: str | datasets.IterableDatasetDict, split: str, config: str | None, where: str
) -> datasets.IterableDataset:
    if split_and_part(split)[1]:
        raise DataError(f"{where}: a stream can't be sliced; name a whole split, or set data.streaming=false")
    if isinstance(path, str) and _is_saved(path):
        saved = split_of(datasets.load_from_disk(str(Path(path).expanduser())), split, path)
        return saved.to_iterable_dataset(num_shards=min(SHARDS, len(saved)))
    streams = _builder(path, config, where).as_streaming_dataset() if isinstance(path, str) else path
    if split not in streams:
        raise DataError(no_such_split(path if isinstance(path, str) else GIVEN, split, list(streams)))
    return streams[split]


def read_stream(
    path: str,
    split: str,
    config: str | None,
    columns: Mapping[str, str] | None,
    limit: int | None,
    cache_dir: CacheDir,
) -> datasets.Dataset:
    """A split that is read from a stream to its end, or its first rows, and kept in the Arrow cache.

    Args:
        path, split, config, columns: see `open_stream`.
        limit: number of rows; None is all.
        cache_dir: see `open_cache`.

    Raises:
        DataError: it can't be opened or read.
        CacheError: see `cached_rows`.
    """
    where = f"{path}, split {split!r}"
    if _is_saved(path):
        return open_whole(path, split, config, cache_dir, where)
    rows = open_stream(path, split, config, columns, where)
    made_from = (where, limit, columns, _builder(path, config, where).cache_dir)  # which has a hash of its files
    first = rows if limit is None else rows.take(limit)
    try:
        return cached_rows("crosskd_stream", made_from, lambda: (rows.features, "", told(first, where)), cache_dir)
    except datasets.exceptions.DatasetGenerationError as error:  # around that of `told`
        raise (error.__cause__ or error) from None


def told(rows: Iterable[Row], where: str) -> Iterator[Row]:
    """The rows of a stream; what `datasets` or the network raises while they are read is a DataError that names it."""
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # of a dozen libraries
            raise DataError(
                f"{where} can't be read any further ({first_line(error)}). A file of it is damaged, or can't be "
                "reached: restore it; a run that has begun goes on from its last checkpoint"
            ) from error
        yield row


def _is_saved(path: str) -> bool:
    """Whether `save_to_disk` wrote it."""
    folder = Path(path).expanduser()
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _builder(path: str, config: str | None, where: str) -> datasets.DatasetBuilder:
    folder = Path(path).expanduser()
    if folder.is_dir():
        check_metadata(folder)
    elif folder.is_absolute():
        raise cannot_open(path, where, FileNotFoundError("there is no such folder"))
    try:
        return datasets.load_dataset_builder(str(folder) if folder.is_dir() else path, config)
    except Exception as error:  # the library raises a dozen kinds of its own
        raise cannot_open(path, where, error) from error
