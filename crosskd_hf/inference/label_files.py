"""Predictions as annotation tools read them: YOLO's label files, Pascal VOC's XML files, or a CSV table."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from ..utils.escaping import printable
from ..utils.files import write_atomically
from .image_files import PredictionError

if TYPE_CHECKING:
    from .prediction_writer import Prediction

CSV_FILE, LABELS_FOLDER, CLASSES_FILE = "predictions.csv", "labels", "classes.txt"
CSV_COLUMNS = ("file_name", "category", "score", "xmin", "ymin", "xmax", "ymax")


@dataclass
class LabelFiles:
    """Writes the boxes with a score above a threshold beside `predictions.json`.

    Attributes:
        output: folder: of `predictions.csv`; or of `labels`, with a file per image, and for YOLO `classes.txt`.
        format: yolo, voc or csv.
        id2label: names of the model's labels.
        threshold: of the scores.
    """

    output: Path
    format: str
    id2label: Mapping[int, str]
    threshold: float

    def check(self, earlier: bool) -> None:
        """Raise PredictionError if something else is there, which isn't of an `earlier` call."""
        place = self.output / (CSV_FILE if self.format == "csv" else LABELS_FOLDER)
        if place.exists() and not earlier:
            raise PredictionError(f"{place} isn't of an earlier call: name another folder with --output-dir.")

    def start(self) -> None:
        """Write what all images share."""
        if self.format == "csv":
            (self.output / CSV_FILE).write_text(",".join(CSV_COLUMNS) + "\n", encoding="utf-8")
        elif self.format == "yolo":
            names = [printable(self.id2label[label]) for label in sorted(self.id2label)]
            (self.output / LABELS_FOLDER).mkdir(parents=True, exist_ok=True)
            write_atomically(self.output / LABELS_FOLDER / CLASSES_FILE, "\n".join(names) + "\n")

    def write(self, prediction: "Prediction", name: str) -> None:
        """Write the boxes of an image, which is called `name`."""
        keep = prediction.scores > self.threshold
        columns = prediction.labels[keep], prediction.scores[keep], prediction.boxes[keep].double()
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        if self.format == "csv":
            with open(self.output / CSV_FILE, "a", encoding="utf-8", newline="") as file:
                file.write(self._csv(rows, name))
            return
        text = self._yolo(rows, prediction) if self.format == "yolo" else self._voc(rows, prediction, name)
        path = self.output / LABELS_FOLDER / label_name(name, self.format)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)

    def _csv(self, rows: list, name: str) -> str:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        for label, score, box in rows:
            table.writerow([name, self.id2label[label], round(score, 6), *(round(value, 3) for value in box)])
        return text.getvalue()

    def _yolo(self, rows: list, prediction: "Prediction") -> str:
        """`class cx cy w h` in parts of the image."""
        width, height = prediction.image.size
        lines = []
        for label, _, (x1, y1, x2, y2) in rows:
            values = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
            lines.append(f"{label} " + " ".join(f"{value:.6f}" for value in values) + "\n")
        return "".join(lines)

    def _voc(self, rows: list, prediction: "Prediction", name: str) -> str:
        """The first pixel is number 1."""
        tree = ElementTree.Element("annotation")
        ElementTree.SubElement(tree, "filename").text = name
        size = ElementTree.SubElement(tree, "size")
        for side, value in zip(("width", "height", "depth"), (*prediction.image.size, 3), strict=True):
            ElementTree.SubElement(size, side).text = str(value)
        for label, _, (x1, y1, x2, y2) in rows:
            element = ElementTree.SubElement(tree, "object")
            ElementTree.SubElement(element, "name").text = printable(self.id2label[label])
            ElementTree.SubElement(element, "difficult").text = "0"
            box = ElementTree.SubElement(element, "bndbox")
            for side, value in zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2), strict=True):
                ElementTree.SubElement(box, side).text = f"{value:.3f}"
        ElementTree.indent(tree)
        return ElementTree.tostring(tree, encoding="unicode") + "\n"


def label_name(name: str, format: str) -> str:
    """The label file of an image: its own name with another ending."""
    return str(PurePosixPath(name).with_suffix(".txt" if format == "yolo" else ".xml"))


def check_label_names(names: Sequence[str], format: str) -> None:
    """Raise PredictionError if two images have one label file."""
    if format in ("yolo", "voc"):
        twice = [name for name, count in Counter(label_name(n, format) for n in names).items() if count > 1]
        if twice:
            raise PredictionError(
                f"two images share the label file {twice[0]}: predict them one after the other, or with --format csv"
            )
