"""Image files -> 8-bit RGB as people see them; and what is wrong with a file, found before training."""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, UnidentifiedImageError
from torchvision.transforms.v2.functional import pil_to_tensor

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29: Pillow reads everything then
    decode_jpeg = None

ImageSource = str | os.PathLike[str] | bytes
# Kinds of raster images. Of the others that Pillow knows, some are read by programs that it starts (EPS).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# What is looked for in folders and by patterns. A file that is named itself may have any name.
IMAGE_EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".mpo"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
LARGEST_FILE = 1 << 30  # bytes; twice what the largest image that Pillow thinks safe takes unpacked
JPEG_END = b"\xff\xd9"
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
    with _reading(source) as image:
        # Of most photographs torchvision makes the same pixels with the same library in three quarters of the time, as
        # Pillow copies them. What has to be turned is Pillow's: torchvision misses an orientation that XMP gives.
        if decode_jpeg is not None and (image.format, image.mode, _orientation(image)) == ("JPEG", "RGB", 1):
            image.fp.seek(0)
            content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
            with contextlib.suppress(RuntimeError):  # stricter than Pillow since 0.29, or built without libjpeg
                return decode_jpeg(content, ImageReadMode.RGB)
        return pil_to_tensor(upright(to_rgb(image)))


def _check_jpeg_end(image: Image.Image) -> None:
    """Raise OSError for a JPEG whose pixels have no end. Zeros are valid pixels: no decoder complains of a file whose
    rest is filled up with them, as an interrupted download or a damaged disk leaves it. Bytes behind the end are fine.
    """
    image.fp.seek(-len(JPEG_END), os.SEEK_END)
    if image.fp.read() != JPEG_END:
        image.fp.seek(0)
        content = image.fp.read()
        # Pillow has read its headers, up to the pixels: a preview in the EXIF data has an end of its own.
        pixels = JpegImagePlugin.JpegImageFile(io.BytesIO(content)).fp.tell()
        if content.find(JPEG_END, pixels) < 0:
            raise OSError("the JPEG has no end: it is cut off, or its rest was filled up with zeros")


def _orientation(image: Image.Image) -> int:
    """1..8 as EXIF numbers them, from EXIF or XMP; 1 is upright, from 5 on the sides are swapped."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


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
    limits = value_range(image)
    if limits is None and image.mode == "F" and 0 <= lowest <= highest <= 1:
        limits = 0, 1  # what floating point images hold by custom
    elif limits is None and S_MAX_SAMPLE_VALUE not in _tags(image) and 0 <= lowest and 1 < highest <= 255:
        limits = 0, 255  # the values of 8 bits
    kind = "floating point values" if image.mode == "F" else "integers"
    if limits is None:
        raise ImageError(
            f"holds {kind} from {lowest:g} to {highest:g}, and doesn't tell which of them is white: {SAVE_AGAIN}"
        )
    low, high = limits
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
    """TIFF has one value per channel."""
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
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


@contextlib.contextmanager
def _reading(source: ImageSource) -> Iterator[Image.Image]:
    """An image that isn't decoded yet. What goes wrong with it then is an ImageError, too."""
    try:
        _check_file(source)
        Image.init()
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on, where large photographs are, and refuses from twice that on.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])  # old Pillows lack AVIF
        with image:
            if image.format in ("JPEG", "MPO"):
                _check_jpeg_end(image)
            yield image
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("does not exist") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(f"has more than {limit:,} pixels, which could be a decompression bomb") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"cannot be read (it is no image: {', '.join(FORMATS)})") from error
    except Exception as error:  # damaged headers make Pillow's plugins raise nearly everything
        raise ImageError(f"cannot be read ({str(error).replace(repr(source), 'it')[:200]})") from error


def _check_file(source: ImageSource) -> None:
    """Raise ImageError for what it would be a mistake to open: reading from a pipe waits for ever."""
    if isinstance(source, bytes):
        size = len(source)
    else:
        status = os.stat(source)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("is a folder" if stat.S_ISDIR(status.st_mode) else "is no ordinary file")
    if size == 0:
        raise ImageError("is an empty file")
    if size > LARGEST_FILE:
        raise ImageError(f"has {size:,} bytes; no image that is read has more than {LARGEST_FILE:,}")


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
