"""D-FINE (arXiv 2410.13842) and DEIMv2 (arXiv 2509.20787)."""

from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from .decoder import LayerPredictions, Memory, Queries, QueryDecoder
from .rt_detr import RTDetrDecoder


class DFineDecoder(RTDetrDecoder):
    """Each layer changes the distributions of a box's distances from the first box, which the first layer makes.

    Attributes:
        bins: number and scale of a distribution's bins, which stand for the same distances where these are equal. The
            scale is a weight of the checkpoint, not a setting; it is never trained.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        decoder = self.decoder
        self.bins = (decoder.max_num_bins, decoder.reg_scale.tolist(), decoder.up.tolist())

    def attend(self, index: int, queries: Queries, memory: Memory) -> Tensor:
        """See `QueryDecoder.attend`."""
        return self.decoder.layers[index](
            queries.hidden,
            position_embeddings=self.decoder.query_pos_head(queries.boxes).clamp(min=-10, max=10),
            encoder_hidden_states=memory.tokens,
            reference_points=queries.boxes.unsqueeze(2),
            **memory.shapes,
        )

    def heads(self, index: int, queries: Queries, hidden: Tensor) -> tuple[Queries, LayerPredictions]:
        """Queries from elsewhere have no first boxes: from here on, those are the boxes that they come with."""
        decoder, functions = self.decoder, self.functions
        first, corners, change = queries.first_boxes, queries.corners, hidden
        if index > 0:
            change = hidden + queries.hidden.detach()
            first = queries.boxes if first is None else first
        else:
            first = (decoder.pre_bbox_head(hidden) + functions.inverse_sigmoid(queries.boxes)).sigmoid().detach()
        change = decoder.bbox_embed[index](change)
        corners = change if corners is None else change + corners
        bins = functions.weighting_function(decoder.max_num_bins, decoder.up, decoder.reg_scale)
        boxes = functions.distance2bbox(first, decoder.integral(corners, bins), decoder.reg_scale)
        logits = decoder.lqe_layers[index](decoder.class_embed[index](hidden), corners)
        return Queries(hidden, boxes.detach(), None, first, corners), LayerPredictions(logits, boxes)

    def adopt(self, queries: Queries, giver: QueryDecoder, start: Queries) -> Queries:
        """Distributions mean the same where their bins do; without gradient, as between a detector's own layers they
        would have one from later layers only.
        """
        adopted = super().adopt(queries, giver, start)
        if queries.corners is None or not isinstance(giver, DFineDecoder) or self.bins != giver.bins:
            return adopted
        return replace(adopted, first_boxes=queries.first_boxes, corners=queries.corners.detach())
