"""Values of a recipe as the types that dataclass fields declare, and what is wrong with those that can't be."""

import typing
from typing import Any

from ..training.arguments import FIXED_ARGUMENTS
from ..utils.casting import cast
from ..utils.messages import nearest
from ..utils.recipe_fields import check_range, settings_of

# Keys of earlier versions -> what is instead.
REMOVED = {
    "training.sync": "Normalisers and statistics are those of each process, as published.",
    "training.skip_nonfinite_steps": "A run with a loss or gradient that isn't finite ends, and names the term, the "
    "step and the last good checkpoint.",
}


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
