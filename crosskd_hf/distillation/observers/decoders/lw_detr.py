"""LW-DETR (arXiv 2406.03459) and RF-DETR (arXiv 2511.09554)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from .decoder import LayerPredictions, Memory, Picks, Queries, QueryDecoder, Run, module_of


class LwDetrDecoder(QueryDecoder):
    """Queries belong to slots, boxes don't move from layer to layer, and all layers share one pair of heads."""

    def layer(self, index: int, queries: Queries, memory: Memory) -> tuple[Queries, LayerPredictions]:
        """See `QueryDecoder.layer`."""
        decoder = self.decoder
        reference, position = decoder.get_reference(queries.boxes, memory.valid_ratios)
        with self.one_group():
            hidden = decoder.layers[index](
                queries.hidden,
                encoder_hidden_states=memory.tokens,
                encoder_attention_mask=memory.mask,
                position_embeddings=position,
                reference_points=reference,
                **memory.shapes(),
            )
        normed = decoder.layernorm(hidden)
        boxes = module_of(self.model).refine_bboxes(queries.boxes, self.model.bbox_embed(normed))
        return Queries(hidden, queries.boxes), LayerPredictions(self.model.class_embed(normed), boxes)

    @contextmanager
    def one_group(self) -> Iterator[None]:
        """A layer in training takes its queries for `group_detr` groups, and would split them."""
        attentions = [layer.self_attn for layer in self.decoder.layers]
        before = [attention.training for attention in attentions]
        for attention in attentions:
            attention.training = False
        try:
            yield
        finally:
            for attention, training in zip(attentions, before, strict=True):
                attention.training = training

    def start(self, picks: Picks, memory: Memory) -> Queries:
        """The content of the first slots, as many as there are picks, or as there are."""
        slots = self.model.model.query_feat.weight[: min(self.model.config.num_queries, picks.boxes.shape[1])]
        boxes = picks.boxes[:, : len(slots)]
        return Queries(slots.expand(len(boxes), -1, -1), boxes)

    def run_of(self, outputs: ModelOutput, inputs: dict[str, Any], hidden: list[Tensor]) -> Run:
        """The first group's queries, which are those of evaluation."""
        memory = Memory(
            inputs["encoder_hidden_states"],
            [tuple(size) for size in inputs["spatial_shapes_list"]],
            inputs["encoder_attention_mask"],
            inputs["valid_ratios"],
        )
        count = self.model.config.num_queries
        boxes = inputs["reference_points"][:, :count]
        return Run(outputs, memory, Picks(boxes.detach()), [Queries(h[:, :count], boxes) for h in hidden])
