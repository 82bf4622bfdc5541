"""Reading answers: known probabilities and texts against values worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.judges.scoring import distinct_ngrams, read_logprobs, read_text


def alternatives(table: dict[str, float]) -> list[tuple[str, float]]:
    return [(token, math.log(p)) for token, p in table.items()]


def test_expectation_over_whole_number_tokens() -> None:
    reading = read_logprobs(alternatives({"85": 0.5, "90": 0.3, "10": 0.1, "The": 0.1}))
    assert reading.value == pytest.approx((85 * 0.5 + 90 * 0.3 + 10 * 0.1) / 0.9)
    assert reading.mass == pytest.approx(0.9)
    assert not reading.split_digits


def test_tokens_with_and_without_a_space_add_up() -> None:
    reading = read_logprobs(alternatives({" 85": 0.4, "85": 0.2, "\n70": 0.2, " no": 0.2}))
    assert reading.value == pytest.approx((85 * 0.6 + 70 * 0.2) / 0.8)
    assert reading.mass == pytest.approx(0.8)


def test_digit_by_digit_tokens_are_detected_and_give_no_score() -> None:
    reading = read_logprobs(alternatives({"8": 0.85, "7": 0.1, "9": 0.03, "T": 0.02}))
    assert reading.value is None
    assert reading.split_digits


def test_a_low_score_of_a_whole_number_tokeniser_is_no_split() -> None:
    reading = read_logprobs(alternatives({"0": 0.7, "5": 0.2, "10": 0.08, "2": 0.02}))
    assert reading.value == pytest.approx((5 * 0.2 + 10 * 0.08 + 2 * 0.02) / 1.0)
    assert not reading.split_digits


def test_a_stray_first_digit_is_no_score_of_eight() -> None:
    reading = read_logprobs(alternatives({"85": 0.6, "90": 0.2, "8": 0.1, "The": 0.1}))
    assert reading.value == pytest.approx((85 * 0.6 + 90 * 0.2) / 0.8)
    assert reading.mass == pytest.approx(0.8)


def test_fewer_alternatives_than_asked_score_with_a_flag() -> None:
    reading = read_logprobs(alternatives({"80": 0.3, "85": 0.1, "The": 0.5}), asked=20)
    assert reading.value == pytest.approx((80 * 0.3 + 85 * 0.1) / 0.4)
    assert reading.mass == pytest.approx(0.4)
    assert reading.detail["low_mass"] is True
    assert reading.detail["fewer_alternatives"] is True


def test_below_the_stated_mass_is_an_abstention() -> None:
    table = {"80": 0.2, "I": 0.5, "Sorry": 0.3}
    reading = read_logprobs(alternatives(table))
    assert (reading.value, reading.reason) == (None, "low_mass")
    assert reading.mass == pytest.approx(0.2)
    assert read_logprobs(alternatives(table), min_mass=0.1).value == pytest.approx(80)


@pytest.mark.parametrize("token", ["085", "1_0", "８５", "+85", "85.", "101", "-5", "½", ""])
def test_what_is_no_plain_integer_token_counts_as_no_number(token: str) -> None:
    reading = read_logprobs(alternatives({token: 0.9, "50": 0.05}))
    assert (reading.value, reading.reason) == (None, "low_mass")


def test_impossible_probabilities_are_refused() -> None:
    assert read_logprobs([("80", 0.0), ("70", 0.0)]).reason == "bad_logprobs"
    with_sentinel = read_logprobs(
        [("80", -0.01), ("70", -9999.0), ("60", float("-inf")), ("50", float("nan"))]
    )
    assert with_sentinel.value == pytest.approx(80)


@given(st.dictionaries(st.integers(0, 100), st.floats(0.001, 1.0), min_size=1, max_size=20))
def test_the_expectation_stays_within_the_numbers_that_carry_it(weights: dict[int, float]) -> None:
    total = sum(weights.values())
    reading = read_logprobs(alternatives({str(n): p / total for n, p in weights.items()}))
    if reading.value is not None:
        assert min(weights) - 1e-9 <= reading.value <= max(weights) + 1e-9
        assert 0.0 < (reading.mass or 0) <= 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("71", 71),
        (" 71 \n", 71),
        ("**71**", 71),
        ("71/100", 71),
        ("71 out of 100.", 71),
        ("71%", 71),
        ("100", 100),
        ("0", 0),
        ("85.5", 85.5),
        ("Of the 2 answers the second is better. Rating: 71", 71),
        ("There are 3 reasons, 2 of them weak. **Score:** 42", 42),
        ("Score: 20. On reflection it is stronger. Final score: 64", 64),
        ("Score (0-100): 15", 15),
        ("On a scale of 0 to 100, my rating is 88.", 88),
        ('{"reason": "2 insults", "score": 12}', 12),
        ("Score = 9, because of 4 words", 9),
        ("I would give it a score of 33.", 33),
        ("Rating: 71\nConfidence: 95", 71),
        ("<think>maybe 90? no, 10 words are fine</think>\n40", 40),
        ("Judgement: 5/100", 5),
        ("The final answer is **61**.", 61),
    ],
)
def test_the_labelled_final_score_or_the_bare_number(text: str, value: float) -> None:
    reading = read_text(text)
    assert reading.value == value, reading


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("  \n ", "empty"),
        ("<think></think>", "empty"),
        ("<think>is it 40", "unfinished"),
        ("It depends on 7 things, said the 2 of them.", "unparseable"),
        ("The rating of 2 answers is hard to give", "unparseable"),
        ("Score: 7/10", "unparseable"),
        ("Score: 70-80", "unparseable"),
        ("70 to 80", "unparseable"),
        ("Score: 8,5", "unparseable"),
        ("high", "unparseable"),
        ("Score: high", "unparseable"),
        ("the text has 71 words", "unparseable"),
        ("Score: 150", "out_of_range"),
        ("-5", "out_of_range"),
        ("Score: −3", "out_of_range"),
        ("101", "out_of_range"),
        ("I can't rate this. It would be 100% wrong.", "refusal"),
        ("I’m sorry, but I cannot help with that.", "refusal"),
        ("I cannot give a score: 0 is not right either", "refusal"),
        ("REFUSAL", "refusal"),
        ("As an AI, I do not rate people. Score: 50", "refusal"),
        ("Sorry, 50", "refusal"),
    ],
)
def test_what_cannot_be_read_has_a_reason_and_no_number(text: str, reason: str) -> None:
    reading = read_text(text)
    assert reading.value is None
    assert reading.reason == reason


@given(st.text(max_size=200))
def test_no_text_crashes_and_every_score_is_in_range(text: str) -> None:
    reading = read_text(text)
    assert (reading.value is None) != (reading.reason is None)
    if reading.value is not None:
        assert 0 <= reading.value <= 100


def test_distinct_trigrams_by_hand() -> None:
    # a b c a b c a b: 6 trigrams, abc bca cab repeat
    assert distinct_ngrams(list("abcabcab")) == pytest.approx(3 / 6)
    assert distinct_ngrams(list("abcdef")) == 1.0
    assert distinct_ngrams(["one"]) == 1.0
    assert distinct_ngrams(["a"] * 12) == pytest.approx(1 / 10)
