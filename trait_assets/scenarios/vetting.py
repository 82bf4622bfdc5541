"""Which rows pass a judge's thresholds, and what the judge made of them. Pure rules over judgements that
exist already.

Shared by both vetting stages. Nothing here asks a judge, reads a file or knows Dagster. An abstention is
neither a pass nor a fail: it is left out, counted by its reason, and too many of them fail the trait.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from resources.judges.protocol import Abstention, Judgement, Score
from storage.errors import UserError

Polarity = Literal["positive", "negative"]
POLARITIES: tuple[Polarity, Polarity] = ("positive", "negative")
POS_THRESHOLD = 60.0
NEG_THRESHOLD = 40.0
MIN_PER_SIDE = 10
MAX_ABSTENTION_RATE = 0.10
WORST_SHOWN = 10
EXCERPT = 160


@dataclass(frozen=True)
class Candidate:
    """One row up for vetting. `pair`: the number of its pair (its line), for pair-aware filtering; None:
    unpaired.
    `text` is what tables show (the scenario or the response)."""

    key: str
    polarity: Polarity
    judgement: Judgement
    text: str = ""
    pair: int | None = None


@dataclass(frozen=True)
class SideSummary:
    """Counts of one polarity. `mean`: over its scores, None without any; `histogram`: ten bins 0–10, …,
    90–100."""

    total: int
    kept: int
    failed: int
    abstained: int
    excluded_by_pair: int
    mean: float | None
    mean_kept: float | None
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Vetting:
    """The outcome for one trait. `problems` is empty when the gate passes; each entry is a sentence for the
    user.

    `contrast`: mean score of positives minus mean score of negatives over all scored rows (good above 40);
    `contrast_kept`: the same over kept rows. None when a side has no score.
    """

    subject: str
    pos_threshold: float
    neg_threshold: float
    pair_aware: bool
    kept: tuple[str, ...]
    failed: tuple[str, ...]
    abstained: dict[str, tuple[str, ...]]
    excluded_by_pair: tuple[str, ...]
    positive: SideSummary
    negative: SideSummary
    contrast: float | None
    contrast_kept: float | None
    worst: tuple[dict[str, Any], ...]
    rows: tuple[dict[str, Any], ...]
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def total(self) -> int:
        return len(self.rows)

    @property
    def abstention_rate(self) -> float:
        return sum(len(keys) for keys in self.abstained.values()) / max(1, self.total)

    @property
    def abstention_reasons(self) -> dict[str, int]:
        return {reason: len(keys) for reason, keys in sorted(self.abstained.items())}

    def kept_of(self, polarity: Polarity) -> tuple[str, ...]:
        wanted = {row["key"] for row in self.rows if row["polarity"] == polarity}
        return tuple(key for key in self.kept if key in wanted)

    def raise_if_failed(self, trait: str) -> None:
        """UserError with every problem, for the stage that turns a failed gate into this trait's failure."""
        if self.problems:
            raise UserError("; ".join(self.problems), where=f"{trait}, vetting of {self.subject}")

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON with finite numbers only; `rows` hold score or reason of each row, in order."""
        return {
            "subject": self.subject,
            "thresholds": {"pos_threshold": self.pos_threshold, "neg_threshold": self.neg_threshold},
            "pair_aware": self.pair_aware,
            "summary": self.summary(),
            "kept": list(self.kept),
            "failed": list(self.failed),
            "abstained": {reason: list(keys) for reason, keys in sorted(self.abstained.items())},
            "excluded_by_pair": list(self.excluded_by_pair),
            "histogram": {
                "bins": [f"{lower}-{lower + 10}" for lower in range(0, 100, 10)],
                "positive": list(self.positive.histogram),
                "negative": list(self.negative.histogram),
            },
            "worst": [dict(row) for row in self.worst],
            "results": [dict(row) for row in self.rows],
            "problems": list(self.problems),
        }

    def summary(self) -> dict[str, Any]:
        """Flat numbers for metadata and metric rows; a figure that does not exist is left out, never 0."""
        flat: dict[str, Any] = {
            "n": self.total,
            "n_scored": self.total - sum(len(keys) for keys in self.abstained.values()),
            "n_kept": len(self.kept),
            "n_failed": len(self.failed),
            "n_abstained": sum(len(keys) for keys in self.abstained.values()),
            "n_excluded_by_pair": len(self.excluded_by_pair),
            "abstention_rate": round(self.abstention_rate, 6),
            "gate_passed": self.passed,
        }
        for name, side in (("positive", self.positive), ("negative", self.negative)):
            flat[f"{name}_kept"] = side.kept
            flat[f"{name}_failed"] = side.failed
            flat[f"{name}_abstained"] = side.abstained
            if side.total:
                flat[f"{name}_pass_rate"] = round(side.kept / side.total, 6)
            if side.mean is not None:
                flat[f"{name}_mean"] = round(side.mean, 4)
        if self.contrast is not None:
            flat["contrast"] = round(self.contrast, 4)
        if self.contrast_kept is not None:
            flat["contrast_kept"] = round(self.contrast_kept, 4)
        for reason, count in self.abstention_reasons.items():
            flat[f"abstained_{reason}"] = count
        return flat


def judged_text(prompt: str, system_prompt: str | None = None) -> str:
    """The text of a scenario as a judge sees it: two scenarios that differ only by system prompt must not
    look alike."""
    return f"{system_prompt}\n\n{prompt}" if system_prompt else prompt


def apply_thresholds(
    candidates: Sequence[Candidate],
    *,
    pos_threshold: float = POS_THRESHOLD,
    neg_threshold: float = NEG_THRESHOLD,
    min_per_side: int = MIN_PER_SIDE,
    max_abstention_rate: float = MAX_ABSTENTION_RATE,
    pair_aware: bool = False,
    subject: str = "scenarios",
) -> Vetting:
    """Sort rows into kept, failed and abstained, and say whether the trait may go on.

    A positive is kept at `pos_threshold` or above, a negative at `neg_threshold` or below. `pair_aware`: a
    row whose partner was not kept is left out as well. Raises UserError for thresholds outside 0–100 or in
    the wrong order; a failed gate is no error here but a list of `problems`.
    """
    _check(pos_threshold, neg_threshold, min_per_side, max_abstention_rate)
    if len({candidate.key for candidate in candidates}) != len(candidates):
        raise ValueError("candidates must have distinct keys")
    verdicts = {c.key: _verdict(c, pos_threshold, neg_threshold) for c in candidates}
    excluded: set[str] = set()
    if pair_aware:
        kept_pairs = {
            p: {c.pair for c in candidates if c.polarity == p and verdicts[c.key] == "kept"}
            for p in POLARITIES
        }
        whole = kept_pairs["positive"] & kept_pairs["negative"]
        excluded = {
            c.key
            for c in candidates
            if verdicts[c.key] == "kept" and c.pair is not None and c.pair not in whole
        }
    kept = [c for c in candidates if verdicts[c.key] == "kept" and c.key not in excluded]
    abstained: dict[str, tuple[str, ...]] = {}
    for c in candidates:
        if isinstance(c.judgement, Abstention):
            abstained[c.judgement.reason] = (*abstained.get(c.judgement.reason, ()), c.key)
    sides = {p: _side([c for c in candidates if c.polarity == p], verdicts, excluded) for p in POLARITIES}
    positive, negative = sides["positive"], sides["negative"]
    vetting = Vetting(
        subject=subject,
        pos_threshold=float(pos_threshold),
        neg_threshold=float(neg_threshold),
        pair_aware=pair_aware,
        kept=tuple(c.key for c in kept),
        failed=tuple(c.key for c in candidates if verdicts[c.key] == "failed"),
        abstained=abstained,
        excluded_by_pair=tuple(c.key for c in candidates if c.key in excluded),
        positive=positive,
        negative=negative,
        contrast=_difference(positive.mean, negative.mean),
        contrast_kept=_difference(positive.mean_kept, negative.mean_kept),
        worst=_worst(candidates, verdicts, pos_threshold, neg_threshold),
        rows=tuple(_row(c, "excluded_by_pair" if c.key in excluded else verdicts[c.key]) for c in candidates),
        problems=tuple(
            _problems(sides, abstained, len(candidates), subject, min_per_side, max_abstention_rate)
        ),
    )
    return vetting


def _check(pos_threshold: float, neg_threshold: float, min_per_side: int, max_abstention_rate: float) -> None:
    for name, value in (("pos_threshold", pos_threshold), ("neg_threshold", neg_threshold)):
        if not (math.isfinite(value) and 0 <= value <= 100):
            raise UserError(
                f"{value} is no score", where=f"option `{name}`", remedy="give a number from 0 to 100"
            )
    if neg_threshold > pos_threshold:
        raise UserError(
            f"neg_threshold {neg_threshold:g} is above pos_threshold {pos_threshold:g}",
            where="option `neg_threshold`",
            remedy="lower it to pos_threshold or below",
        )
    if min_per_side < 1:
        raise UserError(
            f"{min_per_side} rows is no side", where="option `min_kept`", remedy="give at least 1"
        )
    if not 0 <= max_abstention_rate <= 1:
        raise UserError(
            f"{max_abstention_rate} is no share", where="option `max_abstention_rate`", remedy="give 0 to 1"
        )


def _verdict(candidate: Candidate, pos_threshold: float, neg_threshold: float) -> str:
    judgement = candidate.judgement
    if isinstance(judgement, Abstention):
        return "abstained"
    if not math.isfinite(judgement.value):
        raise ValueError(f"score of {candidate.key} is not finite")
    if candidate.polarity == "positive":
        return "kept" if judgement.value >= pos_threshold else "failed"
    return "kept" if judgement.value <= neg_threshold else "failed"


def _side(candidates: Sequence[Candidate], verdicts: dict[str, str], excluded: set[str]) -> SideSummary:
    verdict = Counter(verdicts[c.key] for c in candidates)
    scores = [c.judgement.value for c in candidates if isinstance(c.judgement, Score)]
    kept = [
        c.judgement.value
        for c in candidates
        if isinstance(c.judgement, Score) and verdicts[c.key] == "kept" and c.key not in excluded
    ]
    histogram = [0] * 10
    for value in scores:
        histogram[min(9, max(0, int(value // 10)))] += 1
    return SideSummary(
        total=len(candidates),
        kept=len(kept),
        failed=verdict["failed"],
        abstained=verdict["abstained"],
        excluded_by_pair=sum(c.key in excluded for c in candidates),
        mean=sum(scores) / len(scores) if scores else None,
        mean_kept=sum(kept) / len(kept) if kept else None,
        histogram=tuple(histogram),
    )


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def excerpt(text: str, length: int = EXCERPT) -> str:
    """One line for a table; a cut is shown by an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def _worst(
    candidates: Sequence[Candidate], verdicts: dict[str, str], pos_threshold: float, neg_threshold: float
) -> tuple[dict[str, Any], ...]:
    missed: list[tuple[float, dict[str, Any]]] = []
    for c in candidates:
        if verdicts[c.key] != "failed" or not isinstance(c.judgement, Score):
            continue
        short = (
            pos_threshold - c.judgement.value
            if c.polarity == "positive"
            else c.judgement.value - neg_threshold
        )
        row = {
            "key": c.key,
            "polarity": c.polarity,
            "pair": c.pair,
            "score": round(c.judgement.value, 2),
            "misses_by": round(short, 2),
            "text": excerpt(c.text),
        }
        missed.append((short, row))
    missed.sort(key=lambda entry: (-entry[0], entry[1]["key"]))
    return tuple(row for _, row in missed[:WORST_SHOWN])


def _row(candidate: Candidate, verdict: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": candidate.key,
        "polarity": candidate.polarity,
        "pair": candidate.pair,
        "verdict": verdict,
    }
    judgement = candidate.judgement
    if isinstance(judgement, Score):
        row["score"] = float(judgement.value)
        if judgement.mass is not None and math.isfinite(judgement.mass):
            row["mass"] = float(judgement.mass)
    else:
        row["abstained"] = judgement.reason
    return row


_NO_ANSWER = {"timeout", "server_error", "rate_limited", "connection", "bad_response", "rejected"}


def _advice(abstained: dict[str, tuple[str, ...]]) -> str:
    """What mends the commonest reason."""
    reason = max(sorted(abstained), key=lambda name: len(abstained[name]))
    if reason == "low_mass":
        return "let its text be read (`--set judge.scoring=text`) or try another judge model with `traits judge-check`"
    if reason == "truncated":
        return "raise the context length of the judge's server, then ask again (`--set judge.retry_abstentions=true`)"
    if reason in _NO_ANSWER:
        return "run again when the judge's server is well: only what has no answer is asked"
    return "try another judge model with `traits judge-check`"


def _problems(
    sides: dict[Polarity, SideSummary],
    abstained: dict[str, tuple[str, ...]],
    total: int,
    subject: str,
    min_per_side: int,
    max_abstention_rate: float,
) -> list[str]:
    problems: list[str] = []
    silent = sum(len(keys) for keys in abstained.values())
    if total and silent / total > max_abstention_rate:
        reasons = ", ".join(f"{reason} {len(keys)}" for reason, keys in sorted(abstained.items()))
        problems.append(
            f"the judge abstained on {silent} of {total} {subject} "
            f"({silent / total:.0%}, limit {max_abstention_rate:.0%}): {reasons}; "
            f"{_advice(abstained)}, or raise max_abstention_rate"
        )
    for polarity in POLARITIES:
        side = sides[polarity]
        if side.kept >= min_per_side:
            continue
        if side.total < min_per_side:
            advice = f"write at least {min_per_side} {polarity} scenarios"
        elif side.excluded_by_pair and side.kept + side.excluded_by_pair >= min_per_side:
            advice = "switch pair_filter off, or mend the partners that failed"
        elif side.abstained and side.kept + side.abstained >= min_per_side:
            advice = "see why the judge abstained"
        elif subject == "scenarios":
            advice = "look at the worst offenders, and rewrite them or the definition"
        else:
            advice = (
                "look at the worst offenders: the model may not show this trait from these scenarios, "
                "or the definition is unclear"
            )
        mean = "" if side.mean is None else f", mean score {side.mean:.0f}"
        problems.append(
            f"only {side.kept} of {side.total} {polarity} {subject} kept, {min_per_side} needed "
            f"({side.failed} failed, {side.abstained} abstained, "
            f"{side.excluded_by_pair} left out with their pair{mean}); {advice}"
        )
    return problems
