"""Lists of names in messages: the first of them, and the valid ones that are like a wrong one."""

import difflib
from collections.abc import Sequence

MOST_NAMES = 40  # of valid ones in a message: those of any section of a recipe


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, with "..." if there are more."""
    return ", ".join([*names[:most], "..."] if len(names) > most else names)


def nearest(name: str, valid: Sequence[str]) -> str:
    """A sentence with the valid names that are like a wrong one, or with the first of all."""
    if close := difflib.get_close_matches(name, valid, n=3, cutoff=0.5):
        return f"Did you mean {', '.join(close)}?"
    return f"Valid: {listed(valid, MOST_NAMES)}." if valid else "None are installed."
