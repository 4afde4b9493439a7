"""A query-based detector's decoder, layer by layer: what all families have in common.

Each family file calls the detector's own modules in the order of transformers' forward, and copies none of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


@dataclass(frozen=True)
class Memory:
    """What a decoder's layers look at.

    Attributes:
        tokens: (N, S, D) the encoder's output, the levels one after another.
        sizes: (height, width) per level.
        mask: (N, S) True for real pixels, or None: the family knows no padding.
        valid_ratios: (N, levels, 2) x, y: the share of each level that isn't padding, or None.
    """

    tokens: Tensor
    sizes: list[tuple[int, int]]
    mask: Tensor | None = None
    valid_ratios: Tensor | None = None

    def shapes(self) -> dict[str, Any]:
        """The sizes in the three forms that layers take."""
        sizes = torch.as_tensor(self.sizes, dtype=torch.long, device=self.tokens.device)
        starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
        return {"spatial_shapes": sizes, "spatial_shapes_list": list(self.sizes), "level_start_index": starts}


@dataclass(frozen=True)
class Picks:
    """Where queries start.

    Attributes:
        boxes: (N, Q, 4) cxcywh, relative, without gradient.
        box_logits: (N, Q, 4) the same before the sigmoid; None: the family has none.
        tokens: (N, Q) places in the memory; None: the family's queries belong to slots.
    """

    boxes: Tensor
    box_logits: Tensor | None = None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Queries:
    """A decoder's queries between two layers.

    Attributes:
        hidden: (N, Q, D).
        boxes: (N, Q, 4) cxcywh, relative, without gradient: the next layer looks there. One-stage Deformable DETR
            starts from points (N, Q, 2).
        position: (N, Q, D) position embeddings, in families that keep them from layer to layer.
        first_boxes, corners: (N, Q, 4) and (N, Q, 4 * bins): what D-FINE's distances refine. None: from here on.
    """

    hidden: Tensor
    boxes: Tensor
    position: Tensor | None = None
    first_boxes: Tensor | None = None
    corners: Tensor | None = None


@dataclass(frozen=True)
class LayerPredictions:
    """What the heads say after one layer.

    Attributes:
        logits: (N, Q, classes).
        boxes: (N, Q, 4) cxcywh, relative.
    """

    logits: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Run:
    """What one forward pass of a detector showed.

    Attributes:
        outputs: the detector's.
        memory: of its encoder.
        picks: where its queries started; None: they are learnt, not picked.
        queries: before each layer, and after the last.
    """

    outputs: ModelOutput
    memory: Memory
    picks: Picks | None
    queries: list[Queries]


class QueryDecoder:
    """A detector's decoder: observed while the detector runs, and run by hand from any layer on.

    Args:
        model: the detector; left as it is, but for hooks while `watching`.

    Attributes:
        depth: its number of layers.
        width: channels of queries and memory.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.decoder = model.model.decoder
        self.depth = len(self.decoder.layers)
        self.width: int = model.config.d_model

    def layer(self, index: int, queries: Queries, memory: Memory) -> tuple[Queries, LayerPredictions]:
        """Run layer `index` and the heads after it."""
        raise NotImplementedError

    def start(self, picks: Picks, memory: Memory) -> Queries:
        """This detector's queries at another's picks."""
        raise NotImplementedError

    def run_of(self, outputs: ModelOutput, inputs: dict[str, Any], hidden: list[Tensor]) -> Run:
        """What a forward pass showed.

        Args:
            outputs: the detector's.
            inputs: keyword arguments of its decoder.
            hidden: (N, Q, D) before each layer, and after the last.
        """
        raise NotImplementedError

    def rest(self, start: int, queries: Queries, memory: Memory) -> list[LayerPredictions]:
        """The predictions after each layer from `start` on."""
        predictions = []
        for index in range(start, self.depth):
            queries, after = self.layer(index, queries, memory)
            predictions.append(after)
        return predictions

    def run(self, **inputs: Any) -> Run:
        """Call the detector and watch its decoder.

        Args:
            inputs: of the detector.
        """
        with self.watching() as seen:
            outputs = self.model(**inputs)
        kwargs, hidden = seen
        return self.run_of(outputs, kwargs, [kwargs["inputs_embeds"], *hidden])

    @contextmanager
    def watching(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """The decoder's arguments and its layers' outputs, of a call within the context."""
        inputs: dict[str, Any] = {}
        hidden: list[Tensor] = []
        hooks = [self.decoder.register_forward_pre_hook(lambda _, args, kwargs: inputs.update(kwargs), with_kwargs=True)]
        hooks += [layer.register_forward_hook(lambda _, args, out: hidden.append(out)) for layer in self.decoder.layers]
        try:
            yield inputs, hidden
        finally:
            for hook in hooks:
                hook.remove()


def gather(values: Tensor, tokens: Tensor) -> Tensor:
    """(N, S, C), (N, Q) -> (N, Q, C)."""
    return values.gather(1, tokens[..., None].expand(-1, -1, values.shape[-1]))


def detached(queries: Queries) -> Queries:
    """Without gradient."""
    values = {name: value.detach() for name, value in vars(queries).items() if value is not None}
    return replace(queries, **values)


def module_of(model: nn.Module) -> Any:
    """The module that defines a detector: it holds the functions of its family."""
    import sys

    return sys.modules[type(model).__module__]
