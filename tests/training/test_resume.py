"""Interrupted and resumed runs against undisturbed ones, bit for bit."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import equality
import pytest
import torch
from paths import BENCHMARKS
from processes import CONTEXT, run_processes
from safetensors.torch import load_file, save_file
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split
from transformers import EarlyStoppingCallback, TrainerCallback

from crosskd_hf.data.coco import load_coco
from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.stream import DetectionStream, load_stream
from crosskd_hf.distillation import CrossKD, SoftBoxes
from crosskd_hf.training import checkpoints
from crosskd_hf.training.averaging import AVERAGE_FILE
from crosskd_hf.training.checkpoints import last_complete_checkpoint
from crosskd_hf.training.distillation_trainer import DistillationTrainer
from crosskd_hf.training.trainer import DetectionTrainer
from crosskd_hf.weights.mmdet import CheckpointError

# 7 images in batches of 2 are 4 batches an epoch, so that checkpoints 3 and 6 and the end lie in mid-epoch, both with
# 1 and with 2 batches accumulated.
OPTIONS = {
    "max_steps": 7,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "per_device_eval_batch_size": 4,
    "lr_milestones": [1],
    "learning_rate": 0.01,
}


class Interrupted(Exception):
    pass


class InterruptAt(TrainerCallback):
    """Ends a run at a step, after it was saved if it was."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


def build(
    root: Path,
    name: str,
    teacher: bool = False,
    model_seed: int = 1,
    unlabeled: bool = False,
    stream: bool = False,
    **options,
) -> DetectionTrainer:
    """A trainer with drop path, flips and several scales; the run's folder is `root/name`."""
    model = tiny_model(seed=model_seed, backbone="test_resnet", drop_path_rate=0.5, frozen_stages=0)
    split = tiny_split(root / "data", images=7)
    size = {"short_side": 64, "long_side": 96}
    train: Any = DetectionDataset(split, train=True, multiscale="choice", multiscale_short_sides=(48, 64), **size)
    if stream:
        rows = split.dataset.to_iterable_dataset(num_shards=2)
        train = DetectionStream(load_stream(rows, shuffle_buffer=4), train=True, **size)
    args = tiny_args(root / name, **{**OPTIONS, **options})
    common = {"train_dataset": train, "eval_dataset": split, "processing_class": tiny_processor(model)}
    if unlabeled:
        common |= {"unlabeled_dataset": DetectionDataset(split.first(5), train=True, **size)}
        common |= {"methods": [CrossKD(), SoftBoxes(SoftBoxes.Settings(score_threshold=0.1, max_boxes=5))]}
    if teacher:
        return DistillationTrainer(model, tiny_model(seed=2, backbone="test_resnet"), args, **common)
    return DetectionTrainer(model, args, **common)


def final_state(trainer: DetectionTrainer) -> dict:
    """Everything that the next step would depend on."""
    optimizer = trainer.optimizer.state_dict()
    momenta = {f"{i}.{name}": value for i, entry in optimizer["state"].items() for name, value in entry.items()}
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    rates = [group["lr"] for group in optimizer["param_groups"]]
    schedule = {key: value for key, value in trainer.lr_scheduler.state_dict().items() if key != "lr_lambdas"}
    steps = trainer.state.global_step, trainer.state.epoch
    return {**weights, **momenta, "rates": rates, "schedule": schedule, "rng": torch.get_rng_state(), "steps": steps}


def assert_same(one: dict, other: dict) -> None:
    assert set(one) == set(other)
    different = [
        name
        for name, value in one.items()
        if not (torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name])
    ]
    assert not different, f"{len(different)} of {len(one)} differ: {different[:5]}"


UNDISTURBED: dict[str, dict] = {}  # options -> final state, for all tests that compare with it


def undisturbed(root: Path, **options) -> dict:
    """The final state of a run that nothing interrupts."""
    key = repr(sorted(options.items()))
    if key not in UNDISTURBED:
        trainer = build(root, "undisturbed", **options)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        UNDISTURBED[key] = after = final_state(trainer)
        assert any(not torch.equal(value, after[name]) for name, value in before.items())
    return UNDISTURBED[key]


def interrupted(root: Path, step: int, **options) -> None:
    trainer = build(root, "cut", **options)
    trainer.add_callback(InterruptAt(step))
    with pytest.raises(Interrupted):
        trainer.train()


def resumed(root: Path, expected: str, **options) -> dict:
    """Resume in a new trainer, with other weights and another random state than the checkpoint's."""
    checkpoint = last_complete_checkpoint(root / "cut")
    assert Path(checkpoint).name == expected
    trainer = build(root, "cut", model_seed=9, **options)
    torch.manual_seed(999)
    trainer.train(resume_from_checkpoint=checkpoint)
    return final_state(trainer)


@pytest.mark.parametrize(
    "schedule",
    ["cosine", *(pytest.param(s, marks=pytest.mark.slow) for s in ("constant_with_warmup", "warmup_stable_decay"))],
)
def test_groups_schedules_and_the_average_are_resumed(tmp_path: Path, schedule: str) -> None:
    options = {"lr_milestones": None, "lr_scheduler_type": schedule, "warmup_steps": 4, "eval_strategy": "no"}
    if schedule == "warmup_stable_decay":
        options["lr_scheduler_kwargs"] = {"num_decay_steps": 2, "min_lr_ratio": 0.5}
    options |= {"backbone_lr_factor": 0.5, "lr_factors": {"cls_predictor": 0.25}, "no_decay": "norms_and_biases"}
    options |= {"ema_decay": 0.9, "ema_warmup_steps": 3, "max_grad_norm": 0.1}
    whole = undisturbed(tmp_path, **options)
    assert len(whole["rates"]) == 6, "backbone, class predictor and the rest, decayed or not"
    interrupted(tmp_path, 5, **options)
    assert_same(whole, resumed(tmp_path, "checkpoint-3", **options))
    averages = [load_file(tmp_path / run / "checkpoint-6" / AVERAGE_FILE) for run in ("undisturbed", "cut")]
    assert_same(*averages)
    assert averages[0]["n_averaged"] == 1 + 6, "the initial weights and six updates"


@pytest.mark.parametrize(("workers", "accumulation", "teacher"), [(0, 1, False), (2, 2, True)])
def test_a_run_resumed_in_mid_epoch_ends_as_an_undisturbed_one(
    tmp_path: Path, workers: int, accumulation: int, teacher: bool
) -> None:
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": accumulation, "teacher": teacher}
    whole = undisturbed(tmp_path, **options)
    interrupted(tmp_path, 5, **options)
    assert_same(whole, resumed(tmp_path, "checkpoint-3", **options))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_on_a_stream_is_resumed_in_its_second_pass(tmp_path: Path, workers: int) -> None:
    options = {"dataloader_num_workers": workers, "stream": True, "lr_milestones": None}
    whole = undisturbed(tmp_path, **options)
    interrupted(tmp_path, 6, **options)
    assert_same(whole, resumed(tmp_path, "checkpoint-6", **options))


def test_a_run_with_unlabelled_images_is_resumed(tmp_path: Path) -> None:
    """An epoch has 4 labelled and 4 unlabelled batches: it is resumed in mid-epoch, and ends in the next."""
    options = {"teacher": True, "unlabeled": True, "max_steps": 10, "eval_strategy": "no", "lr_milestones": []}
    whole = undisturbed(tmp_path, **options)
    interrupted(tmp_path, 5, **options)
    assert_same(whole, resumed(tmp_path, "checkpoint-3", **options))
    state = json.loads((tmp_path / "cut" / "checkpoint-9" / "trainer_state.json").read_text())
    kinds = ["unlabeled_loss_cls" in entry for entry in state["log_history"] if "loss" in entry]
    assert kinds == [False, True] * 4 + [False], "each step has its own kind of terms"
    assert any(entry.get("unlabeled_kd_cls", 0) > 0 for entry in state["log_history"])


@pytest.mark.parametrize(
    "options",
    [
        # The checkpoint of step 4 comes before the evaluation of the epoch's end, which must draw no random numbers.
        {"save_steps": 4, "eval_strategy": "epoch", "optim": "adamw_torch_fused"},
        {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True},
        # Workers that live on are seeded once per run, others once per epoch.
        pytest.param(
            {
                "save_steps": 2,
                "dataloader_num_workers": 1,
                "dataloader_persistent_workers": True,
                "eval_strategy": "no",
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["adam, evaluated after saving", "by epoch", "persistent workers"],
)
def test_a_run_resumed_between_epochs_ends_as_an_undisturbed_one(tmp_path: Path, options: dict) -> None:
    options = {"max_steps": 10, **options}
    whole = undisturbed(tmp_path, **options)
    interrupted(tmp_path, 6, **options)
    expected = "checkpoint-6" if options.get("save_steps") == 2 else "checkpoint-4"
    assert_same(whole, resumed(tmp_path, expected, **options))


def test_a_damaged_checkpoint_costs_steps_but_no_difference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = undisturbed(tmp_path)
    trainer = build(tmp_path, "cut")
    weights = list(trainer.model.state_dict())
    trainer.train()
    os.truncate(tmp_path / "cut" / "checkpoint-7" / "optimizer.pt", 1000)
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut short")
    assert_same(whole, resumed(tmp_path, "checkpoint-6"))
    assert "optimizer.pt has 1000 bytes" in caplog.text
    # Checkpoint 7 was written again. A finished run takes no further step from it.
    again = resumed(tmp_path, "checkpoint-7")
    assert again["steps"] == whole["steps"]
    assert_same({name: whole[name] for name in weights}, {name: again[name] for name in weights})


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint-*"))


def test_a_checkpoint_is_removed_once_the_next_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path, "cut", save_total_limit=1, eval_strategy="no")
    seen = []
    original = checkpoints.put_in_place

    def noting(partial, folder):
        seen.append(names(folder.parent))
        original(partial, folder)
        seen.append(names(folder.parent))

    monkeypatch.setattr("crosskd_hf.training.saving.put_in_place", noting)
    trainer.train()
    assert seen == [
        *(["checkpoint-3.partial"], ["checkpoint-3"]),
        *(["checkpoint-3", "checkpoint-6.partial"], ["checkpoint-3", "checkpoint-6"]),
        *(["checkpoint-6", "checkpoint-7.partial"], ["checkpoint-6", "checkpoint-7"]),
    ]
    assert names(tmp_path / "cut") == ["checkpoint-7"]
    saved = torch.load(tmp_path / "cut" / "checkpoint-7" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == trainer.args.save_total_limit == 1


def test_a_disk_that_fills_up_while_saving_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = undisturbed(tmp_path)
    trainer = build(tmp_path, "cut")

    def full(output_dir):
        if output_dir.endswith("-6.partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        DetectionTrainer._save_rng_state(trainer, output_dir)

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    with pytest.raises(OSError, match=r"the disk is full: .*checkpoint-6 needs about .*checkpoint-3, is intact"):
        trainer.train()
    assert names(tmp_path / "cut") == ["checkpoint-3"]
    assert_same(whole, resumed(tmp_path, "checkpoint-3"))


def train_cut(root: Path) -> None:
    build(root, "cut").train()


def test_a_run_killed_while_it_saves_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """SIGKILL once the second checkpoint's folder is there, under another name."""
    whole = undisturbed(tmp_path)
    process = CONTEXT.Process(target=train_cut, args=(tmp_path,))
    process.start()
    partial = tmp_path / "cut" / "checkpoint-6.partial"
    while not partial.exists() and process.is_alive():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it could be killed"
    (partial / "stale").touch()
    assert_same(whole, resumed(tmp_path, "checkpoint-3"))
    assert load_file(tmp_path / "cut" / "checkpoint-7" / "model.safetensors").keys() <= whole.keys()
    assert names(tmp_path / "cut") == ["checkpoint-6", "checkpoint-7"]
    assert not (tmp_path / "cut" / "checkpoint-6" / "stale").exists()


@pytest.mark.parametrize("change", ["missing", "unexpected", "of another shape"])
def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path, change: str) -> None:
    """transformers would resume with random weights in place of the missing ones."""
    trainer, path = build(tmp_path, "cut"), tmp_path / "checkpoint-3" / "model.safetensors"
    weights, name = dict(trainer.model.state_dict()), "head.cls_predictor.weight"
    if change == "missing":
        del weights[name]
    else:
        weights[name if change == "of another shape" else "head.more"] = torch.zeros(3)
    path.parent.mkdir()
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"checkpoint-3/model\.safetensors.*head\."):
        trainer.load_weights(path.parent)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "processes"), [(2, 1), (0, 2)])
def test_a_run_killed_at_random_ends_as_an_undisturbed_one(tmp_path: Path, workers: int, processes: int) -> None:
    script = BENCHMARKS / "kill_and_resume.py"
    options = ["--kills", "2", "--steps", "40", "--workers", str(workers), "--processes", str(processes)]
    command = [sys.executable, str(script), *options, "--output", str(tmp_path / "kills")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_callback_counts_the_evaluations_before_a_resume(tmp_path: Path) -> None:
    """Noise gives no AP, so that patience ends both runs after the same evaluation."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 9}
    options |= {"load_best_model_at_end": True, "restore_callback_states_from_checkpoint": True}
    ends = []
    for name in ("undisturbed", "cut"):
        trainer = build(tmp_path, name, **options)
        trainer.add_callback(EarlyStoppingCallback(3))
        if name == "cut":
            trainer.add_callback(InterruptAt(3))
            with pytest.raises(Interrupted):
                trainer.train()
            trainer = build(tmp_path, name, **options)
            trainer.add_callback(EarlyStoppingCallback(3))
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / name))
        ends.append(trainer.state.global_step)
    assert ends[0] == ends[1] < 9


def test_changed_rates_are_taken_and_momenta_kept(tmp_path: Path) -> None:
    """transformers would keep the checkpoint's rates, whatever the arguments say."""
    interrupted(tmp_path, 5)
    checkpoint = last_complete_checkpoint(tmp_path / "cut")
    trainer = build(tmp_path, "cut", learning_rate=0.004, weight_decay=0.5, lr_gamma=0.5, max_steps=4)
    momenta = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            momenta.extend(float(s["momentum_buffer"].norm()) for s in trainer.optimizer.state.values())

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=checkpoint)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == [0.01, 0.01, 0.01, 0.004], "the milestone comes after step 4"
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.5}
    assert trainer.lr_scheduler.get_last_lr() == [0.002]
    assert sum(momenta) > 0


def elsewhere(rank: int, world: int, port: int, root: str, steps: int) -> None:
    """One of `world` processes that train up to a step, at a global batch of 4, and note what they saw."""
    if world > 1:
        equality.join(rank, world, port)
    folder = Path(root)
    model = tiny_model(seed=1, backbone="test_resnet", frozen_stages=0)
    split = load_coco(folder / "data", "mini", cache_dir=str(folder / "data" / "cache"))
    data = DetectionDataset(split, train=True, short_side=64, long_side=96)
    options = {**OPTIONS, "eval_strategy": "no", "save_steps": 3, "max_steps": 9}
    args = tiny_args(folder / "run", **options, gradient_accumulation_steps=2 // world)
    trainer = DetectionTrainer(model, args, train_dataset=data, processing_class=tiny_processor(model))
    seen, original = [], trainer.get_batch_samples

    def noting(*args, **kwargs):
        batches, count = original(*args, **kwargs)
        seen.append([batch["labels"]["image_id"].tolist() for batch in batches])
        return batches, count

    trainer.get_batch_samples = noting
    trainer.add_callback(InterruptAt(steps))
    with contextlib.suppress(Interrupted):
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder / "run"))
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    (folder / f"seen_{steps}_{rank}.json").write_text(json.dumps({"seen": seen, "rates": rates}))
    if world > 1:
        torch.distributed.destroy_process_group()


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """From 1 to 2 and back: the images and learning rates of every step are those of an undisturbed run."""
    tiny_split(tmp_path / "data", images=8)
    port = equality.free_port()

    def run(world: int, steps: int) -> tuple[list[list[int]], dict]:
        if world == 1:
            elsewhere(0, 1, port, str(tmp_path), steps)
        else:
            run_processes(elsewhere, (world, port, str(tmp_path), steps), world)
        notes = [json.loads((tmp_path / f"seen_{steps}_{rank}.json").read_text()) for rank in range(world)]
        per_step = zip(*(note["seen"] for note in notes), strict=True)
        images = [[image for batches in step for batch in batches for image in batch] for step in per_step]
        return [sorted(ids) for ids in images], notes[0]["rates"]

    whole, rates = run(1, 9)
    shutil.rmtree(tmp_path / "run")
    images, seen_rates = [], {}
    for world, steps in ((1, 3), (2, 6), (1, 9)):
        seen, seen_rates = run(world, steps)
        images += seen[: steps - len(images)]  # the interrupted run had fetched one more
    assert images == whole and len(whole) == 9
    assert seen_rates == rates and len(set(rates.values())) == 2
    assert [folder.name for folder in checkpoints.checkpoint_folders(tmp_path / "run")][-1] == "checkpoint-9"
