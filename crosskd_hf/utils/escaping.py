"""Names from outside (of files, classes, splits) made safe to show and to write: they may hold anything.

Terminals obey control characters, marks of text direction show one name as another, a line break starts a line that
nobody wrote, and model cards are HTML to a browser.
"""

import html
import re
import unicodedata

SEPARATORS = "/\\"
MARKDOWN = re.compile(r"([\\`*\[\]|])")
FENCES = re.compile("`{3,}")
JOINERS = "\u200c\u200d"  # shape the letters beside them: Persian words, families of emoji


def printable(text: object, keep: str = "") -> str:
    r"""A text with an escape, such as `\x1b`, for each character that isn't seen: line breaks and halves of characters
    as well. Those of `keep` stay."""
    return "".join(
        letter if _is_seen(letter) or letter in keep else letter.encode("unicode_escape").decode()
        for letter in str(text)
    )


def printable_lines(text: object) -> str:
    """A text of several lines as `printable` makes it; its line breaks stay."""
    return printable(text, keep="\n\t")


def file_name(text: str) -> str:
    """A text as the name of one file in a folder: with `_` for separators and what isn't seen, and never `..`."""
    name = "".join(letter if _is_seen(letter) and letter not in SEPARATORS else "_" for letter in text)
    return name if name.strip(". ") else "_" * max(1, len(name))


def markdown(text: object) -> str:
    """A text as one line of Markdown that shows it: neither markup nor HTML."""
    return MARKDOWN.sub(r"\\\1", html.escape(printable(text), quote=False))


def markdown_code(text: object) -> str:
    """A text as code within a line of Markdown, which has no escape for a backtick."""
    return f"`{printable(text).replace('`', chr(39))}`"


def markdown_block(text: str, language: str) -> str:
    """Lines as a block of code, between fences that they don't hold."""
    fence = "`" * max(3, 1 + max(map(len, FENCES.findall(text)), default=0))
    return f"{fence}{language}\n{printable_lines(text)}{fence}"


def _is_seen(letter: str) -> bool:
    return letter.isprintable() or letter in JOINERS or unicodedata.category(letter) == "Zs"
