"""What a forward pass shows to a distillation method, and who shows it.

An `Observer` knows a family of detectors and no method; a method (see `method.py`) knows no family. Between them go
`Observation`s, restricted to what both models of a pair have: the strides and the classes that both know.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from ..models.box_coding import distances_to_boxes
from ..models.families import strides_of
from ..models.outputs import GroundTruth

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel


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
        targets: with labels only; None of an unlabelled batch.
        outputs: the model's output as its image processor reads it, if a method asked for detections.
        image_sizes: (N, 2) height and width of each image without padding, beside `outputs`.
        box_frames: (N, 2) height and width of what the boxes of `outputs` are relative to; None: `image_sizes`.
        context: the family's own: priors; a decoder's memory and queries.
    """

    loss_dict: Mapping[str, Tensor] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)
    strides: tuple[int, ...] = ()
    taps: Taps | None = None
    predictions: Predictions | None = None
    targets: Targets | None = None
    outputs: Any = None
    image_sizes: Tensor | None = None
    box_frames: Tensor | None = None
    context: Any = None


class Observer(nn.Module):
    """Runs a model of one family and shows what methods asked for.

    Methods ask before training, in `KDMethod.connect`. The model isn't a submodule: it belongs to the pair, or is the
    frozen teacher.

    Args:
        model: the detector.
        levels: which of its levels the other model has, too; None: all.
        classes: (S,) its labels that the other model knows, in the student's order; None: all, in this order.
        processor: its image processor; None: the one that goes with it.

    Attributes:
        model_type: of its configuration, by which methods know published weights.
        strides: pixels per cell of the levels that both models have; none if there are no such.
        feature_channels: of the maps after the neck.
    """

    model_type: str
    strides: tuple[int, ...]
    feature_channels: int
    classes: Tensor | None
    model: "PreTrainedModel"

    def __init__(
        self,
        model: "PreTrainedModel",
        levels: Sequence[int] | None = None,
        classes: Tensor | None = None,
        processor: "BaseImageProcessor | None" = None,
    ):
        super().__init__()
        self.__dict__["model"] = model  # not registered
        self.model_type = model.config.model_type
        strides = strides_of(model.config)
        self.levels = None if levels is None else tuple(levels)
        self.strides = strides if levels is None else tuple(strides[level] for level in levels)
        self.register_buffer("classes", classes, persistent=False)
        self.processor: Any = processor
        self.keeps_outputs = False

    def ask_for_taps(self, index: int, raw: bool = False) -> None:
        """Have observations show the head's state after `index` blocks; raw: before the ReLU.

        Raises:
            PairError: the head has fewer, or another method asked for another state, or the family has no such.
        """
        raise self._is_not("tapped")

    def ask_for_predictions(self) -> None:
        """Have observations keep the model's own predictions."""
        raise self._is_not("compared prior by prior")

    def ask_for_detections(self) -> None:
        """Have observations keep what `detections` reads."""
        self.keeps_outputs = True
        # Here and not above: who only reads a recipe doesn't wait for transformers' models.
        from ..models.transformers_detectors import processor_of

        self.processor = self.processor or processor_of(self.model.config)

    @torch.compiler.disable
    def detections(self, observation: Observation, score_threshold: float, count: int) -> GroundTruth:
        """What the model finds, after its image processor's post-processing. The host waits for the device.

        Args:
            observation: of this model, which was asked for detections.
            score_threshold: a detection's score must be above. (What the processor itself leaves out stays out.)
            count: the best detections of an image that are kept.

        Returns:
            the boxes, clipped to the image and padded to `count`; labels are this model's.
        """
        sizes = observation.image_sizes
        assert sizes is not None  # see `ask_for_detections`
        frames = sizes if observation.box_frames is None else observation.box_frames
        detected = self.processor.post_process_object_detection(observation.outputs, score_threshold, frames)
        shape = (len(sizes), count)
        boxes, scores, labels = sizes.new_zeros(*shape, 4), sizes.new_zeros(shape), sizes.new_zeros(shape).long()
        for i, (one, (height, width)) in enumerate(zip(detected, sizes.tolist(), strict=True)):
            best = one["scores"].argsort(descending=True, stable=True)[:count]
            scores[i, : len(best)], labels[i, : len(best)] = one["scores"][best], one["labels"][best]
            corners = one["boxes"][best].float().unflatten(1, (2, 2))
            boxes[i, : len(best)] = corners.clamp(min=0).minimum(sizes.new_tensor([width, height])).flatten(1)
        return GroundTruth(boxes, labels, (scores > 0) & (boxes[..., 2:] > boxes[..., :2]).all(-1), scores)

    def ground_truth(self, labels: Any, image_sizes: Tensor) -> GroundTruth:
        """Labels as this model takes them -> padded boxes.

        Args:
            labels: of a batch.
            image_sizes: (N, 2) height and width of each image without padding.
        """
        raise NotImplementedError

    def labels_with(self, labels: Any, more: GroundTruth, image_sizes: Tensor) -> Any:
        """Labels as this model takes them, with further boxes.

        Args:
            labels: of a batch; None: there are no other boxes.
            more: the further boxes, padded; labels are this model's.
            image_sizes: (N, 2) height and width of each image without padding.
        """
        raise NotImplementedError

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
