"""`crosskd info`: counts by hand, measured costs, origin, errors."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_processor
from torch import nn

from crosskd_hf.commands import main as cli
from crosskd_hf.studies.model_info import describe_model, format_info


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("retinanet", head_blocks=1)
    model.save_pretrained(folder)
    tiny_processor(model).save_pretrained(folder)
    return folder


def test_counts_by_hand(tmp_path: Path) -> None:
    model = tiny_model("retinanet", head_blocks=1, id2label={i: f"class{i}" for i in range(20)})
    info = describe_model(model, tiny_processor(model), str(tmp_path), size=(64, 96), batch_size=2, runs=1)
    # Two blocks of 32 -> 32, 9 anchors x 20 classes and 9 x 4 numbers, 3x3 with bias.
    head = 2 * (32 * 32 * 9 + 32) + 180 * (32 * 9 + 1) + 36 * (32 * 9 + 1)
    fpn = 32 * (128 + 256 + 512) + 3 * 32 + 5 * (32 * 32 * 9 + 32)
    assert info.parts == {"backbone": info.parameters - head - fpn, "FPN": fpn, "head": head}
    assert info.parameters == sum(p.numel() for p in model.parameters()) > info.trained_parameters
    assert info.input_size == (2, 3, 64, 96) and info.latency_ms > 0 and info.peak_memory_mb >= 0
    assert info.weight_mb == pytest.approx(4e-6 * info.parameters, rel=0.01)
    assert info.metrics == {}
    (line,) = [line for line in format_info(info).splitlines() if line.startswith("labels")]
    assert "20: class0" in line and line.endswith("class11, ...")
    # Convolutions only: 2 operations per weight, output cell and image.
    outputs: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, _, output: outputs.append(output.numel() * m.weight[0].numel()))
    with torch.no_grad():
        model(torch.zeros(2, 3, 64, 96))
    assert info.gflops == pytest.approx(2 * sum(outputs) / 1e9, rel=1e-6)


def test_the_size_is_the_processors(saved: Path, capsys: pytest.CaptureFixture) -> None:
    cli.main(["info", str(saved), "--runs", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["input_size"] == [1, 3, 64, 96]  # 64 x 85, padded to whole 32s
    assert found["detector"] == "crosskd_retinanet" and "not known how it was trained" in found["origin"][-1]


def test_recipe_and_metrics_beside_the_model(saved: Path, capsys: pytest.CaptureFixture) -> None:
    (saved / "recipe.yaml").write_text(
        "model: {backbone_weights: random}\nteacher: {checkpoint: 'https://me:pw@a.org/b.pth?sig=x'}\n"
        "distillation: {methods: [crosskd, pkd]}\n"
        "data: {path: data/cells, train_split: train}\ntraining: {output_dir: runs/x}\n"
    )
    (saved / "evaluation").mkdir(exist_ok=True)
    (saved / "evaluation" / "eval_metrics.json").write_text(
        '{"AP": 0.41, "AP50": 0.62, "APs": -1.0, "evaluation": {"split": "val", "images": 72}}'
    )
    try:
        cli.main(["info", str(saved), "--runs", "1", "--size", "40", "50"])
        text = capsys.readouterr().out
    finally:
        (saved / "recipe.yaml").unlink()
    assert "1 x 3 x 64 x 64" in text
    assert "trained on data/cells (train), from random backbone weights" in text
    assert "distilled (crosskd, pkd) from https://a.org/b.pth\n" in text
    assert "AP 41.0  AP50 62.0  APs -  (val, 72 images)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "--runs must be at least 1"),
        (["--batch-size", "-1"], "--batch-size must be at least 1"),
        (["--size", "0", "5"], "--size must be at least 1 pixel"),
        ([], "can't be loaded as a detector"),
    ],
)
def test_what_cannot_be_described(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        cli.main(["info", str(tmp_path), *arguments])
