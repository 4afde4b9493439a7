"""Schedule, parameter groups and optimizer, against values worked out by hand."""

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

# COCO train2017 has 117266 images left after filtering; at batch 16 that is ceil(117266 / 16) updates.
STEPS_PER_EPOCH = 7330
WARMUP = {"warmup_steps": 500, "start_factor": 0.001, "style": "linear"}
ONE_X = {**WARMUP, "milestone_steps": [58640, 80630], "gamma": 0.1}
TWO_X = {**ONE_X, "milestone_steps": [117280, 161260]}
FCOS = {**TWO_X, "start_factor": 1 / 3, "style": "constant"}


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
    ("schedule", "step", "factor"),
    [
        (ONE_X, 0, 0.001),
        (ONE_X, 1, 0.001 + 0.999 / 499),
        (ONE_X, 249, 0.001 + 0.999 * 249 / 499),
        (ONE_X, 498, 0.001 + 0.999 * 498 / 499),
        (ONE_X, 499, 1.0),
        (ONE_X, 500, 1.0),
        (ONE_X, 8 * STEPS_PER_EPOCH - 1, 1.0),
        (ONE_X, 8 * STEPS_PER_EPOCH, 0.1),
        (ONE_X, 11 * STEPS_PER_EPOCH - 1, 0.1),
        (ONE_X, 11 * STEPS_PER_EPOCH, 0.01),
        (ONE_X, 12 * STEPS_PER_EPOCH - 1, 0.01),
        (TWO_X, 16 * STEPS_PER_EPOCH - 1, 1.0),
        (TWO_X, 16 * STEPS_PER_EPOCH, 0.1),
        (TWO_X, 22 * STEPS_PER_EPOCH - 1, 0.1),
        (TWO_X, 22 * STEPS_PER_EPOCH, 0.01),
        (FCOS, 0, 1 / 3),
        (FCOS, 498, 1 / 3),
        (FCOS, 499, 1.0),
        (FCOS, 16 * STEPS_PER_EPOCH, 0.1),
        (FCOS, 22 * STEPS_PER_EPOCH, 0.01),
    ],
)
def test_factor_of_the_published_schedules(schedule, step, factor):
    assert warmup_multistep_factor(step, **schedule) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("style", ["linear", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_no_warmup(style, warmup_steps):
    schedule = {**ONE_X, "style": style, "warmup_steps": warmup_steps}
    assert [warmup_multistep_factor(step, **schedule) for step in (0, 1, 2)] == [1.0, 1.0, 1.0]


def test_warmup_of_two_steps_starts_low_once():
    assert [warmup_multistep_factor(t, **{**ONE_X, "warmup_steps": 2}) for t in range(3)] == [0.001, 1.0, 1.0]


def test_milestone_within_warmup_applies_too():
    schedule = {**ONE_X, "warmup_steps": 11, "start_factor": 0.0, "milestone_steps": [5]}
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


def test_scheduler_turns_epochs_into_steps(tmp_path):
    args = arguments(tmp_path, warmup_steps=0, lr_milestones=[1, 2.5], num_train_epochs=3)
    rates = scheduled_rates(args, steps_per_epoch=4, count=12)
    assert rates == pytest.approx([0.01] * 4 + [0.001] * 6 + [0.0001] * 2)


def test_scheduler_without_milestones_stays_constant(tmp_path):
    args = arguments(tmp_path, warmup_steps=3, warmup_start_factor=0.5, lr_milestones=[])
    assert scheduled_rates(args, 100, 5) == pytest.approx([0.005, 0.0075, 0.01, 0.01, 0.01])


def test_warmup_below_one_is_a_part_of_all_steps(tmp_path):
    # A quarter of 3 epochs of 4 steps: W = 3.
    args = arguments(tmp_path, warmup_steps=0.25, warmup_start_factor=0.5, lr_milestones=[], num_train_epochs=3)
    assert scheduled_rates(args, 4, 4) == pytest.approx([0.005, 0.0075, 0.01, 0.01])


def test_scheduler_goes_on_from_its_state(tmp_path):
    args = arguments(tmp_path, warmup_steps=5, lr_milestones=[1], num_train_epochs=2)
    whole = scheduled_rates(args, 6, 10)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = multistep_scheduler(optimizer, args, 6)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    state = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    resumed = multistep_scheduler(other, args, 6)
    other.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    rates = []
    for _ in range(7):
        rates.append(other.param_groups[0]["lr"])
        other.step()
        resumed.step()
    assert rates == pytest.approx(whole[3:])


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
        "other biases": (["norm.bias"], 0.01, 0.0),
        "convolution biases": (["predict.bias"], 0.02, 0.0),
    }


def test_bias_rate_alone_leaves_norm_biases_with_the_weights():
    model = Block()
    groups = parameter_groups(model, learning_rate=0.01, weight_decay=1e-4, bias_lr_factor=2.0)
    assert [group["name"] for group in groups] == ["weights", "convolution biases"]
    assert "norm.bias" in names_of(model, groups[0])
    assert names_of(model, groups[1]) == ["predict.bias"]


def test_every_trained_parameter_is_in_exactly_one_group():
    model = Block()
    groups = parameter_groups(model, learning_rate=1, weight_decay=1, bias_lr_factor=2, bias_weight_decay=False)
    grouped = [name for group in groups for name in names_of(model, group)]
    assert sorted(grouped) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_optimizer_has_the_scaled_rate_momentum_and_decay(tmp_path):
    args = DetectionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    optimizer = build_optimizer(Block(), args)
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01 * 4 / 16, 0.9, 1e-4)
    assert group["fused"]


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


def test_fused_steps_equal_unfused_ones(tmp_path):
    torch.manual_seed(0)
    model = Block()
    twin = copy.deepcopy(model)
    args = arguments(tmp_path, bias_lr_factor=2.0, bias_weight_decay=False)
    fused = build_optimizer(model, args)
    groups = parameter_groups(twin, learning_rate=0.01, weight_decay=1e-4, bias_lr_factor=2.0, bias_weight_decay=False)
    plain = torch.optim.SGD(groups, lr=0.01, momentum=0.9, fused=False, foreach=False)
    for _ in range(5):
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
                other.grad = parameter.grad.clone()
        fused.step()
        plain.step()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-7, rtol=0)


def test_optimizer_without_fused_kernels_isnt_fused(tmp_path):
    assert not build_optimizer(nn.Linear(2, 2, device="meta"), arguments(tmp_path)).param_groups[0]["fused"]


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), arguments(tmp_path))


def buffers(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [state["momentum_buffer"].clone() for state in optimizer.state.values()]


def give_gradients(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_skipped_first_step_leaves_no_uninitialised_momentum(tmp_path):
    """torch alone makes the momentum in the first step with `empty_like`, and a skipped step never fills it."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    twin = copy.deepcopy(model)
    skipped, plain = build_optimizer(model, arguments(tmp_path)), build_optimizer(twin, arguments(tmp_path))
    give_gradients(model, float("inf"))
    skipped.found_inf = torch.ones(())
    skipped.step()
    skipped.found_inf = torch.zeros(())
    assert all(torch.count_nonzero(buffer) == 0 for buffer in buffers(skipped))
    for m, optimizer in ((model, skipped), (twin, plain)):
        give_gradients(m, 1.0)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
