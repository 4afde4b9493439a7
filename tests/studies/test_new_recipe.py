"""`crosskd new`: recipes that fit what lies in a folder, and run."""

from pathlib import Path

import pytest
from tiny import write_tiny_coco
from transformers import RTDetrConfig

from crosskd_hf.commands.main import main
from crosskd_hf.data.settings import DataSection
from crosskd_hf.models import CONFIGS
from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.studies import new_recipe
from crosskd_hf.studies.new_recipe import Detector, batches, write_recipe


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("train", "val"):
        write_tiny_coco(tmp_path / "data", name=name)
    return tmp_path / "data"


def test_a_recipe_is_written_and_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    path = tmp_path / "mine.yaml"
    main(["new", str(path), "--data", str(data)])
    recipe, printed = load_recipe(path, []), capsys.readouterr().out
    assert (recipe.data.train_split, recipe.data.val_split, recipe.data.layout) == ("train", "val", "coco")
    assert (recipe.model.detector, recipe.model.backbone) == ("gfl", "resnet18.tv_in1k")
    assert recipe.teacher.checkpoint == "runs/mine_teacher" and "to be trained first" in printed
    assert "5 images of train, 5 of val" in printed and "classes    2: cat, dog" in printed
    text = path.read_text()
    assert "teacher=null distillation=null model.detector=gfl model.backbone=resnet50.tv_in1k" in text
    assert "training.output_dir=runs/mine_teacher\n" in text, "on one line, to be copied"
    assert text.index("training.output_dir=runs/mine_alone\n") < text.index(f"train {path}\nmodel:")
    with pytest.raises(SystemExit, match="is there already"):
        main(["new", str(path), "--data", str(data)])


def test_one_folder_of_images_and_other_splits(data: Path, tmp_path: Path) -> None:
    """Images of both splits in `images/`; a split that no list of usual names has."""
    (data / "val").rename(data / "images")
    for path in (data / "train").iterdir():
        path.rename(data / "images" / path.name)
    (data / "train").rmdir()
    (data / "annotations" / "instances_val.json").rename(data / "annotations" / "instances_night.json")
    write_recipe(tmp_path / "mine.yaml", DataSection(path=str(data), val_split="night"))
    written = load_recipe(tmp_path / "mine.yaml", []).data
    assert (written.images, written.train_split, written.val_split) == ("images", "train", "night")


@pytest.mark.parametrize(
    ("student", "teacher", "method"),
    [
        ("gfl", "gfl", "crosskd"),
        ("rt_detr", "rt_detr", "query_crosskd"),
        ("gfl", "rt_detr", "soft_boxes"),
        ("rt_detr", "gfl", "soft_boxes"),
        ("gfl/resnet18.tv_in1k", "gfl", "crosskd"),
    ],
)
def test_saved_detectors(student, teacher, method, data: Path, tmp_path: Path) -> None:
    """What they are is read, and decides method and optimizer."""
    for name, config in (("gfl", CONFIGS["gfl"]()), ("rt_detr", RTDetrConfig())):
        config.save_pretrained(tmp_path / name)
    named = {name: name if "/" in name else str(tmp_path / name) for name in (student, teacher)}
    path = tmp_path / "mine.yaml"
    lines = write_recipe(path, DataSection(path=str(data)), named[student], named[teacher])
    recipe = load_recipe(path, [])
    assert recipe.teacher.checkpoint == str(tmp_path / teacher) and list(recipe.distillation.methods) == [method]
    assert recipe.model.pretrained == (None if "/" in student else str(tmp_path / student))
    assert recipe.training.get("optim") == ("adamw_torch" if student == "rt_detr" else None)
    assert (recipe.data.size is None) == (student != "rt_detr")
    assert "to be trained first" not in "".join(lines) and lines[-1] == f"method     {method}"


@pytest.mark.parametrize("name", ["set #2", "a: b", "123", "null", "it's", "- x", "two\nlines"])
def test_paths_that_yaml_would_read_otherwise(name: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tiny_coco(tmp_path / name, name=split)
    path = tmp_path / f"{name} recipe.yaml"
    write_recipe(path, DataSection(path=str(tmp_path / name)))
    recipe = load_recipe(path, [])
    assert recipe.data.path == str(tmp_path / name)
    assert recipe.training["output_dir"] == f"runs/{path.stem}"


def test_what_the_user_says_of_the_data_stays(data: Path, tmp_path: Path) -> None:
    said = {"on_error": "skip", "max_train_images": 3, "filter_empty": False, "augment": ["flip"], "short_side": 64}
    lines = write_recipe(tmp_path / "mine.yaml", DataSection(path=str(data), **said))
    assert "images     resized to 64 x 96 at most" in lines
    written = load_recipe(tmp_path / "mine.yaml", []).data
    assert {name: getattr(written, name) for name in said} == said


@pytest.mark.parametrize(
    ("text", "detector", "backbone"),
    [
        ("fcos/resnet50.tv_in1k", "fcos", "resnet50.tv_in1k"),
        ("gfl/lcnet_050", "gfl", "lcnet_050"),
    ],
)
def test_names_of_detectors(text, detector, backbone) -> None:
    assert Detector.named(text) == Detector(text, True, detector, backbone)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gfl/nosuch", "timm has no backbone 'nosuch'"),
        ("nowhere", "'nowhere' is no DETECTOR"),
        ("fcos/", "fcos/"),
    ],
)
def test_names_of_nothing(text, words, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=words):
        Detector.named(text)


@pytest.mark.parametrize(
    ("gigabytes", "pixels", "images", "expected"),
    [
        (140, 800 * 1333, 118_000, (16, 1)),
        (24, 800 * 1333, 118_000, (4, 4)),
        (4, 800 * 1333, 118_000, (1, 16)),
        (24, 320 * 320, 118_000, (16, 1)),
        (140, 800 * 1333, 40, (16, 1)),
        (140, 800 * 1333, 5, (4, 1)),
        (4, 800 * 1333, 40, (1, 4)),
    ],
)
def test_a_batch_fits_the_memory(gigabytes, pixels, images, expected, monkeypatch) -> None:
    monkeypatch.setattr(new_recipe, "_gigabytes", lambda: gigabytes)
    assert batches(pixels, images) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.txt", "--data", "x"], r"a\.txt must end in \.yaml"),
        (["a.yaml"], "--data is missing"),
        (["a.yaml", "--data", "nowhere"], "nowhere"),
        (["a.yaml", "--data", "DATA", "--set", "val_split=night"], "night"),
    ],
)
def test_what_is_refused(arguments, words, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words):
        main(["new", *(str(data) if word == "DATA" else word for word in arguments)])
    assert not (tmp_path / "a.yaml").exists()
