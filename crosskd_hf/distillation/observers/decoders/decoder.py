"""A query-based detector's decoder, layer by layer: what all families have in common.

Each family's file calls the detector's own modules in the order of transformers' forward, and copies none of them.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Memory:
    """What a decoder's layers look at.

    Attributes:
        tokens: (N, S, D) the encoder's output, level after level.
        sizes: (height, width) of each level.
        mask: (N, S) True for real pixels; None in families that know no padding.
        valid_ratios: (N, levels, 2) the share of each level's width and height that isn't padding, or None.
    """

    tokens: Tensor
    sizes: tuple[tuple[int, int], ...]
    mask: Tensor | None = None
    valid_ratios: Tensor | None = None

    @classmethod
    def of(cls, inputs: dict[str, Any], padded: bool) -> "Memory":
        """From a decoder's keyword arguments; RT-DETR's and D-FINE's mask is one of denoising queries."""
        sizes = tuple((int(height), int(width)) for height, width in inputs["spatial_shapes_list"])
        padding = (inputs["encoder_attention_mask"], inputs["valid_ratios"]) if padded else ()
        return cls(inputs["encoder_hidden_states"], sizes, *padding)

    @cached_property
    def shapes(self) -> dict[str, Any]:
        """The sizes in the three forms that layers take; copied to the device once, not for each layer."""
        sizes = torch.as_tensor(self.sizes, dtype=torch.long, device=self.tokens.device)
        starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
        return {"spatial_shapes": sizes, "spatial_shapes_list": list(self.sizes), "level_start_index": starts}

    def maps(self) -> list[Tensor]:
        """(N, D, H, W) of each level."""
        levels = self.tokens.split([height * width for height, width in self.sizes], dim=1)
        return [level.transpose(1, 2).unflatten(2, size) for level, size in zip(levels, self.sizes, strict=True)]


@dataclass(frozen=True)
class Picks:
    """Where queries start.

    Attributes:
        boxes: (N, Q, 4) cxcywh, relative, without gradient.
        box_logits: (N, Q, 4) the same before the sigmoid; None in families that have none.
        tokens: (N, Q) places in the memory; None in families whose queries belong to slots.
    """

    boxes: Tensor
    box_logits: Tensor | None = None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Queries:
    """A decoder's queries between two layers.

    Attributes:
        hidden: (N, Q, D).
        boxes: (N, Q, 4) cxcywh, relative, without gradient: where the next layer looks. One-stage Deformable DETR
            starts from points (N, Q, 2).
        position: (N, Q, D) position embeddings, in families that keep them from layer to layer.
        first_boxes, corners: (N, Q, 4) and (N, Q, 4 * bins), D-FINE's: logits of the distances from the first boxes.
    """

    hidden: Tensor
    boxes: Tensor
    position: Tensor | None = None
    first_boxes: Tensor | None = None
    corners: Tensor | None = None


@dataclass(frozen=True)
class LayerPredictions:
    """What the heads make of the queries after one layer.

    Attributes:
        logits: (N, Q, classes).
        boxes: (N, Q, 4) cxcywh, relative.
    """

    logits: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Run:
    """What a forward pass of a detector showed; without denoising queries and further query groups.

    Attributes:
        outputs: the detector's.
        memory: what its decoder looked at.
        picks: where its queries started; None where they are learnt.
        start: the queries before the first layer.
        hidden: (N, Q, D) after each layer.
        image_sizes: (N, 2) height and width in pixels of what boxes are relative to: the image, or, in families that
            know of no padding, the padded input.
    """

    outputs: Any
    memory: Memory
    picks: Picks | None
    start: Queries
    hidden: list[Tensor]
    image_sizes: Tensor | None = None


class QueryDecoder:
    """A detector's decoder: watched while the detector runs, and run by hand from any layer on.

    Args:
        model: the detector.

    Attributes:
        depth: its number of layers.
        width: channels of queries and memory.
        picks_tokens: whether its picks are places in the memory.
        needs_tokens: whether its queries' content comes from such places.
    """

    picks_tokens = True
    needs_tokens = False

    def __init__(self, model: PreTrainedModel):
        self.model: Any = model  # each family has modules of its own names
        self.decoder: Any = model.model.decoder
        self.depth = len(self.decoder.layers)
        self.width: int = model.config.d_model

    def can_start_from(self, giver: "QueryDecoder") -> bool:
        """Whether another decoder's picks say all that this one's queries start from."""
        return giver.picks_tokens or not self.needs_tokens

    @property
    def functions(self) -> ModuleType:
        """The module of transformers that defines the detector, with its family's functions."""
        return sys.modules[type(self.model).__module__]

    # What a family's file has ------------------------------------------------------------------------------------

    def start(self, picks: Picks, memory: Memory) -> Queries:
        """This detector's queries at given picks."""
        raise NotImplementedError

    def attend(self, index: int, queries: Queries, memory: Memory) -> Tensor:
        """Layer `index` -> (N, Q, D)."""
        raise NotImplementedError

    def heads(self, index: int, queries: Queries, hidden: Tensor) -> tuple[Queries, LayerPredictions]:
        """The heads after layer `index`.

        Args:
            queries: before the layer.
            hidden: (N, Q, D) after it.
        """
        raise NotImplementedError

    def seen(self, outputs: Any, inputs: dict[str, Any], hidden: list[Tensor]) -> Run:
        """What a forward pass showed.

        Args:
            outputs: the detector's.
            inputs: keyword arguments of its decoder.
            hidden: (N, all queries, D) after each layer.
        """
        raise NotImplementedError

    def adopt(self, queries: Queries, giver: "QueryDecoder", start: Queries) -> Queries:
        """Another decoder's queries, in this one's width, as this one's own between two layers.

        Args:
            queries: hidden in this decoder's width.
            giver: the decoder that they come from.
            start: what this decoder's own queries would have been at their picks.
        """
        return Queries(queries.hidden, queries.boxes, start.position)

    # What follows from it ----------------------------------------------------------------------------------------

    def run(self, **inputs: Any) -> Run:
        """Call the detector and watch its decoder.

        Args:
            inputs: of the detector.
        """
        with self._watched() as (kwargs, hidden):
            outputs = self.model(**inputs)
        return self.seen(outputs, kwargs, hidden)

    def own_layers(self, run: Run, stop: int | None = None) -> tuple[list[Queries], list[LayerPredictions]]:
        """A run's queries before layers 0 to `stop`, and the predictions after layers 0 to `stop - 1`.

        The layers aren't run again, the heads are.
        """
        queries, predictions = [run.start], []
        for index, hidden in enumerate(run.hidden[:stop]):
            following, after = self.heads(index, queries[-1], hidden)
            queries.append(following)
            predictions.append(after)
        return queries, predictions

    def layer(self, index: int, queries: Queries, memory: Memory) -> tuple[Queries, LayerPredictions]:
        """Layer `index` and its heads."""
        return self.heads(index, queries, self.attend(index, queries, memory))

    def layers(
        self, start: int, stop: int, queries: Queries, memory: Memory
    ) -> tuple[Queries, list[LayerPredictions]]:
        """Layers `start` to `stop - 1`: the queries that leave the last, and the predictions after each."""
        predictions = []
        for index in range(start, stop):
            queries, after = self.layer(index, queries, memory)
            predictions.append(after)
        return queries, predictions

    @contextmanager
    def _watched(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        inputs: dict[str, Any] = {}
        hidden: list[Tensor] = []
        hooks = [
            self.decoder.register_forward_pre_hook(lambda _, __, given: inputs.update(given), with_kwargs=True),
            *(layer.register_forward_hook(lambda _, __, out: hidden.append(out)) for layer in self.decoder.layers),
        ]
        try:
            yield inputs, hidden
        finally:
            for hook in hooks:
                hook.remove()


def gathered(values: Tensor, tokens: Tensor) -> Tensor:
    """(N, S, C) at (N, Q) -> (N, Q, C)."""
    return values.gather(1, tokens[..., None].expand(-1, -1, values.shape[-1]))


def same_places(tokens: Tensor, sizes: tuple[tuple[int, int], ...], others: tuple[tuple[int, int], ...]) -> Tensor:
    """Tokens of one memory -> those of another one of the same image: the cell, on the level of the nearest stride,
    that holds the token's centre.

    Args:
        tokens: (N, Q).
        sizes, others: (height, width) per level of the one and the other memory.
    """
    if sizes == others:
        return tokens
    starts = [0]
    for height, width in others:
        starts.append(starts[-1] + height * width)
    places = []
    for height, width in sizes:
        # Areas tell strides apart, whatever the image's size.
        nearest = min(range(len(others)), key=lambda i: abs(math.log(others[i][0] * others[i][1] / (height * width))))
        other_height, other_width = others[nearest]
        rows = ((torch.arange(height, device=tokens.device) * 2 + 1) * other_height) // (2 * height)
        columns = ((torch.arange(width, device=tokens.device) * 2 + 1) * other_width) // (2 * width)
        places.append((starts[nearest] + rows[:, None] * other_width + columns).flatten())
    return torch.cat(places)[tokens]
