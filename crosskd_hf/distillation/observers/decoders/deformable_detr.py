"""Deformable DETR (arXiv 2010.04159): one-stage, with box refinement, and two-stage."""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .decoder import LayerPredictions, Memory, Picks, Queries, QueryDecoder, Run, gather, module_of


class DeformableDetrDecoder(QueryDecoder):
    """Position embeddings stay as they were; boxes move only with box refinement."""

    def layer(self, index: int, queries: Queries, memory: Memory) -> tuple[Queries, LayerPredictions]:
        """See `QueryDecoder.layer`."""
        assert memory.valid_ratios is not None
        reference, ratios = queries.boxes, memory.valid_ratios
        scales = torch.cat([ratios, ratios], -1) if reference.shape[-1] == 4 else ratios
        hidden = self.decoder.layers[index](
            queries.hidden,
            object_queries_position_embeddings=queries.position,
            reference_points=reference[:, :, None] * scales[:, None],
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=memory.mask,
            **memory.shapes(),
        )
        delta, logit = self.model.bbox_embed[index](hidden), module_of(self.model).inverse_sigmoid(reference)
        if reference.shape[-1] == 4:
            boxes = (delta + logit).sigmoid()
        else:
            boxes = torch.cat([delta[..., :2] + logit, delta[..., 2:]], -1).sigmoid()
        moved = boxes.detach() if self.model.config.with_box_refine else reference
        predictions = LayerPredictions(self.model.class_embed[index](hidden), boxes)
        return Queries(hidden, moved, queries.position), predictions

    def start(self, picks: Picks, memory: Memory) -> Queries:
        """Content and position are made of the box alone."""
        model = self.model.model
        logits = picks.box_logits
        if logits is None:
            logits = module_of(self.model).inverse_sigmoid(picks.boxes)
        embedded = model.pos_trans_norm(model.pos_trans(model.get_proposal_pos_embed(logits)))
        position, content = embedded.split(self.width, dim=2)
        return Queries(content, picks.boxes, position)

    def run_of(self, outputs: ModelOutput, inputs: dict[str, Any], hidden: list[Tensor]) -> Run:
        """See `QueryDecoder.run_of`."""
        memory = Memory(
            inputs["encoder_hidden_states"],
            list(inputs["spatial_shapes_list"]),
            inputs["encoder_attention_mask"],
            inputs["valid_ratios"],
        )
        picks, boxes = None, inputs["reference_points"]
        if self.model.config.two_stage:
            tokens = outputs.enc_outputs_class[..., 0].topk(boxes.shape[1], dim=1).indices
            picks = Picks(boxes, gather(outputs.enc_outputs_coord_logits, tokens).detach(), tokens)
        references = [boxes, *outputs.intermediate_reference_points.unbind(1)]
        position = inputs["object_queries_position_embeddings"]
        queries = [Queries(h, reference, position) for h, reference in zip(hidden, references, strict=True)]
        return Run(outputs, memory, picks, queries)
