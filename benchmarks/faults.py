"""Faults for `kill_and_resume.py`: signals, a full disk and damaged files, and whether a run took them as it should.

Needs Linux (/proc); the full disk needs root.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from crosskd_hf.training.checkpoints import MARKER, checkpoint_folders, newest_complete, step_of
from crosskd_hf.training.disk_space import DISK_FULL

DISK_MB = 700  # a little more than the checkpoints of the small run
DAMAGES = ("cut", "bit", "gone")  # in turn
KILLED_BY_SIGTERM = (-signal.SIGTERM, 0)


@dataclass
class Outcome:
    """How a run took a fault.

    Attributes:
        problem: what should not have happened, or nothing.
        note: what is worth knowing, or nothing.
        damaged: the checkpoint whose damage the next start has to report, or nothing.
    """

    problem: str = ""
    note: str = ""
    damaged: str = ""


@dataclass
class Target:
    """A running run and what a fault may need.

    Attributes:
        processes: 1, or those that a launcher starts.
        output, log: the run's folder, and the file with its output.
        number: of the fault, from 1.
        grace, limit: seconds to end within after SIGTERM, and after any other fault that doesn't end it at once.
    """

    process: subprocess.Popen
    processes: int
    output: Path
    log: Path
    number: int
    rng: random.Random
    grace: float
    limit: float

    def text(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace")


# What a run says and leaves ---------------------------------------------------------------------------------------


def steps_logged(log: Path) -> int:
    """The last optimizer step that a run has logged; 0 if none."""
    found = re.findall(r"^step (\d+)/\d+ ", log.read_text(errors="replace"), re.MULTILINE)
    return int(found[-1]) if found else 0


def resumed_at(text: str) -> int | None:
    """The step that a run says it resumes from, 0 if it began; None if it didn't come that far."""
    if said := re.search(r"^resumes from .*checkpoint-(\d+)$", text, re.MULTILINE):
        return int(said.group(1))
    return 0 if re.search(r"^step \d+/", text, re.MULTILINE) else None


def last_step(output: Path) -> int:
    """Step of the checkpoint that the next process resumes from."""
    newest = newest_complete(output)
    return step_of(newest) if newest else 0


# Processes --------------------------------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    """A process and all that came from it: torch starts each rank in a session, so not all are in its group."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    family = [pid]
    for member in family:
        family += parents.get(member, [])
    return family


def is_alive(pid: int) -> bool:
    """Whether a process is there and not only waiting for its parent to notice its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to a run and everything it started, and wait until all are gone."""
    family = descendants(process.pid)
    _kill(family)  # the launcher first, so that it has no time to end the others in its own way
    process.wait()
    while any(is_alive(pid) for pid in family):
        time.sleep(0.05)


def ends(process: subprocess.Popen, seconds: float, family: list[int] | None = None) -> bool:
    """Wait until a run and all it started are gone; kill what is left.

    Args:
        process: of the run.
        seconds: to wait.
        family: its processes, if some may have lost their parent since; None looks for them.
    """
    family = family or descendants(process.pid)
    until = time.monotonic() + seconds
    while (alive := process.poll() is None or any(map(is_alive, family))) and time.monotonic() < until:
        time.sleep(0.05)
    if alive:
        _kill(family)
    process.wait()
    return not alive


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ranks(process: subprocess.Popen) -> list[int]:
    """The processes that train, without their launcher and their data workers."""
    return [pid for pid in descendants(process.pid) if is_alive(pid) and _is_rank(pid)]


def _is_rank(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        parent_words = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return False
    ranked = any(word.startswith(b"LOCAL_RANK=") for word in environment)
    return ranked and b"crosskd_hf" in words and b"accelerate.commands.launch" in parent_words


# Faults. Each ends a run and tells how it took that ---------------------------------------------------------------


def kill(target: Target) -> Outcome:
    """SIGKILL to all at once."""
    kill_all(target.process)
    return Outcome()


def terminate(target: Target) -> Outcome:
    """SIGTERM to the program, or to the launcher of several: it saves and says so, and loses no step."""
    process, began = target.process, time.monotonic()
    process.send_signal(signal.SIGTERM)
    if not ends(process, target.grace):
        return Outcome(f"it didn't end within {target.grace:g} s")
    seconds = f"ended in {time.monotonic() - began:.1f} s"
    text, alone = target.text(), target.processes == 1  # a launcher has a status of its own
    if said := re.search(r"ended by SIGTERM after step (\d+): its state is saved", text):
        saved, logged = last_step(target.output), steps_logged(target.log)
        if saved != int(said.group(1)) or saved < logged:
            return Outcome(f"step {saved} is saved, {said.group(1)} was said, {logged} logged")
        return Outcome(f"its status is {process.returncode}" if alone and process.returncode else "", seconds)
    over = "trained to step" in text
    if resumed_at(text) is not None and not over:
        return Outcome("it didn't say what it saved", seconds)
    if alone and process.returncode not in KILLED_BY_SIGTERM:
        return Outcome(f"its status is {process.returncode}", seconds)
    return Outcome(note=f"{seconds}, {'after' if over else 'before'} training")


def kill_rank(target: Target) -> Outcome:
    """SIGKILL to one of several processes: all others end, with an error."""
    process = target.process
    family, found, began = descendants(process.pid), ranks(process), time.monotonic()
    if not found:  # they were there a moment ago
        return Outcome(*_not_hit(target, "the others didn't end"))
    index = target.rng.randrange(len(found))
    _kill([found[index]])
    if not ends(process, target.limit, family):
        return Outcome(f"the others didn't end within {target.limit:g} s")
    if process.returncode:
        return Outcome(note=f"process {index} of {len(found)}, the others ended in {time.monotonic() - began:.1f} s")
    return Outcome(*_not_hit(target, "the launcher says that all is well"))


def fill_disk(target: Target) -> Outcome:
    """A file that takes all space where the run writes: it ends at what can't be saved, the last checkpoint is intact.

    What the run frees meanwhile is taken too.
    """
    process, output = target.process, target.output
    filler, before = output / "filler", last_step(output)
    family, until = descendants(process.pid), time.monotonic() + target.limit
    with open(filler, "wb", buffering=0) as file:
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):  # it is full
                while file.write(bytes(1 << 20)):
                    pass
            time.sleep(0.01)
    ended = ends(process, max(0.0, until - time.monotonic()), family)
    filler.unlink()
    if not ended:
        return Outcome(f"it didn't end within {target.limit:g} s")
    if not process.returncode:
        return Outcome(*_not_hit(target, "the status is 0"))
    text, step = target.text(), last_step(output)
    if DISK_FULL not in text:
        return Outcome(f"status {process.returncode}, and no word of the disk")
    if step < before:
        return Outcome(f"checkpoint {before} isn't whole any more")
    promised = re.search(r"The last good checkpoint, (.*?), is intact", text)
    if (step_of(promised.group(1)) if promised else 0) != step:
        return Outcome(f"{promised.group(1) if promised else 'no checkpoint'} is said to be intact, {step} is")
    said = re.search(f"{DISK_FULL}.*", text).group().replace(f"{output}/", "")
    return Outcome(note=f"{said[:60]}...")


def damage(target: Target) -> Outcome:
    """SIGKILL, and a file of the newest whole checkpoint is cut short, changed in one bit, or gone, in turn."""
    kill_all(target.process)
    newest = newest_complete(target.output)
    if newest is None:
        return Outcome(note="no checkpoint to damage")
    listed = json.loads((Path(newest) / MARKER).read_text())["files"]
    files = [path for name in sorted(listed) if (path := Path(newest) / name).stat().st_size > 1]
    path, how = target.rng.choice(files), DAMAGES[(target.number - 1) % len(DAMAGES)]
    harm(path, how, target.rng)
    note = f"{path.name} of {Path(newest).name}: {how}"
    if newest_complete(target.output) == newest:
        return Outcome("the damaged checkpoint still counts as whole", note)
    return Outcome(note=note, damaged=Path(newest).name)


def harm(path: Path, how: str, rng: random.Random) -> None:
    """Cut a file to half, flip its lowest bit somewhere, or delete it."""
    if how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1
        path.write_bytes(content)


def _not_hit(target: Target, otherwise: str) -> tuple[str, str]:
    """Problem and note of a fault that a run didn't feel: right only if nothing was left to be disturbed."""
    ended = ends(target.process, target.limit)
    over = "trained to step" in target.text() or "holds this run, finished" in target.text()
    return ("", "it was over") if ended and not target.process.returncode and over else (otherwise, "")


FAULTS = {"kill": kill, "term": terminate, "rank": kill_rank, "disk": fill_disk, "damage": damage}
# What a run must have come to before a fault makes sense.
READY: dict[str, Callable[[subprocess.Popen, Path, Path], bool]] = {
    "rank": lambda process, output, log: bool(ranks(process)),
    "disk": lambda process, output, log: steps_logged(log) > 0,
    # One to be damaged and one to go on from.
    "damage": lambda process, output, log: sum((f / MARKER).exists() for f in checkpoint_folders(output)) > 1,
}


class DiskSkipped(Exception):
    """There can't be a small disk here."""


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system in memory for a folder, a little larger than a run's checkpoints.

    Raises:
        DiskSkipped: it can't be mounted, usually since that needs root.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise DiskSkipped(f"no tmpfs could be mounted: {error}") from error
    if done.returncode:
        raise DiskSkipped(f"no tmpfs could be mounted, which needs root: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
