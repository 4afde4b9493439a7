"""Trackers, offline: what TensorBoard, trackio and Weights & Biases have got when a run is over."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import TESTS
from PIL import Image
from test_evaluation import detected
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split

from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.training.coco_metrics import CocoEvaluator
from crosskd_hf.training.distillation_trainer import DistillationTrainer
from crosskd_hf.training.evaluation_pictures import evenly_spaced, example
from crosskd_hf.training.tracking import TILE, evaluation_sheet
from crosskd_hf.training.trainer import DetectionTrainer

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split
from crosskd_hf.training.trainer import DetectionTrainer
root = Path(sys.argv[1])
split = tiny_split(root / "data")
args = tiny_args(root / "run", report_to=sys.argv[3], max_steps=2, evaluation_pictures=2, project="crosskd-test")
model = tiny_model()
parts = {"train_dataset": split, "eval_dataset": split, "processing_class": tiny_processor(model)}
trainer = DetectionTrainer(model, args, **parts)
trainer.recipe_text = "model: {}"
trainer.train()
trainer.evaluate()
"""


def test_tensorboard(tmp_path: Path) -> None:
    """Read back: every loss term, the metrics, the recipe, and the sheet of pictures."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    split = tiny_split(tmp_path / "data")
    args = tiny_args(tmp_path / "run", report_to="tensorboard", max_steps=2, evaluation_pictures=3)
    model = tiny_model()
    trainer = DistillationTrainer(
        model,
        tiny_model(seed=1),
        args,
        train_dataset=split,
        eval_dataset=split,
        processing_class=tiny_processor(model),
    )
    trainer.recipe_text = "model:\n  detector: gfl\nteacher:\n  checkpoint: https://me:pw@a.org/b.pth?sig=secret\n"
    trainer.train()
    trainer.evaluate()
    tags: dict[str, set] = {"scalars": set(), "images": set(), "tensors": set()}
    for folder in {path.parent for path in (tmp_path / "run" / "runs").rglob("events*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        for kind in tags:
            tags[kind] |= set(events.Tags()[kind])
        if "recipe/text_summary" in events.Tags()["tensors"]:
            text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
            assert "detector: gfl" in text
            assert "checkpoint: https://a.org/b.pth\n" in text, "trackers show it to others"
        if events.Tags()["images"]:
            picture = Image.open(io.BytesIO(events.Images("eval/examples")[0].encoded_image_string))
            assert events.Images("eval/examples")[0].step == 2
    terms = ("loss_cls", "loss_box", "loss_dfl", "kd_cls", "kd_box", "loss", "learning_rate", "grad_norm", "step_time")
    assert {f"train/{term}" for term in terms} <= tags["scalars"]
    assert {"eval/AP", "eval/AP50", "eval/AP/cat", "eval/AP/dog"} <= tags["scalars"]
    assert tags["images"] == {"eval/examples"} and "recipe/text_summary" in tags["tensors"]
    assert picture.width > 2 * TILE and picture.height > 3 * TILE


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_others_offline(tmp_path: Path, tracker: str) -> None:
    """In a process of their own, since they keep state and threads. It ends without error, and the files are there."""
    pytest.importorskip(tracker)
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", RUN, str(tmp_path), str(TESTS), tracker]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    pictures = [path for path in files if path.suffix == ".png" and "data" not in path.parts]
    assert len(pictures) == 1 and Image.open(pictures[0]).width > 2 * TILE
    if tracker == "wandb":
        assert any(path.suffix == ".wandb" for path in files)


def test_the_sheet_shows_truth_and_detections(tmp_path: Path) -> None:
    dataset = DetectionDataset(tiny_split(tmp_path), train=False, short_side=64, long_side=96)
    evaluator = CocoEvaluator(dataset.split)
    evaluator.update([1], [detected((0.9, 0, [10, 10, 40, 40]), (0.1, 1, [50, 10, 90, 40]))])
    without = np.asarray(evaluation_sheet(dataset, CocoEvaluator(dataset.split), 2))
    sheet = np.asarray(evaluation_sheet(dataset, evaluator, 2))
    changed = np.nonzero((sheet != without).any(axis=2))
    assert changed[1].min() > TILE, "only the predictions' column changes"
    assert changed[0].max() < 1.5 * TILE, "and only its first image"
    _, image, truth, factors = example(dataset, 0)
    assert image.size == (96, 64) and factors == (1.0, 1.0)
    assert truth.boxes.tolist() == [[5, 8, 36, 33], [15, 8, 46, 34]] and truth.names == ["dog", "cat"]


def test_evenly_spaced() -> None:
    assert [evenly_spaced(count, total) for count, total in ((2, 10), (8, 3), (3, 10), (0, 5))] == [
        *([0, 5], [0, 1, 2], [0, 3, 6], [])
    ]


def test_without_a_tracker_nothing_is_drawn(tmp_path: Path) -> None:
    split, model = tiny_split(tmp_path / "data", 1), tiny_model()
    trainer = DetectionTrainer(
        model, tiny_args(tmp_path / "run"), eval_dataset=split, processing_class=tiny_processor(model)
    )
    trainer.evaluate()
    assert trainer.evaluation_sheet is None
