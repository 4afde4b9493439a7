"""Values of a recipe as the types that dataclass fields declare, and what is wrong with those that can't be."""

import math
import types
import typing
from collections.abc import Sequence
from enum import Enum
from typing import Any

from ..training.arguments import FIXED_ARGUMENTS
from ..utils.messages import nearest
from ..utils.recipe_fields import check_range, settings_of

# Keys of earlier versions -> what is instead.
REMOVED = {
    "training.sync": "Normalisers and statistics are those of each process, as published.",
    "training.skip_nonfinite_steps": "A run with a loss or gradient that isn't finite ends, and names the term, the "
    "step and the last good checkpoint.",
}


def cast(value: Any, hint: Any) -> Any:
    """The value as the field's type. Numbers may be written as text, as YAML reads 1e-2; nothing else is changed.

    Raises:
        ValueError: worded to follow the value.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    members = arguments if origin in (typing.Union, types.UnionType) else (hint,)
    if hint is Any:
        return value
    if value is None:
        if type(None) in members:
            return None
        raise ValueError("must have a value: leave the key out for its default")
    if len(members) > 1:
        return _cast_union(value, members)
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"is no list of {type_name(arguments[0])}")
        return [cast(item, arguments[0]) for item in value]
    if hint in (int, float):
        return _cast_number(value, hint)
    choices = [str(member.value) for member in hint] if _is_enum(hint) else None
    if choices and value is False and "no" in choices:
        return "no"  # which YAML reads as false
    if hint is bool and not isinstance(value, bool):
        raise ValueError("is neither true nor false")
    if (hint is str or choices) and not isinstance(value, str):
        raise ValueError("is no text: put it in quotes")
    if choices and value not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}")
    if origin is typing.Literal and not any(type(value) is type(known) and value == known for known in arguments):
        raise ValueError(f"must be one of {', '.join(map(repr, arguments))}")
    if dict in (origin, hint) and not isinstance(value, dict):
        raise ValueError("is no mapping")
    if origin is dict:
        return {cast(key, arguments[0]): cast(item, arguments[1]) for key, item in value.items()}
    return value


def _cast_union(value: Any, members: Sequence[Any]) -> Any:
    members = [member for member in members if member is not type(None)]
    if any(map(_is_enum, members)):
        # transformers declares `Enum | str` but takes only the Enum's values.
        members = [member for member in members if member is not str]
    # A type that takes the value as it is goes before one that casts it.
    for member in members:
        if type(value) is (typing.get_origin(member) or member):
            return cast(value, member)
    errors = []
    for member in members:
        try:
            return cast(value, member)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(" and ".join(errors))


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _cast_number(value: Any, hint: type) -> Any:
    kind = "whole number" if hint is int else "number"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"is no {kind}")
    try:
        # YAML reads 1e-2 as text: it wants 1.0e-2.
        number = float(value)
    except ValueError:
        raise ValueError(f"is no {kind}") from None
    except OverflowError:
        raise ValueError("is too large") from None
    if not math.isfinite(number):
        raise ValueError("is not finite")
    if hint is float:
        return number
    if not number.is_integer():
        raise ValueError("is no whole number")
    return value if isinstance(value, int) else int(number)


def type_name(hint: Any) -> str:
    """A type as a person would write it."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def cast_section(
    name: str, values: Any, section_class: type, problems: list[str], refused: set[str]
) -> dict[str, Any]:
    """The values of a section as the types that its fields declare.

    Args:
        name: of the section, for messages.
        values: key -> value; None is an empty section.
        section_class: a dataclass.
        problems: what is wrong is added to it, such as keys that the section doesn't have.
        refused: the names of keys whose values can't be used are added to it.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        problems.append(f"section {name} must hold keys and values, not {values!r}.")
        refused.add(name)
        return {}
    fields, hints = {f.name: f for f in settings_of(section_class)}, typing.get_type_hints(section_class)
    values_cast = {}
    for key, value in values.items():
        if reason := REMOVED.get(f"{name}.{key}"):
            problems.append(f"{name}.{key} is no key any more: leave it out. {reason}")
            continue
        if key not in fields:
            problems.append(f"unknown key {name}.{key} (value {value!r}). {nearest(str(key), list(fields))}")
            continue
        try:
            # Of what can't be changed, the reason says more than the type.
            checked = value if name == "training" and key in FIXED_ARGUMENTS else cast(value, hints[key])
            # transformers' fields may have choices of their own, in the same place.
            check_range(checked, fields[key].metadata)
            values_cast[key] = checked
        except ValueError as error:
            problems.append(f"{name}.{key}: {value!r} {error}.")
            refused.add(f"{name}.{key}")
    return values_cast
