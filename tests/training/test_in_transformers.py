"""A detector in the hands of transformers: its plain Trainer, metrics and models that users make, trials, PEFT."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split
from transformers import EvalPrediction, Trainer, TrainingArguments

from crosskd_hf.data.collator import DetectionCollator
from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.sampler import SampleKey
from crosskd_hf.distillation import PKD, CrossKD
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor
from crosskd_hf.training.distillation_trainer import DistillationTrainer
from crosskd_hf.training.trainer import DetectionTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = {"short_side": 64, "long_side": 96}


def detections(evaluated: EvalPrediction, processor: DenseDetectorImageProcessor) -> dict[str, float]:
    """As transformers' script for object detection goes through it: `loss_dict`, `logits`, `pred_boxes` per batch."""
    images, boxes, scores = [], 0, 0.0
    for batch, targets in zip(evaluated.predictions, evaluated.label_ids, strict=True):
        outputs = SimpleNamespace(logits=torch.tensor(batch[1]), pred_boxes=torch.tensor(batch[2]))
        sizes = torch.tensor(np.array([target["orig_size"] for target in targets]))
        found = processor.post_process_object_detection(outputs, 0.0, sizes)
        scores += sum(one["scores"].sum().item() for one in found)
        for target in targets:
            assert target["boxes"].shape == (len(target["class_labels"]), 4) and (target["boxes"] <= 1).all()
            images.append(int(target["image_id"][0]))
            boxes += len(target["boxes"])
    return {"images": len(set(images)), "boxes": boxes, "scores": scores}


@pytest.mark.parametrize("batches", [True, False])
def test_the_plain_trainer_with_its_defaults(tmp_path: Path, batches: bool) -> None:
    """It drops keys that no model knows from items that are dicts, and evaluates with labels.

    Four images: of a last batch that isn't full, accelerate's `gather_for_metrics` cuts each tensor of the labels.
    """
    split, model = tiny_split(tmp_path / "data", images=4), tiny_model(head_blocks=1)
    processor = tiny_processor(model)
    args = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_do_concat_batches=not batches,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        args,
        data_collator=DetectionCollator(processor),
        train_dataset=DetectionDataset(split, train=True, **SIZE),
        eval_dataset=DetectionDataset(split, train=False, **SIZE),
        compute_metrics=(lambda evaluated: detections(evaluated, processor)) if batches else None,
    )
    before = [parameter.clone() for parameter in model.parameters()]
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"])
    if batches:
        assert metrics["eval_images"] == len(split) and metrics["eval_boxes"] > 0


def test_an_index_is_augmented_anew_each_time_and_a_key_is_not(tmp_path: Path) -> None:
    data = DetectionDataset(tiny_split(tmp_path), train=True, **SIZE)
    of_index = {tuple(data[0]["boxes"][0, ::2].tolist()) for _ in range(20)}
    of_key = {tuple(data[SampleKey(0, 0)]["boxes"][0, ::2].tolist()) for _ in range(20)}
    assert len(of_index) == 2 and len(of_key) == 1 and of_key < of_index
    (left, right), (other_left, other_right) = of_index
    width = data[0]["size"][1]
    assert (other_left, other_right) == pytest.approx((width - right, width - left))


@pytest.mark.parametrize("padded", [True, False])
def test_metrics_of_a_user_are_added_to_cocos(tmp_path: Path, padded: bool) -> None:
    split, model = tiny_split(tmp_path / "data"), tiny_model(head_blocks=1)
    processor = tiny_processor(model)
    trainer = DetectionTrainer(
        model,
        tiny_args(tmp_path / "run"),
        eval_dataset=split,
        processing_class=processor,
        data_collator=None if padded else DetectionCollator(processor),
        compute_metrics=lambda evaluated: detections(evaluated, processor),
    )
    metrics = trainer.evaluate()
    boxes = sum(len(objects["bbox"]) for objects in split.dataset["objects"])
    assert metrics["eval_images"] == len(split) and metrics["eval_boxes"] == boxes and "eval_AP" in metrics
    assert trainer.predict(split).metrics["test_scores"] == pytest.approx(metrics["eval_scores"])


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), 0.5])
def test_metrics_of_a_user_are_numbers_under_their_names(tmp_path: Path, value) -> None:
    given = {"mine": value, "eval_yours": value}
    split = tiny_split(tmp_path / "data")
    trainer = DetectionTrainer(
        tiny_model(head_blocks=1), tiny_args(tmp_path), eval_dataset=split, compute_metrics=lambda _: given
    )
    metrics = trainer.evaluate()
    assert {type(metrics[name]) for name in ("eval_mine", "eval_yours")} == {float}
    given["AP"] = 1.0
    with pytest.raises(ValueError, match=r"compute_metrics gives AP, which COCO's"):
        trainer.evaluate()


def test_a_new_model_is_treated_as_the_first(tmp_path: Path) -> None:
    """Marked, checked; trials of any backend."""
    labels = [{0: "cat", 1: "dog"}]
    split = tiny_split(tmp_path / "data")
    trainer = DetectionTrainer(
        args=tiny_args(tmp_path / "run", standalone=True),
        train_dataset=split,
        model_init=lambda: tiny_model(head_blocks=1, id2label=labels[-1]),
    )
    trainer.call_model_init({"learning_rate": 0.1}).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_crosskd.py").exists() and trainer.args.output_dir.endswith("run-0")
    labels.append({0: "dog", 1: "cat"})
    with pytest.raises(ValueError, match="train_dataset has 2 labels"):
        trainer.call_model_init()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match="optimizers can't be given with model_init"):
        DetectionTrainer(args=tiny_args(tmp_path), model_init=tiny_model, optimizers=(optimizer, None))


def test_a_model_is_made_for_each_training(tmp_path: Path) -> None:
    """And a pair around it; a trial has a folder of its own."""
    made, split = [], tiny_split(tmp_path / "data")

    def model_init(trial):
        made.append(tiny_model(seed=1))
        return made[-1]

    trainer = DistillationTrainer(
        teacher=tiny_model(seed=2, head_channels=16),
        args=tiny_args(tmp_path / "run", max_steps=1),
        train_dataset=split,
        model_init=model_init,
        methods=[CrossKD(), PKD(PKD.Settings(weight=2.0))],
    )
    first, folders = trainer.pair, []
    for trial in (SimpleNamespace(number=0, params={}), SimpleNamespace(number=1, params={}), None):
        trainer.call_model_init(trial)
        folders.append(trainer.args.output_dir)
    assert folders == [str(tmp_path / "run" / "run-0"), str(tmp_path / "run" / "run-1"), str(tmp_path / "run")]
    trainer.train()
    assert trainer.model is made[-1] is trainer.pair.student and trainer.pair is not first
    assert [type(method) for method in trainer.pair.methods.values()] == [CrossKD, PKD]
    assert trainer.pair.methods["pkd"].settings.weight == 2.0
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.pair.parameters() if p.requires_grad}
    assert not torch.equal(made[-1].head.cls_predictor.weight, made[0].head.cls_predictor.weight)


def test_optuna_searches(tmp_path: Path) -> None:
    """Two trials of a pair, each in a folder of its own; the better one is found by COCO's AP."""
    pytest.importorskip("optuna")
    split, rates, seen = tiny_split(tmp_path / "data"), [1e-4, 1e-3], []
    trainer = DistillationTrainer(
        teacher=tiny_model(seed=2),
        args=tiny_args(tmp_path / "run", max_steps=2, eval_strategy="steps", eval_steps=2, save_strategy="steps"),
        train_dataset=split,
        eval_dataset=split,
        model_init=lambda: tiny_model(seed=1),
    )

    def objective(metrics: dict) -> float:
        seen.append((trainer.args.learning_rate, metrics["eval_AP"]))
        return trainer.args.learning_rate

    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        compute_objective=objective,
        n_trials=4,
        direction="maximize",
        backend="optuna",
    )
    assert best.objective == best.hyperparameters["learning_rate"] == max(rate for rate, _ in seen)
    assert len(seen) == 4 and {rate for rate, _ in seen} <= {*rates}
    assert {path.name for path in (tmp_path / "run").glob("run-*")} == {f"run-{number}" for number in range(4)}


def test_a_peft_model_is_refused_in_one_line(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["cls_tower.0.conv"]))
    with pytest.raises(ValueError, match=r"PEFT.*merge_and_unload\(\)"):
        DetectionTrainer(model, tiny_args(tmp_path), train_dataset=tiny_split(tmp_path / "data"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "a model or a model_init"),
        ({"model": "x", "model_init": tiny_model}, "a model or a model_init"),
        ({"model": SimpleNamespace(merge_and_unload=None)}, r"PEFT.*merge_and_unload\(\)"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DetectionTrainer(args=tiny_args(tmp_path), **given)
