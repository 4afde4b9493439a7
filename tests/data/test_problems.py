"""Problems are counted, shown with a few examples, and survive the cache."""

import json

import pytest

from crosskd_hf.data.errors import EXAMPLES, DataError, Kind, Problems


def test_counts_and_examples():
    problems = Problems()
    for i in range(EXAMPLES + 1):
        problems.add(Kind.IMAGE, f"{i}.jpg is empty")
    problems.add(Kind.BOX_EDGE, "annotation 3")
    assert problems.lines() == [
        "4 x image cannot be read (restore or remove it): 0.jpg is empty; 1.jpg is empty; 2.jpg is empty; ...",
        "1 x annotation has a box that reaches over the image's edge (it is clipped in training): annotation 3",
    ]
    assert len(problems.lines(stopping=True)) == len(problems.lines(stopping=False)) == 1
    assert Problems.from_dict(json.loads(json.dumps(problems.to_dict()))) == problems
    with pytest.raises(DataError, match=r"(?s)here cannot be used.*4 x image.*data.on_error=skip"):
        problems.raise_if_stopping("here")


def test_what_is_only_worth_knowing_stops_nothing():
    problems = Problems()
    problems.raise_if_stopping("here")
    problems.add(Kind.BOX_EMPTY, "annotation 3")
    problems.raise_if_stopping("here")
