"""How a query-based detector of transformers is observed: its encoder's levels, its decoder's queries."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ...models.families import BLIND_TO_PADDING
from ...models.outputs import GroundTruth
from ...models.targets import pad_ground_truth, relative_boxes, unpadded_sizes
from ...models.transformers_detectors import TransformersLabels, detection_losses, processor_of, use_fp32_losses
from ..observation import Observation, Observer, PairError
from .decoders import DECODERS, decoder_of
from .decoders.decoder import LayerPredictions, QueryDecoder


class QueryObserver(Observer):
    """Observes a detector. Of the families in `DECODERS`, observations have its `Run` as their context.

    Attributes:
        blind_to_padding: whether its boxes are relative to the padded input.
        picks: whether its queries start at tokens or boxes that the encoder picks.

    Raises:
        PairError: it has a setting that transformers can't run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        levels: Sequence[int] | None = None,
        classes: Tensor | None = None,
        processor: BaseImageProcessor | None = None,
    ):
        super().__init__(model, levels, classes, processor)
        config = model.config
        if getattr(config, "learn_initial_query", False) or getattr(config, "eval_idx", -1) != -1:
            raise PairError(
                f"{config.model_type}: learn_initial_query and eval_idx can't be set: transformers can't run them"
            )
        use_fp32_losses(model)
        self._decoder = decoder_of(model) if config.model_type in DECODERS else None
        self.blind_to_padding = config.model_type in BLIND_TO_PADDING
        self.picks = getattr(config, "two_stage", True)
        self.feature_channels = self._decoder.width if self._decoder else 0

    @property
    def decoder(self) -> QueryDecoder:
        """The detector's decoder, layer by layer.

        Raises:
            PairError: the family isn't in `DECODERS`.
        """
        if self._decoder is None:
            known = ", ".join(DECODERS)
            raise PairError(f"{self.model_type} has no decoder that can be distilled; those of {known} can")
        return self._decoder

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels: TransformersLabels | None = None
    ) -> Observation:
        """Run the detector.

        Args:
            pixel_values, pixel_mask, labels: as the detector takes them.
        """
        given = {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": labels}
        given = {name: value for name, value in given.items() if value is not None}
        run = None if self._decoder is None else self._decoder.run(**given)
        outputs = self.model(**given) if run is None else run.outputs
        maps = [] if run is None else run.memory.maps()
        sizes = unpadded_sizes(pixel_values, pixel_mask)
        frames = unpadded_sizes(pixel_values, None) if self.model_type in BLIND_TO_PADDING else sizes
        run = None if run is None else replace(run, image_sizes=frames)
        return Observation(
            loss_dict={} if labels is None else detection_losses(self.model, outputs, labels),
            features=maps if self.levels is None else [maps[level] for level in self.levels],
            strides=self.strides,
            outputs=outputs if self.keeps_outputs else None,
            image_sizes=sizes if self.keeps_outputs else None,
            box_frames=frames if self.keeps_outputs else None,
            context=run,
        )

    def ground_truth(self, labels: TransformersLabels, image_sizes: Tensor) -> GroundTruth:
        """See `Observer.ground_truth`."""
        return pad_ground_truth(labels, image_sizes)

    def labels_with(
        self, labels: TransformersLabels | None, more: GroundTruth, image_sizes: Tensor
    ) -> list[dict[str, Tensor]]:
        """A dict per image: `class_labels` and `boxes`. The given boxes stay as they are; scores aren't passed on."""
        boxes = relative_boxes(more.boxes, image_sizes)
        rows = zip(more.labels, boxes, more.mask, strict=True)
        added = [{"class_labels": classes[mask], "boxes": cxcywh[mask]} for classes, cxcywh, mask in rows]
        if labels is None:
            return added
        return [
            {name: torch.cat([label[name], values]) for name, values in new.items()}
            for label, new in zip(labels, added, strict=True)
        ]

    def final(self, observation: Observation) -> LayerPredictions:
        """Predictions after the last layer, of the classes that both models know."""
        return self.shared(self.decoder.own_layers(observation.context)[1][-1])

    def shared(self, predictions: LayerPredictions) -> LayerPredictions:
        """Of the classes that both models know."""
        if self.classes is None:
            return predictions
        return LayerPredictions(predictions.logits.index_select(-1, self.classes), predictions.boxes)


def refuse_other_frames(name: str, student: QueryObserver, teacher: QueryObserver) -> None:
    """Raise PairError if the boxes of the two can be relative to different things: the image, or the padded input.

    Args:
        name: of the method that compares them.
        student, teacher: of the pair.
    """
    processor: Any = student.processor or processor_of(student.model.config)
    pads = not processor.size.height
    if pads and student.blind_to_padding != teacher.blind_to_padding:
        blind = student if student.blind_to_padding else teacher
        raise PairError(
            f"{name}: {blind.model_type} knows of no padding, so that in padded images its boxes are relative to "
            "something else than the other's: give all images one size, data.size=[640, 640]"
        )
