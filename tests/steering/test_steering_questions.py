"""Reading steering.json's questions and splitting them."""

from __future__ import annotations

from typing import Any

import pytest

from storage.errors import UserError
from trait_assets.steering.prompting import trait_system_prompt
from trait_assets.steering.questions import Questions, read_questions, split

TWENTY = [f"What is number {i}?" for i in range(20)]


def read(steering: Any, **options: Any) -> Questions:
    return read_questions(steering, trait="tone/calm", where="tone/calm/steering.json", **options)


def test_halves_are_disjoint_and_cover_everything() -> None:
    questions = read({"questions": TWENTY})
    assert sorted(questions.search + questions.report) == list(range(20))
    assert questions.split
    assert len(questions.search) == 8
    assert questions.flags == ()


@pytest.mark.parametrize("n", range(8, 30))
@pytest.mark.parametrize("share", [0.05, 0.4, 0.95])
def test_both_halves_keep_at_least_four_questions(n: int, share: float) -> None:
    search, report = split([f"q{i}" for i in range(n)], search_share=share, seed=1)
    assert len(search) >= 4
    assert len(report) >= 4


def test_split_depends_on_text_and_seed_not_on_place() -> None:
    forward = read({"questions": TWENTY}, seed=3)
    backward = read({"questions": TWENTY[::-1]}, seed=3)
    assert {forward.texts[i] for i in forward.search} == {backward.texts[i] for i in backward.search}
    other = read({"questions": TWENTY}, seed=4)
    assert {other.texts[i] for i in other.search} != {forward.texts[i] for i in forward.search}


@pytest.mark.parametrize(
    ("steering", "said"),
    [
        (None, "has no steering.json"),
        ({}, "has no steering.json"),
        ({"direction": "positive"}, "no list `questions`"),
        ({"questions": []}, "no list `questions`"),
        ({"questions": "How are you?"}, "no list `questions`"),
        ({"questions": [*TWENTY, 5]}, "question 21"),
        ({"questions": [{"text": "How are you?"}, *TWENTY]}, "question 1"),
        ({"questions": ["the same", "The  same", " the same "]}, "1 different question left"),
        ({"questions": TWENTY, "direction": "down"}, "`direction`"),
        ({"questions": TWENTY, "eval_prompt": ["a"]}, "`eval_prompt`"),
    ],
)
def test_bad_files_are_named(steering: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(steering)
    assert said in str(caught.value)
    assert "tone/calm/steering.json" in str(caught.value)
    assert caught.value.remedy


def test_questions_as_objects_and_repeats() -> None:
    given = [{"question": "How are you?", "topic": "x"}, *TWENTY, "what IS  number 3?", "   "]
    questions = read({"questions": given})
    assert questions.texts[0] == "How are you?"
    assert len(questions.texts) == 21
    assert "1 repeated question was left out" in questions.flags
    assert "1 blank question was left out" in questions.flags


def test_three_questions_are_exploratory() -> None:
    questions = read({"questions": TWENTY[:3], "direction": "negative"})
    assert not questions.split
    assert questions.search == questions.report == (0, 1, 2)
    assert "only 3 questions" in questions.flags[-1]
    assert questions.direction == "negative"


def test_limit_keeps_the_first() -> None:
    assert read({"questions": TWENTY}, limit=9).texts == tuple(TWENTY[:9])


DEFINITION = """Is it calm? Only the answer counts.

HIGH (70-100): Slow, even words:
no hurry anywhere.

MID (30-70): Somewhat.

LOW (0-30): Rushed and loud.

Key: Topic does not count."""


def test_system_prompt_takes_the_paragraph_of_the_wanted_side() -> None:
    up = trait_system_prompt(DEFINITION, "positive")
    assert up.endswith("Slow, even words: no hurry anywhere.")
    down = trait_system_prompt(DEFINITION, "negative")
    assert down.endswith("Rushed and loud.")
    assert "Somewhat" not in up + down


def test_system_prompt_of_a_definition_without_paragraphs() -> None:
    assert "Being calm." in trait_system_prompt("Being calm.", "positive")
    assert "none of the following" in trait_system_prompt("Being calm.", "negative")
