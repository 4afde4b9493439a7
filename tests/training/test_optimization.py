"""Schedule, parameter groups and optimizer, against values worked out by hand; `test_schedules.py` has COCO's."""

import copy

import pytest
import timm.layers
import torch
from torch import nn
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
)

from crosskd_hf.training.arguments import DetectionTrainingArguments
from crosskd_hf.training.optimization import (
    build_optimizer,
    is_norm,
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


class QueryDetector(nn.Module):
    """The parts of a query-based detector, as transformers names them."""

    def __init__(self):
        super().__init__()
        layer = {"sampling_offsets": nn.Linear(4, 2), "norm": nn.LayerNorm(4)}
        parts = {"backbone": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "layer": nn.ModuleDict(layer)}
        self.model = nn.ModuleDict({**parts, "backbone_projection": nn.Linear(4, 4)})
        self.level_embed = nn.Parameter(torch.zeros(4))


def grouped(model: nn.Module, **rules) -> dict:
    """Group -> names, rate and decay, of a rate of 8 and a decay of 1."""
    groups = parameter_groups(model, learning_rate=8.0, weight_decay=1.0, **rules)
    return {group["name"]: (names_of(model, group), group["lr"], group["weight_decay"]) for group in groups}


def test_rules_of_query_based_detectors():
    rules = {"backbone_lr_factor": 0.25, "lr_factors": {"sampling_offsets": 0.5}, "no_decay": "norms_and_biases"}
    undecayed = ["model.backbone.0.bias", "model.backbone.1.weight", "model.backbone.1.bias"]
    assert grouped(QueryDetector(), **rules) == {
        "weights": (["level_embed", "model.backbone_projection.weight"], 8.0, 1.0),
        "rate x 0.25": (["model.backbone.0.weight"], 2.0, 1.0),
        "rate x 0.25, no decay": (undecayed, 2.0, 0.0),
        "rate x 0.5": (["model.layer.sampling_offsets.weight"], 4.0, 1.0),
        "rate x 0.5, no decay": (["model.layer.sampling_offsets.bias"], 4.0, 0.0),
        "no decay": (["model.layer.norm.weight", "model.layer.norm.bias", "model.backbone_projection.bias"], 8.0, 0.0),
    }


def test_norms_without_decay():
    norms = [f"model.{name}.{kind}" for name in ("backbone.1", "layer.norm") for kind in ("weight", "bias")]
    groups = grouped(QueryDetector(), no_decay="norms")
    assert list(groups) == ["weights", "no decay"] and groups["no decay"] == (norms, 8.0, 0.0)
    assert list(grouped(QueryDetector(), no_decay="none")) == ["weights"]
    attention = nn.MultiheadAttention(4, 1)
    assert list(grouped(attention, no_decay="norms")) == ["weights"]
    assert grouped(attention, no_decay="norms_and_biases")["no decay"][0] == ["in_proj_bias", "out_proj.bias"]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        *[(layer, True) for layer in (nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.RMSNorm(4))],
        *[(layer, True) for layer in (nn.SyncBatchNorm(4), timm.layers.BatchNormAct2d(4), timm.layers.LayerNorm2d(4))],
        (type("FrozenBatchNorm2dOfX", (nn.Module,), {})(), True),
        (type("ConvNormLayer", (nn.Module,), {})(), False),
        (nn.Conv2d(4, 4, 1), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norm_layers(layer, expected):
    assert is_norm(layer) == expected


def test_factors_multiply():
    factors = {"sampling_offsets": 0.5, "layer": 0.5, "backbone": 0.5, "level_embed": 0.0}
    rules = {"bias_lr_factor": 2.0, "backbone_lr_factor": 0.25, "lr_factors": factors}
    found = grouped(QueryDetector(), **rules)
    assert {name: rate for names, rate, _ in found.values() for name in names} == {
        "level_embed": 0.0,
        "model.backbone.0.weight": 1.0,
        "model.backbone.0.bias": 2.0,  # a convolution's
        "model.backbone.1.weight": 1.0,
        "model.backbone.1.bias": 1.0,
        "model.layer.sampling_offsets.weight": 2.0,
        "model.layer.sampling_offsets.bias": 2.0,
        "model.layer.norm.weight": 4.0,
        "model.layer.norm.bias": 4.0,
        "model.backbone_projection.weight": 8.0,
        "model.backbone_projection.bias": 8.0,
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"lr_factors": {"layer": 1, "sampling_ofsets": 0.1}}, "lr_factors: 'sampling_ofsets'.*mean sampling_offsets"),
        ({"lr_factors": {"offsets": 0.1}}, "lr_factors: 'offsets' is in no parameter's name"),  # of no whole component
        ({"lr_factors": {"layer.bias": 0.1}}, "'layer.bias' is in no"),
        ({"lr_factors": {"": 0.1}}, "'' is in no"),
        ({"lr_factors": {"methods": 0.1}}, "'methods' is in no"),
    ],
)
def test_a_factor_of_no_parameter_is_named(rules, message):
    with pytest.raises(ValueError, match=message):
        grouped(QueryDetector(), **rules)


def test_a_model_without_backbone_needs_no_factor_of_it():
    assert list(grouped(Block(), backbone_lr_factor=1.0)) == ["weights"]
    with pytest.raises(ValueError, match="backbone_lr_factor: 'backbone' is in no parameter's name"):
        grouped(Block(), backbone_lr_factor=0.1)
    frozen = QueryDetector()
    frozen.model["backbone"].requires_grad_(False)
    assert list(grouped(frozen, backbone_lr_factor=0.1)) == ["weights"]


def test_methods_have_no_backbone():
    pair = nn.ModuleDict({"student": QueryDetector(), "methods": nn.ModuleDict({"backbone": nn.Linear(1, 1)})})
    groups = grouped(pair, backbone_lr_factor=0.5, lr_factors={"layer.norm": 0.5})
    halved = [*(f"backbone.{i}" for i in range(2)), "layer.norm"]
    assert groups["rate x 0.5"][0] == [f"student.model.{n}.{kind}" for n in halved for kind in ("weight", "bias")]
    assert {"methods.backbone.weight", "methods.backbone.bias"} < set(groups["weights"][0])


def tiny_deformable_detr() -> nn.Module:
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic")
    layers = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 64}
    return DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=backbone, **layers))


@pytest.mark.parametrize(
    "build",
    [
        lambda: RTDetrForObjectDetection(RTDetrConfig()),
        lambda: DFineForObjectDetection(DFineConfig()),
        tiny_deformable_detr,
    ],
    ids=["rt_detr", "d_fine", "deformable_detr"],
)
def test_detectors_of_transformers(build):
    with torch.device("meta"):
        model = build()
    groups = grouped(model, backbone_lr_factor=0.5, lr_factors={"sampling_offsets": 0.25}, no_decay="norms")
    backbone = [name for name, p in model.model.backbone.named_parameters(prefix="model.backbone") if p.requires_grad]
    assert sorted(backbone) == sorted(
        name for group, (names, *_) in groups.items() if group.startswith("rate x 0.5") for name in names
    )
    assert groups["rate x 0.25"][0] and all("sampling_offsets" in name for name in groups["rate x 0.25"][0])
    norms = {
        f"{prefix}.{kind}"
        for prefix, module in model.named_modules()
        for kind, _ in module.named_parameters(recurse=False)
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm))
    }
    assert norms == {name for names, _, decay in groups.values() if decay == 0 for name in names}


def test_optimizer_has_the_scaled_rate_momentum_and_decay(tmp_path):
    args = DetectionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    group = build_optimizer(Block(), args).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01 * 4 / 16, 0.9, 1e-4)
    assert group["fused"]
    assert not build_optimizer(nn.Linear(2, 2, device="meta"), args).param_groups[0]["fused"]
    rules = {"no_decay": "norms", "lr_factors": {"predict": 0.5}}
    groups = build_optimizer(Block(), arguments(tmp_path, **rules)).param_groups
    found = [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
    assert found == [("weights", 0.01, 1e-4), ("no decay", 0.01, 0.0), ("rate x 0.5", 0.005, 1e-4)]
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
