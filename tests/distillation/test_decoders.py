"""The rest of a decoder from any layer on equals the detector's own: what a cross pass stands on.

Every parameter is random, since initial box heads are nearly constant and hide errors, and one image is padded. These
tests fail when transformers changes a forward that a family's file follows.
"""

import pytest
import torch
from query_models import CONFIGS, query_batch, query_model

from crosskd_hf.distillation.observers.decoders import decoder_of
from crosskd_hf.distillation.observers.decoders.decoder import LayerPredictions, QueryDecoder, Run, same_places

DEPTH = 3  # of the models of `query_models`


def run_of(family: str, training: bool) -> tuple[QueryDecoder, Run, LayerPredictions]:
    """A decoder, what a batch showed, and the detector's own final predictions of the queries that count."""
    model = query_model(family).train(training)
    decoder, inputs = decoder_of(model), query_batch()
    if not training:
        del inputs["labels"]
    with torch.no_grad():
        run = decoder.run(**inputs)
    count = run.start.hidden.shape[1]
    # Denoising queries come first, further groups of queries last.
    own = slice(count) if family in ("lw_detr", "rf_detr") else slice(-count, None)
    return decoder, run, LayerPredictions(run.outputs.logits[:, own], run.outputs.pred_boxes[:, own])


def difference(one: LayerPredictions, other: LayerPredictions) -> float:
    return max((one.logits - other.logits).abs().max().item(), (one.boxes - other.boxes).abs().max().item())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_rest_of_the_decoder_gives_the_detectors_own_predictions(family: str, training: bool) -> None:
    decoder, run, expected = run_of(family, training)
    with torch.no_grad():
        queries, predictions = decoder.own_layers(run)
        assert difference(predictions[-1], expected) == 0
        for k in range(DEPTH):
            _, rest = decoder.layers(k, DEPTH, queries[k], run.memory)
            assert len(rest) == DEPTH - k and difference(rest[-1], expected) == 0
            assert all(difference(a, b) == 0 for a, b in zip(rest, predictions[k:], strict=True))
        _, wrong = decoder.layers(1, DEPTH, queries[0], run.memory)
    assert difference(wrong[-1], expected) > 0.1


@pytest.mark.parametrize(
    "family", [name for name in CONFIGS if name not in ("deformable_detr", "deformable_detr refined")]
)
def test_a_detectors_queries_at_its_own_picks_are_its_own(family: str) -> None:
    decoder, run, _ = run_of(family, training=False)
    with torch.no_grad():
        start = decoder.start(run.picks, run.memory)
    assert torch.equal(start.hidden, run.start.hidden) and torch.equal(start.boxes, run.start.boxes)


def test_one_stage_detectors_pick_nothing() -> None:
    assert run_of("deformable_detr", training=False)[1].picks is None


def test_hooks_are_gone_after_a_run() -> None:
    decoder, _, _ = run_of("rt_detr", training=False)
    assert not decoder.decoder._forward_pre_hooks and not decoder.decoder.layers[0]._forward_hooks


def test_places_of_tokens_on_other_levels() -> None:
    """By hand: levels of 4 x 4 and 2 x 2 cells, and one of 2 x 2."""
    tokens = torch.tensor([[0, 3, 5, 15, 16, 19]])
    assert same_places(tokens, ((4, 4), (2, 2)), ((4, 4), (2, 2))) is tokens
    # On a coarser level, cell (0, 3) lies in (0, 1), cell (1, 1) in (0, 0), cell (3, 3) in (1, 1).
    assert same_places(tokens, ((4, 4), (2, 2)), ((2, 2),)).tolist() == [[0, 1, 0, 3, 0, 3]]
    # The centre of a cell of the coarse level is a corner of four fine cells: it belongs to the lower right one.
    assert same_places(torch.tensor([[0, 3]]), ((2, 2),), ((4, 4),)).tolist() == [[5, 15]]
    # Each goes to the level of the nearest stride.
    assert same_places(torch.tensor([[3]]), ((2, 2),), ((8, 8), (2, 2))).tolist() == [[67]]


def test_corners_are_adopted_between_equal_bins_only() -> None:
    """The scale of the bins is a weight of the checkpoint."""
    giver, run, _ = run_of("d_fine", training=False)
    queries = giver.own_layers(run)[0][2]
    other = query_model("d_fine", 1)
    for name in ("reg_scale", "up"):
        getattr(other.model.decoder, name).data.copy_(getattr(giver.decoder, name).data)
    assert torch.equal(decoder_of(other).adopt(queries, giver, run.start).corners, queries.corners)
    other.model.decoder.reg_scale.data.mul_(2)
    assert decoder_of(other).adopt(queries, giver, run.start).corners is None
