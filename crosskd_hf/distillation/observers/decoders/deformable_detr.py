"""Deformable DETR (arXiv 2010.04159): one-stage, with box refinement, and two-stage."""

from typing import Any

import torch
from torch import Tensor

from .decoder import LayerPredictions, Memory, Picks, Queries, QueryDecoder, Run, gathered


class DeformableDetrDecoder(QueryDecoder):
    """Position embeddings stay as they were; boxes move with box refinement only."""

    def start(self, picks: Picks, memory: Memory) -> Queries:
        """Content and position embeddings are made of the boxes alone."""
        model, logits = self.model.model, picks.box_logits
        if logits is None:
            logits = self.functions.inverse_sigmoid(picks.boxes)
        embedded = model.pos_trans_norm(model.pos_trans(model.get_proposal_pos_embed(logits)))
        position, content = embedded.split(self.width, dim=2)
        return Queries(content, picks.boxes, position)

    def attend(self, index: int, queries: Queries, memory: Memory) -> Tensor:
        """See `QueryDecoder.attend`."""
        assert memory.valid_ratios is not None
        ratios = memory.valid_ratios if queries.boxes.shape[-1] == 2 else memory.valid_ratios.repeat(1, 1, 2)
        return self.decoder.layers[index](
            queries.hidden,
            object_queries_position_embeddings=queries.position,
            reference_points=queries.boxes[:, :, None] * ratios[:, None],
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=memory.mask,
            **memory.shapes,
        )

    def heads(self, index: int, queries: Queries, hidden: Tensor) -> tuple[Queries, LayerPredictions]:
        """See `QueryDecoder.heads`."""
        reference = self.functions.inverse_sigmoid(queries.boxes)
        change = self.model.bbox_embed[index](hidden)
        if reference.shape[-1] == 2:
            boxes = torch.cat([change[..., :2] + reference, change[..., 2:]], -1).sigmoid()
        else:
            boxes = (change + reference).sigmoid()
        following = boxes.detach() if self.model.config.with_box_refine else queries.boxes
        predictions = LayerPredictions(self.model.class_embed[index](hidden), boxes)
        return Queries(hidden, following, queries.position), predictions

    def seen(self, outputs: Any, inputs: dict[str, Any], hidden: list[Tensor]) -> Run:
        """See `QueryDecoder.seen`."""
        boxes, picks = inputs["reference_points"], None
        if self.model.config.two_stage:
            tokens = outputs.enc_outputs_class[..., 0].topk(boxes.shape[1], dim=1).indices
            picks = Picks(boxes, gathered(outputs.enc_outputs_coord_logits, tokens).detach(), tokens)
        start = Queries(inputs["inputs_embeds"], boxes, inputs["object_queries_position_embeddings"])
        return Run(outputs, Memory.of(inputs, padded=True), picks, start, hidden)
