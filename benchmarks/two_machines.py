"""Two hosts in network namespaces train, resume and evaluate, with a shared output folder and without.

    python benchmarks/two_machines.py --output TWO.json

Each host has a network of its own (`ip netns`; a veth pair joins the two, addresses 10.231.77.1 and .2), its own name
and, for some checks, a disk of its own under the path that the other uses, too. They are started as two real machines
are, by `accelerate launch --num_machines 2`; processes meet over gloo on CPUs. With a shared folder, a run that is
killed on both and started again must end as an undisturbed one, bit for bit. Without one, both must end in time with a
message that names the folder and the host that doesn't see it. Exit status 1 if a row isn't "ok".

Needs root, `ip` (Debian, Ubuntu: apt-get install iproute2) and `unshare`; says why if it can't run, with status 0.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from faults import ends, kill_all, last_step, resumed_at, steps_logged
from kill_and_resume import compare, write_noise_coco, write_recipe
from reporting import ROOT, add_output, finish
from safetensors.torch import load_file, save_file

STEPS, SAVE_STEPS = 12, 4
PORT = 29517
OWN_DISK = 'hostname "$1"; [ -z "$2" ] || mount --bind "$2" "$3"; shift 3; exec "$@"'
OWN_METRICS, METRICS = "evaluation/eval_metrics.json", "evaluation/evaluate_*_metrics.json"


@dataclass(frozen=True)
class Host:
    """A machine: its name, and its namespace, which its end of the cable is called, too."""

    rank: int
    name: str
    namespace: str
    address: str


HOSTS = tuple(
    Host(rank, f"node-{'ab'[rank]}", f"ck{os.getpid()}{'ab'[rank]}", f"10.231.77.{rank + 1}") for rank in range(2)
)


class Skipped(Exception):
    """There can't be two hosts here."""


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Both hosts, joined by a cable, for a while.

    Raises:
        Skipped: they can't be made.
    """
    if os.geteuid():
        raise Skipped("network namespaces need root")
    if missing := [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]:
        raise Skipped(f"{' and '.join(missing)} is missing")
    first, second = HOSTS
    cable = ["link", "add", first.namespace, "type", "veth", "peer", "name", second.namespace]
    words = [*(["netns", "add", host.namespace] for host in HOSTS), cable]
    for host in HOSTS:
        words.append(["link", "set", host.namespace, "netns", host.namespace])
        own = ["-n", host.namespace]
        words.append([*own, "address", "add", f"{host.address}/24", "dev", host.namespace])
        words += [[*own, "link", "set", name, "up"] for name in (host.namespace, "lo")]
    try:
        for word in words:
            done = subprocess.run(["ip", *word], capture_output=True, text=True, check=False)
            if done.returncode:
                raise Skipped(f"`ip {' '.join(word)}` fails: {done.stderr.strip()}")
        yield
    finally:
        for host in HOSTS:  # the cable goes with them
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True, check=False)


@dataclass
class Bench:
    """Where the hosts work.

    Attributes:
        folder: both see it, but for disks of their own.
        limit: seconds for a start to end.
        starts: so far, for the names of logs.
    """

    folder: Path
    limit: float
    starts: int = 0

    @property
    def run(self) -> Path:
        """The path at which each host may have a disk of its own."""
        return self.folder / "run"

    def disk(self, host: Host, content: Path | None = None) -> Path:
        """A host's own disk with a copy of a folder, or empty."""
        disk = self.folder / f"disk-{host.name}"
        shutil.rmtree(disk, ignore_errors=True)
        shutil.copytree(content, disk) if content else disk.mkdir()
        return disk

    def start(self, words: list[str], disks: tuple[Path | None, Path | None]) -> "Started":
        """The same command on both hosts, with a disk of their own or not."""
        self.run.mkdir(exist_ok=True)
        processes, logs = [], []
        for host, disk in zip(HOSTS, disks, strict=True):
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
            launch += ["--machine_rank", str(host.rank), "--num_processes", "2", "--mixed_precision", "no"]
            launch += ["--main_process_ip", HOSTS[0].address, "--main_process_port", str(PORT), *words]
            inside = ["ip", "netns", "exec", host.namespace, "unshare", "--mount", "--uts"]
            inside += ["bash", "-ec", OWN_DISK, "bash", host.name, str(disk or ""), str(self.run)]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": host.namespace, "CUDA_VISIBLE_DEVICES": ""}
            environment |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            logs.append(self.folder / f"{self.starts}-{host.name}.log")
            with open(logs[-1], "w") as log:
                options = {"env": environment, "stdout": log, "stderr": log, "start_new_session": True}
                processes.append(subprocess.Popen([*inside, *launch], **options))
        self.starts += 1
        return Started(processes, logs)

    def train(self, output: Path, disks: tuple[Path | None, Path | None] = (None, None)) -> "Started":
        """A run."""
        values = [f"training.output_dir={output}", f"training.save_steps={SAVE_STEPS}", "training.eval_strategy=no"]
        return self.start(["-m", "crosskd_hf", "train", str(self.folder / "recipe.yaml"), *values], disks)

    def evaluate(self, model: Path, disks: tuple[Path | None, Path | None] = (None, None)) -> "Started":
        """An evaluation, to `folder/evaluated`."""
        words = [
            "-m",
            "crosskd_hf",
            "evaluate",
            str(model),
            "--output-dir",
            str(self.folder / "evaluated"),
        ]
        return self.start([*words, "--recipe", str(self.folder / "recipe.yaml"), "--workers", "0"], disks)


@dataclass
class Started:
    """Processes of both hosts, and their output."""

    processes: list[subprocess.Popen]
    logs: list[Path]

    def text(self, rank: int) -> str:
        """Output of a host."""
        return self.logs[rank].read_text(errors="replace")

    def statuses(self, limit: float) -> list[int | None]:
        """Of both; None for one that had to be killed."""
        until = time.monotonic() + limit
        ended = [ends(process, max(0.0, until - time.monotonic())) for process in self.processes]
        return [
            process.returncode if on_time else None for process, on_time in zip(self.processes, ended, strict=True)
        ]

    def problem(self, limit: float) -> str:
        """Of one that should succeed."""
        statuses = self.statuses(limit)
        return "" if statuses == [0, 0] else f"status {statuses}: {self.text(0)[-700:]} | {self.text(1)[-700:]}"

    def kill(self) -> None:
        """SIGKILL to all on both hosts."""
        for process in self.processes:
            kill_all(process)


# What is tried -------------------------------------------------------------------------------------------------------


def shared_training(bench: Bench) -> str:
    """Undisturbed: `whole` is what others are compared with."""
    return bench.train(bench.folder / "whole").problem(bench.limit)


def shared_resume(bench: Bench) -> str:
    """Both killed after a checkpoint, and started again. A copy of what the kill left is kept."""
    output = bench.folder / "killed"
    started, until = bench.train(output), time.monotonic() + bench.limit
    while steps_logged(started.logs[0]) < SAVE_STEPS + 2 or not last_step(output):
        if time.monotonic() > until or any(process.poll() is not None for process in started.processes):
            started.kill()
            return f"it came to no checkpoint: {started.text(0)[-700:]} | {started.text(1)[-700:]}"
        time.sleep(0.02)
    started.kill()
    step = last_step(output)
    shutil.copytree(output, bench.folder / "begun")
    again = bench.train(output)
    if problem := again.problem(bench.limit):
        return problem
    if resumed_at(again.text(0)) != step:
        return f"step {step} was saved, {resumed_at(again.text(0))} resumed"
    different = [row["file"] for row in compare(bench.folder / "whole", output, STEPS) if row["different"]]
    return f"other values in {', '.join(different)}" if different else ""


def shared_evaluation(bench: Bench) -> str:
    """The run's own metrics again."""
    return same_metrics(bench, bench.evaluate(bench.folder / "whole"))


def same_metrics(bench: Bench, started: Started) -> str:
    """Whether an evaluation finds what the run's did."""
    if problem := started.problem(bench.limit):
        return problem
    files = next((bench.folder / "evaluated").glob(METRICS)), bench.folder / "whole" / OWN_METRICS
    found, own = (json.loads(file.read_text()) for file in files)
    numbers = {name: value for name, value in own.items() if "AP" in name or "AR" in name}
    wrong = [name for name, value in numbers.items() if found.get(name) != value]
    return f"{', '.join(wrong)} differ" if wrong or not numbers else ""


def refused(bench: Bench, started: Started, *named: str) -> str:
    """Whether both hosts end in time, by themselves, and name what is wrong."""
    statuses = started.statuses(bench.limit)
    if None in statuses or 0 in statuses:
        return f"status {statuses}: {started.text(0)[-700:]} | {started.text(1)[-700:]}"
    missing = [
        f"{host.name} doesn't say {word}" for host in HOSTS for word in named if word not in started.text(host.rank)
    ]
    return "; ".join(missing)


def unshared(first: str | None, second: str | None) -> Callable[[Bench], str]:
    """A run whose output folder is each host's own, with a copy of another run's or empty."""

    def check(bench: Bench) -> str:
        contents = [name and bench.folder / name for name in (first, second)]
        disks = tuple(bench.disk(host, content) for host, content in zip(HOSTS, contents, strict=True))
        before = [sorted(path.relative_to(disk) for path in disk.rglob("*")) for disk in disks]
        problem = refused(bench, bench.train(bench.run, disks), str(bench.run), "node-b", "share")
        after = [sorted(path.relative_to(disk) for path in disk.rglob("*")) for disk in disks]
        return problem or ("" if before == after else "files have come or gone")

    return check


def model_on_one(bench: Bench) -> str:
    """Only the first host has the model."""
    disks = tuple(bench.disk(host, bench.folder / "whole") for host in HOSTS)
    return refused(bench, bench.evaluate(bench.run / "model", (self_holding(disks[0]), disks[1])), "node-a", "node-b")


def self_holding(disk: Path) -> Path:
    """The disk with a folder `model` that holds a copy of what it holds."""
    files = [path for path in disk.iterdir() if path.is_file()]
    (disk / "model").mkdir()
    for path in files:
        shutil.copy(path, disk / "model")
    return disk


def model_on_both(bench: Bench) -> str:
    """Each has a copy."""
    disks = tuple(self_holding(bench.disk(host, bench.folder / "whole")) for host in HOSTS)
    return same_metrics(bench, bench.evaluate(bench.run / "model", disks))


def other_model_on_one(bench: Bench) -> str:
    """The second host's copy has other weights."""
    disks = tuple(self_holding(bench.disk(host, bench.folder / "whole")) for host in HOSTS)
    weights = disks[1] / "model" / "model.safetensors"
    changed = {
        name: value * 1.01 if value.is_floating_point() else value for name, value in load_file(weights).items()
    }
    save_file(changed, weights, {"format": "pt"})
    return refused(bench, bench.evaluate(bench.run / "model", disks), "weights", "node-b")


CHECKS: dict[str, Callable[[Bench], str]] = {
    "shared folder: train": shared_training,
    "shared folder: SIGKILL to both and resume": shared_resume,
    "shared folder: evaluate": shared_evaluation,
    "own folders: start": unshared(None, None),
    "own folders: resume, only the first host has the run": unshared("begun", None),
    "own folders: resume, both have a copy": unshared("begun", "begun"),
    "own folders: finished, only the first host has the run": unshared("whole", None),
    "own folders: evaluate, both have a copy": model_on_both,
    "own folders: evaluate, only the first host has the model": model_on_one,
    "own folders: evaluate, the second host has other weights": other_model_on_one,
}


def main() -> None:
    """All of it, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=120, help="seconds for a start to end")
    add_output(parser)
    arguments = parser.parse_args()
    rows = []
    try:
        with network(), TemporaryDirectory() as name:
            bench = Bench(Path(name).resolve(), arguments.limit)
            write_noise_coco(bench.folder / "data", 24)
            write_recipe(bench.folder, STEPS, workers=0, seed=0)
            for what, check in CHECKS.items():
                began = time.monotonic()
                try:
                    problem = check(bench)
                except OSError as error:  # of a run that a check before this one should have left
                    problem = f"{type(error).__name__}: {error}"
                result = f"FAILED: {' '.join(problem.split())}" if problem else "ok"
                rows.append({"what": what, "result": result, "seconds": round(time.monotonic() - began, 1)})
                print(f"{what}: {result}", flush=True)
    except Skipped as reason:
        print(f"skipped: {reason}")
        return
    finish(arguments, rows, ("what",))
    sys.exit(any(row["result"] != "ok" for row in rows))


if __name__ == "__main__":
    main()
