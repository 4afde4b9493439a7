"""SIGTERM during steps, evaluations and epochs' ends: what is saved, and how the run resumes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import equality
import pytest
import torch
from processes import CONTEXT, run_processes
from test_resume import Interrupted, assert_same, build, final_state, undisturbed
from transformers import TrainerCallback

from crosskd_hf.training import saving
from crosskd_hf.training.checkpoints import last_complete_checkpoint
from crosskd_hf.training.saving import EVALUATION_FILE
from crosskd_hf.training.termination import Terminated, TerminationSignal, obey_parent_only


class At(TrainerCallback):
    """Does something once, at an event after a step."""

    def __init__(self, event: str, step: int, action=lambda: os.kill(os.getpid(), signal.SIGTERM)):
        self.step, self.action = step, action
        setattr(self, event, self.act)

    def act(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.action is not None:
            action, self.action = self.action, None
            action()


def interrupt() -> None:
    raise Interrupted


def ended(root: Path, *callbacks: TrainerCallback, **options) -> Terminated:
    trainer = build(root, "cut", **options)
    for callback in callbacks:
        trainer.add_callback(callback)
    with pytest.raises(Terminated) as error:
        trainer.train()
    assert error.value.code == 0
    return error.value


def resume(root: Path, expected: str, **options):
    checkpoint = last_complete_checkpoint(root / "cut")
    assert Path(checkpoint).name == expected
    trainer = build(root, "cut", model_seed=9, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def evaluated_steps(trainer) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if "eval_AP" in entry]


def test_the_step_is_finished_and_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = undisturbed(tmp_path, eval_strategy="no")
    before = signal.getsignal(signal.SIGTERM)
    message = str(ended(tmp_path, At("on_step_begin", 4), eval_strategy="no"))
    assert "after step 5" in message and "checkpoint-5" in message and message in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same(whole, final_state(resume(tmp_path, "checkpoint-5", eval_strategy="no")))


def test_an_evaluation_is_left_and_made_up_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is saved is told once: after what came before the evaluation is saved."""
    whole = undisturbed(tmp_path)
    ended(tmp_path, At("on_prediction_step", 4))
    (message,) = [message for message in caplog.messages if "ended by SIGTERM" in message]
    assert "after step 4: its state is saved in" in message and "checkpoint-4;" in message
    trainer = resume(tmp_path, "checkpoint-4")
    assert evaluated_steps(trainer) == [4, 7]
    assert_same(whole, final_state(trainer))


def test_a_run_killed_in_an_evaluation_loses_the_evaluation_only(tmp_path: Path) -> None:
    options = {"save_steps": 2, "load_best_model_at_end": True, "eval_steps": 2}
    whole = undisturbed(tmp_path, **options)
    trainer = build(tmp_path, "cut", **options)
    trainer.add_callback(At("on_prediction_step", 4, interrupt))
    with pytest.raises(Interrupted):
        trainer.train()
    trainer = resume(tmp_path, "checkpoint-4", **options)
    assert evaluated_steps(trainer) == [2, 4, 6, 7]
    assert_same(whole, final_state(trainer))
    # What an evaluation finds is beside the checkpoint that was saved before it.
    folder = Path(last_complete_checkpoint(tmp_path / "cut"))
    state = json.loads((folder / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_AP" in entry] == [2, 4, 6]
    assert json.loads((folder / EVALUATION_FILE).read_text()) == trainer.state.log_history[-2]
    assert "train_loss" in trainer.state.log_history[-1]
    again = resume(tmp_path, folder.name, **options)
    assert evaluated_steps(again) == [2, 4, 6, 7]
    assert again.last_evaluation == (-1, {}), "it was read"
    for name in ("best_metric", "best_global_step", "best_model_checkpoint"):
        assert getattr(again.state, name) == getattr(trainer.state, name) is not None


def test_the_end_of_an_epoch_comes_before_the_end_of_the_run(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "eval_strategy": "epoch"}
    whole = undisturbed(tmp_path, **options)
    ended(tmp_path, At("on_step_begin", 3), **options)  # the fourth step is the epoch's last
    trainer = resume(tmp_path, "checkpoint-4", **options)
    assert evaluated_steps(trainer) == [4, 7]
    assert_same(whole, final_state(trainer))


def test_a_best_checkpoint_waits_for_its_evaluation(tmp_path: Path) -> None:
    options = {"save_strategy": "best", "eval_steps": 2}
    trainer = build(tmp_path, "cut", **options)
    trainer.train()
    best = json.loads(
        (tmp_path / "cut" / f"checkpoint-{trainer.state.best_global_step}/trainer_state.json").read_text()
    )
    assert best["log_history"][-1]["eval_AP"] == trainer.state.best_metric == best["best_metric"]
    ended(tmp_path, At("on_prediction_step", 6), **options)
    assert Path(last_complete_checkpoint(tmp_path / "cut")).name == "checkpoint-6"


@pytest.mark.parametrize(
    ("options", "event"),
    [
        ({"save_steps": 4, "eval_strategy": "epoch"}, "on_prediction_step"),
        ({"save_steps": 4, "eval_strategy": "epoch"}, "on_step_begin"),
    ],
    ids=["in the epoch's evaluation", "in its last step"],
)
def test_a_whole_checkpoint_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, event: str
) -> None:
    """While that is done, there would be none of this step, and maybe none at all."""
    whole = undisturbed(tmp_path, **options)
    written, original = [], saving.put_in_place

    def noting(partial: Path, folder: Path) -> None:
        written.append(folder.name)
        original(partial, folder)

    monkeypatch.setattr(saving, "put_in_place", noting)
    ended(tmp_path, At(event, 4 if event == "on_prediction_step" else 3), **options)
    monkeypatch.undo()
    assert written == ["checkpoint-4"]
    trainer = resume(tmp_path, "checkpoint-4", **options)
    assert evaluated_steps(trainer) == [4, 7]
    assert_same(whole, final_state(trainer))


def test_the_last_checkpoint_stays_until_the_run_is_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a limit of 1 transformers would remove it, and whatever else is called so, before the model is saved."""
    trainer = build(tmp_path, "cut", save_steps=2, eval_steps=2, save_total_limit=1)
    measured = trainer._metrics
    trainer._metrics = lambda *args: measured(*args) | {"AP": -float(trainer.state.global_step)}
    (tmp_path / "cut" / "checkpoint-999").mkdir(parents=True)
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert sorted(path.name for path in (tmp_path / "cut").glob("checkpoint-*")) == [
        *("checkpoint-2", "checkpoint-7", "checkpoint-999")
    ]
    with pytest.raises(Terminated, match=r"after step 7: its state is saved in .*checkpoint-7;"):
        with trainer.termination.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            trainer.evaluate()


def test_an_unsaved_step_is_told_to_be_lost(tmp_path: Path) -> None:
    trainer = build(tmp_path, "cut", max_steps=1, save_strategy="no", eval_strategy="no")
    trainer.train()
    with pytest.raises(Terminated, match=r"after step 1, which isn't saved; .* resumes from the beginning"):
        with trainer.termination.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            trainer.evaluate()


def test_training_that_was_ended_can_resume_in_the_same_program(tmp_path: Path) -> None:
    trainer = build(tmp_path, "cut", eval_strategy="no", max_steps=4)
    trainer.add_callback(At("on_step_begin", 1))
    with pytest.raises(Terminated):
        trainer.train()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "cut"))
    assert trainer.state.global_step == 4


def test_nothing_is_noted_when_nobody_listens() -> None:
    termination = TerminationSignal()
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with termination.listening(), termination.listening():
            assert not termination.agreed_at_step()
            os.kill(os.getpid(), signal.SIGTERM)
            assert termination.noted and termination.agreed_at_step() and termination.agreed_now()
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def wait_as_a_worker(parent: int, ready) -> None:
    obey_parent_only(parent, 0)
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
@pytest.mark.parametrize(
    "context",
    [
        pytest.param(multiprocessing.get_context("fork"), id="fork"),
        pytest.param(CONTEXT, id="forkserver", marks=pytest.mark.slow),
    ],
)
def test_a_data_worker_obeys_its_parent_only(context) -> None:
    """With a fork server, the parent isn't the process that the system calls so."""
    ready = context.Event()
    worker = context.Process(target=wait_as_a_worker, args=(os.getpid(), ready))
    worker.start()
    assert ready.wait(60)
    subprocess.run([sys.executable, "-c", f"import os; os.kill({worker.pid}, {int(signal.SIGTERM)})"], check=True)
    time.sleep(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 128 + signal.SIGTERM


def one_of_two(rank: int, port: int, root: str) -> None:
    equality.join(rank, 2, port)
    trainer = build(Path(root), "cut", max_steps=8, eval_strategy="no", per_device_train_batch_size=1)
    if rank == 1:
        trainer.add_callback(At("on_step_begin", 3))
    try:
        trainer.train()
    except Terminated:
        (Path(root) / f"ended_{rank}").write_text(str(trainer.state.global_step))
    assert trainer.termination._group is None, "its threads would outlive Python"
    torch.distributed.destroy_process_group()


def test_two_processes_end_at_the_same_step(tmp_path: Path) -> None:
    """Only one of them gets the signal."""
    build(tmp_path, "unused")  # writes the data
    run_processes(one_of_two, (equality.free_port(), str(tmp_path)), 2)
    steps = {(tmp_path / f"ended_{rank}").read_text() for rank in range(2)}
    assert steps == {"5"}, "noted in the fourth step, agreed during the fifth"
    assert Path(last_complete_checkpoint(tmp_path / "cut")).name == "checkpoint-5"
