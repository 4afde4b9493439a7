"""The Arrow caches of `datasets`: a damaged one is named and built again; one that can't be written is explained."""

import errno
import hashlib
import json
import logging
import os
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa
from datasets.naming import filenames_for_dataset_split
from datasets.utils._filelock import FileLock

from ..utils.files import cache_explained, sha256

logger = logging.getLogger(__name__)
INFO = "dataset_info.json"
SPLIT_NAME = "images"  # one cache holds one split: its own name need not be a valid `datasets` split name
SETTINGS = "data.cache_dir, HF_DATASETS_CACHE or HF_HOME"
CacheDir = str | os.PathLike[str] | None  # folder of all caches; None is that of `datasets`
MakeRows = Callable[[], tuple[datasets.Features, str, Iterable[dict[str, Any]]]]
Builder = TypeVar("Builder", bound=datasets.DatasetBuilder)


@dataclass
class RowsConfig(datasets.BuilderConfig):
    """What one Arrow cache is made from; another `fingerprint` gives another cache."""

    fingerprint: str = ""


class RowsBuilder(datasets.GeneratorBasedBuilder):
    """Writes rows to Arrow, and the SHA-256 of the files, so that any damage to them is found.

    One process does it: `datasets` holds a file lock while it writes. Later calls, and the other ranks, map the file.
    """

    VERSION = datasets.Version("3.0.0")  # part of the cache's path: raise it whenever columns or pixels change
    BUILDER_CONFIG_CLASS = RowsConfig
    make_rows: MakeRows

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        # Made here and not while they are written, where `datasets` would hide an error inside its own.
        self.info.features, self.info.description, rows = self.make_rows()
        return [datasets.SplitGenerator(name=SPLIT_NAME, gen_kwargs={"rows": rows})]

    def _generate_examples(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(rows)

    def _save_info(self) -> None:
        files = Path(self._output_dir).glob("*.arrow")
        self.info.download_checksums = {file.name: {"checksum": sha256(file)} for file in files}
        super()._save_info()


def cached_rows(name: str, made_from: tuple, make_rows: MakeRows, cache_dir: CacheDir) -> datasets.Dataset:
    """Rows from an Arrow cache, that is made at the first call.

    Args:
        name: of the cache's folder.
        made_from: text and numbers, all that the rows depend on; any change gives another cache.
        make_rows: gives features, a free text to keep beside the rows, and the rows.
        cache_dir: see `open_cache`.

    Raises:
        CacheError: see `open_cache`.
    """

    fingerprint = hashlib.sha256(repr(made_from).encode()).hexdigest()

    def make() -> RowsBuilder:
        builder = RowsBuilder(cache_dir=cache_dir, dataset_name=name, fingerprint=fingerprint)
        builder.make_rows = make_rows
        return builder

    return open_cache(make, cache_dir).as_dataset(split=SPLIT_NAME)


def open_cache(make: Callable[[], Builder], cache_dir: CacheDir) -> Builder:
    """A builder whose cache is complete: from earlier, or made now. A damaged cache is removed and built again.

    Processes may call this at once: all find the same damage, and the first of them repairs it.

    Args:
        make: gives the builder.
        cache_dir: of all caches.

    Raises:
        CacheError: the folder can't be made, read or written, or the disk is full.
    """
    root = Path(os.path.expanduser(cache_dir or datasets.config.HF_DATASETS_CACHE))
    with cache_explained(root, SETTINGS):
        try:
            builder = make()
        except Exception as error:  # a builder reads dataset_info.json at once, and fails in many ways
            folder = _cache_of(error)
            if folder is None:
                raise
        else:
            builder.download_and_prepare()
            folder = Path(builder.cache_dir)
            if _damage(folder) is None:
                return builder
        _remove(folder)
        builder = make()
        builder.download_and_prepare()
        return builder


def _cache_of(error: BaseException) -> Path | None:
    """The cache of the builder in whose constructor an error was raised: nobody else knows it by then."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        builder = frame.f_locals.get("self")
        if isinstance(builder, datasets.DatasetBuilder) and hasattr(builder, "_cache_dir"):
            return Path(builder.cache_dir)
    return None


def _remove(folder: Path) -> None:
    """Remove a damaged cache, unless another process has done so."""
    with FileLock(f"{folder}_builder.lock"):  # the one that `datasets` holds while it builds this cache
        if folder.is_dir() and (damage := _damage(folder)):
            logger.warning("the data cache %s is damaged (%s): it is built again", folder, damage)
            shutil.rmtree(folder)


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
        for split in info.splits.values():
            shards = split.name, "arrow", split.shard_lengths
            for file in filenames_for_dataset_split(str(folder), info.dataset_name, *shards):
                with pa.memory_map(file) as source:
                    rows += sum(batch.num_rows for batch in pa.ipc.open_stream(source))
                name = os.path.basename(file)
                if name in checksums and sha256(file) != checksums[name]["checksum"]:
                    return f"{name} isn't what was written"
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise  # not the file's content, but the right to read it, or the disk
        return f"{type(error).__name__}: {error}"[:300]
    expected = sum(split.num_examples for split in info.splits.values())
    return None if rows == expected else f"it has {rows} of {expected} rows"
