"""Everything that can only be known on a GPU, in one command and under 8 minutes; on a CPU the same on small sizes.

    python benchmarks/gpu.py --output GPU.json                 # on a GPU if there is one
    python benchmarks/gpu.py --device cpu                      # minutes on 2 cores
    python benchmarks/gpu.py --sections backward folding       # only these

Neither network nor data set is needed: weights are random, images generated.

| section | what |
|---|---|
| folding | the teacher's BatchNorms become part of its convolutions, with TF32 as PyTorch has it by default |
| backward | every backward that is written by hand against autograd, in two layouts, in fp64 and fp32 |
| golden | the recorded cases of the reference, TF32 off, at the bars of the tests |
| steps | the trainer's steps in fp32, bf16, fp16 with GradScaler, and at many sizes: the host must not wait in them |
| resume | SIGKILL to a run of train.py, which goes on as one that wasn't disturbed |
| speed | a CrossKD step, forward to backward, against the same convolutions alone (`step.py`): time and memory |
| rivals | RetinaNet and FCOS on R50 against torchvision's: training step, inference with post-processing |
| compiled | steps with torch_compile |

Each section has a process of its own, and each check a row: one that fails leaves the others alone, and so does a
section that crashes or hangs. Rows are printed and written as they come; the exit status is 1 if one isn't "ok".
"""

import argparse
import contextlib
import dataclasses
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext

# So that torch asks the driver's library for GPUs without starting CUDA, which forked processes can't use then.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch
from faults import descendants
from gpu_backward import backward
from gpu_checks import compiled, folding, golden, resume, steps
from gpu_options import CPU, GPU, Checks, Options
from gpu_speed import rivals, speed
from reporting import add_output, finish, write

Section = Callable[[Options], Checks]
SECTIONS: dict[str, Section] = {
    function.__name__: function for function in (folding, backward, golden, steps, resume, speed, rivals, compiled)
}
OK = "ok"
LONGEST = 700  # characters of a reason
PRELOADED = ["torch.distributed", "torchvision.models.detection", "crosskd_hf.training.distillation_trainer"]


def rows_of(name: str, section: Section, options: Options) -> Iterator[dict]:
    """A row a check, in this process."""
    checks = section(options)
    while True:
        began, check, values = time.perf_counter(), "", {}
        try:
            if (found := next(checks, None)) is None:
                return
            check, function = found
            if options.device == "cuda":  # what the last one had
                gc.collect()
                torch.cuda.empty_cache()
            values = function()
        except Exception as error:
            values = {"problem": f"{type(error).__name__}: {error}"}
        problem = " ".join(values.pop("problem", "").split())[-LONGEST:]
        result = f"FAILED: {problem}" if problem else OK
        yield {"section": name, "check": check, "result": result, **values, "seconds": time.perf_counter() - began}
        if not check:  # the section itself failed
            return


def send_rows(name: str, section: Section, options: Options, sender) -> None:
    """The same, for another process, and None after the last."""
    for row in rows_of(name, section, options):
        sender.send(row)
    sender.send(None)


def isolated_rows(
    context: BaseContext, name: str, section: Section, options: Options, seconds: float
) -> Iterator[dict]:
    """The same by a process of its own, which is ended when the time is over."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_rows, args=(name, section, options, sender))
    process.start()
    sender.close()  # so that the other's end is this one's
    until = time.monotonic() + seconds
    problem = f"stopped after {seconds:.0f} s"
    try:
        while receiver.poll(max(0.0, until - time.monotonic())):
            row = receiver.recv()
            if row is None:
                return
            yield row
    except EOFError:
        process.join()
        problem = f"the process ended with status {process.exitcode}"
    finally:
        if process.is_alive():
            for pid in descendants(process.pid):  # compilers and runs, too
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.join()
    yield {"section": name, "check": "the rest", "result": f"FAILED: {problem}"}


def touch(device: str) -> None:
    """Use the device."""
    torch.ones(1, device=device).sum().item()


def isolating_context(device: str) -> BaseContext:
    """Processes that fork from one that has imported everything; new ones, if those can't use the device."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=touch, args=(device,))
    process.start()
    process.join()
    return multiprocessing.get_context("spawn") if process.exitcode else context


def run(arguments: argparse.Namespace, options: Options) -> list[dict]:
    """All sections in turn."""
    rows: list[dict] = []
    until = time.monotonic() + arguments.seconds
    context = isolating_context(options.device)
    for name in arguments.sections:
        left = until - time.monotonic()
        print(f"{name}, {left:.0f} s left", flush=True)
        for row in isolated_rows(context, name, SECTIONS[name], options, max(left, 0.0)):
            rows.append(row)
            print(f"  {row['check']}: {row['result']}", flush=True)
            if arguments.output:
                write(arguments.output, rows)
    return rows


def parse() -> argparse.Namespace:
    """The command line; what isn't given is the device's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--detectors", nargs="+", choices=GPU.detectors)
    parser.add_argument("--compiled", nargs="+", choices=GPU.detectors, help="detectors that are compiled, too")
    parser.add_argument("--precisions", nargs="+", choices=GPU.precisions, help="of steps; fp16 needs a GPU")
    parser.add_argument("--cases", nargs="*", choices=GPU.cases, metavar="CASE", help="golden ones")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of timed images; multiples of 32")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("--steps", type=int, help="watched ones")
    parser.add_argument("--runs", type=int, help="timed ones")
    parser.add_argument("--seconds", type=float, help="to end after (default: 460 on a GPU, 3600 on a CPU)")
    add_output(parser)
    return parser.parse_args()


def main() -> None:
    """Run it, print a table a section."""
    arguments = parse()
    # Of several GPUs the first: the trainer refuses to see more.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {f.name: getattr(arguments, f.name, None) for f in dataclasses.fields(Options)} | {"device": device}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    options = dataclasses.replace(GPU if device == "cuda" else CPU, **given)
    arguments.seconds = arguments.seconds or (460 if device == "cuda" else 3600)
    began = time.monotonic()
    rows = run(arguments, options)
    finish(arguments, rows, ("section", "check"), by="section")
    wrong = [row for row in rows if row["result"] != OK]
    for row in wrong:
        print(f"{row['section']}, {row['check']}: {row['result']}")
    print(f"{len(rows)} checks on {device}, {len(wrong)} failed, {time.monotonic() - began:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
