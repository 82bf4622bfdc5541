"""Positions: the grammar `frame[slice]`, which tokens it selects, and its folder name.

A frame is `prompt`, `response` or `all` (prompt followed by response); a slice is one index or a Python slice
without a step, both with negative ends that count from the end of the frame. Nothing here knows a model or a
tensor, and nothing tokenises text: a position works on lengths, which come from token ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from storage.errors import UserError

Frame = Literal["prompt", "response", "all"]
FRAMES: tuple[Frame, ...] = ("prompt", "response", "all")

# the short names that prefill-only experiments use
TOKEN_POSITIONS: dict[str, str] = {"last": "prompt[-1]", "first": "prompt[0]", "mean": "prompt[:]"}

_T = TypeVar("_T")
_INTEGER = re.compile(r"-?[0-9]+")
_GRAMMAR = "Write prompt, response or all with an index or slice: response[:], response[:5], prompt[-1]."


@dataclass(frozen=True)
class Position:
    """One parsed position. Either `index` is set, or `start`/`stop` are the ends of a slice (None: open).

    `str(position)` is the text it was parsed from, so a position is its own identifier everywhere.
    """

    frame: Frame
    start: int | None = None
    stop: int | None = None
    index: int | None = None

    @classmethod
    def parse(cls, text: str) -> Position:
        """Parse strictly; junk, steps, and slices that can never select a token are a UserError with a
        caret.
        """
        bracket = text.find("[")
        frame = text[:bracket] if bracket >= 0 else text
        if frame not in FRAMES:
            _fail(text, 0, f"unknown frame {frame!r}")
        if bracket < 0:
            _fail(text, len(text), "the slice in brackets is missing")
        close = text.find("]", bracket)
        if close < 0:
            _fail(text, len(text), "the closing bracket is missing")
        if close != len(text) - 1:
            _fail(text, close + 1, "nothing may follow the closing bracket")
        body = text[bracket + 1 : close]
        parts = body.split(":")
        if len(parts) > 2:
            _fail(
                text, bracket + 1 + len(parts[0]) + 1 + len(parts[1]), "a slice with a step is not supported"
            )
        known = cast(Frame, frame)
        if len(parts) == 1:
            if not body:
                _fail(text, close, "the brackets are empty")
            return cls(known, index=_integer(text, bracket + 1, body))
        start = _integer(text, bracket + 1, parts[0]) if parts[0] else None
        stop_at = bracket + 1 + len(parts[0]) + 1
        stop = _integer(text, stop_at, parts[1]) if parts[1] else None
        if _never_selects(start, stop):
            _fail(text, stop_at, "this slice is empty for every text")
        return cls(known, start=start, stop=stop)

    def __str__(self) -> str:
        return f"{self.frame}[{self._body()}]"

    def _body(self) -> str:
        if self.index is not None:
            return str(self.index)
        return f"{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}"

    def select(self, prompt_len: int, response_len: int) -> tuple[int, int] | None:
        """Half-open token range `(start, end)` in prompt + response, or None where no token is selected.

        A slice is clamped to its frame as Python does; an index outside the frame selects nothing.
        """
        if self.frame == "prompt":
            offset, length = 0, prompt_len
        elif self.frame == "response":
            offset, length = prompt_len, response_len
        else:
            offset, length = 0, prompt_len + response_len
        if self.index is not None:
            at = self.index + length if self.index < 0 else self.index
            return (offset + at, offset + at + 1) if 0 <= at < length else None
        start, stop, _ = slice(self.start, self.stop).indices(length)
        return (offset + start, offset + stop) if start < stop else None

    @property
    def folder(self) -> str:
        """A folder name that `from_folder` decodes to this very position: `:` becomes `_`, `[:]` becomes
        `all`.

        >>> Position.parse("response[1:5]").folder
        'response_1_5'
        """
        body = self._body()
        return f"{self.frame}_{'all' if body == ':' else body.replace(':', '_')}"

    @classmethod
    def from_folder(cls, name: str) -> Position:
        """The position that a folder name stands for; UserError for a name that no position has."""
        frame, separator, body = name.partition("_")
        if separator:
            inner = ":" if body == "all" else body.replace("_", ":")
            try:
                position = cls.parse(f"{frame}[{inner}]")
            except UserError:
                position = None
            if position is not None and position.folder == name:
                return position
        raise UserError("is not the folder of a position", where=name, remedy="Names look like response_all.")


def parse_position(text: str) -> Position:
    """`Position.parse`, and the short names of `TOKEN_POSITIONS`."""
    return Position.parse(TOKEN_POSITIONS.get(text, text))


def preview(position: Position, prompt: Sequence[_T], response: Sequence[_T]) -> list[_T]:
    """What a position selects of one row, given its tokens: their ids or their strings."""
    span = position.select(len(prompt), len(response))
    return [] if span is None else [*prompt, *response][span[0] : span[1]]


def _integer(text: str, at: int, part: str) -> int:
    match = _INTEGER.match(part)
    end = match.end() if match else 0
    if match is None or end != len(part):
        _fail(text, at + end, "an integer was expected here")
    if part != str(int(part)):
        _fail(text, at, f"write {int(part)} for {part}")
    return int(part)


def _never_selects(start: int | None, stop: int | None) -> bool:
    if stop is None:
        return False
    if stop == 0:
        return True
    return start is not None and (start < 0) == (stop < 0) and start >= stop


def _fail(text: str, at: int, why: str) -> None:
    raise UserError(f"{why}\n  {text}\n  {' ' * at}^\n ", where="position", remedy=_GRAMMAR)
