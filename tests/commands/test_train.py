"""Recipes from the command line: dry run, training, evaluation, conversion, and what is refused."""

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from tiny import tiny_model, tiny_split, write_tiny_coco

from crosskd_hf.commands import main as cli
from crosskd_hf.commands import train
from crosskd_hf.commands.errors import explain
from crosskd_hf.data.errors import DataError
from crosskd_hf.recipe import build, run_folder
from crosskd_hf.recipe.build import build_trainer
from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.recipe.packaged import carried_recipes
from crosskd_hf.weights.mmdet import reference_keys, to_reference

SMALL = {"backbone": "resnet18", "fpn_channels": 32, "head_channels": 32}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """CrossKD GFL -> GFL on five noise images, three steps."""
    write_tiny_coco(tmp_path / "data")
    content = {
        "model": {"detector": "gfl", "backbone_weights": "random", **SMALL},
        "teacher": {"checkpoint": "random", "detector": "gfl", **SMALL},
        "distillation": {"crosskd": {"tap_index": 3}},
        "data": {
            "path": str(tmp_path / "data"),
            "train_split": "mini",
            "val_split": "mini",
            "short_side": 64,
            "long_side": 96,
            "cache_dir": str(tmp_path / "cache"),
        },
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 3,
            "warmup_steps": 0,
            "learning_rate": 1e-4,
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_dry_run_describes_and_stops(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    train.main([str(recipe), "training.gradient_accumulation_steps=4", "--dry-run"])
    printed = capsys.readouterr().out
    assert "training images    5" in printed and "validation images  5" in printed
    # 2 images x 1 process x 4 accumulated, 0.01-style scaling to a batch of 16: 1e-4 * 8 / 16
    assert "effective batch    8 (2 a device x 1 processes x 4 accumulated)" in printed
    assert "learning rate      5e-05 (0.0001 at batch 16)" in printed
    assert "steps              3 (1 an epoch)" in printed
    assert not (recipe.parent / "run").exists(), "nothing is written"


def test_what_is_missing_is_the_recipe_alone(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main([])
    assert capsys.readouterr().err.strip().endswith("the following arguments are required: recipe")


def test_overrides_may_stand_behind_options(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["training.max_steps=7", "--dry-run", "training.seed=3", "data.max_train_images=4"]
    for main in (train.main, lambda argv: cli.main(["train", *argv])):
        main([str(recipe), *words])
        printed = capsys.readouterr().out
        assert "steps              7" in printed and "training images    4" in printed
    with pytest.raises(SystemExit, match="2"):
        train.main([str(recipe), "--dryrun"])
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evaluate", "model", "training.seed=3"])


def test_a_recipe_runs_and_its_resolved_copy_runs_again(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    train.main([str(recipe)])
    run = recipe.parent / "run"
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "recipe.yaml"} <= {
        path.name for path in run.iterdir()
    }
    first = json.loads((run / "evaluation" / "eval_metrics.json").read_text())
    again = recipe.parent / "again"
    train.main([str(run / "recipe.yaml"), f"training.output_dir={again}"])
    assert json.loads((again / "evaluation" / "eval_metrics.json").read_text()) == first
    # The same numbers from the saved model
    capsys.readouterr()
    cli.main(["evaluate", str(run), "--workers", "0", "--output-dir", str(recipe.parent / "evaluated")])
    (path,) = (recipe.parent / "evaluated" / "evaluation").glob("*_metrics.json")
    evaluated = json.loads(path.read_text())
    settings, own = evaluated.pop("evaluation"), first.pop("evaluation")
    assert evaluated == first and {**settings, "step": own["step"]} == own and own["step"] == 3
    assert {"split": "mini", "data": "data", "nms_threshold": 0.6, "precision": "fp32"}.items() <= settings.items()
    assert path.name == f"evaluate_mini_{settings['images']}_metrics.json"
    printed = capsys.readouterr().out
    assert "AP50" in printed and "step" not in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.backbon=resnet50"], "backbon"),
        (["data.path=nowhere"], "nowhere"),
        (["teacher.checkpoint=nowhere.pth"], "nowhere.pth doesn't exist"),
        (["teacher.head_blocks=2"], "head_blocks"),
        (["model.backbone=resnet5"], "resnet5"),
        (["model.backbone=vit_tiny_patch16_224"], "strides"),
        (["training.max_steps=many"], "max_steps"),
        (["training.output_dir="], "training.output_dir"),
        (["training.learning_rate=90", "training.base_batch_size=1"], "learning_rate 90 at a batch of 1 is 180"),
        (["training.max_steps=0"], "training.max_steps is 0"),
        (["training.max_steps=-1", "training.warmup_steps=100"], "training.warmup_steps=3"),  # 12 x 3 steps
        (["model.backbone_weights=nowhere.pth"], "model.backbone_weights nowhere.pth"),
    ],
)
def test_what_cannot_work_ends_in_one_message(recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main([str(recipe), *overrides])
    # A message as code is what Python prints to stderr, ending with status 1.
    assert isinstance(ended.value.code, str) and message in ended.value.code


def test_an_interrupted_run_says_how_it_goes_on(
    recipe: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = [str(recipe), "training.max_steps=3", "training.save_strategy=steps", "training.save_steps=1"]
    with monkeypatch.context() as patched:
        steps = iter([None, None])

        def step(*args, **kwargs):
            if next(steps, "third") == "third":
                raise KeyboardInterrupt

        patched.setattr("crosskd_hf.training.trainer._TrainingHooks.on_pre_optimizer_step", step)
        with pytest.raises(SystemExit) as ended:
            train.main(saving)
    assert ended.value.code == 130
    assert "interrupted: the same command goes on from the last checkpoint" in capsys.readouterr().err
    train.main(saving)
    assert f"goes on from {recipe.parent / 'run' / 'checkpoint-2'}" in capsys.readouterr().out


def test_a_teacher_taken_out_is_one_change(recipe: Path) -> None:
    (recipe.parent / "run").mkdir()
    load_recipe(recipe).save(recipe.parent / "run" / "recipe.yaml")
    with pytest.raises(SystemExit) as ended:
        train.main([str(recipe), "teacher=null", "distillation=null"])
    lines = [line for line in str(ended.value.code).splitlines() if "teacher." in line]
    assert len(lines) == 1 and lines[0].startswith("  - teacher.checkpoint: was ") and lines[0].endswith("is None")


@pytest.mark.parametrize("detector", ["gfl", "retinanet", "fcos", "atss"])
def test_converted_checkpoints_predict_the_same(recipe: Path, detector: str) -> None:
    model = tiny_model(detector).eval()
    state = {name: to_reference(key, model.state_dict()[key]) for key, name in reference_keys(model).items()}
    file = recipe.parent / "reference.pth"
    torch.save({"meta": {"CLASSES": ("cat", "dog")}, "state_dict": state}, file)
    folder = recipe.parent / "converted"
    content = yaml.safe_load(recipe.read_text())
    content["teacher"] |= {"detector": detector}
    recipe.write_text(yaml.safe_dump(content))
    cli.main(["convert", str(file), str(folder), "--recipe", str(recipe), "--teacher"])
    from transformers import AutoModelForObjectDetection

    again = AutoModelForObjectDetection.from_pretrained(folder).eval()
    assert again.config.id2label == {0: "cat", 1: "dog"}
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(again(pixels).pred_boxes, model(pixels).pred_boxes)
    with pytest.raises(SystemExit):
        cli.main(["convert", str(file), str(folder), "--recipe", str(recipe), "--teacher"])


@pytest.mark.parametrize("name", sorted(carried_recipes()))
def test_every_recipe_takes_a_step_when_made_small(name: str, tmp_path: Path) -> None:
    """Its own detector, styles, schedule and distillation; a small backbone of the same kind, and noise images."""
    tiny_split(tmp_path / "data")
    backbones = {"swin_tiny_patch4_window7_224.ms_in1k": "swin_tiny_patch4_window7_224", "caffe": "resnet26"}
    full = load_recipe(name)

    def small(section: str) -> list[str]:
        part = getattr(full, section)
        backbone = backbones.get(part.backbone, "resnet18")
        backbone = backbones["caffe"] if part.backbone_style == "caffe" else backbone
        return [f"{section}.backbone={backbone}", f"{section}.fpn_channels=32", f"{section}.head_channels=32"]

    overrides = [
        *small("model"),
        "model.backbone_weights=random",
        f"data.path={tmp_path / 'data'}",
        "data.layout=coco",
        "data.train_split=mini",
        "data.val_split=mini",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.short_side=64",
        "data.long_side=96",
        "training.use_cpu=true",
        "training.dataloader_num_workers=0",
        f"training.output_dir={tmp_path / 'run'}",
    ]
    if full.data.multiscale != "none":
        overrides.append("data.multiscale_short_sides=[48, 64]")
    if full.teacher:
        overrides += [*small("teacher"), "teacher.checkpoint=random"]
    recipe = load_recipe(name, overrides)
    trainer = build_trainer(recipe)
    trainer.trained_module().train()
    batch = trainer.to_device(next(iter(trainer.get_train_dataloader())))
    trainer.create_optimizer_and_scheduler(100)
    terms, _ = trainer.loss_terms(trainer.trained_module(), batch)
    assert all(term.isfinite() for term in terms.values()), terms
    assert any(key.startswith("kd_") for key in terms) == (full.teacher is not None)
    torch.stack(list(terms.values())).sum().backward()
    trainer.optimizer.step()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_an_interrupted_run_goes_on_only_with_its_own_settings(recipe: Path) -> None:
    save = ["training.save_strategy=steps", "training.save_steps=2"]
    train.main([str(recipe), *save])
    with pytest.raises(SystemExit, match=r"learning_rate: was 0.0001, is 0.001"):
        train.main([str(recipe), *save, "training.learning_rate=1e-3"])
    train.main([str(recipe), *save, "training.logging_steps=2"])


def test_the_command_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["crosskd_hf", "train", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("crosskd_hf", run_name="__main__", alter_sys=True)
    assert ended.value.code == 0 and "recipe" in capsys.readouterr().out


def test_a_finished_run_is_not_run_again(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    train.main([str(recipe)])
    weights = recipe.parent / "run" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    capsys.readouterr()
    train.main([str(recipe)])
    printed = capsys.readouterr().out
    assert "holds this run, finished" in printed and "AP50" in printed
    assert weights.stat().st_mtime_ns == before


def test_a_power_cut_at_the_end_loses_no_run(
    recipe: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, command = recipe.parent / "run", [str(recipe), "training.save_strategy=steps", "training.save_steps=3"]
    flushed, replace, fsync = [], os.replace, os.fsync
    before_state: set[int] = set()

    def replacing(source, target):
        if Path(target) == run / run_folder.STATE_FILE:
            before_state.update(flushed)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda file: (flushed.append(os.fstat(file).st_ino), fsync(file)))
        patched.setattr(os, "replace", replacing)
        train.main(command)
    names = ("model.safetensors", "config.json", "preprocessor_config.json", "evaluation/eval_metrics.json")
    assert {run / name for name in names if (run / name).stat().st_ino not in before_state} == set()
    assert run_folder.is_finished(run)

    (run / run_folder.STATE_FILE).write_text("")
    capsys.readouterr()
    train.main(command)
    printed = capsys.readouterr().out
    assert "finished" not in printed and f"goes on from {run / 'checkpoint-3'}" in printed and "AP50" in printed
    assert run_folder.is_finished(run) and "eval_AP" in run_folder.final_metrics(run)


def test_a_short_trial_takes_one_override(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    content = yaml.safe_load(recipe.read_text())
    del content["training"]["max_steps"]
    recipe.write_text(yaml.safe_dump({**content, "training": {**content["training"], "warmup_steps": 30}}))
    train.main([str(recipe), "training.max_steps=2"])
    printed = capsys.readouterr().out
    assert "training.warmup_steps 0 instead of 30" in printed and "step 2/2" in printed
    train.main([str(recipe), "training.num_train_epochs=1", "--dry-run", f"training.output_dir={recipe.parent / 'x'}"])
    printed = capsys.readouterr().out
    assert "training.warmup_steps 2 instead of 30" in printed and "lr_milestones [0.6667, 0.9167]" in printed


def test_a_recipes_warm_up_gets_shorter_for_small_data(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["training"] |= {"max_steps": -1, "warmup_steps": 500}
    recipe.write_text(yaml.safe_dump(content))
    train.main([str(recipe), "--dry-run"])  # 12 x 3 steps
    assert "training.warmup_steps 3 instead of 500" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "expected"), [("", "fp32"), ("bf16", "bf16, .*accelerate.*ACCELERATE_MIXED_PREC")])
def test_the_precision_in_effect_is_told(
    recipe: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    if given:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", given)
    train.main([str(recipe), "--dry-run"])
    assert re.search(f"precision +{expected}", capsys.readouterr().out)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_goes_on_when_its_output_is_closed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        train.main([str(recipe)])
    assert run_folder.is_finished(recipe.parent / "run")


def test_random_weights_are_not_frozen(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build_trainer(load_recipe(recipe, ["teacher=null", "distillation=null"])).model
    assert all(parameter.requires_grad for parameter in model.parameters()) and model.config.frozen_stages == 0
    assert "model.frozen_stages is 0 instead of 1" in caplog.text


def test_out_of_memory_while_a_run_is_built_is_one_message(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(build, "build_model", fail)
    with pytest.raises(SystemExit, match=r"OutOfMemoryError: .*can't allocate memory"):
        train.main([str(recipe)])


def test_a_folder_of_something_else_is_not_written_to(recipe: Path) -> None:
    train.main([str(recipe)])
    with pytest.raises(SystemExit, match=r"max_steps: was 3, is 4"):
        train.main([str(recipe), "training.max_steps=4"])
    foreign = recipe.parent / "foreign"
    tiny_model().save_pretrained(foreign)
    with pytest.raises(SystemExit, match=r"foreign holds config\.json, model\.safetensors, .* no recipe\.yaml"):
        train.main([str(recipe), f"training.output_dir={foreign}"])
    (recipe.parent / "other" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"other holds checkpoint-3, "):
        train.main([str(recipe), f"training.output_dir={recipe.parent / 'other'}"])


def test_a_run_goes_on_with_its_teacher_only(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its weights: they may have been trained anew at the same path, and one path has several names."""
    folder, run = recipe.parent / "teacher", recipe.parent / "run"
    tiny_model().save_pretrained(folder)
    monkeypatch.chdir(recipe.parent)
    teacher = ["teacher.backbone=resnet18", "training.save_strategy=steps", "training.save_steps=1"]
    train.main([str(recipe), f"teacher.checkpoint={folder}", *teacher])
    (run / run_folder.STATE_FILE).unlink()  # as if it had been killed at its end
    train.main([str(recipe), "teacher.checkpoint=teacher", *teacher])
    (run / run_folder.STATE_FILE).unlink()
    tiny_model(seed=7).save_pretrained(folder)
    with pytest.raises(SystemExit, match="holds a run that learnt from other weights than its teacher has now"):
        train.main([str(recipe), f"teacher.checkpoint={folder}", *teacher])


def test_another_evaluation_does_not_change_a_finished_run(recipe: Path) -> None:
    train.main([str(recipe)])
    run = recipe.parent / "run"
    before = run_folder.final_metrics(run)
    files = {path: path.read_bytes() for path in (run / "evaluation").iterdir()}
    cli.main(["evaluate", str(run), "--workers", "0", "--max-images", "1"])
    assert run_folder.final_metrics(run) == before and "eval_AP/cat" in before
    assert {path: path.read_bytes() for path in files} == files
    written = json.loads((run / "evaluation" / "evaluate_mini_1_metrics.json").read_text())
    assert written["evaluation"]["images"] == 1
    for count in ("0", "-1"):
        with pytest.raises(SystemExit, match=f"--max-images must be at least 1, got {count}"):
            cli.main(["evaluate", str(run), "--max-images", count])
    (run / "recipe.yaml").unlink()
    with pytest.raises(SystemExit, match=r"recipe\.yaml.*--recipe.*--data"):
        cli.main(["evaluate", str(run)])


def relabelled(recipe: Path, name: str, categories: list[str]) -> str:
    """The override for the recipe's images with other categories."""
    folder = recipe.parent / name
    shutil.copytree(recipe.parent / "data", folder)
    path = folder / "annotations" / "instances_mini.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": i, "name": c} for i, c in zip((3, 7, 9), categories, strict=False)]
    path.write_text(json.dumps(content))
    return f"data.path={folder}"


def test_a_run_goes_on_with_its_classes_only(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    """In their order, whatever is accepted; and a refusal leaves the folder as it was."""
    command = [str(recipe), "training.save_strategy=steps", "training.save_steps=3"]
    train.main(command)
    run = recipe.parent / "run"
    (run / run_folder.STATE_FILE).unlink()  # as if it had been killed at its end
    notes = {name: (run / name).read_bytes() for name in ("recipe.yaml", run_folder.TEACHER_FILE)}
    swapped, more = relabelled(recipe, "swapped", ["dog", "cat"]), relabelled(recipe, "more", ["cat", "dog", "cow"])
    for change, known in (([swapped], "2 classes (dog, cat)"), ([more], "3 classes (cat, dog, cow)")):
        for option in ([], ["--dry-run"]):
            with pytest.raises(SystemExit) as ended:
                train.main([*command, *change, "--accept-changes", *option])
            message = str(ended.value.code)
            assert f"checkpoint-3 was trained on 2 classes (cat, dog), the data has {known}" in message
            assert "another training.output_dir" in message
            assert {name: (run / name).read_bytes() for name in notes} == notes
    capsys.readouterr()
    train.main(command)
    assert f"goes on from {run / 'checkpoint-3'}" in capsys.readouterr().out


def test_changes_are_written_down_once_the_checkpoint_fits(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked: list[str] = []
    monkeypatch.setattr("crosskd_hf.training.tracking.log_text", lambda trainer, name, text: tracked.append(text))
    command = [str(recipe), "training.save_strategy=steps", "training.save_steps=3"]
    command += ["teacher=null", "distillation=null"]
    train.main(command)
    run = recipe.parent / "run"
    (run / run_folder.STATE_FILE).unlink()
    before = (run / "recipe.yaml").read_text()
    with pytest.raises(SystemExit, match=r"begun without training\.ema_decay"):
        train.main([*command, "training.ema_decay=0.9", "--accept-changes"])
    assert (run / "recipe.yaml").read_text() == before
    train.main([*command, "training.learning_rate=1e-3", "--accept-changes"])
    assert load_recipe(run / "recipe.yaml").training["learning_rate"] == 1e-3
    assert tracked == [before, (run / "recipe.yaml").read_text()]


def test_a_message_from_a_data_worker_is_the_message_alone() -> None:
    text = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
    error = DataError(text + "crosskd_hf.data.errors.DataError: image 3 (3.png) does not exist")
    assert explain(error) == "DataError: image 3 (3.png) does not exist"
    assert explain(DataError("plain: text")) == "DataError: plain: text"


def test_the_same_seed_gives_the_same_new_weights(recipe: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        overrides = [f"training.seed={seed}", "teacher=null", "distillation=null"]
        return build_trainer(load_recipe(recipe, overrides)).model.head.cls_tower[0].conv.weight.detach()

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_a_detector_is_fine_tuned_to_other_classes(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = tiny_model(id2label={0: "ant", 1: "bee", 2: "cow"})
    trained.save_pretrained(recipe.parent / "trained")
    overrides = [f"model.checkpoint={recipe.parent / 'trained'}", "teacher=null", "distillation=null"]
    model = build_trainer(load_recipe(recipe, overrides)).model
    assert model.config.id2label == {0: "cat", 1: "dog"} and model.head.cls_predictor.out_channels == 2
    assert "knows 3 classes (ant, bee, cow, ...), the data has 2" in caplog.text
    old, new = trained.state_dict(), model.state_dict()
    changed = {name for name in new if not torch.equal(old[name], new[name])}
    assert changed == {"head.cls_predictor.weight", "head.cls_predictor.bias"}
    assert new["head.cls_predictor.weight"].abs().mean() > 0
