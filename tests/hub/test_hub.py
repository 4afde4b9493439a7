"""Saved models come back by the auto classes."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_batch, tiny_model, tiny_processor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

import crosskd_hf


@pytest.mark.parametrize("name", crosskd_hf.CONFIGS)
def test_auto_classes_know_every_detector(tmp_path: Path, name: str) -> None:
    model, pixels = tiny_model(name).eval(), tiny_batch()["pixel_values"]
    model.save_pretrained(tmp_path)
    tiny_processor(model).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and again.config.id2label == {0: "cat", 1: "dog"}
    with torch.no_grad():
        expected, output = model(pixels), again(pixels)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.pred_boxes, expected.pred_boxes)
    assert AutoImageProcessor.from_pretrained(tmp_path).nms_threshold == model.config.nms_threshold
