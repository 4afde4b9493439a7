"""The training input against torchvision's decoding and resizing alone: images/s, workers, their memory.

    python benchmarks/input.py --data data/coco_mini --split train2017
    python benchmarks/input.py --data data/coco_mini --split train2017 --workers 0 1 2 --memory 1000 10000 100000

`input` is what a loader does that leaves normalising to the device: row, decoding, boxes, flip, resizing, collating
uint8 images of one orientation. `normalised` also normalises, in the same thread. The bar, `torchvision`, decodes the
same files with `torchvision.io.decode_jpeg` and resizes them, bilinear on uint8, to the same size; `pillow` is that
bar with Pillow's decoder. All run in one thread, in turn on every batch, so that a slow moment meets all of them.
"""

import argparse
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import torch
from PIL import Image
from reporting import add_output, finish, median_with_interval
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from crosskd_hf.data.coco import load_coco
from crosskd_hf.data.collator import DetectionCollator
from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.sampler import OrientationBatchSampler, SampleKey
from crosskd_hf.data.split import DetectionSplit, annotation_features, keep_for_training
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor
from crosskd_hf.utils.images import resized_size

SIDES = (800, 1333)
COLLATOR = DetectionCollator(DenseDetectorImageProcessor(), normalize=False, padded=True)
Batch = Sequence[SampleKey]


def torchvision_pixels(path: str) -> torch.Tensor:
    """Decoded without Pillow."""
    return decode_jpeg(read_file(path), ImageReadMode.RGB)


def pillow_pixels(path: str) -> torch.Tensor:
    """Decoded by Pillow."""
    with Image.open(path) as image:
        return F.pil_to_tensor(image.convert("RGB"))


def seconds(work: Callable[[], object]) -> float:
    """Of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(dataset: DetectionDataset, batches: Sequence[Batch], rounds: int) -> list[dict]:
    """Rates of the input and of the bars."""
    paths = [row["path"] for row in dataset.split.dataset.with_format("arrow")[:]["image"].to_pylist()]

    def bar(decode: Callable[[str], torch.Tensor], batch: Batch) -> None:
        for key in batch:
            pixels = decode(paths[key.index])
            size = list(resized_size(*pixels.shape[-2:], *SIDES))
            F.resize(pixels, size, interpolation=InterpolationMode.BILINEAR, antialias=False)

    works: dict[str, Callable[[Batch], object]] = {
        "input": lambda batch: COLLATOR([dataset[key] for key in batch]),
        "normalised": lambda batch: COLLATOR.finish(COLLATOR([dataset[key] for key in batch])),
        "torchvision": lambda batch: bar(torchvision_pixels, batch),
        "pillow": lambda batch: bar(pillow_pixels, batch),
    }
    rates: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(-1, rounds):  # the first fills the file cache
        for batch in batches:
            names = names[1:] + names[:1]
            for name in names:
                rate = len(batch) / seconds(lambda work=works[name], batch=batch: work(batch))
                if turn >= 0:
                    rates[name].append(rate)
    return [
        {
            "what": name,
            "images/s": median_with_interval(found),
            "of torchvision": median_with_interval([a / b for a, b in zip(found, rates["torchvision"], strict=True)]),
        }
        for name, found in rates.items()
    ]


def worker_rates(
    dataset: DetectionDataset, batches: Sequence[Batch], counts: Sequence[int], rounds: int
) -> list[dict]:
    """Rates of loaders, the numbers of workers in turn."""
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            loader = DataLoader(dataset, batch_sampler=list(batches) * 2, collate_fn=COLLATOR, num_workers=count)
            iterator = iter(loader)
            next(iterator)  # the workers have started
            start = time.perf_counter()
            images = sum(len(batch["pixel_values"]) for batch in iterator)
            rates[count].append(images / (time.perf_counter() - start))
    return [{"what": f"{count} workers", "images/s": median_with_interval(found)} for count, found in rates.items()]


class WithMemory:
    """A collator that gives the private memory of the worker that runs it instead of a batch."""

    def __call__(self, items: list[dict]) -> dict[str, float]:
        COLLATOR(items)
        return private_megabytes()


def private_megabytes() -> dict[str, float]:
    """Of this process: what it has written, and the pages of files that it alone has read, which can be dropped."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Private_")}
    return {"written": found["Private_Dirty"], "read": found["Private_Clean"]}


def copies(dataset: DetectionDataset, images: int, folder: Path) -> DetectionDataset:
    """A data set of so many images, which are all the same few files, in an Arrow file of its own."""
    features = datasets.Features(
        {**annotation_features(dataset.split.label_names), "image": datasets.Image(decode=False)}
    )
    rows = dataset.split.dataset.cast_column("image", datasets.Image(decode=False)).to_list()
    file = folder / f"{images}.arrow"
    with datasets.arrow_writer.ArrowWriter(path=str(file), features=features) as writer:
        for number in range(images):
            writer.write({**rows[number % len(rows)], "image_id": number})
        writer.finalize()
    split = DetectionSplit(
        datasets.Dataset.from_file(str(file)), dataset.split.label_names, dataset.split.category_ids
    )
    return DetectionDataset(keep_for_training(split), train=True, short_side=64, long_side=96)


def worker_memory(dataset: DetectionDataset, sizes: Sequence[int], read: int) -> list[dict]:
    """Private memory of a worker after its first batch and after `read` images from everywhere in the data set."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for images in sizes:
            copied = copies(dataset, images, Path(folder))
            sampler = OrientationBatchSampler(copied.orientations(), 8, seed=0)
            batches = [batch for epoch in range(-(-read // images)) for batch in epoch_of(sampler, epoch)][: read // 8]
            loader = DataLoader(copied, batch_sampler=batches, collate_fn=WithMemory(), num_workers=1)
            found = list(loader)
            row: dict[str, object] = {"what": f"memory of a worker, {images} images, {len(batches) * 8} read"}
            for when, megabytes in (("first", found[0]), ("last", found[-1])):
                row |= {f"{when} {kind} MB": value for kind, value in megabytes.items()}
            rows.append({**row, "pickled kB": len(pickle.dumps(copied)) / 1000})
    return rows


def epoch_of(sampler: OrientationBatchSampler, epoch: int) -> list[Batch]:
    """The batches of an epoch."""
    sampler.set_epoch(epoch)
    return list(sampler)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/coco_mini", help="a data set in COCO layout")
    parser.add_argument("--split", default="train2017")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="over the data set")
    parser.add_argument("--workers", type=int, nargs="*", default=[], help="also rates with so many workers")
    parser.add_argument("--memory", type=int, nargs="*", default=[], metavar="IMAGES", help="also memory of a worker")
    parser.add_argument("--read", type=int, default=4000, help="images that a worker reads while memory is measured")
    add_output(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        split = keep_for_training(load_coco(arguments.data, arguments.split, cache_dir=cache))
        dataset = DetectionDataset(split, train=True, short_side=SIDES[0], long_side=SIDES[1])
        batches = epoch_of(OrientationBatchSampler(dataset.orientations(), arguments.batch_size, seed=0), 0)
        rows = compare(dataset, batches, arguments.rounds)
        rows += worker_rates(dataset, batches, arguments.workers, arguments.rounds)
        rows += worker_memory(dataset, arguments.memory, arguments.read)
    finish(arguments, rows, ("what",))


if __name__ == "__main__":
    main()
