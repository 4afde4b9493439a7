"""Image files -> 8-bit RGB as people see them; and what is wrong with a file, found before training."""

import functools
import io
import os
import stat
import struct
import warnings
import zlib
from pathlib import Path
from typing import IO

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
LARGEST_FILE = 1 << 30  # bytes; twice what the largest image that Pillow thinks safe takes unpacked
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"


class ImageError(ValueError):
    """An image that can't be read; the text follows its name."""


def load_rgb(source: ImageSource) -> Image.Image:
    """An image as it is trained on and predicted from: upright, 8-bit RGB.

    Args:
        source: path of a file, or its content.

    Raises:
        ImageError: the file is missing, empty, no image of `FORMATS`, cut off, or larger than Pillow thinks safe.
    """
    _check_file(source)
    try:
        with _open(source) as image:
            image.load()
            return to_rgb(upright(image))
    except READ_ERRORS as error:
        raise ImageError(_reason(source, error)) from error


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
    position = 2 if content[:2] == JPEG_START else len(content)
    while content[position] == 0xFF:
        marker, length = struct.unpack_from(">xBH", content, position)
        if marker in (0xC0, 0xC1, 0xC2):  # the frame: baseline, extended or progressive
            bits, height, width, components = struct.unpack_from(">BHHB", content, position + 4)
            return (bits, components) == (8, 3) and height * width <= (Image.MAX_IMAGE_PIXELS or 0)
        if marker == 0xE1:  # EXIF or XMP
            return False
        position += 2 + length
    return False


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, which is how viewers and labelling tools show it."""
    return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any Pillow mode as 8-bit RGB.

    Pillow cuts 16 bits off at 255, which makes nearly every such image white: here they are scaled to 0..255. Alpha is
    dropped, as Pillow, transformers and the reference do.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # "I" is 32-bit, but in files it is the other name of 16-bit grey.
        levels = np.asarray(image).astype(np.int64)
        if levels.max(initial=0) > 255 or image.mode != "I":
            levels = (levels.clip(0, 65535) + 128) // 257
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # as Pillow wants it, or it warns
    return image.convert("RGB")


def inspect_image(source: ImageSource) -> tuple[int, int]:
    """Decode an image to see that it can be: (width, height) in pixels, as people see it.

    JPEGs are decoded at an eighth of their size, which finds the same faults in half the time.

    Raises:
        ImageError: see `load_rgb`.
    """
    _check_file(source)
    try:
        with _open(source) as image:
            width, height = image.size
            image.draft(None, (1, 1))
            image.load()
            # After loading: Pillow turns TIFFs itself, and then takes the orientation out.
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the orientations that swap the sides
    except READ_ERRORS as error:
        raise ImageError(_reason(source, error)) from error
    return (height, width) if turned else (width, height)


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
