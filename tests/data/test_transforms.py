from collections import Counter

import pytest
import torch
from torchvision import tv_tensors

from crosskd_hf.data.transforms import SizeToFit, build_transform, resize
from crosskd_hf.utils.images import resized_size


@pytest.mark.parametrize(
    ("height", "width", "sides", "expected"),
    [
        (427, 640, (800, 1333), (800, 1199)),  # 800/427 = 1.8735: 1199.06
        (480, 640, (800, 1333), (800, 1067)),  # 1066.67 rounds up
        (500, 333, (800, 1333), (1201, 800)),  # 1201.2
        (300, 640, (800, 1333), (625, 1333)),  # the long side binds: 1333/640 * 300 = 624.84
        (4, 5, (2, 100), (2, 3)),  # 5 * 0.5 = 2.5 rounds up
        (400, 499, (200, 1000), (200, 250)),  # 249.5 rounds up
        (2000, 2000, (800, 1333), (800, 800)),
        (1, 1, (800, 1333), (800, 800)),
        (1, 5000, (800, 1333), (1, 1333)),  # 0.27 would round to none
    ],
)
def test_resized_size(height, width, sides, expected):
    assert resized_size(height, width, *sides) == expected
    assert resized_size(width, height, *sides) == expected[::-1]


@pytest.mark.parametrize("arguments", [(0, 5, 8, 9), (5, 5, 9, 8), (5, 5, 0, 8)])
def test_resized_size_refuses(arguments):
    with pytest.raises(ValueError, match="must be"):
        resized_size(*arguments)


def sample(height, width, boxes=((0, 0, 1, 1),), image=None):
    if image is None:
        image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "image": tv_tensors.Image(image),
        "class_labels": torch.arange(len(boxes)),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
    }


def test_pixels_are_bilinear_and_rounded():
    row = torch.tensor([0, 100, 255], dtype=torch.uint8).expand(3, 3, 3).clone()
    out = resize(row, (6, 6))
    assert out.dtype == torch.uint8
    # Centres of the 6 new pixels lie at -0.25, 0.25, 0.75, 1.25, ...: 0, 25, 75, 138.75, 216.25, 255.
    assert out[0, 0].tolist() == [0, 25, 75, 139, 216, 255]


def test_shrinking_does_not_antialias():
    row = torch.tensor([0, 0, 0, 200, 0, 0, 0, 0, 0], dtype=torch.uint8).expand(3, 9, 9).clone()
    # A third of the size samples pixels 1, 4, 7 alone; antialiasing would spread the 200.
    assert resize(row, (3, 3))[0, 0].tolist() == [0, 0, 0]


def test_boxes_scale_by_the_rounded_factors_and_are_clipped():
    out = SizeToFit(800, 1333)(sample(427, 640, [(10, 20, 110, 220), (-5, 400, 700, 500)]))
    assert out["size"] == (800, 1199) and out["image"].shape == (3, 427, 640)
    across, down = torch.tensor(1199 / 640), torch.tensor(800 / 427)  # not 800 / 427 for both
    expected = torch.tensor([[10, 20, 110, 220]]) * torch.stack([across, down, across, down])
    assert torch.equal(out["boxes"][:1].as_subclass(torch.Tensor), expected)
    assert out["boxes"][1].tolist() == [0, pytest.approx(400 * 800 / 427), 1199, 800]
    assert out["class_labels"].tolist() == [0, 1]


def test_an_image_is_never_larger_than_it_has_to_be():
    """One that shrinks is resized at once, one that grows by the collator."""
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    smaller, larger = (SizeToFit(side, 200)({"image": image}) for side in (20, 80))
    assert smaller["size"] == (20, 30) and torch.equal(smaller["image"], resize(image, (20, 30)))
    assert larger["size"] == (80, 120) and larger["image"] is image


def test_boxes_are_clipped_when_the_size_stays():
    assert SizeToFit(10, 10)(sample(10, 10, [(-1, 2, 12, 11)]))["boxes"].tolist() == [[0, 2, 10, 10]]


def test_no_boxes():
    out = build_transform(train=True, short_side=8, long_side=8, flip_probability=1)(sample(4, 4, []))
    assert out["boxes"].shape == (0, 4)


def test_flip():
    image = torch.arange(4, dtype=torch.uint8).expand(3, 4, 4).clone()
    arguments = {"train": True, "short_side": 4, "long_side": 4}
    out = build_transform(**arguments, flip_probability=1)(sample(4, 4, [(0, 1, 1, 3)], image))
    assert out["image"][0, 0].tolist() == [3, 2, 1, 0] and out["boxes"].tolist() == [[3, 1, 4, 3]]
    out = build_transform(**arguments, flip_probability=0)(sample(4, 4, [(0, 1, 1, 3)], image))
    assert out["image"][0, 0].tolist() == [0, 1, 2, 3] and out["boxes"].tolist() == [[0, 1, 1, 3]]


def test_flipping_before_resizing_gives_the_pixels_of_flipping_after():
    image = torch.randint(0, 256, (3, 37, 53), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    straight, flipped = (
        build_transform(train=True, short_side=90, long_side=200, flip_probability=p)(sample(37, 53, image=image))
        for p in (0, 1)
    )
    assert straight["size"] == flipped["size"] == (90, 129)
    assert torch.equal(resize(flipped["image"], (90, 129)), resize(straight["image"], (90, 129)).flip(-1))


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_a_flip_probability_must_be_one(probability):
    with pytest.raises(ValueError, match="from 0 to 1"):
        build_transform(train=True, flip_probability=probability)


def short_sides(transform, draws=400):
    torch.manual_seed(0)
    return Counter(min(transform(sample(4, 4))["size"]) for _ in range(draws))


def test_range_draws_each_integer_both_ends_included():
    counts = short_sides(SizeToFit(4, 20, "range", (6, 9)))
    assert set(counts) == {6, 7, 8, 9} and min(counts.values()) > 60


def test_choice_draws_the_given_sides_alone():
    counts = short_sides(SizeToFit(4, 20, "choice", (6, 9)))
    assert set(counts) == {6, 9} and min(counts.values()) > 150


def test_evaluation_neither_draws_nor_flips():
    transform = build_transform(
        train=False, short_side=4, long_side=4, multiscale="range", multiscale_short_sides=(2, 4), flip_probability=1
    )
    image = torch.arange(4, dtype=torch.uint8).expand(3, 4, 4).clone()
    state = torch.get_rng_state()
    out = transform({"image": tv_tensors.Image(image)})
    assert torch.equal(out["image"], image) and out["size"] == (4, 4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"multiscale": "rnage", "multiscale_short_sides": (4, 8)}, "one of none, range, choice, got 'rnage'"),
        ({"multiscale_short_sides": (4, 8)}, "set one or the other"),
        ({"multiscale": "range", "multiscale_short_sides": (4,)}, "lowest, highest"),
        ({"multiscale": "range", "multiscale_short_sides": (8, 4)}, "lowest, highest"),
        ({"multiscale": "choice"}, "at least one"),
        ({"multiscale": "choice", "multiscale_short_sides": (8, 21)}, "long side, got 21 and 20"),
        ({"short_side": 21}, "long side, got 21 and 20"),
    ],
)
def test_settings_that_do_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        SizeToFit(**{"short_side": 8, "long_side": 20, **arguments})
