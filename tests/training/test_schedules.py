"""Learning rate and weight decay of every parameter group over COCO's full schedule, for each recipe, by hand.

117266 training images at a batch of 16 are 7330 steps an epoch (the last batch is short). 1x is 12 epochs with steps
at 8 and 11, 2x is 24 with steps at 16 and 22.
"""

import pytest
import torch
from tiny import tiny_model

from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.training.optimization import build_optimizer, multistep_scheduler

STEPS = 7330
LINEAR = {0: 1e-5, 1: 0.01 * (0.001 + 0.999 / 499), 250: 0.01 * (0.001 + 0.999 * 250 / 499), 499: 0.01, 500: 0.01}
CONSTANT = {0: 0.01 / 3, 1: 0.01 / 3, 498: 0.01 / 3, 499: 0.01, 500: 0.01}
ONE_X = {8 * STEPS - 1: 0.01, 8 * STEPS: 0.001, 11 * STEPS - 1: 0.001, 11 * STEPS: 0.0001, 12 * STEPS - 1: 0.0001}
TWO_X = {16 * STEPS - 1: 0.01, 16 * STEPS: 0.001, 22 * STEPS - 1: 0.001, 22 * STEPS: 0.0001, 24 * STEPS - 1: 0.0001}
# A recipe of each detector and length; `test_recipe_table.py` compares the settings of all.
NAMES = ("gfl_r50_1x", "gfl_r101_2x_ms", "retinanet_r50_crosskd", "fcos_r50_crosskd", "atss_r50_1x")


@pytest.mark.parametrize("name", NAMES)
def test_learning_rate_and_decay(name: str) -> None:
    accumulated = 2 if name.startswith("atss") else 8  # one device, at the published batch
    recipe = load_recipe(name, [f"training.gradient_accumulation_steps={accumulated}", "training.use_cpu=true"])
    args = recipe.training_arguments()
    assert args.global_batch_size == 16 and args.scaled_learning_rate == 0.01
    fcos, two_x = name.startswith("fcos"), args.num_train_epochs == 24
    model = tiny_model(
        recipe.model.detector,
        backbone="resnet26" if fcos else "resnet18",
        backbone_style=recipe.model.backbone_style,
        frozen_stages=recipe.model.frozen_stages,
        train_batchnorm=recipe.model.train_batchnorm,
    )
    optimizer = build_optimizer(model, args)
    factor = multistep_scheduler(optimizer, args, STEPS).lr_lambdas[0]
    groups = {group["name"]: group for group in optimizer.param_groups}
    # name -> (learning rate, weight decay) over those of ordinary weights
    expected = {"weights": (1, 1e-4)}
    if fcos:
        expected |= {"rate x 2, no decay": (2, 0.0), "no decay": (1, 0.0)}
    assert set(groups) == set(expected)
    for step, rate in {**(CONSTANT if fcos else LINEAR), **(TWO_X if two_x else ONE_X)}.items():
        for group, (multiple, decay) in expected.items():
            assert groups[group]["initial_lr"] * factor(step) == pytest.approx(multiple * rate, rel=1e-6), (
                step,
                group,
            )
            assert groups[group]["weight_decay"] == decay
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in groups.values()) == len(trained)
    batchnorm = [p for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
    assert any(p.requires_grad for p in batchnorm) == (not fcos), "FCOS trains no BatchNorm"
