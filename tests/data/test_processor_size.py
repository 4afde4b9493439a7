"""Images and labels of transformers' detectors are what their own image processors make of them."""

import pytest
import torch
from tiny import tiny_split
from transformers import (
    ConditionalDetrImageProcessor,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    RfDetrImageProcessor,
    RTDetrImageProcessor,
    YolosImageProcessor,
)

from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.processor_size import ProcessorCollator
from crosskd_hf.data.sampler import OrientationBatchSampler, SampleKey
from crosskd_hf.utils.images import load_tensor

FIXED = {"height": 64, "width": 96}
RATIO = {"shortest_edge": 48, "longest_edge": 80}
PROCESSORS = [
    (RTDetrImageProcessor, FIXED),
    (RTDetrImageProcessor, {"height": 32, "width": 32}),
    (RfDetrImageProcessor, FIXED),
    (DeformableDetrImageProcessor, RATIO),
    (DetrImageProcessor, RATIO),
    (ConditionalDetrImageProcessor, RATIO),
    (YolosImageProcessor, RATIO),
]


def dataset_for(processor, split, **options) -> DetectionDataset:
    dataset = DetectionDataset(split, **{"train": True, "flip_probability": 0.0, **options})
    dataset.use_processor(processor)
    return dataset


@pytest.mark.parametrize(("processor_class", "size"), PROCESSORS)
def test_pixels_masks_and_labels_are_the_processors_own(tmp_path, processor_class, size) -> None:
    """From the files and COCO's annotations: every difference in pixels is 0."""
    split, processor = tiny_split(tmp_path), processor_class(size=size)
    dataset = dataset_for(processor, split)
    batch = ProcessorCollator(processor)([dataset[i] for i in range(3)])
    rows = [split.dataset.with_format(None)[i] for i in range(3)]
    images = [load_tensor(str(tmp_path / "mini" / row["file_name"])) for row in rows]
    annotations = [
        {
            "image_id": row["image_id"],
            "annotations": [
                {"bbox": bbox, "category_id": label, "area": area, "iscrowd": 0}
                for bbox, label, area in zip(*(row["objects"][k] for k in ("bbox", "category", "area")), strict=True)
            ],
        }
        for row in rows
    ]
    expected = processor(images, annotations=annotations, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert ("pixel_mask" in batch) == ("pixel_mask" in expected)
    if "pixel_mask" in batch:
        assert torch.equal(batch["pixel_mask"], expected["pixel_mask"])
    # Image by image: in a padded batch the processors give boxes relative to the padding, but take predicted ones
    # relative to the image, as the detectors' masked position embeddings do.
    alone = [processor(i, annotations=a, return_tensors="pt") for i, a in zip(images, annotations, strict=True)]
    for ours, one in zip(batch["labels"], alone, strict=True):
        theirs = one["labels"][0]
        assert ours["class_labels"].tolist() == theirs["class_labels"].tolist()
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], atol=1e-6, rtol=0)


def test_unlabelled_items_have_no_labels(tmp_path) -> None:
    processor = RTDetrImageProcessor(size=FIXED)
    dataset = dataset_for(processor, tiny_split(tmp_path), train=False)
    bare = [{k: v for k, v in dataset[i].items() if k not in ("boxes", "class_labels")} for i in range(2)]
    assert set(ProcessorCollator(processor)(bare)) == {"pixel_values"}
    with pytest.raises(ValueError, match="only"):
        ProcessorCollator(processor)([bare[0], dataset[1]])


def test_an_image_without_boxes_is_a_negative(tmp_path) -> None:
    processor = RTDetrImageProcessor(size=FIXED)
    item = dataset_for(processor, tiny_split(tmp_path))[0]
    item["boxes"], item["class_labels"] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    (labels,) = ProcessorCollator(processor)([item])["labels"]
    assert labels["boxes"].shape == (0, 4) and labels["class_labels"].shape == (0,)


def test_a_batch_has_one_size_of_the_list_and_batches_differ(tmp_path) -> None:
    sides = [32, 64, 96]
    dataset = dataset_for(
        RTDetrImageProcessor(size=FIXED), tiny_split(tmp_path), multiscale="batch", multiscale_short_sides=sides
    )
    sampler = OrientationBatchSampler(dataset.orientations(), 2, seed=3)
    drawn = set()
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for keys in sampler:
            sizes = {dataset[key]["size"] for key in keys}
            assert len(sizes) == 1
            drawn |= sizes
            assert {dataset[key]["size"] for key in keys} == sizes  # asked again, the same
    assert drawn == {(side, side) for side in sides}


@pytest.mark.parametrize(("multiscale", "sides"), [("choice", [32, 48]), ("range", [32, 48])])
def test_the_short_side_of_each_image_is_drawn_where_the_ratio_is_kept(tmp_path, multiscale, sides) -> None:
    processor = DetrImageProcessor(size=RATIO)
    dataset = dataset_for(processor, tiny_split(tmp_path), multiscale=multiscale, multiscale_short_sides=sides)
    drawn = {min(dataset[SampleKey(epoch, 0)]["size"]) for epoch in range(12)}
    assert drawn == set(sides) if multiscale == "choice" else drawn <= set(range(32, 49)) and len(drawn) > 2


def test_an_image_that_fills_up_a_batch_has_its_size(tmp_path) -> None:
    """The first one's: what its pixels were resized to."""
    options = {"multiscale": "batch", "multiscale_short_sides": [32, 64]}
    dataset = dataset_for(RTDetrImageProcessor(size=FIXED), tiny_split(tmp_path), **options)
    items = {item["size"]: item for item in (dataset[SampleKey(0, 0, batch)] for batch in range(12))}
    assert set(items) == {(32, 32), (64, 64)}
    batch = ProcessorCollator(dataset.fit.processor)([items[32, 32], items[64, 64]])
    assert batch["pixel_values"].shape[-2:] == (32, 32)
    assert [label["size"].tolist() for label in batch["labels"]] == [[32, 32]] * 2


def test_the_last_epochs_have_the_processors_size(tmp_path) -> None:
    options = {"multiscale": "batch", "multiscale_short_sides": (32,), "augment": ["flip"], "plain_epochs": 1}
    dataset = dataset_for(RTDetrImageProcessor(size=FIXED), tiny_split(tmp_path), **options)
    dataset.set_epochs(3)
    assert [dataset[SampleKey(epoch, 0)]["size"] for epoch in range(3)] == [(32, 32), (32, 32), (64, 96)]
