"""The recipe of every published row describes its checkpoint. What it then predicts, the golden cases compare."""

from pathlib import Path

import pytest
import torch
from golden_cases import GoldenCase

from crosskd_hf.models import MODELS
from crosskd_hf.models.architecture import build_config
from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.weights.mmdet import reference_keys

# recipe -> the case and role that recorded its model. Recipes of one architecture share a checkpoint's keys.
ROWS = {
    "gfl_r101_2x_ms": ("gfl_r50_crosskd", "teacher"),
    "gfl_r50_1x": ("gfl_r50", "student"),
    "gfl_r50_crosskd": ("gfl_r50_crosskd", "student"),
    "gfl_r18_crosskd": ("gfl_r18_crosskd", "student"),
    "retinanet_r101_2x": ("retinanet_r50_crosskd", "teacher"),
    "retinanet_r50_2x": ("retinanet_r50", "student"),
    "retinanet_r50_crosskd": ("retinanet_r50_crosskd", "student"),
    "retinanet_r18_crosskd": ("retinanet_r18_crosskd", "student"),
    "retinanet_swint_1x": ("retinanet_swint", "student"),
    "fcos_r101_2x_ms": ("fcos_r50_crosskd", "teacher"),
    "fcos_r50_2x_ms": ("fcos_r50_caffe", "student"),
    "atss_r101_1x": ("atss_r50_crosskd", "teacher"),
    "atss_r50_1x": ("atss_r50", "student"),
}


@pytest.mark.parametrize("row", ROWS)
def test_keys_and_shapes_are_those_of_the_checkpoint(row: str, golden: Path) -> None:
    name, role = ROWS[row]
    if not (golden / f"{name}.json").is_file():
        pytest.skip(f"{golden} holds no {name}")
    case, section = GoldenCase(golden, name), load_recipe(row).model
    with torch.device("meta"):
        model = MODELS[section.detector](
            build_config(section, [f"label {i}" for i in range(case.setup["num_labels"])])
        )
    state = model.state_dict()
    found = {name: tuple(state[key].shape) for key, name in reference_keys(model).items()}
    assert found == {key: tuple(shape) for key, shape in case.record[f"{role}_state"]}
