"""A training set that is read while it is trained on, shard by shard: for data that don't fit a disk.

A stream has no length and no order of its own, so that a training counts its steps: it begins again when it ends. Its
rows are dealt to processes and workers, each shuffled in a buffer of its own.
"""

import hashlib
import inspect
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from ..utils.escaping import printable
from ..utils.images import ImageError, load_tensor
from .checks import ImageRecord, arrow_row, check_objects, check_records, with_size
from .column_classes import Vocabulary, build_vocabulary
from .columns import check_class_names, records_of, refuse_foreign_paths, sources_of, usual_split
from .errors import DataError, Problems
from .items import Item, Items
from .opening import GIVEN, open_stream, told
from .sampler import SampleKey, stable_seed

logger = logging.getLogger(__name__)

BLOCK = 16  # rows that are read at once
LOOKED_AT = 64  # rows that are checked before training begins
MOST_EMPTY_PASSES = 100  # in a row: others may have dealt a worker only files without boxes
# `datasets` from 5 on fills its buffer from ten files at once, each with some hundred rows, and sleeps at their ends.
ONE_FILE = {"max_buffer_input_shards": 1}
if "max_buffer_input_shards" not in inspect.signature(datasets.IterableDataset.shuffle).parameters:
    ONE_FILE = {}


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
        told: faults that were logged already.
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
    told: set[str] = field(default_factory=set, compare=False)

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
            part, parts: which of how many this is. A part has files of its own, others in each epoch, if there are
                enough; otherwise it reads all, and takes every n-th row.

        Raises:
            DataError: a file can't be read any further.
        """
        rows = self.rows
        if self.shuffle_buffer:
            rows = rows.shuffle(seed=stable_seed(seed, epoch), buffer_size=self.shuffle_buffer, **ONE_FILE)
        if self.has_files_for(parts):
            rows = rows.shard(parts, part, contiguous=False)
        else:
            rows = split_dataset_by_node(rows, rank=part, world_size=parts)
        for block in told(rows.iter(BLOCK), self.where):
            yield as_block(block, rows.features, self.columns, self.where)

    def has_files_for(self, parts: int) -> bool:
        """Whether each of so many parts can have files of its own."""
        return self.rows.num_shards >= parts

    def checked(self, block: datasets.Dataset) -> Iterator[dict[str, Any]]:
        """The rows of a block that are trained on, as `DetectionSplit` has them, with decoded images.

        Raises:
            DataError: an image or a box that can't be used, unless `on_error` is skip.
        """
        if self.source != GIVEN:
            refuse_foreign_paths(block, self.where, self.source, None)
        records = records_of(block, self.vocabulary, self.where, problems := Problems(), numbered=False)
        for record, source in zip(records, sources_of(block), strict=True):
            number = content_number(source if isinstance(source, bytes) else str(record.file_name).encode())
            if "image_id" not in block.column_names:
                record = replace(record, id=number)
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
                yield {**arrow_row(usable), "image": image, "number": number}
        for line in set(problems.lines(stopping=True)) - self.told:
            logger.warning("%s: left out: %s", printable(self.where), line)
            self.told.add(line)

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

    def deal(self, process: int, processes: int, batch_size: int, workers: int = 1) -> None:
        """Say which of how many processes reads, how many images its batches have, and how many workers it has."""
        self.process, self.processes, self.batch_size = process, processes, batch_size
        parts = processes * max(workers, 1)
        if process == 0 and not self.split.has_files_for(parts):
            logger.warning(
                "%s has %d files, fewer than processes times workers, %d: each of these reads all of them. Lower "
                "training.dataloader_num_workers, or divide the data into more files",
                printable(self.split.where),
                self.split.rows.num_shards,
                parts,
            )

    def __iter__(self) -> Iterator[Item]:
        """Items of this process and worker.

        Raises:
            DataError: see `StreamedSplit.blocks` and `checked`; or there is nothing to train on.
        """
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        part, parts, count, empty = self.process * workers + number, self.processes * workers, 0, 0
        for epoch in itertools.count():
            before = count
            for block in self.split.blocks(epoch, self.seed, part, parts):
                for row in self.split.checked(block):
                    batch = part + parts * (count // self.batch_size)
                    yield self.make_item(row, SampleKey(epoch, row["number"], batch))
                    count += 1
            empty = empty + 1 if count == before else 0
            if empty == (MOST_EMPTY_PASSES if self.split.shuffle_buffer else 1):
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
    rows = open_stream(path, split, config, columns, where)
    first = next(told(rows.iter(LOOKED_AT), where), None)
    if first is None:
        raise DataError(f"{where} is empty: it has no image")
    block = as_block(first, rows.features, usual, where)
    if name != GIVEN:
        refuse_foreign_paths(block, where, name, None)
    check_class_names(block, label_names, where)
    vocabulary = build_vocabulary({where: block}, label_names, category_ids, where)
    records = records_of(block, vocabulary, where, problems := Problems())
    what = f"{where} (its first {len(block)} rows)"
    check_records(records, sources_of(block), problems, what, on_error, box_format, box_unit)
    settings = (usual, box_format, box_unit, on_error, filter_empty, min_image_side, shuffle_buffer)
    return StreamedSplit(rows, vocabulary, *settings, split, name)


def as_block(
    rows: Mapping[str, Any], features: datasets.Features, columns: Mapping[str, str], where: str
) -> datasets.Dataset:
    """Some rows of a stream as a data set with the columns `image` and `objects`.

    Raises:
        DataError: see `usual_split`.
    """
    return usual_split(datasets.Dataset.from_dict(dict(rows), features=features), columns, where)
