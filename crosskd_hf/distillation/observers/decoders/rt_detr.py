"""RT-DETR (arXiv 2304.08069) and RT-DETRv2 (arXiv 2407.17140)."""

from typing import Any

from torch import Tensor

from .decoder import LayerPredictions, Memory, Picks, Queries, QueryDecoder, Run, gathered


class RTDetrDecoder(QueryDecoder):
    """Boxes are refined from layer to layer; each layer has heads of its own."""

    needs_tokens = True

    def start(self, picks: Picks, memory: Memory) -> Queries:
        """The encoder's output at the picked tokens. No gradient passes, as in the detector itself."""
        assert picks.tokens is not None
        model, tokens = self.model.model, memory.tokens
        _, valid = model.generate_anchors(memory.sizes, device=tokens.device, dtype=tokens.dtype)
        content = gathered(model.enc_output(valid.to(tokens.dtype) * tokens), picks.tokens)
        return Queries(content.detach(), picks.boxes)

    def attend(self, index: int, queries: Queries, memory: Memory) -> Tensor:
        """See `QueryDecoder.attend`."""
        return self.decoder.layers[index](
            queries.hidden,
            object_queries_position_embeddings=self.decoder.query_pos_head(queries.boxes),
            encoder_hidden_states=memory.tokens,
            reference_points=queries.boxes.unsqueeze(2),
            **memory.shapes,
        )

    def heads(self, index: int, queries: Queries, hidden: Tensor) -> tuple[Queries, LayerPredictions]:
        """See `QueryDecoder.heads`."""
        decoder = self.decoder
        boxes = (decoder.bbox_embed[index](hidden) + self.functions.inverse_sigmoid(queries.boxes)).sigmoid()
        return Queries(hidden, boxes.detach()), LayerPredictions(decoder.class_embed[index](hidden), boxes)

    def seen(self, outputs: Any, inputs: dict[str, Any], hidden: list[Tensor]) -> Run:
        """Denoising queries come before the picked ones, and are left out."""
        count = outputs.enc_topk_bboxes.shape[1]
        logits = inputs["reference_points"][:, -count:].detach()
        picks = Picks(logits.sigmoid(), logits, outputs.enc_outputs_class.max(-1).values.topk(count, dim=1).indices)
        start = Queries(inputs["inputs_embeds"][:, -count:], picks.boxes)
        return Run(outputs, Memory.of(inputs, padded=False), picks, start, [after[:, -count:] for after in hidden])
