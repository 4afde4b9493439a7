"""Files for annotation tools: by hand, and read again by the package's own readers."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from crosskd_hf.data.errors import Problems
from crosskd_hf.data.voc import objects_of, parse_xml
from crosskd_hf.data.yolo import parse
from crosskd_hf.inference.image_files import PredictionError
from crosskd_hf.inference.label_files import LabelFiles, check_label_names
from crosskd_hf.inference.prediction_writer import Prediction

LABELS = {0: "cat", 1: "big, dog"}
PREDICTION = Prediction(
    Path("a.png"),
    Image.new("RGB", (80, 40)),
    torch.tensor([0.9, 0.5, 0.3]),
    torch.tensor([1, 0, 0]),
    torch.tensor([[10.0, 2.0, 30.0, 22.0], [0.0, 0.0, 80.0, 40.0], [1.0, 1.0, 2.0, 2.0]]),
)


def write(folder: Path, format: str) -> None:
    files = LabelFiles(folder, format, LABELS, threshold=0.3)  # 0.3 isn't above 0.3
    files.start()
    files.write(PREDICTION, "in/a.png")


def test_yolo(tmp_path: Path) -> None:
    write(tmp_path, "yolo")
    text = (tmp_path / "labels" / "in" / "a.txt").read_bytes()
    assert text == b"1 0.250000 0.300000 0.250000 0.500000\n0 0.500000 0.500000 1.000000 1.000000\n"
    assert (tmp_path / "labels" / "classes.txt").read_text() == "cat\nbig, dog\n"
    assert [o.bbox for o in parse(text, 2, "", 0, Problems())] == [[0.25, 0.3, 0.25, 0.5], [0.5, 0.5, 1.0, 1.0]]


def test_voc(tmp_path: Path) -> None:
    write(tmp_path, "voc")
    tree = parse_xml((tmp_path / "labels" / "in" / "a.xml").read_bytes(), "a.xml")
    assert tree.findtext("size/width") == "80" and tree.findtext("object/bndbox/xmin") == "11.000"
    objects = objects_of(tree, list(LABELS.values()), 1, "", 0, Problems())
    assert [(o.category, o.bbox) for o in objects] == [(1, [10, 2, 30, 22]), (0, [0, 0, 80, 40])]


def test_csv(tmp_path: Path) -> None:
    write(tmp_path, "csv")
    assert (tmp_path / "predictions.csv").read_text() == (
        'file_name,category,score,xmin,ymin,xmax,ymax\nin/a.png,"big, dog",0.9,10.0,2.0,30.0,22.0\n'
        "in/a.png,cat,0.5,0.0,0.0,80.0,40.0\n"
    )


@pytest.mark.parametrize(("format", "place"), [("yolo", "labels"), ("csv", "predictions.csv")])
def test_files_of_others_are_not_written_over(tmp_path: Path, format: str, place: str) -> None:
    (tmp_path / place).mkdir()
    files = LabelFiles(tmp_path, format, LABELS, 0.3)
    with pytest.raises(PredictionError, match=f"{place} isn't of an earlier call"):
        files.check(earlier=False)
    files.check(earlier=True)


def test_images_that_would_share_a_label_file() -> None:
    check_label_names(["a.png", "b/a.png"], "yolo")
    check_label_names(["a.png", "a.jpg"], "csv")
    with pytest.raises(PredictionError, match=r"two images share the label file a\.xml"):
        check_label_names(["a.png", "a.jpg"], "voc")
