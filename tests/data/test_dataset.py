import os
from operator import itemgetter

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from crosskd_hf.data.coco import load_coco
from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.items import training_boxes
from crosskd_hf.data.sampler import SampleKey

SMALL = {"short_side": 20, "long_side": 40}


@pytest.fixture
def split(write_coco, tmp_path):
    root = write_coco(
        [(1, 40, 20), (2, 20, 40), (3, 30, 30)], [(1, 1, 7, [4, 2, 10, 5]), (2, 1, 3, [0, 0, 9, 9], {"iscrowd": 1})]
    )
    return load_coco(root, "mini", cache_dir=tmp_path / "cache")


def test_training_item(split):
    item = DetectionDataset(split, train=True, short_side=40, long_side=90, flip_probability=0)[0]
    assert set(item) == {"image", "size", "image_id", "original_size", "class_labels", "boxes"}
    assert type(item["image"]) is torch.Tensor and type(item["boxes"]) is torch.Tensor
    assert (item["image"].shape, item["image"].dtype, item["size"]) == ((3, 20, 40), torch.uint8, (40, 80))
    assert (item["image_id"], item["original_size"]) == (1, (20, 40))
    assert item["class_labels"].tolist() == [1] and item["class_labels"].dtype == torch.int64
    assert item["boxes"].tolist() == [[8, 4, 28, 14]] and item["boxes"].dtype == torch.float32


def test_image_without_boxes(split):
    item = DetectionDataset(split, train=True, **SMALL)[1]
    assert item["boxes"].shape == (0, 4) and item["class_labels"].shape == (0,)


def test_evaluation_item_has_no_augmentation(split):
    dataset = DetectionDataset(
        split, train=False, **SMALL, multiscale="range", multiscale_short_sides=(4, 8), flip_probability=1
    )
    item = dataset[2]
    assert item["boxes"].shape == (0, 4)
    assert item["size"] == (20, 20) and item["original_size"] == (30, 30)


def test_a_sliver_that_is_rounded_to_nothing_is_left_out(write_coco, tmp_path):
    boxes = [[39.9999999, 5, 4, 4], [30, 5, 9, 8]]  # the first begins at 40 in float32, where the image ends
    root = write_coco([(1, 40, 20)], [(i, 1, 7, box) for i, box in enumerate(boxes, 1)])
    split = load_coco(root, "mini", cache_dir=tmp_path / "cache")
    item = DetectionDataset(split, train=True, **SMALL, flip_probability=0)[0]
    assert item["boxes"].tolist() == [[30, 5, 39, 13]] and len(item["class_labels"]) == 1


@pytest.mark.parametrize(
    ("bbox", "area", "crowd", "kept"),
    [
        ([5, 5, 1, 1], 1, False, True),
        ([5, 5, 0.99, 1], 1, False, False),
        ([5, 5, 1, 0.99], 1, False, False),
        ([5, 5, 4, 4], 0, False, False),
        ([5, 5, 4, 4], 0.01, False, True),
        ([5, 5, 4, 4], 16, True, False),
        ([-4, 5, 4, 4], 16, False, False),  # ends where the image begins
        ([-3.9, 5, 4, 4], 16, False, True),
        ([5, -4, 4, 4], 16, False, False),
        ([30, 5, 4, 4], 16, False, False),  # begins where the image, 30 wide and 20 high, ends
        ([29.9, 5, 4, 4], 16, False, True),
        ([5, 20, 4, 4], 16, False, False),
        ([5, 19.9, 4, 4], 16, False, True),
    ],
)
def test_boxes_that_are_trained_on(bbox, area, crowd, kept):
    objects = {"bbox": [bbox], "category": [3], "area": [area], "iscrowd": [crowd]}
    labels, boxes = training_boxes(objects, height=20, width=30)
    assert labels.tolist() == [3] * kept
    x, y, w, h = bbox
    assert boxes.tolist() == [pytest.approx([x, y, x + w, y + h])] * kept  # clipped only after resizing


def test_box_corners_are_added_before_they_are_rounded_to_float32():
    objects = {"bbox": [[306.76, 133.32, 121.48, 498.58]], "category": [0], "area": [1.0], "iscrowd": [False]}
    corner = torch.tensor(306.76 + 121.48, dtype=torch.float32)
    assert training_boxes(objects, 640, 480)[1][0, 2] == corner
    assert corner != torch.tensor(306.76) + torch.tensor(121.48)  # so that the case tells


def augmented(split, key, seed=0):
    dataset = DetectionDataset(
        split, train=True, short_side=8, long_side=400, multiscale="range", multiscale_short_sides=(8, 200), seed=seed
    )
    return dataset[key]


def test_augmentation_is_a_function_of_seed_epoch_and_index(split):
    size = augmented(split, SampleKey(3, 0))["size"]
    torch.rand(5)
    state = torch.get_rng_state()
    assert augmented(split, SampleKey(3, 0))["size"] == size
    assert torch.equal(torch.get_rng_state(), state)  # the model's dropout is not disturbed
    assert augmented(split, SampleKey(4, 0))["size"] != size
    assert augmented(split, SampleKey(3, 0), seed=1)["size"] != size
    assert augmented(split, SampleKey(3, 1))["size"] != size[::-1]  # image 2 is image 1 turned


def test_workers_change_nothing(split):
    dataset = DetectionDataset(
        split, train=True, short_side=8, long_side=400, multiscale="choice", multiscale_short_sides=range(8, 200)
    )
    keys = [SampleKey(epoch, index) for epoch in range(2) for index in range(3)]
    here = [dataset[key]["size"] for key in keys]
    loader = DataLoader(dataset, sampler=keys, batch_size=None, num_workers=2, collate_fn=itemgetter("size"))
    assert list(loader) == here


def test_orientations_do_not_decode(split):
    dataset = DetectionDataset(split, train=True)
    for row in split.dataset.with_format("arrow")[:]["image"].to_pylist():
        os.unlink(row["path"])
    assert dataset.orientations().tolist() == [False, True, False]  # a square one is not narrower than high
    assert dataset.orientations().dtype == torch.bool


def test_index_outside(split):
    dataset = DetectionDataset(split, train=True)
    assert len(list(dataset)) == len(dataset) == 3
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"index {index} is outside a data set of 3"):
            dataset[index]


def test_unreadable_images_are_named(split):
    paths = [row["path"] for row in split.dataset.with_format("arrow")[:]["image"].to_pylist()]
    dataset = DetectionDataset(split, train=True)
    os.unlink(paths[0])
    with pytest.raises(ValueError, match=r"image 1 \(1\.png\) does not exist; restore it, or start again"):
        dataset[0]
    with open(paths[1], "r+b") as file:
        file.truncate(60)
    with pytest.raises(ValueError, match=r"image 2 \(2\.png\) cannot be read"):
        dataset[1]
    Image.new("RGB", (30, 29)).save(paths[2])
    with pytest.raises(ValueError, match=r"image 3 \(3\.png\) is 30 x 29 pixels, but .* says 30 x 30"):
        dataset[2]
