"""1x1 convolutions that give a student's features the teacher's width: for training, in no saved model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.base import DenseDetector

ATTRIBUTE = "distillation_adapters"  # of the student, so that optimizer, clipping and DDP see them
ADAPTERS_FILE = "adapters.safetensors"  # in a checkpoint


class Adapters(nn.ModuleDict):
    """A convolution a place whose widths differ: `cls` and `reg` for the towers' taps, `fpn` for the feature loss.

    Without bias: what follows standardises every channel.

    Args:
        widths: place -> channels of the student and of the teacher.
        seed: of the weights; the global random state is left as it was.
    """

    def __init__(self, widths: Mapping[str, tuple[int, int]] | None = None, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for place, (student, teacher) in (widths or {}).items():
                self[place] = nn.Conv2d(student, teacher, 1, bias=False)
                nn.init.kaiming_normal_(self[place].weight, nonlinearity="linear")

    def adapt(self, place: str, maps: list[Tensor]) -> list[Tensor]:
        """Maps (N, student's channels, H, W) a level -> (N, teacher's channels, H, W); as they are if widths agree."""
        if place not in self:
            return maps
        weight = self[place].weight
        return [nn.functional.conv2d(level, weight.to(level.dtype)) for level in maps]

    def save(self, folder: str | Path) -> None:
        """Write them into a checkpoint."""
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, _file(folder))

    def load(self, folder: str | Path) -> None:
        """Read those of a checkpoint.

        Raises:
            FileNotFoundError: the checkpoint has none, but there are some here.
            ValueError: it has others.
        """
        if not self and not _file(folder).is_file():
            return
        if not _file(folder).is_file():
            raise FileNotFoundError(
                f"{folder} has no {ADAPTERS_FILE}, which a student whose widths differ from its teacher's needs to go "
                "on: start again in another training.output_dir."
            )
        found = load_file(_file(folder))
        if (saved := _shapes(found)) != (mine := _shapes(self.state_dict())):
            raise ValueError(
                f"{folder} holds adapters {saved or 'none'}, this pair needs {mine or 'none'}: its teacher or its "
                "distillation terms were others. Go on with those, or start again in another training.output_dir."
            )
        self.load_state_dict(found)


def attach_adapters(student: DenseDetector, adapters: Adapters) -> None:
    """Make adapters part of a student while it is trained, but not of what it saves."""
    if adapters:
        student.add_module(ATTRIBUTE, adapters)
        student._keys_to_ignore_on_save = {f"{ATTRIBUTE}.{name}" for name in adapters.state_dict()}


def detach_adapters(student: DenseDetector) -> None:
    """Take adapters out of a student."""
    if hasattr(student, ATTRIBUTE):
        delattr(student, ATTRIBUTE)
        student._keys_to_ignore_on_save = set()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in sorted(tensors.items())}


def _file(folder: str | Path) -> Path:
    return Path(folder) / ADAPTERS_FILE
