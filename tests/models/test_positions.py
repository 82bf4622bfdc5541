"""The grammar of positions: what parses, what it selects, and that folder names come back."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.models.positions import FRAMES, TOKEN_POSITIONS, Position, parse_position, preview
from storage.errors import UserError

ENDS = st.one_of(st.none(), st.integers(-30, 30))


@st.composite
def positions(draw: Any) -> Position:
    frame = draw(st.sampled_from(FRAMES))
    if draw(st.booleans()):
        return Position(frame, index=draw(st.integers(-30, 30)))
    start, stop = draw(ENDS), draw(ENDS)
    text = f"{frame}[{'' if start is None else start}:{'' if stop is None else stop}]"
    try:
        return Position.parse(text)
    except UserError:
        return Position(frame)


@given(positions())
def test_text_and_folder_round_trip(position: Position) -> None:
    assert Position.parse(str(position)) == position
    assert Position.from_folder(position.folder) == position
    assert re.fullmatch(r"[a-z0-9_-]+", position.folder)


@given(positions(), positions())
def test_folders_do_not_collide(a: Position, b: Position) -> None:
    assert (a.folder == b.folder) == (a == b)


@given(positions(), st.integers(0, 12), st.integers(0, 12))
def test_selection_is_what_python_slicing_gives(position: Position, prompt: int, response: int) -> None:
    tokens = list(range(prompt + response))
    frame = {"prompt": tokens[:prompt], "response": tokens[prompt:], "all": tokens}[position.frame]
    if position.index is None:
        expected = frame[position.start : position.stop]
    else:
        expected = [frame[position.index]] if -len(frame) <= position.index < len(frame) else []
    span = position.select(prompt, response)
    assert (tokens[span[0] : span[1]] if span else []) == expected
    assert span is None or span[0] < span[1]


@given(ENDS, ENDS)
def test_a_slice_is_refused_exactly_if_it_is_always_empty(start: int | None, stop: int | None) -> None:
    text = f"all[{'' if start is None else start}:{'' if stop is None else stop}]"
    always_empty = all(not list(range(length))[start:stop] for length in range(100))
    if always_empty:
        with pytest.raises(UserError, match="empty for every text"):
            Position.parse(text)
    else:
        position = Position.parse(text)
        assert any(position.select(length, 0) for length in range(100))


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("response[:]", "response_all"),
        ("response[:5]", "response__5"),
        ("response[1:5]", "response_1_5"),
        ("response[-5:-1]", "response_-5_-1"),
        ("response[15]", "response_15"),
        ("prompt[-1]", "prompt_-1"),
        ("all[2:]", "all_2_"),
    ],
)
def test_folder_names(text: str, folder: str) -> None:
    assert Position.parse(text).folder == folder


@pytest.mark.parametrize(
    ("text", "column", "why"),
    [
        ("", 0, "unknown frame ''"),
        ("answer[:]", 0, "unknown frame 'answer'"),
        ("Response[:]", 0, "unknown frame 'Response'"),
        ("response", 8, "slice in brackets is missing"),
        ("response[:", 10, "closing bracket is missing"),
        ("response[:5]junk", 12, "nothing may follow"),
        ("response[]", 9, "brackets are empty"),
        ("response[1_5]", 10, "integer was expected"),
        ("response[ 1]", 9, "integer was expected"),
        ("response[+1]", 9, "integer was expected"),
        ("response[1.5]", 10, "integer was expected"),
        ("response[1:2x]", 12, "integer was expected"),
        ("response[::2]", 10, "step is not supported"),
        ("response[1:5:2]", 12, "step is not supported"),
        ("response[5:2]", 11, "empty for every text"),
        ("response[:0]", 10, "empty for every text"),
        ("response[-1:-3]", 12, "empty for every text"),
        ("response[007]", 9, "write 7 for 007"),
        ("response[-0]", 9, "write 0 for -0"),
        ("response[١]", 9, "integer was expected"),
    ],
)
def test_errors_point_at_the_fault(text: str, column: int, why: str) -> None:
    with pytest.raises(UserError) as caught:
        Position.parse(text)
    lines = str(caught.value).splitlines()
    assert why in lines[0]
    assert lines[1] == f"  {text}"
    assert lines[2] == f"  {' ' * column}^"


@pytest.mark.parametrize(
    "name", ["response_1_5_2", "response_", "response", "elsewhere_all", "response_007", ""]
)
def test_other_folder_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="not the folder of a position"):
        Position.from_folder(name)


def test_short_names_of_token_positions() -> None:
    assert {name: str(parse_position(name)) for name in TOKEN_POSITIONS} == {
        "last": "prompt[-1]",
        "first": "prompt[0]",
        "mean": "prompt[:]",
    }


def test_preview_shows_the_selected_tokens() -> None:
    prompt, response = ["On", " the"], [" mat", ",", " she"]
    assert preview(Position.parse("response[:2]"), prompt, response) == [" mat", ","]
    assert preview(Position.parse("prompt[-1]"), prompt, response) == [" the"]
    assert preview(Position.parse("all[1:3]"), prompt, response) == [" the", " mat"]
    assert preview(Position.parse("response[7]"), prompt, response) == []
