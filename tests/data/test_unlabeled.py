"""Unlabelled images: read from folders, listings and data sets, and dealt between the labelled batches."""

import json
from itertools import chain
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from tiny import tiny_split

from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.errors import DataError
from crosskd_hf.data.sampler import MixedBatchSampler, OrientationBatchSampler, SampleKey
from crosskd_hf.data.unlabeled import MixedDataset, load_unlabeled


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images in two folders, and files that are none."""
    root = tmp_path / "images"
    (root / "deep" / "er").mkdir(parents=True)
    for i, name in enumerate(("a.png", "deep/b.JPG", "deep/er/c.bmp")):
        Image.new("RGB", (40 + i, 50), (i, 0, 0)).save(root / name)
    (root / "notes.txt").write_text("none")
    (root / ".hidden.png").write_text("none")
    return root


def load(path: Path, *args, **options):
    return load_unlabeled(str(path), *args, cache_dir=str(path.parent / "cache"), **options)


def names(split) -> list[str]:
    return split.dataset["file_name"][:]


def test_a_folder_is_searched_through(folder: Path) -> None:
    split = load(folder)
    assert names(split) == ["a.png", "deep/b.JPG", "deep/er/c.bmp"]
    assert (split.dataset["width"][:], split.label_names) == ([40, 41, 42], ())
    item = DetectionDataset(split, train=True, short_side=32, long_side=64)[2]
    assert item["boxes"].shape == (0, 4) and item["original_size"] == (50, 42)


def test_a_new_image_is_found_and_a_broken_one_named(folder: Path) -> None:
    load(folder)
    (folder / "z.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"z\.png"):
        load(folder)
    assert len(load(folder, on_error="skip")) == 3


def test_a_listing_chooses_images_and_its_boxes_are_ignored(folder: Path) -> None:
    content = {"images": [{"id": 9, "file_name": "deep/b.JPG"}], "annotations": [{"nonsense": 1}]}
    (folder / "some.json").write_text(json.dumps(content))
    assert names(load(folder, images="some.json")) == ["deep/b.JPG"]
    for wrong in ({"images": [{"file_name": "../x.png"}]}, {"images": []}, {}):
        (folder / "some.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=r"some\.json"):
            load(folder, images="some.json")


def test_a_data_set_needs_no_boxes(folder: Path, tmp_path: Path) -> None:
    pictures = [Image.open(folder / "a.png"), Image.open(folder / "deep" / "b.JPG")]
    rows = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    datasets.DatasetDict({"extra": rows}).save_to_disk(str(tmp_path / "saved"))
    split = load(tmp_path / "saved", "extra")
    assert split.dataset["width"][:] == [40, 41]
    assert split.dataset[1]["image"].size == (41, 50)


def test_items_behind_the_labelled_ones_have_no_boxes(folder: Path, tmp_path: Path) -> None:
    labeled = DetectionDataset(tiny_split(tmp_path / "data"), train=True, short_side=64, long_side=96)
    mixed = MixedDataset(labeled, DetectionDataset(load(folder), train=True, short_side=64, long_side=96))
    assert len(mixed) == 8
    assert "boxes" in mixed[SampleKey(0, 4)] and mixed[SampleKey(0, 4)]["image_id"] == 5
    item = mixed[SampleKey(0, 5)]
    assert not {"boxes", "class_labels"} & set(item) and item["original_size"] == (50, 40)


# Batches ------------------------------------------------------------------------------------------------------------


def mixed(labeled: int, unlabeled: int, ratio: float, processes: int = 1) -> MixedBatchSampler:
    """In batches of two."""
    parts = [
        OrientationBatchSampler(torch.zeros(n, dtype=torch.bool), 2, seed=3, drop_last=last)
        for n, last in ((labeled, False), (unlabeled, True))
    ]
    return MixedBatchSampler(*parts, ratio, processes)


def kinds(batches: list, labeled: int) -> str:
    """L and U of labelled and unlabelled batches; none is of both."""
    assert all(len({key.index < labeled for key in batch}) == 1 and len(batch) == 2 for batch in batches)
    return "".join("L" if batch[0].index < labeled else "U" for batch in batches)


@pytest.mark.parametrize(
    ("ratio", "processes", "expected"),
    [
        (0.0, 1, "LLLL"),
        (1.0, 1, "LULULULU"),
        (0.5, 1, "LLULLU"),
        (2.0, 1, "LUULUULUULUU"),
        (1.0, 2, "LLUULLUU"),
        (0.5, 2, "LLLLUU"),
        (1.0, 3, "LLLUUULLLUUU"),
    ],
)
def test_kinds_alternate_in_rounds_of_all_processes(ratio: float, processes: int, expected: str) -> None:
    sampler = mixed(8, 6, ratio, processes)
    batches = list(sampler)
    assert kinds(batches, 8) == expected and len(sampler) == len(expected)
    assert {key.index for batch in batches for key in batch if key.index < 8} == set(range(8))
    assert [key.batch for batch in batches for key in batch] == [i for i in range(len(batches)) for _ in range(2)]


def test_labelled_batches_are_those_of_a_run_without_unlabelled_images() -> None:
    """The last, short one is filled up with the first image."""
    sampler = mixed(5, 4, 1.0)
    sampler.set_epoch(2)
    found = [[key.index for key in batch] for batch in sampler if batch[0].index < 5]
    alone = OrientationBatchSampler(torch.zeros(5, dtype=torch.bool), 2, seed=3)
    alone.set_epoch(2)
    expected = [[key.index for key in batch] for batch in alone]
    assert found[:2] == expected[:2] and found[2] == [*expected[2], expected[0][0]]


def test_unlabelled_images_go_on_from_epoch_to_epoch() -> None:
    """Four batches of an epoch are one and a third turns of six images: three epochs are four turns."""
    sampler = mixed(8, 6, 1.0)
    epochs = []
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        epochs.append([key for batch in sampler for key in batch if key.index >= 8])
        assert all(key.epoch == epoch for key in epochs[-1])
    turns = list(chain.from_iterable(epochs))
    assert all({key.index for key in turns[i : i + 6]} == set(range(8, 14)) for i in range(0, 24, 6))
    sampler.set_epoch(1)  # without the epochs before
    assert [key for batch in sampler for key in batch if key.index >= 8] == epochs[1]
