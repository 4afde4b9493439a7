"""A run from its recipe: prepared, trained, evaluated, saved, and marked as finished."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from ..hub.upload import RECIPE_FILE
from ..training.checkpoints import last_complete_checkpoint
from ..training.disk_space import check_disk_space, full_disk_explained
from ..training.distillation_trainer import DistillationTrainer
from ..training.metric_table import format_metrics
from ..training.run_lock import folder_lock
from ..training.trainer import DetectionTrainer
from ..utils.distributed import check_shared
from ..utils.escaping import printable_lines
from ..utils.machine import is_busy, threads_are_chosen
from ..utils.memory import out_of_memory_explained
from ..utils.progress import say
from .build import build_trainer
from .preflight import check_schedule, describe
from .run_folder import (
    check_batch,
    check_classes_of_run,
    check_output,
    check_teacher,
    final_metrics,
    is_finished,
    mark_finished,
    note_teacher,
)
from .sections import Recipe


def prepare(recipe: Recipe, dry_run: bool = False, accept_changes: bool = False) -> DetectionTrainer | None:
    """Check and build a run, and print what it is.

    Args:
        recipe: what to run.
        dry_run: leave no output folder behind.
        accept_changes: resume a run that was begun with another recipe, where that is possible.

    Returns:
        the trainer; None if the run is finished already.

    Raises:
        RecipeError, CheckpointError, ValueError, OSError: the recipe, its folder, data or a detector can't be used.
    """
    arguments = recipe.training_arguments()
    if dry_run:
        arguments.push_to_hub = False  # transformers' Trainer would make the repository
    output = Path(arguments.output_dir)
    check_shared(output)  # before anything that is looked up in it
    check_output(recipe, output, accept_changes)
    if is_finished(output) and not dry_run:
        if PartialState().is_main_process:
            print(f"{output} holds this run, finished; name another training.output_dir to run it again.")
            print_metrics(final_metrics(output))
        return None
    check_batch(recipe, output, PartialState().num_processes, accept_changes)
    advice = "student and teacher don't fit, before any image: lower the sizes of model"
    with _left_as_it_was(output) if dry_run else contextlib.nullcontext(), out_of_memory_explained(lambda: advice):
        trainer = build_trainer(recipe, arguments)
    check_schedule(trainer, recipe)
    if isinstance(trainer, DistillationTrainer):
        check_teacher(trainer.teacher, output, accept_changes)
    if dry_run:  # a run itself looks once the folder is claimed
        check_classes_of_run(trainer.model, last_complete_checkpoint(output))
    check_disk_space(trainer.model, arguments)
    if trainer.is_world_process_zero():
        tell = print if dry_run else say
        for note in recipe.notes:
            tell(note)
        tell(printable_lines(describe(trainer)))
        if trainer.args.device.type == "cpu" and is_busy() and not threads_are_chosen():
            tell("this machine has other work: with OMP_NUM_THREADS=1 a step may take a fraction of the time")
    return trainer


@contextlib.contextmanager
def _left_as_it_was(output: Path) -> Iterator[None]:
    """Remove the folder that transformers' Trainer makes."""
    existed = output.exists()
    yield
    if not existed:
        with contextlib.suppress(OSError):  # it isn't empty, or another process was faster
            output.rmdir()


def run(trainer: DetectionTrainer, recipe: Recipe) -> None:
    """Train, evaluate and save as a recipe says, from the last complete checkpoint if there is one.

    Raises:
        FolderInUseError: another run is writing to the output folder.
        OSError: the disk is full, or the checkpoint lacks a file that the recipe needs.
        RecipeError: the checkpoint is of other classes than the data.
        Terminated: SIGTERM came; everything up to its step is saved.
    """
    output = Path(trainer.args.output_dir)
    claim = folder_lock(output) if trainer.args.should_save else contextlib.nullcontext()
    with claim, trainer.termination.listening(), full_disk_explained(output):
        checkpoint = last_complete_checkpoint(output)
        check_classes_of_run(trainer.model, checkpoint)
        trainer.recipe_text = recipe.to_yaml()
        trainer.add_callback(RunNotes(trainer, recipe))  # after the trainer's own, which read of the checkpoint too
        if checkpoint is not None:
            say(f"resumes from {checkpoint}")
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


def print_metrics(metrics: dict[str, float]) -> None:
    """The table of a run's metrics."""
    print(format_metrics({name.removeprefix("eval_"): value for name, value in metrics.items()}), flush=True)
