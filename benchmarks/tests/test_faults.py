"""The fault benchmarks: what they take for right and for wrong, without a training run."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import kill_and_resume
import numpy as np
import pytest
import soak

from crosskd_hf.training.checkpoints import mark_complete, newest_complete

STEP = "step {}/40  epoch 1.00  loss 0.7699 = loss_cls 0.0030 + kd_cls 0.0030  lr 0.0005\n"
READY = "ready\n"


def checkpoint(output: Path, step: int) -> Path:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(100)))
    mark_complete(folder)
    return folder


def target(folder: Path, code: str, before: str = "", **changes) -> faults.Target:
    """A program that says what it is told to in place of a run, and is ready when it says so."""
    log = folder / "log"
    log.write_text(before)
    with open(log, "a") as file:
        process = subprocess.Popen([sys.executable, "-uc", f"import signal, sys, time\n{code}"], stdout=file)
    while READY not in log.read_text() and process.poll() is None:
        time.sleep(0.01)
    values = {"processes": 1, "number": 1, "rng": random.Random(0), "grace": 60.0, "limit": 60.0} | changes
    return faults.Target(process=process, output=folder / "run", log=log, **values)


def at_sigterm(words: str, status: int = 0) -> str:
    return (
        f"def end(*_):\n print({words!r}); sys.exit({status})\n"
        "signal.signal(signal.SIGTERM, end)\nprint('ready')\ntime.sleep(60)"
    )


def test_steps_and_starts_are_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("steps              40 (13 an epoch)\n")
    assert faults.steps_logged(log) == 0
    assert faults.resumed_at(log.read_text()) is None
    log.write_text(STEP.format(1) + STEP.format(12))
    assert faults.steps_logged(log) == 12
    assert faults.resumed_at(log.read_text()) == 0
    assert faults.resumed_at("resumes from /a/checkpoint-7/killed/checkpoint-30\n" + STEP.format(31)) == 30


SAVED = "ended by SIGTERM after step {}: its state is saved in there"


@pytest.mark.parametrize(
    ("words", "status", "logged", "problem"),
    [
        (SAVED.format(20), 0, 20, ""),
        (SAVED.format(20), 3, 20, "its status is 3"),
        (SAVED.format(20), 0, 21, "step 20 is saved, 20 was said, 21 logged"),
        (SAVED.format(21), 0, 21, "step 20 is saved, 21 was said, 21 logged"),
        ("", 0, 20, "it didn't say what it saved"),
        ("trained to step 20 in 0:01:00", 0, 20, ""),
        ("", 0, 0, ""),  # before training
        ("", 1, 0, "its status is 1"),
    ],
)
def test_sigterm_loses_no_step(tmp_path: Path, words: str, status: int, logged: int, problem: str) -> None:
    checkpoint(tmp_path / "run", 20)
    run = target(tmp_path, at_sigterm(words, status), STEP.format(logged) if logged else "")
    assert faults.terminate(run).problem == problem


def test_sigterm_before_training_may_kill_and_a_deaf_run_is_found(tmp_path: Path) -> None:
    run = target(tmp_path, "print('ready')\ntime.sleep(60)")
    assert faults.terminate(run).problem == ""
    assert run.process.returncode == -signal.SIGTERM
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready')\ntime.sleep(60)"
    run = target(tmp_path, deaf, grace=0.3)
    assert faults.terminate(run).problem == "it didn't end within 0.3 s"
    assert run.process.returncode == -signal.SIGKILL, "nothing is left running"


@pytest.mark.parametrize("how", faults.DAMAGES)
def test_damage_is_of_the_newest_checkpoint_and_makes_it_count_no_more(tmp_path: Path, how: str) -> None:
    old, new = checkpoint(tmp_path / "run", 10), checkpoint(tmp_path / "run", 20)
    number = 1 + faults.DAMAGES.index(how)
    outcome = faults.damage(target(tmp_path, "print('ready')\ntime.sleep(60)", number=number))
    assert (outcome.problem, outcome.damaged) == ("", new.name)
    assert outcome.note == f"model.safetensors of checkpoint-20: {how}"
    assert newest_complete(tmp_path / "run") == str(old)


def test_a_start_has_to_tell_of_damage_and_to_go_on_from_the_right_step() -> None:
    told = "/a/checkpoint-20 is left out: it is damaged, model.safetensors has 1 bytes instead of 2\n"
    goes_on = "resumes from /a/checkpoint-10\n"
    check = kill_and_resume.wrong_start
    assert check(told + goes_on, 10, ["checkpoint-20"]) == ""
    assert check(goes_on, 10, ["checkpoint-20"]) == "it says nothing of the damage of checkpoint-20"
    interrupted = "/a/checkpoint-20 is left out: saving or removing it was interrupted\n"
    assert "nothing of the damage" in check(interrupted + goes_on, 10, ["checkpoint-20"])
    assert check(goes_on, 20, []) == "it went on from step 10 instead of 20"
    assert check(STEP.format(1), 10, []) == "it went on from step 0 instead of 10"
    assert check("", 10, ["checkpoint-20"]) == "", "killed before it could tell"


def test_only_the_last_of_several_faults_waits_for_the_end() -> None:
    aims = [kill_and_resume.next_aim(number, 14, False) for number in range(1, 15)]
    assert aims.count("end") == 1
    assert aims[-1] == "end"
    assert {*aims} == {"any", "saving", "evaluation", "end"}
    assert kill_and_resume.next_aim(14, 14, True) == "any"
    assert kill_and_resume.next_aim(2, 2, False) == "saving"


def test_a_series_that_failed_stays_in_the_table(tmp_path: Path) -> None:
    fault = {"problem": "", "phase": "saving", "steps_lost": 4}
    base = {"fault": "kill", "processes": 1, "workers": 0, "planned": 2, "seed": 3}
    log = tmp_path / "deep" / "log.json"
    kill_and_resume.add_to_log(log, {**base, "equal": True, "error": "", "faults": [fault, {**fault, "problem": "x"}]})
    entries = kill_and_resume.add_to_log(log, {**base, "equal": False, "error": "status 1\nmore", "faults": [fault]})
    assert kill_and_resume.table(entries).splitlines()[2:] == [
        "| kill | 1 | 0 | 4 | 3 | 1 | 4 | saving 3 |",
        "kill, seed 3: status 1",
    ]


def test_slopes_are_an_hour_and_cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    times = [10.0 * i for i in range(1, 361)]
    flat = dict.fromkeys(("rss_mb", "handles", "threads", "folder_mb", "log_mb"), 5)
    samples = [
        {"seconds": s, "cpu_seconds": 2 * s, "memory_mb": 1000 + 7 * s / 3600 + rng.normal(), "steps": 1.2 * s, **flat}
        for s in times
    ]
    found = soak.slopes(samples)
    assert found["memory_mb"]["low"] < 7 < found["memory_mb"]["high"]
    assert found["memory_mb"]["low"] > 5
    assert found["handles"]["an_hour"] == pytest.approx(0, abs=1e-9)
    assert found["steps_per_second"]["first"] == pytest.approx(1.2)
    assert found["steps_per_cpu_second"]["first"] == pytest.approx(0.6)
    assert soak.rates_of_thirds(samples) == {"first_third": pytest.approx(1.2), "last_third": pytest.approx(1.2)}
    with pytest.raises(ValueError, match="too few"):
        soak.slopes(samples[:3])
