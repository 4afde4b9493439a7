"""Decoding: the same pixels by every way, and what is refused."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from crosskd_hf.data.images import LARGEST_FILE, ImageError, inspect_image, load_rgb, load_tensor


def picture(mode="RGB"):
    """(37, 53) with edges and noise, so that chroma upsampling shows."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8)
    pixels[10:25, 10:40] = (250, 20, 40)
    return Image.fromarray(pixels).convert(mode)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("420.jpg", "RGB", {"subsampling": "4:2:0"}),
        ("444.jpg", "RGB", {"subsampling": "4:4:4"}),
        ("progressive.jpg", "RGB", {"progressive": True}),
        ("comment.jpg", "RGB", {"comment": b"x" * 300}),
        ("grey.jpg", "L", {}),
        ("cmyk.jpg", "CMYK", {}),
        ("turned.jpg", "RGB", {"exif": turned()}),
        ("plain.png", "RGB", {}),
        ("palette.png", "P", {}),
        ("alpha.png", "RGBA", {}),
    ],
)
def test_tensors_hold_the_pixels_that_pillow_reads(tmp_path, name, mode, options):
    file = tmp_path / name
    picture(mode).save(file, **options)
    expected = pil_to_tensor(load_rgb(file))
    assert expected.shape == ((3, 53, 37) if name == "turned.jpg" else (3, 37, 53))
    for source in (file, str(file), file.read_bytes()):
        assert torch.equal(load_tensor(source), expected)


@pytest.mark.parametrize("keep", [0, 1, 30, -40, -2])
def test_cut_off_jpegs_are_refused(tmp_path, keep):
    file = tmp_path / "cut.jpg"
    picture().save(file)
    file.write_bytes(file.read_bytes()[:keep])
    for load in (load_rgb, load_tensor):
        with pytest.raises(ImageError, match=r"cannot be read|is an empty file"):
            load(file)


def test_a_jpeg_that_is_too_large_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "large.jpg"
    picture().save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ImageError, match="decompression bomb"):
        load_tensor(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("read", [load_rgb, load_tensor, inspect_image])
def test_what_is_no_file_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="is no ordinary file"):
        read(str(tmp_path / "pipe.jpg"))
    with pytest.raises(ImageError, match="is a folder"):
        read(str(tmp_path))


@pytest.mark.parametrize("read", [load_rgb, load_tensor, inspect_image])
def test_huge_files_are_not_read(tmp_path, read):
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(LARGEST_FILE + 1)  # sparse
    with pytest.raises(ImageError, match="has 1,073,741,825 bytes"):
        read(str(tmp_path / "huge.jpg"))


def test_only_raster_formats_are_opened(tmp_path):
    """Pillow reads PostScript with a program that it starts."""
    (tmp_path / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    assert Image.open(tmp_path / "1.png").format == "EPS"
    for read in (load_rgb, inspect_image):
        with pytest.raises(ImageError, match="it is no image: AVIF, BMP"):
            read(str(tmp_path / "1.png"))
