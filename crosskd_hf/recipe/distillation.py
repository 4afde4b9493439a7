"""The section `distillation` of a recipe: which methods there are, and the settings of each.

    distillation:
      methods: [crosskd, pkd]
      crosskd: {tap_index: 3}
      pkd: {weight: 6.0}

A method is a file of `crosskd_hf/distillation/methods`, whose class `Settings` says which keys its section has.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..distillation.methods import method_class, method_names
from ..utils.messages import nearest
from ..utils.recipe_fields import Problem, settings_of
from .reading import cast_section

DEFAULT = ("crosskd",)


@dataclass
class DistillationSection:
    """The methods that a student is distilled with.

    Attributes:
        methods: name -> `Settings` of that method, in the recipe's order.
    """

    methods: dict[str, Any] = field(default_factory=lambda: {name: settings_class(name)() for name in DEFAULT})

    def to_dict(self) -> dict[str, Any]:
        """As a recipe has it, with every key of every method."""
        sections = {name: dataclasses.asdict(settings) for name, settings in self.methods.items()}
        return {"methods": list(self.methods), **sections}


def settings_class(name: str) -> type:
    """The dataclass with the settings of a method."""
    return method_class(name).Settings


def read_distillation(values: Any, problems: list[str], refused: set[str]) -> DistillationSection:
    """The section from nested dicts.

    Args:
        values: key -> value.
        problems: what is wrong is added to it.
        refused: keys with a value that can't be used are added to it, or the section if all of it is in doubt.
    """
    if not isinstance(values, dict):
        problems.append(f"section distillation must hold keys and values, not {values!r}.")
        refused.add("distillation")
        return DistillationSection()
    known = method_names()
    before = len(problems)
    methods = _read_methods(values.get("methods", list(DEFAULT)), known, problems)
    wrong_list = len(problems) > before
    for key, value in values.items():
        if key == "methods" or (key in known and isinstance(value, dict) and (key in methods or wrong_list)):
            continue
        if key in known and isinstance(value, dict):
            problems.append(
                f"distillation.{key} is given, but {key} isn't among distillation.methods {methods}: add it there, or "
                "leave its section out."
            )
        else:
            problems.append(_wrong_key(key, value, known))
    if len(problems) > before:
        refused.add("distillation")
    sections = {}
    for name in methods:
        section, given = settings_class(name), values.get(name)
        given = given if isinstance(given, dict) else {}
        sections[name] = section(**cast_section(f"distillation.{name}", given, section, problems, refused))
    return DistillationSection(sections)


def _read_methods(value: Any, known: list[str], problems: list[str]) -> list[str]:
    if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        problems.append(f"distillation.methods: {value!r} is no list of names, such as [crosskd].")
        return []
    for name in dict.fromkeys(value):
        if name not in known:
            problems.append(f"distillation.methods: there is no method {name!r}. {nearest(name, known)}")
        elif value.count(name) > 1:
            problems.append(f"distillation.methods has {name!r} twice: {value}.")
    return [name for name in dict.fromkeys(value) if name in known]


def _wrong_key(key: Any, value: Any, known: list[str]) -> str:
    if key in known:
        return (
            f"distillation.{key}: {value!r} is no section: add {key} to distillation.methods, and write keys and "
            f"values, such as distillation.{key}: {{weight: 1.0}}; to turn {key} off, leave it out of the methods."
        )
    if owners := [name for name in known if key in {f.name for f in settings_of(settings_class(name))}]:
        likely = next((name for name in DEFAULT if name in owners), owners[0])
        return f"distillation.{key} is a key of {', '.join(owners)}: write distillation.{likely}: {{{key}: {value}}}."
    return f"unknown key distillation.{key} (value {value!r}). {nearest(str(key), ['methods', *known])}"


def distillation_problems(section: DistillationSection, centerness: bool) -> list[Problem]:
    """Combinations of settings with which nothing would be distilled.

    Args:
        section: of a recipe with a teacher.
        centerness: whether the teacher predicts centerness, so that its published weight isn't 0.
    """
    if not section.methods:
        text = f"distillation.methods is empty: name some of {', '.join(method_names())}, or set distillation=null."
        return [(("distillation.methods",), text)]
    off = {name: _zero_weights(settings, centerness) for name, settings in section.methods.items()}
    if not all(off.values()):
        return []
    keys = tuple(f"distillation.{name}.{key}" for name, weights in off.items() for key in weights)
    return [(keys, f"{', '.join(keys)}: all are 0, so that nothing would be distilled.")]


def _zero_weights(settings: Any, centerness: bool) -> list[str]:
    """The keys with which a method is turned off; none if it isn't."""
    if getattr(settings, "weight", 1.0) == 0:
        return ["weight"]
    terms = {name: value for name, value in vars(settings).items() if name.endswith("_weight")}
    published = {"centerness_weight": None if centerness else 0.0}  # of what is null
    zero = [name for name, weight in terms.items() if (published.get(name) if weight is None else weight) == 0]
    return zero if terms and len(zero) == len(terms) else []
