"""Run a recipe: `accelerate launch -m crosskd_hf train RECIPE [section.key=value ...] [--dry-run]`."""

import argparse
import contextlib
import dataclasses
import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainerCallback, set_seed

from ..data.errors import DataError
from ..data.load import load_datasets
from ..distillation.inheritance import inherit_weights
from ..models.image_processing import DenseDetectorImageProcessor
from ..recipe.run_folder import (
    check_batch,
    check_folder,
    check_labels,
    check_output,
    check_teacher,
    check_weights,
    final_metrics,
    is_finished,
    mark_finished,
    note_teacher,
)
from ..recipe.sections import RECIPE_FILE, Recipe, RecipeError, load_recipe
from ..training.arguments import LIMITS
from ..training.checkpoints import last_complete_checkpoint
from ..training.disk_space import check_disk_space, checkpoint_bytes, checkpoints_at_once, full_disk_explained
from ..training.distillation_trainer import DistillationTrainer
from ..training.evaluation import format_metrics
from ..training.monitoring import NonFiniteLossError
from ..training.run_lock import FolderInUseError, folder_lock
from ..training.run_log import use_run_log
from ..training.tracking import TrackingCallback
from ..training.trainer import DetectionTrainer
from ..utils.distributed import check_shared
from ..utils.escaping import printable_lines
from ..utils.memory import OutOfMemoryError, out_of_memory_explained
from ..utils.progress import say, set_quiet
from ..weights.loading import build_model, count_parameters, load_teacher
from ..weights.mmdet import CheckpointError
from .output import lenient_output

# What ends in one message while a run is built, and while it trains. Other errors there keep their tracebacks.
USER_ERRORS = (RecipeError, CheckpointError, OSError, OutOfMemoryError, ValueError)
RUN_ERRORS = (
    CheckpointError,
    DataError,
    FolderInUseError,
    NonFiniteLossError,
    OSError,
    OutOfMemoryError,
    RecipeError,
    UnicodeEncodeError,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a training run."""
    parser.add_argument("recipe", help="a recipe's path, or the bare name of one that the package carries")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="replace the recipe's values"
    )
    parser.add_argument("--dry-run", action="store_true", help="build everything, print it, and stop")
    parser.add_argument(
        "--accept-changes", action="store_true", help="go on with a run although the recipe has changed since it began"
    )
    add_quiet(parser)


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `minimum` on."""

    def number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        return int(text)

    number.__name__ = "whole number"  # what argparse calls it if the text is none
    return number


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """The argument that every command has."""
    parser.add_argument("--quiet", action="store_true", help="print results, warnings and errors only")


def build_trainer(recipe: Recipe) -> DetectionTrainer:
    """Everything a recipe describes, ready to train."""
    args = recipe.training_arguments()
    set_seed(args.seed)  # new weights are drawn before the Trainer seeds for itself
    train_dataset, eval_dataset = load_datasets(recipe.data, args.seed)
    names = train_dataset.split.label_names
    model = build_model(recipe.model, names)
    common = {
        "args": args,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "processing_class": DenseDetectorImageProcessor.for_model(
            model.config, recipe.data.short_side, recipe.data.long_side
        ),
    }
    if recipe.teacher is None:
        trainer = DetectionTrainer(model, **common)
    else:
        teacher = load_teacher(recipe.teacher, names)
        if recipe.model.inherit:
            say(inherit_weights(model, teacher, recipe.model.inherit))
        trainer = DistillationTrainer(model, teacher, distillation=recipe.distillation, **common)
    use_run_log(trainer)
    return trainer


def describe(trainer: DetectionTrainer) -> str:
    """What a run would do: parameters, data, batch, learning rate, steps."""
    args = trainer.args
    total, trained = count_parameters(trainer.model)
    lines = [
        f"model              {trainer.model.config.model_type}, {trainer.model.config.backbone}: "
        f"{total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained",
    ]
    if isinstance(trainer, DistillationTrainer):
        config = trainer.teacher.config
        total, _ = count_parameters(trainer.teacher)
        name = f"{config.model_type}, {config.backbone}"
        lines.append(f"teacher            {name}: {total / 1e6:.2f} M parameters, frozen")
        settings = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(trainer.settings).items())
        lines.append(f"distillation       {settings}")
        lines += [f"                   {note}" for note in trainer.pairing.notes]
    lines += [
        f"training images    {len(trainer.train_dataset)}",
        f"validation images  {len(trainer.eval_dataset)}",
        f"labels             {trainer.model.config.num_labels}",
        f"effective batch    {args.global_batch_size} ({args.per_device_train_batch_size} a device x "
        f"{args.world_size} processes x {args.gradient_accumulation_steps} accumulated)",
        f"learning rate      {args.scaled_learning_rate:g} ({args.learning_rate:g} at batch "
        f"{args.base_batch_size or args.global_batch_size})",
        f"precision          {precision(trainer)}",
        f"steps              {planned_steps(trainer)} ({trainer.steps_per_epoch} an epoch)",
        f"output             {args.output_dir}",
    ]
    return "\n".join(lines)


def precision(trainer: DetectionTrainer) -> str:
    """The precision that a run computes in, and what chose it."""
    mixed = trainer.precision
    if mixed != "fp32":
        own = getattr(trainer.args, mixed, False)
        source = f"training.{mixed}" if own else "accelerate's configuration, ACCELERATE_MIXED_PRECISION"
        return f"{mixed}, mixed with fp32 ({source})"
    if trainer.args.device.type == "cuda":
        parts = [("convolutions", torch.backends.cudnn), ("matrix products", torch.backends.cuda.matmul)]
        tf32 = [name for name, backend in parts if backend.allow_tf32]
        return "fp32" + (f", TF32 in {' and '.join(tf32)}" if tf32 else "")
    return "fp32"


def run(trainer: DetectionTrainer, recipe: Recipe) -> None:
    """Train, evaluate and save as a recipe says, from the last whole checkpoint if there is one.

    Raises:
        FolderInUseError: another run is writing to the output folder.
        OSError: the disk is full, or the checkpoint lacks a file that the recipe needs.
        RecipeError: the checkpoint is of other classes than the data.
        Terminated: SIGTERM came; everything up to its step is saved.
    """
    output = Path(trainer.args.output_dir)
    lock = folder_lock(output) if trainer.args.should_save else contextlib.nullcontext()
    with lock, trainer.termination.listening(), full_disk_explained(output):
        checkpoint = last_complete_checkpoint(output)
        check_labels(trainer.model, checkpoint)
        note_when_begun(trainer, recipe)
        if checkpoint is not None:
            say(f"goes on from {checkpoint}")
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(_internal_call=True)  # pushed once, below, with the metrics
        step, metrics = trainer.last_evaluation
        if step != trainer.state.global_step or trainer.args.load_best_model_at_end:
            metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            print_metrics(metrics)
        if trainer.args.push_to_hub:
            trainer.push_to_hub()
        if trainer.is_world_process_zero():
            mark_finished(trainer.state, output)  # the last file: see `is_finished`


class RunNotes(TrainerCallback):
    """Writes down recipe and teacher of a run once its checkpoint is loaded.

    Before that it may still be refused: its folder must then be as it was, for the recipe that it was begun with.
    """

    def __init__(self, trainer: DetectionTrainer, recipe: Recipe):
        self.trainer, self.recipe = trainer, recipe

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Every file of the checkpoint has been read but the random states, which no recipe changes."""
        if not state.is_world_process_zero:
            return
        self.recipe.save(self.trainer.run_folder / RECIPE_FILE)
        if isinstance(self.trainer, DistillationTrainer):
            note_teacher(self.trainer.teacher, self.trainer.run_folder)


def note_when_begun(trainer: DetectionTrainer, recipe: Recipe) -> None:
    """Have `RunNotes` called after the trainer's own hooks, which read of the checkpoint too."""
    callbacks = trainer.callback_handler.callbacks
    # Before the trackers get the recipe, which they read from the folder.
    places = (i for i, callback in enumerate(callbacks) if isinstance(callback, TrackingCallback))
    callbacks.insert(next(places, len(callbacks)), RunNotes(trainer, recipe))


def print_metrics(metrics: dict[str, float]) -> None:
    """The table of a run's metrics."""
    print(format_metrics({name.removeprefix("eval_"): value for name, value in metrics.items()}), flush=True)


def train_recipe(recipe: Recipe, dry_run: bool = False, accept_changes: bool = False) -> None:
    """Everything from the checks to the saved model. A finished run is not run again.

    Args:
        recipe: what to run.
        dry_run: build and describe it only.
        accept_changes: go on with a run that was begun with another recipe, where that is possible.

    Raises:
        SystemExit: with one message about what the user can mend.
    """
    with explained(USER_ERRORS):
        check_folder(recipe.training_values()["output_dir"], "training.output_dir")
        output = Path(recipe.training_arguments().output_dir)
        existed = output.exists()
        trainer = prepare(recipe, dry_run, accept_changes)
    if dry_run and not existed:  # transformers' Trainer makes it
        with contextlib.suppress(OSError):  # it isn't empty, or another process was faster
            output.rmdir()
    if trainer is not None and not dry_run:
        with explained(RUN_ERRORS):
            run(trainer, recipe)


def prepare(recipe: Recipe, dry_run: bool = False, accept_changes: bool = False) -> DetectionTrainer | None:
    """Check and build a run, and print what it is. None if it is finished already."""
    output = Path(recipe.training_arguments().output_dir)
    check_shared(output)  # before anything that is looked up in it
    check_output(recipe, output, accept_changes)
    if is_finished(output) and not dry_run:
        if PartialState().is_main_process:
            print(f"{output} holds this run, finished; name another training.output_dir to run it again.")
            print_metrics(final_metrics(output))
        return None
    check_weights(output)
    check_batch(recipe, output, PartialState().num_processes, accept_changes)
    with out_of_memory_explained(lambda: "student and teacher don't fit, before any image: lower the sizes of model"):
        trainer = build_trainer(recipe)
    check_schedule(trainer, recipe)
    if isinstance(trainer, DistillationTrainer):
        check_teacher(trainer.teacher, output, accept_changes)
    if dry_run:  # a run itself looks once the folder is claimed
        check_labels(trainer.model, last_complete_checkpoint(output))
    check_space(trainer)
    if trainer.is_world_process_zero():
        tell = print if dry_run else say
        for note in recipe.notes:
            tell(note)
        tell(printable_lines(describe(trainer)))
    return trainer


def check_schedule(trainer: DetectionTrainer, recipe: Recipe) -> None:
    """Refuse a schedule that can't be meant, once the numbers of processes and of steps are known.

    A warm-up longer than the training gets a tenth of it, noted in the recipe, unless an override gives it.

    Raises:
        RecipeError: such a warm-up that an override gives, or a scaled learning rate that is too high.
    """
    args, steps = trainer.args, planned_steps(trainer)
    if args.get_warmup_steps(steps) > steps:
        given = f"training ends after {steps} steps ({trainer.steps_per_epoch} an epoch)"
        if "training.warmup_steps" in recipe.overridden:
            raise RecipeError(
                f"training.warmup_steps is {args.warmup_steps:g}, but {given}: lower it, such as "
                f"training.warmup_steps={steps // 10}."
            )
        recipe.notes.append(f"training.warmup_steps {steps // 10} instead of {args.warmup_steps:g}, since {given}")
        args.warmup_steps = steps // 10  # the saved recipe keeps its own: the same data give the same again
    if args.scaled_learning_rate > LIMITS["learning_rate"][1]:
        raise RecipeError(
            f"training.learning_rate {args.learning_rate:g} at a batch of {args.base_batch_size} is "
            f"{args.scaled_learning_rate:g} at the {args.global_batch_size} images of this run: lower it, or set "
            "training.base_batch_size=null."
        )


def planned_steps(trainer: DetectionTrainer) -> int:
    """Optimizer steps of a complete run."""
    args = trainer.args
    return args.max_steps if args.max_steps > 0 else math.ceil(trainer.steps_per_epoch * args.num_train_epochs)


def check_space(trainer: DetectionTrainer) -> None:
    """Refuse a run whose checkpoints don't fit on the disk."""
    args = trainer.args
    keeps_best = args.eval_strategy != "no"
    count = checkpoints_at_once(args.save_total_limit, keeps_best) if args.save_strategy != "no" else 1
    check_disk_space(args.output_dir, checkpoint_bytes(trainer.model, args) * count, count)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments, with overrides before and after options alike, which argparse alone refuses."""
    arguments, rest = parser.parse_known_args(argv)
    set_quiet(arguments.quiet)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `train.py` and `python -m crosskd_hf train`."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    add_arguments(parser)
    with lenient_output(results=False):
        launch(parse(parser, argv))


def launch(arguments: argparse.Namespace) -> None:
    """Run parsed arguments."""
    try:
        with interruptible("the same command goes on from the last checkpoint"):
            with explained(USER_ERRORS):
                recipe = load_recipe(arguments.recipe, arguments.overrides)
            train_recipe(recipe, arguments.dry_run, arguments.accept_changes)
    finally:
        PartialState().destroy_process_group()
        gc.collect()  # DDP's hold on the group, for the reason of `TerminationSignal._release_group`


@contextlib.contextmanager
def interruptible(hint: str = "") -> Iterator[None]:
    """End the program at Ctrl-C with a line instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted{f': {hint}' if hint else ''}", file=sys.stderr, flush=True)
        raise SystemExit(130) from None  # 128 + SIGINT, as shells have it


@contextlib.contextmanager
def explained(kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """End the program with one message instead of a traceback at errors of these kinds."""
    try:
        yield
    except kinds as error:
        raise SystemExit(explain(error)) from error


def explain(error: Exception) -> str:
    """An error as one message, with the rank that saw it where there are several."""
    state = PartialState()
    rank = f"[process {state.process_index}] " if state.num_processes > 1 else ""
    name = type(error).__name__
    # torch puts a data worker's traceback before the message.
    text = str(error).rpartition(f"{name}: ")[2] if str(error).startswith("Caught") else str(error)
    if isinstance(error, UnicodeEncodeError):
        text += f" (the locale has the encoding {error.encoding}: set PYTHONUTF8=1 or LC_ALL=C.UTF-8)"
    return printable_lines(f"{rank}{name}: {text}")


if __name__ == "__main__":
    main()
