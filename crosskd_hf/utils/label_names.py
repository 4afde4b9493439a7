"""Class names: which ones are the same, and which ones only differ in how they are spelt."""

import re
import unicodedata
from collections.abc import Sequence

# The classes of COCO 2017, in the order of their ids: what published checkpoints without names were trained on.
COCO_CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,"
    "snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,"
    "fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)


def coco_spelling(names: Sequence[str]) -> list[str]:
    """The names, with COCO's as COCO spells them: MMDetection 1.x wrote `traffic_light`.

    A list that would then hold a name twice is returned as it is.
    """
    spelt = [blank if (blank := name.replace("_", " ")) in COCO_CLASSES else name for name in names]
    return spelt if len(set(spelt)) == len(spelt) else list(names)


def loosely(name: str) -> str:
    """A name without its case, blanks, underscores and hyphens."""
    return re.sub(r"[\s_-]", "", unicodedata.normalize("NFKC", name)).casefold()


def near_matches(first: Sequence[str], second: Sequence[str]) -> list[tuple[str, str]]:
    """Names that only one of two lists has, and that are loosely the same: (of the first, of the second) each."""
    only_second = {loosely(name): name for name in second if name not in first}
    return [(n, only_second[loosely(n)]) for n in first if n not in second and loosely(n) in only_second]


def spelling_problem(near: Sequence[tuple[str, str]], first: str, second: str) -> str:
    """What is wrong with near matches, and what to do.

    Args:
        near: see `near_matches`; not empty.
        first, second: what has the first and the second name of each.
    """
    pairs = "; ".join(f"{first} {name!r}, {second} {other!r}" for name, other in near[:5])
    return (
        f"{len(near)} class names that differ in spelling only ({pairs}{'; ...' if len(near) > 5 else ''}): spell "
        "them alike, in the data (its categories, or data.label_names), or in id2label of the model's config.json"
    )
