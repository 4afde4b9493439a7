"""How a dense detector is observed: its FPN levels, the taps of its towers, its predictions prior by prior."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import BaseImageProcessor

from ...models.base import DenseDetector
from ...models.outputs import DetectionLosses, GroundTruth, HeadPredictions, Priors
from ...models.targets import Labels, pad_ground_truth, unpadded_sizes
from ..alignment import align
from ..observation import Observation, Observer, PairError, Predictions, Targets


@dataclass(frozen=True)
class DenseTaps:
    """Maps (N, C, H, W) per level that leave the class and the box tower after the tapped block.

    Attributes:
        cls, reg: of the two towers.
        rectified: whether what follows expects maps behind a ReLU. FPN levels have none.
    """

    cls: list[Tensor]
    reg: list[Tensor]
    rectified: bool

    def adapted(self, adapt: Callable[[str, list[Tensor]], list[Tensor]]) -> "DenseTaps":
        """With the other model's number of channels."""
        return replace(self, cls=adapt("cls", self.cls), reg=adapt("reg", self.reg))

    def aligned_to(self, other: "DenseTaps") -> "DenseTaps":
        """With mean and deviation per channel of the other's, then a ReLU unless the other's are FPN levels."""
        # Both towers of both models start from the same FPN levels: they are aligned once.
        if all(a is b for taps in (self, other) for a, b in zip(taps.cls, taps.reg, strict=True)):
            cls = reg = align(self.cls, other.cls, other.rectified)
        else:
            maps = align(self.cls + self.reg, other.cls + other.reg, other.rectified)
            cls, reg = maps[: len(self.cls)], maps[len(self.cls) :]
        return DenseTaps(cls, reg, other.rectified)


@dataclass(frozen=True)
class DenseContext:
    """What only dense detectors have.

    Attributes:
        priors: of the shared levels, if a method asked for predictions.
        predictions: the head's own, of the shared levels, if a method asked for them.
        losses: with labels only, over all levels.
    """

    priors: Priors | None = None
    predictions: HeadPredictions | None = None
    losses: DetectionLosses | None = None


class DenseObserver(Observer):
    """Observes a dense detector. See `Observer`."""

    model: DenseDetector

    def __init__(
        self,
        model: DenseDetector,
        levels: Sequence[int] | None = None,
        classes: Tensor | None = None,
        processor: BaseImageProcessor | None = None,
    ):
        super().__init__(model, levels, classes, processor)
        self.feature_channels = model.config.fpn_channels
        self.tap_index: int | None = None
        self.raw_taps = False
        self.keeps_predictions = False

    def ask_for_taps(self, index: int, raw: bool = False) -> None:
        """Have observations show the towers' maps after `index` blocks; 0 is the FPN level itself."""
        blocks = self.model.head.spec.num_blocks
        if not 0 <= index <= blocks:
            raise PairError(f"the tap is {index}, the towers have {blocks} blocks: set it to {blocks} or less")
        if self.tap_index is not None and (self.tap_index, self.raw_taps) != (index, raw):
            raise PairError("two methods tap different states: give them the same blocks and the same tap")
        self.tap_index, self.raw_taps = index, raw

    def ask_for_predictions(self) -> None:
        """Have observations keep the model's own predictions: a class map is large."""
        self.keeps_predictions = True

    def tap_channels(self) -> dict[str, int]:
        """Of the class and the box tower, at the tap."""
        config = self.model.config
        return dict.fromkeys(("cls", "reg"), config.head_channels if self.tap_index else config.fpn_channels)

    def labels_like(self, other: Observer) -> bool:
        """Whether both have the same priors and assign boxes to them in the same way."""
        return isinstance(other, DenseObserver) and self.model.matching_rule() == other.model.matching_rule()

    def incomparable(self, other: Observer) -> str | None:
        """Prior by prior, predictions of detectors with as many priors per cell can be compared."""
        assert isinstance(other, DenseObserver)
        counts = [observer.model.head.spec.num_anchors for observer in (self, other)]
        return None if counts[0] == counts[1] else f"{counts[0]} and {counts[1]} priors per cell"

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels: Labels | None = None
    ) -> Observation:
        """Run the detector. Without labels, taps and predictions the head isn't run at all.

        Args:
            pixel_values, pixel_mask, labels: see `DenseDetector.forward`.
        """
        model = self.model
        features = model.fpn(model.backbone(pixel_values.to(model.dtype)))
        observation = Observation(features=self._at_levels(features), strides=self.strides, context=DenseContext())
        if labels is None and self.tap_index is None and not (self.keeps_predictions or self.keeps_outputs):
            return observation
        head = model.head(features, tap_index=self.tap_index, raw_taps=self.raw_taps)
        if self.tap_index is not None:
            taps = DenseTaps(self._at_levels(head.cls_taps), self._at_levels(head.reg_taps), self.tap_index > 0)
            observation = replace(observation, taps=taps)
        # Only the networks run in half precision: a pixel of a large box is more than bfloat16 resolves.
        with torch.autocast(pixel_values.device.type, enabled=False):
            predictions, priors = model.flatten(head), model.priors(head)
            # A teacher's images are the student's, which has looked at them.
            if labels is None:
                sizes = unpadded_sizes(pixel_values, pixel_mask)
            else:
                sizes = model.image_sizes(pixel_values, pixel_mask, labels)
            if labels is not None:
                losses, truth = model.losses(predictions, priors, sizes, labels)
                loss_dict = {name: term.sum() for name, term in losses.terms.items()}
                observation = replace(
                    observation,
                    loss_dict=loss_dict,
                    targets=_targets(losses, truth, sizes),
                    context=replace(observation.context, losses=losses),
                )
            if self.keeps_outputs:
                outputs = model.output(predictions, priors, sizes)
                observation = replace(observation, outputs=outputs, image_sizes=sizes)
            if self.keeps_predictions:
                mask = model.class_weights(model.valid_priors(priors, sizes))
                predictions, mask = self._rows(predictions, mask, priors.level_sizes)
                priors = priors if self.levels is None else priors.at_levels(self.levels)
                observation = replace(
                    observation,
                    predictions=self._predictions(predictions, mask, priors),
                    context=replace(observation.context, priors=priors, predictions=predictions),
                )
        return observation

    def ground_truth(self, labels: Labels, image_sizes: Tensor) -> GroundTruth:
        """See `Observer.ground_truth`."""
        return pad_ground_truth(labels, image_sizes)

    def labels_with(self, labels: Labels | None, more: GroundTruth, image_sizes: Tensor) -> dict[str, Tensor]:
        """Padded labels: rows are added, so that their number doesn't depend on what was detected."""
        parts = [more] if labels is None else [self.ground_truth(labels, image_sizes), more]
        scores = [part.mask.float() if part.scores is None else part.scores for part in parts]
        return {
            "boxes_xyxy": torch.cat([part.boxes for part in parts], 1),
            "class_labels": torch.cat([part.labels for part in parts], 1),
            "mask": torch.cat([part.mask for part in parts], 1),
            "scores": torch.cat(scores, 1),
        }

    def finish(self, taps: DenseTaps, guide: Observation) -> Predictions:
        """The towers from the tapped block on, and the prediction convolutions."""
        assert guide.predictions is not None
        cls, reg = taps.cls, taps.reg
        if not torch.is_autocast_enabled(cls[0].device.type):  # it would cast to the weights' precision
            dtype = self.model.head.cls_predictor.weight.dtype
            cls, reg = ([level.to(dtype) for level in maps] for maps in (cls, reg))
        head = self.model.head(cls, reg, start_block=self.tap_index, levels=self.levels)
        with torch.autocast(head.logits[0].device.type, enabled=False):
            return self._predictions(self.model.flatten(head), guide.predictions.mask, guide.context.priors)

    def _predictions(self, predictions: HeadPredictions, mask: Tensor, priors: Priors) -> Predictions:
        model, logits = self.model, predictions.logits
        return Predictions(
            logits=logits if self.classes is None else logits.index_select(-1, self.classes),
            sides=lambda: (priors.centers, model.distances(predictions.boxes, priors)),
            mask=mask,
            bins=model.bins(predictions.boxes),
            quality=predictions.centerness,
        )

    def _at_levels(self, maps: list[Tensor]) -> list[Tensor]:
        return list(maps) if self.levels is None else [maps[level] for level in self.levels]

    def _rows(
        self, predictions: HeadPredictions, mask: Tensor, level_sizes: list[int]
    ) -> tuple[HeadPredictions, Tensor]:
        """Predictions and mask of the shared levels only."""
        if self.levels is None:
            return predictions, mask

        def rows(values: Tensor) -> Tensor:
            return torch.cat(self._at_levels(values.split(level_sizes, dim=1)), dim=1)

        centerness = None if predictions.centerness is None else rows(predictions.centerness)
        return HeadPredictions(rows(predictions.logits), rows(predictions.boxes), centerness), rows(mask)


def _targets(losses: DetectionLosses, truth: GroundTruth, image_sizes: Tensor) -> Targets:
    return Targets(
        boxes_xyxy=truth.boxes,
        labels=truth.labels,
        box_mask=truth.mask,
        image_sizes=image_sizes,
        mask=losses.assignment.class_weights,
        positive=losses.assignment.positive,
        class_normalizer=losses.class_normalizer,
        box_normalizer=losses.box_normalizer,
    )
