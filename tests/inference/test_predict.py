import argparse
import errno
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import LABELS, tiny_args, tiny_model, tiny_processor, tiny_split, write_tiny_coco

from crosskd_hf.commands.predict import add_arguments, run
from crosskd_hf.inference import predict as module
from crosskd_hf.inference import prediction_writer
from crosskd_hf.inference.export_check import detections_of_model
from crosskd_hf.inference.image_files import (
    Annotated,
    ImageEntry,
    PredictionError,
    category_ids_of,
    find_images,
    match_images,
    number_images,
    picture_names,
    read_annotated,
)
from crosskd_hf.inference.predict import predict
from crosskd_hf.inference.prediction_writer import Prediction, check_prediction_folder, coco_results
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor
from crosskd_hf.models.postprocess import NonFiniteOutputError
from crosskd_hf.training.trainer import DetectionTrainer
from crosskd_hf.utils.images import load_rgb


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a saved detector that finds something in noise."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("retinanet")
    model.save_pretrained(folder)
    tiny_processor(model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def detector():
    model = tiny_model("retinanet").eval()
    return model, tiny_processor(model)


def noise(path: Path, width: int = 96, height: int = 64, mode: str = "RGB", seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).convert(mode).save(path, **options)
    return path


def command(*words: object) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([str(word) for word in words]))


def results(output: Path) -> list[dict]:
    return json.loads((output / "predictions.json").read_text())


def alone(detector: tuple, path: Path, threshold: float = 0.0) -> dict[str, torch.Tensor]:
    model, processor = detector
    image = load_rgb(path)
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    return processor.post_process_object_detection(outputs, threshold, [(image.height, image.width)])[0]


# predict


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 2)])
def test_predictions_are_those_of_each_image_alone(tmp_path: Path, detector, batch_size: int, workers: int) -> None:
    """Four padded sizes, so that one batch has images of the same and of other sizes."""
    sizes = [(96, 64), (64, 96), (192, 128), (2000, 100), (1, 1), (33, 33)]
    paths = [noise(tmp_path / f"{i}.png", *size, seed=i) for i, size in enumerate(sizes)]
    found = list(predict(*detector, paths, threshold=0.1, batch_size=batch_size, workers=workers))
    assert [prediction.path for prediction in found] == paths
    assert [prediction.image.size for prediction in found] == sizes
    for prediction in found:
        expected = alone(detector, prediction.path, threshold=0.1)
        assert torch.equal(prediction.labels, expected["labels"])
        torch.testing.assert_close(prediction.scores, expected["scores"], rtol=0, atol=1e-5)
        torch.testing.assert_close(prediction.boxes, expected["boxes"], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("workers", "limit"), [(0, 2), (2, 5)])
def test_images_are_read_only_when_they_are_needed(tmp_path: Path, detector, workers: int, limit: int) -> None:
    """With batches of 2: no file before the first is asked for, then one batch and what is read ahead of it."""
    path, asked = noise(tmp_path / "a.png"), []

    def endless():
        while True:
            asked.append(1)
            yield path

    threads = threading.active_count()
    predictions = predict(*detector, endless(), batch_size=2, workers=workers)
    assert not asked
    for count in range(1, 8):
        next(predictions)
        assert len(asked) <= limit + 2 * ((count - 1) // 2)
    predictions.close()
    assert threading.active_count() <= threads


def test_broken_images(tmp_path: Path, detector) -> None:
    good, broken = noise(tmp_path / "a.png"), tmp_path / "b.png"
    broken.write_bytes(good.read_bytes()[:100])
    missing = tmp_path / "c.png"
    errors = []
    found = list(predict(*detector, [broken, good, missing], on_error=lambda *error: errors.append(error)))
    assert [prediction.path for prediction in found] == [good]
    assert [path for path, _ in errors] == [broken, missing]
    assert str(errors[1][1]) == "does not exist"
    predictions = predict(*detector, [good, missing], batch_size=1)
    assert next(predictions).path == good
    with pytest.raises(PredictionError, match=r"c\.png does not exist: restore or remove it"):
        next(predictions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.01}, "threshold must be from 0 to 1"),
        ({"threshold": float("nan")}, "threshold must be from 0 to 1, got nan"),
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"workers": -1}, "number of workers must be at least 0, got -1"),
    ],
)
def test_wrong_arguments_raise_at_the_call(detector, options: dict, message: str) -> None:
    with pytest.raises(PredictionError, match=message):
        list(predict(*detector, [], **options))


# sources


def test_files_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.png", "deep/c.png", "deep/deeper/d.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def found(*sources: str, recursive: bool = False) -> list[str]:
        paths = find_images([str(tmp_path / source) for source in sources], recursive)
        return [path.relative_to(tmp_path).as_posix() for path in paths]

    assert found(".") == ["a.png", "b.JPG"]
    assert found(".", recursive=True) == ["a.png", "b.JPG", "deep/c.png", "deep/deeper/d.webp"]
    assert found("*.png") == ["a.png"]
    assert found("*") == ["a.png", "b.JPG"]
    assert found("**/*.png") == ["a.png", "deep/c.png"]
    assert found("deep/c.png", "a.png", ".", "*.png") == ["a.png", "b.JPG", "deep/c.png"]
    assert found("notes.txt") == ["notes.txt"], "a file that is named is taken at its word"
    assert found("deep") == ["deep/c.png"]
    (tmp_path / "a[1].png").touch()
    assert found("a[1].png") == ["a[1].png"], "first of all a name"
    monkeypatch.chdir(tmp_path)
    assert find_images(["a.png", str(tmp_path / "a.png"), "./a.png"]) == [Path("a.png")]


def test_sources_without_images(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").touch()
    with pytest.raises(PredictionError, match=r"folder .* holds no images \(\.avif .*\.webp\); --recursive looks"):
        find_images([str(tmp_path)])
    (tmp_path / "sub" / "a.png").unlink()
    with pytest.raises(PredictionError, match=r"holds no images \(.*\.jpg.*\)\.$"):
        find_images([str(tmp_path)], recursive=True)
    with pytest.raises(PredictionError, match=r"the pattern .*\*\.jpg matches no images \(\.avif"):
        find_images([str(tmp_path / "*.jpg")])
    with pytest.raises(PredictionError, match=r"there is no file or folder .*nowhere"):
        find_images([str(tmp_path / "nowhere")])


# ids


def test_ids_are_the_stems_if_those_are_different_numbers() -> None:
    def ids(*names: str) -> list[int]:
        return [entry.image_id for entry in number_images(names)]

    assert ids("000000000139.jpg", "x/000000000042.png") == [139, 42]
    assert ids("0.png") == [0]
    assert ids("1.jpg", "01.png") == [1, 2], "the same number"
    assert ids("7.jpg", "9.jpg", "b.jpg") == [1, 2, 3]
    assert ids("-3.jpg") == ids("3.5.jpg") == ids("٣.jpg") == [1]


def test_categories_are_found_by_coco_s_old_names_too() -> None:
    assert category_ids_of({0: "stop_sign", 1: "cat"}, Annotated({}, {"cat": 17, "stop sign": 13})) == {0: 13, 1: 17}
    assert category_ids_of({0: "stop sign"}, Annotated({}, {"stop_sign": 13})) == {0: 13}


def test_annotated_images_are_found_by_the_end_of_the_path(tmp_path: Path) -> None:
    annotated = Annotated(
        {"a.png": ImageEntry(5, "a.png"), "x/a.png": ImageEntry(6, "x/a.png"), "b.png": ImageEntry(7, "b.png")}, {}
    )
    paths = [tmp_path / "a.png", tmp_path / "x" / "a.png", tmp_path / "y" / "b.png"]
    assert [entry.image_id for entry in match_images(paths, annotated)] == [5, 6, 7]
    with pytest.raises(PredictionError, match=r"c\.png is not an image of the annotation file"):
        match_images([tmp_path / "c.png"], annotated)
    with pytest.raises(PredictionError, match=r"c/b\.png and .*d/b\.png are both 'b\.png'"):
        match_images([tmp_path / "c" / "b.png", tmp_path / "d" / "b.png"], annotated)


IMAGE = '{"id": 1, "file_name": "a.png", "width": 1, "height": 1}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"can't be read \(No such file"),
        (f'{{"images": [{IMAGE}, {IMAGE}], "categories": []}}', r"lists the file_name 'a\.png' twice"),
        ("{", "is no JSON"),
        ("[]", "is no COCO instances file"),
        ('{"images": []}', "is no COCO instances file: .* 'categories'"),
        ('{"images": [{"id": 1}], "categories": []}', "file_name"),
        (
            '{"images": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            "lists the category 'a' twi",
        ),
    ],
)
def test_annotation_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PredictionError, match=f"wrong.json.*{message}"):
        read_annotated(path)


# results


def test_results_by_hand() -> None:
    prediction = Prediction(
        Path("a.png"),
        Image.new("RGB", (50, 50)),
        torch.tensor([0.5, 0.25]),
        torch.tensor([1, 0]),
        torch.tensor([[1.0, 2.0, 11.12345, 22.0], [0.0, 0.0, 3.0, 4.0]]),
    )
    entry = ImageEntry(9, "a.png")
    first = {"image_id": 9, "file_name": "a.png", "category_id": 7, "category": "dog"}
    first |= {"bbox": [1.0, 2.0, 10.123, 20.0], "score": 0.5}
    assert coco_results(prediction, entry, LABELS, {0: 3, 1: 7}, 0.25) == [first], "0.25 is not above 0.25"
    both = coco_results(prediction, entry, LABELS, {0: 3, 1: 7}, 0.2499)
    assert [row["category_id"] for row in both] == [7, 3]


def test_the_command_writes_what_predict_gives(tmp_path: Path, saved: str, detector, capsys) -> None:
    paths = [noise(tmp_path / "in" / f"{i}.png", 96, 64 + i, seed=i) for i in (11, 3, 4)]
    command(saved, tmp_path / "in", "--output-dir", tmp_path / "out", "--device", "cpu")
    rows, expected = results(tmp_path / "out"), []
    for prediction in predict(*detector, paths):
        entry = ImageEntry(int(prediction.path.stem), prediction.path.name)
        expected += coco_results(prediction, entry, LABELS, {0: 0, 1: 1}, 0.0)
    exact = ("image_id", "file_name", "category_id", "category")
    assert [[row[key] for key in exact] for row in rows] == [[row[key] for key in exact] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert [*row["bbox"], row["score"]] == pytest.approx([*other["bbox"], other["score"]], abs=2e-3)
    assert sorted(os.listdir(tmp_path / "out")) == ["pictures", "predictions.json"], "nothing temporary stays"
    assert sorted(os.listdir(tmp_path / "out" / "pictures")) == ["11.png", "3.png", "4.png"]
    text = capsys.readouterr()
    drawn = sum(row["score"] > 0.3 for row in rows)
    assert f"3 images, {len(rows)} detections, {drawn} of them above 0.3" in text.out and "left out" not in text.out
    assert text.err == "" or "predict" not in text.err, "no bar where there is no terminal"


def test_thresholds_of_the_command(tmp_path: Path, saved: str, detector) -> None:
    path = noise(tmp_path / "a.png", 512, 512)
    scores = alone(detector, path)["scores"]
    middle = scores[4].item() / 2 + scores[5].item() / 2
    options = ["--no-pictures", "--output-dir", tmp_path / "out"]
    command(saved, path, *options, "--threshold", 1, "--json-threshold", middle)
    assert len(results(tmp_path / "out")) == 5
    assert not (tmp_path / "out" / "pictures").exists()
    command(saved, path, *options, "--json-threshold", 1)
    assert results(tmp_path / "out") == []
    command(saved, path, *options, "--format", "csv", "--threshold", middle)
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 1 + 5
    command(saved, path, "--output-dir", tmp_path / "plain", "--threshold", 1)
    command(saved, path, "--output-dir", tmp_path / "drawn", "--threshold", 0)
    plain, drawn = (load_rgb(tmp_path / name / "pictures" / "a.png").tobytes() for name in ("plain", "drawn"))
    assert plain == load_rgb(path).tobytes() != drawn


def test_broken_images_are_skipped_and_named(tmp_path: Path, saved: str, capsys) -> None:
    for i in (1, 2, 3):
        noise(tmp_path / "in" / f"{i}.png", seed=i)
    bad = tmp_path / "in" / "2.png"
    bad.write_bytes(b"")
    command(saved, tmp_path / "in", "--output-dir", tmp_path / "out", "--batch-size", 2)
    assert {row["image_id"] for row in results(tmp_path / "out")} == {1, 3}
    text = capsys.readouterr().out
    assert "2 images," in text
    assert f"1 of 3 images were left out:\n  {bad} is an empty file" in text
    with pytest.raises(SystemExit, match="1"):  # since it is a source itself
        command(saved, bad.with_name("1.png"), bad, "--output-dir", tmp_path / "out")
    assert {row["image_id"] for row in results(tmp_path / "out")} == {1}
    with pytest.raises(PredictionError, match=r"none of the images could be used:\n.*2\.png is an empty"):
        command(saved, bad, "--output-dir", tmp_path / "none")
    assert os.listdir(tmp_path / "none") == []


def test_pictures_have_the_names_of_images() -> None:
    names = ["x/a.jpg", "y/a.jpg", "y/b.JPEG", "c.bmp", "c.png", "c.bmp.png", "d.gif"]
    expected = ["x/a.jpg", "y/a.jpg", "y/b.JPEG", "c.bmp.png.png", "c.png", "c.bmp.png", "d.gif.png"]
    assert picture_names(names) == expected


@pytest.mark.parametrize("link", ["output", "file", "folder", "none"])
def test_inputs_are_never_overwritten(tmp_path: Path, link: str) -> None:
    path, out = noise(tmp_path / "pictures" / "a.png"), tmp_path
    if link == "output":
        out = tmp_path / "linked"
        out.mkdir()
        (out / "pictures").symlink_to(path.parent)
    elif link != "none":
        (tmp_path / "link").symlink_to(path if link == "file" else path.parent)
        path = tmp_path / "link" if link == "file" else tmp_path / "link" / "a.png"
    with pytest.raises(PredictionError, match="lies where pictures are written"):
        check_prediction_folder(str(out), out / "pictures", [path], ["a.png"])
    check_prediction_folder(str(out), None, [path], ["a.png"])


def test_a_picture_replaces_a_link_and_not_what_it_points_to(tmp_path: Path, saved: str) -> None:
    path, pictures = noise(tmp_path / "a.png"), tmp_path / "out" / "pictures"
    content = path.read_bytes()
    pictures.mkdir(parents=True)
    (pictures / "a.png").symlink_to(path)
    command(saved, path, "--output-dir", tmp_path / "out")
    assert path.read_bytes() == content and not (pictures / "a.png").is_symlink()


def test_output_folders_that_can_be_none(tmp_path: Path) -> None:
    image = noise(tmp_path / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pictures").touch()
    for folder, reason in (
        ("", "names no folder"),
        (tmp_path / "link", "is a link to .*gone"),
        (image, r"a\.png is a file"),
        (image / "below", r"a\.png is a file"),
        (tmp_path / "out", "pictures is a file"),
    ):
        with pytest.raises(PredictionError, match=f"{reason}.*--output-dir"):
            check_prediction_folder(str(folder), Path(folder) / "pictures", [image], ["a.png"])


def test_an_old_folder_is_named_and_nothing_of_others_is_written_over(tmp_path: Path, capsys) -> None:
    image, pictures = noise(tmp_path / "1.png"), tmp_path / "out" / "pictures"
    results = tmp_path / "out" / "predictions.json"
    noise(pictures / "1.png")
    arguments = str(tmp_path / "out"), pictures, [image]
    with pytest.raises(PredictionError, match=r"written over, such as 1\.png"):
        check_prediction_folder(*arguments, ["1.png"])
    check_prediction_folder(*arguments, ["2.png"])
    (pictures / ".crosskd_predict").touch()  # of a call that was interrupted
    check_prediction_folder(*arguments, ["1.png"])
    results.write_text("[]\n")
    capsys.readouterr()
    check_prediction_folder(*arguments, ["2.png"])
    printed = capsys.readouterr().out
    assert f"{results} is of an earlier call" in printed and "1 other pictures, such as 1.png" in printed
    results.write_text("my notes")
    with pytest.raises(PredictionError, match=r"predictions\.json is no file of this command"):
        check_prediction_folder(*arguments, ["1.png"])


def test_stop_leaves_the_earlier_results(tmp_path: Path, saved: str) -> None:
    noise(tmp_path / "in" / "1.png")
    (tmp_path / "in" / "2.png").write_bytes(b"no image")
    arguments = [saved, tmp_path / "in", "--output-dir", tmp_path / "out", "--on-error", "stop", "--batch-size", 1]
    with pytest.raises(PredictionError, match=r"2\.png cannot be read .*restore or remove it"):
        command(*arguments)
    assert os.listdir(tmp_path / "out") == ["pictures"], "neither results nor a part of them"
    (tmp_path / "out" / "predictions.json").write_text("[]\nearlier")
    with pytest.raises(PredictionError):
        command(*arguments)
    assert (tmp_path / "out" / "predictions.json").read_text() == "[]\nearlier"
    noise(tmp_path / "in" / "2.png")
    command(*arguments)
    assert {row["image_id"] for row in results(tmp_path / "out")} == {1, 2}


def test_a_bug_or_a_full_disk_leaves_no_part(tmp_path: Path, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = [saved, noise(tmp_path / "a.png"), "--output-dir", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(prediction_writer, "draw_boxes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            command(*arguments)
    assert os.listdir(tmp_path / "out") == []
    message = r" can't be written \(No space left on device\)\. Make room, or name another folder with --output-dir"
    for owner, name, file in ((Image.Image, "save", r"pictures/a\.png"), (os, "fsync", r"predictions\.json")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(PredictionError, match=file + message):
                command(*arguments)
        assert os.listdir(tmp_path / "out") == ["pictures"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-threshold", "-0.5"], "threshold must be from 0 to 1, got -0.5"),
        (["--device", "abacus"], "the device 'abacus' can't be used .*--device cpu"),
        (["--annotations", "none.json"], "annotation file none.json can't be read"),
    ],
)
def test_wrong_options(tmp_path: Path, saved: str, options: list[str], message: str) -> None:
    with pytest.raises(PredictionError, match=message):
        command(saved, noise(tmp_path / "a.png"), "--output-dir", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


# annotations


def test_scored_by_pycocotools(tmp_path: Path, saved: str) -> None:
    """Images listed with other ids than their names say, and categories with other ids than the labels."""
    write_tiny_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_mini.json"
    content = json.loads(file.read_text())
    for record in content["images"]:
        record["id"] += 100
    content["annotations"] = []
    file.write_text(json.dumps(content))
    arguments = [saved, tmp_path / "mini", "--annotations", file, "--output-dir", tmp_path / "out", "--no-pictures"]
    command(*arguments)
    rows = results(tmp_path / "out")
    assert {row["image_id"] for row in rows} == {101, 102, 103, 104, 105}
    assert {(row["category"], row["category_id"]) for row in rows} == {("cat", 3), ("dog", 7)}
    # The best detection of each image becomes the truth, so that it scores 1.
    best = {row["image_id"]: row for row in sorted(rows, key=lambda row: row["score"])}
    for i, row in enumerate(best.values(), start=1):
        truth = {key: row[key] for key in ("image_id", "category_id", "bbox")}
        content["annotations"].append(truth | {"id": i, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0})
    file.write_text(json.dumps(content))
    truth = COCO(str(file))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "out" / "predictions.json")), "bbox")
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    assert evaluation.stats[8] == 1.0  # AR100: every box is found, at every IoU


def test_annotations_that_do_not_fit(tmp_path: Path, saved: str, capsys) -> None:
    write_tiny_coco(tmp_path, images=2)
    file = tmp_path / "annotations" / "instances_mini.json"
    content = json.loads(file.read_text())
    options = ["--annotations", file, "--output-dir", tmp_path / "out", "--no-pictures"]
    with pytest.raises(PredictionError, match=r"other\.png is not an image of the annotation file"):
        command(saved, noise(tmp_path / "other.png"), *options)

    content["images"][0]["width"] = 95
    file.write_text(json.dumps(content))
    command(saved, tmp_path / "mini", *options)
    assert {row["image_id"] for row in results(tmp_path / "out")} == {2}
    assert "1.png is 96 x 64 pixels, but the annotation file says 95 x 64" in capsys.readouterr().out
    with pytest.raises(PredictionError, match=r"1\.png is 96 x 64 pixels, but"):
        command(saved, tmp_path / "mini", *options, "--on-error", "stop")

    content["categories"][1]["name"] = "wolf"
    file.write_text(json.dumps(content))
    with pytest.raises(
        PredictionError, match=r"1 labels that aren't categories .* 'dog'; its categories are cat, wolf"
    ):
        command(saved, tmp_path / "mini", *options)


def test_out_of_memory_names_batch_and_option(detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = detector
    paths = [noise(tmp_path / f"{i}.png", seed=i) for i in range(2)]

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "detect_images", fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"2 images of 64 x 96 pixels.*--batch-size"):
        list(predict(model, processor, paths, batch_size=2))


def test_outputs_that_are_not_finite_are_no_empty_result(tmp_path: Path) -> None:
    """Of weights that are finite: "nothing found" would be a wrong answer."""
    model = tiny_model(head_blocks=1)
    with torch.no_grad():
        model.head.box_predictor.weight.fill_(1e38)
    model.save_pretrained(tmp_path / "model")
    processor = DenseDetectorImageProcessor.for_model(model.config, 64, 96)
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(NonFiniteOutputError, match="gives NaN or infinity"):
        list(predict(model.eval(), processor, [noise(tmp_path / "a.png")]))
    trainer = DetectionTrainer(
        model, tiny_args(tmp_path / "run"), eval_dataset=tiny_split(tmp_path / "data"), processing_class=processor
    )
    with pytest.raises(NonFiniteOutputError):
        trainer.evaluate()
    with pytest.raises(NonFiniteOutputError):
        detections_of_model(model, processor, processor(str(noise(tmp_path / "a.png")), return_tensors="pt"))


def test_urls_are_fetched_once(saved, tmp_path: Path, server) -> None:
    image = noise(tmp_path / "a.png").read_bytes()
    server.files = {"/photos/a.png": image, "/b?token=secret": image}
    urls = [f"{server.url}/photos/a.png", f"{server.url}/b?token=secret"]
    for _ in range(2):
        command(saved, *urls, "--output-dir", tmp_path / "out")
    assert sorted(server.requests) == ["/b?token=secret", "/photos/a.png"]
    names = {result["file_name"] for result in results(tmp_path / "out")}
    assert len(names) == 2 and any(name.endswith("a.png") for name in names) and "secret" not in "".join(names)
    with pytest.raises(PredictionError, match=r"/c\.png can't be fetched \(HTTP Error 404"):
        command(saved, f"{server.url}/c.png?token=secret", "--output-dir", tmp_path / "out")
