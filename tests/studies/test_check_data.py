"""`crosskd check-data` finds what no loader can call wrong: images, rows and classes that don't belong together."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from crosskd_hf.commands import check_data
from crosskd_hf.data.errors import DataError
from crosskd_hf.data.load import alike, load_datasets
from crosskd_hf.data.settings import DataSection
from crosskd_hf.studies.data_report import compare, report

BOX, OTHER_BOX = [2, 3, 20, 10], [4, 5, 20, 10]


@pytest.fixture
def data(tmp_path: Path) -> DataSection:
    """A section of two splits, `train` and `val`, that are to be written."""
    paths = {"path": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
    return DataSection(train_split="train", val_split="val", min_image_side=0, **paths)


def write_coco(folder: Path, split: str, rows: list[tuple[int, str, list]], names: dict[int, str]) -> None:
    """Rows are (image id, file name, [(category id, box), ...]). Every file gets a colour of its own."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / split).mkdir()
    annotations = [
        {"image_id": image_id, "category_id": category, "bbox": box}
        for image_id, _, boxes in rows
        for category, box in boxes
    ]
    content = {
        "images": [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name, _ in rows],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations)],
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }
    for i, name in enumerate({name for _, name, _ in rows}):
        Image.new("RGB", (40, 30), (i, len(split), 0)).save(folder / split / name)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def reports(data: DataSection) -> tuple[str, str, bool, str]:
    """Text of both splits, whether training refuses them together, and the text of that."""
    train = report(data, data.train_split, training=True)
    evaluated = report(data, data.val_split, training=False)
    assert not train.stopped and not evaluated.stopped
    refused, lines = compare(train, evaluated)
    return "\n".join(train.lines), "\n".join(evaluated.lines), refused, "\n".join(lines)


def line_with(text: str, part: str) -> str:
    (line,) = [line for line in text.splitlines() if part in line]
    return line


def test_coco_splits_with_every_finding(data):
    folder, names = Path(data.path), {0: "animals", 1: "cat", 2: "dog", 3: "Cat "}
    rows = [
        (1, "a.png", [(1, BOX)]),
        (2, "a.png", [(2, BOX)]),  # one file, two ids
        (3, "b.png", [(2, BOX), (2, BOX), (1, BOX)]),  # one box twice
        (4, "b.png", [(1, BOX), (2, BOX), (2, BOX)]),  # the same row again
        (5, "c.png", [(2, OTHER_BOX)]),
        (6, "d.png", [(2, BOX)]),
    ]
    write_coco(folder, "train", rows, names)
    write_coco(folder, "val", [(7, "e.png", [(2, BOX)]), (8, "f.png", [(3, BOX)])], names)
    shutil.copy(folder / "train" / "c.png", folder / "train" / "d.png")
    shutil.copy(folder / "train" / "a.png", folder / "val" / "e.png")
    train, evaluated, refused, both = reports(data)
    assert not refused
    assert "1 x image file is listed under several ids" in train
    assert "a.png (image id 2) as a.png (image id 1)" in line_with(train, "under several ids")
    assert "b.png (image id 4) as b.png (image id 3)" in line_with(train, "1 x row is there again")
    assert "d.png (image id 6) as c.png (image id 5)" in line_with(train, "1 x image has the content of another")
    assert "b.png (image id 3): [2.0, 3.0, 20.0, 10.0]" in line_with(train, "2 x annotation has the class and the box")
    assert "problems:" in evaluated and "x image" not in evaluated
    assert "e.png (image id 7) as a.png (image id 1)" in line_with(both, "1 x image is in both splits")
    assert line_with(both, "boxes in train only").endswith("'cat'")
    assert line_with(both, "boxes in val only").endswith("'Cat '")
    assert line_with(both, "no box in any split").endswith(": 'animals' (category id 0)")
    assert line_with(both, "case or blanks").endswith("'cat', 'Cat '")
    load_datasets(data, seed=0)  # none of this stops a run


def test_sound_splits_have_no_problem(data):
    for split, name in (("train", "a.png"), ("val", "b.png")):
        write_coco(Path(data.path), split, [(1, name, [(1, BOX)])], {1: "cat"})
    train, evaluated, refused, both = reports(data)
    assert not refused and all("problems: none" in text for text in (train, evaluated, both))
    data.val_split = "train"
    assert "one split" in reports(data)[3]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({1: "cat"}, ["only 'train' has 'dog'"]),
        (
            {1: "cat", 2: "Dog "},
            ["only 'train' has 'dog'", "only 'val' has 'Dog '", "'dog' and 'Dog ' differ only by"],
        ),
        ({1: "dog", 2: "cat"}, ["another order, cat, dog and dog, cat"]),
    ],
)
def test_splits_of_different_classes_are_refused(data, names, told):
    write_coco(Path(data.path), "train", [(1, "a.png", [(1, BOX)])], {1: "cat", 2: "dog"})
    write_coco(Path(data.path), "val", [(1, "b.png", [(1, BOX)])], names)
    *_, refused, both = reports(data)
    with pytest.raises(DataError) as caught:
        load_datasets(data, seed=0)
    assert refused and f"! {caught.value}" in both
    assert all(text in str(caught.value) for text in told)


def test_metadata_that_does_not_fit_its_images(data):
    data.layout, data.path = "datasets", str(Path(data.path))
    for split, files in (("train", ["a.png", "b.png", "a.png", "a.png"]), ("val", ["c.png"])):
        folder = Path(data.path) / split
        folder.mkdir(parents=True)
        boxes = [BOX, BOX, BOX, OTHER_BOX]
        rows = [
            {"file_name": name, "objects": {"bbox": [box], "category": ["cat"]}}
            for name, box in zip(files, boxes, strict=False)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for i, name in enumerate([*files, "extra.JPG"] if split == "train" else files):
            Image.new("RGB", (40, 30), (i, len(split), 0)).save(folder / name)
    train, evaluated, refused, both = reports(data)
    assert not refused and "problems: none" in evaluated and "problems: none" in both
    assert line_with(train, "no row in metadata.jsonl").endswith("extra.JPG")
    assert "a.png (image id 2) as a.png (image id 0)" in line_with(train, "1 x row is there again")
    assert "a.png (image id 3) as a.png (image id 0)" in line_with(train, "1 x image file is listed under several ids")
    (Path(data.path) / "train" / "b.png").unlink()
    stopped = report(data, "train", training=True)
    assert stopped.stopped and "b.png (image id 1) does not exist" in "\n".join(stopped.lines)


def test_names_that_are_alike():
    names = ["traffic light", "traffic_light", "cat", "CAT", "cat", "dog", "traffic-light"]
    assert alike(names) == [["traffic light", "traffic_light", "traffic-light"], ["cat", "CAT"]]


@pytest.mark.parametrize(
    ("train", "val_class", "skip_helps", "told"),
    [
        ([(1, BOX)], "dog", False, "only 'train' has 'cat'"),
        ([(1, BOX), (5, BOX)], "cat", True, "category"),
        ([], "cat", False, "data.filter_empty=false"),  # no image is left to train on
    ],
)
def test_what_training_would_stop_at(data, tmp_path, monkeypatch, train, val_class, skip_helps, told):
    """The command ends with it, and advises data.on_error=skip where that helps. The report has the reason."""
    monkeypatch.setattr("crosskd_hf.recipe.load_recipe", lambda *_: argparse.Namespace(data=data))
    monkeypatch.setattr("crosskd_hf.studies.data_report.draw_report", lambda *_: None)  # the slow part
    write_coco(Path(data.path), "train", [(1, "a.png", train)], {1: "cat"})
    write_coco(Path(data.path), "val", [(2, "b.png", [(1, BOX)])], {1: val_class})
    with pytest.raises(SystemExit) as caught:
        check_data.run(argparse.Namespace(recipe="", overrides=[], output_dir=str(tmp_path / "out")))
    assert ("data.on_error=skip" in str(caught.value)) == skip_helps
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "val: 1 images, 1 boxes" in text
    assert told in "\n".join(line for line in text.splitlines() if "  ! " in line)
