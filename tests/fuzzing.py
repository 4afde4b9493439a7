"""Data sets as strangers make them, drawn by hypothesis: written to disk, loaded, and every box followed."""

import copy
import io
import json
import os
import signal
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from crosskd_hf.data.coco import load_coco
from crosskd_hf.data.collator import DetectionCollator
from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.errors import DataError
from crosskd_hf.data.split import DetectionSplit, keep_for_training

SECONDS = 20  # for one data set
TOLERANCE = 0.01  # pixels
MODES = ("RGB", "L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "P with transparency", "RGB turned")
KINDS = {"RGB": ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF"), "CMYK": ("JPEG", "TIFF"), "RGB turned": ("JPEG",)}
ODD = (None, True, "7", "\ud800", "", [], {}, 1e308, -1e308, 10**400, 2**63, -1, 0, 0.5, 1e-9, [[1]])
ODD += (float("nan"), float("inf"))
IMAGE_FAULTS = {
    "empty file": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: path.write_text("<html>404 not found</html>"),
    "missing": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere.png")),
    "link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "PostScript": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"),
    "bomb": lambda path: path.write_bytes(png_header(60_000, 60_000)),
    "random bytes": lambda path: path.write_bytes(np.random.default_rng(0).bytes(300)),
    "one byte changed": lambda path: path.write_bytes(changed(path.read_bytes())),
}
IMAGE_KEYS = ("id", "width", "height", "file_name")
ANNOTATION_KEYS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
FILE_FAULTS = {
    "no JSON": lambda text: text[:-20],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "deep": lambda text: "[" * 100_000,
    "byte order mark": lambda text: "\ufeff" + text,
    "a number of 5000 digits": lambda text: text.replace('"id": 1,', '"id": 1' + 5000 * "0" + ",", 1),
}


def png_header(width: int, height: int) -> bytes:
    """A PNG that names another size than its pixel's."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    content = file.getvalue()
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def changed(content: bytes) -> bytes:
    """A byte in the middle turned round."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


# Drawing --------------------------------------------------------------------------------------------------------


def boxes(width: int, height: int) -> st.SearchStrategy:
    """[x, y, w, h], mostly inside the image, some over its edge, without area, outside."""
    inside = st.tuples(*(st.floats(0, side, width=32) for side in (width, height, width, height)))
    anywhere = st.tuples(*[st.floats(-300, 600, width=32)] * 2, *[st.floats(0, 600, width=32)] * 2)
    return st.one_of(inside, inside, anywhere).map(list)


@st.composite
def images(draw, number: int) -> dict[str, Any]:
    """One image: how it looks, and its annotations."""
    mode = draw(st.sampled_from(MODES))
    side = st.one_of(st.integers(33, 90), st.integers(33, 90), st.integers(1, 32), st.sampled_from([1, 200]))
    width, height = draw(side), draw(side)
    return {
        "mode": mode,
        "kind": draw(st.sampled_from(KINDS.get(mode, ("PNG",)))),
        "orientation": draw(st.integers(2, 8)) if mode == "RGB turned" else 1,
        "width": width,
        "height": height,
        "boxes": draw(st.lists(boxes(width, height), max_size=4)),
        "crowds": draw(st.lists(st.booleans(), min_size=4, max_size=4)),
        "number": number,
    }


@st.composite
def data_sets(draw) -> dict[str, Any]:
    """A data set of 3 to 5 images with 0 to 4 faults."""
    count = draw(st.integers(3, 5))
    one = st.integers(0, count - 1)
    fault = st.one_of(
        st.tuples(st.just("image"), one, st.sampled_from(sorted(IMAGE_FAULTS))),
        st.tuples(st.just("image key"), one, st.sampled_from(IMAGE_KEYS), st.sampled_from(ODD)),
        st.tuples(st.just("annotation key"), one, st.sampled_from(ANNOTATION_KEYS), st.sampled_from(ODD)),
        st.tuples(st.just("annotation key"), one, st.sampled_from(ANNOTATION_KEYS), st.sampled_from(ODD)),
        st.tuples(st.just("box number"), one, st.integers(0, 3), st.sampled_from(ODD)),
        st.tuples(st.just("box number"), one, st.integers(0, 3), st.sampled_from(ODD)),
        st.tuples(st.just("no key"), one, st.sampled_from(IMAGE_KEYS + ANNOTATION_KEYS)),
        st.tuples(st.just("file name"), one, st.sampled_from(["../1.png", "/etc/hostname", "a\0b.png", "C:\\x.png"])),
        st.tuples(st.just("size"), one, st.integers(1, 99)),
        st.tuples(st.just("twice"), one, st.sampled_from(["images", "annotations", "categories"])),
        st.tuples(st.just("list"), st.sampled_from(["images", "annotations", "categories"]), st.sampled_from(ODD)),
        st.tuples(st.just("file"), st.sampled_from(sorted(FILE_FAULTS))),
    )
    several = st.one_of(st.just([]), st.lists(fault, min_size=1, max_size=2), st.lists(fault, min_size=2, max_size=4))
    return {"images": [draw(images(i)) for i in range(1, count + 1)], "faults": draw(several)}


# Writing --------------------------------------------------------------------------------------------------------


def picture(spec: dict[str, Any]) -> Image.Image:
    """Noise of a mode."""
    rng = np.random.default_rng(spec["number"])
    size, mode = (spec["height"], spec["width"]), spec["mode"].partition(" ")[0]
    if mode == "I;16":
        pixels = rng.integers(0, 65535, size, dtype=np.uint16)
        pixels[0, 0] = 65535  # few pixels may all be as dark as 12 bits in 16, which are refused
        return Image.fromarray(pixels)
    image = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).convert(mode)
    if spec["mode"].endswith("transparency"):
        image.info["transparency"] = bytes(range(256))
    return image


def write(spec: dict[str, Any], folder: Path) -> None:
    """Images and annotations of a data set, with its faults, in COCO layout; the split is `all`."""
    (folder / "all").mkdir(parents=True)
    (folder / "annotations").mkdir()
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "a"}, {"id": 9, "name": "b"}],
    }
    for one in spec["images"]:
        name = f"{one['number']}.{one['kind'].lower()}"
        exif = Image.Exif()
        exif[0x0112] = one["orientation"]
        options = {"exif": exif} if one["orientation"] > 1 else {}
        picture(one).save(folder / "all" / name, format=one["kind"], **options)
        width, height = one["width"], one["height"]
        if one["orientation"] > 4:
            width, height = height, width
        content["images"].append({"id": one["number"], "file_name": name, "width": width, "height": height})
        for j, box in enumerate(one["boxes"]):
            record = {"id": 100 * one["number"] + j, "image_id": one["number"], "category_id": 3 if j % 2 else 9}
            content["annotations"].append(record | {"bbox": box, "iscrowd": int(one["crowds"][j])})
    text_faults = [inject(fault, content, folder / "all") for fault in spec["faults"]]
    text = json.dumps(content)
    for change in text_faults:
        text = change(text) if change else text
    (folder / "annotations" / "instances_all.json").write_text(text, encoding="utf-8")


def inject(fault: tuple, content: dict[str, Any], folder: Path):
    """Put one fault in; returns what it does to the text of the JSON file, if anything."""
    kind, *details = fault
    if kind == "file":
        return FILE_FAULTS[details[0]]
    if kind == "list":
        content[details[0]] = copy.deepcopy(details[1])
        return None
    lists = {name: content[name] for name in ("images", "annotations") if isinstance(content[name], list)}
    listed, notes = lists.get("images", []), lists.get("annotations", [])
    image = listed[details[0] % len(listed)] if listed else {}
    note = notes[details[0] % len(notes)] if notes else {}
    if kind == "image":
        path = folder / str(image.get("file_name", "none"))
        if path.is_file() and path.parent == folder and not path.is_symlink():
            IMAGE_FAULTS[details[1]](path)
    elif kind == "image key":
        image[details[1]] = copy.deepcopy(details[2])
    elif kind == "annotation key":
        note[details[1]] = copy.deepcopy(details[2])
    elif kind == "box number" and isinstance(note.get("bbox"), list) and len(note["bbox"]) == 4:
        note["bbox"][details[1]] = copy.deepcopy(details[2])
    elif kind == "no key":
        (image if details[1] in image else note).pop(details[1], None)
    elif kind == "file name":
        image["file_name"] = details[1]
    elif kind == "size":
        image["width"] = details[1]
    elif kind == "twice" and isinstance(content[details[1]], list) and content[details[1]]:
        content[details[1]].append(copy.deepcopy(content[details[1]][0]))
    return None


# Examining ------------------------------------------------------------------------------------------------------


class TooSlow(Exception):
    """A data set took longer than `SECONDS`."""


def examine(folder: Path, model=None, processor=None) -> Counter:
    """Load a data set both ways and follow every box of what is left.

    Args:
        folder: `write` wrote it.
        model, processor: a detector to take a training step's losses from, if given.

    Returns:
        counts: `refused` (with a message that names what), `loaded`, `skipped` (loaded, with faults left out),
            `nothing left`, `trained`.

    Raises:
        TooSlow, AssertionError: a finding. So is any other exception.
    """

    def late(number: int, frame: object) -> None:
        raise TooSlow(f"over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return _examine(folder, model, processor)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _examine(folder: Path, model, processor) -> Counter:
    counts: Counter = Counter()
    for on_error in ("stop", "skip"):
        try:
            split = load_coco(folder, "all", on_error=on_error, cache_dir=str(folder / "cache"))
        except (DataError, FileNotFoundError) as error:
            assert str(folder) in str(error) and len(str(error)) < 20_000, str(error)[:500]
            counts["refused" if on_error == "stop" else "refused with on_error=skip"] += 1
            continue
        counts["loaded" if on_error == "stop" else "loaded with on_error=skip"] += 1
        follow_boxes(folder, split)
        counts += train(split, model, processor)
    return counts


def follow_boxes(folder: Path, split: DetectionSplit) -> None:
    """Every box of every item is where the annotation file has it: resized, flipped, clipped, within `TOLERANCE`."""
    content = json.loads((folder / "annotations" / "instances_all.json").read_text(encoding="utf-8-sig"))
    given: dict[int, list[list[float]]] = {}
    for note in content["annotations"]:
        if "bbox" in note:  # on_error=skip leaves others out
            given.setdefault(int(note["image_id"]), []).append(note["bbox"])
    for flip in (0.0, 1.0):
        data = DetectionDataset(split, train=True, short_side=48, long_side=80, flip_probability=flip)
        for i in range(len(data)):
            item = data[i]
            height, width = item["size"]
            original_height, original_width = item["original_size"]
            scale_x, scale_y = width / original_width, height / original_height
            expected = []
            for x, y, w, h in filter(usable, given.get(item["image_id"], [])):
                left, right = (original_width - x - w, original_width - x) if flip else (x, x + w)
                corners = left * scale_x, y * scale_y, right * scale_x, (y + h) * scale_y
                expected.append([min(max(c, 0.0), side) for c, side in zip(corners, (width, height) * 2, strict=True)])
            assert item["boxes"].isfinite().all()
            for box in item["boxes"].tolist():
                moved = min((max(abs(a - b) for a, b in zip(box, e, strict=True)) for e in expected), default=1e9)
                assert moved <= TOLERANCE, f"image {item['image_id']}: {box} moved by {moved} from {expected}"


def usable(box: object) -> bool:
    """Four numbers that fp64 has."""
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) <= 1e9 for v in box)
    )


def train(split: DetectionSplit, model, processor) -> Counter:
    """A training step's losses on what is left; they must be finite."""
    try:
        kept = keep_for_training(split)
    except ValueError as error:
        assert "no image" in str(error) or "none" in str(error), error
        return Counter({"nothing to train on": 1})
    if model is None:
        return Counter()
    data = DetectionDataset(kept, train=True, short_side=48, long_side=80)
    batch = DetectionCollator(processor)([data[i] for i in range(min(3, len(data)))])
    losses = model(**batch).loss_dict
    assert all(value.isfinite() for value in losses.values()), losses
    return Counter({"trained on": 1})
