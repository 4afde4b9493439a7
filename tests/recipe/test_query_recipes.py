"""Recipes of transformers' detectors: what is refused, and by which key."""

import pytest

from crosskd_hf.models.transformers_detectors import processor_of
from crosskd_hf.recipe.build import build_model, build_processor, check_forward
from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.utils.strict_yaml import RecipeError

TIMM = "backbone_config: {model_type: timm_backbone, backbone: resnet18, out_indices: [2, 3, 4]}"


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("dfine_n", ["model.pretrained=a/b"], "model.pretrained has its own architecture"),
        ("dfine_n", ["model.fpn_channels=64"], "model.fpn_channels: d_fine is a detector of transformers"),
        ("gfl_r50_1x", ["model.config={d_model: 64}"], "model.config is for detectors of transformers"),
        ("your_data_dfine", ["model.checkpoint=a/b"], "model.pretrained and model.checkpoint say the same"),
        ("dfine_n", ["data.multiscale=batch"], "data.multiscale batch needs sides"),
        ("dfine_n", ["data.size=[640]"], "data.size [640] must be [height, width]"),
    ],
)
def test_keys_that_do_not_go_together(recipe: str, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe, overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{decoder_layer: 3}", r"model\.config has a key that d_fine doesn't have, 'decoder_layer'.*decoder_layers"),
        ("{num_queries: thirty}", r"model\.config is refused by d_fine.*num_queries"),
        (f"{{{TIMM.replace('resnet18', 'resnet18x')}}}", r"model\.config makes no d_fine.*resnet18x"),
    ],
)
def test_configurations_that_make_no_model(config: str, message: str) -> None:
    recipe = load_recipe("dfine_n", [f"model.config={config}", "model.backbone_weights=random"])
    with pytest.raises(ValueError, match=message):
        build_model(recipe.model, ["cat"])


def test_levels_that_do_not_fit_are_found_before_the_first_step() -> None:
    """The backbone gives three maps; the encoder and decoder of `dfine_n` are for two."""
    recipe = load_recipe("dfine_n", [f"model.config.{TIMM.replace(': {', '={', 1)}", "data.size=[64, 64]"])
    recipe.model.backbone_weights = "random"
    model = build_model(recipe.model, ["cat"])
    with pytest.raises(ValueError, match=r"model\.config makes a d_fine that fails at .* 64 x 64: the levels"):
        check_forward(model, build_processor(model.config, None, recipe.data))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.short_side=96", "data.long_side=128"],
            r"data\.short_side and .*640 x 640.*data\.size",
        ),
        (["data.size=[100, 640]"], r"data\.size and multiscale_short_sides must be multiples of 32, not \[100\]"),
        (["data.multiscale=choice", "data.multiscale_short_sides=[64]"], r"data\.multiscale is choice.*set batch"),
    ],
)
def test_sizes_that_a_detector_cannot_take(overrides: list[str], message: str) -> None:
    recipe = load_recipe("dfine_n", overrides)
    recipe.model.backbone_weights = "random"
    config = build_model(recipe.model, ["cat"]).config
    with pytest.raises(ValueError, match=message):
        build_processor(config, None, recipe.data)


def test_sizes_of_the_recipe_reach_the_processor() -> None:
    recipe = load_recipe("dfine_n", ["data.size=[320, 640]"])
    recipe.model.backbone_weights = "random"
    config = build_model(recipe.model, ["cat"]).config
    assert dict(build_processor(config, None, recipe.data).size)["height"] == 320
    recipe = load_recipe("deformable_detr_r18", ["data.short_side=400", "data.long_side=900"])
    recipe.model.backbone_weights = "random"
    config = build_model(recipe.model, ["cat"]).config
    size = build_processor(config, None, recipe.data).size
    assert (size.shortest_edge, size.longest_edge) == (400, 900) != (processor_of(config).size.shortest_edge, 1333)


def test_single_values_of_a_configuration_are_overridden() -> None:
    recipe = load_recipe("dfine_n", ["model.config.d_model=64", "model.config.backbone_config.backbone=resnet18"])
    plain = load_recipe("dfine_n").model.config
    changed = {"backbone_config": {**plain["backbone_config"], "backbone": "resnet18"}, "d_model": 64}
    assert recipe.model.config == plain | changed
    with pytest.raises(RecipeError, match="must look like section"):
        load_recipe("dfine_n", ["data.size.height=64"])
