"""What a forward pass shows to a distillation method, and who shows it.

An `Observer` knows a family of detectors and no method; a method (see `method.py`) knows no family. Between them go
`Observation`s, restricted to what both models of a pair have: the strides and the classes that both know.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.box_coding import distances_to_boxes


@dataclass(frozen=True)
class Predictions:
    """A model's predictions in terms that every family has. P counts priors, or queries.

    Attributes:
        logits: (N, P, classes), of the classes that both models know.
        sides: gives a point of each box (P, 2) xy, and the distances (N, P, 4) from it to the box's left, top, right
            and bottom sides, in pixels of the student's input. Called when needed: not every method looks at boxes.
        mask: (N, P) 1 or 0: 0 leaves a prior out, such as one beyond an image's own area.
        bins: (N, P, 4, bins) logits of the distances to the left, top, right and bottom sides, or None.
        quality: (N, P) logits of the centerness, or None.
    """

    logits: Tensor
    sides: Callable[[], tuple[Tensor, Tensor]]
    mask: Tensor
    bins: Tensor | None = None
    quality: Tensor | None = None

    @property
    def boxes_xyxy(self) -> Tensor:
        """(N, P, 4) pixels of the student's input, not clipped. Decoded anew at each call."""
        return distances_to_boxes(*self.sides())


@dataclass(frozen=True)
class Targets:
    """What a model learnt from the labels.

    Attributes:
        boxes_xyxy: (N, G, 4) pixels, padded.
        labels: (N, G).
        box_mask: (N, G) bool, True for real boxes.
        image_sizes: (N, 2) height and width without padding.
        mask: (N, P) 1 or 0, the weight of each prior in the class loss.
        positive: (N, P) bool, priors that learnt a box.
        class_normalizer, box_normalizer: scalars that the losses were divided by, without gradient.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    box_mask: Tensor
    image_sizes: Tensor
    mask: Tensor
    positive: Tensor
    class_normalizer: Tensor
    box_normalizer: Tensor


class Taps(Protocol):
    """State of a half-run head. Each family has its own; a cross pass needs no more than this of it."""

    def adapted(self, adapt: Callable[[str, Any], Any]) -> Self:
        """The same with every part given the other model's width by `adapt(place, part)`."""

    def aligned_to(self, other: Self) -> Self:
        """The same with the other's statistics, where the family aligns any."""


@dataclass(frozen=True)
class Observation:
    """What a forward pass shows.

    Attributes:
        loss_dict: the model's own loss terms, name -> scalar; empty without labels.
        features: (N, C, H, W) maps after the neck, one per shared stride.
        strides: pixels per cell of each.
        taps: state of the half-run head, if a method asked for it.
        predictions: if a method asked for them.
        targets: with labels only.
        context: the family's own: priors; a decoder's memory and queries.
    """

    loss_dict: Mapping[str, Tensor] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)
    strides: tuple[int, ...] = ()
    taps: Taps | None = None
    predictions: Predictions | None = None
    targets: Targets | None = None
    context: Any = None


class Observer(nn.Module):
    """Runs a model of one family and shows what methods asked for.

    Methods ask before training, in `KDMethod.connect`. The model isn't a submodule: it belongs to the pair, or is the
    frozen teacher.

    Args:
        model: the detector.

    Attributes:
        model_type: of its configuration, by which methods know published weights.
        strides: pixels per cell of the levels that both models have; none if there are no such.
        feature_channels: of the maps after the neck.
    """

    model_type: str
    strides: tuple[int, ...]
    feature_channels: int
    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.__dict__["model"] = model  # not registered
        self.model_type = model.config.model_type

    def ask_for_taps(self, index: int, raw: bool = False) -> None:
        """Have observations show the head's state after `index` blocks; raw: before the ReLU.

        Raises:
            PairError: the head has fewer, or another method asked for another state, or the family has no such.
        """
        raise self._is_not("tapped")

    def ask_for_predictions(self) -> None:
        """Have observations keep the model's own predictions."""
        raise self._is_not("compared prior by prior")

    def tap_channels(self) -> dict[str, int]:
        """Part of the taps -> its channels."""
        raise self._is_not("tapped")

    def labels_like(self, other: "Observer") -> bool:
        """Whether both models label the same priors by the same rule."""
        raise self._is_not("compared prior by prior")

    def incomparable(self, other: "Observer") -> str | None:
        """Why the two models' predictions can't be compared one by one; None if they can."""
        raise self._is_not("compared prior by prior")

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels: Any = None) -> Observation:
        """Run the model on a batch, and compute its losses if there are labels."""
        raise NotImplementedError

    def finish(self, taps: Any, guide: Observation) -> Predictions:
        """The rest of *this* model's head on other taps: the cross pass.

        Args:
            taps: of this family, in this model's width, from where this model's own were tapped.
            guide: this model's observation of the same batch.
        """
        raise self._is_not("tapped")

    def _is_not(self, done: str) -> "PairError":
        return PairError(
            f"{self.model_type} has no priors and towers that could be {done}: crosskd and mimic are for dense "
            "detectors; for query-based ones there are query_crosskd and query_mimic"
        )


class PairError(ValueError):
    """Why a student can't learn from a teacher in the way that is asked for, a line per problem."""
