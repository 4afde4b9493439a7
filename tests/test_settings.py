"""Published defaults of a distillation, and pairs that are refused."""

import copy
import re
from functools import cache

import pytest
import torch
from tiny import tiny_model

from crosskd_hf.distillation.objective import distillation_losses, teacher_forward
from crosskd_hf.distillation.settings import check_pair, resolve_settings
from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.recipe import DistillationSection

PUBLISHED = {  # tap index, weights of kd_cls, kd_box and kd_centerness
    "gfl": (3, 1.0, 4.0, 1.0),
    "retinanet": (3, 1.0, 1.0, 1.0),
    "fcos": (2, 0.4, 0.75, 1.0),
    "atss": (3, 1.0, 1.0, 1.0),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Maps this small gain nothing from threads, and lose much where other processes hold the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def blank(detector: str):
    """On the meta device: only the configuration matters."""
    with torch.device("meta"):
        return MODELS[detector](CONFIGS[detector](backbone="resnet18", fpn_channels=8, head_channels=8))


def model(detector: str = "gfl", labels: tuple[str, ...] = ("cat", "dog"), **options):
    """A detector that has no weights and these settings."""
    settings = {"backbone": "resnet18", "fpn_channels": 32, "head_channels": 32, "id2label": dict(enumerate(labels))}
    made = copy.copy(blank(detector))
    made.config = CONFIGS[detector](**{**settings, **options})
    return made


def refusal(student, teacher, **section) -> str:
    with pytest.raises(ValueError, match="this student can't learn from this teacher; they differ in:\n  - ") as error:
        check_pair(student, teacher, resolve_settings(DistillationSection(**section), teacher))
    return str(error.value)


def problems(message: str) -> list[str]:
    return message.split("\n  - ")[1:]


def accept(student, teacher, **section) -> None:
    check_pair(student, teacher, resolve_settings(DistillationSection(**section), teacher))


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", PUBLISHED)
def test_open_settings_are_the_teachers_published_ones(detector):
    settings = resolve_settings(DistillationSection(), MODELS[detector])
    weights = settings.tap_index, settings.cls_weight, settings.box_weight, settings.centerness_weight
    assert weights == PUBLISHED[detector]
    assert (settings.crosskd, settings.pkd, settings.raw_taps) == (1.0, 0.0, False)


def test_given_settings_win_also_where_they_are_zero():
    section = DistillationSection(
        crosskd=0.5, tap_index=0, tap="raw", cls_weight=0.0, box_weight=0.0, centerness_weight=0.0, pkd=6.0
    )
    settings = resolve_settings(section, MODELS["fcos"])
    assert settings.tap_index == settings.cls_weight == settings.box_weight == settings.centerness_weight == 0
    assert (settings.crosskd, settings.pkd, settings.raw_taps) == (0.5, 6.0, True)


# Pairs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", PUBLISHED)
@pytest.mark.parametrize("student", PUBLISHED)
def test_any_two_detectors_of_equal_shapes_are_a_pair(student, teacher):
    accept(model(student), model(teacher), pkd=1.0)


def test_other_backbones_extra_convolutions_and_frozen_parts_are_no_obstacle():
    accept(model(fpn_extra_convs="on_output"), model(backbone="resnet34", fpn_extra_convs="on_input", frozen_stages=0))


def test_strides_that_differ_are_refused():
    message = refusal(model(strides=[8, 16, 32, 64]), model())
    assert problems(message) == ["strides: student [8, 16, 32, 64], teacher [8, 16, 32, 64, 128]"]


def test_size_divisors_that_differ_are_refused():
    assert problems(refusal(model(size_divisor=64), model())) == ["size_divisor: student 64, teacher 32"]


@pytest.mark.parametrize("k", [1, 3, 4])
def test_towers_of_other_channels_are_refused(k):
    message = refusal(model(head_channels=64), model(), tap_index=k)
    assert problems(message) == ["tap shape (head_channels): student 64, teacher 32"]


@pytest.mark.parametrize("k", [1, 4])
def test_pyramids_of_other_channels_matter_only_at_tap_zero(k):
    student, teacher = model(fpn_channels=16), model()
    accept(student, teacher, tap_index=k)
    message = refusal(student, teacher, tap_index=0)
    assert problems(message) == ["tap shape (fpn_channels): student 16, teacher 32"]


def test_towers_of_other_channels_do_not_matter_at_tap_zero():
    accept(model(head_channels=64), model(), tap_index=0)


@pytest.mark.parametrize(
    ("student", "teacher", "k", "who"),
    [(2, 4, 3, "student"), (4, 2, 3, "teacher"), (3, 3, 3, None), (4, 3, 3, None), (2, 4, 2, None), (1, 1, 0, None)],
)
def test_a_head_with_fewer_blocks_than_the_tap_is_refused(student, teacher, k, who):
    pair = model(head_blocks=student), model(head_blocks=teacher)
    if who is None:
        return accept(*pair, tap_index=k)
    (problem,) = problems(refusal(*pair, tap_index=k))
    assert re.match(rf"blocks: tap_index is 3, .*{who}'s .* 2 blocks", problem)


def test_two_heads_with_too_few_blocks_are_both_named():
    message = refusal(model(head_blocks=2), model(head_blocks=1), tap_index=3)
    assert len(problems(message)) == 2
    assert re.search(r"student's .* 2 blocks", message) and re.search(r"teacher's .* 1 block", message)


def test_numbers_of_labels_that_differ_are_refused():
    message = refusal(model(), model(labels=("cat", "dog", "emu")))
    assert "number of labels: student 2 (cat, dog, ...), teacher 3 (cat, dog, emu, ...)" in message
    assert "train the teacher on the student's data first" in message


def test_label_names_that_differ_are_refused_and_shown():
    message = refusal(model(labels=("cat", "dog")), model(labels=("cat", "emu")))
    assert problems(message)[0].startswith("label names, 1 of 2 (1: student 'dog', teacher 'emu')")


def test_labels_in_another_order_are_refused():
    message = refusal(model(labels=("cat", "dog")), model(labels=("dog", "cat")))
    assert "label names, 2 of 2" in message


def test_at_most_three_label_names_are_shown():
    message = refusal(model(labels=tuple("abcde")), model(labels=tuple("vwxyz")))
    assert "label names, 5 of 5" in message
    assert re.findall(r"(\d): student", message) == ["0", "1", "2"]


def test_everything_that_differs_is_named_at_once():
    student = model(strides=[8, 16, 32, 64], head_blocks=2, head_channels=64, fpn_channels=16, labels=("a", "b", "c"))
    assert [problem.split(":")[0] for problem in problems(refusal(student, model(), pkd=1.0))] == [
        "strides",
        "number of labels",
        "blocks",
        "tap shape (head_channels)",
        "FPN shape (fpn_channels, pkd)",
    ]


def test_without_the_cross_pass_towers_do_not_matter():
    accept(model(head_channels=64, head_blocks=1), model(), crosskd=0.0, pkd=1.0)


def test_pkd_needs_pyramids_of_equal_channels():
    student, teacher = model(fpn_channels=16), model()
    message = refusal(student, teacher, pkd=1.0)
    assert problems(message) == ["FPN shape (fpn_channels, pkd): student 16, teacher 32"]
    accept(student, teacher, pkd=0.0)


def test_a_pair_that_was_accepted_runs():
    # The one with the least in common that is allowed at k = 4.
    student, teacher = tiny_model("gfl", fpn_channels=16), tiny_model("retinanet", seed=1)
    settings = resolve_settings(DistillationSection(tap_index=4), teacher)
    check_pair(student, teacher, settings)
    batch = {"pixel_values": torch.randn(1, 3, 64, 64)}
    labels = [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "class_labels": torch.tensor([1])}]
    output = student(**batch, labels=labels, output_distillation=True, tap_index=settings.tap_index)
    terms = distillation_losses(student, output, teacher, teacher_forward(teacher, batch, settings), settings)
    assert set(terms) == {"kd_cls", "kd_box"} and all(term.isfinite().all() for term in terms.values())
