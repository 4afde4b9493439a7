import json
import os
import pickle

import pytest

from crosskd_hf.data import coco
from crosskd_hf.data.coco import load_coco
from crosskd_hf.data.errors import DataError
from crosskd_hf.data.split import keep_for_training

IMAGES = [(10, 40, 32), (5, 32, 40), (9, 31, 50)]


@pytest.fixture
def load(tmp_path):
    return lambda root, split="mini", **kwargs: load_coco(root, split, cache_dir=tmp_path / "cache", **kwargs)


NAN = float("nan")


def edit(root, change):
    """Rewrite the annotation file after `change(content)`."""
    file = root / "annotations" / "instances_mini.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_columns_are_the_file_and_labels_follow_the_sorted_ids(write_coco, load):
    root = write_coco(
        IMAGES,
        [
            (1, 5, 7, [1.5, 2.25, 3.1, 4.0]),
            (2, 10, 3, [0, 0, 2, 2], {"iscrowd": 1, "area": 3.5}),
            (3, 5, 3, [1, 1, 1, 1]),
        ],
    )
    split = load(root)
    assert (split.label_names, split.category_ids) == (("dog", "cat"), (3, 7))
    assert split.id2label == {0: "dog", 1: "cat"}
    assert split.dataset["image_id"][:] == [10, 5, 9]  # the file's order
    row = split.dataset[1]
    assert (row["file_name"], row["width"], row["height"], row["image"].size) == ("5.png", 32, 40, (32, 40))
    assert row["objects"] == {
        "id": [1, 3],
        "bbox": [[1.5, 2.25, 3.1, 4.0], [1.0, 1.0, 1.0, 1.0]],  # float64: 3.1 is the file's 3.1
        "category": [1, 0],
        "area": [3.1 * 4.0, 1.0],
        "iscrowd": [False, False],
    }
    crowd = split.dataset[0]["objects"]
    assert crowd["iscrowd"] == [True] and crowd["area"] == [3.5]
    assert split.dataset[2]["objects"]["id"] == []


def test_second_load_does_not_parse_and_an_edited_file_is_parsed_again(write_coco, load, monkeypatch):
    root = write_coco(IMAGES, [(1, 5, 7, [1, 1, 2, 2])])
    calls = []
    parse = coco.read_annotations
    monkeypatch.setattr(coco, "read_annotations", lambda path, problems: calls.append(path) or parse(path, problems))
    first, second = load(root), load(root)
    assert len(calls) == 1
    assert second.category_ids == first.category_ids == (3, 7) and second.label_names == first.label_names
    file = root / "annotations" / "instances_mini.json"
    before = file.stat()
    file.touch()  # the content is the same
    assert load(root).category_ids == (3, 7) and len(calls) == 1
    edit(root, lambda content: content["annotations"][0].update(bbox=[1, 1, 2, 3]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    assert load(root).dataset[1]["objects"]["bbox"] == [[1.0, 1.0, 2.0, 3.0]]
    assert len(calls) == 2


def test_pickled_split_maps_the_file_again(write_coco, load):
    root = write_coco(IMAGES, [(i, 5, 7, [1, 1, 2, 2]) for i in range(2000)])
    split = load(root)
    raw = split.dataset.with_format("arrow")[0]["image"][0].as_py()
    assert raw == {"bytes": None, "path": str(root / "mini" / "10.png")}
    assert len(pickle.dumps(split)) < 20_000
    assert pickle.loads(pickle.dumps(split)).dataset["image_id"][:] == [10, 5, 9]


GONE = object()


@pytest.mark.parametrize(
    ("where", "key", "value", "message"),
    [
        ("", "images", GONE, "has no list images"),
        ("", "annotations", GONE, "has no list annotations"),
        ("", "images", [], "lists no images"),
        ("", "categories", [], "lists no categories"),
        ("images", "id", 10, "image id 10 appears twice"),
        ("images", "id", "a", "image number 1: id must be an integer, got 'a'"),
        ("images", "width", 0, "image 5: width and height must be at least 1"),
        ("images", "height", GONE, "image 5: height must be an integer, got None"),
        ("images", "height", 2**63, "image 5: height must have at most 64 bits, got 9223372036854775808"),
        ("images", "id", 10**400, "must have at most 64 bits, got 1000000"),
        ("images", "file_name", "\ud800.jpg", r"file_name must be the image's path .*ud800"),
        ("images", "file_name", "", "image 5: file_name must be"),
        ("images", "file_name", "/etc/a.png", r"leaves .*: /etc/a.png \(image id 5\)"),
        ("images", "file_name", "a/../../b.png", r"leaves .*b.png \(image id 5\)"),
        ("images", "file_name", "..\\b.png", r"leaves .*b.png \(image id 5\)"),
        ("categories", "id", 7, "category id 7 appears twice"),
        ("categories", "name", "cat", "two categories are named 'cat'"),
        ("categories", "name", GONE, "category 3 has no name"),
        ("categories", "name", "\udfff", "has no name"),
        ("annotations", "image_id", 99, "not in the list of images .*annotation 22 of image 99"),
        ("annotations", "category_id", 4, "not listed .*annotation 22 of category 4"),
        ("annotations", "bbox", [1, 2, 3], "four numbers .*annotation 22 of 5.png"),
        ("annotations", "bbox", [1, 2, 3, NAN], "four numbers .*annotation 22 of 5.png"),
        ("annotations", "area", "big", "area that is not a number .*annotation 22 of .* area 'big'"),
        ("annotations", "iscrowd", "no", "neither 0 nor 1.*iscrowd 'no'"),
        ("annotations", "id", 21, "id of an earlier one .*annotation 21"),
        ("annotations", "id", GONE, "annotation number 1: id must be an integer"),
    ],
)
def test_unsound_files_are_named(write_coco, load, where, key, value, message):
    root = write_coco(IMAGES, [(21, 5, 7, [1, 1, 2, 2]), (22, 5, 7, [1, 1, 2, 2])])

    def change(content):
        record = content[where][1] if where else content
        record[key] = value
        if value is GONE:
            del record[key]

    edit(root, change)
    with pytest.raises(ValueError, match=message) as error:
        load(root)
    assert key != "area" or "bbox" not in str(error.value)  # a box isn't blamed for its area


def test_what_a_file_may_leave_out(write_coco, load):
    root = write_coco(IMAGES, [(21, 5, 7, [1, 1, 2, 4])])
    edit(root, lambda c: [c["annotations"][0].pop(key) for key in ("area", "iscrowd")])
    objects = load(root).dataset[1]["objects"]
    assert (objects["area"], objects["iscrowd"]) == ([8.0], [False])


@pytest.mark.parametrize("key", ["annotations", "bbox", "file_name"])
def test_a_key_that_is_there_twice_in_a_record_is_named(write_coco, load, key):
    root = write_coco(IMAGES, [(21, 5, 7, [1, 1, 2, 2])])
    file = root / "annotations" / "instances_mini.json"
    file.write_text(file.read_text().replace(f'"{key}": ', f'"{key}": 0, "{key}": ', 1))
    with pytest.raises(DataError, match=rf"instances_mini\.json: .*key '{key}' twice"):
        load(root)


def test_a_slice_of_a_split(write_coco, load):
    root = write_coco([(i, 40, 40) for i in (3, 1, 2, 5, 4)], [(9, 3, 7, [1, 1, 2, 2])])
    first, rest = load(root, "mini[:80%]"), load(root, "mini[80%:]")
    assert (first.dataset["image_id"][:], rest.dataset["image_id"][:]) == ([3, 1, 2, 5], [4])
    assert first.label_names == rest.label_names == ("dog", "cat")
    assert load(root, "mini[-2:]").dataset["image_id"][:] == [5, 4]
    for wrong in ("[9:]", "[:0%]", "[a:]", "[1]"):
        with pytest.raises(DataError, match=rf"\{wrong[:-1]}\] .*5 images"):
            load(root, f"mini{wrong}")
    for typo in ("mini[:80%", "mini:80%]"):
        with pytest.raises(DataError, match="lacks a bracket"):
            load(root, typo)


def test_the_splits_that_are_there_are_told(write_coco, load):
    root = write_coco(IMAGES)
    (root / "annotations" / "instances_train.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"it has mini, train\..*=train\[:80%\].*=train\[80%:\]"):
        load(root, "val")


def test_missing_files_are_named(write_coco, load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data set folder .*nowhere does not exist; data\.path should be"):
        load(tmp_path / "nowhere")
    root = write_coco(IMAGES)
    with pytest.raises(FileNotFoundError, match=r"annotation file .*instances_val\.json does not exist"):
        load(root, "val")
    with pytest.raises(FileNotFoundError, match=r"image folder .*elsewhere does not exist"):
        load(root, images="elsewhere")
    (root / "mini" / "5.png").unlink()
    with pytest.raises(DataError, match=r"1 x image cannot be read .*: 5\.png \(image id 5\) does not exist"):
        load(root)
    (root / "annotations" / "instances_mini.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_mini\.json is not a JSON file"):
        load(root)
    (root / "annotations" / "instances_mini.json").write_text("[1]")
    with pytest.raises(ValueError, match="has no list images, annotations, categories"):
        load(root)


def test_keep_for_training(write_coco, load):
    images = [(1, 32, 32), (2, 31, 99), (3, 99, 31), (4, 50, 50), (5, 50, 50)]
    boxes = [(i, i, 3, [1, 1, 5, 5], {"iscrowd": int(i == 5)}) for i in (1, 2, 3, 5)]
    split = load(write_coco(images, boxes))

    def ids(**kwargs):
        return keep_for_training(split, **kwargs).dataset["image_id"][:]

    assert ids() == [1, 5]  # 2 and 3 have a side of 31, 4 has no box, 5 has a crowd box
    assert ids(filter_empty=False) == [1, 4, 5]
    assert ids(min_image_side=31) == [1, 2, 3, 5]
    kept = keep_for_training(split)
    assert (kept.label_names, kept.category_ids) == (split.label_names, split.category_ids)
    assert keep_for_training(kept).dataset["image_id"][:] == [1, 5]  # a selection is read through its indices
    assert len(split.dataset) == 5
    with pytest.raises(ValueError, match="none of the 5 images is left"):
        ids(min_image_side=100)


def test_real_coco(coco_mini, load):
    split = load(coco_mini, "val2017")
    assert len(split.dataset) == 79 and len(split.label_names) == 80
    assert split.category_ids[:13] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14) and split.category_ids[-1] == 90
    assert split.id2label[0] == "person" and split.id2label[79] == "toothbrush"
    content = json.loads((coco_mini / "annotations" / "instances_val2017.json").read_text())
    objects = split.dataset["objects"][:]
    rows = (zip(o["id"], o["category"], o["bbox"], strict=True) for o in objects)
    assert {(i, split.category_ids[label], *box) for row in rows for i, label, box in row} == {
        (a["id"], a["category_id"], *a["bbox"]) for a in content["annotations"]
    }
    assert split.dataset[0]["image"].size == (640, 427)
