"""Fields of a recipe's sections: a default, a meaning, and the values that are allowed."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
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
        default: value of a recipe that doesn't name the field; a list or dict is copied.
        help: what the field is, with its unit.
        choices: the only values it takes.
        minimum, maximum: limits of a number, both allowed; of each item of a list.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(section_class: type) -> list[dataclasses.Field]:
    """The fields of a section that can be given."""
    return [field for field in dataclasses.fields(section_class) if field.init]


def check_range(value: Any, metadata: Mapping[str, Any]) -> None:
    """Compare a value, or each item of a list, with a field's `choices`, `minimum` and `maximum`.

    Raises:
        ValueError: worded to follow the value.
    """
    choices, low, high = metadata.get("choices"), metadata.get("minimum"), metadata.get("maximum")
    for item in value if isinstance(value, list) else [value]:
        if item is None:
            continue
        if choices and item not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        if low is not None and item < low:
            raise ValueError(f"must be at least {low}")
        if high is not None and item > high:
            raise ValueError(f"must be at most {high}")


def check_limits(section: Any, name: str) -> None:
    """Raise ValueError if a field of a section that was made in Python is beyond its limits, or no choice."""
    for field in settings_of(type(section)):
        value = getattr(section, field.name)
        try:
            check_range(value, field.metadata)
        except ValueError as error:
            raise ValueError(f"{name}.{field.name}: {value!r} {error}") from None


def default_of(field: dataclasses.Field) -> Any:
    """The value of a field that isn't given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
