"""A training set that is read while it is trained on, shard by shard: for data that don't fit a disk.

A stream has no length and no order of its own, so that a training counts its steps: it begins again when it ends. Its
rows are dealt to processes and workers, each shuffled in a buffer of its own.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from ..utils.escaping import printable
from ..utils.images import ImageError, load_tensor
from .cache import CacheDir, cached_rows
from .checks import ImageRecord, arrow_row, check_objects, check_records, with_size
from .column_classes import Vocabulary, build_vocabulary, category_feature
from .column_names import with_usual_names
from .columns import cannot_open, open_split, records_of, refuse_foreign_paths, sources_of, with_image_column
from .errors import DataError, Problems
from .image_folder import check_metadata
from .items import Item, Items
from .sampler import SampleKey, stable_seed
from .split import no_such_split, split_and_part

logger = logging.getLogger(__name__)

BLOCK = 16  # rows that are read at once
LOOKED_AT = 64  # rows that are checked before training begins
SHARDS = 64  # of a data set that was saved whole
GIVEN = "the given stream"


@dataclass(frozen=True)
class StreamedSplit:
    """The rows of a stream, and what is known of them before they are read.

    Attributes:
        rows: with undecoded images.
        vocabulary: the classes.
        columns, box_format, box_unit, on_error: see `load_columns`.
        filter_empty, min_image_side: see `keep_for_training`.
        shuffle_buffer: rows that are shuffled at a time; 0 leaves them in their order.
        name, source: of the split, and where it comes from.
    """

    rows: datasets.IterableDataset
    vocabulary: Vocabulary
    columns: Mapping[str, str]
    box_format: str
    box_unit: str
    on_error: str
    filter_empty: bool
    min_image_side: int
    shuffle_buffer: int
    name: str
    source: str

    @property
    def label_names(self) -> tuple[str, ...]:
        """The class names, by label."""
        return self.vocabulary.names

    @property
    def id2label(self) -> dict[int, str]:
        """Label -> class name, as a transformers config takes it."""
        return dict(enumerate(self.label_names))

    @property
    def where(self) -> str:
        """What messages call it."""
        return f"{self.source}, split {self.name!r}"

    def blocks(self, epoch: int, seed: int, part: int, parts: int) -> Iterator[datasets.Dataset]:
        """The rows of a part, some at a time, once.

        Args:
            epoch, seed: of the shuffle.
            part, parts: which of how many this is; a part has files of its own where their number can be divided.
        """
        rows = self.rows
        if self.shuffle_buffer:
            rows = rows.shuffle(seed=stable_seed(seed, epoch), buffer_size=self.shuffle_buffer)
        for block in split_dataset_by_node(rows, rank=part, world_size=parts).iter(BLOCK):
            yield as_block(block, rows.features, self.columns, self.where)

    def checked(self, block: datasets.Dataset) -> Iterator[dict[str, Any]]:
        """The rows of a block that are trained on, as `DetectionSplit` has them, with decoded images.

        Raises:
            DataError: an image or a box that can't be used, unless `on_error` is skip.
        """
        if self.source != GIVEN:
            refuse_foreign_paths(block, self.where, self.source, None)
        records = records_of(block, self.vocabulary, self.where, problems := Problems())
        for record, source in zip(records, sources_of(block), strict=True):
            try:
                image = load_tensor(source)
                size: tuple[int, int] | str = (image.shape[2], image.shape[1])
            except ImageError as error:
                size = str(error)
            sized = with_size(record, size, problems)
            usable = check_objects(sized, self.box_format, self.box_unit, problems) if sized else None
            if self.on_error == "stop":
                problems.raise_if_stopping(self.where)
            if usable is not None and self._is_trained_on(usable):
                content = source if isinstance(source, bytes) else str(record.file_name).encode()
                yield {**arrow_row(usable), "image": image, "content": content}
        for line in problems.lines(stopping=True):
            logger.warning("%s: left out: %s", printable(self.where), line)

    def _is_trained_on(self, record: ImageRecord) -> bool:
        large = min(record.width or 0, record.height or 0) >= self.min_image_side
        return large and bool(record.objects or not self.filter_empty)


class DetectionStream(Items[StreamedSplit], IterableDataset[Item]):
    """Decodes and augments the images of a stream, without end.

    Items are those of a `DetectionDataset`. What augmentation draws is a function of the seed, of how often the stream
    was read before, and of the image. The order depends on the number of processes and workers, too; with the same
    numbers it is the same again, so that a resumed run goes on where it was. (It reads again what it had.)

    Args:
        split: see `load_stream`.
        others: see `Items`, as for the errors.
    """

    process, processes, batch_size = 0, 1, 1

    def deal(self, process: int, processes: int, batch_size: int) -> None:
        """Say which of how many processes reads, and how many images its batches have."""
        self.process, self.processes, self.batch_size = process, processes, batch_size

    def __iter__(self) -> Iterator[Item]:
        """Items of this process and worker.

        Raises:
            DataError: see `StreamedSplit.checked`; or there is nothing to train on.
        """
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        part, parts, count = self.process * workers + number, self.processes * workers, 0
        for epoch in itertools.count():
            before = count
            for block in self.split.blocks(epoch, self.seed, part, parts):
                for row in self.split.checked(block):
                    batch = part + parts * (count // self.batch_size)
                    yield self.make_item(row, SampleKey(epoch, content_number(row["content"]), batch))
                    count += 1
            if count == before:
                raise DataError(
                    f"{self.split.where}: worker {part} of {parts} got no image to train on. Lower "
                    "training.dataloader_num_workers, or check data.filter_empty and data.min_image_side"
                )


def number_of_images(dataset: Any) -> str:
    """The length of a training set, for people."""
    return "streamed" if isinstance(dataset, DetectionStream) else str(len(dataset))


def content_number(content: bytes) -> int:
    """A number of an image, the same wherever and whenever it is read."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big")


def load_stream(
    path: str | datasets.IterableDataset | datasets.IterableDatasetDict,
    split: str = "train",
    *,
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
    box_format: str = "xywh",
    box_unit: str = "pixel",
    label_names: Sequence[str] = (),
    category_ids: Sequence[int] = (),
    on_error: str = "stop",
    filter_empty: bool = True,
    min_image_side: int = 32,
    shuffle_buffer: int = 1000,
) -> StreamedSplit:
    """Open a split of a `datasets` data set to be read while it is trained on. Its first rows are checked.

    Args:
        path: Hub id; folder of Parquet files, of WebDataset archives, of `save_to_disk`, or of images with
            `metadata.jsonl`; or a stream that is open already.
        split: its name; a stream has no slices.
        columns, config, box_format, box_unit, on_error: see `load_columns`.
        label_names, category_ids: see `load_columns`; a stream without class names of its own needs the first.
        filter_empty, min_image_side: see `keep_for_training`.
        shuffle_buffer: rows, with their undecoded images, that each worker shuffles at a time; 0 leaves them in order.

    Raises:
        DataError: no such data set, split or column; no class names; images or boxes that can't be used.
    """
    name = path if isinstance(path, str) else GIVEN
    where = f"{name}, split {split!r}"
    usual = columns or {}
    rows = with_undecoded_images(_open(path, split, config, where), usual.get("image", "image"))
    first = next(iter(rows.iter(LOOKED_AT)), None)
    if first is None:
        raise DataError(f"{where} is empty: it has no image")
    block = as_block(first, rows.features, usual, where)
    if name != GIVEN:
        refuse_foreign_paths(block, where, name, None)
    if not (label_names or isinstance(category_feature(block, where), datasets.ClassLabel)):
        raise DataError(
            f"{where} has no class names of its own, and a stream can't be searched for all of them: set "
            "data.label_names, and data.category_ids if its numbers aren't 0, 1, 2, ..."
        )
    vocabulary = build_vocabulary({where: block}, label_names, category_ids, where)
    records = records_of(block, vocabulary, where, problems := Problems())
    what = f"{where} (its first {len(block)} rows)"
    check_records(records, sources_of(block), problems, what, on_error, box_format, box_unit)
    settings = (usual, box_format, box_unit, on_error, filter_empty, min_image_side, shuffle_buffer)
    return StreamedSplit(rows, vocabulary, *settings, split, name)


def _open(
    path: str | datasets.IterableDataset | datasets.IterableDatasetDict, split: str, config: str | None, where: str
) -> datasets.IterableDataset:
    if isinstance(path, datasets.IterableDataset):
        return path
    if split_and_part(split)[1]:
        raise DataError(f"{where}: a stream can't be sliced; name a whole split, or set data.streaming=false")
    if isinstance(path, str) and _is_saved(path):
        saved = open_split(path, split, config, None, needed=())
        return saved.to_iterable_dataset(num_shards=min(SHARDS, len(saved)))
    streams = _builder(path, config, where).as_streaming_dataset() if isinstance(path, str) else path
    if split not in streams:
        raise DataError(no_such_split(path if isinstance(path, str) else GIVEN, split, list(streams)))
    return streams[split]


def _is_saved(path: str) -> bool:
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


def with_undecoded_images(rows: datasets.IterableDataset, column: str = "image") -> datasets.IterableDataset:
    """A stream that gives images as they are stored, and knows its features."""
    features = rows.features or rows._resolve_features().features
    if column not in features:  # told where all columns are looked for
        return rows.cast(features)
    return rows.cast(datasets.Features({**features, column: datasets.Image(decode=False)}))


def read_whole(path: str, split: str, config: str | None, limit: int | None, cache_dir: CacheDir) -> datasets.Dataset:
    """A split to evaluate on: a stream read to its end and kept in the Arrow cache, without the splits beside it.

    Args:
        path, split, config: see `load_stream`.
        limit: only the first rows.
        cache_dir: see `load_columns`.

    Raises:
        DataError: it can't be opened.
        CacheError: see `cached_rows`.
    """
    where = f"{path}, split {split!r}"
    if _is_saved(path):
        return open_split(path, split, config, cache_dir, needed=())
    rows = with_undecoded_images(_open(path, split, config, where))
    made_from = (where, limit, _builder(path, config, where).cache_dir)  # which has a hash of the files in it
    first = rows if limit is None else rows.take(limit)
    return cached_rows("crosskd_stream", made_from, lambda: (rows.features, "", iter(first)), cache_dir)


def as_block(
    rows: Mapping[str, Any], features: datasets.Features, columns: Mapping[str, str], where: str
) -> datasets.Dataset:
    """Some rows of a stream as a data set with the columns `image` and `objects`.

    Raises:
        DataError: see `with_usual_names`; a column isn't there.
    """
    block = datasets.Dataset.from_dict(dict(rows), features=features)
    return with_image_column(
        with_usual_names(block, columns, where) if columns else block, where, ("image", "objects")
    )
