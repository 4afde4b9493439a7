"""YAML without surprises: plain values, no key twice, no references that unfold to billions."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MOST_VALUES = 10_000  # of a YAML file; recipes have about a hundred


class RecipeError(ValueError):
    """A recipe that can't be run, with every problem found in it."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, of which plain YAML keeps the last."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            problem = "merge keys (<<) aren't read: write every value out"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a single word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path) -> Any:
    """A YAML file as plain Python values.

    Raises:
        RecipeError: it can't be read, is no UTF-8, or no valid YAML; naming file, line and column.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path} can't be read ({error.strerror}).") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}, line {line}: no UTF-8 text ({error.reason}); save it as UTF-8.") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """YAML text as plain Python values; no tag of it can make an object.

    Raises:
        RecipeError: naming the source, the line and the column.
    """
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{source}{where}: no valid YAML ({error.problem or error.context}).") from error
    except yaml.reader.ReaderError as error:
        where = f", line {text.count(chr(10), 0, error.position) + 1}"
        raise RecipeError(f"{source}{where}: no valid YAML ({error.reason}).") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: such as the date 2024-13-45
        raise RecipeError(f"{source}: no valid YAML ({error}).") from error
    if _has_too_many_values(value):
        raise RecipeError(
            f"{source}: more than {MOST_VALUES} values, when references (*name) are followed: write every value out."
        )
    return value


def _has_too_many_values(value: Any) -> bool:
    """Whether following every reference finds over `MOST_VALUES`: a few lines of references to lists of references
    make billions, and a list may be in itself."""
    stack, count = [value], 0
    while stack and count <= MOST_VALUES:
        item = stack.pop()
        count += 1
        stack += item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
    return count > MOST_VALUES
