"""What others may read: values and texts without tokens, credentials in URLs, or the folders of this machine."""

import ntpath
import re
from typing import Any

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bapi_org_[A-Za-z0-9]{16,}")
URL = re.compile(r"[A-Za-z][\w+.-]*://(?:[^\s/?#]*@)?[^\s'\"<>]*")  # in a text; passwords may hold quotes


def public(value: Any) -> Any:
    """A value with absolute paths cut to their last part, and URLs to what isn't secret."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    if "://" in value and not value.startswith("file:"):
        return public_url(value)
    if value.startswith(("/", "~", "file:", "\\")) or ntpath.splitdrive(value)[0]:
        return last_part(value)
    return without_tokens(value)


def public_url(url: str) -> str:
    """A URL without user names, signatures and tokens: they stand before the host and behind the path.

    It may be malformed: messages about it are where it is shown.
    """
    scheme, colon, rest = url.partition("://")
    host, slash, path = re.split("[?#]", rest, maxsplit=1)[0].partition("/")
    return without_tokens(scheme + colon + host.rpartition("@")[2] + slash + path)


def without_credentials(text: str) -> str:
    """A text, such as an error's, without what is secret in its URLs, and without tokens. Paths stay."""
    return without_tokens(URL.sub(lambda match: public_url(match[0]), text))


def without_tokens(text: str) -> str:
    """A text without tokens of the Hub."""
    return TOKEN.sub("REMOVED", text)


def last_part(path: str) -> str:
    """The last part of a path, of whichever system it is."""
    return without_tokens(re.split(r"[/\\]", path.rstrip("/\\"))[-1])
