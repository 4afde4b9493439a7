import dataclasses
import json
from pathlib import Path

import pytest
import torch
from datasets import Image
from safetensors.torch import load_file
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split, write_tiny_coco, write_tiny_recipe
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from crosskd_hf.commands import main as cli
from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.stream import DetectionStream, load_stream
from crosskd_hf.distillation import PKD, CrossKD
from crosskd_hf.training import trainer as trainer_module
from crosskd_hf.training import trainer_inputs as checks
from crosskd_hf.training.arguments import DetectionTrainingArguments
from crosskd_hf.training.checkpoints import mark_complete
from crosskd_hf.training.distillation_trainer import DistillationTrainer
from crosskd_hf.training.step_monitor import NonFiniteLossError
from crosskd_hf.training.trainer import MAX_OVERFLOWS, DetectionTrainer


def distiller(tmp_path: Path, teacher, student=None, methods=None, **options) -> DistillationTrainer:
    student = student or tiny_model(seed=1)
    split = tiny_split(tmp_path / "data")
    return DistillationTrainer(
        student,
        teacher,
        tiny_args(tmp_path / "run", **options),
        train_dataset=split,
        eval_dataset=split,
        processing_class=tiny_processor(student),
        methods=methods,
    )


def test_a_distilled_run(tmp_path: Path) -> None:
    """The teacher stays as it is and out of what is saved; every term and clock is logged."""
    teacher = tiny_model(seed=2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = distiller(tmp_path, teacher, methods=[CrossKD(), PKD(PKD.Settings(2.0))])
    student = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    trainer.save_model()
    assert all(torch.equal(trainer.teacher.state_dict()[name], value) for name, value in before.items())
    assert not trainer.teacher.training
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert set(saved) == set(student)
    assert any(not torch.equal(saved[name], student[name]) for name in student)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3
    terms = ["loss_cls", "loss_box", "loss_dfl", "kd_cls", "kd_box", "kd_feature"]
    for entry in steps:
        assert {*terms, "learning_rate", "grad_norm"} <= set(entry)
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in terms), rel=1e-4)
        assert entry["data_time"] > 0 and entry["step_time"] > 0 and entry["memory_gb"] > 0


def poison(trainer: DetectionTrainer, name: str, value: float, at: int) -> None:
    """Have a loss term be a constant in one step."""
    original = trainer.loss_terms

    def poisoned(model, inputs):
        terms, outputs = original(model, inputs)
        if trainer.state.global_step + 1 == at:
            terms = terms | {name: terms.get(name, torch.zeros(())) * 0.0 + value}
        return terms, outputs

    trainer.loss_terms = poisoned


def healthy_checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("healthy")
    mark_complete(folder)
    return folder


@pytest.mark.parametrize(
    ("value", "logging", "saving"),
    [(float("nan"), 5, 99), (float("inf"), 99, 5), (float("nan"), 99, 99)],
    ids=["at a log", "at a save", "at the end"],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(
    tmp_path: Path, value: float, logging: int, saving: int
) -> None:
    options = {"logging_steps": logging, "save_strategy": "steps" if saving == 5 else "no", "save_steps": saving}
    trainer = distiller(tmp_path, tiny_model(seed=2), max_steps=6, save_total_limit=1, **options)
    poison(trainer, "kd_box", value, at=3)
    earlier = healthy_checkpoint(trainer.run_folder, 2)
    with pytest.raises(NonFiniteLossError, match=r"kd_box was not finite at step 3\b.*checkpoint-2,"):
        trainer.train()
    assert trainer.state.global_step == (6 if logging == saving else 5)
    assert [path.name for path in trainer.run_folder.glob("checkpoint-*")] == [earlier.name]


def test_an_infinite_loss_of_finite_gradients_stops_the_run(tmp_path: Path) -> None:
    trainer = distiller(tmp_path, tiny_model(seed=2), max_steps=1, logging_steps=99, save_strategy="steps")
    original = trainer.loss_terms
    infinite = {"loss_extra": torch.tensor(float("inf"))}
    trainer.loss_terms = lambda model, inputs: (original(model, inputs)[0] | infinite, None)
    with pytest.raises(NonFiniteLossError, match=r"loss_extra was not finite at step 1\b.*no checkpoint was saved"):
        trainer.train()
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert not list(trainer.run_folder.glob("checkpoint-*"))


class AfterStep(TrainerCallback):
    """Calls `action(step)` after each step."""

    def __init__(self, action):
        self.action = action

    def on_step_end(self, args, state, control, **kwargs):
        self.action(state.global_step)


@pytest.mark.parametrize(("where", "logging"), [("parameter", 2), ("buffer", 99), ("average", 99)])
def test_a_tensor_that_is_not_finite_is_not_saved(tmp_path: Path, where: str, logging: int) -> None:
    options = {"logging_steps": logging, "save_strategy": "steps", "save_steps": 1, "ema_decay": 0.5}
    trainer = distiller(tmp_path, tiny_model(seed=2), max_steps=3, **options)
    name = "backbone.body.bn1.running_var" if where == "buffer" else "head.cls_predictor.weight"

    def plant(step: int) -> None:
        if step == 2:
            model = trainer.average.model if where == "average" else trainer.model
            model.state_dict()[name].view(-1)[-1] = float("nan")

    trainer.add_callback(AfterStep(plant))
    told = f"the average of {name}" if where == "average" else f"student.{name}"
    with pytest.raises(NonFiniteLossError, match=rf"^{told} is not finite .*after step 2.*checkpoint-1,"):
        trainer.train()
    assert [path.name for path in trainer.run_folder.glob("checkpoint-*")] == ["checkpoint-1"]
    saved = load_file(trainer.run_folder / "checkpoint-1" / "model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


def test_evaluation_writes_results_and_finds_the_best_checkpoint(tmp_path: Path) -> None:
    model = tiny_model()
    split = tiny_split(tmp_path / "data")
    args = tiny_args(
        tmp_path / "run", max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2
    )
    trainer = DetectionTrainer(
        model, args, train_dataset=split, eval_dataset=split, processing_class=tiny_processor(model)
    )
    trainer.train()
    metrics = trainer.evaluate()
    written = json.loads((tmp_path / "run" / "evaluation" / "eval_metrics.json").read_text())
    assert written["AP50"] == metrics["eval_AP50"]
    assert {"AP/cat", "AP/dog"} <= set(written)
    results = json.loads((tmp_path / "run" / "evaluation" / "eval_predictions.json").read_text())
    assert {entry["image_id"] for entry in results} <= set(range(1, 6))
    assert {entry["category_id"] for entry in results} <= {3, 7}
    assert trainer.state.best_metric is not None
    assert (tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}").is_dir()
    predicted = trainer.predict(split)
    assert {"image_id", "category_id", "bbox", "score"} == set(predicted.predictions[0])


def test_a_tracker_that_is_not_installed_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks.TRACKER_PACKAGES, "tensorboard", lambda: False)
    args = tiny_args(tmp_path / "run", report_to=["tensorboard"])
    with pytest.raises(ValueError, match=r'report_to=tensorboard needs .*pip install -e "\.\[tracking\]"'):
        DetectionTrainer(tiny_model(), args)


def test_labels_that_differ_are_refused(tmp_path: Path) -> None:
    split = tiny_split(tmp_path / "data")
    model = tiny_model(id2label={0: "cat", 1: "bird"})
    with pytest.raises(ValueError, match=r"train_dataset has 2 labels \(cat, dog.*model 2 \(cat, bird"):
        DetectionTrainer(
            model, tiny_args(tmp_path / "run"), train_dataset=split, processing_class=tiny_processor(model)
        )
    model = tiny_model(id2label=dict(enumerate("abcdef")))
    with pytest.raises(ValueError, match=r"2 labels \(cat, dog\), the model 6 \(a, b, c, d, e, \.\.\.\)"):
        DetectionTrainer(
            model, tiny_args(tmp_path / "run"), eval_dataset=split, processing_class=tiny_processor(model)
        )
    model = tiny_model(id2label={0: "cat", 1: "Dog"})
    with pytest.raises(ValueError, match="model 'Dog', train_dataset 'dog'"):
        DetectionTrainer(
            model, tiny_args(tmp_path / "run"), train_dataset=split, processing_class=tiny_processor(model)
        )


def test_evaluating_on_data_of_other_classes_says_which_data_to_name(tmp_path: Path) -> None:
    write_tiny_coco(tmp_path / "data", 1, "val")
    model = tiny_model(id2label={0: "newt", 1: "bird"})
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model).save_pretrained(tmp_path / "model")
    command = ["evaluate", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--split", "val"]
    with pytest.raises(SystemExit, match=r"\(cat, dog\).*\(newt, bird\).*model was trained on .*--data") as raised:
        cli.main(command)
    assert "id2label" not in str(raised.value)


def test_the_precision_of_metrics_is_that_of_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, model = tiny_split(tmp_path / "data", 1), tiny_model()
    for setting, written in (("no", "fp32"), ("bf16", "bf16")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", setting)
        trainer = DetectionTrainer(
            model, tiny_args(tmp_path / "run"), eval_dataset=split, processing_class=tiny_processor(model)
        )
        trainer.evaluate()
        metrics = json.loads((tmp_path / "run" / "evaluation" / "eval_metrics.json").read_text())
        assert metrics["evaluation"]["precision"] == written


def test_a_teacher_that_does_not_fit_is_refused_before_data_is_read(tmp_path: Path) -> None:
    student, teacher = tiny_model(head_blocks=2), tiny_model(id2label={0: "newt", 1: "bird"})
    with pytest.raises(ValueError, match=r"student_tap_index: the tap is 3, the towers have 2 blocks") as error:
        DistillationTrainer(student, teacher, tiny_args(tmp_path / "run"))
    assert "student cat, dog; teacher newt, bird" in str(error.value)


def weights_after_a_step(folder: Path, images: int, batches: int, count: int = 2, first: int = 0) -> dict:
    """A step at a rate that shows the gradient, on some of two images of one size, without augmentation."""
    options = {"per_device_train_batch_size": images, "gradient_accumulation_steps": batches, "max_steps": 1}
    options |= {"learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0, "lr_milestones": None}
    options |= {"lr_scheduler_type": "constant"}
    model, split = tiny_model("retinanet"), tiny_split(folder / "data", images=4)
    taken = range(2 * first, 2 * (first + count), 2)  # every second one has 96 x 64 pixels
    split = dataclasses.replace(split, dataset=split.dataset.select(taken))
    data = DetectionDataset(split, train=True, short_side=64, long_side=96, flip_probability=0.0)
    args = tiny_args(folder / f"run{images}_{batches}_{first}", **options)
    DetectionTrainer(model, args, train_dataset=data, processing_class=tiny_processor(model)).train()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_accumulated_losses_are_means_of_batches(tmp_path: Path) -> None:
    """Each batch, here an image, is divided by its own number of positives, as in the reference."""
    before = dict(tiny_model("retinanet").named_parameters())
    accumulated = weights_after_a_step(tmp_path, 1, 2)
    singles = [weights_after_a_step(tmp_path, 1, 1, count=1, first=i) for i in range(2)]
    for name, weights in accumulated.items():
        steps = torch.stack([single[name] - before[name] for single in singles])
        torch.testing.assert_close(weights - before[name], steps.mean(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "options", "factors"),
    [
        ("cosine", {}, {0: 0, 1: 0.5, 2: 1, 4: 0.8535534, 6: 0.5, 10: 0}),  # (1 + cos(pi (t - 2) / 8)) / 2
        ("constant_with_warmup", {}, {0: 0, 1: 0.5, 2: 1, 10: 1}),
        # Flat for four steps, then in four to a half by a cosine; the warm-up begins at the half, too.
        (
            "warmup_stable_decay",
            {"num_decay_steps": 4, "min_lr_ratio": 0.5},
            {0: 0.5, 1: 0.75, 2: 1, 6: 1, 7: 0.9267767, 8: 0.75, 10: 0.5},
        ),
    ],
)
def test_transformers_schedules_keep_the_ratio_of_the_groups(
    tmp_path: Path, schedule: str, options: dict, factors: dict
) -> None:
    values = {"lr_milestones": None, "lr_scheduler_type": schedule, "warmup_steps": 2, "lr_scheduler_kwargs": options}
    args = tiny_args(tmp_path / "run", learning_rate=1.0, max_steps=10, backbone_lr_factor=0.25, **values)
    trainer = DetectionTrainer(tiny_model(), args)
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(10, optimizer)
    for step in range(11):
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        if step in factors:
            assert rates == pytest.approx({"rate x 0.25": factors[step] / 4, "weights": factors[step]}, abs=1e-6)
        optimizer.step()
        scheduler.step()


def test_models_can_be_named_by_folder_and_bring_their_processor(tmp_path: Path) -> None:
    tiny_model("fcos", backbone="resnet26", backbone_style="caffe").save_pretrained(tmp_path / "model")
    tiny_model(seed=2).save_pretrained(tmp_path / "teacher")
    trainer = DistillationTrainer(str(tmp_path / "model"), str(tmp_path / "teacher"), tiny_args(tmp_path / "run"))
    assert trainer.processing_class.do_flip_channel_order
    assert list(trainer.processing_class.image_std) == [1.0, 1.0, 1.0]
    assert trainer.processing_class.nms_threshold == 0.5
    reference = tiny_model(seed=2).head.state_dict()
    assert all(torch.equal(value, reference[name]) for name, value in trainer.teacher.head.state_dict().items())


def test_what_a_teacher_shares_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = tiny_model("fcos", backbone="resnet26", backbone_style="caffe", id2label={0: "dog", 1: "emu"})
    with caplog.at_level("INFO"):
        trainer = DistillationTrainer(tiny_model(), teacher, tiny_args(tmp_path / "run"))
    assert trainer.pair.pixels.flip
    levels = {"learnt without the teacher: cat": "WARNING", "its own normalisation and channel order": "INFO"}
    for text, level in levels.items():
        (record,) = [record for record in caplog.records if text in record.message]
        assert record.levelname == level


# On a GPU -----------------------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Whether each copy to the meta device is one that the host waits for."""

    def __init__(self):
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            self.waits.append(not kwargs.get("non_blocking"))
        return function(*args, **kwargs)


def test_only_what_the_model_reads_is_copied_and_without_waiting(tmp_path: Path, monkeypatch) -> None:
    split = tiny_split(tmp_path / "data")
    trainer = DetectionTrainer(tiny_model(), tiny_args(tmp_path / "run"), train_dataset=split)
    monkeypatch.setattr(DetectionTrainingArguments, "device", torch.device("meta"))
    with Copies() as copies:
        batch = next(iter(trainer.get_train_dataloader()))
        assert copies.waits == [] and {"image_id", "size", "orig_size"} <= set(batch["labels"])
        prepared = trainer.to_device(batch)
    assert copies.waits == [False] * 5
    assert set(prepared["labels"]) == {"boxes_xyxy", "class_labels", "mask"}
    assert all(value.is_meta for value in (*prepared["labels"].values(), prepared["pixel_values"]))
    assert batch["labels"]["image_id"].device.type == "cpu"


def overflowing(tmp_path: Path, bad_steps: int, **options) -> DetectionTrainer:
    """A run with GradScaler, the gradients of whose first steps overflow."""
    split, model = tiny_split(tmp_path / "data"), tiny_model()
    args = tiny_args(tmp_path / "run", **{"logging_steps": 2, **options})
    trainer = DetectionTrainer(model, args, train_dataset=split, processing_class=tiny_processor(model))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf") if trainer.state.global_step < bad_steps else gradient

    model.head.cls_predictor.weight.register_hook(overflow)
    return trainer


def test_fp16_that_overflows_in_every_step_stops(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trainer_module, "MAX_OVERFLOWS", 4)
    # 65536 is halved in each of the four steps.
    with pytest.raises(NonFiniteLossError, match=r"fp16 in each of 4 steps, up to step 4.* 4096 .*bf16"):
        overflowing(tmp_path, bad_steps=99, max_steps=9).train()
    assert (tmp_path / "run" / "checkpoint-4").is_dir()


def test_a_short_run_of_fp16_that_took_no_step_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert MAX_OVERFLOWS > 2
    overflowing(tmp_path, bad_steps=99, max_steps=2).train()
    assert "skipped all 2 steps" in caplog.text


def test_fp16_that_finds_its_scale_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trainer_module, "MAX_OVERFLOWS", 4)
    trainer = overflowing(tmp_path, bad_steps=3, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.accelerator.scaler.get_scale() == 2.0**13


class LastSeen(TrainerCallback):
    """What a tracker sees at the end of training."""

    def on_train_end(self, args, state, control, **kwargs):
        self.checkpoint = state.best_model_checkpoint


def test_other_callbacks_see_the_best_model_at_the_end(tmp_path: Path) -> None:
    model, split, seen = tiny_model(), tiny_split(tmp_path / "data"), LastSeen()
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = tiny_args(tmp_path / "run", max_steps=2, load_best_model_at_end=True, **each)
    DetectionTrainer(
        model, args, train_dataset=split, eval_dataset=split, processing_class=tiny_processor(model), callbacks=[seen]
    ).train()
    assert seen.checkpoint is not None and Path(seen.checkpoint).parent == tmp_path / "run"


@pytest.mark.parametrize(
    ("options", "plain_from"),
    [
        ({"max_steps": -1, "num_train_epochs": 4, "lr_milestones": []}, 3),
        ({"max_steps": -1, "num_train_epochs": 2.5, "lr_milestones": []}, 2),  # the third is half an epoch
        ({"max_steps": 9}, 2),  # of 3 steps each
        ({"max_steps": 10}, 3),
        ({"max_steps": 7, "gradient_accumulation_steps": 2}, 3),  # of 2 steps each
        ({"max_steps": 3, "num_train_epochs": 12}, None),
    ],
)
def test_the_data_set_learns_which_epochs_are_the_last(tmp_path: Path, options: dict, plain_from: int | None) -> None:
    model, split = tiny_model(), tiny_split(tmp_path / "data")
    data = DetectionDataset(split, train=True, augment=["iou_crop"], plain_epochs=1)
    trainer = DetectionTrainer(model, tiny_args(tmp_path / "run", **options), train_dataset=data)
    if plain_from is None:
        with pytest.raises(ValueError, match=r"data\.plain_epochs is 1, but the number of epochs 1: data"):
            trainer.train()
    else:
        trainer.get_train_dataloader()
        assert data.plain_from == plain_from


def test_workers_that_persist_stop_augmenting(tmp_path: Path) -> None:
    """A run whose last epoch is plain: images on a canvas of black pixels before it."""
    model, split = tiny_model(), tiny_split(tmp_path / "data")
    zoom = {"zoom_out": {"probability": 1, "side_range": [2, 2]}}
    data = DetectionDataset(split, train=True, short_side=64, long_side=96, augment=[zoom], plain_epochs=1)
    options = {"max_steps": 9, "dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = DetectionTrainer(model, tiny_args(tmp_path / "run", **options), train_dataset=data)
    largest = []

    def step(model, inputs, *args):
        boxes = inputs["labels"]["boxes_xyxy"]
        largest.append(float((boxes[..., 2:] - boxes[..., :2]).max()))
        return torch.zeros((), requires_grad=True)

    trainer.training_step = step
    trainer.train()
    plain = [largest[i : i + 3] for i in range(0, 9, 3)]
    assert max(map(max, plain[:2])) < min(plain[2])


def test_a_stream_has_no_epochs(tmp_path: Path) -> None:
    rows = tiny_split(tmp_path / "data").dataset.to_iterable_dataset()
    stream = DetectionStream(load_stream(rows), train=True)
    args = tiny_args(tmp_path / "run", max_steps=-1, num_train_epochs=20, save_strategy="epoch")
    with pytest.raises(
        ValueError, match=r"(?s)no epochs:.*max_steps is -1.*lr_milestones is \[8.*save_strategy is epoch"
    ):
        DetectionTrainer(tiny_model(), args, train_dataset=stream)
    args = tiny_args(tmp_path / "run", lr_milestones=None)
    with pytest.raises(ValueError, match=r"a data set must be a DetectionDataset or a DetectionSplit"):
        DetectionTrainer(tiny_model(), args, eval_dataset=stream)
    with pytest.raises(ValueError, match=r"unlabelled images can't be mixed into a stream"):
        unlabeled = tiny_split(tmp_path / "data")
        DistillationTrainer(tiny_model(), tiny_model(), args, train_dataset=stream, unlabeled_dataset=unlabeled)


def test_a_recipe_trains_on_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = write_tiny_recipe(tmp_path, lr_milestones=None, eval_strategy="steps", eval_steps=3)
    rows = tiny_split(tmp_path / "data").dataset.cast_column("image", Image(decode=False))
    rows = rows.map(lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}})
    rows.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    data = [f"data.path={tmp_path / 'parquet'}", "data.train_split=train", "data.val_split=train"]
    cli.main(["train", str(recipe), *data, "data.streaming=true"])
    told = capsys.readouterr().out
    assert "training images    streamed\nvalidation images  5\n" in told and "steps              3\n" in told
    with pytest.raises(SystemExit, match=r"data.unlabeled is x, but data.streaming true"):
        cli.main(["train", str(recipe), *data, "data.streaming=true", "data.unlabeled=x"])
