"""The vetting rules by hand-made judgements."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.judges.protocol import Abstention, Judgement, Score
from storage.errors import UserError
from trait_assets.responses.vetting import vet_responses
from trait_assets.scenarios.vetting import Candidate, Vetting, apply_thresholds, judged_text


def rows(positive: list[float | str], negative: list[float | str]) -> list[Candidate]:
    def judgement(key: str, value: float | str) -> Judgement:
        return Abstention(key, value) if isinstance(value, str) else Score(key, value, mass=0.9)

    return [
        Candidate(f"{side[0]}{i}", side, judgement(f"{side[0]}{i}", value), f"{side} text {i}", i)  # type: ignore[arg-type]
        for side, values in (("positive", positive), ("negative", negative))
        for i, value in enumerate(values)
    ]


def vet(positive: list[float | str], negative: list[float | str], **options: Any) -> Vetting:
    return apply_thresholds(
        rows(positive, negative), **{"min_per_side": 1, "max_abstention_rate": 1.0, **options}
    )


def test_thresholds_include_their_edges() -> None:
    vetting = vet([60.0, 59.999, 100.0], [40.0, 40.001, 0.0])
    assert vetting.kept == ("p0", "p2", "n0", "n2")
    assert vetting.failed == ("p1", "n1")
    assert vetting.kept_of("positive") == ("p0", "p2")
    assert vetting.passed


def test_an_abstention_is_neither_kept_nor_failed_nor_a_zero() -> None:
    vetting = vet([90.0, "refusal", 80.0, "refusal"], [10.0, "empty"])
    assert vetting.failed == ()
    assert vetting.abstained == {"refusal": ("p1", "p3"), "empty": ("n1",)}
    assert vetting.positive.mean == 85.0
    assert vetting.contrast == 75.0
    assert vetting.abstention_rate == 0.5
    assert vetting.summary()["abstained_refusal"] == 2
    assert vetting.summary()["n_scored"] == 3


def test_contrast_over_all_and_over_kept_rows() -> None:
    vetting = vet([90.0, 30.0], [10.0, 70.0])
    assert vetting.contrast == pytest.approx(60 - 40)
    assert vetting.contrast_kept == pytest.approx(90 - 10)


def test_pair_aware_filtering_drops_the_partner_too() -> None:
    positive: list[float | str] = [90.0, 20.0, 90.0, 90.0]
    negative: list[float | str] = [10.0, 10.0, 80.0, "low_mass"]
    assert vet(positive, negative).kept == ("p0", "p2", "p3", "n0", "n1")
    paired = vet(positive, negative, pair_aware=True)
    assert paired.kept == ("p0", "n0")
    assert paired.excluded_by_pair == ("p2", "p3", "n1")
    assert paired.failed == ("p1", "n2")
    assert paired.positive.excluded_by_pair == 2
    # a row without a pair has no partner to lose
    lone = [*rows(positive, negative), Candidate("lone", "positive", Score("lone", 99.0))]
    assert "lone" in apply_thresholds(lone, pair_aware=True, min_per_side=1, max_abstention_rate=1.0).kept


def test_too_few_per_side_is_a_problem_with_advice() -> None:
    few = vet([90.0] * 9, [10.0] * 12, min_per_side=10)
    assert not few.passed
    (problem,) = few.problems
    assert "only 9 of 9 positive scenarios kept, 10 needed" in problem
    assert "write at least 10" in problem
    with pytest.raises(UserError, match="emotion/gloom"):
        few.raise_if_failed("emotion/gloom")
    failed = vet([90.0] * 5 + [30.0] * 10, [10.0] * 12, min_per_side=10)
    assert "worst offenders" in failed.problems[0]
    assert vet([90.0] * 10, [10.0] * 10, min_per_side=10).passed
    vet([90.0] * 10, [10.0] * 10, min_per_side=10).raise_if_failed("x/y")


def test_advice_fits_the_reason() -> None:
    silent = vet([90.0] * 8 + ["timeout"] * 4, [10.0] * 12, min_per_side=10)
    assert "why the judge abstained" in silent.problems[0]
    paired = vet([90.0] * 12, [10.0] * 6 + [90.0] * 6, min_per_side=10, pair_aware=True)
    assert any("pair_filter" in problem for problem in paired.problems)


def test_the_abstention_gate_names_the_reasons() -> None:
    sides: list[float | str] = [90.0] * 17 + ["low_mass", "low_mass", "refusal"]
    vetting = apply_thresholds(rows(sides, [10.0] * 20), max_abstention_rate=0.05)
    assert "abstained on 3 of 40 scenarios (8%, limit 5%): low_mass 2, refusal 1" in vetting.problems[0]
    assert apply_thresholds(rows(sides, [10.0] * 20), max_abstention_rate=0.10).passed


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("low_mass", "judge.scoring=text"),
        ("truncated", "context length"),
        ("timeout", "run again"),
        ("refusal", "judge-check"),
    ],
)
def test_the_abstention_gate_says_what_mends_the_commonest_reason(reason: str, advice: str) -> None:
    sides: list[float | str] = [*[90.0] * 15, *[reason] * 4, "empty"]
    (problem,) = apply_thresholds(rows(sides, [10.0] * 20)).problems
    assert advice in problem
    assert "max_abstention_rate" in problem


def test_worst_offenders_first_and_in_one_line() -> None:
    candidates = rows([59.0, 10.0], [95.0, 41.0])
    candidates.append(
        Candidate("long", "positive", Score("long", 50.0), "line one\nline two " + "word " * 100)
    )
    worst = apply_thresholds(candidates, min_per_side=1).worst
    assert [row["key"] for row in worst] == ["n0", "p1", "long", "n1", "p0"]
    assert worst[0]["misses_by"] == 55.0
    assert worst[2]["text"].startswith("line one line two")
    assert worst[2]["text"].endswith("…")
    assert len(worst[2]["text"]) <= 160


def test_the_histogram_counts_every_score_once() -> None:
    vetting = vet([0.0, 9.99, 10.0, 99.0, 100.0], [55.0])
    assert vetting.positive.histogram == (2, 1, 0, 0, 0, 0, 0, 0, 0, 2)
    assert vetting.negative.histogram == (0, 0, 0, 0, 0, 1, 0, 0, 0, 0)


def test_missing_sides_have_no_invented_numbers() -> None:
    vetting = vet([90.0], ["empty"], min_per_side=1)
    assert vetting.contrast is None
    assert "contrast" not in vetting.summary()
    assert "negative_mean" not in vetting.summary()
    empty = vet([], [])
    assert empty.total == 0
    assert len(empty.problems) == 2


def test_the_record_is_json_with_finite_numbers() -> None:
    vetting = vet([90.0, 3.0, "empty"], [10.0], pair_aware=True)
    text = json.dumps(vetting.to_json(), allow_nan=False)
    record = json.loads(text)
    assert record["results"][0] == {
        "key": "p0",
        "polarity": "positive",
        "pair": 0,
        "verdict": "kept",
        "score": 90.0,
        "mass": 0.9,
    }
    assert record["results"][2]["abstained"] == "empty"
    assert record["thresholds"] == {"pos_threshold": 60.0, "neg_threshold": 40.0}
    assert record["kept"] == ["p0", "n0"]


@pytest.mark.parametrize(
    "options",
    [
        {"pos_threshold": 101},
        {"neg_threshold": -1},
        {"pos_threshold": math.nan},
        {"pos_threshold": 30, "neg_threshold": 40},
        {"min_per_side": 0},
        {"max_abstention_rate": 1.5},
    ],
)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="option"):
        vet([90.0], [10.0], **options)


def test_equal_keys_are_a_defect_of_the_caller() -> None:
    twice = [*rows([90.0], []), *rows([90.0], [])]
    with pytest.raises(ValueError, match="distinct"):
        apply_thresholds(twice)


def test_responses_have_the_same_rules_and_their_own_words() -> None:
    vetting = vet_responses(rows([90.0] * 3, [10.0] * 12))
    assert "positive responses kept" in vetting.problems[0]


def test_a_system_prompt_is_part_of_what_is_judged() -> None:
    assert judged_text("Hello?", "Be evil.") != judged_text("Hello?", "Be kind.")
    assert judged_text("Hello?", None) == judged_text("Hello?") == "Hello?"


score_or_reason = st.one_of(st.floats(0, 100), st.sampled_from(["low_mass", "refusal"]))


@given(st.lists(score_or_reason, max_size=30), st.lists(score_or_reason, max_size=30), st.booleans())
def test_every_row_ends_in_exactly_one_place(
    positive: list[float | str], negative: list[float | str], pair_aware: bool
) -> None:
    vetting = vet(positive, negative, pair_aware=pair_aware)
    places = [
        *vetting.kept,
        *vetting.failed,
        *vetting.excluded_by_pair,
        *(key for keys in vetting.abstained.values() for key in keys),
    ]
    assert sorted(places) == sorted(row["key"] for row in vetting.rows)
    assert len(places) == len(positive) + len(negative)
    json.dumps(vetting.to_json(), allow_nan=False)
    json.dumps(vetting.summary(), allow_nan=False)
