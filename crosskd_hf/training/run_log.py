"""A training run's log as lines that people read, in a terminal and in a file."""

import sys

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..utils.progress import Progress, duration, is_quiet
from .coco_metrics import SUMMARY_NAMES
from .metric_table import percent
from .step_monitor import STEP_CLOCKS

# What a training log has besides the loss terms, whose names methods choose.
NOT_TERMS = {"loss", "epoch", "learning_rate", "grad_norm", "memory_gb", "step", "total_flos", *STEP_CLOCKS}


class RunLog(TrainerCallback):
    """One line a log, where transformers prints a dict, and bars of training and evaluation."""

    def __init__(self) -> None:
        self.training: Progress | None = None
        self.evaluation: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Open the bar, where a resumed run stands."""
        if state.is_world_process_zero:
            self.training = Progress("train", state.max_steps, "steps", initial=state.global_step, lines=False)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """A step is done."""
        if self.training is not None:
            self.training.update()

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        """A batch of the evaluation is done."""
        if state.is_world_process_zero:
            if self.evaluation is None:
                self.evaluation = Progress("evaluate", len(eval_dataloader), "batches")
            self.evaluation.update()

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        """The evaluation is over."""
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None

    def on_predict(self, args, state, control, metrics, **kwargs) -> None:
        """The same."""
        self.on_evaluate(args, state, control)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Print a line."""
        if state.is_world_process_zero and logs:
            remaining = self.training.remaining() if self.training is not None else None
            line = log_line(logs, state.global_step, state.max_steps, remaining)
            if not is_quiet():
                tqdm.write(line)
                sys.stdout.flush()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Close the bar."""
        if self.training is not None:
            self.training.close()
            self.training = None


def use_run_log(trainer: Trainer) -> None:
    """Have a trainer print `RunLog`'s lines instead of transformers' dicts and bars."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RunLog())


def log_line(logs: dict[str, float], step: int, steps: int, remaining: float | None = None) -> str:
    """A trainer's log as a line.

    Args:
        logs: what `Trainer.log` got: of a training step, an evaluation, or the end of training.
        step, steps: optimizer steps that are done, and in all; 0 steps in all: there is no training.
        remaining: seconds of training that are left.
    """
    if "train_runtime" in logs:
        return f"trained to step {step} in {duration(logs['train_runtime'])}"
    evaluated = next((name.removesuffix("AP") for name in logs if name.endswith("_AP")), None)
    if evaluated is not None:
        names = (name for name in SUMMARY_NAMES[:6] if f"{evaluated}{name}" in logs)
        values = (f"{name} {percent(logs[f'{evaluated}{name}'])}" for name in names)
        return f"evaluation{f' at step {step}' if steps else ''}: " + "  ".join(values)
    parts = [f"step {step}/{steps}", f"epoch {logs.get('epoch', 0):.2f}"]
    terms = [f"{name} {value:.4f}" for name, value in logs.items() if name not in NOT_TERMS]
    if "loss" in logs:
        parts.append(f"loss {logs['loss']:.4f}" + (f" = {' + '.join(terms)}" if terms else ""))
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.3g}")
    if "grad_norm" in logs:
        parts.append(f"gradient {logs['grad_norm']:.3g}")
    if all(clock in logs for clock in STEP_CLOCKS):
        parts.append(
            f"{sum(logs[clock] for clock in STEP_CLOCKS):.2f} s a step, {logs['data_time']:.2f} of it for data"
        )
    if "memory_gb" in logs:
        parts.append(f"{logs['memory_gb']:.1f} GB")
    if remaining is not None:
        parts.append(f"{duration(remaining)} left")
    return "  ".join(parts)
