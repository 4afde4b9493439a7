"""YOLO's format: what is read, and what is refused by name."""

import pytest
from formats import write_image, write_yolo

from crosskd_hf.data.errors import DataError
from crosskd_hf.data.yolo import load_yolo


@pytest.fixture
def root(tmp_path):
    write_yolo(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def load(root, tmp_path):
    return lambda split="train", **options: load_yolo(root, split, cache_dir=tmp_path / "cache", **options)


def test_boxes_outlines_and_images_without_labels(root, load):
    (root / "labels/train/a.txt").write_text("1 0.25 0.5 0.5 0.5\n\n0 0.5 0.25 0.75 0.25 0.75 0.5\n")
    split = load()
    assert split.label_names == ("cat", "dog") and split.category_ids == (0, 1)
    objects = split.dataset[0]["objects"]
    # 96 x 64 pixels; the outline's bounds are 0.5..0.75 and 0.25..0.5.
    assert objects["bbox"] == [[0, 16, 48, 32], [48, 16, 24, 16]] and objects["category"] == [1, 0]
    assert split.dataset[2]["objects"]["bbox"] == [] and split.dataset[2]["file_name"] == "images/train/c.jpg"


def test_a_changed_label_file_is_read_again(root, load):
    assert len(load().dataset[0]["objects"]["id"]) == 2
    (root / "labels/train/a.txt").write_text("1 0.25 0.5 0.5 0.5\n")
    assert len(load().dataset[0]["objects"]["id"]) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2", "line 1 of the labels of images/train/a.jpg: '0 0.5 0.5 0.2'"),
        ("0 0.5 0.5 0.2 0.2 0.9", "not a class and a box"),  # a confidence is no part of the format
        ("cat 0.5 0.5 0.2 0.2", "not a class and a box"),
        ("2 0.5 0.5 0.2 0.2", "category that is not listed"),
        ("0.5 0.5 0.5 0.2 0.2", "not a class and a box"),
        ("0 nan 0.5 0.2 0.2", "not four numbers"),
        ("nan 0.5 0.5 0.2 0.2", "not a class and a box"),
        ("inf 0.5 0.5 0.2 0.2", "not a class and a box"),
    ],
)
def test_lines_that_cannot_be_read(root, load, line, message):
    (root / "labels/train/a.txt").write_text(f"{line}\n0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        load()
    assert len(load(on_error="skip").dataset[0]["objects"]["id"]) == 1


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("train: images/train\n", DataError, "no list of class names"),
        ("train: images/train\nnames: {0: a, 2: b}\n", DataError, "names must have the keys 0 to 1"),
        ("train: images/train\nnames: [a, a]\n", DataError, "names has 'a' twice"),
        ("train: images/train\nnames: [a, b]\nnc: 3\n", DataError, "nc is 3, but names has 2 names"),
        ("names: [a, b]\nval: images/train\n", DataError, "no split 'train'; it has val"),
        ("names: [a, b]\ntrain: images/trains\n", FileNotFoundError, "images/trains does not exist"),
        ("names: [a, b]\ntrain: labels/train\n", DataError, "there is no image in labels/train"),
        ("- a\n", DataError, "must hold names and splits"),
        ("a: [", DataError, "is no YAML file"),
    ],
)
def test_descriptions_that_cannot_be_used(root, load, text, error, message):
    (root / "data.yaml").write_text(text)
    with pytest.raises(error, match=message):
        load()


def test_names_of_the_validation_split_and_lists_of_images(root, load):
    assert len(load("valid")) == len(load("validation[:50%]")) * 2 == 4
    write_image(root / "more", "a")
    (root / "list.txt").write_text("images/train/b.jpg\nmore/a.jpg\n")
    (root / "data.yaml").write_text("names: [cat, dog]\ntrain: [list.txt]\n")
    assert load().dataset["file_name"][:] == ["images/train/b.jpg", "more/a.jpg"]


def test_a_folder_without_a_description(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no data\.yaml"):
        load_yolo(tmp_path, "train")
