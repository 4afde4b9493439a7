"""The section `distillation` of recipes: methods, their sections, overrides, and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from crosskd_hf.data.settings import DataSection
from crosskd_hf.distillation.methods import crosskd, pkd
from crosskd_hf.recipe import Recipe, RecipeError, load_recipe, parse_recipe
from crosskd_hf.recipe.distillation import DistillationSection
from crosskd_hf.recipe.load import load_data_section
from crosskd_hf.recipe.run_folder import recipe_changes

TEACHER = {"checkpoint": "random"}


def read(distillation: dict, **sections) -> Recipe:
    return parse_recipe({"teacher": TEACHER, "distillation": distillation} | sections)


def refusal(distillation, **sections) -> str:
    with pytest.raises(RecipeError) as error:
        read(distillation, **sections)
    return str(error.value)


def test_methods_have_sections_of_their_own() -> None:
    section = read({"methods": ["crosskd", "pkd"], "crosskd": {"tap_index": "2"}, "pkd": {"weight": 6}}).distillation
    assert section.methods == {"crosskd": crosskd.Settings(tap_index=2), "pkd": pkd.Settings(weight=6.0)}
    assert isinstance(section.methods["pkd"].weight, float)
    assert read({"methods": ["pkd"]}).distillation.methods == {"pkd": pkd.Settings()}
    assert read({}).distillation == DistillationSection()
    assert list(DistillationSection().methods) == ["crosskd"]


def test_a_saved_section_is_complete_and_reads_the_same(tmp_path: Path) -> None:
    original = read({"methods": ["pkd", "crosskd"], "crosskd": {"tap": "raw"}, "pkd": {"weight": 2}})
    original.save(tmp_path / "saved.yaml")
    again = load_recipe(tmp_path / "saved.yaml")
    assert again == original and list(again.distillation.methods) == ["pkd", "crosskd"]
    written = again.to_dict()["distillation"]
    assert written["crosskd"] == dataclasses.asdict(crosskd.Settings(tap="raw"))
    assert written == {"methods": ["pkd", "crosskd"], "pkd": {"weight": 2.0}, "crosskd": written["crosskd"]}


@pytest.mark.parametrize(
    ("method", "key", "value", "message"),
    [
        ("crosskd", "weight", -1, "must be at least 0"),
        ("crosskd", "weight", 1e30, "must be at most"),
        ("crosskd", "tap", "soft", "must be one of rectified, raw"),
        ("crosskd", "tap_index", -1, "must be at least 0"),
        ("crosskd", "tap_index", 1.5, "is no whole number"),
        ("mimic", "box_weight", "much", "is no number"),
        ("crosskd", "tap_indx", 3, "unknown key distillation.crosskd.tap_indx (value 3). Did you mean tap_index"),
        ("pkd", "tap_index", 3, "unknown key distillation.pkd.tap_index (value 3). Valid: weight"),
    ],
)
def test_refused_values(method: str, key: str, value: object, message: str) -> None:
    text = refusal({"methods": [method], method: {key: value}})
    assert message in text and f"distillation.{method}.{key}" in text and text.count("\n  - ") == 1


@pytest.mark.parametrize(
    ("distillation", "message"),
    [
        ([1], "section distillation must hold keys and values, not [1]"),
        ({"methods": "crosskd"}, "distillation.methods: 'crosskd' is no list of names"),
        ({"methods": [1]}, "is no list of names"),
        ({"methods": None}, "is no list of names"),
        ({"methods": ["croskd"]}, "there is no method 'croskd'. Did you mean crosskd"),
        ({"methods": ["pkd", "pkd"]}, "distillation.methods has 'pkd' twice"),
        ({"methods": ["__init__"]}, "there is no method '__init__'"),
        ({"methods": ["pkd.x"]}, "there is no method 'pkd.x'"),
        ({"methods": []}, "distillation.methods is empty: name some of bckd, crosskd,"),
        ({"methods": ["pkd"], "crosskd": {}}, "distillation.crosskd is given, but crosskd isn't among"),
        ({"methods": ["crosskd"], "crosskd": [1]}, "distillation.crosskd: [1] is no section"),
        ({"metods": ["crosskd"]}, "unknown key distillation.metods (value ['crosskd']). Did you mean methods"),
        # Keys of a method in the wrong place, as earlier versions had them.
        ({"crosskd": 1.0}, "distillation.crosskd: 1.0 is no section"),
        ({"crosskd": None}, "to turn crosskd off, leave it out of the methods"),
        ({"tap_index": 3}, "distillation.tap_index is a key of crosskd: write distillation.crosskd: {tap_index: 3}"),
        (
            {"cls_weight": 0.5},
            "bckd, crosskd, mimic, query_crosskd, query_mimic: write distillation.crosskd: {cls_weight: 0.5}",
        ),
        # Nothing would be distilled.
        ({"crosskd": {"weight": 0}}, "distillation.crosskd.weight: all are 0"),
        ({"methods": ["crosskd", "pkd"], "crosskd": {"weight": 0}, "pkd": {"weight": 0}}, "distillation.pkd.weight"),
        ({"crosskd": {"cls_weight": 0, "box_weight": 0}}, "distillation.crosskd.box_weight"),
        ({"methods": ["mimic"], "mimic": {"cls_weight": 0, "box_weight": 0}}, "distillation.mimic.cls_weight"),
        ({"methods": ["bckd"], "bckd": {"cls_weight": 0, "box_weight": 0}}, "distillation.bckd.box_weight"),
    ],
)
def test_refused_sections(distillation: object, message: str) -> None:
    text = refusal(distillation)
    assert message in text and text.count("\n  - ") == 1


def test_the_data_of_an_earlier_versions_recipe_can_be_read(tmp_path: Path) -> None:
    """Its model is still to be evaluated."""
    path = tmp_path / "recipe.yaml"
    path.write_text("distillation: {crosskd: 1.0}\ndata: {path: data/cells}\ntraining: {sync: false}\n")
    assert load_data_section(path) == DataSection(path="data/cells")
    path.write_text("data: {pth: data/cells}\n")
    with pytest.raises(RecipeError, match=r"data\.pth"):
        load_data_section(path)


@pytest.mark.parametrize(
    ("distillation", "sections", "message"),
    [
        ({"tap_index": 5}, {"teacher": {"checkpoint": "a/b"}}, "crosskd.tap_index is 5, but model.head_blocks 4"),
        ({"tap_index": 3}, {"model": {"head_blocks": 2}}, "but model.head_blocks 2"),
        ({"tap_index": 3}, {"teacher": {**TEACHER, "head_blocks": 2}}, "but teacher.head_blocks 2"),
        ({"tap_index": 1, "student_tap_index": 3}, {"model": {"head_blocks": 2}}, "crosskd.student_tap_index is 3"),
    ],
)
def test_taps_lie_in_the_towers(distillation: dict, sections: dict, message: str) -> None:
    text = refusal({"crosskd": distillation}, **sections)
    assert message in text and text.count("\n  - ") == 1


@pytest.mark.parametrize(
    ("distillation", "sections"),
    [
        ({"methods": ["crosskd", "pkd"], "crosskd": {"cls_weight": 0, "box_weight": 0}}, {}),
        ({"crosskd": {"cls_weight": 0}}, {}),
        # ATSS's published centerness term is left.
        ({"crosskd": {"cls_weight": 0, "box_weight": 0}}, {"teacher": {**TEACHER, "detector": "atss"}}),
        # A saved teacher may predict centerness, too.
        ({"crosskd": {"cls_weight": 0, "box_weight": 0}}, {"teacher": {"checkpoint": "some/folder"}}),
        ({"crosskd": {"tap_index": 0}}, {}),
        ({"crosskd": {"tap_index": 4}}, {}),
        # Saved detectors carry their own number of blocks.
        ({"crosskd": {"tap_index": 3}}, {"teacher": {"checkpoint": "some/folder", "head_blocks": 1}}),
        ({"crosskd": {"tap_index": 3}}, {"model": {"checkpoint": "some/folder", "head_blocks": 1}}),
    ],
)
def test_possible_combinations(distillation: dict, sections: dict) -> None:
    read(distillation, **sections)


def test_overrides_reach_the_methods() -> None:
    words = ["distillation.methods=[crosskd, pkd]", "distillation.pkd.weight=6", "distillation.crosskd.tap_index=null"]
    methods = load_recipe("gfl_r50_crosskd", words).distillation.methods
    assert methods["pkd"].weight == 6.0
    assert (methods["crosskd"].tap_index, methods["crosskd"].box_weight) == (None, 4.0), "the file's others stay"
    # The file's section of a method that an override turns off goes with it.
    assert list(load_recipe("gfl_r50_crosskd_pkd", ["distillation.methods=[crosskd]"]).distillation.methods) == [
        "crosskd"
    ]
    added = load_recipe("gfl_r50_1x", ["teacher.checkpoint=random", "distillation.methods=[mimic]"])
    assert list(added.distillation.methods) == ["mimic"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distillation.pkd.weight=6"], "pkd isn't among distillation.methods ['crosskd']"),
        (["distillation.methods=[crosskd]", "distillation.pkd.weight=6"], "pkd isn't among"),
        (["distillation.pkd=6"], "distillation.pkd: 6 is no section: add pkd to distillation.methods"),
        (["distillation.crosskd.weight.a=2"], "must look like section.key=value"),
        (["distillation.crosskd=2", "distillation.crosskd.tap=raw"], "section distillation.crosskd must hold keys"),
        (["distillation.methods=[crosskd"], "override 'distillation.methods=[crosskd'"),
        (["distillation.croskd.weight=1"], "unknown key distillation.croskd"),
    ],
)
def test_refused_overrides(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("gfl_r50_crosskd", overrides)
    assert message in str(error.value)


def test_changes_of_methods_are_told_by_their_names() -> None:
    before, now = load_recipe("gfl_r50_crosskd"), load_recipe("gfl_r50_crosskd_pkd")
    now.training["output_dir"] = before.training["output_dir"]
    assert list(recipe_changes(before, now)) == ["distillation.methods"]
    now = load_recipe("gfl_r50_crosskd", ["distillation.crosskd.tap_index=2"])
    assert recipe_changes(before, now) == {
        "distillation.crosskd.tap_index": "distillation.crosskd.tap_index: was 3, is 2"
    }


@pytest.mark.parametrize("key", ["sync", "skip_nonfinite_steps"])
def test_keys_that_are_gone_say_what_is_instead(key: str) -> None:
    with pytest.raises(RecipeError, match=rf"training\.{key} is no key any more: leave it out\. \w"):
        parse_recipe({"training": {key: 1}})


def test_a_wrong_list_of_methods_is_one_problem() -> None:
    text = refusal({"methods": "crosskd", "crosskd": {"tap_index": 3}})
    assert "is no list of names" in text and "isn't among" not in text
