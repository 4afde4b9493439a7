"""Training sets that are read while they are trained on."""

import io
import itertools
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from formats import CLASSES, SETTINGS, WRITERS, in_memory, rows
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader

from crosskd_hf.data.columns import load_columns
from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.errors import DataError
from crosskd_hf.data.load import load_datasets
from crosskd_hf.data.settings import DataSection
from crosskd_hf.data.stream import DetectionStream, content_number, load_stream

SIZE = {"train": True, "short_side": 64, "long_side": 96}


def written(tmp_path, files: int) -> str:
    """A folder of Parquet files with one image each. Of four images, the third has no box."""
    scenes, features = rows(tmp_path / "images"), in_memory(tmp_path / "images").features
    (tmp_path / "data").mkdir()
    for index in range(files):
        row = {**scenes[index % len(scenes)], "image_id": index}
        datasets.Dataset.from_list([row], features=features).to_parquet(
            str(tmp_path / "data" / f"train-{index:05d}-of-{files:05d}.parquet")
        )
    return str(tmp_path / "data")


def taken(stream: DetectionStream, count: int) -> list:
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("name", ["datasets", "flat datasets", "webdataset datasets", "saved"])
def test_a_stream_has_the_items_of_the_data_set(name, tmp_path):
    if name == "saved":
        in_memory(tmp_path / "images").save_to_disk(str(tmp_path / "data"))
    else:
        WRITERS[name](tmp_path / "data")
    data = DataSection(
        path=str(tmp_path / "data"), train_split="train", val_split="train", cache_dir=str(tmp_path / "cache"),
        short_side=64, long_side=96, flip_probability=0.0, filter_empty=False, shuffle_buffer=0,
        **SETTINGS.get(name, {}), label_names=list(CLASSES),
    )  # fmt: skip
    whole, evaluated = load_datasets(data, seed=0)
    data.streaming = True
    stream, evaluated_stream = load_datasets(data, seed=0)
    assert isinstance(whole, DetectionDataset) and isinstance(stream, DetectionStream)
    assert stream.split.label_names == whole.split.label_names == CLASSES
    for expected, dataset in ((whole, taken(stream, len(whole))), (evaluated, evaluated_stream)):
        for index in range(len(whole)):
            one, other = expected[index], dataset[index]
            assert torch.equal(one["image"], other["image"]) and one["size"] == other["size"]
            assert torch.equal(one["boxes"], other["boxes"]) and torch.equal(
                one["class_labels"], other["class_labels"]
            )
    assert evaluated_stream.split.name == "train" and evaluated_stream.split.source == data.path


@pytest.mark.parametrize(("files", "processes", "workers"), [(4, 2, 2), (4, 1, 0), (5, 2, 1), (6, 1, 4)])
def test_parts_have_every_image_once(files, processes, workers, tmp_path):
    path, parts = written(tmp_path, files), processes * max(workers, 1)
    split = load_stream(path, filter_empty=False, shuffle_buffer=3)
    for epoch in range(3):
        blocks = [block for part in range(parts) for block in split.blocks(epoch, 1, part, parts)]
        assert sorted(row["image_id"] for block in blocks for row in block) == list(range(files))


def test_too_few_files_are_told(tmp_path, caplog):
    stream = DetectionStream(load_stream(written(tmp_path, 3), filter_empty=False), **SIZE)
    stream.deal(process=0, processes=3, batch_size=1)
    assert not caplog.text
    stream.deal(process=0, processes=2, batch_size=1, workers=2)
    assert "has 3 files, fewer than processes times workers, 4" in caplog.text
    assert sum(len(block) for part in range(4) for block in stream.split.blocks(0, 0, part, 4)) == 3


def test_workers_read_parts_of_their_own(tmp_path):
    stream = DetectionStream(load_stream(written(tmp_path, 4), filter_empty=False), **SIZE)
    stream.deal(process=1, processes=2, batch_size=1)
    loader = DataLoader(stream, batch_size=1, num_workers=2, collate_fn=lambda items: items[0]["image_id"])
    alone = [[block["image_id"] for block in stream.split.blocks(0, 0, part, 4)] for part in (2, 3)]
    assert [[next(iterator)] for iterator in [iter(loader)] for _ in range(2)] == [ids[0] for ids in alone]


def test_augmentation_knows_the_image_and_not_the_worker(tmp_path):
    split = load_stream(written(tmp_path, 4), filter_empty=False)
    size = {**SIZE, "augment": ["photometric_distort", "flip"], "seed": 3}

    def items(processes: int) -> dict:
        found = {}
        for process in range(processes):
            stream = DetectionStream(split, **size)
            stream.deal(process, processes, batch_size=2)
            found |= {item["image_id"]: item["image"] for item in taken(stream, 4 // processes)}
        return found

    one, two = items(1), items(2)
    assert one.keys() == two.keys() and len(one) == 4
    assert all(torch.equal(one[image_id], two[image_id]) for image_id in one)


def test_a_stream_begins_again_in_another_order(tmp_path):
    split = load_stream(written(tmp_path, 12), filter_empty=False)
    ids = [item["image_id"] for item in taken(DetectionStream(split, **SIZE), 36)]
    epochs = [ids[:12], ids[12:24], ids[24:]]
    assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert ids == [item["image_id"] for item in taken(DetectionStream(split, **SIZE), 36)]


def test_images_of_a_batch_have_one_draw(tmp_path):
    split = load_stream(written(tmp_path, 4), filter_empty=False)
    stream = DetectionStream(split, **SIZE, multiscale="batch", multiscale_short_sides=[32, 64])
    stream.fit = lambda sample: {**sample, "size": (1, 1)}  # a processor's
    stream.deal(0, 1, batch_size=2)
    draws = [item["batch_draw"] for item in taken(stream, 4)]
    assert draws[0] == draws[1] != draws[2] == draws[3]


def test_what_is_not_trained_on(tmp_path):
    path = written(tmp_path, 4)
    assert {item["image_id"] for item in taken(DetectionStream(load_stream(path), **SIZE), 9)} == {0, 1, 3}
    split = load_stream(path, filter_empty=False, min_image_side=65)
    assert {item["image_id"] for item in taken(DetectionStream(split, **SIZE), 9)} == {2, 3}
    nothing = DetectionStream(load_stream(path, min_image_side=1000), **SIZE)
    with pytest.raises(DataError, match=r"worker 0 of 1 got no image to train on"):
        next(iter(nothing))


def broken(tmp_path) -> datasets.IterableDataset:
    """A stream with a broken image and an impossible box behind the rows that are looked at first."""
    good = rows(tmp_path / "images")
    bad_image = {**good[0], "image": {"path": None, "bytes": b"no image"}}
    bad_box = {**good[0], "objects": {"bbox": [[1, 1, -5, 5]], "category": [0]}}
    features = in_memory(tmp_path / "more").features
    return datasets.Dataset.from_list([*good * 16, bad_image, bad_box], features=features).to_iterable_dataset()


def test_a_pass_without_an_image_ends_nothing(tmp_path):
    """Of four files in two parts, two have nothing to train on: in some passes they fall to one part."""
    scenes, features = rows(tmp_path / "images"), in_memory(tmp_path / "images").features
    (tmp_path / "data").mkdir()
    for index, scene in enumerate((scenes[0], scenes[2], scenes[2], scenes[3])):
        row = datasets.Dataset.from_list([{**scene, "image_id": index}], features=features)
        row.to_parquet(str(tmp_path / "data" / f"train-{index:05d}-of-00004.parquet"))
    stream = DetectionStream(load_stream(str(tmp_path / "data")), **SIZE)
    for process in range(2):
        stream.deal(process, 2, batch_size=1)
        assert {item["image_id"] for item in taken(stream, 20)} == {0, 3}


def test_unnamed_images_have_numbers_of_their_own(tmp_path):
    """Those of their content: positions in a shuffled stream mean nothing."""
    stream = datasets.Dataset.from_list(rows(tmp_path / "images"), features=in_memory(tmp_path / "more").features)
    split = load_stream(stream.remove_columns("image_id").to_iterable_dataset(), filter_empty=False)
    ids = {item["image_id"] for item in taken(DetectionStream(split, **SIZE), 8)}
    assert ids == {content_number(row["image"]["bytes"]) for row in rows(tmp_path / "again")}


def test_a_damaged_file_is_told_with_its_data_set(tmp_path):
    path = written(tmp_path, 4)
    file = tmp_path / "data" / "train-00003-of-00004.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"data, split 'train' can't be read any further \("):
        taken(DetectionStream(load_stream(path, filter_empty=False), **SIZE), 4)
    with pytest.raises(DataError, match=r"data, split 'train' can't be read any further \("):
        load_columns(path, "train", cache_dir=tmp_path / "cache", streamed=True)


def test_evaluation_images_are_read_as_they_are(tmp_path):
    """Without EXIF, under another name, bit for bit; the messages name the real data set."""
    encoded = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(encoded, "jpeg")
    row = {"picture": {"bytes": encoded.getvalue(), "path": None}, "boxes": [[1, 1, 20, 20]], "names": ["cat"]}
    features = {"boxes": datasets.List(datasets.List(datasets.Value("float32"))), "picture": datasets.Image()}
    features |= {"names": datasets.List(datasets.Value("string"))}
    made = datasets.Dataset.from_list([row], features=datasets.Features(features))
    (tmp_path / "data").mkdir()
    made.to_parquet(str(tmp_path / "data" / "validation.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    columns = {"image": "picture", "boxes": "boxes", "labels": "names"}
    options = {"columns": columns, "label_names": ["cat"], "cache_dir": tmp_path / "cache", "streamed": True}
    for path, name in (("data", "validation"), ("saved", "train")):
        split = load_columns(str(tmp_path / path), name, **options)
        stored = split.dataset.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]
        assert stored == encoded.getvalue() and split.name == name
    assert load_stream(str(tmp_path / "saved"), columns=columns, label_names=["cat"]).label_names == ("cat",)
    with pytest.raises(DataError, match=r"data, split 'validation' has no class names of its own"):
        load_columns(str(tmp_path / "data"), "validation", **{**options, "label_names": []})


def test_a_streamed_row_cannot_name_a_file_elsewhere(tmp_path):
    features = in_memory(tmp_path / "more").features
    (tmp_path / "data").mkdir()
    for name, message in (("/etc/secret.png", "lies outside the data set"), ("hf://a/b.png", "can't be streamed")):
        row = {**rows(tmp_path / "images")[0], "image": {"bytes": None, "path": name}}
        made = datasets.Dataset.from_list([row], features=features)
        parquet.write_table(made.data.table, tmp_path / "data" / "train.parquet")
        with pytest.raises(DataError, match=message):
            load_stream(str(tmp_path / "data"))
        with pytest.raises(DataError, match=message):
            load_columns(str(tmp_path / "data"), cache_dir=tmp_path / "cache", streamed=True)


def test_broken_rows_stop_or_are_left_out(tmp_path, caplog):
    stream = DetectionStream(load_stream(broken(tmp_path), shuffle_buffer=0), **SIZE)
    with pytest.raises(DataError, match=r"(?s)the given stream.* cannot be used.*1 x image cannot be read"):
        taken(stream, 49)
    skipping = load_stream(broken(tmp_path), shuffle_buffer=0, on_error="skip", filter_empty=False)
    assert len(taken(DetectionStream(skipping, **SIZE), 66)) == 66
    assert "left out: 1 x image cannot be read" in caplog.text and "negative width" in caplog.text
    told = len(caplog.records)
    assert len(taken(DetectionStream(skipping, **SIZE), 200)) == 200 and len(caplog.records) == told, "told once"


def test_what_is_refused_before_training(tmp_path):
    good = rows(tmp_path / "images")
    stream = datasets.Dataset.from_list(good).to_iterable_dataset()
    with pytest.raises(DataError, match=r"no class names of its own.*data.label_names"):
        load_stream(stream)
    with pytest.raises(DataError, match=r"categories \[1\], which aren't among \[0\]"):
        load_stream(stream, label_names=["cat"])
    with pytest.raises(DataError, match=r"\(its first 4 rows\)(?s:.*)negative width"):
        load_stream(stream, label_names=CLASSES, box_format="xyxy")
    with pytest.raises(DataError, match=r"has no column 'objects', but image"):
        load_stream(stream.select_columns(["image"]), label_names=CLASSES)
    with pytest.raises(DataError, match=r"is empty"):
        load_stream(stream.take(0), label_names=CLASSES)
    path = written(tmp_path, 2)
    with pytest.raises(DataError, match=r"a stream can't be sliced"):
        load_stream(path, "train[:50%]")
    with pytest.raises(DataError, match=r"has no split 'test'; it has train"):
        load_stream(path, "test")
    with pytest.raises(DataError, match=r"can't be opened as a data set \(there is no such folder\)"):
        load_stream(str(tmp_path / "nowhere"))
