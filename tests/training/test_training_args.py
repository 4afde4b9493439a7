"""Training arguments: defaults, scaling, refusals."""

import dataclasses
import inspect

import pytest
from transformers import HfArgumentParser

from crosskd_hf.training.arguments import (
    FIXED_ARGUMENTS,
    LIMITS,
    UNSUPPORTED,
    DetectionTrainingArguments,
    training_problems,
)
from crosskd_hf.utils.recipe_fields import default_of, settings_of


def arguments(tmp_path, **values) -> DetectionTrainingArguments:
    return DetectionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **values)


def with_defaults(**values) -> dict:
    return {field.name: default_of(field) for field in settings_of(DetectionTrainingArguments)} | values


def test_defaults_are_the_published_schedule(tmp_path):
    args = arguments(tmp_path)
    assert (args.optim, args.learning_rate, args.momentum, args.weight_decay) == ("sgd", 0.01, 0.9, 1e-4)
    assert (args.num_train_epochs, args.lr_milestones, args.lr_gamma) == (12, [8, 11], 0.1)
    assert (args.warmup_steps, args.warmup_start_factor, args.warmup_style) == (500, 0.001, "linear")
    assert (args.per_device_train_batch_size, args.base_batch_size, args.max_grad_norm) == (2, 16, 0.0)
    assert (args.bias_lr_factor, args.bias_weight_decay) == (1.0, True)
    assert (args.backbone_lr_factor, args.lr_factors, args.no_decay) == (1.0, None, "none")
    assert (args.ema_decay, args.ema_warmup_steps) == (None, 0)
    assert (args.metric_for_best_model, args.greater_is_better, args.report_to) == ("AP", True, [])
    assert args.label_names == ["labels"]


def test_known_names_and_help_texts(tmp_path):
    fields = {f.name: f for f in dataclasses.fields(DetectionTrainingArguments)}
    assert all(fields[name].metadata["help"] for name in inspect.get_annotations(DetectionTrainingArguments))
    assert set(FIXED_ARGUMENTS) | set(LIMITS) <= set(fields)
    assert dataclasses.replace(arguments(tmp_path), learning_rate=0.02).learning_rate == 0.02


def test_command_line_parser_takes_them(tmp_path):
    (args,) = HfArgumentParser(DetectionTrainingArguments).parse_args_into_dataclasses(
        f"--output_dir {tmp_path} --use_cpu true --lr_milestones 2 3.5 --warmup_style constant --no_decay norms "
        '--lr_factors {"sampling_offsets":0.1} --ema_decay 0.9 --ema_warmup_steps 20'.split()
    )
    assert (args.lr_factors, args.no_decay, args.ema_warmup_steps) == ({"sampling_offsets": 0.1}, "norms", 20)
    assert args.lr_milestones == [2, 3.5]
    assert args.warmup_style == "constant"


@pytest.mark.parametrize(
    ("per_device", "accumulation", "base", "batch", "rate"),
    [(2, 1, 16, 2, 0.00125), (4, 4, 16, 16, 0.01), (8, 4, 16, 32, 0.02), (8, 4, None, 32, 0.01)],
)
def test_learning_rate_follows_the_global_batch(tmp_path, per_device, accumulation, base, batch, rate):
    args = arguments(
        tmp_path,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        base_batch_size=base,
    )
    assert args.global_batch_size == batch
    assert args.scaled_learning_rate == pytest.approx(rate)


def test_global_batch_counts_the_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(DetectionTrainingArguments, "world_size", property(lambda self: 8))
    assert arguments(tmp_path).global_batch_size == 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns is True, but must stay False: the data sets"),
        ({"eval_do_concat_batches": True}, "eval_do_concat_batches is True"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter is True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is 'group_by_length'"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is True"),
        ({"warmup_style": "cosine"}, "warmup_style is 'cosine'; it must be linear or constant"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be from 0.0"),
        ({"learning_rate": 1e30}, "learning_rate is 1e[+]30"),
        ({"weight_decay": 1e30}, "weight_decay is 1e[+]30"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0"),
        ({"per_device_train_batch_size": 10**6}, "per_device_train_batch_size is 1000000"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1; it must be from 0"),
        ({"seed": -1}, "seed is -1; it must be from 0"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"data_seed": 3}, "data_seed is 3, but must stay None: the order of the images follows seed"),
        (
            {"resume_from_checkpoint": "run/checkpoint-3"},
            "resume_from_checkpoint is 'run/checkpoint-3'.*model.checkpoint",
        ),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"momentum": 1.5}, "momentum is 1.5; it must be from 0.0 to 0.9999"),
        ({"lr_gamma": 2}, "lr_gamma is 2"),
        ({"warmup_start_factor": -0.1}, "warmup_start_factor is -0.1"),
        ({"bias_lr_factor": -2.0}, "bias_lr_factor is -2.0"),
        ({"backbone_lr_factor": -0.1}, "backbone_lr_factor is -0.1; it must be from 0.0 to 1000.0"),
        (
            {"lr_factors": {"a": -0.1}},
            "lr_factors is {'a': -0.1}; it must map parts .* from 0 to 1000, such",
        ),
        ({"lr_factors": {"a": 1000.1}}, "lr_factors is {'a': 1000.1}"),
        ({"lr_factors": {"a": float("nan")}}, "lr_factors is {'a': nan}"),
        ({"lr_factors": {"a": "0.1"}}, "lr_factors is {'a': '0.1'}"),
        ({"lr_factors": {1: 0.1}}, "lr_factors is {1: 0.1}"),
        ({"lr_factors": ["a"]}, r"lr_factors is \['a'\]"),
        ({"lr_factors": "a: 0.1"}, "lr_factors is 'a: 0.1'"),
        ({"no_decay": "biases"}, "no_decay is 'biases'; it must be one of none, norms, norms_and_biases"),
        ({"no_decay": "norms", "bias_weight_decay": False}, "no_decay norms and bias_weight_decay false both say"),
        ({"no_decay": "norms_and_biases", "bias_weight_decay": False}, "norms_and_biases and bias_weight_decay false"),
        ({"ema_warmup_steps": -1, "ema_decay": 0.9}, "ema_warmup_steps is -1; it must be from 0"),
        ({"ema_warmup_steps": 1}, "ema_warmup_steps is 1, but ema_decay is null"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"base_batch_size": 0}, "base_batch_size is 0; it must be from 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"num_train_epochs": 10}, r"lr_milestones \[11.0\] lie outside the 10 epochs"),
        ({"lr_milestones": [0, 8]}, r"lr_milestones \[0\] lie outside"),
        ({"lr_milestones": [11, 8]}, "must rise"),
        ({"lr_milestones": [8, 8]}, "must rise"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0, so that nothing would be trained"),
        ({"num_train_epochs": 0, "lr_milestones": [], "warmup_steps": 0}, "num_train_epochs is 0"),
        ({"deepspeed": "foo.json"}, "deepspeed is 'foo.json', but must stay None"),
        ({"max_steps": 100}, "warmup_steps is 500, but training ends after max_steps 100"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type and lr_scheduler_kwargs need lr_milestones null"),
        ({"lr_milestones": None, "warmup_style": "constant"}, "warmup_style constant needs lr_milestones"),
        ({"optim_args": "nesterov=True"}, "optim_args 'nesterov=True' is not read with optim sgd"),
    ],
)
def test_refused_with_field_and_value(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **values)
    problems = training_problems(with_defaults(**values))
    assert len(problems) == 1
    fields, text = problems[0]
    assert set(fields) & (set(values) | {"lr_milestones", "warmup_steps"})
    assert text.startswith(fields[0])


@pytest.mark.parametrize(
    "values",
    [
        {"lr_milestones": []},
        {"lr_milestones": None},
        {"lr_milestones": None, "lr_scheduler_type": "cosine"},
        {"lr_milestones": [0.5]},
        {"max_steps": -1},
        {"max_steps": 1, "warmup_steps": 0},
        {"max_steps": 4, "warmup_steps": 0},
        {"max_steps": 4, "warmup_steps": 4},
        {"max_steps": 4, "warmup_steps": 0.5},
        {"max_steps": 1000, "num_train_epochs": 1},
        {"optim": "adamw_torch", "optim_args": "eps=1e-6"},
        {"base_batch_size": None},
        {"backbone_lr_factor": 0.0, "lr_factors": {"a": 0, "b.c": 1000.0}},
        {"lr_factors": {}},
        {"no_decay": "norms", "bias_lr_factor": 2.0},
        {"no_decay": "none", "bias_weight_decay": False},
        {"ema_decay": 0.9, "ema_warmup_steps": 1},
        {"num_train_epochs": 24, "lr_milestones": [16, 22]},
    ],
)
def test_accepted(tmp_path, values):
    arguments(tmp_path, **values)


def test_all_problems_are_told_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        arguments(tmp_path, momentum=2.0, warmup_style="none", remove_unused_columns=True)
    for name in ("momentum", "warmup_style", "remove_unused_columns"):
        assert name in str(error.value)


@pytest.mark.parametrize("variable", sorted(UNSUPPORTED))
def test_what_accelerates_configuration_splits_is_refused(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "False")
    arguments(tmp_path)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"{UNSUPPORTED[variable]} .{variable}=true"):
        arguments(tmp_path)


def test_transformers_own_checks_still_run(tmp_path):
    with pytest.raises(ValueError, match="warmup_steps"):
        arguments(tmp_path, warmup_steps=-1)


def test_every_own_problem_is_found_without_building_arguments():
    assert training_problems(with_defaults()) == []
