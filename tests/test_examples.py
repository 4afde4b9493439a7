"""The examples run as they are."""

import runpy
from pathlib import Path

import torch
from paths import EXAMPLES
from transformers import AutoModelForObjectDetection


def test_a_hand_written_loop_distils_and_saves_the_student_alone(tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    loop = runpy.run_path(str(EXAMPLES / "accelerate_loop.py"))
    losses = loop["main"](steps=3, output=str(tmp_path))
    assert len(losses) == 3 and all(0 < loss < 1000 for loss in losses)
    printed = capsys.readouterr().out
    assert all(term in printed for term in ("loss_cls", "kd_cls", "kd_box", "kd_feature"))
    student, loaded = AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert student.config.head_channels == 64
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
