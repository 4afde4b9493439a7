"""Whether a recipe may resume the run in a folder."""

import json
from pathlib import Path

import pytest
from tiny import tiny_model

from crosskd_hf.hub.upload import RECIPE_FILE
from crosskd_hf.recipe import run_folder
from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.recipe.sections import Recipe
from crosskd_hf.training.checkpoints import MARKER
from crosskd_hf.utils.strict_yaml import RecipeError


def recipe(*overrides: str) -> Recipe:
    return load_recipe("gfl_r50_crosskd", overrides)


def checkpoint(run: Path, step: int, ranks: int, complete: bool = True) -> None:
    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    names = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    for name in names + ([MARKER] if complete else []):
        (folder / name).touch()


def test_what_is_no_run_is_named_and_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "_lock").touch()  # of a run that was killed before it wrote its recipe
    (tmp_path / ".cache").mkdir()
    run_folder.check_output(recipe(), tmp_path)
    assert capsys.readouterr().out == ""
    (tmp_path / "thesis.docx").touch()
    run_folder.check_output(recipe(), tmp_path)
    assert "thesis.docx" in capsys.readouterr().out
    for name in ("README.md", "model.safetensors", "evaluation", "checkpoint-3"):
        (tmp_path / name).mkdir()
        with pytest.raises(RecipeError, match=f"holds {name}, which") as error:
            run_folder.check_output(recipe(), tmp_path)
        assert "training.output_dir" in str(error.value) and "remove" not in str(error.value)
        (tmp_path / name).rmdir()
    (tmp_path / RECIPE_FILE).write_text("servings: 4\n")
    with pytest.raises(RecipeError, match=rf"{tmp_path} holds a recipe.yaml of no run.*output_dir.[\s\S]*servings"):
        run_folder.check_output(recipe(), tmp_path)


def test_what_can_be_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path in (tmp_path / "new" / "run", tmp_path, None):
        run_folder.check_folder(None if path is None else str(path), "training.output_dir")
    for path, reason in (
        (tmp_path / "file", "file is a file"),
        (tmp_path / "file" / "run", "file is a file"),
        (tmp_path / "link", f"link is a link to {tmp_path / 'gone'}"),
        (tmp_path / "link" / "run", f"link is a link to {tmp_path / 'gone'}"),
        ("", "'' names no folder"),
        (" ", "names no folder"),
        *([("/proc/new/run", "/proc/new/run can't be made in /proc")] if Path("/proc").exists() else []),
    ):
        with pytest.raises(RecipeError, match=f"training.output_dir: .*{reason}"):
            run_folder.check_folder(str(path), "training.output_dir")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}, "nothing is left of the trial"


def test_a_finished_runs_table_is_in_the_order_of_the_labels(tmp_path: Path) -> None:
    metrics = {"eval_AP": 0.5, "eval_AP/ant": 0.1, "eval_AP/bee": 0.2, "eval_AP50": 0.6, "step": 1}
    state, config = {"log_history": [metrics]}, {"id2label": {"10": "ant", "9": "bee"}}
    (tmp_path / run_folder.STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = run_folder.final_metrics(tmp_path)
    assert found == metrics and list(found)[-2:] == ["eval_AP/bee", "eval_AP/ant"]


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ('{"global_step": 3, "log_history": [{"eval_AP": NaN, "step": 3}, {"train_loss": 1, "step": 3}]}', True),
        ('{"global_step": 3, "log_history": [{"eval_AP": 0.5, "step": 2}]}', False),
        ('{"global_step": 3, "log_history": [{"eval_AP": 0.5', False),
        ('{"global_step": 3, "log_history": null}', False),
        ("", False),
        ("\0" * 100, False),
        ("{}", False),
        ("[]", False),
    ],
    ids=["complete", "not evaluated", "half", "no log", "empty", "zeros", "no state", "no mapping"],
)
def test_a_run_is_finished_only_with_a_complete_state(tmp_path: Path, text: str, finished: bool) -> None:
    (tmp_path / run_folder.STATE_FILE).write_text(text, encoding="utf-8")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert not run_folder.is_finished(tmp_path), "there are no weights"
    (tmp_path / "model.safetensors.index.json").touch()
    assert run_folder.is_finished(tmp_path) == finished


def test_changes_of_a_finished_run_are_refused_at_once(tmp_path: Path) -> None:
    recipe().save(tmp_path / RECIPE_FILE)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    state = {"global_step": 3, "log_history": [{"eval_AP": 0.5, "step": 3}]}
    (tmp_path / run_folder.STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    for accept in (False, True):
        with pytest.raises(RecipeError, match=r"learning_rate: was 0\.01, is 0\.5\nChanges come too late") as error:
            run_folder.check_output(recipe("training.learning_rate=0.5"), tmp_path, accept)
        assert "--accept-changes" not in str(error.value) and f"model.checkpoint={tmp_path}" in str(error.value)


def test_changes_are_shown_and_refused_unless_accepted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_folder.check_output(recipe(), tmp_path)
    recipe().save(tmp_path / RECIPE_FILE)
    free = ["training.logging_steps=7", "training.save_total_limit=9", "training.gradient_accumulation_steps=3"]
    run_folder.check_output(recipe(*free), tmp_path)
    assert capsys.readouterr().out == ""
    changed = recipe("training.learning_rate=0.5", "data.flip_probability=0.25", "distillation.crosskd.cls_weight=3")
    with pytest.raises(RecipeError) as error:
        run_folder.check_output(changed, tmp_path)
    for part in (
        "training.learning_rate: was 0.01, is 0.5",
        "data.flip_probability: was 0.5, is 0.25",
        "--accept-changes",
    ):
        assert part in str(error.value)
    run_folder.check_output(changed, tmp_path, accept_changes=True)
    assert "training.learning_rate: was 0.01, is 0.5" in capsys.readouterr().out


def test_changes_are_shown_without_credentials() -> None:
    before = recipe("teacher.checkpoint=https://me:secret@a.org/b.pth?sig=secret")
    for url, line in (
        ("https://a.org/c.pth?sig=secret", "was 'https://a.org/b.pth', is 'https://a.org/c.pth'"),
        ("https://a.org/b.pth?sig=other", "another user, password or query of 'https://a.org/b.pth'"),
    ):
        changes = run_folder.recipe_changes(before, recipe(f"teacher.checkpoint={url}"))
        assert changes["teacher.checkpoint"] == f"teacher.checkpoint: {line}"


def test_a_default_that_is_written_out_is_no_change(tmp_path: Path) -> None:
    defaults = ["training.momentum=0.9", "training.channels_last=false", "training.lr_milestones=[8, 11]"]
    defaults += ["training.lr_scheduler_type=linear", "training.ema_decay=null"]
    for begun, now in ((recipe(), recipe(*defaults)), (recipe(*defaults), recipe())):
        begun.save(tmp_path / RECIPE_FILE)
        run_folder.check_output(now, tmp_path)
    with pytest.raises(RecipeError, match=r"training\.momentum: was 0\.9, is 0\.8"):
        run_folder.check_output(recipe("training.momentum=0.8"), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *("model.detector=atss", "model.fpn_channels=128", "training.bias_lr_factor=2", "training.no_decay=norms"),
        *("training.backbone_lr_factor=0.1", "training.lr_factors={head: 0.1}"),
    ],
)
def test_what_checkpoints_do_not_fit_is_refused_all_the_same(tmp_path: Path, change: str) -> None:
    recipe().save(tmp_path / RECIPE_FILE)
    with pytest.raises(RecipeError, match=f"don't fit another .*{change.partition('=')[0]}"):
        run_folder.check_output(recipe(change), tmp_path, accept_changes=True)


def test_the_global_batch_is_what_counts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    begun = recipe("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2")
    run_folder.check_batch(begun, tmp_path, 8)  # nothing is there
    begun.save(tmp_path / RECIPE_FILE)
    run_folder.check_batch(begun, tmp_path, 8)  # no checkpoint
    checkpoint(tmp_path, 2, ranks=2)
    checkpoint(tmp_path, 4, ranks=1, complete=False)  # being written when the run was killed
    run_folder.check_batch(begun, tmp_path, 2)
    assert capsys.readouterr().out == ""

    same_images = recipe("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=4")
    run_folder.check_batch(same_images, tmp_path, 1)
    printed = capsys.readouterr().out
    assert "same global batch" in printed and "random numbers" in printed and "share a batch" not in printed
    run_folder.check_batch(recipe("training.per_device_train_batch_size=8"), tmp_path, 2)
    printed = capsys.readouterr().out
    assert "share a batch" in printed and "random numbers" not in printed

    texts = r"\(2 processes x 4 images x 2 accumulated = 16; this one: 1 processes x .* = 8\).*product is 16"
    with pytest.raises(RecipeError, match=texts):
        run_folder.check_batch(begun, tmp_path, 1)
    run_folder.check_batch(begun, tmp_path, 1, accept_changes=True)
    assert "another global batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        (["cat", "newt", "cow"], r"3 classes \(cat, newt, cow\), and class 1 was 'dog', is 'newt'"),
        (["cat", "cow", "dog"], r"class 1 was 'dog', is 'cow'"),
        (["cat"], r"3 classes .* 1 classes \(cat\), and class 1 was 'dog', is absent"),
    ],
)
def test_other_classes_are_refused(tmp_path: Path, now: list[str], difference: str) -> None:
    begun, other = (tiny_model(id2label=dict(enumerate(names))) for names in (["cat", "dog", "cow"], now))
    begun.config.save_pretrained(tmp_path)
    run_folder.check_classes_of_run(begun, str(tmp_path))
    run_folder.check_classes_of_run(other, None)
    with pytest.raises(RecipeError, match=difference):
        run_folder.check_classes_of_run(other, str(tmp_path))


def test_another_teacher_is_refused_unless_accepted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    teacher, other = tiny_model(seed=1), tiny_model(seed=2)
    run_folder.check_teacher(teacher, tmp_path)
    run_folder.note_teacher(teacher, tmp_path)
    run_folder.check_teacher(other, tmp_path)  # no checkpoint learnt from it
    checkpoint(tmp_path, 2, ranks=1)
    run_folder.check_teacher(teacher, tmp_path)
    with pytest.raises(RecipeError, match=r"other weights than its teacher has now.*--accept-changes"):
        run_folder.check_teacher(other, tmp_path)
    run_folder.check_teacher(other, tmp_path, accept_changes=True)
    assert "a teacher of other weights" in capsys.readouterr().out
