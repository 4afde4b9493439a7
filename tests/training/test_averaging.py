"""The average of the weights, by hand. `test_trained_module.py` saves, evaluates and resumes one."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from crosskd_hf.training.averaging import WeightAverage


def test_by_hand() -> None:
    model = tiny_model()
    model.register_buffer("index", torch.arange(1000))  # such as Swin's: an average would round it down
    average = WeightAverage(model, decay=0.75)
    weight, averaged = model.head.box_predictor.bias, average.model.head.box_predictor.bias
    for value, expected in ((8.0, 8.0), (4.0, 7.0), (0.0, 5.25)):  # the first, then 3/4 of the average + 1/4
        with torch.no_grad():
            weight.fill_(value)
            model.backbone.body.bn1.running_mean.fill_(value)
        average.update(model)
        assert averaged.unique().tolist() == [expected]
        assert average.model.backbone.body.bn1.running_mean.unique().tolist() == [value], "the latest"
        assert torch.equal(average.model.index, model.index)
    assert not averaged.requires_grad and not average.model.training


def test_a_checkpoint_without_an_average_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"begun without training\.ema_decay"):
        WeightAverage(tiny_model(), 0.5).load(tmp_path)
