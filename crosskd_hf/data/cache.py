"""The Arrow caches of `datasets`: a damaged one is named and built again; one that can't be written is explained."""

import errno
import json
import logging
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import datasets
import pyarrow as pa
from datasets.naming import filenames_for_dataset_split
from datasets.utils._filelock import FileLock

from ..utils.files import cache_explained, sha256

logger = logging.getLogger(__name__)
INFO = "dataset_info.json"
SETTINGS = "data.cache_dir, HF_DATASETS_CACHE or HF_HOME"
Builder = TypeVar("Builder", bound=datasets.DatasetBuilder)


class CheckedBuilder(datasets.GeneratorBasedBuilder):
    """A builder that notes the SHA-256 of its Arrow files, so that any damage to them is found."""

    def _save_info(self) -> None:
        files = Path(self._output_dir).glob("*.arrow")
        self.info.download_checksums = {file.name: {"checksum": sha256(file)} for file in files}
        super()._save_info()


def open_cache(make: Callable[[], Builder], cache_dir: str | os.PathLike[str] | None) -> Builder:
    """A builder whose cache is complete: from earlier, or made now. A damaged cache is removed and built again.

    Processes may call this at once: all find the same damage, and the first of them repairs it.

    Args:
        make: gives the builder.
        cache_dir: folder of all caches; None is that of `datasets`.

    Raises:
        CacheError: the folder can't be made, read or written, or the disk is full.
    """

    def prepare() -> Builder:
        builder = make()
        builder.download_and_prepare()
        return builder

    root = Path(os.path.expanduser(cache_dir or datasets.config.HF_DATASETS_CACHE))
    with cache_explained(root, SETTINGS):
        try:
            builder = make()
        except Exception as error:  # a builder reads dataset_info.json at once, and fails in many ways
            folder = _cache_of(error)
            if folder is None:
                raise
            return _build_again(folder, prepare)
        builder.download_and_prepare()
        folder = Path(builder.cache_dir)
        return builder if _damage(folder) is None else _build_again(folder, prepare)


def _cache_of(error: BaseException) -> Path | None:
    """The cache of the builder in whose constructor an error was raised: nobody else knows it by then."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        builder = frame.f_locals.get("self")
        if isinstance(builder, datasets.DatasetBuilder) and hasattr(builder, "_cache_dir"):
            return Path(builder.cache_dir)
    return None


def _build_again(folder: Path, prepare: Callable[[], Builder]) -> Builder:
    """Build a cache again; it is removed first, unless another process has done so."""
    with FileLock(f"{folder}_builder.lock"):  # the one that `datasets` holds while it builds this cache
        if folder.is_dir() and (damage := _damage(folder)):
            logger.warning("the data cache %s is damaged (%s): it is built again", folder, damage)
            shutil.rmtree(folder)
    return prepare()


def _damage(folder: Path) -> str | None:
    """What is wrong with the files that a builder wrote to its cache; None if nothing is.

    Others, such as the `cache-*.arrow` of some program's `map`, are that program's.
    """
    try:
        content = json.loads((folder / INFO).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not content.get("splits"):
            return f"{INFO} names no splits"
        info = datasets.DatasetInfo.from_directory(str(folder))
        checksums = info.download_checksums or {}
        rows = 0
        written = [name for split in info.splits.values() for name in _files(folder, info.dataset_name, split)]
        for file in map(Path, written):
            with pa.memory_map(str(file)) as source:
                rows += sum(batch.num_rows for batch in pa.ipc.open_stream(source))
            if file.name in checksums and sha256(file) != checksums[file.name]["checksum"]:
                return f"{file.name} isn't what was written"
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise  # not the file's content, but the right to read it, or the disk
        return f"{type(error).__name__}: {error}"[:300]
    expected = sum(split.num_examples for split in info.splits.values())
    return None if rows == expected else f"it has {rows} of {expected} rows"


def _files(folder: Path, name: str, split: datasets.SplitInfo) -> list[str]:
    return filenames_for_dataset_split(str(folder), name, split.name, "arrow", split.shard_lengths)
