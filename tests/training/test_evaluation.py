"""COCO metrics against pycocotools on the annotation files, and against values computed by hand."""

import contextlib
import importlib.util
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from crosskd_hf.data.coco import load_coco
from crosskd_hf.data.split import DetectionSplit
from crosskd_hf.training import coco_metrics
from crosskd_hf.training.coco_metrics import SUMMARY_NAMES, CocoEvaluator
from crosskd_hf.training.metric_table import format_metrics

Objects = list[tuple]  # label, xywh box and maybe a dict of `area`, `iscrowd`


def make_split(
    images: dict[int, Objects], names: tuple[str, ...] = ("cat", "dog"), category_ids: tuple[int, ...] = (3, 7)
) -> DetectionSplit:
    """A split without image files: `image` names files that don't exist, so that decoding one fails."""
    rows: dict[str, list[Any]] = {"image_id": list(images), "image": [], "objects": []}
    for image_id, objects in images.items():
        rows["image"].append(f"/nowhere/{image_id}.jpg")
        rows["objects"].append(
            {
                "bbox": [[float(value) for value in bbox] for _, bbox, *_ in objects],
                "category": [label for label, *_ in objects],
                "area": [float(dict(*more).get("area", bbox[2] * bbox[3])) for _, bbox, *more in objects],
                "iscrowd": [dict(*more).get("iscrowd", False) for _, _, *more in objects],
            }
        )
    types = {"category": "int64", "area": "float64", "iscrowd": "bool"}
    objects = {name: datasets.List(datasets.Value(kind)) for name, kind in types.items()}
    objects["bbox"] = datasets.List(datasets.List(datasets.Value("float64"), length=4))
    features = {"image_id": datasets.Value("int64"), "image": datasets.Image(), "objects": objects}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    return DetectionSplit(dataset, names, category_ids)


def evaluator_of(
    images: dict[int, Objects], detections: dict[int, dict[str, torch.Tensor]], **options
) -> CocoEvaluator:
    """An evaluator that has got detections, image id -> detections."""
    evaluator = CocoEvaluator(make_split(images), **options)
    evaluator.update(list(detections), list(detections.values()))
    return evaluator


def detected(*entries: tuple[float, int, list[float]]) -> dict[str, torch.Tensor]:
    """Detections of one image from (score, label, xyxy box)."""
    return {
        "scores": torch.tensor([score for score, _, _ in entries], dtype=torch.float32),
        "labels": torch.tensor([label for _, label, _ in entries], dtype=torch.int64),
        "boxes": torch.tensor([box for _, _, box in entries], dtype=torch.float32).reshape(-1, 4),
    }


def read(annotation_file: Path) -> dict[str, Any]:
    return json.loads(annotation_file.read_text())


def pycocotools_reference(
    annotation_file: Path, split: DetectionSplit, detections: dict[int, dict[str, torch.Tensor]]
) -> dict[str, float]:
    """What pycocotools itself computes from the annotation file and a list of results."""
    entries = []
    for image_id, detection in detections.items():
        columns = (detection[key].double().tolist() for key in ("scores", "labels", "boxes"))
        for score, label, box in zip(*columns, strict=True):
            x1, y1, x2, y2 = box
            category_id = split.category_ids[int(label)]
            bbox = [x1, y1, x2 - x1, y2 - y1]
            entries.append({"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file))
        evaluation = COCOeval(truth, truth.loadRes(entries), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        metrics = dict(zip(SUMMARY_NAMES, evaluation.stats.tolist(), strict=True))
        for category in truth.dataset["categories"][::8]:  # some classes alone, by pycocotools' own summary
            evaluation.params.catIds = [category["id"]]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            metrics[f"AP/{category['name']}"] = float(evaluation.stats[0])
    return metrics


# --- equal to pycocotools -------------------------------------------------------------------------------------------


def test_bit_equal_to_pycocotools_on_the_annotation_file(coco_mini: Path, tmp_path: Path) -> None:
    file = coco_mini / "annotations" / "instances_val2017.json"
    split = load_coco(coco_mini, "val2017", cache_dir=tmp_path)
    rng, detections = np.random.default_rng(0), {}
    columns = split.dataset.with_format("arrow", columns=["image_id", "objects"])[:].to_pydict()
    for image_id, objects in list(zip(columns["image_id"], columns["objects"], strict=True))[:-3]:
        triples = [(label, bbox, {}) for label, bbox in zip(objects["category"], objects["bbox"], strict=True)]
        detections[image_id] = random_detections(triples, len(split.label_names), rng)
    assert sum(annotation["iscrowd"] for annotation in read(file)["annotations"]) > 0
    assert max(len(detection["scores"]) for detection in detections.values()) > 100
    evaluator = CocoEvaluator(split, backend="pycocotools")
    for image_id, detection in reversed(detections.items()):  # the order of arrival does not matter
        evaluator.update([image_id], [detection])
    metrics = evaluator.compute()
    assert pycocotools_reference(file, split, detections).items() <= metrics.items()
    assert 0 < metrics["AP"] < metrics["AP50"] < 1
    assert list(metrics) == [*SUMMARY_NAMES, *(f"AP/{label}" for label in split.label_names)]


def random_case(seed: int) -> tuple[DetectionSplit, dict[int, dict[str, torch.Tensor]]]:
    """Ground truth and detections with what evaluators disagree on: crowds, equal scores, images without either,
    classes without ground truth, areas at the borders of the ranges, duplicates, boxes without a width, more than 100
    detections of a class."""
    rng = np.random.default_rng(seed)
    count, ids = int(rng.integers(1, 40)), list(rng.permutation(1000))
    names = tuple(f"class {label}" for label in range(rng.integers(1, 8)))
    images: dict[int, Objects] = {}
    for image_id in map(int, ids[:count]):
        objects: Objects = []
        for _ in range(rng.poisson(4) if rng.random() < 0.8 else 0):
            bbox = [*rng.uniform(0, 400, 2), *np.exp(rng.uniform(0, 5.5, 2))]
            more = {"iscrowd": bool(rng.random() < 0.15)}
            if rng.random() < 0.3:
                more["area"] = float(rng.choice([0, 32**2, 32**2 + 1e-5, 96**2, 96**2 + 1e-5, 1e5]))
            # The last of several classes has no ground truth.
            objects.append((int(rng.integers(max(len(names) - 1, 1))), [round(float(v), 2) for v in bbox], more))
        images[image_id] = objects + objects[: int(rng.random() < 0.2)]
    category_ids = tuple(map(int, rng.permutation(90)[: len(names)] + 1))
    detections = {
        image_id: random_detections(objects, len(names), rng)
        for image_id, objects in images.items()
        if rng.random() < 0.9
    }
    return make_split(images, names, category_ids), detections


def random_detections(objects: Objects, labels: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Of one image: moved objects, equal ones too, and boxes anywhere."""
    entries = []
    for _ in range(rng.choice([0, 1, 10, 60, 300], p=[0.1, 0.2, 0.4, 0.25, 0.05])):
        label, box = int(rng.integers(labels)), np.concatenate([rng.uniform(0, 400, 2), np.exp(rng.uniform(0, 5, 2))])
        if objects and rng.random() < 0.7:
            true_label, bbox, _ = objects[rng.integers(len(objects))]
            label = true_label if rng.random() < 0.8 else label
            box = np.array(bbox) + (rng.normal(0, 0.1, 4) * [*bbox[2:], *bbox[2:]] if rng.random() < 0.8 else 0)
        width, height = box[2:].clip(0) * (rng.random(2) > 0.02)
        score = rng.random() if rng.random() < 0.5 else rng.choice([0.0, 0.1, 0.5, 1.0])
        entries.append((float(score), label, [box[0], box[1], box[0] + width, box[1] + height]))
    return detected(*entries)


@pytest.mark.parametrize("seed", range(6))
def test_backends_give_the_same_numbers(seed: int) -> None:
    pytest.importorskip("faster_coco_eval")
    split, detections = random_case(seed)
    metrics = []
    for backend in ("pycocotools", "faster"):
        evaluator = CocoEvaluator(split, backend)
        evaluator.update(list(detections), list(detections.values()))
        metrics.append(evaluator.compute())
    assert list(metrics[0]) == list(metrics[1])
    assert metrics[1] == pytest.approx(metrics[0], rel=0, abs=1e-12)


@pytest.mark.parametrize("backend", ["pycocotools", "faster"])
def test_nothing_found_and_nothing_to_find(backend: str) -> None:
    if backend == "faster":
        pytest.importorskip("faster_coco_eval")
    images = {1: [(0, BOX_XYWH)], 2: []}
    nothing = {"scores": [], "labels": [], "boxes": []}
    for detections in ({}, {1: detected(), 2: nothing}):
        metrics = evaluator_of(images, detections, backend=backend).compute()
        assert metrics["AP"] == metrics["AP/cat"] == metrics["AR100"] == 0
        assert metrics["AP/dog"] == metrics["APl"] == -1
    empty = evaluator_of({1: [], 2: []}, {1: detected((0.9, 0, BOX))}, backend=backend)
    assert set(empty.compute().values()) == {-1.0}


def test_faster_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="crosskd_hf.training.coco_metrics")
    split = make_split({1: [(0, BOX_XYWH)]})
    if importlib.util.find_spec("faster_coco_eval"):
        CocoEvaluator(split).compute()
        assert "by faster-coco-eval" in caplog.text
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)  # as if it weren't
    CocoEvaluator(split).compute()
    assert "by pycocotools" in caplog.text
    with pytest.raises(ImportError, match=r"\.\[fast\]"):
        CocoEvaluator(split, "faster")
    with pytest.raises(ValueError, match="one of auto, pycocotools, faster"):
        CocoEvaluator(split, "fast")


def test_annotation_id_zero_is_matched(write_coco: Callable[..., Path], tmp_path: Path) -> None:
    root = write_coco([(1, 64, 64)], [(0, 1, 7, [4, 4, 20, 20])])
    split = load_coco(root, "mini", cache_dir=tmp_path)
    detections = {1: detected((0.9, split.label_names.index("cat"), [4, 4, 24, 24]))}
    evaluator = CocoEvaluator(split)
    evaluator.update([1], [detections[1]])
    assert evaluator.compute()["AP"] == pytest.approx(1, abs=1e-12)
    # The reason to renumber: should this fail one day, pycocotools has been repaired.
    assert pycocotools_reference(root / "annotations" / "instances_mini.json", split, detections)["AP"] == 0


# --- values by hand -------------------------------------------------------------------------------------------------

BOX, FAR = [10, 10, 40, 40], [200, 200, 240, 240]  # xyxy
BOX_XYWH = [10, 10, 30, 30]


def test_values_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    images = {1: [(0, BOX_XYWH), (0, [200, 200, 40, 40])], 2: [(1, [10, 10, 100, 100])], 5: []}
    metrics = evaluator_of(images, {1: detected((0.9, 0, BOX)), 2: detected((0.8, 1, [10, 10, 110, 80]))}).compute()
    # cat: one of two objects, so precision 1 at the recalls 0, .01, ..., .5: 51 of 101.
    assert metrics["AP/cat"] == pytest.approx(51 / 101)
    # dog: IoU exactly .7, so right for the thresholds .5 .. .7 (5 of 10), `>=` up to rounding.
    assert metrics["AP/dog"] == pytest.approx(0.5)
    assert metrics["AP"] == pytest.approx((51 / 101 + 0.5) / 2)
    assert metrics["AP50"] == pytest.approx((51 / 101 + 1) / 2)
    assert metrics["AP75"] == pytest.approx(51 / 101 / 2)
    assert metrics["APs"] == pytest.approx(1)  # 30^2 is small and found
    assert metrics["APm"] == 0  # 40^2 is not found
    assert metrics["APl"] == pytest.approx(0.5)
    assert metrics["AR1"] == metrics["AR100"] == pytest.approx(0.5)
    assert capsys.readouterr() == ("", "")


def fail(batch: dict) -> dict:
    raise AssertionError("the transform of the data set was run")


@pytest.mark.parametrize("format_name", [None, "numpy", "torch", "transform"])
def test_area_is_the_column_in_full_precision_and_no_image_is_decoded(format_name: str | None) -> None:
    area = 32**2 + 1e-5  # just not small; as float32 it would be. The box says 900
    split = make_split({1: [(0, BOX_XYWH, {"area": area})]})
    dataset = (
        split.dataset.with_transform(fail) if format_name == "transform" else split.dataset.with_format(format_name)
    )
    evaluator = CocoEvaluator(DetectionSplit(dataset, split.label_names, split.category_ids))
    evaluator.update([1], [detected((0.9, 0, BOX))])
    metrics = evaluator.compute()
    assert metrics["APs"] == -1
    assert metrics["APm"] == pytest.approx(1)


def test_a_crowd_excuses_detections_and_asks_for_none() -> None:
    box, crowd = (0, BOX_XYWH), (0, [200, 200, 100, 100], {"iscrowd": True})
    inside = [(0.95, 0, [200, 200, 220, 220]), (0.94, 0, [230, 230, 300, 300])]
    detections = {1: detected(*inside, (0.9, 0, BOX))}
    assert evaluator_of({1: [box, crowd]}, detections).compute()["AP"] == pytest.approx(1)
    assert evaluator_of({1: [box]}, detections).compute()["AP"] == pytest.approx(1 / 3)
    assert set(evaluator_of({1: [crowd]}, {1: detected(*inside)}).compute().values()) == {-1.0}


def test_an_image_without_prediction_counts_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    evaluator = evaluator_of({1: [(0, BOX_XYWH)], 2: [(0, BOX_XYWH)], 3: []}, {1: detected((0.9, 0, BOX))})
    assert evaluator.compute()["AP"] == pytest.approx(51 / 101)
    assert "2 of 3 images have no prediction" in caplog.text
    assert evaluator.detections_of(2).boxes.shape == (0, 4)
    with pytest.raises(ValueError, match="no image to evaluate"):
        CocoEvaluator(make_split({1: []}).first(0)).compute()


def test_an_update_replaces_an_earlier_one() -> None:
    evaluator = evaluator_of({1: [(0, BOX_XYWH)]}, {1: detected((0.9, 0, FAR))})
    evaluator.update([1], [detected((0.9, 0, BOX))])
    evaluator.gather()  # does nothing in a single process
    assert evaluator.compute()["AP"] == pytest.approx(1)


def test_category_ids_in_any_order() -> None:
    evaluator = CocoEvaluator(make_split({1: [(0, BOX_XYWH)]}, names=("zebra", "ant"), category_ids=(9, 2)))
    evaluator.update([1], [detected((0.9, 0, BOX))])
    metrics = evaluator.compute()
    assert (metrics["AP/zebra"], metrics["AP/ant"]) == (pytest.approx(1), -1)
    assert evaluator.results()[0]["category_id"] == 9


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.tensor([math.nan])}, "image id 1: a score or a box is not finite"),
        ({"boxes": torch.tensor([[0, 0, math.inf, 5]])}, "image id 1: a score or a box is not finite"),
        ({"boxes": torch.tensor([[0, math.nan, 4, 5]])}, "image id 1: a score or a box is not finite"),
        ({"labels": torch.tensor([2])}, r"image id 1: labels must be in 0\.\.1, got 2\.\.2"),
        ({"labels": torch.tensor([-1])}, r"image id 1: labels must be in 0\.\.1"),
        ({"labels": torch.tensor([1.0])}, "image id 1: labels must be integers, got torch.float32"),
        ({"boxes": torch.tensor([[30.0, 30.0, 20.0, 50.0]])}, "image id 1: a box has x2 < x1"),
        ({"boxes": torch.tensor([30.0, 30.0, 40.0, 50.0])}, "image id 1: .* must be"),
        ({"boxes": torch.zeros(2, 4)}, "image id 1: .* must be"),
        ({"scores": torch.tensor(0.5)}, "image id 1: .* must be"),
        ({"scores": torch.zeros(1, 80)}, "image id 1: .* must be"),
    ],
)
def test_unsound_detections_are_refused_whole(change: dict[str, torch.Tensor], message: str) -> None:
    evaluator = CocoEvaluator(make_split({1: [], 2: []}))
    with pytest.raises(ValueError, match=message):
        evaluator.update([2, 1], [detected((0.5, 0, BOX)), {**detected((0.5, 0, BOX)), **change}])
    assert evaluator.results() == [] and not len(evaluator.detections_of(2).scores)


def test_unsound_calls_and_splits_are_refused() -> None:
    evaluator = CocoEvaluator(make_split({1: []}))
    with pytest.raises(ValueError, match="image id 9 is not in the split"):
        evaluator.update([9], [detected()])
    with pytest.raises(ValueError, match="2 image ids, but detections of 1"):
        evaluator.update([1, 1], [detected()])
    with pytest.raises(KeyError, match="boxes"):
        evaluator.update([1], [{"scores": torch.zeros(0), "labels": torch.zeros(0)}])
    split = make_split({1: []})
    twice = datasets.concatenate_datasets([split.dataset, split.dataset])
    with pytest.raises(ValueError, match="2 image ids, but only 1"):
        CocoEvaluator(DetectionSplit(twice, split.label_names, split.category_ids))
    with pytest.raises(ValueError, match="2 category ids, but only 1"):
        CocoEvaluator(make_split({1: []}, category_ids=(3, 3)))


# --- results and files ----------------------------------------------------------------------------------------------


def test_results_are_in_coco_format() -> None:
    detections = {1: detected((1 / 3, 1, [1.00049, 2, 4.5, 8.25])), 5: detected((0.25, 0, BOX))}
    assert evaluator_of({5: [], 1: []}, detections).results() == [
        {"image_id": 5, "category_id": 3, "bbox": [10.0, 10.0, 30.0, 30.0], "score": 0.25},
        {"image_id": 1, "category_id": 7, "bbox": [1.0, 2.0, 3.5, 6.25], "score": 0.33333334},
    ]


def test_saved_files_load_in_pycocotools(write_coco: Callable[..., Path], tmp_path: Path) -> None:
    root = write_coco([(1, 64, 64)], [(4, 1, 7, [4, 4, 20, 20])])
    split = load_coco(root, "mini", cache_dir=tmp_path)
    evaluator = CocoEvaluator(split)
    evaluator.update([1], [detected((0.9, split.label_names.index("cat"), [4, 4, 24, 24]))])
    folder = tmp_path / "a" / "b"
    metrics = evaluator.compute()
    evaluator.save(folder, metrics, prefix="mini_")
    evaluator.save(folder, metrics, prefix="mini_")  # over the earlier files
    assert sorted(path.name for path in folder.iterdir()) == ["mini_metrics.json", "mini_predictions.json"]
    assert read(folder / "mini_metrics.json") == metrics
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(root / "annotations" / "instances_mini.json"))
        assert len(truth.loadRes(str(folder / "mini_predictions.json")).anns) == 1


def test_a_failing_write_is_named_and_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = CocoEvaluator(make_split({1: []}))
    evaluator.save(tmp_path / "out", {"AP": 0.5})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match=r"could not write evaluation results: No space left .*predictions\.json"):
        evaluator.save(tmp_path / "out", {"AP": 0.6})
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "predictions.json"]
    assert read(tmp_path / "out" / "metrics.json") == {"AP": 0.5}

    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not write evaluation results"):
        evaluator.save(tmp_path / "file", {"AP": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        evaluator.save(tmp_path / "never", {"AP": math.nan})
    assert not (tmp_path / "never").exists()


def test_format_metrics() -> None:
    classes = {"AP/cat": 0.5, "AP/traffic light": -1.0}
    metrics = dict.fromkeys(SUMMARY_NAMES, 0.4021) | {"APl": -1.0} | classes | {"loss": 2.0}
    lines = format_metrics(metrics).splitlines()
    assert lines[0].split() == list(SUMMARY_NAMES[:6])
    assert lines[1].split() == ["40.2"] * 5 + ["-"]
    assert lines[2].split() == list(SUMMARY_NAMES[6:])
    assert lines[5:] == ["class              AP", "cat              50.0", "traffic light       -"]
    assert format_metrics({"AP": 1.0}).split() == ["AP", "100.0"]
    assert format_metrics({}) == ""


def test_processes_share_their_detections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets those of all. An image that two processes had counts once, with the first one's result."""
    parts: list[dict] = []

    def all_gather(output: list, part: dict) -> None:
        output[:] = parts

    monkeypatch.setattr(coco_metrics, "num_processes", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather)
    images = {1: [], 2: [], 3: []}
    first = evaluator_of(images, {1: detected((0.5, 0, BOX)), 3: detected((0.75, 0, BOX))})
    second = evaluator_of(images, {2: detected((0.125, 0, BOX)), 1: detected((0.25, 0, BOX))})
    parts += [first._detections, second._detections]
    for evaluator in (first, second):
        evaluator.gather()
        assert [entry["score"] for entry in evaluator.results()] == [0.5, 0.125, 0.75]
