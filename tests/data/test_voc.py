"""Pascal VOC's format: what is read, and what is refused by name."""

import pytest
from formats import write_roboflow_voc, write_voc

from crosskd_hf.data.errors import DataError
from crosskd_hf.data.voc import load_voc


@pytest.fixture
def root(tmp_path):
    write_voc(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def load(root, tmp_path):
    return lambda split="train", **options: load_voc(root, split, cache_dir=tmp_path / "cache", **options)


def edit(root, old, new):
    file = root / "Annotations" / "a.xml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_the_first_pixel_is_number_one(root, load):
    """By hand: xmin 11, ymin 8, xmax 43, ymax 28 holds 33 x 21 pixels."""
    assert "<xmin>11</xmin><ymin>8</ymin><xmax>43</xmax><ymax>28</ymax>" in (root / "Annotations/a.xml").read_text()
    assert load().dataset[0]["objects"]["bbox"][0] == [10, 7, 33, 21]
    assert load(first_pixel=0).dataset[0]["objects"]["bbox"][0] == [11, 8, 32, 20]
    edit(root, "<xmin>11<", "<xmin>0<")
    with pytest.raises(DataError, match=r"data\.first_pixel=0.*object 1 of Annotations/a\.xml: \[0\.0, 8\.0"):
        load()
    assert load(first_pixel=0).dataset[0]["objects"]["bbox"][0] == [0, 8, 43, 20]


def test_difficult_objects_are_crowds(root, load):
    edit(root, "</name>", "</name><difficult>1</difficult>")
    assert load().dataset[0]["objects"]["iscrowd"] == [True, False]


def test_classes_are_those_of_all_splits_or_of_the_recipe(root, load):
    edit(root, "<name>cat<", "<name>ant<")
    (root / "ImageSets/Main/val.txt").write_text("b 1\n")
    assert load().label_names == load("val").label_names == ("ant", "cat", "dog")
    assert load("val").dataset["file_name"][:] == ["JPEGImages/b.jpg"]
    assert load(label_names=["dog", "cat", "ant"]).dataset[0]["objects"]["category"] == [2, 0]
    with pytest.raises(DataError, match=r"object 1 of Annotations/a\.xml: 'ant'"):
        load(label_names=["dog", "cat"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<annotation>", "<annotation", "a.xml is not an XML file"),
        ("<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>', "a.xml has a document type"),
        ("<xmax>43<", "<xmax>wide<", "not four numbers.*object 1 of Annotations/a.xml"),
        ("<xmin>11<", "<xmin>nan<", "not four numbers.*object 1 of Annotations/a.xml"),
        ("<width>96<", "<width>97<", "annotated as 97 x 64"),
    ],
)
def test_files_that_cannot_be_used(root, load, old, new, message):
    edit(root, old, new)
    with pytest.raises(DataError, match=message):
        load()


@pytest.mark.parametrize("size", ["0", "inf", "wide"])
def test_a_size_that_is_no_size_is_none(root, load, size):
    edit(root, "<width>96<", f"<width>{size}<")
    assert load().dataset[0]["width"] == 96


def test_splits_that_are_not_there(root, load, tmp_path):
    with pytest.raises(DataError, match="no split 'val'; it has train"):
        load("val")
    (root / "ImageSets/Main/val.txt").write_text("a\nnone\n../a\n")
    with pytest.raises(DataError, match=r"val\.txt lists 2 images without an XML file, the first none\.xml"):
        load("val")
    (root / "ImageSets/Main/val.txt").write_text("\n")
    with pytest.raises(DataError, match=r"val\.txt lists no image"):
        load("val")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_voc(root / "nothing", "train")
    write_roboflow_voc(tmp_path / "flat")
    with pytest.raises(DataError, match="no split 'val'; it has train"):
        load_voc(tmp_path / "flat", "val")
