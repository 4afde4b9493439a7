"""Decoders of transformers' query-based detectors, one file per group of families."""

from transformers import PreTrainedModel

from .d_fine import DFineDecoder
from .decoder import QueryDecoder
from .deformable_detr import DeformableDetrDecoder
from .lw_detr import LwDetrDecoder
from .rt_detr import RTDetrDecoder

DECODERS: dict[str, type[QueryDecoder]] = {
    "rt_detr": RTDetrDecoder,
    "rt_detr_v2": RTDetrDecoder,
    "d_fine": DFineDecoder,
    "deimv2": DFineDecoder,
    "deformable_detr": DeformableDetrDecoder,
    "lw_detr": LwDetrDecoder,
    "rf_detr": LwDetrDecoder,
}


def decoder_of(model: PreTrainedModel) -> QueryDecoder:
    """The decoder of a detector of one of these families.

    Raises:
        KeyError: it is of none.
    """
    return DECODERS[model.config.model_type](model)
