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
from tiny import tiny_model, tiny_split, write_tiny_recipe
from transformers import AutoModelForObjectDetection

from crosskd_hf.commands import main as cli
from crosskd_hf.commands import train
from crosskd_hf.commands.errors import explain
from crosskd_hf.data.errors import DataError
from crosskd_hf.recipe import build, run_folder
from crosskd_hf.recipe.build import build_trainer
from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.weights.mmdet import reference_keys, to_reference


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a run that is over; its last checkpoint and its teacher are there."""
    recipe = write_tiny_recipe(tmp_path_factory.mktemp("finished"))
    tiny_model().save_pretrained(recipe.parent / "teacher")
    saving = ["training.save_strategy=steps", "training.save_steps=3"]
    command = [str(recipe), f"teacher.checkpoint={recipe.parent / 'teacher'}", *saving]
    train.main(command)
    return command


@pytest.fixture
def run(finished: list[str]) -> Path:
    return Path(finished[0]).parent / "run"


def test_a_dry_run_describes_and_stops(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    hub = ["training.push_to_hub=true", "training.hub_model_id=me/x"]  # without a network, to which nothing is sent
    train.main([str(recipe), "training.gradient_accumulation_steps=4", *hub, "--dry-run"])
    printed = capsys.readouterr().out
    assert "training images    5" in printed and "validation images  5" in printed
    # 2 images x 1 process x 4 accumulated, scaled linearly to a batch of 16: 1e-4 * 8 / 16
    assert "effective batch    8 (2 a device x 1 processes x 4 accumulated)" in printed
    assert "learning rate      5e-05 (0.0001 at batch 16)" in printed
    assert "steps              3 (1 an epoch)" in printed and re.search("precision +fp32", printed)
    assert not (recipe.parent / "run").exists(), "nothing is written"


def test_recipes_are_tried_without_a_network(capsys: pytest.CaptureFixture) -> None:
    """Those of transformers' detectors, whose teacher and ImageNet weights are fetched otherwise."""
    small = "teacher.config.backbone_config.backbone=resnet18d.ra2_in1k"
    words = ["rtdetrv2_r18_crosskd", "--dry-run", "--random-weights", "data.layout=shapes", "data.max_train_images=8"]
    train.main([*words, "data.max_val_images=4", "model.config.decoder_layers=2", "training.use_cpu=true", small])
    assert "rt_detr_v2" in capsys.readouterr().out


def test_a_dry_run_tells_the_groups_of_parameters(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    train.main([str(recipe), "training.lr_factors={head: 1e-1}", "training.base_batch_size=null", "--dry-run"])
    groups = re.findall(r"(weights|rate x 0.1): \d+\.\d+ M parameters, learning rate (\S+),", capsys.readouterr().out)
    assert sorted(groups) == [("rate x 0.1", "1e-05"), ("weights", "0.0001")]
    with pytest.raises(SystemExit, match=r"lr_factors: 'heads' is in no parameter's name\. Did you mean head"):
        train.main([str(recipe), "training.lr_factors={heads: 0.1}", "--dry-run"])


def test_overrides_may_stand_behind_options(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["training.max_steps=7", "--dry-run", "training.seed=3", "data.max_train_images=4"]
    cli.main(["train", str(recipe), *words])
    printed = capsys.readouterr().out
    assert "steps              7" in printed and "training images    4" in printed
    for wrong in (["train", str(recipe), "--dryrun"], ["evaluate", "model", "training.seed=3"], ["train"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(wrong)


def test_the_resolved_copy_of_a_recipe_runs_again(finished: list[str], run: Path, tmp_path: Path, capsys) -> None:
    files = ("model.safetensors", "config.json", "preprocessor_config.json", "recipe.yaml")
    assert all((run / name).is_file() for name in files)
    first = json.loads((run / "evaluation" / "eval_metrics.json").read_text())
    train.main([str(run / "recipe.yaml"), f"training.output_dir={tmp_path / 'again'}"])
    assert json.loads((tmp_path / "again" / "evaluation" / "eval_metrics.json").read_text()) == first
    # The same numbers from the saved model.
    capsys.readouterr()
    cli.main(["evaluate", str(run), "--workers", "0", "--output-dir", str(tmp_path)])
    (path,) = (tmp_path / "evaluation").glob("*_metrics.json")
    evaluated = json.loads(path.read_text())
    settings, of_the_run = evaluated.pop("evaluation"), first.pop("evaluation")
    assert evaluated == first and {**settings, "step": 3} == of_the_run
    assert {"split": "mini", "data": "data", "nms_threshold": 0.6, "precision": "fp32"}.items() <= settings.items()
    assert path.name == f"evaluate_mini_{settings['images']}_metrics.json"
    printed = capsys.readouterr().out
    assert "AP50" in printed and "step" not in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=nowhere"], "nowhere"),
        (["teacher.checkpoint=nowhere.pth"], "nowhere.pth doesn't exist"),
        (["model.backbone=resnet5"], "resnet5"),
        (["model.backbone=vit_tiny_patch16_224"], "strides"),
        (["training.learning_rate=90", "training.base_batch_size=1"], "learning_rate 90 at a batch of 1 is 180"),
        (["training.max_steps=-1", "training.warmup_steps=100"], "training.warmup_steps=3"),  # 12 x 3 steps
        (["model.backbone_weights=nowhere.pth"], "model.backbone_weights nowhere.pth"),
    ],
)
def test_what_cannot_work_ends_in_one_message(recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main([str(recipe), *overrides])
    # A message as code is what Python prints to stderr, ending with status 1.
    assert isinstance(ended.value.code, str) and message in ended.value.code


def test_a_finished_run_is_not_run_again(finished: list[str], run: Path, capsys: pytest.CaptureFixture) -> None:
    before = (run / "model.safetensors").stat().st_mtime_ns
    train.main(finished)
    printed = capsys.readouterr().out
    assert "holds this run, finished" in printed and "AP50" in printed
    assert (run / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_of_something_else_is_not_written_to(finished: list[str], run: Path, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "foreign")
    (tmp_path / "other" / "checkpoint-3").mkdir(parents=True)
    for override, message in (
        ("training.max_steps=4", r"max_steps: was 3, is 4"),
        ("training.learning_rate=1e-3", r"learning_rate: was 0.0001, is 0.001"),
        (f"training.output_dir={tmp_path / 'foreign'}", r"config\.json, model\.safetensors, .* no recipe\.yaml"),
        (f"training.output_dir={tmp_path / 'other'}", r"other holds checkpoint-3, "),
    ):
        with pytest.raises(SystemExit, match=message):
            train.main([*finished, override])


def test_another_evaluation_does_not_change_a_finished_run(finished: list[str], run: Path) -> None:
    before = run_folder.final_metrics(run)
    files = {path: path.read_bytes() for path in (run / "evaluation").iterdir()}
    cli.main(["evaluate", str(run), "--workers", "0", "--max-images", "1"])
    assert run_folder.final_metrics(run) == before and "eval_AP/cat" in before
    assert {path: path.read_bytes() for path in files} == files
    written = json.loads((run / "evaluation" / "evaluate_mini_1_metrics.json").read_text())
    assert written["evaluation"]["images"] == 1
    with pytest.raises(SystemExit, match="--max-images must be at least 1, got 0"):
        cli.main(["evaluate", str(run), "--max-images", "0"])
    with pytest.raises(SystemExit, match=r"recipe\.yaml.*--recipe.*--data"):
        cli.main(["evaluate", str(run / "checkpoint-3")])


@pytest.fixture
def unfinished(run: Path) -> Path:
    """As if the run had been killed at its end."""
    (run / run_folder.STATE_FILE).unlink(missing_ok=True)
    return run


def test_a_run_resumes_with_its_teacher_only(finished: list[str], unfinished: Path, monkeypatch) -> None:
    """By its weights: they may have been trained anew at the same path, and one path has several names."""
    monkeypatch.chdir(unfinished.parent)
    train.main([*finished, "teacher.checkpoint=teacher", "--dry-run"])
    tiny_model(seed=7).save_pretrained("teacher")
    with pytest.raises(SystemExit, match="holds a run that learnt from other weights than its teacher has now"):
        train.main([*finished, "--dry-run"])
    tiny_model().save_pretrained("teacher")


def relabelled(folder: Path, name: str, categories: list[str]) -> str:
    """The override for the recipe's images with other categories."""
    shutil.copytree(folder / "data", folder / name)
    path = folder / name / "annotations" / "instances_mini.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": i, "name": c} for i, c in zip((3, 7, 9), categories, strict=False)]
    path.write_text(json.dumps(content))
    return f"data.path={folder / name}"


def test_a_run_resumes_with_its_classes_only(finished: list[str], unfinished: Path) -> None:
    """In their order, whatever is accepted; and a refusal leaves the folder as it was."""
    notes = {name: (unfinished / name).read_bytes() for name in ("recipe.yaml", run_folder.TEACHER_FILE)}
    changes = {"2 classes (dog, cat)": ["dog", "cat"], "3 classes (cat, dog, cow)": ["cat", "dog", "cow"]}
    for known, categories in changes.items():
        change = relabelled(unfinished.parent, f"of_{len(categories)}", categories)
        with pytest.raises(SystemExit) as ended:
            train.main([*finished, change, "--accept-changes"])
        message = str(ended.value.code)
        assert f"checkpoint-3 was trained on 2 classes (cat, dog), the data has {known}" in message
        assert "another training.output_dir" in message
        assert {name: (unfinished / name).read_bytes() for name in notes} == notes


def test_a_power_cut_at_the_end_loses_no_run(
    finished: list[str], unfinished: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What belongs to a run is on the disk before the file that says that it is finished."""
    (unfinished / run_folder.STATE_FILE).write_text("")
    flushed, replace, fsync = [], os.replace, os.fsync
    before_state: set[int] = set()

    def replacing(source, target):
        if Path(target) == unfinished / run_folder.STATE_FILE:
            before_state.update(flushed)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "replace", replacing)
    train.main(finished)
    names = ("model.safetensors", "config.json", "preprocessor_config.json", "evaluation/eval_metrics.json")
    assert [name for name in names if (unfinished / name).stat().st_ino not in before_state] == []
    printed = capsys.readouterr().out
    assert f"resumes from {unfinished / 'checkpoint-3'}" in printed and "AP50" in printed
    assert run_folder.is_finished(unfinished) and "eval_AP" in run_folder.final_metrics(unfinished)


def test_changes_are_written_down_once_the_checkpoint_fits(finished: list[str], unfinished: Path, monkeypatch) -> None:
    tracked: list[str] = []
    monkeypatch.setattr("crosskd_hf.training.tracking.log_text", lambda trainer, name, text: tracked.append(text))
    before = (unfinished / "recipe.yaml").read_text()
    with pytest.raises(SystemExit, match=r"begun without training\.ema_decay"):
        train.main([*finished, "training.ema_decay=0.9", "--accept-changes"])
    assert (unfinished / "recipe.yaml").read_text() == before
    train.main([*finished, "training.learning_rate=1e-3", "--accept-changes"])
    assert load_recipe(unfinished / "recipe.yaml").training["learning_rate"] == 1e-3
    assert tracked[-1] == (unfinished / "recipe.yaml").read_text()


def test_an_interrupted_run_says_how_it_goes_on(
    recipe: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("crosskd_hf.training.trainer._TrainingHooks.on_pre_optimizer_step", interrupt)
    with pytest.raises(SystemExit) as ended:
        train.main([str(recipe)])
    assert ended.value.code == 130
    assert "interrupted: the same command resumes from the last checkpoint" in capsys.readouterr().err


def test_a_teacher_taken_out_is_one_change(recipe: Path) -> None:
    (recipe.parent / "run").mkdir()
    load_recipe(recipe).save(recipe.parent / "run" / "recipe.yaml")
    with pytest.raises(SystemExit) as ended:
        train.main([str(recipe), "teacher=null", "distillation=null"])
    lines = [line for line in str(ended.value.code).splitlines() if "teacher." in line]
    assert len(lines) == 1 and lines[0].startswith("  - teacher.checkpoint: was ") and lines[0].endswith("is None")


def test_a_converted_checkpoint_predicts_the_same(recipe: Path) -> None:
    model = tiny_model("atss").eval()
    state = {name: to_reference(key, model.state_dict()[key]) for key, name in reference_keys(model).items()}
    file, folder = recipe.parent / "reference.pth", recipe.parent / "converted"
    torch.save({"meta": {"CLASSES": ("cat", "dog")}, "state_dict": state}, file)
    content = yaml.safe_load(recipe.read_text())
    content["teacher"] |= {"detector": "atss"}
    recipe.write_text(yaml.safe_dump(content))
    command = ["convert", str(file), str(folder), "--recipe", str(recipe), "--teacher"]
    cli.main(command)
    again = AutoModelForObjectDetection.from_pretrained(folder).eval()
    assert again.config.id2label == {0: "cat", 1: "dog"}
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(again(pixels).pred_boxes, model(pixels).pred_boxes)
    with pytest.raises(SystemExit):
        cli.main(command)


@pytest.mark.parametrize("name", ["atss_r50_crosskd", "gfl_r101_2x_ms", "retinanet_r50_swint_crosskd"])
def test_recipes_take_a_step_when_made_small(name: str, tmp_path: Path) -> None:
    """Its own detector, styles, schedule and distillation; a small backbone of the same kind, and noise images."""
    tiny_split(tmp_path / "data")
    full = load_recipe(name)
    overrides = ["model.backbone_weights=random", "data.layout=coco", "data.train_split=mini", "data.val_split=mini"]
    overrides += [f"data.path={tmp_path / 'data'}", f"data.cache_dir={tmp_path / 'cache'}", "data.short_side=64"]
    overrides += ["data.long_side=96", "training.use_cpu=true", f"training.output_dir={tmp_path / 'run'}"]
    if full.data.multiscale != "none":
        overrides.append("data.multiscale_short_sides=[48, 64]")
    if full.teacher:
        overrides.append("teacher.checkpoint=random")
    for section in ("model", "teacher") if full.teacher else ("model",):
        large = getattr(full, section).backbone.startswith("swin_tiny_patch4_window7_224")
        backbone = "swin_tiny_patch4_window7_224" if large else "resnet18"
        overrides += [f"{section}.backbone={backbone}", f"{section}.fpn_channels=32", f"{section}.head_channels=32"]
    trainer = build_trainer(load_recipe(name, [*overrides, "training.dataloader_num_workers=0"]))
    trainer.trained_module().train()
    batch = trainer.to_device(next(iter(trainer.get_train_dataloader())))
    trainer.create_optimizer_and_scheduler(100)
    terms, _ = trainer.loss_terms(trainer.trained_module(), batch)
    assert any(key.startswith("kd_") for key in terms) == (full.teacher is not None)
    torch.stack(list(terms.values())).sum().backward()
    trainer.optimizer.step()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_the_command_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["crosskd_hf", "train", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("crosskd_hf", run_name="__main__", alter_sys=True)
    assert ended.value.code == 0 and "recipe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "override", "printed"),
    [
        ({"warmup_steps": 30}, "training.max_steps=2", ["warmup_steps 0 instead of 30", "steps              2"]),
        (
            {"warmup_steps": 30},
            "training.num_train_epochs=1",
            ["training.warmup_steps 2 instead of 30", "lr_milestones [0.6667, 0.9167]"],
        ),
        ({"warmup_steps": 500}, "training.max_steps=-1", ["warmup_steps 3 instead of 500"]),  # 12 x 3 steps
    ],
)
def test_a_short_trial_takes_one_override(recipe: Path, capsys, settings: dict, override: str, printed: list) -> None:
    content = yaml.safe_load(recipe.read_text())
    del content["training"]["max_steps"]
    recipe.write_text(yaml.safe_dump({**content, "training": {**content["training"], **settings}}))
    train.main([str(recipe), override, "--dry-run"])
    text = capsys.readouterr().out
    assert all(part in text for part in printed)


def test_the_precision_of_accelerate_is_told(recipe: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train.main([str(recipe), "--dry-run"])
    assert re.search("precision +bf16, .*accelerate.*ACCELERATE_MIXED_PREC", capsys.readouterr().out)
    AcceleratorState._reset_state(reset_partial_state=True)


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


def test_a_message_from_a_data_worker_is_the_message_alone() -> None:
    text = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
    error = DataError(text + "crosskd_hf.data.errors.DataError: image 3 (3.png) does not exist")
    assert explain(error) == "DataError: image 3 (3.png) does not exist"
    assert explain(DataError("plain: text")) == "DataError: plain: text"


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
