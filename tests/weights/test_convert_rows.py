"""Full-size checkpoints of every published row predict what the golden cases recorded."""

from pathlib import Path

import pytest
import torch
from golden_cases import Comparison, GoldenCase, compare_detections, detections, probe_maps, synth_tensor
from transformers import AutoModelForObjectDetection

from crosskd_hf.distillation.observers.dense import DenseObserver
from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.weights.loading import convert_checkpoint

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


def write_checkpoint(path: Path, state: dict[str, torch.Tensor]) -> None:
    """The state dict with the keys that carry nothing, as MMDetection wraps it."""
    state = dict(state)
    for key in [key for key in state if key.endswith("running_var")]:
        state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    for key in [key for key in state if key.endswith("relative_position_bias_table")]:
        state[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    state["bbox_head.integral.project"] = torch.linspace(0, 16, 17)
    torch.save({"meta": {"epoch": 12, "config": "model = ..."}, "state_dict": state}, path)


@torch.no_grad()
@pytest.mark.parametrize(
    "row", [row if row == "gfl_r18_crosskd" else pytest.param(row, marks=pytest.mark.slow) for row in ROWS]
)
def test_row_converts_and_predicts(row: str, golden: Path, tmp_path: Path) -> None:
    name, role = ROWS[row]
    if not (golden / f"{name}.json").is_file():
        pytest.skip(f"{golden} holds no {name}")
    case = GoldenCase(golden, name)
    recipe = load_recipe(row)
    if case.setup["num_labels"] != 80:
        pytest.skip("not COCO's labels")
    seed = case.record["seed"] + (1000 if role == "teacher" else 0)
    state = {key: synth_tensor(case.synth, key, tuple(shape), seed) for key, shape in case.record[f"{role}_state"]}
    file = tmp_path / "checkpoint.pth"
    write_checkpoint(file, state)
    convert_checkpoint(str(file), tmp_path / "model", recipe.model, 800, 1333)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "model").eval()

    pixels, mask = case.inputs["pixel_values"], case.inputs["pixel_mask"]
    observer = DenseObserver(model)
    observer.ask_for_predictions()
    maps, result = probe_maps(role, observer(pixels, mask), False), Comparison()
    for key, ours in maps.items():
        reference = case.tensors[f"probe.{key}"]
        index = torch.from_numpy(case.synth.probe_index(f"{name}:{key}", ours.numel()))
        error = (ours.flatten()[index] - reference).abs().max() / reference.abs().max()
        result.add("probes", key, len(reference), error.item(), 1e-4)
    if role == "student":
        found = model(pixels, mask)
        for i, size in enumerate(case.record["image_shapes"]):
            reference = {key: case.tensors[f"pred.{i}.{key}"] for key in ("scores", "labels", "boxes")}
            ours = detections(model, found, i, size, (0.8, 0.8))
            compare_detections(result, f"image {i}", ours, reference, model.config.nms_threshold)
    assert result.count > 2000
    assert not result.failures, "\n".join(result.failures)
