"""Text that every sink takes.

A Python string can hold half a surrogate pair: from a JSON escape such as `\\ud83d`, from an answer cut in the
middle of an emoji, from a file name. UTF-8 has no form for it, so Parquet, DuckDB, sockets and terminals refuse
it, long after the text came in. Belongs here: mending such text. Does not: what a text means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
# C0 and C1 controls but for tab and newline: some of them make a terminal do things
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def well_formed(text: str) -> str:
    """`text` with the two halves of a pair joined, and U+FFFD in place of each half without its other.

    >>> well_formed("\\ud83d\\ude00 \\ud83d") == "\\U0001f600 \\ufffd"
    True
    """
    if _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def well_formed_tree(value: Any) -> Any:
    """Lists and dictionaries with every string in them well formed, keys included; other values as they are."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, Mapping):
        return {well_formed_tree(key): well_formed_tree(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [well_formed_tree(inner) for inner in value]
    return value


def printable(text: str) -> str:
    """`text` for a terminal: well formed, and control characters shown as `\\x1b` instead of obeyed."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", well_formed(text))
