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
for folder in sys.argv[2:]:
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(torch.load(sys.argv[1], weights_only=True))
    torch.save({"logits": output.logits, "boxes": output.pred_boxes}, f"{folder}/output.pt")
"""


def test_another_process_predicts_the_same(tmp_path: Path) -> None:
    pixels, expected = tiny_batch(height=96, width=128)["pixel_values"], {}
    torch.save(pixels, tmp_path / "pixels.pt")
    for detector, backbone in (
        ("gfl", "resnet18"),
        ("retinanet", "swin_tiny_patch4_window7_224"),
        ("fcos", "resnet26"),
    ):
        style = "caffe" if detector == "fcos" else "pytorch"
        model = tiny_model(detector, backbone=backbone, backbone_style=style, frozen_stages=0).eval()
        with torch.no_grad():
            expected[tmp_path / detector] = model(pixels)
        model.save_pretrained(tmp_path / detector)
    subprocess.run([sys.executable, "-c", LOADER, tmp_path / "pixels.pt", *expected], check=True)
    for folder, output in expected.items():
        found = torch.load(folder / "output.pt", weights_only=True)
        assert torch.equal(found["logits"], output.logits), folder.name
        assert torch.equal(found["boxes"], output.pred_boxes), folder.name
        assert (folder / "model.safetensors").is_file()


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
