"""One data set in every format that is recognised by what lies in its folder."""

import json

import datasets
import pytest
import torch
from formats import CLASSES, SETTINGS, WRITERS, in_memory

from crosskd_hf.commands.main import main
from crosskd_hf.data.collator import DetectionCollator
from crosskd_hf.data.columns import load_columns
from crosskd_hf.data.errors import DataError
from crosskd_hf.data.layouts import with_layout
from crosskd_hf.data.load import load_datasets
from crosskd_hf.data.sampler import SampleKey
from crosskd_hf.data.settings import DataSection
from crosskd_hf.models import GFLConfig
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor


def first_batch(path, cache, **settings) -> dict:
    """All images as a training batch, augmented."""
    data = DataSection(
        **settings,
        path=str(path), train_split="train", val_split="train", cache_dir=str(cache), short_side=64, long_side=96,
        augment=["photometric_distort", "zoom_out", "iou_crop", "flip"], filter_empty=False,
    )  # fmt: skip
    dataset, _ = load_datasets(data, seed=0)
    assert dataset.split.label_names == CLASSES
    collate = DetectionCollator(DenseDetectorImageProcessor.for_model(GFLConfig(), 64, 96), padded=True)
    return collate([dataset[SampleKey(0, index)] for index in range(len(dataset))])


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("coco")
    WRITERS["coco"](root / "data")
    return first_batch(root / "data", root / "cache")


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "coco"])
def test_all_formats_give_the_same_batch(name: str, tmp_path, expected: dict) -> None:
    WRITERS[name](tmp_path / "data")
    assert with_layout(DataSection(path=str(tmp_path / "data"), train_split="train")).layout == name.split()[-1]
    batch = first_batch(tmp_path / "data", tmp_path / "cache", **SETTINGS.get(name, {}))
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert batch["labels"].keys() == expected["labels"].keys() and len(batch["labels"]["boxes_xyxy"]) == 4
    assert all(torch.equal(value, expected["labels"][key]) for key, value in batch["labels"].items())


def test_data_sets_in_memory(tmp_path, expected: dict) -> None:
    made = in_memory(tmp_path / "images")
    for given, split in ((made, "train"), (datasets.DatasetDict(one=made, two=made), "two"), (made, "train[:100%]")):
        rows = load_columns(given, split, cache_dir=tmp_path / "cache").dataset
        assert [row["objects"]["bbox"] for row in rows][:2] == [[[10, 7, 33, 21], [50, 30, 40, 30]], [[3, 5, 60, 40]]]
    with pytest.raises(DataError, match=r"the given data set has no split 'three'; it has one, two"):
        load_columns(datasets.DatasetDict(one=made, two=made), "three")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"boxes": "objects.bbox"}, "lacks labels"),
        ({"boxes": "objects.bbox", "label": "objects.category", "labels": "a"}, "data.columns has label; it takes"),
        ({"boxes": "box", "labels": "objects.category"}, "data.columns.boxes is box, but the columns are image, .*"),
        (
            {"boxes": "objects.box", "labels": "objects.category"},
            "boxes is objects.box, but objects has bbox, category",
        ),
        ({"boxes": "image_id.a", "labels": "objects.category"}, "image_id has no parts"),
    ],
)
def test_columns_that_are_not_there(tmp_path, columns: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_columns(in_memory(tmp_path / "images"), columns=columns)


@pytest.mark.parametrize("name", ["Roboflow yolo", "voc", "webdataset datasets"])
def test_data_sets_are_converted(name: str, tmp_path, expected: dict, capsys) -> None:
    WRITERS[name](tmp_path / "data")
    settings = [
        f"cache_dir={tmp_path / 'cache'}",
        *(f"{k}={json.dumps(v)}" for k, v in SETTINGS.get(name, {}).items()),
    ]
    words = ["convert-data", str(tmp_path / "data"), str(tmp_path / "new"), "--splits", "train", "--set", *settings]
    main(words)
    assert "new/train: 4 images" in capsys.readouterr().out
    assert with_layout(DataSection(path=str(tmp_path / "new"), train_split="train")).layout == "coco"
    batch = first_batch(tmp_path / "new", tmp_path / "cache2")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["labels"]["boxes_xyxy"], expected["labels"]["boxes_xyxy"])
    with pytest.raises(SystemExit, match="new is there already"):
        main(words)


def test_a_layout_that_is_named_is_not_looked_for(tmp_path) -> None:
    WRITERS["yolo"](tmp_path / "data")
    data = DataSection(path=str(tmp_path / "data"), layout="coco")
    assert with_layout(data) is data
    assert with_layout(DataSection(path="nobody/nothing")).layout == "datasets"  # a Hub id


def test_a_file_is_no_data_set(tmp_path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"\xe9")
    with pytest.raises(DataError, match=r"clip.mp4 is a file: data.path must be the folder"):
        with_layout(DataSection(path=str(tmp_path / "clip.mp4")))
