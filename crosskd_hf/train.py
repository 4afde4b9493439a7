"""Run a recipe: `accelerate launch -m crosskd_hf.train RECIPE [section.key=value ...] [--dry-run]`."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from .checkpoints import (
    MARKER,
    FolderInUseError,
    check_disk_space,
    checkpoint_bytes,
    checkpoint_folders,
    checkpoints_at_once,
    claimed,
    last_complete_checkpoint,
)
from .convert import CheckpointError
from .data.load import load_datasets
from .data.problems import DataError
from .evaluation import format_metrics
from .factory import build_model, count_parameters, load_teacher, weights_digest
from .files import write_atomically
from .inheritance import inherit_weights
from .models.image_processing_dense import DenseDetectorImageProcessor
from .monitoring import NonFiniteLossError
from .progress import say, set_quiet
from .recipe import RECIPE_FILE, Recipe, RecipeError, load_recipe
from .run_log import use_run_log
from .trainer import DetectionTrainer, DistillationTrainer

TEACHER_FILE = "teacher.json"  # of which weights a run learns
STATE_FILE = "trainer_state.json"  # written last: a run that has it beside its model is finished
# What ends in one message while a run is built, and while it trains. Other errors there keep their tracebacks.
USER_ERRORS = (RecipeError, CheckpointError, OSError, ValueError)
RUN_ERRORS = (DataError, FolderInUseError, NonFiniteLossError, OSError)
# Training arguments that don't change what is computed, so that a run can go on with other values.
MAY_CHANGE = (
    *("output_dir", "disable_tqdm", "report_to", "run_name", "push_to_hub", "hub_model_id", "hub_strategy"),
    *("logging_steps", "logging_strategy", "eval_steps", "eval_strategy", "save_steps", "save_strategy"),
    *("save_total_limit", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("per_device_eval_batch_size", "load_best_model_at_end", "dataloader_persistent_workers"),
    *("evaluation_pictures", "project"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a training run."""
    parser.add_argument("recipe", help="a recipe's path, or the bare name of one that the package carries")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="replace the recipe's values"
    )
    parser.add_argument("--dry-run", action="store_true", help="build everything, print it, and stop")
    add_quiet(parser)


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
    steps = trainer.steps_per_epoch
    planned = args.max_steps if args.max_steps > 0 else round(steps * args.num_train_epochs)
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
        f"steps              {planned} ({steps} an epoch)",
        f"output             {args.output_dir}",
    ]
    return "\n".join(lines)


def check_output(recipe: Recipe, output: Path) -> None:
    """Refuse a folder that holds another run.

    Raises:
        RecipeError: naming what differs. A checkpoint restores its own learning rate and schedule, so that changed
            values would be ignored; and a finished run would be written over.
    """
    if not (output / RECIPE_FILE).is_file():
        if (output / "config.json").exists() or checkpoint_folders(output):
            raise RecipeError(
                f"{output} holds a model or checkpoints, but no {RECIPE_FILE} of a run: name another "
                "training.output_dir, or remove that folder."
            )
        return
    before, now = (flat_settings(r) for r in (load_recipe(output / RECIPE_FILE), recipe))
    if (before.get("teacher.checkpoint") is None) != (now.get("teacher.checkpoint") is None):
        # One line, instead of one for each of the teacher's fields.
        before, now = (
            {key: value for key, value in settings.items() if key == "teacher.checkpoint" or key[:8] != "teacher."}
            for settings in (before, now)
        )
    changed = [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now} - {"data.cache_dir", *(f"training.{name}" for name in MAY_CHANGE)})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise RecipeError(
            f"{output} holds a run of other settings:\n  - " + "\n  - ".join(changed) + "\nIt can only be continued "
            "as it was. Name another training.output_dir, or remove that folder to start again."
        )


def check_teacher(trainer: DetectionTrainer, output: Path) -> None:
    """Refuse to go on with another teacher than a run was begun with: the one at its path may have been trained anew.

    Raises:
        RecipeError: its weights are others.
    """
    path = output / TEACHER_FILE
    if not isinstance(trainer, DistillationTrainer) or not path.is_file() or not checkpoint_folders(output):
        return
    if json.loads(path.read_text(encoding="utf-8"))["sha256"] != weights_digest(trainer.teacher):
        raise RecipeError(
            f"{output} holds a run that learnt from other weights than its teacher has now: bring those back, or "
            "name another training.output_dir, or remove that folder to start again."
        )


def check_processes(output: Path, processes: int) -> None:
    """Refuse to go on with another number of processes than a run was begun with.

    Raises:
        RecipeError: the restored learning rate and data position would be those of another batch.
    """
    # Whole ones: in others, not every process may have written its state.
    for folder in [folder for folder in checkpoint_folders(output) if (folder / MARKER).exists()][-1:]:
        before = len(list(folder.glob("rng_state*.pth")))  # one a process
        if before and before != processes:
            raise RecipeError(
                f"{output} holds a run of {before} processes, this one has {processes}: its learning rate and place "
                f"in the data would not fit. Start {before} processes, or name another training.output_dir."
            )


def is_finished(output: Path) -> bool:
    """Whether a folder holds the model and the metrics of a run that came to its end."""
    return (output / STATE_FILE).is_file() and (output / "config.json").is_file()


def flat_settings(recipe: Recipe) -> dict[str, object]:
    """`section.key` -> value."""
    sections = ((name, values or {}) for name, values in recipe.to_dict().items())
    settings = {f"{name}.{key}": value for name, values in sections for key, value in values.items()}
    for key in ("teacher.checkpoint", "model.checkpoint", "data.path"):  # one folder has several names
        if settings.get(key) and Path(settings[key]).exists():
            settings[key] = str(Path(settings[key]).resolve())
    return settings


def run(trainer: DetectionTrainer, recipe: Recipe) -> None:
    """Train, evaluate and save as a recipe says, from the last whole checkpoint if there is one.

    Raises:
        FolderInUseError: another run is writing to the output folder.
    """
    output = Path(trainer.args.output_dir)
    with claimed(output) if trainer.args.should_save else contextlib.nullcontext():
        if trainer.is_world_process_zero():
            recipe.save(output / RECIPE_FILE)
        checkpoint = last_complete_checkpoint(output)
        if checkpoint is None and isinstance(trainer, DistillationTrainer) and trainer.is_world_process_zero():
            digest = {"sha256": weights_digest(trainer.teacher)}
            write_atomically(output / TEACHER_FILE, json.dumps(digest) + "\n")
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
        trainer.save_state()  # the last file: see `is_finished`


def final_metrics(output: Path) -> dict[str, float]:
    """The metrics at the end of a finished run: of its own state, since `crosskd evaluate` may have written others."""
    history = json.loads((output / STATE_FILE).read_text(encoding="utf-8"))["log_history"]
    found = next(entry for entry in reversed(history) if "eval_AP" in entry)
    # The file is sorted by name; tables are in the order of the labels.
    labels = json.loads((output / "config.json").read_text(encoding="utf-8")).get("id2label", {})
    classes = [f"eval_AP/{labels[index]}" for index in sorted(labels, key=int)]
    ordered = {name: found[name] for name in classes if name in found}
    return {name: value for name, value in found.items() if name not in ordered} | ordered


def print_metrics(metrics: dict[str, float]) -> None:
    """The table of a run's metrics."""
    print(format_metrics({name.removeprefix("eval_"): value for name, value in metrics.items()}), flush=True)


def train_recipe(recipe: Recipe, dry_run: bool = False) -> None:
    """Everything from the checks to the saved model. A finished run is not run again.

    Raises:
        SystemExit: with one message about what the user can mend.
    """
    with explained(USER_ERRORS):
        output = Path(recipe.training_arguments().output_dir)
        existed = output.exists()
        trainer = prepare(recipe, dry_run)
    if dry_run and not existed:  # transformers' Trainer makes it
        with contextlib.suppress(OSError):  # it isn't empty, or another process was faster
            output.rmdir()
    if trainer is not None and not dry_run:
        with explained(RUN_ERRORS):
            run(trainer, recipe)


def prepare(recipe: Recipe, dry_run: bool = False) -> DetectionTrainer | None:
    """Check and build a run, and print what it is. None if it is finished already."""
    output = Path(recipe.training_arguments().output_dir)
    check_output(recipe, output)
    if is_finished(output) and not dry_run:
        if PartialState().is_main_process:
            print(f"{output} holds this run, finished; remove the folder to run it again.")
            print_metrics(final_metrics(output))
        return None
    check_processes(output, PartialState().num_processes)
    trainer = build_trainer(recipe)
    check_teacher(trainer, output)
    check_space(trainer)
    if trainer.is_world_process_zero():
        (print if dry_run else say)(describe(trainer))
    return trainer


def check_space(trainer: DetectionTrainer) -> None:
    """Refuse a run whose checkpoints don't fit on the disk."""
    args = trainer.args
    count = checkpoints_at_once(args.save_total_limit) if args.save_strategy != "no" else 1
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
    """Command line of `train.py` and `python -m crosskd_hf.train`."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    add_arguments(parser)
    launch(parse(parser, argv))


def launch(arguments: argparse.Namespace) -> None:
    """Run parsed arguments."""
    try:
        with interruptible("the same command goes on from the last checkpoint"):
            with explained(USER_ERRORS):
                recipe = load_recipe(arguments.recipe, arguments.overrides)
            train_recipe(recipe, arguments.dry_run)
    finally:
        PartialState().destroy_process_group()


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
    return f"{rank}{name}: {text}"


if __name__ == "__main__":
    main()
