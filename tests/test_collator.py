import pytest
import torch
from torch.utils.data import DataLoader

from crosskd_hf.data.coco import load_coco
from crosskd_hf.data.collator import DetectionCollator
from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.sampler import OrientationBatchSampler
from crosskd_hf.data.split import keep_for_training
from crosskd_hf.models.image_processing_dense import DenseDetectorImageProcessor


def item(image_id, height, width, boxes=None):
    made = {
        "image": torch.full((3, height, width), image_id, dtype=torch.uint8),
        "image_id": image_id,
        "original_size": (height // 2, width // 2),
    }
    if boxes is not None:
        made["boxes"] = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        made["class_labels"] = torch.arange(len(boxes))
    return made


@pytest.fixture
def collator():
    return DetectionCollator(DenseDetectorImageProcessor(image_mean=[0.0] * 3, image_std=[1.0] * 3))


def test_training_batch(collator):
    batch = collator([item(7, 20, 40, [[1, 2, 3, 4], [5, 6, 7, 8]]), item(9, 34, 6, [])])
    assert set(batch) == {"pixel_values", "pixel_mask", "labels"}
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"][0, 0].sum() == 7 * 20 * 40 and batch["pixel_values"][1, 2, :34, :6].eq(9).all()
    assert batch["pixel_mask"].flatten(1).sum(1).tolist() == [800, 204]
    first, second = batch["labels"]
    assert {name: value.tolist() for name, value in first.items()} == {
        "class_labels": [0, 1],
        "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]],
        "image_id": 7,
        "size": [20, 40],
        "orig_size": [10, 20],
    }
    assert {value.dtype for name, value in first.items() if name != "boxes"} == {torch.int64}
    assert second["boxes"].shape == (0, 4) and second["class_labels"].dtype == torch.int64


def test_evaluation_batch(collator):
    batch = collator([item(7, 20, 40), item(9, 34, 6)])
    assert set(batch) == {"pixel_values", "pixel_mask", "image_ids", "original_sizes"}
    assert batch["image_ids"].tolist() == [7, 9] and batch["image_ids"].dtype == torch.int64
    assert batch["original_sizes"].tolist() == [[10, 20], [17, 3]] and batch["original_sizes"].dtype == torch.int64


@pytest.mark.parametrize("items", [[], [item(7, 4, 4), item(9, 4, 4, [])]])
def test_refused_batches(collator, items):
    with pytest.raises(ValueError, match="at least one item, and training items only or evaluation items only"):
        collator(items)


def test_from_files_to_batches(coco_mini, tmp_path):
    split = keep_for_training(load_coco(coco_mini, "train2017", cache_dir=tmp_path))
    dataset = DetectionDataset(split, train=True, short_side=96, long_side=160)
    loader = DataLoader(
        dataset,
        batch_sampler=OrientationBatchSampler(dataset.orientations(), 8, seed=0),
        collate_fn=DetectionCollator(DenseDetectorImageProcessor()),
        num_workers=2,
    )
    batches = list(loader)
    assert len(batches) == len(loader) == 10
    seen = [int(label["image_id"]) for batch in batches for label in batch["labels"]]
    assert sorted(seen) == sorted(split.dataset["image_id"][:])
    for batch in batches:
        sizes = [(int(mask.any(1).sum()), int(mask.any(0).sum())) for mask in batch["pixel_mask"]]
        assert sizes == [tuple(label["size"].tolist()) for label in batch["labels"]]
