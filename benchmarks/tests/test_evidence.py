"""The evidence benchmark: its statistics by hand, its settings, and which results it accepts."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import evidence
import pytest
import yaml
from paths import BENCHMARKS

SETTING = {
    "teachers": {"big": {"recipe": "shapes_teacher", "set": []}},
    "student": {"recipe": "shapes_crosskd", "set": ["training.eval_steps=136"]},
    "seeds": [1, 2, 3],
    "teacher_seed": "each",
    "variants": {
        "alone": {"teacher": None, "set": []},
        "crosskd": {"teacher": "big", "set": []},
        "raw": {"teacher": "big", "set": ["distillation.crosskd.tap=raw"], "seeds": 2},
    },
    "tables": {"main": ["alone", "crosskd"], "tap": ["crosskd", "raw"]},
}


def load(folder: Path, **changes):
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**SETTING, **changes}), encoding="utf-8")
    return evidence.Setting.load(path, folder / "runs")


def result(run, aps: list[float], **changes) -> dict:
    count = len(aps)
    content = {
        "variant": run.variant,
        "seed": run.seed,
        "recipe_sha256": run.digest(),
        "metrics": {"AP": aps[-1], "APs": -1.0, "APm": 0.5, "APl": 0.25},
        "curve": [[(i + 1) / count, ap] for i, ap in enumerate(aps)],
        "minutes": 2.0,
        "peak_memory_gb": 1.0,
    }
    return {**content, **changes}


def write(folder: Path, run, content: dict) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{run.name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_interval_of_paired_differences():
    # 1 2 3: mean 2, deviation 1, t(2) = 4.303, over sqrt(3): 2.484.
    mean, half = evidence.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / 3**0.5))
    # Five of them: 2 2 2 2 7: mean 3, deviation sqrt(20 / 4) = 2.236, t(4) = 2.776, over sqrt(5): 2.776.
    mean, half = evidence.interval([2.0, 2, 2, 2, 7])
    assert (mean, half) == (3.0, pytest.approx(2.776))
    assert math.isnan(evidence.interval([1.0])[1]), "one pair has no interval"
    assert all(map(math.isnan, evidence.interval([math.nan, 1.0])))


def test_ap_at_a_part_of_the_schedule():
    curve = [[0.1, 0.05], [0.334, 0.2], [0.667, 0.3], [1.0, 0.4]]
    assert evidence.at(curve, 1 / 3) == 0.2 and evidence.at(curve, 2 / 3) == 0.3
    with pytest.raises(evidence.EvidenceError, match=r"no evaluation at 0\.33 .* nearest is at 0\.50"):
        evidence.at([[0.5, 0.1], [1.0, 0.2]], 1 / 3)


def test_minutes_add_up_over_logs_and_evaluations():
    history = [
        {"step": 10, "step_time": 0.5, "data_time": 0.1, "loss": 1.0},  # 6 s
        {"step": 10, "eval_runtime": 4.0},
        {"step": 30, "step_time": 1.0, "data_time": 0.0, "loss": 1.0},  # 20 s
        {"step": 30, "step_time": 9.0, "data_time": 9.0, "train_runtime": 99.0},  # the summary: no new step
    ]
    assert evidence.minutes(history) == pytest.approx(30 / 60)


def test_runs_come_table_by_table_and_seed_by_seed(tmp_path):
    setting = load(tmp_path)
    names = [run.name for run in setting.runs()]
    assert names == ["alone-1", "crosskd-1", "alone-2", "crosskd-2", "alone-3", "crosskd-3", "raw-1", "raw-2"]
    run = setting.run("crosskd", 2)
    assert run.needs.name == "teacher_big-2"
    assert f"teacher.checkpoint={run.needs.folder}" in run.arguments()
    assert run.resolved().training["seed"] == 2
    alone = setting.run("alone", 1).resolved()
    assert alone.teacher is None and alone.distillation is None


def test_a_recipe_may_stand_in_the_setting(tmp_path):
    recipe = {
        "model": {"backbone": "resnet18"},
        "teacher": {"checkpoint": "x"},
        "distillation": {"methods": ["pkd"], "pkd": {"weight": 2.0}},
    }
    setting = load(tmp_path, student={"recipe": recipe, "set": ["distillation.pkd.weight=3.0"]})
    resolved = setting.run("crosskd", 1).resolved()
    assert (resolved.model.backbone, resolved.distillation.methods["pkd"].weight) == ("resnet18", 3.0)


def test_the_digest_knows_settings_seed_and_teacher_but_no_paths(tmp_path):
    (tmp_path / "other").mkdir()
    here, there = (load(folder) for folder in (tmp_path, tmp_path / "other"))
    assert here.run("crosskd", 1).digest() == there.run("crosskd", 1).digest()
    digests = {run.digest() for run in here.runs()}
    assert len(digests) == 8
    other_teacher = {"big": {"recipe": "shapes_teacher", "set": ["training.learning_rate=0.1"]}}
    assert load(tmp_path, teachers=other_teacher).run("crosskd", 1).digest() not in digests


def test_summary_pairs_by_seed(tmp_path):
    setting, results = load(tmp_path), tmp_path / "results"
    for seed, (alone, distilled) in {1: (0.2, 0.23), 2: (0.3, 0.32), 3: (0.1, 0.11)}.items():
        write(results, run := setting.run("alone", seed), result(run, [0.05, 0.1, alone]))
        write(results, run := setting.run("crosskd", seed), result(run, [0.07, 0.1, distilled]))
    summary = evidence.summarise(setting, results)
    alone, distilled = summary["tables"]["main"]
    assert alone["AP"] == pytest.approx(20) and alone["AP_std"] == pytest.approx(10)
    assert distilled["AP_gain"] == pytest.approx(2) and distilled["AP_gain_half_width"] == pytest.approx(
        4.303 / 3**0.5
    )
    assert distilled["AP_third_gain"] == pytest.approx(2) and distilled["AP_two_thirds_gain"] == pytest.approx(0)
    text = evidence.markdown(summary)
    assert "| crosskd | 3 | 22.0 ± 10.5 | +2.0 ± 2.5 |" in text
    assert "APs" not in text, "no small boxes in the data"
    assert (results / "curves_main.png").read_bytes()[:4] == b"\x89PNG"


def test_results_of_other_settings_are_refused(tmp_path):
    setting, results = load(tmp_path), tmp_path / "results"
    run = setting.run("alone", 1)
    write(results, run, result(run, [0.1, 0.1, 0.1], recipe_sha256="0"))
    for action in (lambda: evidence.make(run, results, 1), lambda: evidence.summarise(setting, results)):
        with pytest.raises(evidence.EvidenceError, match=r"alone-1\.json is of other settings"):
            action()


def test_a_run_with_a_result_is_not_run_again(tmp_path, monkeypatch):
    setting, results = load(tmp_path), tmp_path / "results"
    run = setting.run("crosskd", 1)
    write(results, run, result(run, [0.1, 0.1, 0.1]))
    monkeypatch.setattr(evidence.subprocess, "run", lambda *args, **kwargs: pytest.fail("started a training"))
    evidence.make(run, results, 1)


def finished(folder: Path, recipe) -> None:
    """A folder as a run leaves it."""
    folder.mkdir(parents=True)
    recipe.save(folder / "recipe.yaml")
    finish(folder)


def finish(folder: Path) -> None:
    """A model and an evaluated state, the files that say that a run is finished."""
    state = {"global_step": 1, "log_history": [{"eval_AP": 0.5, "step": 1}]}
    for name, content in (("config.json", {}), ("trainer_state.json", state)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "model.safetensors").touch()


def test_a_teacher_of_other_settings_is_refused(tmp_path, monkeypatch):
    """Its weights would be used under the name of the new ones."""
    setting, results = load(tmp_path), tmp_path / "results"
    run = setting.run("crosskd", 1)
    finished(run.needs.folder, run.needs.resolved())
    write(results, run.needs, result(run.needs, [0.1, 0.1, 0.1]))
    started = []
    monkeypatch.setattr(evidence, "commit", lambda: "abc")
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(evidence.subprocess, "run", lambda words, **kwargs: started.append(words) or failed)
    with pytest.raises(evidence.EvidenceError, match="crosskd-1 ended with 1"):
        evidence.make(run, results, 1)
    assert len(started) == 1 and "teacher.checkpoint" in " ".join(started[0]), "the teacher's folder is its own"
    changed = {"big": {"recipe": "shapes_teacher", "set": ["training.learning_rate=0.1"]}}
    run = load(tmp_path, teachers=changed).run("crosskd", 1)
    with pytest.raises(evidence.EvidenceError, match=r"teacher_big-1\.json is of other settings"):
        evidence.make(run, results, 1)
    (results / "teacher_big-1.json").unlink()
    with pytest.raises(evidence.EvidenceError, match=r"other settings:\n.*training\.learning_rate: was .*, is 0\.1"):
        evidence.make(run, results, 1)


def test_a_run_keeps_with_what_it_was_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "commit", lambda: "first")
    evidence.note_start(tmp_path / "run", 1)
    evidence.note_start(tmp_path / "run", 1)
    assert evidence.provenance(tmp_path / "run")["commit"] == "first"
    monkeypatch.setattr(evidence, "commit", lambda: "second")
    evidence.note_start(tmp_path / "run", 1)
    assert evidence.provenance(tmp_path / "run")["commit"] == ["first", "second"]
    assert evidence.provenance(tmp_path / "run")["threads"] == 1
    finish(tmp_path / "run")
    monkeypatch.setattr(evidence, "commit", lambda: "later")
    evidence.note_start(tmp_path / "run", 1)
    assert evidence.provenance(tmp_path / "run")["commit"] == ["first", "second"]
    assert evidence.provenance(tmp_path) == {}


def test_a_summary_of_a_single_run_is_json(tmp_path):
    setting, results = load(tmp_path), tmp_path / "results"
    for variant in ("alone", "crosskd"):
        write(results, run := setting.run(variant, 1), result(run, [0.1, 0.1, 0.1]))
    summary = evidence.summarise(setting, results)
    line = json.loads(json.dumps(evidence.without_nan(summary), allow_nan=False))["tables"]["main"][1]
    assert line["AP_std"] is None and line["AP_gain"] == 0 and line["AP_gain_half_width"] is None
    assert "| crosskd | 1 | 10.0 | +0.0 |" in evidence.markdown(summary)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": {"main": ["alone", "no_such"]}}, "table 'main' names no variant: no_such"),
        ({"variants": {"alone": {"teacher": "small", "set": []}}, "tables": {}}, "names no teacher: 'small'"),
        ({"extra": 1}, "must hold exactly"),
        ({"teacher_seed": "all"}, "teacher_seed is a number or each, not 'all'"),
        ({"variants": {"alone": {"set": []}}, "tables": {}}, "variant 'alone' needs teacher and set"),
        ({"seeds": list(range(16))}, "16 seeds; intervals are known up to 15"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(evidence.EvidenceError, match=message):
        load(tmp_path, **changes)


@pytest.mark.parametrize(("text", "message"), [("- 1", r"holds \[1\]"), ("a: [1", "bad.yaml can't be read")])
def test_files_that_hold_no_setting(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(evidence.EvidenceError, match=message):
        evidence.Setting.load(tmp_path / "bad.yaml", tmp_path / "runs")


@pytest.mark.parametrize(
    ("variant", "words", "message"),
    [
        ("crosskd", ["--only", "nonsense"], "--only nonsense: no variant. There are crosskd"),
        ("crosskd", ["--summary", "--results", "nothing"], "no results in nothing: run this without --summary"),
        ("wrong", [], r"mine\.yaml, variant wrong: .*pkdd"),
    ],
)
def test_bad_arguments_end_in_a_message(tmp_path, monkeypatch, variant, words, message):
    override = "distillation.pkdd=6.0" if variant == "wrong" else "distillation.crosskd.weight=1.0"
    load(tmp_path, variants={variant: {"teacher": "big", "set": [override]}}, tables={"t": [variant]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evidence.py", "mine.yaml", *words])
    with pytest.raises(SystemExit, match=f"(?s)EvidenceError: {message}"):
        evidence.main()
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "evidence").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_settings_and_results_belong_together(tmp_path, path):
    """Every recipe can be read, and every committed result is of the setting as it stands."""
    setting = evidence.Setting.load(path, tmp_path)
    for run in setting.runs():
        run.resolved()
        found = BENCHMARKS / "evidence" / path.stem / f"{run.name}.json"
        if found.is_file():
            evidence.check_result(json.loads(found.read_text(encoding="utf-8")), run, found)
