"""Exported files give what PyTorch gives: detectors, two formats, with and without suppression, other sizes."""

import argparse
import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import files_of_at_most, tiny_batch, tiny_model
from torchvision.ops import batched_nms

from crosskd_hf.commands import export as command
from crosskd_hf.inference import export
from crosskd_hf.inference.export import ExportError, export_detector
from crosskd_hf.inference.export_check import Difference, compare, detections, load_exported
from crosskd_hf.inference.export_graph import ExportableDetector, batched_nms_mask, trace, with_static_padding
from crosskd_hf.models import MODELS, DenseDetector
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor

try:
    import onnx  # noqa: F401
    import onnxruntime
    import onnxscript  # noqa: F401
except ImportError:
    HAS_ONNX = False  # the tests of programs run all the same
else:
    HAS_ONNX = True

DETECTORS = tuple(MODELS)
# Writing a file takes long. That the graph is right is checked for all of them without one.
CASES = [("gfl", True), *(pytest.param(name, name != "fcos", marks=pytest.mark.slow) for name in DETECTORS[1:])]
# One image alone, three in a batch that pads each of them, and one whose deepest map is a single cell. They are padded
# little: where all cells see nothing but padding, scores are equal, and which of them are kept is chance.
BATCHES = ([(70, 100)], [(128, 100), (110, 128), (101, 110)], [(8, 8)])


def small_model(detector: str = "gfl") -> DenseDetector:
    """Few blocks and levels: exporters take their time for each."""
    options = {"regress_ranges": [[-1.0, 64.0], [64.0, 128.0], [128.0, 1e8]]} if detector == "fcos" else {}
    return tiny_model(detector, backbone="resnet10t", head_blocks=1, strides=[8, 16, 32], frozen_stages=0, **options)


def processor_of(model: DenseDetector, **options) -> DenseDetectorImageProcessor:
    """Images at their own size, up to 128 x 192 pixels."""
    processor = DenseDetectorImageProcessor.for_model(model.config, 128, 192)
    processor.do_resize = False
    for name, value in options.items():
        setattr(processor, name, value)
    return processor


def noise(sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


@pytest.mark.parametrize("detector, nms", CASES)
def test_files_give_the_detections_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, detector: str, nms: bool
) -> None:
    """One test of all that a file must do, since writing it is what takes time."""
    model = small_model(detector)
    processor = processor_of(model, max_candidates=300)
    program = trace(model, processor, nms)
    monkeypatch.setattr(export, "trace", lambda *options: program)  # both formats write the same one

    for format, suffix in export.SUFFIXES.items():
        if format == "onnx" and not HAS_ONNX:
            continue
        path = tmp_path / f"model{suffix}"
        difference = export_detector(model, processor, path, format=format, nms=nms, check=nms)
        assert difference is None or difference.detections > 0
        runner = load_exported(path, format)
        for sizes in BATCHES:
            check_detections(model.eval(), processor, nms, runner, sizes)
        check_no_detections(runner)
        check_metadata(path, format, model, nms)
        if format == "onnx":
            check_session(path, processor)


def check_detections(model, processor, nms: bool, runner, sizes: list[tuple[int, int]]) -> None:
    inputs = processor(noise(sizes), return_tensors="pt")
    with torch.no_grad():
        expected = processor.post_process_object_detection(model(**inputs), 0.0, sizes)
    outputs = runner(**inputs)
    assert outputs[0].shape == (len(sizes), processor.max_detections if nms else 3 * processor.max_candidates)
    found = detections(outputs, None if nms else processor)
    difference = compare(expected, found)
    assert difference.detections > 0 and difference.unmatched == 0, difference
    assert difference.box < 1e-3 and difference.score < 1e-5


def check_no_detections(runner) -> None:
    # An image of no size: every box is cut to nothing.
    scores, labels, boxes = runner(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    assert (scores == 0).all() and (labels == -1).all() and (boxes == 0).all()
    assert detections([scores, labels, boxes])[0]["boxes"].shape == (0, 4)


def check_metadata(path: Path, format: str, model: DenseDetector, nms: bool) -> None:
    if format == "torch":
        extra = {export.METADATA_FILE: ""}
        torch.export.load(path, extra_files=extra)
        said = json.loads(extra[export.METADATA_FILE])
    else:
        said = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert said["model_type"] == model.config.model_type and said["channel_order"] == "RGB"
    assert json.loads(said["id2label"]) == {"0": "cat", "1": "dog"}
    assert (said["size_divisor"], said["short_side"], said["long_side"]) == ("32", "128", "192")
    assert (said["score_threshold"], said["max_candidates"], said["max_detections"]) == ("0.05", "300", "100")
    assert json.loads(said["nms_threshold"]) == model.config.nms_threshold and json.loads(said["nms"]) is nms
    assert len(json.loads(said["image_mean"])) == len(json.loads(said["image_std"])) == 3


def check_session(path: Path, processor: DenseDetectorImageProcessor) -> None:
    """onnxruntime takes what the processor gives."""
    session = onnxruntime.InferenceSession(path)
    assert [(node.name, node.shape, node.type) for node in session.get_inputs()] == [
        ("pixel_values", ["batch", 3, "height", "width"], "tensor(float)"),
        ("pixel_mask", ["batch", "height", "width"], "tensor(bool)"),
    ]
    scores, labels, boxes = session.run(None, dict(processor(noise([(70, 100), (64, 80)]), return_tensors="np")))
    assert scores.shape == labels.shape == boxes.shape[:2] and boxes.shape[2] == 4
    assert (scores.dtype, labels.dtype, boxes.dtype) == (np.float32, np.int64, np.float32)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert ((labels == -1) == (scores == 0)).all() and (boxes[scores == 0] == 0).all()
    assert boxes[1].max() <= 80 and boxes[1, :, 3].max() <= 64  # its own area, not the batch's


@pytest.mark.parametrize(("detector", "nms"), [*((name, True) for name in DETECTORS), ("atss", False)])
def test_the_graph_gives_the_detections_of_pytorch(detector: str, nms: bool) -> None:
    model = small_model(detector).eval()
    processor = processor_of(model, max_candidates=300)
    with torch.no_grad():
        for sizes in BATCHES:
            check_detections(model, processor, nms, ExportableDetector(model, processor, nms), sizes)


@pytest.mark.slow
def test_swin_can_be_traced_for_any_size() -> None:
    """With a block in each of its stages: all of them take minutes. Windows of 7 fit none of these maps."""
    model = tiny_model("retinanet", backbone="swin_tiny_patch4_window7_224", head_blocks=1, frozen_stages=0).eval()
    for name, stage in model.backbone.body.named_children():
        if name.startswith("layers"):
            stage.blocks = stage.blocks[-1:]  # the shifted ones
    processor = processor_of(model)
    module = trace(model, processor, True).module()
    for sizes in BATCHES:
        check_detections(model, processor, True, module, sizes)


def test_detections_are_padded_where_there_are_fewer_candidates() -> None:
    model = small_model().eval()
    processor = processor_of(model, max_candidates=5, max_detections=40)
    with torch.no_grad():
        check_detections(model, processor, True, ExportableDetector(model, processor, nms=True), [(64, 64)])


def test_suppression_is_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 60, 2, generator=generator) * 20
    boxes = torch.cat([corners, corners + 5 + 20 * torch.rand(2, 60, 2, generator=generator)], dim=-1)
    scores = torch.rand(2, 60, generator=generator)
    scores[:, ::7] = 0
    labels = torch.randint(0, 3, (2, 60), generator=generator)
    keep = batched_nms_mask(boxes, scores, labels, 0.5, 3)
    for i in range(2):
        real = scores[i].nonzero().squeeze(1)
        expected = real[batched_nms(boxes[i, real], scores[i, real], labels[i, real], 0.5)]
        assert keep[i].nonzero().squeeze(1).tolist() == sorted(expected.tolist())
    torch.library.opcheck(batched_nms_mask, (boxes, scores, labels, 0.5, 3))


def test_comparison_counts_what_has_no_partner() -> None:
    def image(scores: list[float], left: list[float]) -> dict[str, torch.Tensor]:
        boxes = torch.tensor([[x, 0.0, x + 10, 10.0] for x in left]).reshape(-1, 4)
        return {"scores": torch.tensor(scores), "labels": torch.zeros(len(scores), dtype=torch.int64), "boxes": boxes}

    one, other = image([0.9, 0.8, 0.7], [0, 50, 90]), image([0.8, 0.9001, 0.3], [50.25, 0, 20])
    difference = compare([one, image([], [])], [other, image([], [])])
    assert (difference.detections, difference.unmatched, difference.box) == (3, 2, 0.25)
    assert difference.score == pytest.approx(1e-4, rel=1e-2)
    assert "no detections" in str(compare([image([], [])], [image([], [])]))


def pretend(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    """Exporters that write "whole", or write "half" and fail."""

    def save(program, path, *options):
        path.write_bytes(b"half" if error else b"whole")
        if error:
            raise error

    monkeypatch.setattr(export, "trace", lambda *options: None)
    monkeypatch.setattr(export, "_save", save)


def test_the_command_writes_and_checks(monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(export, "check_export", lambda *arguments, **options: Difference(3, 0.0, 0.0, 0))
    model = small_model()
    model.save_pretrained(tmp_path)
    DenseDetectorImageProcessor.for_model(model.config, 64, 96).save_pretrained(tmp_path)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args([str(tmp_path), "--format", "torch", "--no-nms"])
    assert arguments.opset == export.OPSET
    command.run(arguments)
    printed = capsys.readouterr().out
    assert f"written to {tmp_path / 'model.pt2'}" in printed and "random images: 3 detections, 0 unmatched" in printed
    assert not list(tmp_path.glob(".*"))


def test_the_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch)
    model = small_model().train()
    export_detector(model, processor_of(model), tmp_path / "new" / "m.pt2", format="torch")
    assert (tmp_path / "new" / "m.pt2").read_bytes() == b"whole" and model.training


def test_a_full_disk_is_told_by_pytorch_itself(monkeypatch, tmp_path: Path) -> None:
    """By a limit for files. PyTorch's own writer ended the process here."""
    program = torch.export.export(torch.nn.Linear(100, 100), (torch.zeros(2, 100),))
    monkeypatch.setattr(export, "trace", lambda *options: program)
    path, model = tmp_path / "m.pt2", small_model()
    message = rf"{path} can't be written \(File too large\).*--output"
    with files_of_at_most(4096), pytest.raises(ExportError, match=message):
        export_detector(model, processor_of(model), path, format="torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError("no such operator\nmore"), OSError(28, "No space left on device")])
def test_a_failed_export_leaves_the_file_that_was_there(monkeypatch, tmp_path: Path, error: Exception) -> None:
    pretend(monkeypatch, error)
    path = tmp_path / "m.pt2"
    path.write_bytes(b"before")
    model = small_model()
    with pytest.raises(ExportError, match=r"no such operator|No space left") as raised:
        export_detector(model, processor_of(model), path, format="torch")
    assert "more" not in str(raised.value)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_gives_other_detections_is_not_kept(monkeypatch, tmp_path: Path) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(export, "check_export", lambda *arguments, **options: Difference(10, 0.0, 0.0, 4))
    model = small_model()
    with pytest.raises(ExportError, match=r"other detections than PyTorch.*--no-check"):
        export_detector(model, processor_of(model), tmp_path / "m.pt2", format="torch", check=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("m.onnx", {"format": "tflite"}, "unknown format 'tflite'.*onnx, torch"),
        ("m.pt2", {"format": "onnx"}, "doesn't end with .onnx"),
        ("file/m.pt2", {"format": "torch"}, "can't be written.*--output"),
        ("folder.pt2", {"format": "torch"}, "is a folder"),
        ("m.onnx", {"opset": 11}, "opset must be from 18"),
    ],
)
def test_wrong_arguments(tmp_path: Path, name: str, options: dict, message: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.pt2").mkdir()
    model = small_model()
    with pytest.raises(ExportError, match=message):
        export_detector(model, processor_of(model), tmp_path / name, **options)


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(ExportError, match=r"family Linear can't be exported; the dense detectors.*rt_detr"):
        export_detector(torch.nn.Linear(1, 1), processor_of(model), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"DenseDetectorImageProcessor.*got a dict"):
        export_detector(model, {}, tmp_path / "m.onnx")


@pytest.mark.parametrize("missing, check", [("onnxscript", False), ("onnxruntime", True)])
def test_a_missing_extra_is_named(monkeypatch, tmp_path: Path, missing: str, check: bool) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more)
    )
    model = small_model()
    with pytest.raises(ExportError, match=r'pip install -e "\.\[onnx\]"') as raised:
        export_detector(model, processor_of(model), tmp_path / "m.onnx", check=check)
    assert missing in str(raised.value)


def test_tensorflow_s_padding_is_made_static() -> None:
    """Traced as it is, an export takes more than 10 minutes."""
    model = tiny_model(backbone="tf_efficientnet_lite0", frozen_stages=0).eval()
    pixels = tiny_batch(height=96, width=64)["pixel_values"]
    with torch.no_grad():
        expected = model(pixels)
        found = with_static_padding(copy.deepcopy(model))(pixels)
    assert any(type(module).__name__ == "Conv2dSame" for module in model.modules())
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, rtol=0, atol=0)


@pytest.mark.slow
def test_a_backbone_of_tensorflow_s_is_exported(tmp_path: Path) -> None:
    model = tiny_model(backbone="tf_efficientnet_lite0", frozen_stages=0).eval()
    difference = export_detector(model, processor_of(model), tmp_path / "model.onnx", check=True)
    assert difference.unmatched <= 0.01 * difference.detections and difference.box < 1e-2
