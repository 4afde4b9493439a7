"""Recipes: strict reading, every refusal, and the files that the package carries."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from paths import RECIPES

import crosskd_hf
from crosskd_hf.data.settings import DataSection
from crosskd_hf.distillation.methods import method_names
from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.architecture import DETECTORS
from crosskd_hf.models.families import FAMILIES
from crosskd_hf.recipe.distillation import settings_class
from crosskd_hf.recipe.load import load_recipe, parse_recipe
from crosskd_hf.recipe.packaged import carried_recipes, find_recipe
from crosskd_hf.recipe.sections import ModelSection, Recipe, TeacherSection
from crosskd_hf.utils.strict_yaml import RecipeError

# Nine lists of nine references to the one before: a billion values, whoever follows them.
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def distilled(**sections) -> dict:
    """Content of a small valid recipe with a teacher."""
    return {"teacher": {"checkpoint": "random"}, "distillation": {}} | sections


def plain(epochs: int, **training) -> dict:
    """Content of a recipe whose last epochs are plain."""
    return {"data": {"augment": ["iou_crop"], "plain_epochs": epochs}, "training": training}


def refusal(content: dict) -> str:
    with pytest.raises(RecipeError) as error:
        parse_recipe(content)
    return str(error.value)


def write(folder: Path, text: str | bytes, name: str = "some.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# Values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("data", "flip_probability", "1e-2", 0.01),  # which YAML reads as text
        ("data", "short_side", "640", 640),
        ("data", "short_side", 640.0, 640),
        ("data", "filter_empty", False, False),
        ("data", "max_val_images", None, None),
        ("model", "checkpoint", "you/detector", "you/detector"),
        ("training", "learning_rate", "1e-2", 0.01),
        ("training", "lr_milestones", ["1.6e1", 22], [16.0, 22.0]),
        ("training", "lr_milestones", None, None),
        ("training", "warmup_steps", 500, 500.0),
        ("training", "lr_scheduler_type", "linear", "linear"),
        ("training", "eval_strategy", "epoch", "epoch"),
        ("training", "eval_strategy", False, "no"),  # as YAML reads a bare no
        ("training", "report_to", "wandb", "wandb"),
        ("training", "report_to", ["wandb", "tensorboard"], ["wandb", "tensorboard"]),
        ("training", "accelerator_config", {"split_batches": False}, {"split_batches": False}),
        (
            "training",
            "lr_factors",
            {"sampling_offsets": "1e-1", "encoder": 2},
            {"sampling_offsets": 0.1, "encoder": 2.0},
        ),
        ("training", "activation_checkpointing_kwargs", {"use_reentrant": None}, {"use_reentrant": None}),
        ("training", "trackio_static_space_id", False, False),
        ("training", "base_batch_size", None, None),
    ],
)
def test_values_are_cast_by_the_field(section, key, value, expected):
    # Milestones for the list above.
    content = {"training": {"num_train_epochs": 24}}
    content.setdefault(section, {})[key] = value
    read = parse_recipe(content)
    cast = read.training[key] if section == "training" else getattr(getattr(read, section), key)
    assert cast == expected
    assert type(cast) is type(expected)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data", "short_side", True, "data.short_side: True is no whole number"),
        ("data", "short_side", 1.5, "data.short_side: 1.5 is no whole number"),
        ("data", "short_side", "1.5", "'1.5' is no whole number"),
        ("data", "short_side", None, "must have a value"),
        ("data", "short_side", [800], "is no whole number"),
        ("data", "short_side", 0, "data.short_side: 0 must be at least 1"),
        ("data", "flip_probability", True, "True is no number"),
        ("data", "flip_probability", float("nan"), "is not finite"),
        ("data", "flip_probability", "nan", "is not finite"),
        ("data", "flip_probability", 10**400, "is too large"),
        ("data", "flip_probability", 1.01, "must be at most 1"),
        ("data", "flip_probability", -0.01, "must be at least 0"),
        ("data", "filter_empty", 1, "is neither true nor false"),
        ("data", "path", 2017, "data.path: 2017 is no text: put it in quotes"),
        ("data", "multiscale", "rnage", "must be one of none, range, choice"),
        ("data", "multiscale_short_sides", 640, "is no list of int"),
        ("data", "multiscale_short_sides", [640, 0], "must be at least 1"),
        ("data", "multiscale_short_sides", [640, "x"], "is no whole number"),
        ("model", "detector", "yolo", "must be one of gfl"),
        ("model", "frozen_stages", 5, "must be at most 4"),
        ("model", "fpn_extra_convs", "on_lateral", "must be one of on_output, on_input"),
        ("training", "learning_rate", "fast", "training.learning_rate: 'fast' is no number"),
        ("training", "learning_rate", -1, "training.learning_rate is -1.0; it must be from 0"),
        ("training", "lr_milestones", 8, "is no list of float"),
        ("training", "lr_scheduler_type", "liner", "must be one of linear, cosine"),
        ("training", "eval_strategy", True, "is no text"),  # what YAML makes of a bare no
        ("training", "lr_factors", {"encoder": "slow"}, "training.lr_factors: {'encoder': 'slow'} is no number."),
        ("training", "lr_factors", {1: 0.1}, "training.lr_factors: {1: 0.1} is no text: put it in quotes."),
        ("training", "lr_factors", "encoder", "training.lr_factors is 'encoder'; it must map parts"),
        ("training", "lr_factors", 0.1, "training.lr_factors: 0.1 is no mapping"),
        ("training", "optim", "sdg", "training.optim: 'sdg' must be one of"),
        ("training", "train_sampling_strategy", "unknown", "must be one of random"),
        ("training", "trackio_static_space_id", True, "must be one of False"),
        ("training", "hub_token", "hf_secret", "training.hub_token would be written into recipe.yaml"),
    ],
)
def test_refused_values(section, key, value, message):
    text = refusal(distilled(**{section: {key: value}}))
    assert message in text
    assert f"{section}.{key}" in text
    assert text.count("\n  - ") == 1
    assert "hf_secret" not in text


def test_unknown_names_come_with_near_ones():
    assert "unknown section 'modle'. Did you mean model?" in refusal({"modle": {}})
    text = refusal({"model": {"backbon": "resnet18"}})
    assert "unknown key model.backbon (value 'resnet18'). Did you mean backbone" in text
    # Removed from transformers, 5.0.
    text = refusal({"training": {"warmup_ratio": 0.1}})
    assert "unknown key training.warmup_ratio (value 0.1). Did you mean" in text
    assert "warmup_steps" in text
    assert "unknown key data.qqqq" in refusal({"data": {"qqqq": 1}})
    assert "unknown key data.True" in refusal({"data": {True: 1}})


def test_all_problems_are_told_at_once():
    text = refusal(
        {
            "model": {"frozen_stages": 9, "bakcbone": "x"},
            "data": {"multiscale": "range", "flip_probability": "often"},
            "training": {"learning_rate": "fast", "max_steps": 3},
            "teacher": {"checkpoint": "random"},
        }
    )
    for part in (
        "model.frozen_stages",
        "model.bakcbone",
        "data.multiscale range",
        "data.flip_probability",
        "training.learning_rate",
        "training.warmup_steps is 500",
        "no distillation",
    ):
        assert part in text
    assert text.count("\n  - ") == 7


@pytest.mark.parametrize(
    "content",
    [
        {"data": {"multiscale": "rnage", "multiscale_short_sides": [480, 800]}},
        # A misspelt section isn't missing as well.
        {"teacher": {"checkpoint": "random"}, "distilation": {}},
        {"teacher": {"checkpoint": "random"}, "distillation": [1]},
    ],
)
def test_a_refused_value_causes_no_second_message(content):
    assert refusal(content).count("\n  - ") == 1


def test_a_section_must_be_a_mapping():
    text = refusal({section: [1, 2] for section in ("model", "teacher", "data", "training")})
    for section in ("model", "teacher", "data", "training"):
        assert f"section {section} must hold keys and values, not [1, 2]" in text


# Combinations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"distillation": {}}, "distillation needs a teacher"),
        ({"data": {"unlabeled": "photos"}}, "data.unlabeled needs a teacher"),
        ({"teacher": {"checkpoint": "random"}}, "there is a teacher but no distillation"),
        (distilled(teacher={}), "teacher.checkpoint is missing"),
        ({"model": {"backbone": "swin_tiny_patch4_window7_224", "backbone_style": "caffe"}}, "caffe is for ResNets"),
        ({"data": {"multiscale": "range"}}, r"needs multiscale_short_sides [lowest, highest], not []"),
        ({"data": {"multiscale": "range", "multiscale_short_sides": [800, 480]}}, "not [800, 480]"),
        ({"data": {"multiscale": "range", "multiscale_short_sides": [1, 2, 3]}}, "not [1, 2, 3]"),
        ({"data": {"multiscale": "choice"}}, "data.multiscale choice needs values"),
        ({"data": {"multiscale_short_sides": [640]}}, "data.multiscale is none"),
        ({"data": {"multiscale": "choice", "multiscale_short_sides": [640, 1400]}}, "to 1400, above data.long_side"),
        ({"data": {"short_side": 1400}}, "data.long_side 1333 is below data.short_side 1400"),
        ({"data": {"images": "{name}"}}, "data.images '{name}' may only have the placeholder {split}"),
        ({"data": {"annotations": "{split.json"}}, "data.annotations '{split.json' may only have"),
        ({"data": {"augment": ["flop"]}}, "data.augment: there is no augmentation 'flop'. Valid: flip, photometric"),
        ({"data": {"augment": "flip"}}, "data.augment: 'flip' is no list"),
        ({"data": {"augment": [{"iou_crop": {"p": 1}}]}}, "data.augment: iou_crop has no option 'p' (value 1). Valid"),
        (
            {"data": {"augment": [], "flip_probability": 0.4}},
            "data.flip_probability is 0.4, but with data.augment",
        ),
        ({"data": {"plain_epochs": 1}}, "data.plain_epochs is 1, but data.augment is None"),
        (plain(12, num_train_epochs=12), "data.plain_epochs is 12, but training.num_train_epochs 12: data.augment"),
        ({"training": {"num_train_epochs": 10}}, "training.lr_milestones [11.0] lie outside the 10 epochs"),
        ({"training": {"max_steps": 4}}, "training.warmup_steps is 500, but training ends after max_steps 4"),
        ({"training": {"remove_unused_columns": True}}, "training.remove_unused_columns is True"),
    ],
)
def test_impossible_combinations(content, message):
    text = refusal(content)
    assert message in text
    assert text.count("\n  - ") == 1


@pytest.mark.parametrize(
    "content",
    [
        {},
        distilled(),
        distilled() | {"data": {"unlabeled": "photos"}},
        {"data": {"unlabeled_ratio": 0.5}},
        {"model": {"backbone": "resnet101", "backbone_style": "caffe"}},
        {"data": {"multiscale": "range", "multiscale_short_sides": [480, 800]}},
        {"data": {"multiscale": "choice", "multiscale_short_sides": [640]}},
        {"data": {"images": "all", "annotations": "{split}.json"}},
        {"data": {"augment": ["flip", {"zoom_out": {"side_range": [1, 2]}}], "flip_probability": 0.5}},
        plain(11, num_train_epochs=12),
        plain(12, max_steps=600),  # of how many epochs, the trainer knows
        plain(20),  # without its training, as `evaluate` reads it
        {"training": {"max_steps": 4, "warmup_steps": 0}},
    ],
)
def test_possible_combinations(content):
    parse_recipe(content)


def test_what_transformers_refuses_is_a_recipe_error(tmp_path):
    training = {"output_dir": str(tmp_path), "use_cpu": True, "load_best_model_at_end": True}
    training |= {"eval_strategy": "no", "save_strategy": "epoch"}
    with pytest.raises(RecipeError, match=r"training: .*load_best_model_at_end"):
        parse_recipe({"training": training}).training_arguments()


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  head_blocks: 4\n  head_blocks: 3\n", "line 3, column 3: no valid YAML (the key 'head_blocks' is"),
        ("model: {}\ndata: {}\nmodel: {}\n", "line 3, column 1: no valid YAML (the key 'model' is given twice"),
        ("model:\n  backbone: [resnet18\ndata: {}\n", "some.yaml, line 3"),
        ("model:\n\tdetector: gfl\n", "some.yaml, line 2"),
        ("model: &a {detector: gfl}\nteacher:\n  <<: *a\n", "line 3, column 3: no valid YAML (merge keys"),
        ("model:\n  ? [1, 2]\n  : 3\n", "some.yaml, line 2"),
        ("model: !!python/object/apply:os.getcwd []\n", "some.yaml, line 1"),
        ("a: &a {b: *a}\n", "some.yaml, line 1"),
        ("model:\n  backbone: \x01\n", "some.yaml, line 2"),
        ("data:\n  path: 2024-13-45\n", "some.yaml: no valid YAML (month"),
        (LAUGHS, "some.yaml: more than 10000 values, when references (*name) are followed"),
        ("data: &a\n  - *a\n", "no valid YAML (found unconstructable recursive node)"),
        ("a: " + "[" * 3000, "some.yaml"),
        ("", "some.yaml must hold the sections model, teacher, distillation, data, training, but holds nothing"),
        ("# only a comment\n", "but holds nothing"),
        ("- model\n- data\n", "but holds ['model', 'data']"),
        ("gfl", "but holds 'gfl'"),
        (b"model:\n  backbone: \xff\xfe\n", "some.yaml, line 2: no UTF-8 text"),
    ],
)
def test_broken_files_name_file_and_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./gfl_r50_croskd.yaml", r"file gfl_r50_croskd.yaml doesn't exist. Did you mean gfl_r50_cross"),
        ("gfl_r50_croskd", r"there is no recipe 'gfl_r50_croskd'. Did you mean gfl_r50_crosskd"),
        ("folder.yaml", "folder.yaml is a folder"),
        ("run", r"run is a folder.*run/recipe\.yaml"),
        ("./run", r"run is a folder.*run/recipe\.yaml"),
        ("ff.py", r"file ff\.py is no recipe.*\.yaml"),
        ("some.yaml", r"some.yaml can't be run:\n  - unknown key"),
    ],
)
def test_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("folder.yaml", "run"):
        (tmp_path / folder).mkdir()
    for file in ("run/recipe.yaml", "ff.py", "some.yaml"):
        (tmp_path / file).write_text("model: {layers: 3}\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(name)


def test_byte_order_mark_and_empty_sections_are_fine(tmp_path):
    assert load_recipe(write(tmp_path, "\ufeffmodel:\nteacher:\ndistillation:\ntraining:\n")) == Recipe(
        ModelSection(), DataSection()
    )


def test_a_saved_recipe_is_complete_and_reads_the_same(tmp_path):
    content = distilled(
        model={"backbone": "resnet18.tv_in1k", "head_blocks": 3},
        data={"multiscale": "choice", "multiscale_short_sides": [640, 800], "path": "übung: data # 1"},
        training={"learning_rate": "1e-2", "lr_milestones": [2, 3.5], "eval_strategy": "no", "output_dir": "runs/x"},
    )
    original = parse_recipe(content)
    original.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == original
    written = yaml.safe_load((tmp_path / "saved.yaml").read_text(encoding="utf-8"))
    assert written == original.to_dict()
    for name, section in (
        ("model", ModelSection),
        ("teacher", TeacherSection),
        ("data", DataSection),
    ):
        assert list(written[name]) == [f.name for f in dataclasses.fields(section)]
    assert written["training"] == {
        "learning_rate": 0.01,
        "lr_milestones": [2.0, 3.5],
        "eval_strategy": "no",
        "output_dir": "runs/x",
    }


# Overrides ----------------------------------------------------------------------------------------------------------


def test_overrides():
    read = load_recipe(
        "gfl_r50_crosskd",
        ["training.learning_rate=1e-3", "data.path=a", "data.path=/my coco=b", "training.lr_milestones=[4, 6.5]"],
    )
    assert read.training["learning_rate"] == 0.001
    assert read.training["lr_milestones"] == [4.0, 6.5]
    assert read.data.path == "/my coco=b", "the last one counts, and a value may have an equals sign"


@pytest.mark.parametrize("text", ["{split}", "{split}/images", "007", "no", "2024-01-01"])
def test_an_override_of_text_needs_no_quotes(text: str) -> None:
    read = load_recipe("gfl_r50_1x", [f"data.images={text}", f"data.cache_dir={text}"])
    assert read.data.images == read.data.cache_dir == text
    assert load_recipe("gfl_r50_1x", ["data.images='a b'", "data.cache_dir=null"]).data.images == "a b"


def test_sections_can_be_taken_out_and_put_in():
    plain = load_recipe("gfl_r50_crosskd", ["teacher=null", "distillation=null"])
    assert plain.teacher is plain.distillation is None
    added = load_recipe("gfl_r50_1x", ["teacher.checkpoint=random", "distillation.crosskd.weight=1"])
    assert added.teacher.checkpoint == "random"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate", "must look like section.key=value"),
        ("training.learning_rate", "must look like section.key=value"),
        ("training.a.b=1", "must look like section.key=value"),
        (".learning_rate=1", "must look like section.key=value"),
        ("teacher=none", "sets a section: write teacher.checkpoint=none"),
        ("data=1", "sets a section: write data.KEY=1"),
        ("foo=1", "there is no section foo; there are model, teacher, distillation, data, training"),
        ("model=null", "only teacher and distillation can be taken out"),
        ("training.lr_milestones=[1", "override 'training.lr_milestones=[1'"),
        ("trainign.seed=1", "unknown section 'trainign'. Did you mean training"),
        ("training.sede=1", "unknown key training.sede (value 1)"),
        ("training.seed=one", "training.seed: 'one' is no whole number"),
        ("training.num_train_epochs=many", "training.num_train_epochs: 'many' is no number"),
        ("training.resume_from_checkpoint=true", "training.resume_from_checkpoint is 'true'"),
        ("training.resume_from_checkpoint=a/checkpoint-3", "resumes by itself"),
    ],
)
def test_refused_overrides(override, message):
    with pytest.raises(RecipeError) as error:
        load_recipe("gfl_r50_crosskd", [override])
    assert message in str(error.value)


def test_problems_of_overrides_and_file_are_told_together(tmp_path):
    path = write(tmp_path, "model: {head_blocks: 0}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(path, ["seed", "data=null", "data.flip_probability=2"])
    text = str(error.value)
    assert all(part in text for part in ("'seed'", "'data=null'", "model.head_blocks", "data.flip_probability"))


def test_an_override_changes_one_of_two_aliased_sections(tmp_path):
    text = "model: &a {detector: gfl, head_blocks: 3}\nteacher: *a\ndistillation: {}\n"
    read = load_recipe(write(tmp_path, text), ["teacher.checkpoint=random", "model.head_blocks=4"])
    assert (read.model.head_blocks, read.teacher.head_blocks) == (4, 3)


# What the package carries -------------------------------------------------------------------------------------------


def test_detectors_are_those_of_the_models():
    assert set(CONFIGS) == set(MODELS) and set(DETECTORS) == {*MODELS, *FAMILIES}


def test_every_field_has_a_meaning():
    for section in (ModelSection, TeacherSection, *map(settings_class, method_names()), DataSection):
        assert all(field.metadata["help"] for field in dataclasses.fields(section))


def test_recipes_are_found_by_name():
    assert {name: path.name for name, path in carried_recipes().items()} == {name: f"{name}.yaml" for name in NAMES}
    assert find_recipe("coco_mini").read_bytes() == (RECIPES / "coco_mini.yaml").read_bytes()


def test_recipes_are_found_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a wheel lays them out: in the package, in a folder without `__init__.py`."""
    (tmp_path / "crosskd_hf" / "recipes").mkdir(parents=True)
    path = write(tmp_path / "crosskd_hf" / "recipes", "model: {}\n", "installed.yaml")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package)
    assert carried_recipes() == {"installed": path}


def test_a_wheel_carries_what_is_no_python_file():
    settings = tomllib.loads((RECIPES.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    package = Path(crosskd_hf.__file__).parent
    folders = {path.parent.relative_to(package.parent) for path in package.rglob("__init__.py")}
    assert set(settings["packages"]) == {"crosskd_hf.recipes", *(".".join(folder.parts) for folder in folders)}
    # A path, not a finder: the package is found before a folder of its name, such as a clone's in its parent.
    assert settings["package-dir"] == {"": "."}
    assert (package / "recipes").resolve() == RECIPES.resolve()
    data = {"crosskd_hf": ["py.typed"], "crosskd_hf.hub": ["*.md"], "crosskd_hf.recipes": ["*.yaml"]}
    data["crosskd_hf.studies"] = ["*.html", "demo_teacher/*"]
    assert settings["package-data"] == data


@pytest.mark.parametrize("name", NAMES)
def test_carried_recipes_are_complete_and_run_as_they_are(name, tmp_path):
    read = load_recipe(name)
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert re.search(rf"^#.*accelerate launch .*train\.py recipes/{name}\.yaml", text, re.MULTILINE)
    assert read.training["output_dir"] == f"runs/{name}"
    assert read.training["seed"] == 0
    args = load_recipe(name, [f"training.output_dir={tmp_path}", "training.use_cpu=true"]).training_arguments()
    query_based = read.model.detector in FAMILIES or read.model.pretrained
    clipped = read.model.detector == "fcos" or name.endswith("_fgd")
    assert args.max_grad_norm == (0.1 if query_based else 35.0 if clipped else 0.0)
    # What a run writes beside its model runs again.
    read.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == read


@pytest.mark.parametrize("name", ["gfl_r101_2x_ms", "gfl_r50_crosskd_pkd"])
def test_published_rows_write_every_setting_out(name):
    """`test_recipe_table.py` has their values."""
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    architecture = {f.name for f in dataclasses.fields(ModelSection)} - {
        "checkpoint",
        "inherit",
        "pretrained",
        "config",
    }
    assert set(content["model"]) == architecture
    if "teacher" in content:
        assert set(content["teacher"]) == {f.name for f in dataclasses.fields(TeacherSection)} - {"config"}
        methods = content["distillation"].pop("methods")
        assert list(content["distillation"]) == methods
        for method, section in content["distillation"].items():
            # kd_centerness is ATSS's; GFL has none.
            unset = {"centerness_weight", "student_tap_index"}
            assert set(section) == {f.name for f in dataclasses.fields(settings_class(method))} - unset
    unset = {"size", "augment", "plain_epochs", "max_train_images", "max_val_images", "cache_dir"}
    helps = {f.name: f.metadata["help"] for f in dataclasses.fields(DataSection)}
    unset |= {n for n, text in helps.items() if text.startswith("layout ") and not text.startswith("layout coco")}
    unset |= {f.name for f in dataclasses.fields(DataSection) if f.name.startswith("unlabeled")}
    assert set(content["data"]) == {f.name for f in dataclasses.fields(DataSection)} - unset


@pytest.mark.parametrize("value", ["none", "null", "''", "imagenet"])
def test_words_that_are_no_backbone_weights(value: str) -> None:
    with pytest.raises(RecipeError, match=r"model\.backbone_weights is .*; it must be pretrained .*random") as error:
        load_recipe("gfl_r50_1x", [f"model.backbone_weights={value}"])
    assert value.strip("'") in str(error.value)
    load_recipe("gfl_r50_1x", [f"model.backbone_weights={value}", "model.checkpoint=runs/trained"])


@pytest.mark.parametrize("value", ["random", "pretrained", "weights.pth", "./weights", "https://host/weights.pth"])
def test_backbone_weights(value: str) -> None:
    assert load_recipe("gfl_r50_1x", [f"model.backbone_weights={value}"]).model.backbone_weights == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(f"data.{key}", 100000) for key in ("short_side", "long_side")],
        ("data.multiscale_short_sides", [480, 100000]),
        *[(f"model.{key}", 1000000) for key in ("head_channels", "fpn_channels", "head_blocks")],
        ("distillation.crosskd.weight", 1e30),
        ("training.learning_rate", 1e30),
        ("training.num_train_epochs", 1e15),
        ("training.seed", -1),
    ],
)
def test_what_cannot_be_meant_is_refused(key: str, value: object) -> None:
    with pytest.raises(RecipeError, match=key.replace(".", r"\.")):
        load_recipe("gfl_r50_crosskd", [f"{key}={value}"])


@pytest.mark.parametrize(
    ("overrides", "milestones", "warmup"),
    [
        # Of 12 epochs, milestones 8 and 11, 500 updates of warm-up.
        ([], [8, 11], 500),
        (["training.num_train_epochs=1"], [0.6667, 0.9167], 42),
        (["training.num_train_epochs=24"], [16, 22], 500),  # the published 2x schedule
        (["training.num_train_epochs=6", "training.lr_milestones=[5]"], [5], 250),
        (["training.num_train_epochs=6", "training.warmup_steps=7"], [4, 5.5], 7),
        (["training.num_train_epochs=6", "training.warmup_steps=0.1"], [4, 5.5], 0.1),
        (["training.num_train_epochs=1", "training.lr_milestones=[]"], [], 42),
        (["training.max_steps=3"], [8, 11], 0),
        (["training.max_steps=400"], [8, 11], 40),
        (["training.max_steps=500"], [8, 11], 500),
        (["training.max_steps=3", "training.num_train_epochs=1"], [8, 11], 0),
        (["training.max_steps=3", "training.warmup_steps=2"], [8, 11], 2),
    ],
)
def test_the_schedule_follows_its_length(
    tmp_path: Path, overrides: list[str], milestones: list, warmup: float
) -> None:
    read = load_recipe("gfl_r50_1x", overrides)
    assert (read.training["lr_milestones"], read.training["warmup_steps"]) == (milestones, warmup)
    told = "".join(read.notes)
    for key, changed in (("lr_milestones", milestones != [8, 11]), ("warmup_steps", warmup != 500)):
        assert (f"training.{key}" in told) == (changed and not any(key in override for override in overrides))
    read.save(tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == read and not again.notes, "what was resolved is not changed again"


def test_bytes_that_the_locale_cannot_read_are_told_as_such() -> None:
    """Python keeps bytes of the command line that it can't decode as halves of characters: all of UTF-8 in ASCII."""
    override = b"data.path=/B\xc3\xbccher".decode("ascii", "surrogateescape")
    with pytest.raises(RecipeError, match=r"LC_ALL=C\.UTF-8") as error:
        load_recipe("gfl_r50_1x", [override])
    str(error.value).encode("ascii")
