"""The average of the weights: by hand, in evaluation and saving, over a resume."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split
from torch import Tensor

from crosskd_hf.training.averaging import AVERAGE_FILE, WeightAverage
from crosskd_hf.training.disk_space import checkpoint_bytes
from crosskd_hf.training.trainer import DetectionTrainer


def test_by_hand() -> None:
    model = tiny_model()
    average = WeightAverage(model, decay=0.75)
    weight, own = model.head.box_predictor.bias, average.model.head.box_predictor.bias
    for value, expected in ((8.0, 8.0), (4.0, 7.0), (0.0, 5.25)):  # the first, then 3/4 of the average + 1/4
        with torch.no_grad():
            weight.fill_(value)
            model.backbone.body.bn1.running_mean.fill_(value)
        average.update(model)
        assert own.unique().tolist() == [expected]
        assert average.model.backbone.body.bn1.running_mean.unique().tolist() == [expected]
    assert not own.requires_grad and not average.model.training


def trainer_of(root: Path, name: str, **options) -> DetectionTrainer:
    split = tiny_split(root / "data")
    args = tiny_args(root / name, **{"ema_decay": 0.5, "save_strategy": "steps", "save_steps": 2, **options})
    model = tiny_model()
    return DetectionTrainer(model, args, split, split, tiny_processor(model))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_average_is_evaluated_and_saved_and_the_weights_are_trained_on(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "run", max_steps=4)
    seen = []
    detect = trainer.detect
    trainer.detect = lambda model, batch: (seen.append(model), detect(model, batch))[1]
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    assert all(model is trainer.average.model for model in seen) and seen
    assert same(weights(tmp_path / "run"), trainer.average.model.state_dict())
    assert same(weights(tmp_path / "run" / "checkpoint-4"), trainer.model.state_dict())
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "run" / "checkpoint-4"))
    assert trainer.model.training


def test_a_resumed_average_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path, "whole", max_steps=4)
    whole.train()
    again = trainer_of(tmp_path, "whole", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(whole.average.model.state_dict(), again.average.model.state_dict())
    assert same(whole.model.state_dict(), again.model.state_dict())


def test_a_checkpoint_without_an_average_is_named(tmp_path: Path) -> None:
    trainer_of(tmp_path, "run", max_steps=2, ema_decay=None).train()
    assert not (tmp_path / "run" / "checkpoint-2" / AVERAGE_FILE).exists()
    with pytest.raises(FileNotFoundError, match="begun without training"):
        trainer_of(tmp_path, "run", max_steps=4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_the_best_checkpoint_brings_its_own_average(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": None}
    trainer = trainer_of(tmp_path, "run", max_steps=4, **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    stored = {key.removeprefix("module."): value for key, value in load_file(best / AVERAGE_FILE).items()}
    stored.pop("n_averaged")
    assert same(stored, trainer.average.model.state_dict())


def test_checkpoints_are_expected_to_be_larger(tmp_path: Path) -> None:
    model = tiny_model()
    without, with_average = (checkpoint_bytes(model, tiny_args(tmp_path, ema_decay=decay)) for decay in (None, 0.9))
    assert with_average - without == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_a_decay_outside_its_range(tmp_path: Path, decay: float) -> None:
    with pytest.raises(ValueError, match="ema_decay"):
        tiny_args(tmp_path, ema_decay=decay)
