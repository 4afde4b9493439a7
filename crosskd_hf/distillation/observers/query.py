"""How a query-based detector of transformers is observed: its encoder's levels, its decoder's queries."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ...models.transformers_detectors import TransformersLabels, detection_losses, strides_of, use_fp32_losses
from ..observation import Observation, Observer, PairError
from .decoders import DECODERS, decoder_of
from .decoders.decoder import LayerPredictions


class QueryObserver(Observer):
    """Observes a detector of one of the families in `DECODERS`. Observations have its `Run` as their context.

    Args:
        model: the detector.
        levels: which of its levels the other model has, too; None: all.
        classes: (S,) its labels that the other model knows, in the student's order; None: all, in this order.

    Attributes:
        decoder: its decoder, layer by layer.
        picks: whether its queries start at tokens or boxes that the encoder picks.

    Raises:
        PairError: the family isn't among them, or has a setting that transformers can't run.
    """

    classes: Tensor | None

    def __init__(self, model: PreTrainedModel, levels: Sequence[int] | None = None, classes: Tensor | None = None):
        super().__init__(model)
        config, strides = model.config, strides_of(model.config)
        if config.model_type not in DECODERS:
            raise PairError(
                f"{config.model_type} has no decoder that can be distilled; those of {', '.join(DECODERS)} can"
            )
        if getattr(config, "learn_initial_query", False) or getattr(config, "eval_idx", -1) != -1:
            raise PairError(
                f"{config.model_type}: learn_initial_query and eval_idx can't be set: transformers can't run them"
            )
        use_fp32_losses(model)
        self.decoder = decoder_of(model)
        self.picks = getattr(config, "two_stage", True)
        self.levels = tuple(range(len(strides)) if levels is None else levels)
        self.strides = tuple(strides[level] for level in self.levels)
        self.feature_channels = self.decoder.width
        self.register_buffer("classes", classes, persistent=False)

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels: TransformersLabels | None = None
    ) -> Observation:
        """Run the detector.

        Args:
            pixel_values, pixel_mask, labels: as the detector takes them.
        """
        given = {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": labels}
        run = self.decoder.run(**{name: value for name, value in given.items() if value is not None})
        maps = run.memory.maps()
        return Observation(
            loss_dict={} if labels is None else detection_losses(self.model, run.outputs, labels),
            features=[maps[level] for level in self.levels],
            strides=self.strides,
            context=run,
        )

    def final(self, observation: Observation) -> LayerPredictions:
        """Predictions after the last layer, of the classes that both models know."""
        return self.shared(self.decoder.own_layers(observation.context)[1][-1])

    def shared(self, predictions: LayerPredictions) -> LayerPredictions:
        """Of the classes that both models know."""
        if self.classes is None:
            return predictions
        return LayerPredictions(predictions.logits.index_select(-1, self.classes), predictions.boxes)
