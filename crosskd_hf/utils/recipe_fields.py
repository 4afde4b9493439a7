"""Fields of a recipe's sections: a default, a meaning, and the values that are allowed."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

MOST_PIXELS = 16384  # of a side

# The fields that a problem lies in (`section.key`, or a section), and what is wrong with them.
Problem = tuple[tuple[str, ...], str]


def setting(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field that a recipe can set.

    Args:
        default: value of a recipe that doesn't name the field; a list is copied.
        help: what the field is, with its unit.
        choices: the only values it takes.
        minimum, maximum: limits of a number, both allowed; of each item of a list.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(section_class: type) -> list[dataclasses.Field]:
    """The fields of a section that can be given."""
    return [field for field in dataclasses.fields(section_class) if field.init]


def check_limits(section: Any, name: str) -> None:
    """Raise ValueError if a field of a section that was made in Python is beyond its limits, or no choice."""
    for field in settings_of(type(section)):
        value, limits = getattr(section, field.name), field.metadata
        if value is None:
            continue
        if (choices := limits.get("choices")) and isinstance(value, str) and value not in choices:
            raise ValueError(f"{name}.{field.name} is {value!r}; it must be one of {', '.join(choices)}")
        for limit, beyond in (("minimum", operator.lt), ("maximum", operator.gt)):
            if limits.get(limit) is not None and isinstance(value, int | float) and beyond(value, limits[limit]):
                raise ValueError(f"{name}.{field.name} is {value}; its {limit} is {limits[limit]:g}")


def default_of(field: dataclasses.Field) -> Any:
    """The value of a field that isn't given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
