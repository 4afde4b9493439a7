"""Parts of messages: the first of many names, valid names that are like a wrong one, an error's first line."""

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


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    text = (str(error).splitlines() or [""])[0]
    # A KeyError says only its key.
    return text if text and not isinstance(error, LookupError) else f"{type(error).__name__} {text}".strip()
