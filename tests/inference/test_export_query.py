"""Exported files of transformers' detectors give what PyTorch gives, for batches of any number of images."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from query_models import LABELS, QUERIES, query_model
from transformers import BaseImageProcessor, PreTrainedModel

from crosskd_hf.inference import export
from crosskd_hf.inference.export import QUERY_FAMILIES, SUFFIXES, ExportError, export_detector
from crosskd_hf.inference.export_check import check_export, compare, detections, detections_of_model, load_exported
from crosskd_hf.inference.export_graph import ExportableQueryDetector, portable, trace
from crosskd_hf.models.transformers_detectors import processor_of

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
HEIGHT, WIDTH = 64, 96


def model_and_processor(family: str, **options) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Of few decoder layers: exporters take their time for each."""
    model = query_model(family, decoder_layers=2, **options)
    processor = processor_of(model.config)
    processor.size = {"height": HEIGHT, "width": WIDTH}
    return model, processor


def images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, (50 + 9 * i, 120, 3), dtype=np.uint8) for i in range(count)]


def check_detections(model, processor, runner, count: int) -> None:
    inputs = processor(images(count), return_tensors="pt")
    outputs = runner(**inputs)
    assert [tuple(output.shape) for output in outputs] == [(count, QUERIES), (count, QUERIES), (count, QUERIES, 4)]
    assert [output.dtype for output in outputs] == [torch.float32, torch.int64, torch.float32]
    assert (outputs[0].diff(dim=1) <= 0).all() and set(outputs[1].unique().tolist()) <= set(LABELS)
    difference = compare(detections_of_model(portable(model), processor, inputs), detections(outputs))
    assert (difference.detections, difference.unmatched) == (count * QUERIES, 0), difference
    assert difference.box < 1e-3 and difference.score < 1e-5


@pytest.mark.parametrize("family", QUERY_FAMILIES)
def test_the_graph_gives_the_detections_of_pytorch(family: str) -> None:
    model, processor = model_and_processor(family)
    with torch.no_grad():
        for count in (1, 4):
            check_detections(model, processor, ExportableQueryDetector(portable(model)), count)


def test_boxes_are_corners_in_pixels_and_pairs_are_sorted() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> "Fixed":
            self.logits = torch.tensor([[[-1.0, 2.0], [1.0, -3.0]]])
            self.pred_boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.25, 0.5, 0.5, 0.5]]])
            return self

    scores, labels, boxes = ExportableQueryDetector(Fixed())(torch.zeros(1, 3, 64, 96))
    assert torch.allclose(scores, torch.tensor([[2.0, 1.0]]).sigmoid()) and labels.tolist() == [[1, 0]]
    assert boxes.tolist() == [[[24.0, 16.0, 72.0, 48.0], [0.0, 16.0, 48.0, 48.0]]]


@pytest.mark.slow
@pytest.mark.parametrize("family", QUERY_FAMILIES)
def test_files_give_the_detections_of_pytorch(monkeypatch, tmp_path: Path, family: str) -> None:
    """One test of all that a file must do, since tracing is what takes time. Anchors of another size are no trap."""
    model, processor = model_and_processor(family, anchor_image_size=[128, 128])
    program = trace(model, processor, True)
    monkeypatch.setattr(export, "trace", lambda *options: program)  # both formats write the same one
    for format, suffix in SUFFIXES.items():
        if format == "onnx" and not HAS_ONNX:
            continue
        path = tmp_path / f"model{suffix}"
        difference = export_detector(model, processor, path, format=format, check=True)
        assert difference.detections == 4 * QUERIES
        runner = load_exported(path, format)
        for count in (1, 4):
            check_detections(model, processor, runner, count)
        with pytest.raises(Exception, match=r"(?i)invalid dimensions|guard failed|to be equal to 64"):
            runner(torch.zeros(1, 3, 96, 96))
        if format == "onnx":
            check_session(path, model.config.model_type)
    assert model.training and model.config.anchor_image_size == [128, 128]


def check_session(path: Path, family: str) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    assert [(node.name, node.shape, node.type) for node in session.get_inputs()] == [
        ("pixel_values", ["batch", 3, HEIGHT, WIDTH], "tensor(float)")
    ]
    assert [node.name for node in session.get_outputs()] == ["scores", "labels", "boxes"]
    said = session.get_modelmeta().custom_metadata_map
    assert (said["model_type"], said["height"], said["width"], said["channel_order"]) == (family, "64", "96", "RGB")
    assert json.loads(said["id2label"]) == {str(label): name for label, name in LABELS.items()}
    assert json.loads(said["image_mean"]) == [0, 0, 0] and json.loads(said["image_std"]) == [255, 255, 255]


def test_a_check_finds_another_model(monkeypatch) -> None:
    model, processor = model_and_processor("rt_detr")
    other = ExportableQueryDetector(portable(query_model("rt_detr", seed=1, decoder_layers=2)))
    monkeypatch.setattr("crosskd_hf.inference.export_check.load_exported", lambda *options: other)
    with torch.no_grad():
        assert check_export(model, processor, "m.onnx").unmatched > QUERIES


def test_rounding_decides_what_is_cut_off() -> None:
    """The lowest scores are 0.30 and 0.31: from 0.32 on, a detection that only one of both has counts."""

    def detected(*scores: float) -> dict[str, torch.Tensor]:
        values = torch.tensor(scores)
        return {
            "scores": values,
            "labels": torch.zeros(len(scores)).long(),
            "boxes": values[:, None].mul(1000).expand(-1, 4),
        }

    one, other = detected(0.9, 0.5, 0.3), detected(0.9, 0.5, 0.31)
    assert compare([one], [other]).unmatched == 2 and compare([one], [other], cut=True).unmatched == 0
    assert compare([detected(0.9, 0.31)], [detected(0.9, 0.33, 0.31)], cut=True).unmatched == 1
    assert compare([detected(0.9, 0.31)], [detected(0.9, 0.315, 0.31)], cut=True).unmatched == 0


@pytest.mark.parametrize("family", ["deimv2", "deformable_detr", "lw_detr", "rf_detr"])
def test_other_families_are_refused_by_name(tmp_path: Path, family: str) -> None:
    model = query_model(family)
    with pytest.raises(ExportError, match=rf"family {family} can't.*rt_detr, rt_detr_v2, d_fine"):
        export_detector(model, processor_of(model.config), tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "size, options, arguments, message",
    [
        ({"height": 100, "width": 96}, {}, {}, "resizes to 100 x 96; a d_fine needs multiples of 32"),
        ({"shortest_edge": 64, "longest_edge": 96}, {}, {}, "one height and width without padding.*shortest_edge"),
        ({"height": 64, "width": 96}, {"do_pad": True}, {}, "without padding"),
        ({"height": 64, "width": 96}, {"do_resize": False}, {}, "must resize every image"),
        ({"height": 64, "width": 96}, {}, {"nms": False}, "without --no-nms"),
    ],
)
def test_what_no_file_can_be_made_of(tmp_path: Path, size: dict, options: dict, arguments: dict, message: str) -> None:
    model, processor = model_and_processor("d_fine")
    processor = type(processor)(size=size, **options)
    with pytest.raises(ExportError, match=message):
        export_detector(model, processor, tmp_path / "m.pt2", format="torch", **arguments)
