"""The image processor: pixels, padding, settings."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DetrImageProcessor

from crosskd_hf.data.transforms import SizeToFit, resize
from crosskd_hf.models.image_processing import BGR_CAFFE, RGB_IMAGENET, DenseDetectorImageProcessor
from crosskd_hf.utils.images import ImageError

TINY = {"shortest_edge": 8, "longest_edge": 16}


def grey(height, width, value=100):
    return Image.new("RGB", (width, height), (value, value, value))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_normalisation_and_padding():
    processor = DenseDetectorImageProcessor(size=TINY)
    batch = processor(images=Image.new("RGB", (5, 4), (10, 20, 30)), return_tensors="pt")
    assert set(batch) == {"pixel_values", "pixel_mask"}
    assert batch["pixel_values"].shape == (1, 3, 32, 32) and batch["pixel_values"].dtype == torch.float32
    pixel = torch.tensor([(10 - 123.675) / 58.395, (20 - 116.28) / 57.12, (30 - 103.53) / 57.375])
    inside = batch["pixel_values"][0, :, :8, :10]
    torch.testing.assert_close(inside, pixel[:, None, None].expand(3, 8, 10))
    assert batch["pixel_values"].count_nonzero() == inside.numel()  # the padding is 0 after normalisation
    assert batch["pixel_mask"].dtype == torch.bool
    assert batch["pixel_mask"][0, :8, :10].all() and batch["pixel_mask"].sum() == 80


def test_caffe_style_is_bgr():
    batch = DenseDetectorImageProcessor(size=TINY, **BGR_CAFFE)(Image.new("RGB", (4, 4), (10, 20, 30)))
    expected = [30 - 102.9801, 20 - 115.9465, 10 - 122.7717]
    assert batch["pixel_values"][0, :, 0, 0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("sizes", "padded"), [([(32, 64)], (32, 64)), ([(33, 64)], (64, 64)), ([(32, 65), (96, 1)], (96, 96))]
)
def test_padding_is_the_largest_of_the_batch_rounded_up(sizes, padded):
    images = [torch.full((3, *size), 200, dtype=torch.uint8) for size in sizes]
    batch = DenseDetectorImageProcessor().normalize_and_pad(images)
    assert batch["pixel_values"].shape == (len(sizes), 3, *padded)
    assert batch["pixel_mask"].flatten(1).sum(1).tolist() == [h * w for h, w in sizes]
    assert torch.equal(batch["pixel_values"][:, 0] != 0, batch["pixel_mask"])


def test_training_and_inference_pixels_are_equal():
    image = noise(37, 53)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    processor = DenseDetectorImageProcessor(size={"shortest_edge": 61, "longest_edge": 90})
    training = processor.normalize_and_pad([resize(tensor, SizeToFit(61, 90)({"image": tensor})["size"])])
    for given in (Image.fromarray(image), image, tensor, tensor.contiguous(), tensor.float()):
        inference = processor(images=given, return_tensors="pt")
        assert torch.equal(inference["pixel_values"], training["pixel_values"])
        assert torch.equal(inference["pixel_mask"], training["pixel_mask"])


def test_a_mixed_batch_is_its_images_alone():
    images = [Image.fromarray(noise(20, 30)), noise(30, 20, 1), torch.from_numpy(noise(25, 25, 2)).permute(2, 0, 1)]
    processor = DenseDetectorImageProcessor(size={"shortest_edge": 40, "longest_edge": 60})
    batch = processor(images=images, return_tensors="pt")
    assert batch["pixel_values"].shape == (3, 3, 64, 64)
    for index, image in enumerate(images):
        alone, mask = processor(images=[image])["pixel_values"][0], batch["pixel_mask"][index]
        h, w = mask.any(1).sum(), mask.any(0).sum()
        assert torch.equal(batch["pixel_values"][index, :, :h, :w], alone[:, :h, :w])


def test_one_pixel_and_one_row():
    processor = DenseDetectorImageProcessor(size=TINY)
    assert processor(grey(1, 1))["pixel_mask"].sum() == 8 * 8
    assert processor(np.full((1, 40, 3), 9, np.uint8))["pixel_mask"].sum() == 1 * 16
    assert processor(np.full((4, 40, 3), 9, np.uint8))["pixel_mask"].sum() == 2 * 16
    assert processor(torch.zeros(3, 1, 40, dtype=torch.uint8))["pixel_mask"].sum() == 1 * 16


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_other_modes_become_rgb(mode):
    assert DenseDetectorImageProcessor(size=TINY)(grey(4, 4).convert(mode))["pixel_values"].shape == (1, 3, 32, 32)


def test_value_ranges():
    processor = DenseDetectorImageProcessor(size=TINY)
    expected = processor(grey(4, 4, 51))["pixel_values"]
    for value in (0.2, 51.0, 51.3):  # torchvision's 0..1, grey levels, grey levels that are rounded
        assert torch.equal(processor(torch.full((3, 4, 4), value))["pixel_values"], expected)
    assert torch.equal(processor(np.full((4, 4, 3), 51, np.int64))["pixel_values"], expected)
    assert torch.equal(processor(np.full((1, 4, 4), 51, np.uint8))["pixel_values"], expected)
    for value in (-0.1, 255.1, float("nan")):
        with pytest.raises(ValueError, match="must be grey levels"):
            processor(torch.full((3, 4, 4), value))


def test_settings_are_saved(tmp_path):
    processor = DenseDetectorImageProcessor(
        size={"shortest_edge": 400, "longest_edge": 640},
        nms_threshold=0.5,
        max_detections=7,
        size_divisor=64,
        **BGR_CAFFE,
    )
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").is_file()
    loaded = DenseDetectorImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert (loaded.nms_threshold, loaded.max_detections, loaded.size_divisor) == (0.5, 7, 64)
    default = DenseDetectorImageProcessor()
    assert dict(default.size) == {"shortest_edge": 800, "longest_edge": 1333}
    assert (default.score_threshold, default.nms_threshold) == (0.05, 0.6)
    assert (default.max_candidates, default.max_detections) == (1000, 100)
    assert torch.equal(loaded(grey(5, 9))["pixel_values"], processor(grey(5, 9))["pixel_values"])


def test_arguments_of_one_call():
    processor = DenseDetectorImageProcessor(size=TINY)
    assert processor(grey(4, 5), do_resize=False)["pixel_mask"].sum() == 20
    assert processor(grey(4, 4), do_resize=False, do_pad=False)["pixel_values"].shape == (1, 3, 4, 4)
    assert processor(grey(4, 4), pad_size={"height": 64, "width": 96})["pixel_values"].shape == (1, 3, 64, 96)
    assert processor(grey(4, 4), do_normalize=False)["pixel_values"].max() == 100
    scaled = processor(grey(4, 4), do_normalize=False, do_rescale=True)["pixel_values"].max()
    assert scaled.item() == pytest.approx(100 / 255)
    assert isinstance(processor(grey(4, 4), return_tensors="np")["pixel_values"], np.ndarray)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nms_threshold": 1.01}, r"nms_threshold is 1\.01"),
        ({"score_threshold": "x"}, "score_threshold is 'x'"),
        ({"max_candidates": 0}, "max_candidates is 0"),
        ({"max_candidates": 1.5}, r"max_candidates is 1\.5"),
        ({"max_detections": True}, "max_detections is True"),
        ({"size_divisor": 0}, "size_divisor is 0"),
        ({"image_std": [1.0, 0.0, 1.0]}, r"image_std is \(1\.0, 0\.0, 1\.0\)"),
        ({"image_std": [float("nan"), 1.0, 1.0]}, r"image_std is \(nan, "),
        ({"image_std": [1.0, 1.0]}, r"image_std \(1\.0, 1\.0\)"),
        ({"image_mean": ["x", 0, 0]}, "image_mean is"),
        ({"size": {"height": 0, "width": 4}}, "size has the height 0"),
        ({"size": {"shortest_edge": 8}}, "size has the longest_edge None"),
        ({"size": {"shortest_edge": 8, "longest_edge": 10**9}}, "size has the longest_edge 1000000000"),
        ({"rescale_factor": float("nan")}, "rescale_factor is nan"),
        ({"resample": 17}, "17"),
    ],
)
def test_refused_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        DenseDetectorImageProcessor(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"score_threshold": np.float32(0.3), "nms_threshold": np.float64(0.5)},
        {"max_detections": np.int64(10), "size": {"shortest_edge": np.int64(8), "longest_edge": 16}},
        {"do_rescale": None, "rescale_factor": None},
        {"do_pad": None, "size_divisor": None},
        {"do_normalize": False, "image_mean": None, "image_std": None},
    ],
)
def test_numpys_numbers_and_what_is_not_used_are_fine(arguments):
    processor = DenseDetectorImageProcessor(**{"size": TINY, **arguments})
    assert processor(grey(8, 8), return_tensors="pt")["pixel_mask"].sum() == 64


def test_refused_images_and_sizes():
    processor = DenseDetectorImageProcessor(size=TINY)
    for images, options, message in (
        (grey(4, 4), {"size": {"shortest_edge": 4}}, "size has the longest_edge None"),
        ([grey(4, 4), grey(4, 5)], {"do_pad": False}, "different sizes"),
        (grey(4, 40), {"do_resize": False, "pad_size": {"height": 32, "width": 32}}, "is smaller than the batch"),
        (np.zeros((1, 8, 8), np.uint8), {"do_convert_rgb": False}, "3 channels, got shape"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(images, **options)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"shortest_edge": 20, "longest_edge": 100}, (20, 40)),
        ({"max_height": 40, "max_width": 30}, (15, 30)),
        ({"height": 40, "width": 30}, (40, 30)),
        (25, (25, 25)),  # an integer is a square, unless `default_to_square` is off
    ],
)
def test_sizes_of_transformers_processors(size, expected):
    processor = DenseDetectorImageProcessor(size=TINY)
    batch = processor(grey(10, 20), size=size, do_pad=False, **({"default_to_square": True} if size == 25 else {}))
    assert tuple(batch["pixel_values"].shape[2:]) == expected


def test_padding_to_a_size_and_no_padding():
    processor = DenseDetectorImageProcessor(size=TINY)
    images = [grey(20, 40), grey(40, 20)]
    batch = processor(images, do_resize=False, pad_size={"height": 41, "width": 45}, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 41, 45) and batch["pixel_mask"].sum((1, 2)).tolist() == [800, 800]
    assert processor(images[:1], do_resize=False, do_pad=False)["pixel_values"].shape == (1, 3, 20, 40)


ANNOTATIONS = {
    "image_id": 7,
    "annotations": [
        {"bbox": [2.0, 3.0, 4.0, 5.0], "category_id": 1, "area": 20.0},
        {"bbox": [8.0, 0.0, 90.0, 5.0], "category_id": 0, "area": 450.0, "iscrowd": 0},
        {"bbox": [0.0, 0.0, 4.0, 5.0], "category_id": 1, "area": 20.0, "iscrowd": 1},
        {"bbox": [0.0, 0.0, 0.0, 5.0], "category_id": 1, "area": 0.0},
    ],
}


def test_annotations_become_labels_as_detrs_processor_makes_them():
    size = {"shortest_edge": 32, "longest_edge": 64}  # nothing is padded
    ours = DenseDetectorImageProcessor(size=size)(grey(10, 20), ANNOTATIONS, return_tensors="pt")["labels"]
    theirs = DetrImageProcessor(size=size)(grey(10, 20), ANNOTATIONS, return_tensors="pt")["labels"]
    assert ours[0].keys() == theirs[0].keys()
    for name, values in theirs[0].items():
        torch.testing.assert_close(ours[0][name], values)
    # 2..6 of 20 and 3..8 of 10 pixels; 8..20 and 0..5.
    torch.testing.assert_close(ours[0]["boxes"], torch.tensor([[0.2, 0.55, 0.2, 0.5], [0.7, 0.25, 0.6, 0.5]]))


def test_labels_are_relative_to_the_image_without_padding():
    processor = DenseDetectorImageProcessor(size={"shortest_edge": 20, "longest_edge": 100})
    labels = processor([grey(10, 20), grey(10, 10)], annotations=[ANNOTATIONS] * 2, return_tensors="pt")["labels"]
    assert [label["size"].tolist() for label in labels] == [[20, 40], [20, 20]]
    assert [label["orig_size"].tolist() for label in labels] == [[10, 20], [10, 10]]
    torch.testing.assert_close(labels[1]["boxes"], torch.tensor([[0.4, 0.55, 0.4, 0.5], [0.9, 0.25, 0.2, 0.5]]))
    without = processor(grey(10, 10), annotations={"image_id": 1, "annotations": []}, return_tensors="pt")["labels"]
    assert without[0]["boxes"].shape == (0, 4) and without[0]["class_labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ([ANNOTATIONS] * 2, "2 annotations were given for 1 images"),
        ({"boxes": []}, "COCO detection annotations"),
        ([[1, 2, 3, 4]], "COCO detection annotations"),
    ],
)
def test_refused_annotations(annotations, words):
    with pytest.raises(ValueError, match=words):
        DenseDetectorImageProcessor(size=TINY)(grey(4, 4), annotations=annotations)


def test_logits_and_relative_boxes_are_enough_for_detections():
    """Of any object. Original image of 100 x 200 pixels; the second box reaches beyond it."""
    outputs = SimpleNamespace(
        logits=torch.tensor([[[0.9, 0.01], [0.02, 0.8], [0.01, 0.04]]]).logit(),
        pred_boxes=torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.95, 0.2, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]]]),
    )
    processor = DenseDetectorImageProcessor()
    (found,) = processor.post_process_object_detection(outputs, 0.0, [(100, 200)])
    assert found["labels"].tolist() == [0, 1]
    torch.testing.assert_close(found["boxes"], torch.tensor([[80.0, 40, 120, 60], [170, 10, 200, 30]]))
    (relative,) = processor.post_process_object_detection(outputs, 0.85)
    torch.testing.assert_close(relative["boxes"], torch.tensor([[0.4, 0.4, 0.6, 0.6]]))


def test_deep_images_are_read_as_in_training(tmp_path):
    Image.fromarray(np.full((4, 4), 51 * 257, np.uint16)).save(tmp_path / "deep.png")
    processor = DenseDetectorImageProcessor(size=TINY)
    expected = processor(grey(4, 4, 51))["pixel_values"]
    with Image.open(tmp_path / "deep.png") as image:
        assert torch.equal(processor(image)["pixel_values"], expected)
    assert torch.equal(processor(str(tmp_path / "deep.png"))["pixel_values"], expected)
    with pytest.raises(ImageError, match="floating point values from 0 to 900"):
        processor(Image.fromarray(np.array([[0, 900]], np.float32)))


def test_grey_level_statistics_are_not_rescaled(caplog):
    """`do_rescale` belongs to statistics of 0..1."""
    expected = DenseDetectorImageProcessor(size=TINY)(grey(4, 4))["pixel_values"]
    unit = {name: [value / 255 for value in RGB_IMAGENET[name]] for name in ("image_mean", "image_std")}
    scaled = DenseDetectorImageProcessor(size=TINY, do_rescale=True, **unit)(grey(4, 4))["pixel_values"]
    torch.testing.assert_close(scaled, expected)
    for _ in range(2):
        given = DenseDetectorImageProcessor(size=TINY, do_rescale=True, image_mean=[123.675, 116.28, 103.5])
        assert given(grey(4, 4))["pixel_values"][0, 0, 0, 0] == expected[0, 0, 0, 0]
    assert len([text for text in caplog.messages if "do_rescale" in text and "103.5" in text]) == 1
