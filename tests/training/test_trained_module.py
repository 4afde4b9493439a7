"""A trainer that trains a pair around its model: what DDP wraps, what is saved where, and how it resumes."""

from pathlib import Path

import equality
import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file
from test_resume import InterruptAt, Interrupted, assert_same, final_state
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    PreTrainedModel,
    ResNetConfig,
    TrainerCallback,
)

from crosskd_hf.distillation.pair import METHODS_FILE
from crosskd_hf.training.averaging import AVERAGE_FILE
from crosskd_hf.training.distillation_trainer import DistillationTrainer
from crosskd_hf.training.saving import SafeSaving
from crosskd_hf.training.step_monitor import NonFiniteLossError
from crosskd_hf.weights.mmdet import CheckpointError

OPTIONS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "learning_rate": 0.01}


def build(root: Path, name: str = "run", seed: int = 1, **options) -> DistillationTrainer:
    """A student of half its teacher's width: CrossKD trains adapters."""
    student = tiny_model(seed=seed, backbone="test_resnet", drop_path_rate=0.5, frozen_stages=0, head_channels=16)
    split = tiny_split(root / "data", images=7)
    args = tiny_args(root / name, **{**OPTIONS, **options})
    return DistillationTrainer(
        student,
        tiny_model(seed=2),
        args,
        train_dataset=split,
        eval_dataset=split,
        processing_class=tiny_processor(student),
    )


def adapters(trainer: DistillationTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.pair.methods.state_dict().items()}


def after_step(action) -> TrainerCallback:
    """A callback that calls `action(model)` after each step."""

    def on_step_end(args, state, control, model, **kwargs) -> None:
        action(model)

    callback = TrainerCallback()
    callback.on_step_end = on_step_end
    return callback


def test_the_pair_is_trained_and_the_model_is_the_student(tmp_path: Path) -> None:
    trainer, seen = build(tmp_path, ema_decay=0.5), []
    student, before = trainer.model, adapters(trainer)
    trainer.add_callback(after_step(lambda model: seen.append((model, trainer.model_wrapped))))
    trainer.train()
    assert all(model is student and wrapped is trainer.pair for model, wrapped in seen) and trainer.model is student
    grouped = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert grouped == sum(p.requires_grad for p in student.parameters()) + len(list(trainer.pair.methods.parameters()))
    assert before and not any(torch.equal(value, adapters(trainer)[name]) for name, value in before.items())
    checkpoint, names = trainer.run_folder / "checkpoint-4", set(student.state_dict())
    assert set(load_file(checkpoint / "model.safetensors")) == names
    assert set(load_file(checkpoint / METHODS_FILE)) == set(before)
    assert {key.removeprefix("module.") for key in load_file(checkpoint / AVERAGE_FILE)} == names | {"n_averaged"}
    # The average of the weights is what is saved for users, and evaluated.
    trainer.save_model()
    saved, weights = load_file(trainer.run_folder / "model.safetensors"), student.state_dict()
    assert_same(saved, trainer.average.model.state_dict())
    assert any(not torch.equal(value, weights[name]) for name, value in saved.items())
    assert not (trainer.run_folder / METHODS_FILE).exists()
    forward, evaluated = trainer.forward_images, []
    trainer.forward_images = lambda model, batch: (evaluated.append(model), forward(model, batch))[1]
    trainer.evaluate()
    assert evaluated and all(model is trainer.average.model for model in evaluated)


def test_it_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole = build(tmp_path, "whole", ema_decay=0.5)
    whole.train()
    expected = final_state(whole) | adapters(whole)
    cut = build(tmp_path, "cut", ema_decay=0.5)
    cut.add_callback(InterruptAt(3))
    with pytest.raises(Interrupted):
        cut.train()
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    again = build(tmp_path, "cut", seed=9, ema_decay=0.5)
    torch.manual_seed(999)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_same(expected, final_state(again) | adapters(again))
    assert_same(whole.average.model.state_dict(), again.average.model.state_dict())
    (checkpoint / METHODS_FILE).unlink()
    with pytest.raises(CheckpointError, match=METHODS_FILE):
        again.load_methods(checkpoint)


@pytest.mark.parametrize("most", [0.1, 0.0])
def test_gradients_are_clipped_with_those_of_the_methods(tmp_path: Path, most: float) -> None:
    trainer, norms = build(tmp_path, max_grad_norm=most, max_steps=2, save_strategy="no"), []

    def measure(args, state, control, **kwargs) -> None:
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trainer.pair.parameters() if p.grad is not None]))

    callback = TrainerCallback()
    callback.on_pre_optimizer_step = measure
    trainer.add_callback(callback)
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == 2 and min(logged) > 0.1, "before they are clipped"
    assert [norm.item() for norm in norms] == pytest.approx([0.1, 0.1] if most else logged, rel=1e-4)


def test_groups_of_a_pair(tmp_path: Path) -> None:
    """The student's backbone is slower; the methods' adapters are not. What is of no parameter is named at once."""
    trainer = build(tmp_path, backbone_lr_factor=0.5)
    slow = {id(p) for p in trainer.model.backbone.parameters() if p.requires_grad}
    weights, backbone = trainer.create_optimizer().param_groups  # the first one's rate is logged
    assert (weights["lr"], backbone["lr"], {id(p) for p in backbone["params"]}) == (0.01, 0.005, slow)
    assert {id(p) for p in trainer.pair.methods.parameters()} <= {id(p) for p in weights["params"]}
    with pytest.raises(ValueError, match="lr_factors: 'sampling_offsets' is in no parameter's name"):
        build(tmp_path, lr_factors={"sampling_offsets": 0.1})


def test_the_best_checkpoint_is_loaded_with_its_methods_and_average(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "max_steps": 4}
    trainer = build(tmp_path, ema_decay=0.5, **options)
    measured = trainer._metrics
    trainer._metrics = lambda *args: measured(*args) | {"AP": -abs(trainer.state.global_step - 2.0)}
    trainer.train()
    best = trainer.run_folder / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    assert_same(load_file(best / "model.safetensors"), trainer.model.state_dict())
    assert_same(load_file(best / METHODS_FILE), adapters(trainer))
    average = {key.removeprefix("module."): value for key, value in load_file(best / AVERAGE_FILE).items()}
    del average["n_averaged"]
    assert_same(average, trainer.average.model.state_dict())


def test_a_method_that_is_not_finite_is_found(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.add_callback(after_step(lambda model: next(trainer.pair.methods.parameters()).data.fill_(float("inf"))))
    with pytest.raises(NonFiniteLossError, match=r"methods\.crosskd\."):
        trainer.train()
    assert not list(trainer.run_folder.glob("checkpoint-*"))


def one_of_two(rank: int, port: int, root: str) -> None:
    equality.join(rank, 2, port)
    trainer = build(Path(root), save_strategy="no", max_steps=2, per_device_train_batch_size=1)
    before = adapters(trainer)
    trainer.train()
    ddp = isinstance(trainer.model_wrapped, DistributedDataParallel) and trainer.model_wrapped.module is trainer.pair
    assert ddp and not any(torch.equal(value, adapters(trainer)[name]) for name, value in before.items())
    torch.save(trainer.pair.state_dict(), Path(root, f"state{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_it_alike(tmp_path: Path) -> None:
    tiny_split(tmp_path / "data", images=7)
    run_processes(one_of_two, (equality.free_port(), str(tmp_path)), 2)
    first, second = (torch.load(tmp_path / f"state{rank}.pt", weights_only=True) for rank in range(2))
    assert_same(first, second)


def tiny_transformers_detector(tied: bool) -> PreTrainedModel:
    """One whose weights transformers renames as it saves them; with heads that share weights, if so told."""
    stages = ["stage2", "stage3", "stage4"] if tied else ["stage4"]
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=stages
    )
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 64}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "backbone_config": backbone}
    if tied:
        config = DeformableDetrConfig(**sizes, with_box_refine=True, two_stage=True)
        return DeformableDetrForObjectDetection(config)
    return DetrForObjectDetection(DetrConfig(**sizes))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_transformers_renames_are_all_resumed(tmp_path: Path, tied: bool) -> None:
    """`transformers.Trainer` would leave the renamed ones as they were drawn, with a warning."""
    saver, loader = (SafeSaving.__new__(SafeSaving) for _ in range(2))  # needs no run
    for trainer, seed in ((saver, 0), (loader, 1)):
        torch.manual_seed(seed)
        trainer.model, trainer.load_methods = tiny_transformers_detector(tied), lambda folder: None
        trainer.processing_class = tiny_processor(tiny_model())
        trainer.args = tiny_args(tmp_path / "run")
    saver.write_model(tmp_path / "weights", saver.model, save_original_format=False)
    loader.load_weights(tmp_path / "weights")
    assert_same(saver.model.state_dict(), loader.model.state_dict())
    assert_same(type(saver.model).from_pretrained(tmp_path / "weights").state_dict(), saver.model.state_dict())
