"""LW-DETR (arXiv 2406.03459) and RF-DETR (arXiv 2511.09554)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .decoder import LayerPredictions, Memory, Picks, Queries, QueryDecoder, Run


class LwDetrDecoder(QueryDecoder):
    """Queries belong to slots, boxes don't move from layer to layer, and all layers share one pair of heads."""

    picks_tokens = False

    def start(self, picks: Picks, memory: Memory) -> Queries:
        """The content of this detector's first slots; the smaller number of queries counts."""
        count = min(self.model.config.num_queries, picks.boxes.shape[1])
        content = self.model.model.query_feat.weight[:count].expand(len(picks.boxes), -1, -1)
        return Queries(content, picks.boxes[:, :count])

    def attend(self, index: int, queries: Queries, memory: Memory) -> Tensor:
        """See `QueryDecoder.attend`."""
        reference, position = self.decoder.get_reference(queries.boxes, memory.valid_ratios)
        layer = self.decoder.layers[index]
        with _one_group(layer):
            return layer(
                queries.hidden,
                position_embeddings=position,
                reference_points=reference,
                encoder_hidden_states=memory.tokens,
                encoder_attention_mask=memory.mask,
                **memory.shapes,
            )

    def heads(self, index: int, queries: Queries, hidden: Tensor) -> tuple[Queries, LayerPredictions]:
        """See `QueryDecoder.heads`."""
        normed = self.decoder.layernorm(hidden)
        boxes = self.functions.refine_bboxes(queries.boxes, self.model.bbox_embed(normed))
        return Queries(hidden, queries.boxes), LayerPredictions(self.model.class_embed(normed), boxes)

    def seen(self, outputs: Any, inputs: dict[str, Any], hidden: list[Tensor]) -> Run:
        """The first group of queries, which is the one that evaluation has."""
        count = self.model.config.num_queries
        boxes = inputs["reference_points"][:, :count]
        start = Queries(inputs["inputs_embeds"][:, :count], boxes)
        memory = Memory.of(inputs, padded=True)
        return Run(outputs, memory, Picks(boxes.detach()), start, [after[:, :count] for after in hidden])


@contextmanager
def _one_group(layer: Any) -> Iterator[None]:
    """In training, self-attention would split its queries into the detector's groups."""
    attention = layer.self_attn
    training, attention.training = attention.training, False
    try:
        yield
    finally:
        attention.training = training
