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


def test_warmup_by_hand() -> None:
    """RT-DETR's: the decay is 0.5 * (1 - exp(-t / 2)) at update t = 1, 2, 3, from the initial weights on."""
    model = tiny_model()
    weight = model.head.box_predictor.bias
    weight.data.fill_(8.0)
    average, expected = WeightAverage(model, decay=0.5, warmup_steps=2), 8.0
    for value, decay in ((4.0, 0.1967346701), (0.0, 0.3160602794), (2.0, 0.3884349199)):
        weight.data.fill_(value)
        average.update(model)
        expected = decay * expected + (1 - decay) * value
        assert average.model.head.box_predictor.bias.unique().item() == pytest.approx(expected, rel=1e-6)
    assert average.decay_at(2000) == 0.5
    assert [WeightAverage(model, 0.5).decay_at(update) for update in (1, 2000)] == [0.5, 0.5]


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_a_resumed_average_goes_on_bit_for_bit(tmp_path: Path, warmup_steps: int) -> None:
    model = tiny_model()
    averages = [WeightAverage(model, 0.9, warmup_steps) for _ in range(2)]
    for update in range(1, 5):
        model.head.box_predictor.bias.data.normal_()
        for average in averages:
            average.update(model)
        if update == 2:
            averages[1].save(tmp_path)
            averages[1] = WeightAverage(tiny_model(seed=5), 0.9, warmup_steps)
            averages[1].load(tmp_path)
    whole, resumed = (average.model.state_dict() for average in averages)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_checkpoint_without_an_average_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"begun without training\.ema_decay"):
        WeightAverage(tiny_model(), 0.5).load(tmp_path)
