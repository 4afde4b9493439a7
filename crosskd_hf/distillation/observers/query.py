"""How a query-based detector of transformers is observed: its encoder's levels, its decoder's queries."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..observation import Observation, Observer, PairError
from .decoders import DECODERS, decoder_of
from .decoders.decoder import LayerPredictions


class QueryObserver(Observer):
    """Observes a detector of one of the families in `DECODERS`. Observations have its `Run` as their context.

    Args:
        model: the detector.
        classes: (S,) its labels that the other model knows, in the student's order; None: all, in this order.

    Attributes:
        decoder: its decoder, layer by layer.
        picks: whether its queries start at tokens or boxes that the encoder picks.

    Raises:
        PairError: the family isn't among them, or has a setting that transformers can't run.
    """

    classes: Tensor | None

    def __init__(self, model: PreTrainedModel, classes: Tensor | None = None):
        super().__init__(model)
        config = model.config
        if config.model_type not in DECODERS:
            raise PairError(
                f"{config.model_type} has no decoder that can be distilled; those of {', '.join(DECODERS)} can"
            )
        if getattr(config, "learn_initial_query", False) or getattr(config, "eval_idx", -1) != -1:
            raise PairError(
                f"{config.model_type}: learn_initial_query and eval_idx can't be set: transformers can't run them"
            )
        self.decoder = decoder_of(model)
        self.picks = getattr(config, "two_stage", True)
        self.strides = strides_of(config)
        self.feature_channels = self.decoder.width
        self.register_buffer("classes", classes, persistent=False)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels: Any = None) -> Observation:
        """Run the detector.

        Args:
            pixel_values, pixel_mask, labels: as the detector takes them.
        """
        run = self.decoder.run(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=labels)
        loss = run.outputs.loss
        return Observation(
            loss_dict={} if loss is None else {"loss_detection": loss},
            features=run.memory.maps(),
            strides=self.strides,
            context=run,
        )

    def shared(self, predictions: LayerPredictions) -> LayerPredictions:
        """Of the classes that both models know."""
        if self.classes is None:
            return predictions
        return LayerPredictions(predictions.logits.index_select(-1, self.classes), predictions.boxes)


def strides_of(config: Any) -> tuple[int, ...]:
    """Pixels per cell of a detector's levels."""
    if hasattr(config, "feat_strides"):
        return tuple(config.feat_strides)
    if hasattr(config, "projector_scale_factors"):
        return tuple(int(config.backbone_config.patch_size / scale) for scale in config.projector_scale_factors)
    if config.model_type == "rf_detr":
        return (config.backbone_config.patch_size,)
    levels = config.num_feature_levels
    return tuple(8 * 2**i for i in range(levels)) if levels > 1 else (32,)
