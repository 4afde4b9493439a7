"""Arguments that several commands have, and how a command line is read."""

import argparse
from collections.abc import Callable, Sequence


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `minimum` on."""

    def number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        return int(text)

    number.__name__ = "whole number"  # what argparse calls it if the text is none
    return number


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe and its overrides."""
    parser.add_argument("recipe", help="a recipe's path, or the bare name of one that the package carries")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="replace the recipe's values"
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments, with overrides before and after options alike, which argparse alone refuses."""
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments
