from collections import Counter

import pytest
import torch

from crosskd_hf.data.transforms import RandomFlip, SizeToFit, resize
from crosskd_hf.utils.images import resized_size


@pytest.mark.parametrize(
    ("height", "width", "sides", "expected"),
    [
        (427, 640, (800, 1333), (800, 1199)),  # 800/427 = 1.8735: 1199.06
        (480, 640, (800, 1333), (800, 1067)),  # 1066.67 rounds up
        (500, 333, (800, 1333), (1201, 800)),  # 1201.2
        (300, 640, (800, 1333), (625, 1333)),  # the long side binds: 1333/640 * 300 = 624.84
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
    boxes = torch.tensor([[10.0, 20, 110, 220], [-5, 400, 700, 500]])
    out = SizeToFit(800, 1333)({"image": torch.zeros(3, 427, 640, dtype=torch.uint8), "boxes": boxes})
    assert out["size"] == (800, 1199) and out["image"].shape == (3, 427, 640)
    across, down = torch.tensor(1199 / 640), torch.tensor(800 / 427)  # not 800 / 427 for both
    expected = torch.tensor([[10, 20, 110, 220]]) * torch.stack([across, down, across, down])
    assert torch.equal(out["boxes"][:1], expected)
    assert out["boxes"][1].tolist() == [0, pytest.approx(400 * 800 / 427), 1199, 800]


def test_an_image_is_never_larger_than_it_has_to_be():
    """One that shrinks is resized at once, one that grows by the collator."""
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    smaller, larger = (SizeToFit(side, 200)({"image": image}) for side in (20, 80))
    assert smaller["size"] == (20, 30) and torch.equal(smaller["image"], resize(image, (20, 30)))
    assert larger["size"] == (80, 120) and larger["image"] is image


@pytest.mark.parametrize("boxes", [[[0, 1, 1, 3]], []])
def test_flip(boxes):
    image = torch.arange(4, dtype=torch.uint8).expand(3, 4, 4).clone()
    given = {"image": image, "boxes": torch.tensor(boxes).reshape(-1, 4)}
    out = RandomFlip(1)(given)
    assert out["image"][0, 0].tolist() == [3, 2, 1, 0] and out["boxes"].tolist() == [[3, 1, 4, 3]] * len(boxes)
    assert RandomFlip(0)(given) is given


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_a_flip_probability_must_be_one(probability):
    with pytest.raises(ValueError, match="from 0 to 1"):
        RandomFlip(probability)


@pytest.mark.parametrize(("multiscale", "sides", "fewest"), [("range", {6, 7, 8, 9}, 60), ("choice", {6, 9}, 150)])
def test_short_sides_are_drawn(multiscale, sides, fewest):
    torch.manual_seed(0)
    transform, image = SizeToFit(4, 20, multiscale, (6, 9)), torch.zeros(3, 4, 4, dtype=torch.uint8)
    counts = Counter(min(transform({"image": image})["size"]) for _ in range(400))
    assert set(counts) == sides and min(counts.values()) > fewest


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
