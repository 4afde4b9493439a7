"""The demo: three stages, resumable, its table and pictures; small enough for a test."""

import json
from pathlib import Path

import pytest

from crosskd_hf.commands import main as cli
from crosskd_hf.recipe import running
from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.studies import demo

SMALL = (
    *("data.max_train_images=4", "data.max_val_images=2", "training.num_train_epochs=2", "training.warmup_steps=0"),
    *("training.lr_milestones=[]", "training.disable_tqdm=true", "training.eval_strategy=epoch"),
)


def arguments(folder: Path) -> list[str]:
    return ["demo", "--full", "--output-dir", str(folder), *SMALL, f"data.cache_dir={folder}/cache"]


def test_a_demo_is_interrupted_and_goes_on(tmp_path, capsys, monkeypatch):
    run, trained = running.run, []

    def interrupted(trainer, recipe):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(recipe.training["output_dir"])
        return run(trainer, recipe)

    monkeypatch.setattr(running, "run", interrupted)
    with pytest.raises(SystemExit, match="130"):
        cli.main(arguments(tmp_path))
    assert "interrupted: the same command resumes from the last checkpoint" in capsys.readouterr().err
    monkeypatch.setattr(running, "run", lambda trainer, recipe: trained.append(None) or run(trainer, recipe))
    cli.main(arguments(tmp_path))
    assert len(trained) == 3, "what was finished is not run again"
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "results.json").read_text())
    assert list(metrics) == [demo.TEACHER, demo.ALONE, demo.DISTILLED]
    gain = 100 * (metrics[demo.DISTILLED]["AP"] - metrics[demo.ALONE]["AP"])
    assert any(line.startswith("gain of CrossKD") and f"{gain:+.1f}" in line for line in printed.splitlines())
    assert "crosskd train shapes_crosskd" in printed and "teacher=null distillation=null" in printed
    report = (tmp_path / "report.html").read_text()
    assert all(f">{name}<" in report for name in ("teacher", "alone", "crosskd")) and report.count("<img") > 8


def test_the_packages_own_teacher(tmp_path, capsys):
    """It isn't trained; the two students are, and are compared with it."""
    cli.main([word for word in arguments(tmp_path) if word != "--full"])
    metrics = json.loads((tmp_path / "results.json").read_text())
    assert list(metrics) == [demo.TEACHER, demo.ALONE, demo.DISTILLED]
    assert metrics[demo.TEACHER]["AP50"] > 0.2 > metrics[demo.ALONE]["AP50"]
    assert "[2/2] student + CrossKD" in "".join(capsys.readouterr())
    assert not (tmp_path / "teacher" / "trainer_state.json").exists()
    assert sum(path.stat().st_size for path in demo.SHIPPED_TEACHER.iterdir()) < 5_000_000


def test_both_students_differ_in_the_teacher_alone(tmp_path):
    _, alone, distilled = (stage.recipe() for stage in demo.stages(tmp_path, 7, [], full=True))
    assert (alone.model, alone.data) == (distilled.model, distilled.data)
    assert load_recipe(demo.TEACHER_RECIPE).data == load_recipe(demo.STUDENT_RECIPE).data
    assert {**alone.training, "output_dir": ""} == {**distilled.training, "output_dir": ""}
    assert alone.training["seed"] == 7
    assert alone.teacher is None and alone.distillation is None
    assert distilled.teacher.checkpoint == str(tmp_path / "teacher")


def test_the_gain_is_the_difference():
    values = {demo.TEACHER: 0.5, demo.ALONE: 0.3, demo.DISTILLED: 0.345}
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    metrics = {stage: {name: (-1.0 if name == "APl" else value) for name in names} for stage, value in values.items()}
    lines = demo.format_table(metrics).splitlines()
    assert lines[0].split() == ["model", "AP", "AP50", "AP75", "APs", "APm"], "no ground truth, no column"
    assert lines[-1].split()[-5:] == ["+4.5"] * 5
