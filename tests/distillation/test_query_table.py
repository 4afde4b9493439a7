"""The table of `docs/query_detectors.md`: which family can what."""

import pytest
from paths import ROOT
from query_models import query_model

from crosskd_hf.distillation import PKD, DistillationPair, KDMethod, PairError, QueryCrossKD, QueryMimic, SoftBoxes
from crosskd_hf.inference.export import QUERY_FAMILIES

FAMILIES = {  # as the page calls it -> as `query_models` does
    "`rt_detr`": "rt_detr",
    "`rt_detr_v2`": "rt_detr_v2",
    "`d_fine`": "d_fine",
    "`deimv2`": "deimv2",
    "`deformable_detr`, two-stage": "deformable_detr two-stage",
    "`deformable_detr`, one-stage": "deformable_detr",
    "`lw_detr`": "lw_detr",
    "`rf_detr`": "rf_detr",
    "`detr`": "detr",
    "`conditional_detr`": "conditional_detr",
    "`dab-detr`": "dab_detr",
    "`yolos`": "yolos",
}


def methods() -> list[KDMethod]:
    """A column each."""
    passes = [QueryCrossKD(QueryCrossKD.Settings(queries=queries)) for queries in ("teacher", "student", "memory")]
    return [*passes, QueryMimic(), PKD(), SoftBoxes()]


def row(name: str) -> str:
    model, cells = query_model(FAMILIES[name]), []
    for method in methods():
        try:
            DistillationPair(model, model, [method])
            cells.append("yes")
        except PairError:
            cells.append("-")
    cells.append("yes" if model.config.model_type in QUERY_FAMILIES else "-")
    return f"| {name} | {' | '.join(cells)} |"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_says_what_a_family_can(name: str) -> None:
    assert row(name) in (ROOT / "docs" / "query_detectors.md").read_text(encoding="utf-8").splitlines()
