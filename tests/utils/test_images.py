"""Decoding: the same pixels by every way, and what is refused."""

import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

from crosskd_hf.utils.images import LARGEST_FILE, ImageError, inspect_image, load_rgb, load_tensor, to_rgb


def picture(mode="RGB"):
    """(37, 53) with edges and noise, so that chroma upsampling shows."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8)
    pixels[10:25, 10:40] = (250, 20, 40)
    return Image.fromarray(pixels).convert(mode)


def turned(orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# How some photo editors turn an image: Pillow knows it, `torchvision.io` does not.
XMP_TURNED = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("420.jpg", "RGB", {"subsampling": "4:2:0"}),
        ("444.jpg", "RGB", {"subsampling": "4:4:4"}),
        ("progressive.jpg", "RGB", {"progressive": True}),
        ("grey.jpg", "L", {}),
        ("cmyk.jpg", "CMYK", {}),
        *((f"exif{orientation}.jpg", "RGB", {"exif": turned(orientation)}) for orientation in range(1, 9)),
        ("xmp6.jpg", "RGB", {"xmp": XMP_TURNED}),
        ("plain.png", "RGB", {}),
        ("palette.png", "P", {}),
        ("alpha.png", "RGBA", {}),
    ],
)
def test_images_are_turned_upright_and_read_alike_from_files_and_bytes(tmp_path, name, mode, options):
    file = tmp_path / name
    picture(mode).save(file, **options)
    with Image.open(file) as image:
        expected = pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape == ((3, 53, 37) if name[-5] in "5678" else (3, 37, 53))
    for source in (file, str(file), file.read_bytes()):
        assert torch.equal(load_tensor(source), expected)
    assert inspect_image(file) == expected.shape[:0:-1]


READERS = (load_rgb, load_tensor, inspect_image)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is an empty file"),
        (slice(1), "cannot be read"),
        (slice(-40), "cannot be read"),
        (slice(-2), "cannot be read"),
        # Pillow reads PostScript with a program that it starts.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "it is no image: AVIF, BMP"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, content, message):
    file = tmp_path / "bad.jpg"
    picture().save(file)
    file.write_bytes(file.read_bytes()[content] if isinstance(content, slice) else content)
    for read in READERS:
        with pytest.raises(ImageError, match=message):
            read(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_file_or_huge_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(LARGEST_FILE + 1)  # sparse
    rows = {"pipe.jpg": "is no ordinary file", ".": "is a folder", "huge.jpg": "has 1,073,741,825 bytes"}
    for name, message in (rows | {"gone.jpg": "does not exist"}).items():
        for read in READERS:
            with pytest.raises(ImageError, match=message):
                read(str(tmp_path / name))


def write_tiff(path, values, bits, sample_format=1, **tags):
    """An uncompressed little-endian TIFF of (H, W) or (H, W, 3) values; of 12 bits, packed."""
    channels = 3 if values.ndim == 3 else 1
    data = values.tobytes()
    if bits == 12:
        rows = ["".join(f"{value:012b}" for value in row) for row in values]
        data = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    entries = {256: values.shape[1], 257: values.shape[0], 258: bits, 259: 1, 262: 1 if channels == 1 else 2}
    entries |= {273: 8, 277: channels, 278: values.shape[0], 279: len(data), 339: sample_format}
    entries |= {{"s_min": 340, "s_max": 341, "photometric": 262}[name]: value for name, value in tags.items()}
    directory, more = 8 + len(data), b""
    content = struct.pack("<H", len(entries))
    for tag, value in sorted(entries.items()):
        count = channels if tag in (258, 339) else 1
        field = struct.pack("<I", value) if count == 1 else None
        if field is None:  # three shorts are kept behind the directory
            field = struct.pack("<I", directory + 2 + 12 * len(entries) + 4 + len(more))
            more += struct.pack("<3H", *[value] * 3)
        content += struct.pack("<HHI", tag, 4 if count == 1 else 3, count) + field
    path.write_bytes(b"II*\0" + struct.pack("<I", directory) + data + content + bytes(4) + more)


def part_of(white, dtype):
    """(2, 4) values from black to white, and what they are as 8-bit grey."""
    parts = np.array([[0, 0.2, 0.4, 0.6], [0.8, 1, 0.2, 0]])
    return (parts * white).round(0 if white > 1 else 6).astype(dtype), (parts * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("white", "dtype", "bits", "sample_format", "tags"),
    [
        (65535, np.uint16, 16, 1, {}),
        (4095, np.uint16, 12, 1, {}),
        (4095, np.uint16, 16, 1, {"s_max": 4095}),
        (1, np.float32, 32, 3, {}),
        (65535, np.float32, 32, 3, {"s_max": 65535}),
        (1_000_000, np.int32, 32, 2, {"s_max": 1_000_000}),
    ],
)
def test_more_than_8_bits_are_scaled_by_what_the_file_says(tmp_path, white, dtype, bits, sample_format, tags):
    file = tmp_path / "deep.tif"
    values, expected = part_of(white, dtype)
    write_tiff(file, values, bits, sample_format, **tags)
    assert np.array_equal(np.asarray(load_rgb(file)), np.stack([expected] * 3, -1))
    assert torch.equal(load_tensor(file.read_bytes()), pil_to_tensor(load_rgb(file)))
    assert inspect_image(file) == (4, 2)
    with Image.open(file) as image:
        assert to_rgb(image).tobytes() == load_rgb(file).tobytes()
    if bits == 16:
        write_tiff(file, values, bits, sample_format, **tags, photometric=0)
        assert np.array_equal(np.asarray(load_rgb(file))[..., 0], 255 - expected), "white is 0"


@pytest.mark.parametrize(
    ("white", "dtype", "sample_format", "tags", "words"),
    [
        (65535, np.float32, 3, {}, "floating point values from 0 to 65535.*SMaxSampleValue"),
        (np.nan, np.float32, 3, {}, "floating point values from nan"),
        (1_000_000, np.int32, 2, {}, r"integers from 0 to 1e\+06.*SMaxSampleValue"),
        (256, np.int32, 2, {}, "integers from 0 to 256"),
        (1, np.int32, 2, {}, "integers from 0 to 1,"),
        (4096, np.uint16, 1, {"s_max": 4095}, "integers from 0 to 4096, but says that they are 0 to 4095"),
        (4095, np.uint16, 1, {}, "no value above 4095 of 65535"),
    ],
)
def test_values_without_a_range_are_refused(tmp_path, white, dtype, sample_format, tags, words):
    file = tmp_path / "deep.tif"
    values, _ = part_of(white, dtype)
    write_tiff(file, values, 8 * values.itemsize, sample_format, **tags)
    for read in READERS:
        with pytest.raises(ImageError, match=words):
            read(file)


def test_dark_16_bit_images_are_told_from_black_ones(tmp_path):
    for name, values, mode in (("png", [[0, 4096]], "I;16"), ("png", [[0, 0]], "I;16"), ("tif", [[0, 4096]], "RGB")):
        file = tmp_path / f"dark.{name}"
        array = np.array(values, dtype=np.uint16)
        if mode == "RGB":
            write_tiff(file, np.stack([array] * 3, -1), 16)
        else:
            Image.fromarray(array).save(file)
        assert load_rgb(file).getextrema()[0] == (0, 16 if array.any() else 0)
    for values in ([[0, 4095]], [[0, 1]]):
        write_tiff(tmp_path / "dark.tif", np.stack([np.array(values, dtype=np.uint16)] * 3, -1), 16)
        for read in (load_rgb, inspect_image):
            with pytest.raises(ImageError, match=r"nearly black.*SMaxSampleValue=65535"):
                read(tmp_path / "dark.tif")
        for channels in (1, 3):  # as that advises
            array = np.stack([np.array(values, dtype=np.uint16)] * channels, -1)
            write_tiff(tmp_path / "dark.tif", array[..., 0] if channels == 1 else array, 16, s_max=65535)
            assert load_rgb(tmp_path / "dark.tif").getextrema()[0][1] <= 16


@pytest.mark.parametrize(("dtype", "sample_format"), [(np.float32, 3), (np.int32, 2)])
@pytest.mark.parametrize("white", [2, 255])
def test_values_of_8_bits_need_no_range(tmp_path, dtype, sample_format, white):
    values = np.array([[0, 1, white]], dtype=dtype)
    write_tiff(tmp_path / "levels.tif", values, 32, sample_format)
    assert np.asarray(load_rgb(tmp_path / "levels.tif"))[0, :, 0].tolist() == [0, 1, white]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"\xff\xd8\xff\xd9"}])
def test_jpegs_filled_up_with_zeros_are_refused(tmp_path, options):
    """Zeros decode as grey; what says that a JPEG is complete is its end, not that of a preview before its pixels."""
    Image.effect_noise((160, 120), 60).convert("RGB").save(tmp_path / "whole.jpg", **options)
    content = (tmp_path / "whole.jpg").read_bytes()
    half = len(content) // 2
    for read in READERS:
        with pytest.raises(ImageError, match="filled up with zeros"):
            read(content[:half] + bytes(len(content) - half))
        for behind in (bytes(500), b"\xff\xda more \xff\xd8", b"x"):
            read(content + behind)
    assert torch.equal(load_tensor(content + bytes(500)), load_tensor(content))
