"""When a run saves and evaluates, and how it resumes, so that whatever ends it, work that was done stays done."""

import contextlib
import copy
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerControl, set_seed
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME, safe_globals
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType, TrainOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from ..utils.distributed import check_shared
from ..utils.files import write_atomically
from ..weights.mmdet import CheckpointError
from .averaging import WeightAverage
from .checkpoints import (
    checkpoint_folders,
    newest_complete,
    partial_folder,
    put_in_place,
    remove_surplus,
    step_of,
)
from .disk_space import checkpoint_bytes, full_disk_explained
from .optimization import restore_group_values
from .publishing import HubUpload
from .step_monitor import NonFiniteLossError
from .termination import Terminated

EVALUATION_FILE = "evaluation.json"  # in a checkpoint: the result of the evaluation after it, as the log has it


class SafeSaving(HubUpload):
    """The part of a trainer that saves and resumes.

    Two private methods of `transformers.Trainer` are overridden:

    - `_save_checkpoint`: a checkpoint counts once all of it is on the disk, and none is removed before that.
    - `_load_from_checkpoint`: weights that a checkpoint lacks are an error, and not left as they were drawn.
    """

    _resumed_from: str | None = None
    _trained_to = -1  # the last step that this run has done
    _ends = False  # whether all processes agreed to end after it

    def train(self, *args, **kwargs) -> TrainOutput:
        """As `transformers.Trainer` does it.

        Raises:
            CheckpointError: the checkpoint to resume from has other weights, or holds more than numbers.
            Terminated: SIGTERM came. The step under way was finished and saved.
            ValueError: `output_dir` isn't one and the same folder for all processes.
        """
        check_shared(self.args.output_dir)
        self.control, self._resumed_from = TrainerControl(), None
        self._saved_at = self._trained_to = -1
        self._ends = False
        try:
            with self.termination.listening():
                return super().train(*args, **kwargs)
        finally:
            self.is_in_train = False  # `transformers.Trainer` leaves it True at an exception

    # When -------------------------------------------------------------------------------------------------------

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As `transformers.Trainer` does it. In training, a checkpoint that is due at the same step is saved first.

        The evaluation may take longer than an epoch of a small data set: a run that is killed in it resumes with the
        evaluation. Its result is written beside the checkpoint. Where it decides what is saved or learnt, it comes
        before the checkpoint.

        Raises:
            Terminated: SIGTERM came; everything is saved.
        """
        if not self.is_in_train:
            return super().evaluate(*args, **kwargs)
        plateau = self.args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
        decides = plateau or self.args.save_strategy == SaveStrategy.BEST
        if self._ends or (self.control.should_save and not decides):
            self._save_checkpoint(self.model_wrapped)
        self.raise_if_ended()
        try:
            metrics = super().evaluate(*args, **kwargs)
        except Terminated:
            if self._trained_to == self.state.global_step:  # not while a resumed run catches up
                self._save_checkpoint(self.model_wrapped)
            raise self.terminated() from None
        if self._saved_at == self.state.global_step and self.args.should_save:
            write_atomically(self.latest_checkpoint / EVALUATION_FILE, json.dumps(self._logged_evaluation()))
        return metrics

    def _logged_evaluation(self) -> dict[str, Any] | None:
        """The log's entry of the evaluation at this step."""
        at_step = (entry for entry in self.state.log_history if entry.get("step") == self.state.global_step)
        return next((entry for entry in at_step if "eval_AP" in entry), None)

    def end_step(self) -> bool:
        """Whether to save and end now. Asked after every step, of all processes."""
        self._trained_to, self._ends = self.state.global_step, self.termination.agreed_at_step()
        return self._ends

    @property
    def steps_done(self) -> bool:
        """Whether this run has done a step, and not only resumed."""
        return self._trained_to >= 0

    def raise_if_ended(self) -> None:
        """Raise `Terminated` if `end_step` said so. The step is saved."""
        if self._ends:
            raise self.terminated()

    # Writing ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: object = None) -> None:
        """Save a checkpoint; remove those that it makes needless, and have it uploaded, unless an evaluation is due.

        Raises:
            NonFiniteLossError: what would be saved isn't finite; nothing is written or removed.
            OSError: the disk is full; the partial folder is removed, older checkpoints are as they were.
        """
        folder, writes = self.latest_checkpoint, self.args.should_save
        partial = partial_folder(folder)
        if self._saved_at != self.state.global_step:
            self.check_finite()
            self.store_flos()
            needed = checkpoint_bytes(self.model, self.args)
            with full_disk_explained(folder.parent, partial if writes else None, needed):
                if writes:
                    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
                    self.write_model(partial, self.model, save_original_format=False)  # under its own names
                    self.save_methods(partial)
                    if self.average is not None:
                        self.average.save(partial)
                    self._save_optimizer_and_scheduler(str(partial))
                    self._save_scaler(str(partial))
                    self._export_callbacks()
                    self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
                self.accelerator.wait_for_everyone()
                self._save_rng_state(str(partial))
                self.accelerator.wait_for_everyone()
                if writes:
                    put_in_place(partial, folder)
            self._saved_at = self.state.global_step
        if self.control.should_evaluate:
            return
        if writes:
            self.finish_checkpoint_push()
            remove_surplus(folder.parent, self.args.save_total_limit, newest=folder, best=self.best_checkpoint())
        self.push_checkpoint(folder)

    def check_finite(self) -> None:
        """Look at all that training computes, before it is saved.

        Raises:
            NonFiniteLossError: a loss term since the last log, a parameter, a buffer or the average isn't finite.
        """
        with self._last_checkpoint_named():
            self.monitor.check(self._tensors(), self.accelerator.gather)

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of what is trained, and of the average, by name."""
        module = self.trained_module()
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        average = self.average.model.state_dict() if self.average is not None else {}
        return tensors | {f"the average of {name}": tensor for name, tensor in average.items()}

    @contextlib.contextmanager
    def _last_checkpoint_named(self) -> Iterator[None]:
        """Add to a `NonFiniteLossError` where the run can start again."""
        try:
            yield
        except NonFiniteLossError as error:
            good = newest_complete(self.run_folder)
            saved = f"the last checkpoint, {good}, is from before" if good else "no checkpoint was saved before"
            raise NonFiniteLossError(
                f"{error} (found after step {self.state.global_step}): training is stopped, and {saved}. Usual "
                "causes: a learning rate too high for this batch size, no warm-up, half precision, or broken boxes in "
                "the data. Start the same command again with other values and --accept-changes."
            ) from None

    def write_model(self, folder: Path, model: PreTrainedModel, **options) -> None:
        """Write a model with its image processor and the arguments, without the token: folders may be uploaded."""
        model.save_pretrained(folder, **options)
        self.processing_class.save_pretrained(folder)
        args = copy.copy(self.args)
        args.hub_token = None
        torch.save(args, folder / TRAINING_ARGS_NAME)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model for users: with the average of its weights, if there is one."""
        if self.args.should_save:
            model = self.model if self.average is None else self.average.model
            self.write_model(Path(output_dir or self.args.output_dir), model)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _export_callbacks(self) -> None:
        """Bring the callbacks' part of the trainer's state up to date."""
        states: dict[str, list[dict]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        merged = {name: s[0] if len(s) == 1 else s for name, s in states.items()}
        self.state.stateful_callbacks.update(merged)  # type: ignore[union-attr]

    def best_checkpoint(self) -> Path | None:
        """Of the checkpoints that are kept, the one of the best evaluation."""
        metric, sign = self.args.metric_for_best_model or "", 1 if self.args.greater_is_better else -1
        metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        scores = {entry["step"]: sign * entry[metric] for entry in self.state.log_history if metric in entry}
        saved = [folder for folder in checkpoint_folders(self.args.output_dir) if step_of(folder) in scores]
        return max(saved, key=lambda folder: scores[step_of(folder)], default=None)

    def load_best(self) -> None:
        """After training: load the best checkpoint, if the arguments say so, and tell which it is.

        `state.best_model_checkpoint` isn't set before: `transformers.Trainer` would remove the last checkpoint by it,
        before the final model is saved.
        """
        best = self.best_checkpoint()
        if best is not None and self.args.load_best_model_at_end:
            self.load_weights(best)
            if self.average is not None:
                self.average.load(best)
        self.state.best_model_checkpoint = None if best is None else str(best)

    # Resuming ---------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._resumed_from = resume_from_checkpoint
        folder = Path(resume_from_checkpoint).absolute()
        refuse_pickles(folder)
        self.load_weights(folder)
        if folder in checkpoint_folders(Path(self.args.output_dir).absolute()):
            self._saved_at = step_of(folder)

    def load_weights(self, folder: Path) -> None:
        """Read a checkpoint's model, and what is trained besides.

        Raises:
            CheckpointError: its tensors aren't the model's, by name or shape.
            FileNotFoundError: it has none.
        """
        path = folder / SAFE_WEIGHTS_NAME
        try:
            load_model(self.model, path)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path} is of another model: resume with the model that was saved, or start again in another "
                f"training.output_dir ({reason})"
            ) from error
        self.load_methods(folder)

    def begin(self) -> None:
        """At the beginning of training, once the checkpoint is loaded: all that `transformers.Trainer` leaves open."""
        if self.args.ema_decay is not None:
            self.average = WeightAverage(self.model, self.args.ema_decay, self.args.ema_warmup_steps)
        if self._resumed_from is None:
            return
        if self.average is not None:
            self.average.load(self._resumed_from)
        # For processes that the saved run didn't have: others have their random states restored at the first step.
        seeds = np.random.SeedSequence((self.args.seed, self.state.global_step, self.args.process_index))
        set_seed(int(seeds.generate_state(1)[0]))
        assert self.optimizer is not None
        restore_group_values(self.optimizer, self.lr_scheduler, self.group_values)
        if self.eval_dataset is not None:
            self._catch_up_evaluation(Path(self._resumed_from))

    def _catch_up_evaluation(self, checkpoint: Path) -> None:
        """Evaluate what the checkpoint says is due, or read what its evaluation found.

        Raises:
            Terminated: SIGTERM came; the checkpoint is as it was.
        """
        if self._logged_evaluation() is not None:
            return
        entry = None
        with contextlib.suppress(FileNotFoundError, ValueError):  # none, or a damaged one
            entry = json.loads((checkpoint / EVALUATION_FILE).read_text())
        (entry,) = broadcast_object_list([entry])  # of the first process, whatever others see of a network drive
        control = self.state.stateful_callbacks.get("TrainerControl", {}).get("args", {})  # type: ignore[union-attr]
        # An epoch's end comes after the checkpoint of its last step, which then knows nothing of it.
        epoch_ends = self.args.eval_strategy == IntervalStrategy.EPOCH and float(self.state.epoch or 0).is_integer()
        if entry is not None:
            self.state.log_history.append(entry)
            # As `evaluate` does: callbacks such as EarlyStoppingCallback count evaluations.
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, entry)
        elif control.get("should_evaluate") or epoch_ends:
            entry = self.evaluate()
        else:
            return
        self._determine_best_metric(metrics=entry, trial=None)
        if self._saved_at == self.state.global_step:  # what the evaluation decides: see `_save_checkpoint`
            self._save_checkpoint(self.model_wrapped)


def refuse_pickles(folder: Path) -> None:
    """Refuse a checkpoint whose files hold more than `torch.load` reads with `weights_only`.

    Raises:
        CheckpointError: naming the file. Nothing of it was executed.
    """
    for path in sorted(folder.glob("*.p*t*")):
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds more than numbers and was refused. Nothing was executed. Resume only from checkpoints "
                "that this program wrote."
            ) from error
