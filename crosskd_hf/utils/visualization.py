"""Pictures for people: boxes with their labels on an image, and images side by side."""

import colorsys
import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from .escaping import printable

Color = tuple[int, int, int]

MIN_LONG_SIDE = 512  # pixels; smaller images are enlarged, so that labels don't cover them
MIN_FONT_SIZE = 14  # pixels
MIN_LINE_WIDTH = 2  # pixels
# Of the geometric mean of height and width: a picture reads the same when it is shrunk to a screen.
FONT_FRACTION = 0.025
LINE_FRACTION = 0.0035
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
BACKGROUND: Color = (255, 255, 255)
INK: Color = (0, 0, 0)


def label_color(label: int) -> Color:
    """The RGB colour of a label, always the same. Neighbouring labels have hues far apart."""
    # Steps of the golden ratio never come back to a hue, and split the largest gap left so far.
    hue = label / GOLDEN_RATIO % 1.0
    saturation, value = ((0.85, 1.0), (0.55, 1.0), (0.9, 0.75))[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: Image.Image,
    boxes_xyxy: torch.Tensor,
    labels: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    colors: Sequence[Color] | None = None,
) -> Image.Image:
    """An image with boxes on it; the first boxes lie on top. The image itself is not changed.

    Lines and letters grow with the image. An image whose longer side is below `MIN_LONG_SIDE` pixels is enlarged by a
    whole factor first, so that the result may be larger than the image.

    Args:
        image: RGB.
        boxes_xyxy: (K, 4) in pixels of the image. Parts outside are cut off; a box that is not finite or wholly
            outside is left out; one of no width or height is a line.
        labels: K texts, or None for no text.
        scores: K numbers 0..1 that follow the labels, or None.
        colors: K RGB colours, such as `label_color` of the labels' numbers; None takes one for all.

    Raises:
        ValueError: labels, scores or colours that aren't K.
    """
    boxes = torch.as_tensor(boxes_xyxy, dtype=torch.float64).detach().cpu().reshape(-1, 4)
    factor = max(1, math.ceil(MIN_LONG_SIDE / max(image.size)))
    width, height = factor * image.width, factor * image.height
    picture = image.resize((width, height), Image.Resampling.NEAREST) if factor > 1 else image.copy()
    draw = ImageDraw.Draw(picture)
    mean_side = math.sqrt(width * height)
    line_width = max(MIN_LINE_WIDTH, round(LINE_FRACTION * mean_side))
    font = ImageFont.load_default(max(MIN_FONT_SIZE, round(FONT_FRACTION * mean_side)))

    corners = [_pixels(box, width, height) for box in (factor * boxes).tolist()]
    texts = _texts(len(boxes), labels, scores)
    colors = [label_color(0)] * len(boxes) if colors is None else colors
    shown = [entry for entry in zip(corners, texts, colors, strict=True) if entry[0] is not None][::-1]
    for corner, _, color in shown:
        draw.rectangle(corner, outline=color, width=line_width)
    for corner, text, color in shown:  # after all lines, which would cross the letters out
        if text:
            _draw_tag(draw, corner, text, color, font)
    return picture


def contact_sheet(rows: Sequence[Sequence[Image.Image]], column_titles: Sequence[str], tile: int = 256) -> Image.Image:
    """Images in a grid, each fitted into a square with its ratio kept, with a title above each column.

    Args:
        rows: of as many images as there are titles.
        column_titles: a title that is wider than its column is cut off.
        tile: side of the squares, in pixels.
    """
    gap = max(1, tile // 64)
    font = ImageFont.load_default(max(MIN_FONT_SIZE, tile // 16))
    title_height = sum(font.getmetrics()) + gap
    size = len(column_titles) * (tile + gap) + gap, title_height + len(rows) * (tile + gap) + gap
    sheet = Image.new("RGB", size, BACKGROUND)
    for column, title in enumerate(column_titles):
        strip = Image.new("RGB", (tile, title_height), BACKGROUND)  # cuts the title off
        ImageDraw.Draw(strip).text((0, 0), title, fill=INK, font=font)
        sheet.paste(strip, (gap + column * (tile + gap), gap))
    for index, row in enumerate(rows):
        for column, image in enumerate(row):
            fitted = _fitted(image, tile)
            left = gap + column * (tile + gap) + (tile - fitted.width) // 2
            top = title_height + gap + index * (tile + gap) + (tile - fitted.height) // 2
            sheet.paste(fitted, (left, top))
    return sheet


def _pixels(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int] | None:
    """The first and the last pixel column and row that a box covers: left, top, right, bottom; None if none is."""
    x1, y1, x2, y2 = box
    if not all(map(math.isfinite, box)) or x2 < 0 or y2 < 0 or x1 > width or y1 > height or x2 < x1 or y2 < y1:
        return None
    left, top = min(max(math.floor(x1), 0), width - 1), min(max(math.floor(y1), 0), height - 1)
    right, bottom = min(math.ceil(x2), width) - 1, min(math.ceil(y2), height) - 1
    return left, top, max(left, right), max(top, bottom)


def _texts(count: int, labels: Sequence[str] | None, scores: Sequence[float] | None) -> list[str]:
    names = [""] * count if labels is None else map(printable, labels)
    numbers = [""] * count if scores is None else [f"{float(score):.2f}" for score in scores]
    return [f"{name} {number}".strip() for name, number in zip(names, numbers, strict=True)]


def _draw_tag(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int, int, int],
    text: str,
    color: Color,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Text on its colour, on the upper edge of a box or, where that leaves the picture, inside of it."""
    width, height = draw.im.size
    x1, y1, x2, y2 = draw.multiline_textbbox((0, 0), text, font=font)
    margin = max(1, round((y2 - y1) / 6))
    tag_width, tag_height = math.ceil(x2 - x1) + 2 * margin, math.ceil(y2 - y1) + 2 * margin
    left = max(0, min(corner[0], width - tag_width))
    top = corner[1] - tag_height
    if top < 0:
        top = max(0, min(corner[1], height - tag_height))
    draw.rectangle((left, top, left + tag_width - 1, top + tag_height - 1), fill=color)
    dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 128  # luma of ITU-R BT.601
    draw.multiline_text((left + margin - x1, top + margin - y1), text, fill=BACKGROUND if dark else INK, font=font)


def _fitted(image: Image.Image, tile: int) -> Image.Image:
    factor = tile / max(image.size)
    size = max(1, round(factor * image.width)), max(1, round(factor * image.height))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BILINEAR)
