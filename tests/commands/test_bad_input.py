"""Every usual mistake in a data set -> what loading or the command line says or does, before any training."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tiny import tiny_model, write_tiny_coco

from crosskd_hf.commands import main as cli
from crosskd_hf.commands import train
from crosskd_hf.data.load import load_datasets
from crosskd_hf.data.settings import DataSection
from crosskd_hf.data.transforms import resize

Edit = Callable[[Path, dict[str, Any]], Any]  # the image folder and the annotation file's content, before training


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[Edit], DataSection]:
    """Five noise images after an edit."""

    def make(edit: Edit) -> DataSection:
        root = tmp_path / "data"
        write_tiny_coco(root)
        file = root / "annotations" / "instances_mini.json"
        content = json.loads(file.read_text())
        text = edit(root / "mini", content)
        file.write_text(text if isinstance(text, str) else json.dumps(content))
        sides = {"short_side": 64, "long_side": 96, "flip_probability": 0.0}
        cache = str(tmp_path / "cache")
        return DataSection(path=str(root), train_split="mini", val_split="mini", cache_dir=cache, **sides)

    return make


@pytest.fixture
def command(broken: Callable, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of `crosskd train` for five noise images after an edit."""

    def make(edit: Edit, *overrides: str) -> list[str]:
        small = {"backbone": "resnet18", "fpn_channels": 32, "head_channels": 32}
        recipe = {
            "model": {"detector": "gfl", "backbone_weights": "random", **small},
            "data": dataclasses.asdict(broken(edit)),
            "training": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "warmup_steps": 0, "use_cpu": True},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return [str(tmp_path / "recipe.yaml"), *overrides]

    return make


def first_box(**values: Any) -> Edit:
    return lambda folder, content: content["annotations"][0].update(values)


def overwrite(data: bytes) -> Edit:
    return lambda folder, content: (folder / "1.png").write_bytes(data)


def new_size(width: int, height: int) -> Edit:
    def edit(folder: Path, content: dict) -> None:
        Image.new("RGB", (width, height)).save(folder / "1.png")
        content["images"][0].update(width=width, height=height)

    return edit


def cut_off(folder: Path, content: dict) -> None:
    file = folder / "1.png"
    file.write_bytes(file.read_bytes()[:-40])


def turn(folder: Path, content: dict) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64)).save(folder / "1.png", exif=exif)


def as_xyxy(folder: Path, content: dict) -> None:
    for record in content["annotations"]:
        x, y, w, h = record["bbox"]
        record["bbox"] = [x + 20, y + 10, x + w + 20, y + h + 10]


# What is wrong -> what the message says, and whether on_error=skip loads the rest. Wrong values are in tests/data.
REFUSED = {
    "missing image": (lambda f, c: (f / "1.png").unlink(), "1.png (image id 1) does not exist", True),
    "text as image": (overwrite(b"no image"), "1.png (image id 1) cannot be read", True),
    "truncated PNG": (cut_off, "1.png (image id 1) cannot be read", True),
    "rotated, annotated as stored": (turn, "a quarter turn: boxes belong to the image as people see it", True),
    "other size": (lambda f, c: c["images"][0].update(width=95), "is 96 x 64 pixels, annotated as 95 x 64", True),
    "negative width": (first_box(bbox=[40, 5, -9, 9]), "box of negative width or height (correct or remove it)", True),
    "boxes are xyxy": (as_xyxy, "as xyxy (pixel) 0 don't", False),
    "no box": (lambda f, c: c["annotations"].clear(), "has 5 images, but no box", False),
    "only crowds": (lambda f, c: [a.update(iscrowd=1) for a in c["annotations"]], "crowds don't count", False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, broken: Callable, caplog: pytest.LogCaptureFixture) -> None:
    edit, message, can_be_skipped = REFUSED[name]
    data = broken(edit)
    with pytest.raises(ValueError) as raised:
        load_datasets(data, 0)
    assert message in str(raised.value)
    skipping = dataclasses.replace(data, on_error="skip")
    if not can_be_skipped:
        with pytest.raises(ValueError):
            load_datasets(skipping, 0)
        return
    assert "data.on_error=skip" in str(raised.value)
    for _ in range(2):  # from the cache, too
        caplog.clear()
        load_datasets(skipping, 0)
        assert "left out: 1 x" in caplog.text and message.split(" (")[0].split(":")[0] in caplog.text


def test_the_commands_end_with_the_same_message(command: Callable, tmp_path: Path) -> None:
    arguments, report = command(overwrite(b"")), tmp_path / "report"
    with pytest.raises(SystemExit, match=r"DataError: .*\n.*1\.png .* is an empty file"):
        train.main([*arguments, "--dry-run"])
    with pytest.raises(SystemExit, match="training would stop at this data"):
        cli.main(["check-data", *arguments, "--output-dir", str(report)])
    assert "! 1 x image cannot be read" in (report / "report.txt").read_text()
    cli.main(["check-data", *arguments, "data.on_error=skip", "--output-dir", str(report)])
    assert {"mini.png", "mini_samples.png"} <= {path.name for path in report.iterdir()}


def ids_from_zero_with_gaps(folder: Path, content: dict) -> None:
    ids = {3: 0, 7: 90}
    for record in content["categories"]:
        record["id"] = ids[record["id"]]
    for record in content["annotations"]:
        record["category_id"] = ids[record["category_id"]]


# What is unusual -> the problem that is told, if any.
ACCEPTED = {
    "area 0": (first_box(area=0), "area of 0 or less (it is not trained on; leave area out to take the box's)"),
    "one pixel": (new_size(1, 1), None),
    "panorama 20:1": (new_size(640, 32), None),
    "ids 0 and 90": (ids_from_zero_with_gaps, None),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted(name: str, broken: Callable) -> None:
    edit, told = ACCEPTED[name]
    train_dataset, eval_dataset = load_datasets(broken(edit), 0)
    for item in [*train_dataset, *eval_dataset]:
        assert min(item["size"]) >= 1
    assert told is None or told in "".join(train_dataset.split.problems.lines(stopping=False))
    if name == "ids 0 and 90":
        assert train_dataset.split.category_ids == (0, 90)
        assert {label for item in train_dataset for label in item["class_labels"].tolist()} == {0, 1}


def test_a_box_stays_on_the_thing_that_people_see_when_the_camera_was_turned(broken: Callable) -> None:
    def edit(folder: Path, content: dict) -> None:
        upright = Image.new("RGB", (64, 96))
        upright.paste((255, 255, 255), (10, 50, 30, 80))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter clockwise
        upright.transpose(Image.Transpose.ROTATE_90).save(folder / "1.png", exif=exif)
        content["images"][0].update(width=64, height=96)
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]
        content["annotations"].append({"id": 999, "image_id": 1, "category_id": 3, "bbox": [10, 50, 20, 30]})

    item = load_datasets(broken(edit), 0)[0][0]
    (x1, y1, x2, y2), pixels = item["boxes"][0].tolist(), resize(item["image"], item["size"])[0]
    assert (pixels > 128).nonzero().min(0).values.tolist() == pytest.approx([y1, x1], abs=1)
    assert (pixels > 128).nonzero().max(0).values.tolist() == pytest.approx([y2 - 1, x2 - 1], abs=1)


def test_a_teacher_of_other_labels_is_refused_and_of_some_told(command: Callable, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "teacher"
    arguments = command(lambda f, c: None, f"teacher.checkpoint={folder}", "distillation.methods=[crosskd]")
    tiny_model(id2label={0: "newt", 1: "emu"}).save_pretrained(folder)
    with pytest.raises(SystemExit, match=r"student cat, dog; teacher newt, emu.* train the teacher on"):
        train.main([*arguments, "--dry-run"])
    tiny_model(id2label={0: "newt", 1: "dog", 2: "emu"}).save_pretrained(folder)
    train.main([*arguments, "--dry-run"])
    told = "classes: 1 of the student's 2 are among the teacher's 3; learnt without the teacher: cat"
    assert told in capsys.readouterr().out


def test_a_full_disk_is_told_before_training(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, usage = command(lambda f, c: None, "training.save_strategy=steps"), shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SystemExit, match=r"training.output_dir .* needs about .* GB"):
        train.main([*arguments, "--dry-run"])
