"""Values as the types that the fields of a dataclass declare."""

import math
import types
import typing
from collections.abc import Sequence
from enum import Enum
from typing import Any


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
