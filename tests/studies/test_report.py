"""Reports of runs whose folders are written by hand: a few images, known detections."""

import json
import re
from pathlib import Path

import pytest
import yaml
from tiny import tiny_model, tiny_processor, tiny_split

from crosskd_hf.commands.main import main
from crosskd_hf.studies.closing import close_run
from crosskd_hf.studies.report import write_report
from crosskd_hf.studies.run_results import ReportError
from crosskd_hf.training.coco_metrics import CocoEvaluator


@pytest.fixture
def split(tmp_path: Path):
    return tiny_split(tmp_path / "data")


def write_run(folder: Path, data, found: float = 1.0, teacher: Path | None = None, **evaluation) -> Path:
    """A finished run that finds this share of all boxes, exactly, and nothing else."""
    rows = data.dataset.with_format("arrow", columns=["image_id", "objects"])[:].to_pylist()
    boxes = [
        {"image_id": row["image_id"], "category_id": int(data.category_ids[label]), "bbox": bbox, "score": 0.9}
        for row in rows
        for label, bbox in zip(row["objects"]["category"], row["objects"]["bbox"], strict=True)
    ]
    model = tiny_model(head_blocks=1)
    model.save_pretrained(folder)
    tiny_processor(model).save_pretrained(folder)
    recipe = {
        "model": {"detector": "gfl", "backbone": "resnet18"},
        "teacher": None if teacher is None else {"checkpoint": str(teacher)},
        "data": {"layout": "coco", "path": data.source, "val_split": "mini"},
        "training": {"output_dir": str(folder), "hub_token": "hf_" + "a" * 30},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "evaluation").mkdir()
    kept = boxes[: round(found * len(boxes))]
    (folder / "evaluation" / "eval_predictions.json").write_text(json.dumps(kept))
    settings = {"data": "data", "split": "mini", "images": len(data), **evaluation}
    metrics = {"AP": found, "AP50": found, "AP75": found, "APs": -1.0, "APm": -1.0, "APl": -1.0}
    (folder / "evaluation" / "eval_metrics.json").write_text(json.dumps({**metrics, "evaluation": settings}))
    log = [{"epoch": 1.0, "loss_cls": 0.5, "step": 1}, {"epoch": 1.0, "eval_AP": found, "step": 1}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": 1}))
    return folder


def text_of(path: Path) -> str:
    """What a reader sees, without pictures."""
    page = re.sub(r"<style.*?</style>|<img[^>]*>", " ", path.read_text(), flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_runs_side_by_side(tmp_path: Path, split) -> None:
    teacher = write_run(tmp_path / "teacher", split)
    alone = write_run(tmp_path / "alone", split, 0.25)
    student = write_run(tmp_path / "student", split, 0.75, teacher)
    path, runs = write_report([alone, student], costs=False)
    assert path == student / "report.html"
    assert [run.name for run in runs] == ["teacher (teacher)", "alone", "student"]
    shown = text_of(path)
    for row in (
        "teacher (teacher) gfl resnet18 100.0 100.0 100.0 - - - -25.0",
        "alone gfl resnet18 25.0 25.0 25.0 - - - +50.0",
        "student gfl resnet18 75.0 75.0 75.0 - - - ",
    ):
        assert row in shown
    boxes = sum(len(objects["bbox"]) for objects in split.dataset["objects"])
    assert f"{round(0.75 * boxes)} of {boxes} boxes are found with their class, 0 are found twice" in shown
    page = path.read_text()
    assert "hf_aaa" not in page and str(tmp_path) not in page, "others may read it"
    assert "http" not in page.replace("http://www.w3.org", ""), "it needs nothing else"


def test_costs_are_measured(tmp_path: Path, split) -> None:
    path, _ = write_report([write_run(tmp_path / "run", split)])
    assert re.search(r"\d+\.\d M \d+ MB \d+ ms", text_of(path))


def test_names_from_outside_are_harmless(tmp_path: Path, split) -> None:
    folder = write_run(tmp_path / "<script>x", split)
    page = write_report([folder], costs=False)[0].read_text()
    assert "<script>" not in page and "&lt;script&gt;x" in page


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, split) -> None:
    run = write_run(tmp_path / "run", split)
    other = write_run(tmp_path / "other", split, split="train")
    with pytest.raises(ReportError, match=r"other and .*run can't be compared: split .* 'train' and 'mini'"):
        write_report([other, run], costs=False)
    fewer = write_run(tmp_path / "fewer", split, images=3)
    with pytest.raises(ReportError, match="evaluated on 3 images, but its data has 5 now"):
        write_report([fewer], costs=False)
    (run / "evaluation" / "eval_predictions.json").write_text(
        '[{"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1]}]'
    )
    with pytest.raises(ReportError, match="aren't of the images and classes of this report"):
        write_report([run], costs=False)
    (run / "evaluation" / "eval_predictions.json").unlink()
    with pytest.raises(ReportError, match=r"eval_predictions\.json is missing: .* a finished run"):
        write_report([run], costs=False)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("eval_metrics.json", "{}", "doesn't say of which images"),
        ("eval_metrics.json", "[]", "holds no dict"),
        ("eval_predictions.json", "{}", "holds no list"),
        ("eval_predictions.json", "[", "is no JSON"),
    ],
)
def test_damaged_files_are_told(name, content, words, tmp_path: Path, split) -> None:
    run = write_run(tmp_path / "run", split)
    (run / "evaluation" / name).write_text(content)
    with pytest.raises(ReportError, match=rf"{name} {words}"):
        write_report([run], costs=False)


def test_a_teacher_of_other_data_is_left_out(tmp_path: Path, split) -> None:
    teacher = write_run(tmp_path / "teacher", split, split="train")
    _, runs = write_report([write_run(tmp_path / "student", split, 0.5, teacher)], costs=False)
    assert [run.name for run in runs] == ["student"]


def test_the_last_lines_of_a_run(tmp_path: Path, split) -> None:
    """The teacher, and the run beside it that had none."""
    teacher = write_run(tmp_path / "models" / "big", split)
    write_run(tmp_path / "runs" / "alone", split, 0.25)
    write_run(tmp_path / "runs" / "other data", split, 0.5, teacher)
    student = write_run(tmp_path / "runs" / "student", split, 0.75, teacher)
    first, model, report, following = close_run(student).splitlines()
    assert first == "AP 75.0 (teacher (big) 100.0, alone 25.0)"
    metrics = tmp_path / "runs" / "alone" / "evaluation" / "eval_metrics.json"
    metrics.write_text(metrics.read_text().replace('"mini"', '"train"'))
    assert close_run(student).startswith("AP 75.0 (teacher (big) 100.0)\n"), "evaluated on something else since"
    assert model.endswith(str(student)) and report.endswith("report.html") and "crosskd predict" in following


def test_the_command(tmp_path: Path, split, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path / "run", split)
    main(["report", str(run), "--output", str(tmp_path / "a.html"), "--no-costs"])
    assert capsys.readouterr().out == f"{tmp_path / 'a.html'}: run\n" and (tmp_path / "a.html").is_file()
    for arguments, words in (([str(run), "--threshold", "1"], "--threshold"), ([str(tmp_path)], "eval_metrics.json")):
        with pytest.raises(SystemExit, match=words):
            main(["report", *arguments])


def test_classes_in_detail(split) -> None:
    """A class of which one of two boxes is found."""
    evaluator = CocoEvaluator(split)
    rows = split.dataset.with_format("arrow", columns=["image_id", "objects"])[:].to_pylist()
    counts: dict[int, int] = {}
    for row in rows:
        labels, boxes = row["objects"]["category"], row["objects"]["bbox"]
        for label in labels:
            counts[label] = counts.get(label, 0) + 1
        corners = [[x, y, x + w, y + h] for x, y, w, h in boxes]
        keep = [i for i, label in enumerate(labels) if label == 0]
        found = {"scores": [0.9] * len(keep), "labels": [0] * len(keep), "boxes": [corners[i] for i in keep]}
        evaluator.update([row["image_id"]], [found])
    of_classes = evaluator.class_results()
    assert [one.name for one in of_classes] == list(split.label_names)
    assert [one.boxes for one in of_classes] == [counts.get(label, 0) for label in range(len(of_classes))]
    assert (of_classes[0].ap, of_classes[0].ap50, of_classes[0].recall) == pytest.approx((1, 1, 1))
    assert (of_classes[1].ap, of_classes[1].recall) == (0, 0)
    assert evaluator.compute()["AP/" + split.label_names[0]] == pytest.approx(of_classes[0].ap)
