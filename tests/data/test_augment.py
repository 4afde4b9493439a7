"""Augmentations by name: options, boxes that follow the pixels, keys, plain epochs."""

import pickle

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from crosskd_hf.data.augment import AUGMENTATIONS, augmentation
from crosskd_hf.data.coco import load_coco
from crosskd_hf.data.collator import DetectionCollator
from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.sampler import SampleKey, stable_seed
from crosskd_hf.data.transforms import RandomFlip
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor

STRONG = ["photometric_distort", {"zoom_out": {"probability": 1}}, {"iou_crop": {"probability": 1}}, "flip"]


def painted(height, width, boxes):
    """A black image whose box number k, of whole pixels, has the grey level k + 1 and the label k."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for k, (left, top, right, bottom) in enumerate(boxes):
        image[:, max(top, 0) : bottom, max(left, 0) : right] = k + 1
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"image": image, "boxes": boxes, "class_labels": torch.arange(len(boxes))}


def enclosing(image, level):
    """xyxy of all pixels of a grey level."""
    rows, columns = (image[0] == level).nonzero().unbind(1)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


def always(name, **options):
    return augmentation({name: {"probability": 1, **options}})


# Options ------------------------------------------------------------------------------------------------------------


def test_a_name_alone_has_published_options():
    """Those of torchvision's references and of D-FINE."""
    zoom, distort, crop = (augmentation(name).transform for name in ("zoom_out", "photometric_distort", "iou_crop"))
    assert type(zoom) is v2.RandomZoomOut and (zoom.p, zoom.side_range, zoom.fill) == (0.5, [1.0, 4.0], [0, 0, 0])
    assert type(distort) is v2.RandomPhotometricDistort and distort.p == 0.5
    assert type(crop) is v2.RandomApply and (crop.p, type(crop.transforms[0])) == (0.8, v2.RandomIoUCrop)
    assert augmentation("flip").probability == 0.5
    assert all(pickle.dumps(augmentation({name: None})) for name in AUGMENTATIONS)  # for workers that are spawned


def test_options_reach_torchvision():
    zoom = augmentation({"zoom_out": {"probability": "1e-2", "side_range": [2, 2], "fill": [124, 116, 104]}}).transform
    assert (zoom.p, zoom.side_range, zoom.fill) == (0.01, [2, 2], [124, 116, 104])
    assert augmentation({"photometric_distort": {"probability": 1}}).transform.p == 1
    assert augmentation({"iou_crop": {"probability": 0}}).transform.p == 0
    assert augmentation({"flip": {"probability": 0.25}}).probability == 0.25


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("flop", "no augmentation 'flop'. Valid: flip, photometric_distort, zoom_out, iou_crop"),
        ({"flip": {}, "iou_crop": {}}, "is neither a name nor one name with its options"),
        ({}, "{} is neither a name"),
        (3, "3 is neither a name"),
        ({"zoom_out": 0.5}, "zoom_out: 0.5 must hold options and their values. Valid: probability, side_range, fill"),
        ({"iou_crop": {"p": 0.5}}, "iou_crop has no option 'p' (value 0.5). Valid: probability"),
        ({"flip": {"probability": 1.01}}, "flip.probability: 1.01 must be at most 1"),
        ({"flip": {"probability": -0.01}}, "flip.probability: -0.01 must be at least 0"),
        ({"flip": {"probability": True}}, "flip.probability: True is no number"),
        ({"flip": {"probability": float("nan")}}, "flip.probability: nan is not finite"),
        ({"flip": {"probability": None}}, "flip.probability: None must have a value"),
        ({"zoom_out": {"side_range": 2}}, "zoom_out.side_range: 2 is no list"),
        ({"zoom_out": {"side_range": [2]}}, "zoom_out.side_range: [2] must have 2 numbers"),
        ({"zoom_out": {"side_range": [0.9, 2]}}, "zoom_out.side_range: [0.9, 2] must be at least 1"),
        ({"zoom_out": {"side_range": [1, 8.1]}}, "zoom_out.side_range: [1, 8.1] must be at most 8"),
        ({"zoom_out": {"side_range": [3, 2]}}, "zoom_out.side_range: [3.0, 2.0] must be [lowest, highest]"),
        ({"zoom_out": {"fill": [0, 0]}}, "zoom_out.fill: [0, 0] must have 3 numbers"),
        ({"zoom_out": {"fill": [0, 0, 256]}}, "zoom_out.fill: [0, 0, 256] must be at most 255"),
    ],
)
def test_refused_items(item, message):
    with pytest.raises(ValueError) as error:
        augmentation(item)
    assert message in str(error.value)


# Pixels and boxes ---------------------------------------------------------------------------------------------------


def test_zoom_out_moves_boxes_with_their_pixels():
    torch.manual_seed(0)
    places = set()
    for _ in range(20):
        sample = painted(6, 10, [[0, 0, 3, 2], [4, 1, 10, 6]])
        sample["image"] += 1  # black only beside the image
        out = always("zoom_out", side_range=[2, 2], fill=[7, 8, 9])(sample)
        assert out["image"].shape == (3, 12, 20) and out["image"].dtype == torch.uint8
        assert type(out["image"]) is type(out["boxes"]) is torch.Tensor and out["boxes"].dtype == torch.float32
        assert out["boxes"].tolist() == [enclosing(out["image"], 2), enclosing(out["image"], 3)]
        assert out["class_labels"].tolist() == [0, 1]
        canvas = (out["image"] == torch.tensor([7, 8, 9])[:, None, None]).all(0)
        assert canvas.sum() == 12 * 20 - 6 * 10
        places.add(tuple(out["boxes"][0, :2].tolist()))
    assert len(places) > 5


def test_a_crop_moves_and_clips_boxes_with_their_pixels():
    torch.manual_seed(0)
    whole = lost = clipped = 0
    for _ in range(100):
        sample = painted(60, 80, [[2, 3, 20, 25], [30, 5, 75, 30], [40, 35, 60, 58]])
        out = always("iou_crop")(sample)
        assert type(out["image"]) is type(out["boxes"]) is torch.Tensor
        labels = out["class_labels"].tolist()
        assert labels  # a crop has at least one box
        assert out["boxes"].tolist() == [enclosing(out["image"], label + 1) for label in labels]
        sizes = sample["boxes"][labels, 2:] - sample["boxes"][labels, :2]
        whole += out["image"].shape == (3, 60, 80)
        lost += len(labels) < 3
        clipped += not torch.equal(out["boxes"][:, 2:] - out["boxes"][:, :2], sizes)
    assert 0 < whole < 50 and lost > 20 and clipped > 20


def test_boxes_are_clipped_before_the_canvas_grows():
    """What lies outside of the image has no pixels there either."""
    out = always("zoom_out", side_range=[2, 2])(painted(6, 10, [[-4, 2, 30, 5]]))
    left, _, right, _ = out["boxes"][0].tolist()
    assert right - left == 10 and out["boxes"].tolist() == [enclosing(out["image"], 1)]


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ([3, 3, 4, 8], 1),
        ([3, 3, 3.99, 8], 0),
        ([3, 3, 8, 4], 1),
        ([3, 3, 8, 3.99], 0),
        ([-3, 3, 1, 8], 1),
        ([-3, 3, 0.99, 8], 0),
        ([9, 3, 12, 8], 1),
        ([9.01, 3, 12, 8], 0),
    ],
)
def test_slivers_are_left_out_with_their_labels(box, kept):
    sample = painted(10, 10, []) | {"boxes": torch.tensor([box, [0, 0, 9, 9]]), "class_labels": torch.tensor([5, 6])}
    out = augmentation({"zoom_out": {"probability": 0}})(sample)
    assert out["class_labels"].tolist() == [5] * kept + [6] and len(out["boxes"]) == 1 + kept


def test_distortion_changes_pixels_alone():
    torch.manual_seed(0)
    sample = painted(20, 20, [[2, 2, 9, 9]])
    sample["image"][:] = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None]
    out = always("photometric_distort")(sample)
    assert type(out["image"]) is torch.Tensor and out["image"].dtype == torch.uint8
    assert out["image"].shape == sample["image"].shape and not torch.equal(out["image"], sample["image"])
    assert out["boxes"] is sample["boxes"] and out["class_labels"] is sample["class_labels"]


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_without_boxes(name):
    out = always(name)(painted(20, 30, []))
    assert out["boxes"].shape == (0, 4) and out["class_labels"].shape == (0,)


@pytest.mark.parametrize(("side", "changed"), [(3, False), (4, True)])
def test_images_too_small_to_crop_stay(side, changed):
    torch.manual_seed(0)
    samples = [painted(side, 2 * side, [[0, 0, 2 * side, side]]) for _ in range(100)]
    assert any(always("iou_crop")(s)["image"].shape != s["image"].shape for s in samples) == changed


# The data set -------------------------------------------------------------------------------------------------------


@pytest.fixture
def split(write_coco, tmp_path):
    """Two noise images; the second's box is half a pixel inside of it."""
    root = write_coco([(1, 40, 20), (2, 40, 30)], [(1, 1, 7, [4, 2, 20, 15]), (2, 2, 3, [39.5, 5, 4, 9])])
    pixels = torch.Generator().manual_seed(0)
    for name, height in (("1.png", 20), ("2.png", 30)):
        noise = torch.randint(0, 256, (height, 40, 3), dtype=torch.uint8, generator=pixels)
        Image.fromarray(noise.numpy()).save(root / "mini" / name)
    return load_coco(root, "mini", cache_dir=tmp_path / "cache")


def dataset_of(split, **options):
    return DetectionDataset(split, train=True, **{"short_side": 20, "long_side": 80, **options})


def same(one, other):
    tensors = all(torch.equal(one[name], other[name]) for name in ("image", "boxes", "class_labels"))
    return tensors and tuple(one["size"]) == tuple(other["size"])


def test_without_the_key_a_flip_and_a_size_are_drawn_as_ever(split):
    """One number for the flip, one for the size, and nothing else."""
    dataset = dataset_of(split, multiscale="range", multiscale_short_sides=(20, 40), seed=3)
    evaluated = DetectionDataset(split, train=False, short_side=20, long_side=80)
    flips = set()
    for epoch in range(8):
        torch.manual_seed(stable_seed(3, epoch, 0))
        flipped, side = bool(torch.rand(()) < 0.5), int(torch.randint(20, 41, ()))
        item, image = dataset[SampleKey(epoch, 0)], evaluated[0]["image"]
        assert torch.equal(item["image"], image.flip(-1) if flipped else image)
        assert item["size"] == (side, 2 * side)
        box = torch.tensor([16.0, 2, 36, 17] if flipped else [4.0, 2, 24, 17])
        assert torch.equal(item["boxes"], (box * torch.tensor(side / 20)).unsqueeze(0))
        flips.add(flipped)
    assert flips == {True, False}


def test_a_list_with_flip_alone_is_the_default(split):
    default, listed, none = dataset_of(split), dataset_of(split, augment=["flip"]), dataset_of(split, augment=[])
    keys = [SampleKey(epoch, 0) for epoch in range(6)]
    assert all(same(default[key], listed[key]) for key in keys)
    plain = dataset_of(split, flip_probability=0)
    assert all(same(plain[key], none[key]) for key in keys)


def test_the_list_is_applied_in_its_order(split):
    zoom = {"zoom_out": {"probability": 1, "side_range": [4, 4]}}
    dataset = dataset_of(split, augment=[zoom, {"flip": {"probability": 1}}, "iou_crop"])
    names = [type(getattr(step, "transform", step)) for step in dataset.augmentations]
    assert names == [v2.RandomZoomOut, RandomFlip, v2.RandomApply]


def test_a_key_gives_the_same_sample_in_any_worker(split):
    dataset, keys = dataset_of(split, augment=STRONG), [SampleKey(epoch, i) for epoch in range(4) for i in range(2)]
    here = [dataset[key] for key in keys]
    assert not any(same(here[2 * epoch], here[0]) for epoch in range(1, 4))
    assert not same(here[0], dataset_of(split, augment=STRONG, seed=1)[keys[0]])
    torch.rand(5)
    state = torch.get_rng_state()
    assert same(dataset[keys[5]], here[5])
    assert torch.equal(torch.get_rng_state(), state)
    loader = DataLoader(dataset, sampler=keys, batch_size=None, num_workers=2)
    for item, expected in zip(loader, here, strict=True):
        assert same(item, expected)


def test_an_item_is_sized_after_its_augmentation(split):
    item = dataset_of(split, augment=[{"zoom_out": {"probability": 1, "side_range": [2, 2]}}], short_side=10)[0]
    assert item["size"] == (10, 20) and item["original_size"] == (20, 40)
    assert item["image"].shape == (3, 10, 20)  # of a canvas of 40 x 80
    box = item["boxes"][0]
    assert (box[2:] - box[:2]).tolist() == [5, 3.75]


def test_an_image_whose_boxes_all_vanish_is_trained_on(split):
    assert len(dataset_of(split, flip_probability=0)[1]["boxes"]) == 1
    item = dataset_of(split, augment=[{"zoom_out": {"probability": 0}}, "iou_crop", "flip"])[1]
    assert item["boxes"].shape == (0, 4) and item["class_labels"].shape == (0,)
    assert not len(DetectionCollator(DenseDetectorImageProcessor())([item])["labels"][0]["boxes"])


def test_in_the_last_epochs_only_flips_are_left(split):
    zoom, flip = {"zoom_out": {"probability": 1, "side_range": [2, 2]}}, {"flip": {"probability": 1}}
    dataset, flipped = dataset_of(split, augment=[zoom, flip], plain_epochs=2), dataset_of(split, augment=[flip])
    keys = [SampleKey(epoch, 0) for epoch in range(5)]
    assert not any(same(dataset[key], flipped[key]) for key in keys)  # nobody has said which are the last
    dataset.set_epochs(5)
    assert [same(dataset[key], flipped[key]) for key in keys] == [False, False, False, True, True]


def test_some_epochs_are_not_plain(split):
    dataset_of(split, augment=["iou_crop"], plain_epochs=2).set_epochs(3)
    dataset_of(split).set_epochs(0)
    with pytest.raises(ValueError, match=r"data\.plain_epochs is 2, but the number of epochs 2: data"):
        dataset_of(split, augment=["iou_crop"], plain_epochs=2).set_epochs(2)


def test_names_are_checked_before_images_are_read(split):
    with pytest.raises(ValueError, match="no augmentation 'flop'"):
        dataset_of(split, augment=["flop"])
