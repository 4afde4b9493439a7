"""An exponential moving average of the weights beside those that are trained (`training.ema_decay`)."""

from pathlib import Path
from typing import cast

from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

AVERAGE_FILE = "ema.safetensors"  # in a checkpoint


class WeightAverage:
    """torch's `AveragedModel` of a detector, with what a resumed run needs.

    After step t the average is decay * average + (1 - decay) * weights; after the first it is the weights themselves.
    Buffers, such as BatchNorm's statistics, are the latest.

    Args:
        model: the detector that is trained, without wrappers.
        decay: 0..1; the average covers about the last 1 / (1 - decay) steps.
    """

    def __init__(self, model: PreTrainedModel, decay: float):
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._averaged.requires_grad_(False)

    @property
    def model(self) -> PreTrainedModel:
        """The detector with the averaged weights, in evaluation mode."""
        return cast(PreTrainedModel, self._averaged.module.eval())

    def update(self, model: PreTrainedModel) -> None:
        """Add the weights after an optimizer step."""
        self._averaged.update_parameters(model)

    def save(self, folder: str | Path) -> None:
        """Write the average into a checkpoint."""
        tensors = {key: value.contiguous() for key, value in self._averaged.state_dict().items()}
        save_file(tensors, Path(folder, AVERAGE_FILE))

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
        self._averaged.load_state_dict(load_file(path))
