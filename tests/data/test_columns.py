"""`datasets` data sets of every kind: the same images and boxes as the COCO layout that they were made from."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import write_tiny_coco

from crosskd_hf.data import checks as records
from crosskd_hf.data.coco import load_coco
from crosskd_hf.data.columns import load_columns
from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.errors import DataError
from crosskd_hf.data.sampler import SampleKey
from crosskd_hf.data.split import DetectionSplit

NAMES = ["cat", "dog"]


@pytest.fixture
def coco(tmp_path: Path) -> DetectionSplit:
    write_tiny_coco(tmp_path / "coco")
    return load_coco(tmp_path / "coco", "mini", cache_dir=tmp_path / "cache")


@pytest.fixture
def load(tmp_path: Path):
    return lambda path, split="train", **kwargs: load_columns(
        str(path), split, cache_dir=str(tmp_path / "cache"), **kwargs
    )


def rows(coco: DetectionSplit, category: str = "category", names: bool = False) -> list[dict[str, Any]]:
    """Rows with encoded images; categories as labels or as names."""
    found = []
    for row in coco.dataset.cast_column("image", datasets.Image(decode=False)):
        objects = {key: list(row["objects"][key]) for key in ("id", "bbox", "area", "iscrowd")}
        labels = row["objects"]["category"]
        objects[category] = [NAMES[label] for label in labels] if names else list(labels)
        image = {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}
        keys = ("image_id", "file_name", "width", "height")
        found.append({**{key: row[key] for key in keys}, "image": image, "objects": objects})
    return found


def contents(split: DetectionSplit) -> list[dict[str, Any]]:
    return split.dataset.remove_columns("image").to_list()


def assert_same(split: DetectionSplit, coco: DetectionSplit) -> None:
    keys = ("image_id", "width", "height", "objects")
    assert [[row[key] for key in keys] for row in contents(split)] == [
        [row[key] for key in keys] for row in contents(coco)
    ]
    assert split.label_names == tuple(NAMES)
    mine, theirs = (DetectionDataset(s, train=True, short_side=64, long_side=96, seed=3) for s in (split, coco))
    for key in (SampleKey(0, index) for index in range(len(theirs))):
        one, other = mine[key], theirs[key]
        assert all(torch.equal(one[key], other[key]) for key in ("image", "boxes", "class_labels"))


def with_classes(data: datasets.Dataset) -> datasets.Dataset:
    """`category` as ClassLabel, `image` as Image: what the Hub's detection data sets have."""
    features = data.features.copy()
    features["objects"] = {
        **features["objects"],
        "category": datasets.List(datasets.ClassLabel(names=NAMES)),
    }
    features["image"] = datasets.Image()
    return data.cast(features)


def save(coco: DetectionSplit, folder: Path, kind: str) -> None:
    """The data set as `kind`."""
    data = datasets.Dataset.from_list(rows(coco)).cast_column("image", datasets.Image())
    named = rows(coco, names=True)
    if kind == "save_to_disk":
        with_classes(data).save_to_disk(folder)
    elif kind == "save_to_disk of splits":
        datasets.DatasetDict(train=with_classes(data)).save_to_disk(folder)
    elif kind == "image folder":
        (folder / "train").mkdir(parents=True)
        for row in named:
            (folder / "train" / row["file_name"]).write_bytes(row.pop("image")["bytes"])
        (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, named)))
    else:
        folder.mkdir()
        if kind == "parquet":
            with_classes(data).to_parquet(folder / "train.parquet")
            return
        if kind == "list of dicts":
            for row in named:
                values = zip(*row["objects"].values(), strict=True)
                row["objects"] = [dict(zip(row["objects"], value, strict=True)) for value in values]
        pq.write_table(pa.Table.from_pylist(named), folder / "train.parquet")


KINDS = ("parquet", "list of dicts", "plain parquet", "save_to_disk", "save_to_disk of splits", "image folder")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_the_same_and_has_slices(coco, load, tmp_path, kind):
    save(coco, tmp_path / "set", kind)
    split = load(tmp_path / "set")
    assert_same(split, coco)
    assert split.category_ids == (0, 1)
    first, rest = load(tmp_path / "set", "train[:80%]"), load(tmp_path / "set", "train[80%:]")
    assert contents(first) + contents(rest) == contents(split) and len(rest) == 1
    with pytest.raises(DataError, match=r"it has train\b.*=train\[:80%\].*=train\[80%:\]"):
        load(tmp_path / "set", "validation")


def small_set(folder: Path, objects: list[dict], **columns: list) -> Path:
    """Parquet with an image of 40 x 30 a row."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    folder.mkdir()
    table = {"image": [{"bytes": file.getvalue(), "path": None}] * len(objects), "objects": objects, **columns}
    pq.write_table(pa.table(table), folder / "train.parquet")
    return folder


BOX = [5.0, 6.0, 20.0, 10.0]


@pytest.mark.parametrize(
    ("categories", "options", "names", "ids", "labels"),
    [
        ([1, 7, 2], {}, ("1", "2", "7"), (1, 2, 7), [0, 2, 1]),
        ([0, 1, 2], {"label_names": ["a", "b", "c"]}, ("a", "b", "c"), (0, 1, 2), [0, 1, 2]),
        (
            [1, 7, 2],
            {"label_names": ["a", "b", "c"], "category_ids": [7, 1, 2]},
            ("a", "b", "c"),
            (7, 1, 2),
            [1, 0, 2],
        ),
        (["b", "a", "b"], {}, ("a", "b"), (0, 1), [1, 0, 1]),
        (["b", "a", "b"], {"label_names": ["b", "z", "a"]}, ("b", "z", "a"), (0, 1, 2), [0, 2, 0]),
    ],
)
def test_categories(tmp_path, load, categories, options, names, ids, labels):
    folder = small_set(tmp_path / "set", [{"bbox": [BOX], "category_id": [c]} for c in categories])
    split = load(folder, **options)
    assert (split.label_names, split.category_ids) == (names, ids)
    assert [row["objects"]["category"][0] for row in contents(split)] == labels
    assert contents(split)[0]["objects"]["area"] == [200.0] and contents(split)[0]["objects"]["iscrowd"] == [False]
    assert [row["image_id"] for row in contents(split)] == [0, 1, 2]


def test_a_split_that_lacks_a_class_has_the_classes_of_all(tmp_path, load):
    folder = small_set(tmp_path / "set", [{"bbox": [BOX, BOX], "category": ["a", "b"]}])
    small_set(tmp_path / "other", [{"bbox": [BOX], "category": ["b"]}])
    shutil.move(tmp_path / "other" / "train.parquet", folder / "validation.parquet")
    split = load(folder, "validation", other_splits=["train"])
    assert split.label_names == ("a", "b") and contents(split)[0]["objects"]["category"] == [1]


def two_splits(tmp_path: Path, train: list, validation: list) -> Path:
    """Image folders with an image a category."""
    for split, categories in (("train", train), ("validation", validation)):
        (tmp_path / "set" / split).mkdir(parents=True)
        lines = []
        for i, category in enumerate(categories):
            Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / "set" / split / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "objects": {"bbox": [BOX], "category": [category]}}))
        (tmp_path / "set" / split / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "set"


def test_numbers_in_one_split_and_names_in_the_other_are_named(tmp_path, load):
    folder = two_splits(tmp_path, [0, 1], ["cat"])
    with pytest.raises(DataError, match=r"numbers in .*'train' \([01]\), but names in .*'validation' \('cat'\)"):
        load(folder, "validation", other_splits=["train"])


def test_an_image_folder_has_the_splits_that_datasets_gives_it(coco, load, tmp_path):
    save(coco, tmp_path / "set", "image folder")
    shutil.copytree(tmp_path / "set" / "train", tmp_path / "set" / "valid")
    file = tmp_path / "set" / "valid" / "metadata.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps({**line, "image_id": line["image_id"] + 10}) for line in lines))
    count = len(coco)
    for split, expected in (
        *(("validation", count), ("all", 2 * count)),
        *(("train+validation", 2 * count), ("train[:2]+validation[:1]", 3)),
    ):
        assert len(load(tmp_path / "set", split)) == expected, split
    with pytest.raises(DataError, match=r"no split 'test'; it has train, validation"):
        load(tmp_path / "set", "test")
    save(coco, tmp_path / "one", "image folder")
    (tmp_path / "one" / "train").rename(tmp_path / "one" / "images")
    assert len(load(tmp_path / "one")) == count


def test_metadata_is_known_by_its_content(coco, load, tmp_path):
    save(coco, tmp_path / "set", "image folder")
    file = tmp_path / "set" / "train" / "metadata.jsonl"
    before, status = contents(load(tmp_path / "set")), file.stat()
    file.write_text(file.read_text().replace("dog", "cow"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    split = load(tmp_path / "set")
    assert split.label_names == ("cat", "cow") and contents(split) == before  # labels, by the names' order


@pytest.mark.parametrize(
    ("box", "options"),
    [
        ([5, 6, 25, 16], {"box_format": "xyxy"}),
        ([15, 11, 20, 10], {"box_format": "cxcywh"}),
        ([0.125, 0.2, 0.5, 1 / 3], {"box_unit": "relative"}),
    ],
)
def test_box_formats(tmp_path, load, box, options):
    folder = small_set(tmp_path / "set", [{"bbox": [[float(v) for v in box]], "category": ["a"]}] * 3)
    assert contents(load(folder, **options))[0]["objects"]["bbox"][0] == pytest.approx(BOX)


def test_a_wrong_box_format_is_named(tmp_path, load):
    folder = small_set(tmp_path / "set", [{"bbox": [[25.0, 16.0, 35.0, 28.0]], "category": ["a"]}] * 3)
    with pytest.raises(DataError, match=r"3 of 3 boxes .* as xyxy \(pixel\) 0 don't"):
        load(folder)
    assert contents(load(folder, box_format="xyxy"))[0]["objects"]["bbox"] == [[25, 16, 10, 12]]


@pytest.mark.parametrize(
    ("objects", "columns", "message"),
    [
        ({"bbox": [BOX]}, {}, "objects must have bbox and category"),
        ({"category": [1]}, {}, "objects must have bbox and category"),
        ({"bbox": [BOX, BOX], "category": [1]}, {}, "2 boxes, but 1 categories"),
        ({"bbox": [BOX], "category": [1]}, {"image_id": [4, 4]}, "image id 4 appears 2 times"),
        ({"bbox": [BOX], "category": [1]}, {"width": [41, 41], "height": [30, 30]}, "annotated as 41 x 30"),
        ({"bbox": [[1.0, 2.0, float("nan"), 3.0]], "category": [1]}, {}, "not four numbers"),
    ],
)
def test_what_is_refused(tmp_path, load, objects, columns, message):
    folder = small_set(tmp_path / "set", [objects, objects], **columns)
    with pytest.raises(DataError, match=message):
        load(folder)


def test_what_is_missing_is_named(tmp_path, load):
    folder = small_set(tmp_path / "set", [{"bbox": [BOX], "category": [3]}])
    with pytest.raises(DataError, match=r"categories \[3\], which aren't among"):
        load(folder, label_names=["a", "b", "c"])
    pq.write_table(pa.table({"pixels": [1], "objects": [{"bbox": [BOX]}]}), folder / "train.parquet")
    with pytest.raises(DataError, match=r"no column 'image', but pixels, objects"):
        load(folder)


def test_what_cannot_be_opened_is_named(load, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"can't be opened as a data set .* data.path must be"):
        load(tmp_path / "empty")
    with pytest.raises(DataError, match="can't be opened as a data set"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "../1.png"}', r"line 2: file_name '../1.png' leaves the image folder"),
        ('{"name": "1.png"}', "line 2 has no file_name"),
        ('{"file_name": ', "line 2 is no JSON object"),
        ("[1]", "line 2 is no JSON object"),
        ('{"file_name": "2.png", "objects": {}, "objects": {}}', "line 2: .*key 'objects' twice"),
    ],
)
def test_metadata_is_checked(coco, load, tmp_path, line, message):
    save(coco, tmp_path / "set", "image folder")
    file = tmp_path / "set" / "train" / "metadata.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(DataError, match=message):
        load(tmp_path / "set")
    file.write_text("\n \n")
    with pytest.raises(DataError, match=f"{file} is empty"):
        load(tmp_path / "set")


def test_a_missing_image_of_a_folder_is_left_out_like_any_other(coco, load, tmp_path):
    save(coco, tmp_path / "set", "image folder")
    files = sorted((tmp_path / "set" / "train").glob("*.png"))
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:100])
    with pytest.raises(DataError) as caught:
        load(tmp_path / "set")
    assert f"{files[1].name} (image id 2) does not exist" in str(caught.value)
    assert f"{files[2].name} (image id 3) cannot be read" in str(caught.value)
    split = load(tmp_path / "set", on_error="skip")
    assert [row["file_name"] for row in contents(split)] == [files[0].name, *(file.name for file in files[3:])]


def test_a_folder_that_should_be_here_is_not_looked_for_on_the_hub(load, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match="there is no such folder"):
        load("data/your_data")


def test_a_row_cannot_name_a_file_elsewhere(tmp_path, load):
    Image.new("RGB", (40, 30)).save(tmp_path / "secret.png")
    (tmp_path / "set").mkdir()
    image = pa.array(
        [{"bytes": None, "path": str(tmp_path / "secret.png")}],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    table = pa.table({"image": image, "objects": [{"bbox": [BOX], "category": ["a"]}]})
    pq.write_table(table, tmp_path / "set" / "train.parquet")
    with pytest.raises(DataError, match=r"the image .*secret\.png lies outside the data set"):
        load(tmp_path / "set")


def test_what_is_skipped_is_told_at_every_load(tmp_path, load, caplog, monkeypatch):
    good = {"bbox": [BOX], "category": ["a"]}
    folder = small_set(tmp_path / "set", [good, good, {"bbox": [BOX, [1.0, 2, -3, 4]], "category": ["a", "a"]}])
    table = pq.read_table(folder / "train.parquet").to_pylist()
    table[1]["image"]["bytes"] = b"broken"
    pq.write_table(pa.Table.from_pylist(table), folder / "train.parquet")
    with pytest.raises(DataError, match=r"(?s)1 x image cannot be read .*row 1.*1 x annotation has a box of negative"):
        load(folder)
    for _ in range(2):
        caplog.clear()
        split = load(folder, on_error="skip")
        assert caplog.text.count("left out: 1 x") == 2
        monkeypatch.setattr(records, "inspect_image", None)  # the second load decodes nothing
    assert [row["image_id"] for row in contents(split)] == [0, 2]
    assert [len(row["objects"]["bbox"]) for row in contents(split)] == [1, 1]
    assert split.dataset[1]["image"].size == (40, 30)
