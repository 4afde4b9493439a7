"""When a run saves and evaluates, so that whatever ends it, work that was done stays done."""

import contextlib
import copy
import dataclasses
import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME, safe_globals
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType, TrainOutput

from ..utils.distributed import check_shared
from ..weights.mmdet import CheckpointError
from .averaging import WeightAverage
from .checkpoints import (
    MARKER,
    checkpoint_bytes,
    checkpoint_folders,
    disk_errors_explained,
    mark_complete,
    newest_complete,
    remove_checkpoint,
    remove_surplus,
    replace_file,
    step_of,
)
from .termination import Terminated, TerminationSignal

logger = logging.getLogger(__name__)


class SafeSaving:
    """The part of a trainer that saves and goes on; comes before `transformers.Trainer` among the bases.

    Attributes:
        termination: listens to SIGTERM while it trains.
        average: of the weights, from the beginning of training on, if there is an ema_decay.
    """

    termination: TerminationSignal
    average: WeightAverage | None = None
    _resumed_from: str | None = None
    _saved_at = -1  # the last step that this run has saved whole, or went on from
    _asked_at = -1  # the last step at whose end all processes were asked
    _ends = False  # and their answer

    def train(self, *args, **kwargs) -> TrainOutput:
        """As `transformers.Trainer` does it.

        Raises:
            Terminated: SIGTERM came. The step under way was finished and saved.
            ValueError: `output_dir` isn't one and the same folder for all processes.
        """
        check_shared(self.args.output_dir)
        self._resumed_from = None
        self._saved_at = -1
        with self.termination.listening():
            return super().train(*args, **kwargs)

    # When -------------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None
    ) -> None:
        """Log, save and evaluate, as is due after a step or an epoch; end, if SIGTERM came.

        Other than in `transformers.Trainer` the checkpoint comes before the evaluation, which may take longer than an
        epoch of a small data set: a run that is killed in it goes on with the evaluation. What the evaluation finds is
        added to the checkpoint. Where the evaluation decides what is saved or learnt, it still comes first.

        Raises:
            Terminated: everything is saved.
        """
        ends = self._ends_here()
        evaluate, save = self.control.should_evaluate, self.control.should_save
        self.control.should_evaluate = self.control.should_save = False
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )
        self.control.should_evaluate = evaluate  # a checkpoint that is saved now says that it is due
        decides = self.args.save_strategy == SaveStrategy.BEST or self._scheduler_needs_metrics()
        saved = ends or (save and not (evaluate and decides))
        if saved:
            self._save_checkpoint(model, trial)
        if ends:
            raise self._terminated()
        if evaluate:
            try:
                is_best = self._evaluate_and_compare(trial, ignore_keys_for_eval)
            except Terminated:
                if not saved:
                    self._save_checkpoint(model, trial)
                raise self._terminated() from None
            if saved:
                self._update_saved_state()
            elif is_best if self.args.save_strategy == SaveStrategy.BEST else save:
                self._save_checkpoint(model, trial)
                saved = True
        if saved:
            self._keep_checkpoint(trial)

    def _scheduler_needs_metrics(self) -> bool:
        return self.args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)

    def _evaluate_and_compare(self, trial=None, ignore_keys: list[str] | None = None) -> bool:
        """Evaluate. Whether it is the best so far."""
        metrics = self._evaluate(trial, ignore_keys)
        return self._determine_best_metric(metrics=metrics, trial=trial)

    def _ends_here(self) -> bool:
        """Whether to save and end now. Asked after every step, and again at an epoch's end, by all processes."""
        after_step = self._asked_at != self.state.global_step
        if after_step:
            self._asked_at, self._ends = self.state.global_step, self.termination.agreed_at_step()
        # The last step of an epoch is followed by the epoch's end, which has its own evaluation and checkpoint.
        return self._ends and not (after_step and self._epoch_is_whole())

    def _epoch_is_whole(self) -> bool:
        return float(self.state.epoch or 0).is_integer()

    def _terminated(self) -> Terminated:
        step = self.state.global_step
        if self._saved_at == step:
            state = f": its state is saved in {self._latest_checkpoint()}; the same command goes on from there"
        else:
            found = newest_complete(self.args.output_dir) if self.is_world_process_zero() else None
            state = f", which isn't saved; the same command goes on from {found or 'the beginning'}"
        return Terminated(f"ended by SIGTERM after step {step}{state}")

    def catch_up_evaluation(self) -> None:
        """Evaluate what a resumed run's checkpoint says is due: its process ended between saving and evaluating.

        Raises:
            Terminated: SIGTERM came; the checkpoint is as it was.
        """
        if self._resumed_from is None or self.eval_dataset is None:
            return
        saved = self.state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        # An epoch's end comes after the checkpoint of its last step, which then knows nothing of it.
        epoch_ends = self.args.eval_strategy == IntervalStrategy.EPOCH and self._epoch_is_whole()
        step = self.state.global_step
        done = any(entry.get("step") == step and "eval_AP" in entry for entry in self.state.log_history)
        if done or not (saved.get("should_evaluate") or epoch_ends):
            return
        self._evaluate_and_compare()
        self._update_saved_state()
        self._keep_checkpoint(None)

    # Writing ----------------------------------------------------------------------------------------------------

    def _latest_checkpoint(self, trial=None) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Save a checkpoint that counts only once all of it, from every process, is on the disk.

        One of this step that is whole only learns what is new: to write it again would put it at risk.

        Raises:
            NonFiniteLossError: what would be saved isn't finite; nothing is written or removed.
            OSError: the disk is full; the partial folder is removed, older checkpoints are as they were.
        """
        if self._saved_at == self.state.global_step:
            self._update_saved_state()
            return
        self.check_finite()
        folder = self._latest_checkpoint(trial)
        if self.args.should_save:
            remove_checkpoint(folder)  # what an interrupted run left of it
        self.accelerator.wait_for_everyone()
        with disk_errors_explained(folder, checkpoint_bytes(self.model, self.args), self.args.should_save):
            self._write_checkpoint(model, trial, folder)
            self.accelerator.wait_for_everyone()  # every process has written its random state
            if self.args.should_save:
                mark_complete(folder)
        self._saved_at = self.state.global_step
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _write_checkpoint(self, model: nn.Module, trial, folder: Path) -> None:
        """Have transformers write a checkpoint without removing others, which it would do before it is complete."""
        self._export_callbacks()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            args = copy.copy(self.args)
            args.hub_token = None  # checkpoints may be pushed
            torch.save(args, folder / TRAINING_ARGS_NAME)  # it was written without the limit
            if self.average is not None:
                self.average.save(folder)

    def _finalize_training(self, trial, *args, **kwargs) -> TrainOutput:
        """Without the removal of checkpoints, which transformers does before the final model is saved."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _keep_checkpoint(self, trial) -> None:
        """Remove the checkpoints that the one just saved makes needless, and have it uploaded."""
        folder = self._latest_checkpoint(trial)
        if self.args.should_save:
            self.finish_checkpoint_push()
            remove_surplus(
                folder.parent, self.args.save_total_limit, newest=folder, best=self.state.best_model_checkpoint
            )
        self.push_checkpoint(folder)

    def _update_saved_state(self) -> None:
        """Add an evaluation to the checkpoint that was saved before it."""
        folder = self._latest_checkpoint()
        # As transformers does it while saving; `best_global_step` is set by the comparison.
        if self.state.best_global_step == self.state.global_step and (folder / MARKER).is_file():
            self.state.best_model_checkpoint = str(folder)
        self._export_callbacks()
        if self.args.should_save:
            state = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"
            replace_file(folder, TRAINER_STATE_NAME, state)

    def _export_callbacks(self) -> None:
        states: dict[str, list[dict]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks |= {name: s[0] if len(s) == 1 else s for name, s in states.items()}

    # Averaged weights -------------------------------------------------------------------------------------------

    def begin_averaging(self) -> None:
        """Start the average of the weights, or go on with the checkpoint's."""
        if self.args.ema_decay is None:
            return
        self.average = WeightAverage(self.accelerator.unwrap_model(self.model), self.args.ema_decay)
        if self._resumed_from is not None:
            self.average.load(self._resumed_from)

    def average_step(self) -> None:
        """Add the weights after a step to their average."""
        if self.average is not None:
            self.average.update(self.accelerator.unwrap_model(self.model))

    # Going on ---------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resumed_from = resume_from_checkpoint
        folder = Path(resume_from_checkpoint).absolute()
        if folder in checkpoint_folders(Path(self.args.output_dir).absolute()):
            self._saved_at = step_of(folder)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None:
            self.average.load(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore momenta and the place in the schedule; rates, decay and momentum are the arguments'.

        Other than in `transformers.Trainer`, which takes those of the checkpoint too: changed ones would be ignored
        without a word. Where nothing has changed both are the same. A scheduler that isn't a function of the step is
        restored whole.

        Raises:
            CheckpointError: a file holds more than numbers; nothing of it was executed.
            ValueError: the optimizer's state is one of other groups of parameters.
        """
        new = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
        with _pickles_explained(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not isinstance(self.lr_scheduler, LambdaLR):
            return
        scheduler, groups = self.lr_scheduler, self.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] for group in new]
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
        for group, values, rate in zip(groups, new, scheduler._last_lr, strict=True):
            group.update({**values, "lr": rate})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore this process' random state; a process that the saved run didn't have gets one of its own."""
        if checkpoint is None:
            return
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if (Path(checkpoint) / name).is_file():
            with _pickles_explained(checkpoint):
                super()._load_rng_state(checkpoint)
            return
        sequence = np.random.SeedSequence((self.args.seed, self.state.global_step, self.args.process_index))
        set_seed(int(sequence.generate_state(1)[0]))


@contextlib.contextmanager
def _pickles_explained(checkpoint: str | None) -> Iterator[None]:
    """Say which file of a checkpoint holds what torch refuses to unpickle (it reads with `weights_only`)."""
    try:
        yield
    except pickle.UnpicklingError as error:
        names = [path.name for path in sorted(Path(checkpoint).glob("*.p*t*")) if not _is_plain(path)]
        raise CheckpointError(
            f"{checkpoint}: {', '.join(names) or 'a file'} holds more than numbers and was refused. Nothing was "
            "executed. Go on only from checkpoints that this program wrote."
        ) from error


def _is_plain(path: Path) -> bool:
    try:
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True
