"""Saved models come back: in another process, by the auto classes, and through the pipeline."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import tiny_batch, tiny_model, tiny_processor
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

import crosskd_hf

LOADER = """
import sys, torch, crosskd_hf
from transformers import AutoModelForObjectDetection
model = AutoModelForObjectDetection.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    output = model(torch.load(sys.argv[2], weights_only=True))
torch.save({"logits": output.logits, "boxes": output.pred_boxes}, sys.argv[3])
"""


@pytest.mark.parametrize(
    ("detector", "backbone"),
    [("gfl", "resnet18"), ("retinanet", "swin_tiny_patch4_window7_224"), ("fcos", "resnet26")],
)
def test_another_process_predicts_the_same(tmp_path: Path, detector: str, backbone: str) -> None:
    style = "caffe" if detector == "fcos" else "pytorch"
    model = tiny_model(detector, backbone=backbone, backbone_style=style, frozen_stages=0).eval()
    pixels = tiny_batch(height=96, width=128)["pixel_values"]
    with torch.no_grad():
        expected = model(pixels)
    model.save_pretrained(tmp_path / "model")
    torch.save(pixels, tmp_path / "pixels.pt")
    files = [str(tmp_path / name) for name in ("model", "pixels.pt", "output.pt")]
    subprocess.run([sys.executable, "-c", LOADER, *files], check=True)
    found = torch.load(tmp_path / "output.pt", weights_only=True)
    assert torch.equal(found["logits"], expected.logits)
    assert torch.equal(found["boxes"], expected.pred_boxes)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_pipeline_detects(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_processor(model).save_pretrained(tmp_path)
    image = Image.effect_noise((120, 80), 90).convert("RGB")
    found = pipeline("object-detection", model=str(tmp_path))(image, threshold=0.0)
    assert found and set(found[0]) == {"score", "label", "box"}
    assert found[0]["label"] in ("cat", "dog")
    assert all(0 <= entry["box"]["xmin"] <= entry["box"]["xmax"] <= 120 for entry in found)
    assert "not supported" not in caplog.text


def test_auto_classes_know_every_detector(tmp_path: Path) -> None:
    for name in crosskd_hf.CONFIGS:
        folder = tmp_path / name
        model = tiny_model(name)
        model.save_pretrained(folder)
        tiny_processor(model).save_pretrained(folder)
        again = AutoModelForObjectDetection.from_pretrained(folder)
        assert type(again) is type(model)
        assert again.config.id2label == {0: "cat", 1: "dog"}
        assert AutoImageProcessor.from_pretrained(folder).nms_threshold == model.config.nms_threshold
