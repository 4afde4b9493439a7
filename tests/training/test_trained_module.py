"""A trainer that trains a module around its model: what DDP wraps, what is saved where, and how it resumes."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file, save_file
from test_resume import InterruptAt, Interrupted, assert_same, final_state
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split
from torch import Tensor, nn
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
from transformers.utils import ModelOutput

from crosskd_hf.data.coco import load_coco
from crosskd_hf.training.averaging import AVERAGE_FILE
from crosskd_hf.training.saving import SafeSaving
from crosskd_hf.training.step_monitor import NonFiniteLossError
from crosskd_hf.training.trainer import DetectionTrainer

METHODS_FILE = "methods.safetensors"
OPTIONS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "learning_rate": 0.01}


class Around(nn.Module):
    """A student, and one parameter more that is trained with it."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student
        self.methods = nn.ModuleDict({"scale": nn.Linear(1, 1, bias=False)})
        nn.init.constant_(self.methods["scale"].weight, 0.5)

    @property
    def config(self):
        return self.student.config

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels=None) -> ModelOutput:
        output = self.student(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=labels)
        extra = (self.methods["scale"](output.loss.float()[None]) - 3).square().sum()
        terms = output.loss_dict | {"kd_extra": 0.01 * extra}
        return ModelOutput(loss=sum(terms.values()), loss_dict=terms)

    def save_methods(self, folder: Path) -> None:
        save_file(self.methods.state_dict(), folder / METHODS_FILE)

    def load_methods(self, folder: Path) -> None:
        self.methods.load_state_dict(load_file(folder / METHODS_FILE))


class AroundTrainer(DetectionTrainer):
    """Trains it. `trainer.model` is the student."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pair = Around(self.model)

    def trained_module(self) -> Around:
        return self.pair

    def save_methods(self, folder: Path) -> None:
        self.pair.save_methods(folder)

    def load_methods(self, folder: Path) -> None:
        self.pair.load_methods(folder)


def build(root: Path, name: str = "run", seed: int = 1, **options) -> AroundTrainer:
    (root / "data").mkdir(exist_ok=True)
    model = tiny_model(seed=seed, backbone="test_resnet", drop_path_rate=0.5, frozen_stages=0)
    split = tiny_split(root / "data", images=7)
    args = tiny_args(root / name, **{**OPTIONS, **options})
    return AroundTrainer(model, args, split, split, tiny_processor(model))


class Seen(TrainerCallback):
    """The models that callbacks get, and what the wrapped one is."""

    def __init__(self, trainer: DetectionTrainer):
        self.trainer, self.models, self.wrapped = trainer, [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.models += [model, self.trainer.model]
        self.wrapped.append(self.trainer.model_wrapped)


def extra(trainer: AroundTrainer) -> float:
    return trainer.pair.methods["scale"].weight.item()


def state(trainer: AroundTrainer) -> dict:
    methods = {f"methods.{name}": value for name, value in trainer.pair.methods.state_dict().items()}
    return final_state(trainer) | methods


def test_the_module_is_trained_and_the_model_is_the_students(tmp_path: Path) -> None:
    trainer = build(tmp_path, ema_decay=0.5)
    student, seen = trainer.model, Seen(trainer)
    trainer.add_callback(seen)
    trainer.train()
    assert {id(model) for model in seen.models} == {id(student)} and trainer.model is student
    assert {id(wrapped) for wrapped in seen.wrapped} == {id(trainer.pair)}
    trained = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert trained == sum(p.requires_grad for p in student.parameters()) + 1
    assert extra(trainer) != 0.5
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all({"kd_extra", "loss_cls"} <= set(entry) for entry in logs)
    checkpoint, names = trainer.run_folder / "checkpoint-4", set(student.state_dict())
    assert set(load_file(checkpoint / "model.safetensors")) == names
    assert set(load_file(checkpoint / METHODS_FILE)) == {"scale.weight"}
    assert {key.removeprefix("module.") for key in load_file(checkpoint / AVERAGE_FILE)} == names | {"n_averaged"}
    trainer.save_model()
    saved = load_file(trainer.run_folder / "model.safetensors")
    assert set(saved) == names and not (trainer.run_folder / METHODS_FILE).exists()
    assert "eval_AP" in trainer.evaluate()


def test_it_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole = build(tmp_path, "whole", ema_decay=0.5)
    whole.train()
    cut = build(tmp_path, "cut", ema_decay=0.5)
    cut.add_callback(InterruptAt(3))
    with pytest.raises(Interrupted):
        cut.train()
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    again = build(tmp_path, "cut", seed=9, ema_decay=0.5)
    torch.manual_seed(999)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_same(state(whole), state(again))
    assert_same(whole.average.model.state_dict(), again.average.model.state_dict())
    (checkpoint / METHODS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=METHODS_FILE):
        build(tmp_path, "cut").train(resume_from_checkpoint=str(checkpoint))


def test_it_can_be_trained_twice(tmp_path: Path) -> None:
    trainer = build(tmp_path, save_strategy="no", max_steps=2)
    trainer.train()
    before = extra(trainer)
    trainer.train()
    assert extra(trainer) != before and trainer.model_wrapped is trainer.pair


def test_the_best_of_both_is_loaded(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = build(tmp_path, **options)
    measured = trainer._metrics
    trainer._metrics = lambda *args: measured(*args) | {"AP": -abs(trainer.state.global_step - 2.0)}
    trainer.train()
    best = trainer.run_folder / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    assert_same(load_file(best / "model.safetensors"), trainer.model.state_dict())
    assert extra(trainer) == float(load_file(best / METHODS_FILE)["scale.weight"])


def test_what_is_not_finite_around_the_model_is_found(tmp_path: Path) -> None:
    trainer = build(tmp_path)

    class Plant(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.pair.methods["scale"].weight.data.fill_(float("inf"))

    trainer.add_callback(Plant())
    with pytest.raises(NonFiniteLossError, match=r"methods\.scale\.weight"):
        trainer.train()
    assert not list(trainer.run_folder.glob("checkpoint-*"))


def test_the_whole_module_runs_in_the_precision_of_training(tmp_path: Path) -> None:
    trainer = build(tmp_path, bf16=True, max_steps=1, save_strategy="no")
    found = []
    trainer.model.head.register_forward_hook(lambda module, args, output: found.append(output.logits[0].dtype))
    trainer.train()
    assert found == [torch.bfloat16] and trainer.model.dtype == torch.float32


def one_of_two(rank: int, port: int, root: str, resume: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    folder = Path(root)
    model = tiny_model(seed=9 if resume else 1, backbone="test_resnet", frozen_stages=0)
    split = load_coco(folder / "data", "mini", cache_dir=str(folder / "data" / "cache"))
    args = tiny_args(folder / "run", **{**OPTIONS, "save_steps": 1, "max_steps": 3, "per_device_train_batch_size": 1})
    trainer = AroundTrainer(model, args, split, None, tiny_processor(model))
    trainer.train(resume_from_checkpoint=resume or None)
    total = sum(float(value.double().sum()) for value in trainer.model.state_dict().values())
    ddp = isinstance(trainer.model_wrapped, DistributedDataParallel) and trainer.model_wrapped.module is trainer.pair
    note = {"extra": extra(trainer), "total": total, "ddp": ddp}
    (folder / f"note{rank}.json").write_text(json.dumps(note))
    torch.distributed.destroy_process_group()


def test_two_processes_train_and_resume_it_alike(tmp_path: Path) -> None:
    tiny_split(tmp_path / "data", images=8)
    notes = []
    for resume in ("", str(tmp_path / "run" / "checkpoint-1")):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        run_processes(one_of_two, (port, str(tmp_path), resume), 2)
        notes += [json.loads((tmp_path / f"note{rank}.json").read_text()) for rank in range(2)]
    assert all(note == notes[0] for note in notes)
    assert notes[0]["ddp"] and notes[0]["extra"] != 0.5


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
    saver, loader = SafeSaving(), SafeSaving()
    for trainer, seed in ((saver, 0), (loader, 1)):
        torch.manual_seed(seed)
        trainer.model, trainer.load_methods = tiny_transformers_detector(tied), lambda folder: None
        trainer.processing_class = tiny_processor(tiny_model())
        trainer.args = tiny_args(tmp_path / "run")
    saver.write_model(tmp_path / "weights", saver.model, save_original_format=False)
    loader.load_weights(tmp_path / "weights")
    assert_same(saver.model.state_dict(), loader.model.state_dict())
    assert_same(type(saver.model).from_pretrained(tmp_path / "weights").state_dict(), saver.model.state_dict())
