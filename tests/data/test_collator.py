import pytest
import torch

from crosskd_hf.data.collator import DetectionCollator, padded_number
from crosskd_hf.data.transforms import resize
from crosskd_hf.models.image_processing import BGR_CAFFE, DenseDetectorImageProcessor


def item(image_id, height, width, boxes=None):
    made = {
        "image": torch.full((3, height, width), image_id, dtype=torch.uint8),
        "size": (height, width),
        "image_id": image_id,
        "original_size": (height // 2, width // 2),
    }
    if boxes is not None:
        made["boxes"] = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        made["class_labels"] = torch.arange(len(boxes))
    return made


@pytest.fixture
def collator():
    return DetectionCollator(DenseDetectorImageProcessor(image_mean=[0.0] * 3, image_std=[1.0] * 3), padded=True)


def test_training_batch(collator):
    batch = collator([item(7, 20, 40, [[1, 2, 3, 4], [5, 6, 7, 8]]), item(9, 34, 6, [])])
    assert set(batch) == {"pixel_values", "pixel_mask", "labels"}
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"][0, 0].sum() == 7 * 20 * 40 and batch["pixel_values"][1, 2, :34, :6].eq(9).all()
    assert batch["pixel_mask"].flatten(1).sum(1).tolist() == [800, 204]
    padding = [[0, 0, 0, 0]]
    assert {name: value.tolist() for name, value in batch["labels"].items()} == {
        "class_labels": [[0, 1] + 6 * [0], 8 * [0]],
        "boxes_xyxy": [[[1, 2, 3, 4], [5, 6, 7, 8], *6 * padding], 8 * padding],
        "mask": [2 * [True] + 6 * [False], 8 * [False]],
        "image_id": [7, 9],
        "size": [[20, 40], [34, 6]],
        "orig_size": [[10, 20], [17, 3]],
    }
    types = {name: value.dtype for name, value in batch["labels"].items()}
    assert (types.pop("boxes_xyxy"), types.pop("mask")) == (torch.float32, torch.bool)
    assert set(types.values()) == {torch.int64}


@pytest.mark.parametrize(("boxes", "length"), [(0, 8), (8, 8), (9, 16), (513, 1024)])
def test_boxes_are_padded_to_few_lengths(collator, boxes, length):
    assert padded_number(boxes) == length
    labels = collator([item(1, 4, 4, []), item(2, 4, 4, [[0, 0, 1, 1]] * boxes)])["labels"]
    assert labels["boxes_xyxy"].shape == (2, length, 4)
    assert labels["mask"].sum(1).tolist() == [0, boxes] and labels["class_labels"][1, :boxes].tolist() == list(
        range(boxes)
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_images_are_resized_into_the_batch(normalize):
    """Each as it is alone, also one that has its size already, and nothing but zeros beside them."""
    pixels = torch.Generator().manual_seed(0)
    sizes = {(20, 30): (40, 60), (50, 20): (25, 10), (12, 70): (12, 70)}
    items = [
        item(1, *old) | {"image": torch.randint(1, 256, (3, *old), dtype=torch.uint8, generator=pixels), "size": new}
        for old, new in sizes.items()
    ]
    processor = DenseDetectorImageProcessor(image_mean=[0.0] * 3, image_std=[1.0] * 3, size_divisor=1)
    values = DetectionCollator(processor, normalize=normalize)(items)["pixel_values"]
    assert values.shape == (3, 3, 40, 70)
    for made, given in zip(values.clone(), items, strict=True):
        h, w = given["size"]
        assert torch.equal(made[:, :h, :w].to(torch.uint8), resize(given["image"], (h, w)))
        made[:, :h, :w] = 0
        assert not made.any()


def test_unlabelled_batch(collator):
    assert set(collator([item(7, 20, 40), item(9, 34, 6)])) == {"pixel_values", "pixel_mask"}


def test_labels_are_detrs_unless_they_are_padded():
    collator = DetectionCollator(DenseDetectorImageProcessor())
    labels = collator([item(7, 20, 40, [[1, 2, 3, 4], [4, 6, 8, 8]]), item(9, 34, 6, [])])["labels"]
    assert {name: value.tolist() for name, value in labels[0].items()} == {
        "class_labels": [0, 1],
        "boxes": [pytest.approx([0.05, 0.15, 0.05, 0.1]), pytest.approx([0.15, 0.35, 0.1, 0.1])],
        "image_id": [7],
        "size": [20, 40],
        "orig_size": [10, 20],
    }
    assert labels[1]["boxes"].shape == (0, 4) and labels[1]["size"].tolist() == [34, 6]


@pytest.mark.parametrize("items", [[], [item(7, 4, 4), item(9, 4, 4, [])]])
def test_refused_batches(collator, items):
    with pytest.raises(ValueError, match="at least one item, and labelled items only or unlabelled items only"):
        collator(items)


@pytest.mark.parametrize(
    ("settings", "boxes"), [(BGR_CAFFE, [[1, 2, 3, 4]]), ({"pad_size": {"height": 96, "width": 128}}, None)]
)
def test_finishing_on_the_device_gives_the_same_batch(settings, boxes):
    processor = DenseDetectorImageProcessor(**settings)
    items = [item(7, 20, 40, boxes), item(9, 34, 6, boxes)]
    raw = DetectionCollator(processor, normalize=False, padded=True)
    light = raw(items)
    assert light["pixel_values"].shape == (2, 3, 34, 40) and light["pixel_values"].dtype == torch.uint8
    done, expected = raw.finish(light), DetectionCollator(processor, padded=True)(items)
    assert set(done) == set(expected)
    done, expected = ({**b.pop("labels", {}), **b} for b in (done, expected))
    assert all(torch.equal(done[name], expected[name]) for name in expected)


@pytest.mark.parametrize("boxes", [[[30, 20, 10, 9]], [[50, 5, 60, 9]]])
def test_labels_that_cannot_be_right_are_refused(collator, boxes):
    with pytest.raises(ValueError, match=r"box 0 of image 1 \(image_id 9\) has .*xyxy in pixels of pixel_values"):
        collator([item(7, 20, 40, []), item(9, 34, 40, boxes)])


def test_a_tiny_box_of_a_large_image_passes(collator):
    batch = collator([item(7, 800, 1067, [[0.27, 0.27, 0.8, 0.8]])])  # [1, 1, 3, 3] of 4000 x 3000 pixels
    assert batch["labels"]["mask"].sum() == 1
