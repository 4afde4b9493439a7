"""RT-DETR (arXiv 2304.08069) and RT-DETRv2 (arXiv 2407.17140)."""

from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from .decoder import LayerPredictions, Memory, Picks, Queries, QueryDecoder, Run, gather, module_of


class RTDetrDecoder(QueryDecoder):
    """Boxes are refined from layer to layer; each layer has heads of its own."""

    def layer(self, index: int, queries: Queries, memory: Memory) -> tuple[Queries, LayerPredictions]:
        """See `QueryDecoder.layer`."""
        decoder = self.decoder
        hidden = decoder.layers[index](
            queries.hidden,
            object_queries_position_embeddings=decoder.query_pos_head(queries.boxes),
            encoder_hidden_states=memory.tokens,
            reference_points=queries.boxes.unsqueeze(2),
            **memory.shapes(),
        )
        boxes = (decoder.bbox_embed[index](hidden) + module_of(self.model).inverse_sigmoid(queries.boxes)).sigmoid()
        return Queries(hidden, boxes.detach()), LayerPredictions(decoder.class_embed[index](hidden), boxes)

    def start(self, picks: Picks, memory: Memory) -> Queries:
        """The encoder's output at the picked tokens; no gradient passes here, as in the detector itself."""
        assert picks.tokens is not None
        content = gather(self.encoded(memory), picks.tokens)
        return Queries(content.detach(), picks.boxes)

    def encoded(self, memory: Memory) -> Tensor:
        """(N, S, D): what tokens are picked by."""
        model = self.model.model
        _, valid = model.generate_anchors(
            tuple(memory.sizes), device=memory.tokens.device, dtype=memory.tokens.dtype
        )
        return model.enc_output(valid.to(memory.tokens.dtype) * memory.tokens)

    def run_of(self, outputs: ModelOutput, inputs: dict[str, Any], hidden: list[Tensor]) -> Run:
        """Denoising queries come first, and stay out."""
        memory, picks, skipped = run_inputs(outputs, inputs)
        boxes = [picks.boxes, *outputs.intermediate_reference_points[:, :, skipped:].detach().unbind(1)]
        queries = [Queries(h[:, skipped:], box) for h, box in zip(hidden, boxes, strict=True)]
        return Run(outputs, memory, picks, queries)


def run_inputs(outputs: ModelOutput, inputs: dict[str, Any]) -> tuple[Memory, Picks, int]:
    """Memory, picks, and the number of denoising queries, which come before the picked ones."""
    memory = Memory(inputs["encoder_hidden_states"], list(inputs["spatial_shapes_list"]))
    count = outputs.enc_topk_bboxes.shape[1]
    logits = inputs["reference_points"]
    skipped = logits.shape[1] - count
    tokens = outputs.enc_outputs_class.max(-1).values.topk(count, dim=1).indices
    logits = logits[:, skipped:].detach()
    return memory, Picks(logits.sigmoid(), logits, tokens), skipped
