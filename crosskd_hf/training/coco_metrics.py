"""COCO detection metrics: fed image by image, merged over processes once, computed by pycocotools or faster-coco-eval.

Used like this:

    evaluator = CocoEvaluator(split)
    for batch in loader:
        evaluator.update(image_ids, detections)   # scores, labels, boxes in original pixels; never logits
    evaluator.gather()                            # every process, once
    metrics = evaluator.compute()                 # {"AP": 0.402, ..., "AP/zebra": 0.671}
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ..data.split import DetectionSplit
from ..utils.distributed import num_processes
from ..utils.files import write_atomically

if TYPE_CHECKING:
    from pycocotools.coco import COCO

logger = logging.getLogger(__name__)

# In the order of COCOeval.stats. ARn: at most n detections an image and class; s, m, l: area up to 32^2, between, from
# 96^2 pixels.
SUMMARY_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

SETTINGS = "evaluation"  # key of a metrics file: of which images, and how


class ImageDetections(NamedTuple):
    """What is kept of one image: K detections, at most a few kilobytes.

    Attributes:
        scores: (K,) float32, or float64 if it was given so.
        labels: (K,) int32, 0..C-1.
        boxes: (K, 4) xyxy in pixels of the original image, float32 or float64.
    """

    scores: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


class ClassResult(NamedTuple):
    """COCO's numbers of a class, 0..1, or -1 where no box is of it.

    Attributes:
        name: of the class.
        boxes: of the ground truth, without crowds.
        ap, ap50: average precision, at IoU 0.50:0.95 and 0.50.
        recall: at 100 detections an image, the mean of IoU 0.50:0.95.
        precision: (101,), at IoU 0.50 and recall 0, 0.01, ..., 1.
    """

    name: str
    boxes: int
    ap: float
    ap50: float
    recall: float
    precision: np.ndarray


def _mean(values: np.ndarray) -> float:
    """Of what isn't -1, "no ground truth"; -1 if all is."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _coco_classes(backend: str) -> tuple[str, type, type]:
    """Name of the package, and its versions of COCO's two classes: annotations and evaluation.

    Imported when asked for, since one of the two packages isn't always there. See `CocoEvaluator` for the backends.
    """
    if backend not in ("auto", "pycocotools", "faster"):
        raise ValueError(f"unknown backend {backend!r}; it must be one of auto, pycocotools, faster")
    if backend == "pycocotools" or (backend == "auto" and not importlib.util.find_spec("faster_coco_eval")):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return "pycocotools", COCO, COCOeval
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ImportError(
            'the backend "faster" needs faster-coco-eval: pip install faster-coco-eval, or, in a clone of the '
            'repository, pip install -e ".[fast]"'
        ) from error
    return "faster-coco-eval", COCO, COCOeval_faster


class CocoEvaluator:
    """Collects the detections of a split and computes COCO's box metrics.

    The metrics are bit for bit those of pycocotools' COCOeval (Lin et al., "Microsoft COCO", 2014, and its evaluation
    server) on the annotation file, with one exception: an annotation with id 0 is matched like any other here, whereas
    COCOeval takes a match with id 0 for no match. COCO's own files have no such id. faster-coco-eval gives the same
    numbers in a fraction of the time, up to the last bit: a precision of 1 / 1 is 1 there, 1 - 2^-52 in pycocotools.

    Args:
        split: the images and ground truth to compare with; no image is decoded.
        backend: what computes the metrics: "pycocotools", "faster" (faster-coco-eval, the extra `fast`), or "auto",
            which is "faster" where that is installed.

    Attributes:
        backend: name of the package that computes the metrics.

    Raises:
        ValueError: the split lists an image id or a category id twice, or there is no such backend.
        ImportError: the backend isn't installed.
    """

    def __init__(self, split: DetectionSplit, backend: str = "auto") -> None:
        self.backend, self._annotations_class, self._evaluation_class = _coco_classes(backend)
        self._split = split
        self._category_ids = [int(category_id) for category_id in split.category_ids]
        self._image_ids: list[int] = _column(split, "image_id")
        self._known_ids = set(self._image_ids)
        self._detections: dict[int, ImageDetections] = {}
        for what, ids in (("image", self._image_ids), ("category", self._category_ids)):
            if len(set(ids)) != len(ids):
                raise ValueError(f"the split lists {len(ids)} {what} ids, but only {len(set(ids))} different ones")

    def update(self, image_ids: Sequence[int], detections: Sequence[Mapping[str, Any]]) -> None:
        """Add the detections of some images. Those of an image seen before are replaced.

        Args:
            image_ids: N ids of images of the split.
            detections: N dicts of `scores` (K,), `labels` (K,) integers 0..C-1 and `boxes` (K, 4) xyxy in pixels of
                the original image, as tensors on any device (or what `torch.as_tensor` takes). K may be 0, and differ.

        Raises:
            ValueError: the lengths differ, an image is not in the split, or an image's detections have a wrong shape,
                a label outside 0..C-1, a score or box that is not finite, or a box with x2 < x1 or y2 < y1. The
                message names the image id. Nothing of this call is kept then.
            KeyError: a dict has no `scores`, `labels` or `boxes`.
        """
        if len(image_ids) != len(detections):
            raise ValueError(f"{len(image_ids)} image ids, but detections of {len(detections)} images")
        checked = {}
        for image_id, detection in zip(map(int, image_ids), detections, strict=True):
            if image_id not in self._known_ids:
                raise ValueError(f"image id {image_id} is not in the split")
            checked[image_id] = _check(image_id, detection, num_labels=len(self._category_ids))
        self._detections.update(checked)

    def detections_of(self, image_id: int) -> ImageDetections:
        """The detections of an image, best first as they were given; none if there was no update for it."""
        empty = ImageDetections(np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros((0, 4), np.float32))
        return self._detections.get(image_id, empty)

    def gather(self) -> None:
        """Give every process the detections of all processes; without torch.distributed, do nothing.

        A collective call: all processes must make it, also those without detections. Results are merged by image id,
        so the images that a distributed sampler repeats to fill the last batch count once; of two different results
        for one image, the lowest rank's is kept, on every rank. Calling it twice changes nothing.
        """
        if num_processes() == 1:
            return
        parts: list[Any] = [None] * num_processes()
        dist.all_gather_object(parts, self._detections)
        # From the last rank to the first: what is written last stays.
        self._detections = {image_id: kept for part in reversed(parts) for image_id, kept in part.items()}

    def compute(self) -> dict[str, float]:
        """COCO's box metrics of the detections held by this process: call `gather` first.

        An image without detections counts as one where nothing was found.

        After `gather` every process would compute the same, so that one is enough: pycocotools takes up to a minute
        and 3 GB for 5000 images with 100 detections each. Which backend it is goes to the log.

        Returns:
            the 12 numbers of COCO under `SUMMARY_NAMES`, then `AP/<class name>` of every class, all in 0..1. A number
            that no ground truth speaks for (a class or a size that these images don't show; crowds don't count) is
            -1.0, as in pycocotools, and is left out of the means. There are no NaNs.

        Raises:
            ValueError: there is no image to evaluate on.
        """
        evaluation = self._accumulated()
        metrics = dict(zip(SUMMARY_NAMES, map(float, evaluation.stats), strict=True))
        # (IoU thresholds, recall thresholds, classes by increasing category id, area ranges, detection limits):
        # all areas come first, 100 detections last.
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        for name, row in self._class_rows():
            metrics[f"AP/{name}"] = _mean(precision[:, :, row])
        return metrics

    def class_results(self) -> list[ClassResult]:
        """What `compute` has of each class, in more detail and in the order of the labels.

        Raises:
            ValueError: there is no image to evaluate on.
        """
        evaluation = self._accumulated()
        precision, recall = evaluation.eval["precision"][:, :, :, 0, -1], evaluation.eval["recall"][:, :, 0, -1]
        counts = [0] * len(self._category_ids)
        for objects in _column(self._split, "objects"):
            for label, crowd in zip(objects["category"], objects["iscrowd"], strict=True):
                counts[label] += not crowd
        return [
            ClassResult(
                name,
                counts[label],
                _mean(precision[:, :, row]),
                _mean(precision[0, :, row]),
                _mean(recall[:, row]),
                precision[0, :, row],
            )
            for label, (name, row) in enumerate(self._class_rows())
        ]

    def _class_rows(self) -> Iterator[tuple[str, int]]:
        """Name of each label, and its row in COCO's tables, which are in the order of the category ids."""
        rows = {category_id: row for row, category_id in enumerate(sorted(self._category_ids))}
        for name, category_id in zip(self._split.label_names, self._category_ids, strict=True):
            yield name, rows[category_id]

    def _accumulated(self) -> Any:
        """COCO's evaluation, done."""
        if not self._image_ids:
            raise ValueError("there is no image to evaluate on")
        unseen = len(self._known_ids - self._detections.keys())
        if unseen:
            logger.warning("%d of %d images have no prediction and count as empty", unseen, len(self._image_ids))
        logger.info("COCO metrics of %d images by %s", len(self._image_ids), self.backend)
        # pycocotools prints its progress and a table.
        with contextlib.redirect_stdout(io.StringIO()), _without_garbage_collection():
            evaluation = self._evaluation_class(self._ground_truth(), self._predictions(), iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def results(self) -> list[dict[str, Any]]:
        """The detections in COCO's result format, image after image in the order of the split.

        Returns:
            dicts of `image_id`, `category_id` (of the annotation file), `bbox` ([x, y, w, h], original pixels, 3
            decimals) and `score` (8 decimals: float32 scores from 0.125 up keep their order). `compute` uses the
            unrounded values, so that pycocotools on these may differ from it in the last digits.
        """
        return [
            {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [round(value, 3) for value in bbox],
                "score": round(score, 8),
            }
            for image_id in self._image_ids
            for category_id, bbox, score in self._rows(image_id)
        ]

    def save(
        self,
        folder: str | os.PathLike[str],
        metrics: Mapping[str, float],
        prefix: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `<prefix>predictions.json` (see `results`) and `<prefix>metrics.json`; one process is to call it.

        Each file appears complete or not at all: an earlier one stays until its successor is on disk.

        Args:
            folder: created if it does not exist.
            metrics: what `compute` returned.
            prefix: put before both file names, such as "val2017_".
            settings: of which images, and how; they stand under `SETTINGS` in the metrics file.

        Raises:
            OSError: a file or the folder could not be written; the message names it.
            ValueError: a metric is not finite, which JSON has no word for. Nothing is written then.
        """
        values: dict[str, Any] = {name: float(value) for name, value in metrics.items()}
        if settings is not None:
            values[SETTINGS] = dict(settings)
        metrics_text = json.dumps(values, indent=2, allow_nan=False) + "\n"
        for name, text in (("predictions", json.dumps(self.results())), ("metrics", metrics_text)):
            path = Path(folder, f"{prefix}{name}.json")
            try:
                write_atomically(path, text)
            except OSError as error:
                message = f"could not write evaluation results: {error.strerror}"
                raise OSError(error.errno, message, str(path)) from error

    def _ground_truth(self) -> COCO:
        annotations = []
        for image_id, objects in zip(self._image_ids, _column(self._split, "objects"), strict=True):
            columns = (objects[key] for key in ("category", "bbox", "area", "iscrowd"))
            for label, bbox, area, iscrowd in zip(*columns, strict=True):
                category_id = self._category_ids[label]
                annotations.append(_annotation(image_id, category_id, bbox, area=area, iscrowd=int(iscrowd)))
        return self._coco(annotations)

    def _predictions(self) -> COCO:
        # COCO.loadRes makes the same entries, but fails on an empty list and adds a polygon to each.
        annotations = [
            _annotation(image_id, category_id, bbox, area=bbox[2] * bbox[3], iscrowd=0, score=score)
            for image_id in self._image_ids
            for category_id, bbox, score in self._rows(image_id)
        ]
        return self._coco(annotations)

    def _coco(self, annotations: list[dict[str, Any]]) -> COCO:
        for number, annotation in enumerate(annotations, start=1):
            # Not the file's id: COCOeval marks "unmatched" with 0, and merges annotations of one id.
            annotation["id"] = number
        coco = self._annotations_class()
        coco.dataset = {
            "images": [{"id": image_id} for image_id in self._image_ids],
            "categories": [{"id": category_id} for category_id in self._category_ids],
            "annotations": annotations,
        }
        coco.createIndex()
        return coco

    def _rows(self, image_id: int) -> Iterable[tuple[int, list[float], float]]:
        """COCO category id, [x, y, w, h] and score of each detection on an image, as Python numbers."""
        scores, labels, boxes = self.detections_of(image_id)
        corners = boxes.astype(np.float64)  # before subtracting: the width of float32 corners is then exact
        boxes_xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        category_ids = [self._category_ids[label] for label in labels]
        return zip(category_ids, boxes_xywh.tolist(), scores.tolist(), strict=True)


def _annotation(image_id: int, category_id: int, bbox: list[float], **more: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Python would search a million new dictionaries for cycles again and again (a third of the time); none exist."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _column(split: DetectionSplit, name: str) -> list[Any]:
    # As Arrow: other formats would decode images, apply a transform of the data set or round areas to float32.
    table = split.dataset.with_format("arrow", columns=[name])[:]
    return table[name].to_pylist()


def _check(image_id: int, detection: Mapping[str, Any], num_labels: int) -> ImageDetections:
    scores, labels, boxes = (torch.as_tensor(detection[key]).detach().cpu() for key in ("scores", "labels", "boxes"))
    if not boxes.numel():
        boxes = boxes.reshape(0, 4)  # an empty list has no second dimension
    shapes = tuple(scores.shape), tuple(labels.shape), tuple(boxes.shape)
    where = f"detections of image id {image_id}"
    if shapes != ((len(boxes),), (len(boxes),), (len(boxes), 4)):
        raise ValueError(f"{where}: scores, labels, boxes must be (K,), (K,), (K, 4), got {shapes}")
    if labels.numel() and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise ValueError(f"{where}: labels must be integers, got {labels.dtype}")
    if not (torch.isfinite(scores).all() and torch.isfinite(boxes).all()):
        raise ValueError(f"{where}: a score or a box is not finite")
    if ((labels < 0) | (labels >= num_labels)).any():
        raise ValueError(f"{where}: labels must be in 0..{num_labels - 1}, got {labels.min()}..{labels.max()}")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError(f"{where}: a box has x2 < x1 or y2 < y1; boxes must be xyxy")
    return ImageDetections(_floats(scores), labels.numpy().astype(np.int32), _floats(boxes))


def _floats(values: torch.Tensor) -> np.ndarray:
    # numpy knows no bfloat16. The copy: a view would keep the large batch alive that the tensor may be a part of.
    return (values if values.dtype == torch.float64 else values.float()).numpy().copy()
