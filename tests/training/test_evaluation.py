"""COCO metrics against pycocotools on the annotation files, and against values computed by hand."""

import contextlib
import importlib.util
import io
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from crosskd_hf.data.coco import load_coco
from crosskd_hf.data.split import DetectionSplit
from crosskd_hf.training.coco_metrics import SUMMARY_NAMES, CocoEvaluator, format_metrics

Objects = list[tuple]  # label, xywh box and maybe a dict of `area`, `iscrowd`


def make_split(
    images: dict[int, Objects], names: tuple[str, ...] = ("cat", "dog"), category_ids: tuple[int, ...] = (3, 7)
) -> DetectionSplit:
    """A split without image files: `image` names files that don't exist, so that decoding one fails."""
    rows: dict[str, list[Any]] = {key: [] for key in ("image_id", "image", "file_name", "width", "height", "objects")}
    for image_id, objects in images.items():
        rows["image_id"].append(image_id)
        rows["image"].append(f"/nowhere/{image_id}.jpg")
        rows["file_name"].append(f"{image_id}.jpg")
        rows["width"].append(640)
        rows["height"].append(480)
        rows["objects"].append(
            {
                "id": list(range(len(objects))),  # starts at 0 in every image
                "bbox": [[float(value) for value in bbox] for _, bbox, *_ in objects],
                "category": [label for label, *_ in objects],
                "area": [float(dict(*more).get("area", bbox[2] * bbox[3])) for _, bbox, *more in objects],
                "iscrowd": [dict(*more).get("iscrowd", False) for _, _, *more in objects],
            }
        )
    features = datasets.Features(
        {
            "image_id": datasets.Value("int64"),
            "image": datasets.Image(),
            "file_name": datasets.Value("string"),
            "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
            "objects": {
                "id": datasets.List(datasets.Value("int64")),
                "bbox": datasets.List(datasets.List(datasets.Value("float64"), length=4)),
                "category": datasets.List(datasets.Value("int64")),
                "area": datasets.List(datasets.Value("float64")),
                "iscrowd": datasets.List(datasets.Value("bool")),
            },
        }
    )
    return DetectionSplit(datasets.Dataset.from_dict(rows, features=features), names, category_ids)


def found(*entries: tuple[float, int, list[float]]) -> dict[str, torch.Tensor]:
    """Detections of one image from (score, label, xyxy box)."""
    return {
        "scores": torch.tensor([score for score, _, _ in entries], dtype=torch.float32),
        "labels": torch.tensor([label for _, label, _ in entries], dtype=torch.int64),
        "boxes": torch.tensor([box for _, _, box in entries], dtype=torch.float32).reshape(-1, 4),
    }


def perturbed(annotations: list[dict], labels: dict[int, int], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Detections of one image: moved ground truth, often twice or with another label, and boxes inside crowds."""
    scores, classes, boxes = [], [], []
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        for _ in range(rng.integers(0, 4) if not annotation["iscrowd"] else 12):
            noise = rng.normal(0, 0.08, 4) * [w, h, w, h]
            box = np.array([x, y, x + w, y + h]) + noise
            if annotation["iscrowd"]:  # a part of the region: matched to the crowd, neither right nor wrong
                box = np.array([x, y, x + w / rng.uniform(1, 4), y + h / rng.uniform(1, 4)])
            label = labels[annotation["category_id"]]
            classes.append(label if rng.random() > 0.2 else int(rng.integers(len(labels))))
            boxes.append([*np.minimum(box[:2], box[2:]), *np.maximum(box[:2], box[2:])])
            scores.append(round(rng.random(), 1) if rng.random() < 0.5 else rng.random())  # many equal scores
    return {
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(classes, dtype=torch.int64),
        "boxes": torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32),
    }


def read(annotation_file: Path) -> dict[str, Any]:
    return json.loads(annotation_file.read_text())


def synthetic(annotation_file: Path, split: DetectionSplit) -> dict[int, dict[str, torch.Tensor]]:
    """Detections of all images but a few of an annotation file; one image has more than 100 of one class."""
    rng = np.random.default_rng(0)
    labels = {category_id: label for label, category_id in enumerate(split.category_ids)}
    by_image: dict[int, list[dict]] = {image["id"]: [] for image in read(annotation_file)["images"]}
    for annotation in read(annotation_file)["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    detections = {image_id: perturbed(annotations, labels, rng) for image_id, annotations in by_image.items()}
    crowded = max(by_image, key=lambda image_id: len(by_image[image_id]))
    many = perturbed(by_image[crowded] * 20, labels, rng)
    detections[crowded] = {**many, "labels": torch.zeros_like(many["labels"])}
    assert len(many["labels"]) > 100
    return dict(list(detections.items())[:-3])


def pycocotools_reference(
    annotation_file: Path,
    split: DetectionSplit,
    detections: dict[int, dict[str, torch.Tensor]],
    image_ids: list[int] | None = None,
) -> dict[str, float]:
    """What pycocotools itself says: the annotation file and a list of results, its own loaders, its own numbers."""
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
        evaluation.params.imgIds = image_ids or evaluation.params.imgIds
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        metrics = dict(zip(SUMMARY_NAMES, evaluation.stats.tolist(), strict=True))
        for category in truth.dataset["categories"]:  # each class alone, by pycocotools' own summary
            evaluation.params.catIds = [category["id"]]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            metrics[f"AP/{category['name']}"] = float(evaluation.stats[0])
    return metrics


# --- equal to pycocotools -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train2017", "val2017"])
def test_bit_equal_to_pycocotools_on_the_annotation_file(coco_mini: Path, tmp_path: Path, name: str) -> None:
    file = coco_mini / "annotations" / f"instances_{name}.json"
    split = load_coco(coco_mini, name, cache_dir=tmp_path)
    detections = synthetic(file, split)
    assert sum(annotation["iscrowd"] for annotation in read(file)["annotations"]) > 0
    evaluator = CocoEvaluator(split, backend="pycocotools")
    for image_id, detection in reversed(detections.items()):  # the order of arrival does not matter
        evaluator.update([image_id], [detection])

    metrics = evaluator.compute()

    assert metrics == pycocotools_reference(file, split, detections)
    assert 0.1 < metrics["AP"] < metrics["AP50"] < 1
    assert list(metrics) == [*SUMMARY_NAMES, *(f"AP/{label}" for label in split.label_names)]
    some = sorted(detections)[::3]
    assert evaluator.compute(some + some[:2]) == pycocotools_reference(file, split, detections, some)
    assert evaluator.compute() == metrics


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
            own, bbox, _ = objects[rng.integers(len(objects))]
            label = own if rng.random() < 0.8 else label
            box = np.array(bbox) + (rng.normal(0, 0.1, 4) * [*bbox[2:], *bbox[2:]] if rng.random() < 0.8 else 0)
        width, height = box[2:].clip(0) * (rng.random(2) > 0.02)
        score = rng.random() if rng.random() < 0.5 else rng.choice([0.0, 0.1, 0.5, 1.0])
        entries.append((float(score), label, [box[0], box[1], box[0] + width, box[1] + height]))
    return found(*entries)


@pytest.mark.parametrize("seed", range(12))
def test_backends_give_the_same_numbers(seed: int) -> None:
    pytest.importorskip("faster_coco_eval")
    split, detections = random_case(seed)
    metrics = []
    for backend in ("pycocotools", "faster"):
        evaluator = CocoEvaluator(split, backend)
        evaluator.update(list(detections), list(detections.values()))
        metrics.append(evaluator.compute())
        if seed == 0:
            metrics[-1] |= {f"half of the images: {k}": v for k, v in evaluator.compute(list(detections)[::2]).items()}
    assert list(metrics[0]) == list(metrics[1])
    assert metrics[1] == pytest.approx(metrics[0], rel=0, abs=1e-12)


@pytest.mark.parametrize("backend", ["pycocotools", "faster"])
def test_backends_know_nothing_found_and_nothing_to_find(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    if backend == "faster":
        pytest.importorskip("faster_coco_eval")
    caplog.set_level("INFO", logger="crosskd_hf.training.coco_metrics")
    truth = CocoEvaluator(make_split({1: [(0, [10, 10, 30, 30])], 2: []}), backend)
    truth.update([1, 2], [found(), found()])
    metrics = truth.compute()
    assert (metrics["AP"], metrics["AP/cat"], metrics["AP/dog"], metrics["APl"]) == (0, 0, -1, -1)
    assert ("faster-coco-eval" if backend == "faster" else "pycocotools") in caplog.text
    empty = CocoEvaluator(make_split({1: [], 2: []}), backend)
    empty.update([1], [found((0.9, 0, BOX))])
    assert set(empty.compute().values()) == {-1.0}


def test_faster_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="crosskd_hf.training.coco_metrics")
    split = make_split({1: [(0, [10, 10, 30, 30])]})
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
    detections = {1: found((0.9, split.label_names.index("cat"), [4, 4, 24, 24]))}
    evaluator = CocoEvaluator(split)
    evaluator.update([1], [detections[1]])
    assert evaluator.compute()["AP"] == pytest.approx(1, abs=1e-12)
    # The reason to renumber: should this fail one day, pycocotools has been repaired.
    assert pycocotools_reference(root / "annotations" / "instances_mini.json", split, detections)["AP"] == 0


# --- values by hand -------------------------------------------------------------------------------------------------

BOX, FAR = [10, 10, 40, 40], [200, 200, 240, 240]  # xyxy; the ground truth below says the same as xywh


def test_values_by_hand() -> None:
    split = make_split({1: [(0, [10, 10, 30, 30]), (0, [200, 200, 40, 40])], 2: [(1, [10, 10, 100, 100])], 5: []})
    evaluator = CocoEvaluator(split)
    evaluator.update([1, 2], [found((0.9, 0, BOX)), found((0.8, 1, [10, 10, 110, 80]))])
    metrics = evaluator.compute()
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


@pytest.mark.parametrize("format_name", [None, "numpy", "torch"])
def test_area_is_the_column_in_full_precision(format_name: str | None) -> None:
    area = 32**2 + 1e-5  # just not small; as float32 it would be. The box says 900
    split = make_split({1: [(0, [10, 10, 30, 30], {"area": area})]})
    dataset = split.dataset.with_format(format_name)
    evaluator = CocoEvaluator(DetectionSplit(dataset, split.label_names, split.category_ids))
    evaluator.update([1], [found((0.9, 0, BOX))])
    metrics = evaluator.compute()
    assert metrics["APs"] == -1
    assert metrics["APm"] == pytest.approx(1)


def test_a_crowd_excuses_detections_and_asks_for_none() -> None:
    objects = [(0, [10, 10, 30, 30]), (0, [200, 200, 100, 100], {"iscrowd": True})]
    inside = [(0.95, 0, [200, 200, 220, 220]), (0.94, 0, [230, 230, 300, 300])]
    evaluator = CocoEvaluator(make_split({1: objects}))
    evaluator.update([1], [found(*inside, (0.9, 0, BOX))])
    assert evaluator.compute()["AP"] == pytest.approx(1)
    plain = CocoEvaluator(make_split({1: objects[:1]}))
    plain.update([1], [found(*inside, (0.9, 0, BOX))])
    assert plain.compute()["AP"] == pytest.approx(1 / 3)
    only_crowd = CocoEvaluator(make_split({1: objects[1:]}))
    only_crowd.update([1], [found(*inside)])
    assert set(only_crowd.compute().values()) == {-1.0}


def test_no_detections_and_no_ground_truth() -> None:
    evaluator = CocoEvaluator(make_split({1: [(0, [10, 10, 30, 30])], 2: []}))
    assert evaluator.compute()["AP"] == 0  # nothing was ever added
    evaluator.update([1, 2], [found(), {"scores": [], "labels": [], "boxes": []}])
    metrics = evaluator.compute()
    assert metrics["AP"] == metrics["AP/cat"] == metrics["AR100"] == 0
    assert metrics["AP/dog"] == metrics["APl"] == -1

    empty = CocoEvaluator(make_split({1: [], 2: []}))
    empty.update([1], [found((0.9, 0, BOX))])
    assert set(empty.compute().values()) == {-1.0}
    assert not any(math.isnan(value) for value in {**metrics, **empty.compute()}.values())


def test_an_image_without_prediction_counts_and_image_ids_restrict(caplog: pytest.LogCaptureFixture) -> None:
    evaluator = CocoEvaluator(make_split({1: [(0, [10, 10, 30, 30])], 2: [(0, [10, 10, 30, 30])], 3: []}))
    evaluator.update(torch.tensor([1, 3]), [found((0.9, 0, BOX)), found((0.95, 0, FAR))])
    assert evaluator.compute([1])["AP"] == pytest.approx(1)
    assert not caplog.records
    assert evaluator.compute([1, 3])["AP"] == pytest.approx(0.5)  # a false positive before the right one
    assert evaluator.compute([2])["AP"] == 0
    assert evaluator.compute()["AP"] == pytest.approx(0.5 * 51 / 101)
    assert "1 of 3 images have no prediction" in caplog.text
    with pytest.raises(ValueError, match="not in the split, such as id 77"):
        evaluator.compute([1, 77])
    with pytest.raises(ValueError, match="no image to evaluate"):
        evaluator.compute([])


def test_an_update_replaces_an_earlier_one_and_reset_forgets() -> None:
    evaluator = CocoEvaluator(make_split({1: [(0, [10, 10, 30, 30])]}))
    evaluator.update([1], [found((0.9, 0, FAR))])
    evaluator.update([1], [found((0.9, 0, BOX))])
    assert len(evaluator) == 1
    assert evaluator.compute()["AP"] == pytest.approx(1)
    evaluator.gather()  # does nothing in a single process
    assert evaluator.compute()["AP"] == pytest.approx(1)
    evaluator.reset()
    assert len(evaluator) == 0
    assert evaluator.compute()["AP"] == 0


def test_category_ids_in_any_order() -> None:
    split = make_split({1: [(0, [10, 10, 30, 30])]}, names=("zebra", "ant"), category_ids=(9, 2))
    evaluator = CocoEvaluator(split)
    evaluator.update([1], [found((0.9, 0, BOX))])
    metrics = evaluator.compute()
    assert (metrics["AP/zebra"], metrics["AP/ant"]) == (pytest.approx(1), -1)
    assert evaluator.results()[0]["category_id"] == 9


# --- what is read, kept and printed ---------------------------------------------------------------------------------


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    evaluator = CocoEvaluator(make_split({1: [(0, [10, 10, 30, 30])]}))
    evaluator.update([1], [found((0.9, 0, BOX))])
    evaluator.compute()
    assert capsys.readouterr() == ("", "")


def test_images_are_not_decoded_and_the_transform_is_not_run() -> None:
    split = make_split({1: [(0, [10, 10, 30, 30])], 2: []})

    def fail(batch: dict) -> dict:
        raise AssertionError("the transform of the data set was run")

    dataset = split.dataset.with_transform(fail).select([1, 0])
    with pytest.raises(FileNotFoundError):  # this is what decoding an image would do
        dataset[0]
    evaluator = CocoEvaluator(DetectionSplit(dataset, split.label_names, split.category_ids))
    evaluator.update([1, 2], [found((0.9, 0, BOX)), found()])
    assert evaluator.compute()["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.bfloat16, np.float32), (torch.float16, np.float32), (torch.float32, np.float32), (torch.float64, None)],
)
def test_kept_as_small_numpy_arrays_of_their_own(given: torch.dtype, kept: type | None) -> None:
    evaluator = CocoEvaluator(make_split({1: []}))
    detection = found((0.5, 1, BOX))
    detection = {key: value.to(given) if key != "labels" else value for key, value in detection.items()}
    detection["boxes"].requires_grad_()
    evaluator.update([1], [detection])
    (stored,) = evaluator._detections.values()
    assert stored.scores.dtype == stored.boxes.dtype == (kept or np.float64)
    assert stored.labels.dtype == np.int32
    assert all(array.base is None for array in stored)
    detection["scores"].zero_()
    assert evaluator.results()[0]["score"] == 0.5


def test_widths_of_float32_corners_are_not_rounded_to_float32() -> None:
    evaluator = CocoEvaluator(make_split({1: []}))
    detection = found((0.5, 1, [0.1, 0.1, 100.3, 70.7]))
    evaluator.update([1], [detection])
    x1, y1, x2, y2 = detection["boxes"][0].tolist()
    (annotation,) = evaluator._predictions({1}).anns.values()
    assert annotation["bbox"] == [x1, y1, x2 - x1, y2 - y1]
    assert annotation["area"] == (x2 - x1) * (y2 - y1)


def test_fast_for_many_images() -> None:
    images = {image_id: [(0, [10.0, 10.0, 30.0, 30.0])] * 7 for image_id in range(5000)}
    evaluator = CocoEvaluator(make_split(images))
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = evaluator._ground_truth(set(images))
    assert time.perf_counter() - start < 5  # 0.3 s on one core of 2020
    assert len(truth.anns) == 35000


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
        evaluator.update([2, 1], [found(), {**found((0.5, 0, BOX)), **change}])
    assert len(evaluator) == 0


def test_unsound_calls_and_splits_are_refused() -> None:
    evaluator = CocoEvaluator(make_split({1: []}))
    with pytest.raises(ValueError, match="image id 9 is not in the split"):
        evaluator.update([9], [found()])
    with pytest.raises(ValueError, match="2 image ids, but detections of 1"):
        evaluator.update([1, 1], [found()])
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
    evaluator = CocoEvaluator(make_split({5: [], 1: [(0, [10, 10, 30, 30])]}))
    evaluator.update([1, 5], [found((1 / 3, 1, [1.00049, 2, 4.5, 8.25])), found((0.25, 0, BOX))])
    assert evaluator.results() == [
        {"image_id": 5, "category_id": 3, "bbox": [10.0, 10.0, 30.0, 30.0], "score": 0.25},
        {"image_id": 1, "category_id": 7, "bbox": [1.0, 2.0, 3.5, 6.25], "score": 0.33333334},
    ]


def test_saved_files_load_in_pycocotools(write_coco: Callable[..., Path], tmp_path: Path) -> None:
    root = write_coco([(1, 64, 64)], [(4, 1, 7, [4, 4, 20, 20])])
    split = load_coco(root, "mini", cache_dir=tmp_path)
    evaluator = CocoEvaluator(split)
    evaluator.update([1], [found((0.9, split.label_names.index("cat"), [4, 4, 24, 24]))])
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


# --- several processes ----------------------------------------------------------------------------------------------

TRUTH = {image_id: [(image_id % 2, [10, 10, 30, 30]), (0, [100, 100, 50, 60])] for image_id in (11, 12, 13, 14, 15)}


def _detections_of(image_id: int) -> dict[str, torch.Tensor]:
    shift = image_id - 11
    return found((0.9 - 0.1 * shift, image_id % 2, [10 + shift, 10, 40 + shift, 40]), (0.6, 0, [100, 100, 150, 155]))


def _evaluate_in_a_process(rank: int, store: str, folder: str) -> None:
    # A file, not a port, brings the processes together: no port can be taken by another test in between.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        evaluator = CocoEvaluator(make_split(TRUTH))
        # Five images over two processes: 11 comes again to fill the last batch.
        for image_id in ((11, 13, 15), (12, 14, 11))[rank]:
            evaluator.update([image_id], [_detections_of(image_id)])
        for _ in range(2):  # a second time changes nothing
            evaluator.gather()
        Path(folder, f"{rank}.json").write_text(json.dumps([evaluator.compute(), evaluator.results()]))

        evaluator.reset()  # two different results of one image: the lowest rank's, everywhere
        evaluator.update([11], [found((0.5 if rank == 0 else 0.25, 0, BOX))])
        evaluator.gather()
        assert [entry["score"] for entry in evaluator.results()] == [0.5]
    finally:
        dist.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    single = CocoEvaluator(make_split(TRUTH))
    single.update(list(TRUTH), [_detections_of(image_id) for image_id in TRUTH])
    expected = [single.compute(), single.results()]
    assert 0.3 < expected[0]["AP"] < 1

    run_processes(_evaluate_in_a_process, (str(tmp_path / "store"), str(tmp_path)), 2)

    for rank in range(2):
        assert read(tmp_path / f"{rank}.json") == expected
