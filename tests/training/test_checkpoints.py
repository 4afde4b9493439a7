"""Which checkpoints count: the marker, damage, rotation, full disks."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny import tiny_args, tiny_model

from crosskd_hf.training import disk_space
from crosskd_hf.training.checkpoints import (
    MARKER,
    checkpoint_folders,
    damage,
    last_complete_checkpoint,
    mark_complete,
    partial_folder,
    put_in_place,
    remove_checkpoint,
    remove_surplus,
)
from crosskd_hf.training.disk_space import check_disk_space, checkpoint_bytes, full_disk_explained
from crosskd_hf.training.run_lock import folder_lock
from crosskd_hf.utils.files import is_disk_full


def make(run: Path, step: int, marked: bool = True) -> Path:
    """A checkpoint of two files, one of them in a folder."""
    folder = run / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * 100 + str(step).encode())
    (folder / "inner" / "state").write_text("state")
    if marked:
        mark_complete(folder)
    return folder


def steps(run: Path) -> list[int]:
    return [int(folder.name.split("-")[1]) for folder in checkpoint_folders(run)]


# The marker -----------------------------------------------------------------------------------------------------


def test_a_marker_lists_every_file_but_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no files"):
        mark_complete(tmp_path)
    folder = make(tmp_path, 1)
    for _ in range(2):
        files = json.loads((folder / MARKER).read_text())["files"]
        assert set(files) == {"weights", "inner/state"} and files["inner/state"]["bytes"] == 5
        assert {path.name for path in folder.iterdir()} == {"weights", "inner", MARKER}
        assert damage(folder) is None
        mark_complete(folder)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "weights").read_bytes())
    content[50] ^= 1
    (folder / "weights").write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: os.truncate(f / "weights", 40), r"weights has 40 bytes instead of 101"),
        (flip_a_bit, r"the contents of weights have changed"),
        (lambda f: (f / "inner" / "state").unlink(), r"state can't be read \(No such file"),
        (lambda f: (f / MARKER).write_text(""), rf"{MARKER} isn't one"),
        (lambda f: (f / MARKER).write_text("[]"), rf"{MARKER} isn't one"),
        (lambda f: (f / MARKER).write_text('{"files": {"weights": 3}}'), rf"{MARKER} isn't one"),
    ],
)
def test_damage_is_named_and_the_previous_checkpoint_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm, message: str
) -> None:
    good, bad = make(tmp_path, 4), make(tmp_path, 6)
    harm(bad)
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(tmp_path) == str(good)
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith(str(bad))
    assert re.search(message, caplog.text)


def test_the_newest_is_the_one_of_the_highest_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (10, 100, 9):
        make(tmp_path, step)
    (tmp_path / "checkpoint-100" / "notes.txt").write_text("added by somebody, which is no damage")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    make(tmp_path, 600).rename(tmp_path / "checkpoint-600.partial")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    assert not caplog.records


def test_folders_without_marker_are_left_alone_and_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert last_complete_checkpoint(tmp_path) is last_complete_checkpoint(tmp_path / "absent") is None
    assert not caplog.records
    make(tmp_path, 6, marked=False)
    assert last_complete_checkpoint(tmp_path) is None
    assert "training starts from the beginning" in caplog.text
    make(tmp_path, 4)
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    assert "checkpoint-6 is left out" in caplog.text and steps(tmp_path) == [4, 6]


# Removal --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """In place of SIGKILL: nothing handles it."""


def kill_after(count: int, patch: pytest.MonkeyPatch, *names: str) -> None:
    """Have these functions of `os` be called `count` times in all, and the next call raise `Killed`."""
    calls = []

    def deadly(original):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) > count:
                raise Killed
            return original(*args, **kwargs)

        return call

    for name in names:
        patch.setattr(os, name, deadly(getattr(os, name)))


@pytest.mark.parametrize("after", range(5))
def test_a_removal_cut_short_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed before each deletion in turn; the next removal of others then clears up."""
    remove_checkpoint(tmp_path / "checkpoint-2")  # what isn't there is no error
    make(tmp_path, 2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(after, patch, "rmdir", "unlink")
        remove_checkpoint(tmp_path / "checkpoint-2")
    assert last_complete_checkpoint(tmp_path) is None
    newest = make(tmp_path, 4)
    remove_surplus(tmp_path, None, newest)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize("after", range(6))
def test_a_checkpoint_put_in_place_is_complete_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed before each flush, rename and deletion in turn. One of the same step was damaged."""
    older, damaged = make(tmp_path, 4), make(tmp_path, 6)
    flip_a_bit(damaged)
    partial = make(tmp_path, 6000, marked=False).rename(partial_folder(damaged))
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        kill_after(after, patch, "fsync", "replace", "rmdir", "unlink")
        put_in_place(partial, damaged)
    assert last_complete_checkpoint(tmp_path) == str(older)
    newest = tmp_path / "checkpoint-8"
    put_in_place(make(tmp_path, 8000, marked=False).rename(partial_folder(newest)), newest)
    assert damage(newest) is None
    remove_surplus(tmp_path, None, newest)
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint-4", "checkpoint-6", "checkpoint-8"}


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8]),
        (0, None, [2, 4, 6, 8]),
        (4, None, [2, 4, 6, 8]),
        (3, None, [4, 6, 8]),
        (1, None, [8]),
        (2, 2, [2, 8]),
        (1, 2, [2, 8]),
        (1, 8, [8]),
        (3, 4, [4, 6, 8]),
    ],
)
def test_the_oldest_go_first_but_never_the_newest_or_the_best(
    tmp_path: Path, limit: int | None, best: int | None, left: list[int]
) -> None:
    for step in (2, 4, 6, 8):
        make(tmp_path, step)
    best_path = None if best is None else Path(f"moved/elsewhere/checkpoint-{best}")
    remove_surplus(tmp_path, limit, tmp_path / "checkpoint-8", best_path)
    assert steps(tmp_path) == left


@pytest.mark.parametrize(("unmarked", "last", "left"), [(4, 6, [2, 4, 6]), (None, 4, [2, 4])])
def test_unmarked_folders_stay_and_steps_past_the_newest_go(
    tmp_path: Path, unmarked: int | None, last: int, left: list[int]
) -> None:
    """The former may be somebody's; the latter are of an abandoned run."""
    for step in (2, 4, 6):
        make(tmp_path, step, marked=step != unmarked)
    remove_surplus(tmp_path, 2, tmp_path / f"checkpoint-{last}")
    assert steps(tmp_path) == left


def test_a_removal_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4):
        make(tmp_path, step)

    def busy(path, *args, **kwargs):
        raise OSError(errno.EBUSY, "busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    remove_surplus(tmp_path, 1, tmp_path / "checkpoint-4")
    assert "checkpoint-2 is not needed any more, but can't be removed" in caplog.text
    monkeypatch.undo()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    assert (tmp_path / "checkpoint-2.removed").exists()
    remove_surplus(tmp_path, 1, tmp_path / "checkpoint-4")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


# Two runs in one folder -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_second_run_is_kept_out_until_the_first_is_dead(tmp_path: Path) -> None:
    """Also while the second forks, as data workers are, and not by what a killed one left."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with folder_lock(tmp_path / "run"):
            if os.fork() == 0:  # a data worker, which lives on for a while
                time.sleep(3)
                os._exit(0)
            os.write(told, b"1")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(ValueError, match=rf"another run is writing to .*run \(process {child} on"):
        with folder_lock(tmp_path / "run"):
            pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for _ in range(2):
        with folder_lock(tmp_path / "run"):
            pass


# Full disks -----------------------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")
BEHIND = RuntimeError("can't save")
BEHIND.__cause__ = FULL


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (FULL, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598"), True),
        (RuntimeError("[enforce fail at inline_container.cc:145] . PytorchStreamReader failed reading zip"), False),
        (RuntimeError("CUDA error"), False),
        (RuntimeError("unable to write to file </torch_7_8_9>: No space left on device (28)"), False),
        (OSError(errno.EACCES, "Permission denied"), False),
        (BEHIND, True),
        (None, False),
    ],
)
def test_full_disks_are_told_from_other_errors(error: BaseException | None, full: bool) -> None:
    assert is_disk_full(error) is full


def test_a_full_disk_removes_the_partial_folder_and_names_the_last_good_one(tmp_path: Path) -> None:
    good, partial = make(tmp_path, 4), make(tmp_path, 6).rename(tmp_path / "checkpoint-6.partial")
    with pytest.raises(OSError, match=r"checkpoint-6 needs about 2 GB, but .*checkpoint-4, is intact") as raised:
        with full_disk_explained(tmp_path, partial, 2 * 10**9):
            raise FULL
    assert raised.value.errno == errno.ENOSPC and damage(good) is None and not partial.exists()
    with pytest.raises(OSError, match=r"disk is full: .*predictions.json.*checkpoint-4, is intact.*start the same"):
        with full_disk_explained(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device", "predictions.json")
    shutil.rmtree(good)
    with pytest.raises(OSError, match=r"There is no earlier checkpoint"):
        with full_disk_explained(tmp_path):
            raise FULL


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error"), OSError(13, "Permission denied"), OSError(28, "the disk is full: told already")],
)
def test_other_errors_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, full_disk_explained(tmp_path):
        raise error
    assert raised.value is error


def test_the_size_of_a_checkpoint_counts_weights_and_the_state_of_trained_ones(tmp_path: Path) -> None:
    model = tiny_model()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    for options, values, copies in (
        ({}, 1, 1),
        ({"momentum": 0.0}, 0, 1),
        ({"optim": "adamw_torch"}, 2, 1),
        ({"ema_decay": 0.9}, 1, 2),
    ):
        assert checkpoint_bytes(model, tiny_args(tmp_path, **options)) == copies * weights + values * trained


@pytest.mark.parametrize(
    ("saving", "limit", "evaluates", "checkpoints"),
    [
        ("no", None, False, 1),
        *[("epoch", limit, False, count) for limit, count in ((None, 2), (1, 2), (2, 3), (5, 6))],
        *[("epoch", limit, True, 3) for limit in (None, 1, 2)],  # the best one stays beside the last
    ],
)
def test_a_run_that_cannot_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saving: str, limit: int | None, evaluates: bool, checkpoints: int
) -> None:
    """One checkpoint more than is kept is on the disk while it is saved. Those that are there give way."""
    strategy = "epoch" if evaluates else "no"
    args = tiny_args(tmp_path / "run", save_strategy=saving, save_total_limit=limit, eval_strategy=strategy)
    monkeypatch.setattr(disk_space, "checkpoint_bytes", lambda model, args: 1000)
    usage, needed, model = shutil.disk_usage(tmp_path), checkpoints * 1000, tiny_model()

    def check(free: int) -> None:
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage._replace(free=free))
        check_disk_space(model, args)

    check(needed)
    with pytest.raises(ValueError, match=rf"training\.output_dir .* for {checkpoints} checkpoints"):
        check(needed - 1)
    existing = sum(path.stat().st_size for path in make(tmp_path / "run", 2).rglob("*") if path.is_file())
    check(needed - existing)
    with pytest.raises(ValueError, match=r"training\.output_dir"):
        check(needed - existing - 1)


def test_torch_and_safetensors_report_full_disks_as_they_did(tmp_path: Path) -> None:
    """What `is_disk_full` knows of torch, from a real failure: a file size limit of one page."""
    resource = pytest.importorskip("resource")
    previous, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, previous[1]))
    try:
        with pytest.raises(RuntimeError) as raised:
            torch.save(torch.zeros(10_000), tmp_path / "state.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)
    assert is_disk_full(raised.value)


def test_full_shared_memory_is_no_full_disk(tmp_path: Path) -> None:
    """What torch says of it in a data worker, when a container has too little."""
    told = "Caught RuntimeError in DataLoader worker process 0.\nunable to write to file </torch_7_8_9>: No space left"
    with pytest.raises(RuntimeError, match=r"shared memory .* --shm-size=8g.*dataloader_num_workers"):
        with full_disk_explained(tmp_path):
            raise RuntimeError(told)
