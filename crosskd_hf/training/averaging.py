"""An exponential moving average of the weights beside those that are trained (`training.ema_decay`)."""

import math
from pathlib import Path
from typing import cast

from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

Tensors = tuple[Tensor, ...] | list[Tensor]
AVERAGE_FILE = "ema.safetensors"  # in a checkpoint


class WeightAverage:
    """torch's `AveragedModel` of a detector, with what a resumed run needs.

    After update t the average is d * average + (1 - d) * weights, where d is `decay`; after the first it is the
    weights themselves. With a warm-up, which is RT-DETR's, d is `decay` * (1 - exp(-t / `warmup_steps`)) from t = 1
    on, and the average begins as the initial weights. Buffers, such as BatchNorm's statistics, are the latest.

    Args:
        model: the detector that is trained, without wrappers, as it is before the first update.
        decay: 0..1; the average covers about the last 1 / (1 - decay) updates.
        warmup_steps: updates after which the decay is at 63% of its value; 0: it is constant.
    """

    def __init__(self, model: PreTrainedModel, decay: float, warmup_steps: int = 0):
        self.decay, self.warmup_steps = decay, warmup_steps
        self._averaged = AveragedModel(model, multi_avg_fn=self._average)
        self._averaged.requires_grad_(False)
        if warmup_steps > 0:
            self._averaged.n_averaged.fill_(1)  # torch would take the first weights over as they are

    def decay_at(self, update: int) -> float:
        """The decay of an update, counted from 1."""
        return self.decay * (1 - math.exp(-update / self.warmup_steps)) if self.warmup_steps > 0 else self.decay

    def _average(self, averaged: Tensors, latest: Tensors, count: Tensor | int) -> None:
        # Not `count`: that is a copy on the weights' device, for which the host would wait.
        get_ema_multi_avg_fn(self.decay_at(int(self._averaged.n_averaged)))(averaged, latest, count)

    @property
    def model(self) -> PreTrainedModel:
        """The detector with the averaged weights, in evaluation mode."""
        return cast(PreTrainedModel, self._averaged.module.eval())

    def update(self, model: PreTrainedModel) -> None:
        """Add the weights after an optimizer step."""
        self._averaged.update_parameters(model)

    def save(self, folder: str | Path) -> None:
        """Write the average into a checkpoint."""
        save_model(self._averaged, str(Path(folder, AVERAGE_FILE)))  # knows of weights that are tied

    def load(self, folder: str | Path) -> None:
        """Read the average of a checkpoint.

        Raises:
            FileNotFoundError: the checkpoint has none.
        """
        path = Path(folder, AVERAGE_FILE)
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {AVERAGE_FILE}: its run was begun without training.ema_decay. Set ema_decay null, "
                "or start again in another training.output_dir."
            )
        load_model(self._averaged, path)
