"""The `crosskd` command: demo, new, check-data, convert-data, train, evaluate, report, predict, show, info, export,
convert."""

import argparse
import gc
import os
import sys
from collections.abc import Sequence

import shtab

from ..version import __version__
from . import check_data, convert, convert_data, demo, evaluate, export, info, new, predict, report, show, train
from .arguments import parse
from .stdout import lenient_output

MODULES = (train, evaluate, report, convert, demo, new, check_data, convert_data, predict, show, info, export)
COMMANDS = {module.__name__.rpartition(".")[2].replace("_", "-"): module for module in MODULES}
TRAINING = ("train", "demo")  # resume from their last checkpoint; what they are for isn't on stdout


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `crosskd`."""
    # Before torch is imported. OpenMP's threads otherwise wait for each other in busy loops: on 2 cores with six busy
    # programs a step of the demo took 10 to 26 s, and 1 s so; results are the same.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(prog="crosskd", description="Cross-head knowledge distillation of detectors.")
    parser.add_argument("--version", action="version", version=f"crosskd_hf {__version__}")
    shtab.add_argument_to(parser, help="print a script that completes words on the command line: bash, zsh, tcsh")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.__doc__)
        module.add_arguments(command)
        command.add_argument("--quiet", action="store_true", help="print results, warnings and errors only")
    trains = (sys.argv[1:] if argv is None else argv)[:1] in [[name] for name in TRAINING]
    with lenient_output(results=not trains):
        _run(parse(parser, argv))


def _run(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState

    from ..utils.progress import set_quiet
    from .errors import USER_ERRORS, explained

    set_quiet(arguments.quiet)
    # `train` itself tells errors of the preparation from those of the training.
    kinds = () if arguments.command == "train" else USER_ERRORS
    try:
        with explained(kinds):
            COMMANDS[arguments.command].run(arguments)
    except KeyboardInterrupt:
        hint = ": the same command resumes from the last checkpoint" if arguments.command in TRAINING else ""
        print(f"\ninterrupted{hint}", file=sys.stderr, flush=True)
        raise SystemExit(130) from None  # 128 + SIGINT, as shells have it
    finally:
        PartialState().destroy_process_group()
        gc.collect()  # DDP's hold on the group: its threads would abort the process while Python ends


if __name__ == "__main__":
    main()
