"""The average of the weights: by hand, in evaluation and saving. `test_trained_module.py` resumes one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split
from torch import Tensor

from crosskd_hf.training.averaging import WeightAverage
from crosskd_hf.training.trainer import DetectionTrainer


def test_by_hand() -> None:
    model = tiny_model()
    average = WeightAverage(model, decay=0.75)
    weight, averaged = model.head.box_predictor.bias, average.model.head.box_predictor.bias
    for value, expected in ((8.0, 8.0), (4.0, 7.0), (0.0, 5.25)):  # the first, then 3/4 of the average + 1/4
        with torch.no_grad():
            weight.fill_(value)
            model.backbone.body.bn1.running_mean.fill_(value)
        average.update(model)
        assert averaged.unique().tolist() == [expected]
        assert average.model.backbone.body.bn1.running_mean.unique().tolist() == [expected]
    assert not averaged.requires_grad and not average.model.training


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_average_is_evaluated_and_saved_and_the_weights_are_trained_on(tmp_path: Path) -> None:
    split, model = tiny_split(tmp_path / "data"), tiny_model()
    args = tiny_args(tmp_path / "run", ema_decay=0.5, save_strategy="steps", max_steps=2, save_steps=2)
    trainer = DetectionTrainer(model, args, split, split, tiny_processor(model))
    seen = []
    detect = trainer.detect
    trainer.detect = lambda model, batch: (seen.append(model), detect(model, batch))[1]
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    assert all(model is trainer.average.model for model in seen) and seen
    assert same(weights(tmp_path / "run"), trainer.average.model.state_dict())
    assert same(weights(tmp_path / "run" / "checkpoint-2"), trainer.model.state_dict())
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "run" / "checkpoint-2"))
    assert trainer.model.training


def test_a_checkpoint_without_an_average_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"begun without training\.ema_decay"):
        WeightAverage(tiny_model(), 0.5).load(tmp_path)
