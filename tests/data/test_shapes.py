"""Generated images: seeded, boxes on the shapes, crowds and empty images among them."""

import numpy as np
import pytest
import torch

from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.load import load_datasets
from crosskd_hf.data.settings import DataSection
from crosskd_hf.data.shapes import CLASSES, draw_scene, load_shapes
from crosskd_hf.data.split import keep_for_training


def scene(index=0, split="train", side=96, difficulty=0.5, seed=0):
    return draw_scene(index, split, side, difficulty, seed)


def test_an_image_is_a_function_of_its_settings():
    first = scene()
    assert np.array_equal(first.pixels, scene().pixels) and first.boxes == scene().boxes
    for other in ({"index": 1}, {"split": "val"}, {"seed": 1}, {"difficulty": 0.6}):
        assert not np.array_equal(first.pixels, scene(**other).pixels), other


def test_what_scenes_hold():
    """Boxes of whole pixels inside the image; crowds and empty images; with difficulty, more and smaller shapes."""
    easy, hard = ([scene(i, difficulty=difficulty) for i in range(60)] for difficulty in (0.0, 1.0))
    for s in (*easy, *hard):
        height, width = s.pixels.shape[:2]
        assert s.pixels.dtype == np.uint8 and (height, width) in ((72, 96), (96, 72))
        assert len(s.boxes) == len(s.labels) == len(s.crowds) and s.crowds.count(True) <= 1
        for x, y, w, h in s.boxes:
            assert min(x, y) >= 0 and min(w, h) >= 1 and x + w <= width and y + h <= height
    assert sum(s.pixels.shape[0] > s.pixels.shape[1] for s in easy) == 20  # every third is upright
    assert {label for s in hard for label in s.labels} == set(range(len(CLASSES)))
    assert any(any(s.crowds) for s in hard) and any(not s.labels for s in hard)
    assert sum(len(s.boxes) for s in hard) > 1.5 * sum(len(s.boxes) for s in easy)
    widths = [np.median([box[2] for s in scenes for box in s.boxes]) for scenes in (easy, hard)]
    assert widths[1] < 0.8 * widths[0]


def test_a_split_is_cached_and_trains(tmp_path):
    split = load_shapes("train", 12, side=64, cache_dir=str(tmp_path))
    again = load_shapes("train", 12, side=64, cache_dir=str(tmp_path))
    assert split.dataset.cache_files == again.dataset.cache_files
    assert split.label_names == CLASSES and split.category_ids == (1, 2, 3, 4, 5, 6)
    longer = load_shapes("train", 15, side=64, cache_dir=str(tmp_path))
    assert longer.dataset[:12]["objects"] == split.dataset[:12]["objects"], "a longer split begins with the shorter"
    dataset = DetectionDataset(keep_for_training(split), train=True, short_side=48, long_side=64, flip_probability=0)
    item, row = dataset[0], keep_for_training(split).dataset[0]
    assert item["image"].shape[-2:] == (48, 64) and item["image"].dtype == torch.uint8
    kept = [box for box, crowd in zip(row["objects"]["bbox"], row["objects"]["iscrowd"], strict=True) if not crowd]
    assert item["boxes"].tolist() == [[x, y, x + w, y + h] for x, y, w, h in kept]
    objects = split.dataset["objects"][:]
    assert sorted(i for o in objects for i in o["id"]) == list(range(1, 1 + sum(len(o["id"]) for o in objects)))


def test_slices_share_no_image(tmp_path):
    parts = ("", "[:80%]", "[80%:]")
    whole, first, rest = (load_shapes(f"train{p}", 10, side=64, cache_dir=str(tmp_path)) for p in parts)
    ids = whole.dataset["image_id"][:]
    assert first.dataset["image_id"][:] + rest.dataset["image_id"][:] == ids and len(first) == 8
    data = DataSection(layout="shapes", max_train_images=10, max_val_images=5, shapes_side=64, cache_dir=str(tmp_path))
    data.train_split, data.val_split = "train[:80%]", "train[80%:]"
    train, evaluated = load_datasets(data, seed=0)
    assert not {*train.split.dataset["image_id"]} & {*evaluated.split.dataset["image_id"]}
    assert evaluated.split.dataset["file_name"][:] == rest.dataset["file_name"][:]


@pytest.mark.parametrize("wrong", [{"images": 0}, {"side": 31}, {"difficulty": 1.1}, {"difficulty": -0.1}])
def test_settings_that_make_no_images_are_refused(wrong):
    with pytest.raises(ValueError, match="generated images need"):
        load_shapes(**{"split": "train", "images": 1, **wrong})
