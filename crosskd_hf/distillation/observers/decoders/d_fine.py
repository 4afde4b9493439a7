"""D-FINE (arXiv 2410.13842) and DEIMv2 (arXiv 2509.20787)."""

from contextlib import contextmanager
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from .decoder import LayerPredictions, Memory, Queries, Run, module_of
from .rt_detr import RTDetrDecoder, run_inputs


class DFineDecoder(RTDetrDecoder):
    """Each layer adds to the distributions of a box's four distances from the first box."""

    def layer(self, index: int, queries: Queries, memory: Memory) -> tuple[Queries, LayerPredictions]:
        """See `QueryDecoder.layer`."""
        decoder, functions = self.decoder, module_of(self.model)
        hidden = decoder.layers[index](
            queries.hidden,
            position_embeddings=decoder.query_pos_head(queries.boxes).clamp(min=-10, max=10),
            encoder_hidden_states=memory.tokens,
            reference_points=queries.boxes.unsqueeze(2),
            **memory.shapes(),
        )
        first, corners = queries.first_boxes, queries.corners
        if index == 0:
            first = (decoder.pre_bbox_head(hidden) + functions.inverse_sigmoid(queries.boxes)).sigmoid().detach()
        elif first is None:  # the queries come from elsewhere: from here on, their boxes are the first ones
            first = queries.boxes
        change = decoder.bbox_embed[index](hidden if index == 0 else hidden + queries.hidden.detach())
        corners = change if corners is None else change + corners
        bins = functions.weighting_function(decoder.max_num_bins, decoder.up, decoder.reg_scale)
        boxes = functions.distance2bbox(first, decoder.integral(corners, bins), decoder.reg_scale)
        logits = decoder.lqe_layers[index](decoder.class_embed[index](hidden), corners)
        return Queries(hidden, boxes.detach(), None, first, corners), LayerPredictions(logits, boxes)

    def run_of(self, outputs: ModelOutput, inputs: dict[str, Any], hidden: list[Tensor]) -> Run:
        """The outputs' reference boxes begin with those before the first layer's distances: they are left out."""
        memory, picks, skipped = run_inputs(outputs, inputs)
        boxes = outputs.intermediate_reference_points[:, 1:, skipped:].detach().unbind(1)
        first = outputs.initial_reference_points[:, 0, skipped:]
        corners = outputs.intermediate_predicted_corners[:, :, skipped:].unbind(1)
        queries = [Queries(hidden[0][:, skipped:], picks.boxes)]
        for h, box, corner in zip(hidden[1:], boxes, corners, strict=True):
            queries.append(Queries(h[:, skipped:], box, None, first, corner))
        return Run(outputs, memory, picks, queries)

    @contextmanager
    def watching(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """In evaluation, too, the decoder keeps every layer's predictions. Its layers stay in their mode."""
        training, self.decoder.training = self.decoder.training, True
        try:
            with super().watching() as seen:
                yield seen
        finally:
            self.decoder.training = training
