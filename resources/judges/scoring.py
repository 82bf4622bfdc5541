"""From what a judge model said to a number, or to the reason why there is none. Pure: no network, no prompts.

Two ways to read an answer: the expectation over integer tokens of the first answer token's log-probabilities,
and the labelled final number of a text. Neither ever guesses: what cannot be read is a `Reading` without a
value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

SCORING_VERSION = "2"
# below this probability mass on integers 0–100 the judge abstains; below LOW_MASS the score is kept and
# flagged
MIN_MASS = 0.25
LOW_MASS = 0.5


@dataclass(frozen=True)
class Reading:
    """`value` 0–100 or None; then `reason` says why. `split_digits`: the tokeniser seems to write numbers
    digit by digit, so that the first token is no score and the text has to be read."""

    value: float | None
    reason: str | None = None
    mass: float | None = None
    split_digits: bool = False
    detail: dict[str, Any] = field(default_factory=dict)


_INTEGER = re.compile(r"(?:0|[1-9][0-9]?|100)", re.ASCII)


def read_logprobs(
    alternatives: Sequence[tuple[str, float]], *, min_mass: float = MIN_MASS, asked: int = 20
) -> Reading:
    """Expected value over those alternatives of the answer token that are the integers 0–100.

    `alternatives`: (token, natural log-probability). Surrounding whitespace is ignored, so " 85" and "85" add
    up. A single digit that begins a likelier longer number (8 beside 85) is a stray first digit, not a score,
    and counts as no number. Fewer alternatives than asked are fine as long as the mass suffices.
    """
    mass_of: dict[int, float] = {}
    total = 0.0
    for token, logprob in alternatives:
        if not math.isfinite(logprob):
            continue
        probability = math.exp(min(logprob, 50.0))
        total += probability
        if _INTEGER.fullmatch(token.strip()):
            number = int(token.strip())
            mass_of[number] = mass_of.get(number, 0.0) + probability
    detail: dict[str, Any] = {"alternatives": len(alternatives)}
    if len(alternatives) < asked:
        detail["fewer_alternatives"] = True
    if total > 1.01:
        return Reading(None, "bad_logprobs", mass=None, detail={**detail, "total": total})
    strays = {
        digit
        for digit in mass_of
        if digit < 10
        and any(
            str(other).startswith(str(digit)) and other > 9 and p > mass_of[digit]
            for other, p in mass_of.items()
        )
    }
    kept = {number: p for number, p in mass_of.items() if number not in strays}
    mass = min(1.0, sum(kept.values()))
    if mass < min_mass:
        return Reading(None, "low_mass", mass=mass, detail=detail)
    if all(number < 10 for number in kept):
        # a tokeniser with whole numbers would show 10, 15, 20 … among the alternatives as well
        return Reading(None, "split_digits", mass=mass, split_digits=True, detail=detail)
    value = sum(number * p for number, p in kept.items()) / sum(kept.values())
    if mass < LOW_MASS:
        detail["low_mass"] = True
    return Reading(value, mass=mass, detail=detail)


_THINKING = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_REFUSAL = re.compile(
    r"""^\W*(?:
        refusal\b | as\ an\ ai\b | unable\ to\b | sorry\b | apologies\b | i\s+apologi[sz]e\b
      | i\s*(?:['’]?m|\s+am)\s+(?:sorry|afraid|unable|not\ able)\b
      | i\s*(?:can(?:no|['’])t|can\ not|won['’]t|will\ not|do\ not\ feel|must\ decline|decline)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
# remarks on the scale are no answers: "(0-100)", "on a scale of 0 to 100", "between 0 and 100"
_SCALE = re.compile(
    r"[(\[]\s*(?:range\s*:?\s*)?0\s*(?:[-–—]|to|\.\.)\s*100\s*[)\]]"
    r"|\b(?:on|in|from|between|using)\b[^.\n:=]{0,24}\b0\s*(?:[-–—]|to|and)\s*100\b",
    re.IGNORECASE,
)
_NUMBER = r"(?P<number>[-−+]?\d+(?:\.\d+)?)"
_UNIT = r"(?P<unit>\s*(?:/\s*\d+|out\s+of\s+\d+|%|percent\b|points?\b))?"
_MARK = r"[\s*_`\"'“”‘’(\[]*"
_LABEL = r"(?:score|rating|grade|final\s+answer|final\s+score|judg(?:e)?ment|verdict)"
_LABELLED = re.compile(
    rf"\b{_LABEL}\b{_MARK}[)\]]?{_MARK}(?:(?P<sign>[:=：]|->|→|\bis\b|\bof\b|\bwould\s+be\b){_MARK})?{_NUMBER}{_UNIT}",
    re.IGNORECASE,
)
_BARE = re.compile(rf"{_MARK}{_NUMBER}{_UNIT}[\s*_`\"'“”‘’)\].!]*", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[\s*_`\"'“”‘’)\]}]*(?:$|[.,;!\n}])")
_RANGE_AFTER = re.compile(r"\s*(?:[-–—]|to|or)\s*\d")
_DECIMAL_COMMA = re.compile(r",\d")


def read_text(text: str) -> Reading:
    """The labelled final score of an answer, or the bare number that is the whole answer; never the first
    number seen.

    Several labelled scores: the last one holds. Another scale than 100 ("7/10"), a range ("70-80"), a decimal
    comma are unparseable; a number outside 0–100 is out_of_range; an answer that opens as a refusal is one,
    whatever follows.
    """
    answer = _THINKING.sub(" ", text).strip()
    if not answer:
        return Reading(None, "empty")
    if re.match(r"<think", answer, re.IGNORECASE):
        return Reading(None, "unfinished")
    if _REFUSAL.match(answer):
        return Reading(None, "refusal")
    answer = _SCALE.sub(" ", answer)
    bare = _BARE.fullmatch(answer.strip())
    if bare:
        return _number(bare, "")
    found: Reading | None = None
    for match in _LABELLED.finditer(answer):
        rest = answer[match.end() :]
        # without a sign, or after is/of, a number belongs to the label only where the clause ends with it
        firm = (match["sign"] or "") in {":", "=", "：", "->", "→"}
        if not firm and not match["unit"] and not _CLAUSE_END.match(rest):
            continue
        found = _number(match, rest)
    return found or Reading(None, "unparseable")


def _number(match: re.Match[str], rest: str) -> Reading:
    unit = (match["unit"] or "").strip().lower()
    scale = re.search(r"\d+", unit)
    if scale and scale.group() != "100":
        return Reading(None, "unparseable", detail={"scale": scale.group()})
    if _RANGE_AFTER.match(rest) or _DECIMAL_COMMA.match(rest):
        return Reading(None, "unparseable")
    value = float(match["number"].replace("−", "-"))
    if not 0.0 <= value <= 100.0:
        return Reading(None, "out_of_range", detail={"said": match["number"]})
    return Reading(value)


def distinct_ngrams(units: Sequence[Hashable], n: int = 3) -> float:
    """Share of n-grams that differ from each other, 0–1; 1.0 for sequences too short to hold two n-grams."""
    total = len(units) - n + 1
    if total < 2:
        return 1.0
    return len({tuple(units[i : i + n]) for i in range(total)}) / total
