import colorsys
import math

import pytest
import torch
from PIL import Image

from crosskd_hf.utils.visualization import MIN_LONG_SIDE, contact_sheet, draw_boxes, label_color

RED, GREEN = (255, 0, 0), (0, 255, 0)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def boxes(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def test_a_box_covers_its_pixels_and_no_others() -> None:
    image = Image.new("RGB", (600, 512))
    picture = draw_boxes(image, boxes((10, 20, 50, 60)), colors=[RED])
    assert picture.size == (600, 512)
    # The edges at x = 10 and x = 50 enclose the pixel columns 10 to 49; lines are 2 pixels wide, inwards.
    row = [picture.getpixel((x, 40)) for x in range(8, 52)]
    assert row == [BLACK] * 2 + [RED] * 2 + [BLACK] * 36 + [RED] * 2 + [BLACK] * 2
    column = [picture.getpixel((30, y)) for y in range(18, 62)]
    assert column == [BLACK] * 2 + [RED] * 2 + [BLACK] * 36 + [RED] * 2 + [BLACK] * 2
    assert image.getextrema() == ((0, 0),) * 3, "the image itself stays as it was"


def test_small_images_are_enlarged_by_a_whole_factor() -> None:
    picture = draw_boxes(Image.new("RGB", (96, 64)), boxes((10, 10, 20, 20)), colors=[RED])
    assert picture.size == (96 * 6, 64 * 6)  # 512 / 96 = 5.33
    assert [picture.getpixel((x, 90)) == RED for x in (59, 60, 119, 120)] == [False, True, True, False]
    for side, expected in ((1, 512), (MIN_LONG_SIDE - 1, 1022), (MIN_LONG_SIDE, 512)):
        assert max(draw_boxes(Image.new("RGB", (side, 1)), boxes()).size) == expected


def test_no_boxes_leave_the_pixels() -> None:
    image = Image.effect_noise((600, 300), 50).convert("RGB")
    assert draw_boxes(image, boxes(), [], [], []).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("box", "shown"),
    [
        ((100, 100, 100, 100), True),  # a point
        ((100, 100, 100, 140), True),  # a line
        ((-20, -20, 900, 900), True),  # all around: drawn along the border
        ((590, 500, 900, 900), True),
        ((-20, -20, -1, -1), False),
        ((601, 20, 700, 40), False),
        ((40, 40, 20, 60), False),  # corners the wrong way round
        ((math.nan, 0, 10, 10), False),
        ((0, 0, math.inf, 10), False),
    ],
)
def test_boxes_at_and_beyond_the_edges(box: tuple[float, ...], shown: bool) -> None:
    picture = draw_boxes(Image.new("RGB", (600, 512)), boxes(box), ["cat"], [0.5], [RED])
    assert (picture.getbbox() is not None) == shown


def test_the_first_box_lies_on_top() -> None:
    both = boxes((10, 10, 90, 90), (10, 10, 90, 90))
    picture = draw_boxes(Image.new("RGB", (600, 512)), both, colors=[RED, GREEN])
    assert picture.getpixel((10, 50)) == RED


@pytest.mark.parametrize("corner", [(0, 0), (580, 0), (0, 500), (580, 500)])
def test_tags_stay_in_the_picture(corner: tuple[int, int]) -> None:
    """As many black pixels (the letters) and as much red, wherever the tag is pushed to."""

    def letters(x: int, y: int) -> int:
        image = Image.new("RGB", (600, 512), (9, 9, 9))
        picture = draw_boxes(image, boxes((x, y, x + 20, y + 12)), ["zebra"], [0.25], [RED])
        return sum(count for count, color in picture.getcolors(600 * 512) if color == WHITE)

    assert letters(*corner) == letters(300, 300) > 0


def test_texts_and_shapes_may_be_anything() -> None:
    four = boxes(*[(10 * i, 50, 10 * i + 40, 90) for i in range(4)])
    for size in ((600, 60), (2000, 1), (1, 700), (1, 1)):
        draw_boxes(Image.new("RGB", size), four, ["", "two\nlines", "猫", "x" * 500], [0, 1, 0.5, 0.333])


@pytest.mark.parametrize("name", ["labels", "scores", "colors"])
def test_as_many_of_everything(name: str) -> None:
    values = {"labels": ["cat"], "scores": [0.5], "colors": [RED]}[name]
    with pytest.raises(ValueError, match="zip"):
        draw_boxes(Image.new("RGB", (8, 8)), boxes((0, 0, 1, 1), (0, 0, 1, 1)), **{name: values})


def test_label_colors_are_fixed_and_distinct() -> None:
    assert label_color(0) == (255, 38, 38)  # hue 0, 85 % saturated: 255 * 0.15 = 38
    assert len({label_color(label) for label in range(80)}) == 80
    hues = [colorsys.rgb_to_hsv(*(value / 255 for value in label_color(label)))[0] for label in range(6)]
    distances = [min(abs(a - b), 1 - abs(a - b)) for i, a in enumerate(hues) for b in hues[:i]]
    assert min(distances) > 0.05


def test_contact_sheet_places_tiles() -> None:
    rows = [[Image.new("RGB", (20, 10), RED), Image.new("RGB", (5, 10), GREEN)]] * 2
    sheet = contact_sheet(rows, ["a", "b"], tile=64)
    # One pixel between tiles: 1 + 64 + 1 + 64 + 1.
    assert sheet.width == 131
    title = sheet.height - 2 * 65 - 1
    assert title > 10
    # A 2:1 image fills the width of its tile and the half of its height, in the middle.
    first_top = title + 1
    assert sheet.getpixel((1, first_top + 16)) == RED and sheet.getpixel((64, first_top + 47)) == RED
    assert sheet.getpixel((1, first_top + 15)) == WHITE and sheet.getpixel((1, first_top + 48)) == WHITE
    # A 1:2 image the other way round, in the second column; the second row is 65 pixels lower.
    assert sheet.getpixel((66 + 16, first_top + 65)) == GREEN and sheet.getpixel((66 + 15, first_top + 65)) == WHITE
    assert any(color != WHITE for _, color in sheet.crop((0, 0, 131, title)).getcolors(9999)), "titles are written"


def test_contact_sheet_shrinks_and_cuts() -> None:
    images = [Image.new("L", (3000, 1), 255), Image.new("RGBA", (1, 3000))]
    sheet = contact_sheet([images], ["x" * 400, ""], tile=32)
    assert sheet.width == 2 * 33 + 1
    # The long title ends in its own column.
    assert sheet.crop((34, 0, 67, 14)).getcolors() == [(33 * 14, WHITE)]
