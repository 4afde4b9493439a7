"""Published defaults of a distillation."""

import pytest

from crosskd_hf.distillation.settings import DistillationSection, resolve_settings
from crosskd_hf.models import MODELS

PUBLISHED = {  # tap index, weights of kd_cls, kd_box and kd_centerness
    "gfl": (3, 1.0, 4.0, 1.0),
    "retinanet": (3, 1.0, 1.0, 1.0),
    "fcos": (2, 0.4, 0.75, 1.0),
    "atss": (3, 1.0, 1.0, 1.0),
}


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


@pytest.mark.parametrize(
    ("tap_index", "student_tap_index", "expected"),
    [(None, None, (3, 3)), (2, None, (2, 2)), (3, 1, (3, 1)), (3, 0, (3, 0))],
)
def test_the_student_is_tapped_like_the_teacher_unless_told_otherwise(tap_index, student_tap_index, expected):
    section = DistillationSection(tap_index=tap_index, student_tap_index=student_tap_index)
    settings = resolve_settings(section, MODELS["gfl"])
    assert (settings.tap_index, settings.student_tap_index) == expected
