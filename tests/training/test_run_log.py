"""A run's log as lines."""

from pathlib import Path

import pytest
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split

from crosskd_hf.training.run_log import log_line, use_run_log
from crosskd_hf.training.trainer import DetectionTrainer
from crosskd_hf.utils import progress


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        (
            {
                "loss": 1.5,
                "grad_norm": 12.345,
                "learning_rate": 0.01,
                "loss_cls": 1.0,
                "kd_box": 0.5,
                "data_time": 0.1,
                "step_time": 0.4,
                "memory_gb": 5.04,
                "epoch": 0.256,
            },
            "step 5/90  epoch 0.26  loss 1.5000 = loss_cls 1.0000 + kd_box 0.5000  lr 0.01  gradient 12.3  "
            "0.50 s a step, 0.10 of it for data  5.0 GB  0:01:05 left",
        ),
        ({"eval_AP": 0.4021, "eval_AP50": 0.5, "eval_APs": -1.0}, "evaluation at step 5: AP 40.2  AP50 50.0  APs -"),
        ({"train_runtime": 3600.2, "train_loss": 1.0}, "trained to step 5 in 1:00:00"),
    ],
)
def test_lines(logs: dict, expected: str) -> None:
    assert log_line(logs, 5, 90, 65.0) == expected


def test_an_evaluation_without_training_has_no_step() -> None:
    assert log_line({"evaluate_val_9_AP": 0.5, "evaluate_val_9_AP/cat": 0.5}, 0, 0) == "evaluation: AP 50.0"


def test_a_run_prints_lines_and_no_dicts(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, model = tiny_split(tmp_path / "data"), tiny_model()
    args = tiny_args(tmp_path / "run", max_steps=2, disable_tqdm=False)
    trainer = DetectionTrainer(
        model, args, train_dataset=split, eval_dataset=split, processing_class=tiny_processor(model)
    )
    use_run_log(trainer)
    trainer.train()
    trainer.evaluate()
    starts = ("step 1/2  epoch", "step 2/2  epoch", "trained to step 2", "evaluation at step 2: AP ")
    for line, start in zip(capsys.readouterr().out.splitlines(), starts, strict=True):
        assert line.startswith(start)
    monkeypatch.setattr(progress, "_quiet", True)
    trainer.evaluate()
    assert capsys.readouterr().out == ""
