"""Image files -> 8-bit RGB as people see them; and what is wrong with a file, found before training."""

import contextlib
import functools
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2.functional import pil_to_tensor

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29: Pillow reads everything then
    decode_jpeg = None

# What Pillow raises for a file that is no image, is cut off, or unpacks to more pixels than it thinks safe.
# Its plugins let most of these through from damaged headers.
READ_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError),
    *(struct.error, zlib.error, Image.DecompressionBombError, MemoryError, AssertionError, RuntimeError),
)
ImageSource = str | os.PathLike[str] | bytes
# Kinds of raster images. Of the others that Pillow knows, some are read by programs that it starts (EPS).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# What is looked for in folders and by patterns. A file that is named itself may have any name.
IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LARGEST_FILE = 1 << 30  # bytes; twice what the largest image that Pillow thinks safe takes unpacked
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
JPEG_SCAN = 0xDA  # marker of the segment before compressed pixels
# TIFF's tags, see https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf
BITS_PER_SAMPLE, PHOTOMETRIC, S_MIN_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE = 258, 262, 340, 341
WHITE_IS_ZERO = 0
FULL_16_BITS, FULL_12_BITS = 65535, 4095
SAVE_AGAIN = "save it with 8 or 16 bits used in full, or one channel as TIFF with the tag SMaxSampleValue"


class ImageError(ValueError):
    """An image that can't be read; the text follows its name."""


def load_rgb(source: ImageSource) -> Image.Image:
    """An image as it is trained on and predicted from: upright, 8-bit RGB.

    Args:
        source: path of a file, or its content.

    Raises:
        ImageError: the file is missing, empty, no image of `FORMATS`, cut off, larger than Pillow thinks safe, or
            holds values that `to_rgb` refuses.
    """
    with _reading(source) as image:
        return upright(to_rgb(image))


def load_tensor(source: ImageSource) -> torch.Tensor:
    """The same pixels as `load_rgb`, as a (3, H, W) uint8 tensor.

    Raises:
        ImageError: see `load_rgb`.
    """
    _check_file(source)
    pixels = _decode_plain_jpeg(source)
    return pil_to_tensor(load_rgb(source)) if pixels is None else pixels


def _decode_plain_jpeg(source: ImageSource) -> torch.Tensor | None:
    """A plain JPEG, decoded without Pillow's copies of its pixels; None for everything else, and whatever is wrong.

    Both decode with libjpeg-turbo. It fills up files that are cut off, which Pillow refuses: those are left to it.
    """
    if decode_jpeg is None:
        return None
    try:
        # Not bytes, of which `torch.frombuffer` warns that they can't be written to.
        content = bytearray(source) if isinstance(source, bytes) else np.fromfile(source, np.uint8)
        view = memoryview(content)
        if view[-2:] == JPEG_END and _is_plain_jpeg(view):
            return decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB)
    # The last two: a name that no file can have; built without libjpeg.
    except (OSError, LookupError, struct.error, RuntimeError, ValueError, AttributeError):
        pass
    return None


def _is_plain_jpeg(content: memoryview) -> bool:
    """Whether it is a JPEG of three components that nothing may turn, of a size that Pillow does not warn of."""
    for marker, position in _jpeg_segments(content):
        if marker in (0xC0, 0xC1, 0xC2):  # the frame: baseline, extended or progressive
            bits, height, width, components = struct.unpack_from(">BHHB", content, position + 4)
            return (bits, components) == (8, 3) and height * width <= (Image.MAX_IMAGE_PIXELS or 0)
        if marker == 0xE1:  # EXIF or XMP
            return False
    return False


def _jpeg_segments(content: memoryview | bytes) -> Iterator[tuple[int, int]]:
    """Marker and position of each segment up to the first scan. Raises IndexError or struct.error where it is cut."""
    position = 2 if content[:2] == JPEG_START else len(content)
    marker = None
    while marker != JPEG_SCAN and content[position] == 0xFF:
        if content[position + 1] == 0xFF:  # fills up
            position += 1
            continue
        marker, length = struct.unpack_from(">xBH", content, position)
        yield marker, position
        position += 2 + length


def _check_jpeg_end(file: IO[bytes]) -> None:
    """Raise OSError for a JPEG whose pixels have no end. Zeros are valid pixels: no decoder complains of a file whose
    rest is filled up with them, as an interrupted download or a damaged disk leaves it. Bytes behind the end are fine.
    """
    position = file.tell()
    file.seek(-len(JPEG_END), os.SEEK_END)
    complete = file.read() == JPEG_END
    file.seek(0)
    content = JPEG_END if complete else file.read()
    file.seek(position)
    if complete:
        return
    start = next((position for marker, position in _jpeg_segments(content) if marker == JPEG_SCAN), 0)
    if content.find(JPEG_END, start) < 0:  # not before: a preview in the EXIF data has an end of its own
        raise OSError("the JPEG has no end: it is cut off, or its rest was filled up with zeros")


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, which is how viewers and labelling tools show it."""
    return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any Pillow mode as 8-bit RGB.

    Pillow cuts more than 8 bits off at 255, which makes nearly every such image white or black: here they are scaled
    by the range that `value_range` finds. Alpha is dropped, as Pillow, transformers and the reference do.

    Raises:
        ImageError: more than 8 bits, and values that are outside of their range or nearly black, or no known range.
    """
    # Of several channels with 16 bits Pillow keeps the upper 8; only an image that isn't loaded yet tells.
    was_16_bit = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        image = _scaled(image)
    elif was_16_bit:
        _check_16_bit_channels(image)
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # as Pillow wants it, or it warns
    return image.convert("RGB")


def value_range(image: Image.Image) -> tuple[float, float] | None:
    """What black and white are in an image of mode I, I;16 or F, as its file says; None if it doesn't.

    TIFF's SMaxSampleValue goes before its BitsPerSample (12 bits are read into 16). Pillow scales 16-bit PNG and PGM
    to 0..65535, whatever their mode.
    """
    tags = _tags(image)
    known = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    low, high = 0, FULL_16_BITS if known else None
    if S_MAX_SAMPLE_VALUE in tags:
        low, high = _first(tags.get(S_MIN_SAMPLE_VALUE, 0)), _first(tags[S_MAX_SAMPLE_VALUE])
    elif known and BITS_PER_SAMPLE in tags:
        high = 2 ** min(16, _first(tags[BITS_PER_SAMPLE])) - 1
    return None if high is None or not low < high else (low, high)


def _scaled(image: Image.Image) -> Image.Image:
    """An image of mode I, I;16 or F as 8-bit grey."""
    values = np.asarray(image)
    lowest, highest = values.min(), values.max()  # NaN, if there is any
    found = value_range(image)
    if found is None and image.mode == "F" and 0 <= lowest <= highest <= 1:
        found = 0, 1  # what floating point images hold by custom
    elif found is None and S_MAX_SAMPLE_VALUE not in _tags(image) and 0 <= lowest and 1 < highest <= 255:
        found = 0, 255  # the values of 8 bits
    kind = "floating point values" if image.mode == "F" else "integers"
    if found is None:
        raise ImageError(
            f"holds {kind} from {lowest:g} to {highest:g}, and doesn't tell which of them is white: {SAVE_AGAIN}"
        )
    low, high = found
    if not low <= lowest <= highest <= high:
        raise ImageError(f"holds {kind} from {lowest:g} to {highest:g}, but says that they are {low:g} to {high:g}")
    if high == FULL_16_BITS and S_MAX_SAMPLE_VALUE not in _tags(image) and highest > 0:
        _check_brightness(int(highest))
    levels = np.rint((values.astype(np.float64) - low) * 255 / (high - low)).astype(np.uint8)
    if _tags(image).get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow minds it with up to 8 bits only
        levels = 255 - levels
    grey = Image.fromarray(levels)
    grey.info = image.info  # its EXIF orientation
    return grey


def _check_16_bit_channels(image: Image.Image) -> None:
    """Refuse an image of which only the upper 8 of 16 bits were kept, if those aren't its levels."""
    white = _first(_tags(image).get(S_MAX_SAMPLE_VALUE, FULL_16_BITS))
    if white != FULL_16_BITS:
        raise ImageError(f"has 16 bits a channel, of which {white:g} is white and not {FULL_16_BITS}: {SAVE_AGAIN}")
    if S_MAX_SAMPLE_VALUE not in _tags(image):
        bands = zip(image.getbands(), image.getextrema(), strict=True)
        _check_brightness(256 * max(high for band, (_, high) in bands if band != "A") + 255)


def _check_brightness(highest: int) -> None:
    """Refuse 12-bit values that were stored as they are in 16: the image would be black to everybody."""
    if highest <= FULL_12_BITS:
        raise ImageError(
            f"has 16 bits a channel, but no value above {highest} of {FULL_16_BITS}: nearly black, as 12-bit values "
            f"are when 16 bits hold them unscaled; {SAVE_AGAIN}. If the picture is that dark, save it with 8 bits, or "
            f"as TIFF with SMaxSampleValue={FULL_16_BITS}"
        )


def _tags(image: Image.Image) -> Mapping[int, Any]:
    return getattr(image, "tag_v2", {})


def _first(value: Any) -> Any:
    """TIFF has one value a channel."""
    return value[0] if isinstance(value, tuple) else value


def inspect_image(source: ImageSource) -> tuple[int, int]:
    """Decode an image to see that it can be: (width, height) in pixels, as people see it.

    JPEGs are decoded at an eighth of their size, which finds the same faults in half the time.

    Raises:
        ImageError: see `load_rgb`.
    """
    with _reading(source) as image:
        width, height = image.size
        image.draft(None, (1, 1))
        to_rgb(image)
        # After loading: Pillow turns TIFFs itself, and then takes the orientation out.
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the orientations that swap the sides
        return (height, width) if turned else (width, height)


@contextlib.contextmanager
def _reading(source: ImageSource) -> Iterator[Image.Image]:
    """An image that isn't decoded yet. What goes wrong with it then is an ImageError, too."""
    _check_file(source)
    try:
        with _open(source) as image:
            if image.format in ("JPEG", "MPO"):
                _check_jpeg_end(image.fp)
            yield image
    except ImageError:
        raise
    except READ_ERRORS as error:
        raise ImageError(_reason(source, error)) from error


def _open(source: ImageSource) -> Image.Image:
    file: ImageSource | IO[bytes] = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        # Pillow warns from 89 million pixels on, where large photographs are, and refuses from twice that on.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=_known_formats())


@functools.cache
def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # some builds lack one


def _check_file(source: ImageSource) -> None:
    """Raise ImageError for what it would be a mistake to open: reading from a pipe waits for ever."""
    if isinstance(source, bytes):
        return
    try:
        status = os.stat(source)
    except (OSError, ValueError):  # told when it is opened
        return
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("is a folder" if stat.S_ISDIR(status.st_mode) else "is no ordinary file")
    if status.st_size > LARGEST_FILE:
        raise ImageError(f"has {status.st_size:,} bytes; no image that is read has more than {LARGEST_FILE:,}")


def _reason(source: ImageSource, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if (len(source) if isinstance(source, bytes) else _file_size(Path(source))) == 0:
        return "is an empty file"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, which could be a decompression bomb"
    if isinstance(error, UnidentifiedImageError):
        return f"cannot be read (it is no image: {', '.join(FORMATS)})"
    return f"cannot be read ({str(error).replace(repr(source), 'it')[:200]})"


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # the latter: a name that no file can have
        return -1


def resized_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """The (height, width) in pixels at which an image fits into the two sides with its ratio kept.

    Args:
        height, width: of the image, in pixels, at least 1.
        short_side: the most that the shorter side may become.
        long_side: the most that the longer side may become.

    Raises:
        ValueError: a size below 1, or a short side above the long one.
    """
    if min(height, width) < 1:
        raise ValueError(f"an image must be at least 1 x 1 pixel, got height {height} and width {width}")
    if not 1 <= short_side <= long_side:
        raise ValueError(f"the short side must be from 1 to the long side, got {short_side} and {long_side}")
    factor = min(long_side / max(height, width), short_side / min(height, width))
    # An image thousands of times longer than wide would round to no pixels.
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
