"""What is wrong with a data set: counted by kind, with examples, told together."""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from ..utils.escaping import printable

EXAMPLES = 3


class DataError(ValueError):
    """A data set that can't be used as it is; the message names what and how to mend it."""


class Kind(Enum):
    """A kind of problem.

    Attributes:
        thing, what: of which the problem is, and the problem.
        advice: what to do, or what happens.
        stops: the data can't be used with it, unless it is left out; otherwise it is only worth knowing.
    """

    IMAGE = ("image", "cannot be read", "restore or remove it")
    IMAGE_SIZE = ("image", "is of another size than annotated", "correct one or the other")
    FILE_NAME = ("image", "has a file name that leaves the image folder", "make it relative, without ..")
    ID = ("annotation", "has the id of an earlier one", "annotation ids must be unique")
    IMAGE_ID = ("annotation", "is of an image that is not in the list of images", "add the image or remove it")
    CATEGORY = ("annotation", "is of a category that is not listed", "list it, correct ids, or remove it")
    BOX = ("annotation", "has a bbox that is not four numbers of a sensible size", "correct or remove it")
    LINE = ("label", "is not a class and a box, or a class and an outline", "correct or remove it")
    FIRST_PIXEL = (
        "annotation",
        "has a box left of or above pixel 1, with which Pascal VOC begins",
        "if the tool counts from 0, set data.first_pixel=0",
    )
    AREA_NUMBER = (
        "annotation",
        "has an area that is not a number of a sensible size",
        "correct it, or remove it to use the box's",
    )
    CROWD = ("annotation", "has an iscrowd that is neither 0 nor 1", "correct or remove it")
    BOX_NEGATIVE = ("annotation", "has a box of negative width or height", "correct or remove it")
    BOX_EMPTY = ("annotation", "has a box less than 1 pixel wide or high", "it is not trained on", False)
    AREA = ("annotation", "has an area of 0 or less", "it is not trained on; leave area out to take the box's", False)
    BOX_OUTSIDE = ("annotation", "has a box completely outside its image", "it is not trained on", False)
    BOX_EDGE = ("annotation", "has a box that reaches over the image's edge", "it is clipped in training", False)
    # What only `crosskd check-data` looks for.
    FILE_TWICE = ("image file", "is listed under several ids", "list it once, with all of its boxes", False)
    ROW_TWICE = ("row", "is there again, with the same image and boxes", "remove one", False)
    CONTENT_TWICE = ("image", "has the content of another one in its split", "remove one", False)
    IN_BOTH = ("image", "is in both splits by its content", "evaluate on images that aren't trained on", False)
    BOX_TWICE = ("annotation", "has the class and the box of another one of its image", "remove one", False)
    NO_ROW = ("image file", "has no row in metadata.jsonl", "it isn't used; add a row, even without boxes", False)

    def __init__(self, thing: str, what: str, advice: str, stops: bool = True) -> None:
        self.thing, self.what, self.advice, self.stops = thing, what, advice, stops


@dataclass
class Problems:
    """The problems of one split.

    Attributes:
        counts: how often each kind occurs.
        examples: the first few of each kind.
    """

    counts: Counter[Kind] = field(default_factory=Counter)
    examples: dict[Kind, list[str]] = field(default_factory=dict)

    def add(self, kind: Kind, example: str) -> None:
        """Count a problem; the example names the record."""
        self.counts[kind] += 1
        if self.counts[kind] <= EXAMPLES:
            self.examples.setdefault(kind, []).append(example)

    def lines(self, stopping: bool | None = None) -> list[str]:
        """A line per kind, with count, advice and examples: all, or only those that stop (True) or don't (False)."""
        return [
            f"{count} x {kind.thing} {kind.what} ({kind.advice}): "
            + "; ".join([*map(printable, self.examples[kind]), *["..."] * (count > EXAMPLES)])
            for kind, count in self.counts.items()
            if stopping in (None, kind.stops)
        ]

    def raise_if_stopping(self, source: str) -> None:
        """Raise DataError with all kinds that the data can't be used with."""
        if lines := self.lines(stopping=True):
            raise DataError(
                f"{source} cannot be used as it is:\n  - "
                + "\n  - ".join(lines)
                + "\nMend these, or set data.on_error=skip to leave them out."
            )

    def to_dict(self) -> dict[str, list]:
        """As JSON can hold it."""
        return {kind.name: [count, self.examples[kind]] for kind, count in self.counts.items()}

    @classmethod
    def from_dict(cls, content: dict[str, list]) -> "Problems":
        """The inverse of `to_dict`."""
        return cls(
            Counter({Kind[name]: count for name, (count, _) in content.items()}),
            {Kind[name]: examples for name, (_, examples) in content.items()},
        )
