"""Overrides of a recipe: `section.key=value`, `distillation.METHOD.key=value`, `model.config.KEY[.KEY]=value`."""

import sys
import typing
from typing import Any

from ..distillation.methods import method_names
from ..utils.strict_yaml import RecipeError, parse_yaml
from .distillation import settings_class
from .sections import OPTIONAL_SECTIONS, SECTIONS


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set a value, or take a section out.

    Args:
        content: section -> key -> value; changed in place, its sections replaced by copies.
        override: as the command line has it.

    Raises:
        RecipeError: it isn't written as an override is.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in override):  # how Python keeps bytes that it can't decode
        raise RecipeError(
            f"override {override!a} is no text in the encoding of this locale, {sys.getfilesystemencoding()}: "
            "set PYTHONUTF8=1 or LC_ALL=C.UTF-8, or rename what is no UTF-8."
        )
    key, equals, text = override.partition("=")
    parts = key.split(".")
    free = parts[1:2] == ["config"]  # keys of transformers' configurations, which hold others
    most = 3 if parts[0] == "distillation" else 2
    if not equals or not all(parts) or (len(parts) > most and not free):
        raise RecipeError(f"override {override!r} must look like section.key=value, or section=null.")
    value = _override_value(parts, text, override) if text else ""
    if len(parts) == 1:
        if key not in SECTIONS:
            raise RecipeError(f"override {override!r}: there is no section {key}; there are {', '.join(SECTIONS)}.")
        if value is not None:
            key_of = "teacher.checkpoint" if key == "teacher" else f"{key}.KEY"
            raise RecipeError(f"override {override!r} sets a section: write {key_of}={text}.")
        if key not in OPTIONAL_SECTIONS:
            choice = " and ".join(OPTIONAL_SECTIONS)
            raise RecipeError(f"override {override!r}: only {choice} can be taken out of a recipe.")
        content[key] = None
        return
    for depth, name in enumerate(parts[:-1], start=1):
        section = content.get(name)
        if not isinstance(section, dict | None):
            path = ".".join(parts[:depth])
            raise RecipeError(f"override {override!r}: section {path} must hold keys and values, not {section!r}.")
        # A copy: a YAML alias makes one dict of two sections.
        content[name] = dict(section or {})
        content = content[name]
    content[parts[-1]] = value


def leave_out_methods(content: dict[str, Any], overridden: set[str]) -> None:
    """Where an override names other distillation methods, leave out the file's sections of those that are gone.

    Args:
        content: with the overrides; the section `distillation` is changed in place.
        overridden: keys of the overrides. A section that one of them sets stays, and is refused later.
    """
    section = content.get("distillation")
    if "distillation.methods" not in overridden or not isinstance(section, dict):
        return
    methods = section.get("methods")
    if not isinstance(methods, list):  # told later
        return
    for name in [name for name, value in section.items() if isinstance(value, dict) and name not in methods]:
        if not any(f"{key}.".startswith(f"distillation.{name}.") for key in overridden):
            del section[name]


def _override_value(parts: list[str], text: str, override: str) -> Any:
    """The YAML value; where a key takes text, what YAML reads as something else ({split}, 007, no) is that text."""
    hint = _hint(parts)
    takes_text = hint in (str, str | None)
    try:
        value = parse_yaml(text, f"override {override!r}")
    except RecipeError:
        if takes_text and not text.lstrip().startswith("!"):  # a tag asks for an object
            return text
        raise
    return text if takes_text and not isinstance(value, str | None) else value


def _hint(parts: list[str]) -> Any:
    """The type of the field that an override sets; None if there is no such field."""
    *sections, key = parts
    if len(sections) == 2:
        section = settings_class(sections[1]) if sections[1] in method_names() else None
    else:
        section = SECTIONS.get(".".join(sections))
    return typing.get_type_hints(section).get(key) if section else None
