"""Overrides of a recipe, `section.key=value`."""

import sys
import typing
from typing import Any

from .reading import RecipeError, parse_yaml
from .sections import OPTIONAL_SECTIONS, SECTIONS


def apply_override(content: dict[str, Any], override: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in override):  # how Python keeps bytes that it can't decode
        raise RecipeError(
            f"override {override!a} is no text in the encoding of this locale, {sys.getfilesystemencoding()}: "
            "set PYTHONUTF8=1 or LC_ALL=C.UTF-8, or rename what is no UTF-8."
        )
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) > 2 or not all(parts):
        raise RecipeError(f"override {override!r} must look like section.key=value, or section=null.")
    value = _override_value(parts, text, override) if text else ""
    if len(parts) == 1:
        if value is not None:
            raise RecipeError(f"override {override!r}: a whole section can only be set to null.")
        if key not in OPTIONAL_SECTIONS:
            choice = " and ".join(OPTIONAL_SECTIONS)
            raise RecipeError(f"override {override!r}: only {choice} can be taken out of a recipe.")
        content[key] = None
        return
    section = content.get(parts[0])
    if not isinstance(section, dict | None):
        raise RecipeError(f"override {override!r}: section {parts[0]} must hold keys and values, not {section!r}.")
    # A copy: a YAML alias makes one dict of two sections.
    content[parts[0]] = {**(section or {}), parts[1]: value}


def _override_value(parts: list[str], text: str, override: str) -> Any:
    """The YAML value; where a key takes text, what YAML reads as something else ({split}, 007, no) is that text."""
    section_class = SECTIONS.get(parts[0])
    hint = typing.get_type_hints(section_class).get(parts[1]) if section_class and len(parts) == 2 else None
    takes_text = hint in (str, str | None)
    try:
        value = parse_yaml(text, f"override {override!r}")
    except RecipeError:
        if takes_text and not text.lstrip().startswith("!"):  # a tag asks for an object
            return text
        raise
    return text if takes_text and not isinstance(value, str | None) else value
