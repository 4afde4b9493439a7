"""Schedule, parameter groups and optimizer, against values worked out by hand; `test_schedules.py` has COCO's."""

import copy

import pytest
import torch
from torch import nn

from crosskd_hf.training.arguments import DetectionTrainingArguments
from crosskd_hf.training.optimization import (
    build_optimizer,
    multistep_scheduler,
    parameter_groups,
    warmup_multistep_factor,
)

SCHEDULE = {"start_factor": 0.001, "milestone_steps": [50], "gamma": 0.1}


class Block(nn.Module):
    """What a head is made of: convolution, norm, scale, prediction convolution with bias, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Conv2d(3, 4, 1).requires_grad_(False)
        self.conv = nn.Conv2d(4, 4, 3, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.predict = nn.Conv2d(4, 2, 3)


def names_of(model: nn.Module, group: dict) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


def arguments(tmp_path, **values) -> DetectionTrainingArguments:
    return DetectionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, base_batch_size=None, **values)


@pytest.mark.parametrize(
    ("style", "warmup_steps", "factors"),
    [
        *[(style, steps, [1, 1, 1]) for style in ("linear", "constant") for steps in (0, 1)],
        ("linear", 2, [0.001, 1, 1]),
    ],
)
def test_the_shortest_warmups(style, warmup_steps, factors):
    schedule = {**SCHEDULE, "style": style, "warmup_steps": warmup_steps}
    assert [warmup_multistep_factor(step, **schedule) for step in range(3)] == factors


def test_milestone_within_warmup_applies_too():
    schedule = {"style": "linear", "warmup_steps": 11, "start_factor": 0.0, "milestone_steps": [5], "gamma": 0.1}
    assert warmup_multistep_factor(4, **schedule) == pytest.approx(0.4)
    assert warmup_multistep_factor(5, **schedule) == pytest.approx(0.05)


def scheduled_rates(args: DetectionTrainingArguments, steps_per_epoch: int, count: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = multistep_scheduler(optimizer, args, steps_per_epoch)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("options", "steps_per_epoch", "rates"),
    [
        ({"warmup_steps": 0, "lr_milestones": [1, 2.5], "num_train_epochs": 3}, 4, [1] * 4 + [0.1] * 6 + [0.01] * 2),
        ({"warmup_steps": 3, "warmup_start_factor": 0.5, "lr_milestones": []}, 100, [0.5, 0.75, 1, 1, 1]),
        # A quarter of all steps, which are 3 epochs of 4.
        (
            {"warmup_steps": 0.25, "warmup_start_factor": 0.5, "lr_milestones": [], "num_train_epochs": 3},
            4,
            [0.5, 0.75, 1, 1],
        ),
    ],
    ids=["milestones in epochs", "none", "a share of warm-up"],
)
def test_rates_of_a_scheduler(tmp_path, options, steps_per_epoch, rates):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = multistep_scheduler(optimizer, arguments(tmp_path, **options), steps_per_epoch)
    for rate in rates:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.step()
        scheduler.step()


def test_neutral_settings_give_one_group_in_model_order():
    model = Block()
    groups = parameter_groups(model, learning_rate=0.01, weight_decay=1e-4)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [("weights", 0.01, 1e-4)]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names_of(model, groups[0]) == trained
    assert not any(name.startswith("frozen") for name in trained)


def test_bias_rule_of_fcos():
    """Convolution biases: twice the rate, no decay. GroupNorm's bias: no decay. Norm weights and scales: as usual."""
    model = Block()
    groups = parameter_groups(
        model, learning_rate=0.01, weight_decay=1e-4, bias_lr_factor=2.0, bias_weight_decay=False
    )
    found = {group["name"]: (names_of(model, group), group["lr"], group["weight_decay"]) for group in groups}
    assert found == {
        "weights": (["scale", "conv.weight", "norm.weight", "predict.weight"], 0.01, 1e-4),
        "no decay": (["norm.bias"], 0.01, 0.0),
        "rate x 2, no decay": (["predict.bias"], 0.02, 0.0),
    }


def test_bias_rate_alone_leaves_norm_biases_with_the_weights():
    model = Block()
    groups = parameter_groups(model, learning_rate=0.01, weight_decay=1e-4, bias_lr_factor=2.0)
    assert [group["name"] for group in groups] == ["weights", "rate x 2"]
    assert "norm.bias" in names_of(model, groups[0])
    assert names_of(model, groups[1]) == ["predict.bias"]


def test_optimizer_has_the_scaled_rate_momentum_and_decay(tmp_path):
    args = DetectionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    group = build_optimizer(Block(), args).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01 * 4 / 16, 0.9, 1e-4)
    assert group["fused"]
    assert not build_optimizer(nn.Linear(2, 2, device="meta"), args).param_groups[0]["fused"]
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), args)


def test_optimizer_steps_like_plain_sgd(tmp_path):
    """v = 0.9 v + (g + 1e-4 w), w = w - lr v, from v = 0."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(model, arguments(tmp_path))
    weight, velocity = model.weight.item(), 0.0
    for gradient in (1.0, -2.0, 0.5):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 1e-4 * weight
        weight -= 0.01 * velocity
        assert model.weight.item() == pytest.approx(weight, abs=1e-6)


def test_skipped_first_step_leaves_no_uninitialised_momentum(tmp_path):
    """torch alone makes the momentum in the first step with `empty_like`, and a skipped step never fills it."""
    model = nn.Linear(64, 64)
    twin = copy.deepcopy(model)
    skipped, plain = build_optimizer(model, arguments(tmp_path)), build_optimizer(twin, arguments(tmp_path))
    for optimizer, gradient, skip in ((skipped, float("inf"), 1.0), (skipped, 1.0, 0.0), (plain, 1.0, 0.0)):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.found_inf = torch.tensor(skip)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
