"""See a student get better because of its teacher, offline, on generated images."""

import argparse
from functools import partial
from pathlib import Path

from .arguments import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd demo`."""
    parser.add_argument("--output-dir", default="runs/demo", help="where models and pictures go (default: runs/demo)")
    parser.add_argument(
        "--full", action="store_true", help="train the teacher, too, and the students for longer: some 10 minutes"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights, order and augmentation (default: 0)")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="values that replace those of both recipes; for a trial of seconds: data.max_train_images=40 "
        "data.max_val_images=10 training.num_train_epochs=1",
    )


def run(arguments: argparse.Namespace) -> None:
    """Train what is not trained yet, and show what came of it; see `studies.demo`.

    Raises:
        RecipeError, ValueError: if a value can't be used, or the output folder holds another run.
    """
    import torch

    from ..recipe.run_folder import check_folder
    from ..studies.demo import run_demo
    from ..utils.machine import is_busy, threads_are_chosen
    from ..utils.progress import say
    from .train import train_recipe

    check_folder(arguments.output_dir, "--output-dir")
    if is_busy() and not threads_are_chosen():
        say("this machine has other work: the demo uses one thread")
        torch.set_num_threads(1)
    train = partial(train_recipe, report=False)  # one of all at the end
    run_demo(Path(arguments.output_dir), arguments.seed, arguments.overrides, train, arguments.full)
