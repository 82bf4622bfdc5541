"""Does a judge agree with people? Hand-labelled texts, any judge, four numbers; and with the sides on which a
trait's author put its scenarios.

The texts in agreement.jsonl were written and labelled for this project, over the traits it ships. Pure apart
from the judge that is handed in: what a trait's definition and scenarios are, the caller knows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resources.judges.protocol import Abstention, Judge, JudgeItem, Judgement, Score, TraitContext
from storage.errors import UserError

SHIPPED = Path(__file__).with_name("agreement.jsonl")
# labels between these are in the middle: they count for rank and error, not for telling the sides apart
HIGH, LOW = 60.0, 40.0


@dataclass(frozen=True)
class Labelled:
    """A text (an answer to or completion of `prompt`) and what a person thinks of it: `label` 0–100."""

    id: str
    trait: str
    prompt: str
    text: str
    label: float


@dataclass(frozen=True)
class Agreement:
    """One row of the report. `spearman`: rank correlation of score and label; `auc`: chance that a text
    labelled 60 or more scores above one labelled 40 or less; `mae`: mean |score − label|. None where too few
    texts were scored.
    `abstained`: counts by reason."""

    trait: str
    n: int
    n_scored: int
    spearman: float | None
    auc: float | None
    mae: float | None
    abstained: dict[str, int]

    def record(self) -> dict[str, Any]:
        return {
            "trait": self.trait,
            "n": self.n,
            "n_scored": self.n_scored,
            **{
                name: round(value, 4)
                for name in ("spearman", "auc", "mae")
                if (value := getattr(self, name)) is not None
            },
            "abstained": dict(self.abstained),
        }


@dataclass(frozen=True)
class AgreementReport:
    """`traits`: one row per trait; `overall`: the mean over traits of each number; `rows`: every text with
    its score."""

    judge: dict[str, Any]
    stand_in: bool
    traits: tuple[Agreement, ...]
    overall: Agreement
    rows: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "judge": self.judge,
            "stand_in": self.stand_in,
            "overall": self.overall.record(),
            "traits": [row.record() for row in self.traits],
            "rows": [dict(row) for row in self.rows],
        }


@dataclass(frozen=True)
class Sides:
    """How one trait's own scenarios are scored. `accuracy`: mean over both sides of the share on the right side
    of 50; `auc`: chance that a positive scores above a negative; `kept_positive`, `kept_negative`: shares that
    vetting keeps at its thresholds, of all. None where a side has no score. A judge that is fitted on these
    scenarios scores each out of fold."""

    trait: str
    n: int
    n_scored: int
    accuracy: float | None
    auc: float | None
    kept_positive: float | None
    kept_negative: float | None
    abstained: dict[str, int]

    def record(self) -> dict[str, Any]:
        numbers = ("accuracy", "auc", "kept_positive", "kept_negative")
        return {
            "trait": self.trait,
            "n": self.n,
            "n_scored": self.n_scored,
            **{name: round(v, 4) for name in numbers if (v := getattr(self, name)) is not None},
            "abstained": dict(self.abstained),
        }


def load_labelled(path: Path = SHIPPED) -> list[Labelled]:
    """Read labelled texts, one JSON object a line: trait, text, label, optionally id and prompt.

    UserError naming file and line for anything else.
    """
    if not path.is_file():
        raise UserError(
            "there is no such file", where=str(path), remedy="give a .jsonl file of labelled texts"
        )
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
            row = Labelled(
                id=str(entry.get("id", number)),
                trait=entry["trait"],
                prompt=entry.get("prompt", ""),
                text=entry["text"],
                label=float(entry["label"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"is no labelled text ({type(error).__name__}: {error})",
                where=where,
                remedy='write {"trait": "category/name", "prompt": "…", "text": "…", "label": 0–100}',
            ) from error
        if not 0 <= row.label <= 100:
            raise UserError(f"label {row.label:g} is outside 0–100", where=where, remedy="correct the label")
        rows.append(row)
    if not rows:
        raise UserError("holds no labelled text", where=str(path), remedy="write one JSON object per line")
    return rows


def check_agreement(
    judge: Judge,
    labelled: Sequence[Labelled],
    contexts: Mapping[str, TraitContext],
    *,
    on_judged: Callable[[Judgement], None] | None = None,
) -> AgreementReport:
    """Score every labelled text whose trait is in `contexts` as an answer to its prompt, and compare.

    UserError when no trait is known.
    """
    known = [row for row in labelled if row.trait in contexts]
    if not known:
        raise UserError(
            f"none of the labelled traits is known: {', '.join(sorted({row.trait for row in labelled}))}",
            where="judge-check",
            remedy="name traits that have labelled texts",
        )
    items = [JudgeItem(row.id, "response", contexts[row.trait], row.prompt, row.text) for row in known]
    judged = list(judge.score(items, on_judged=on_judged))
    pairs = list(zip(known, judged, strict=True))
    traits = tuple(
        agreement(trait, [pair for pair in pairs if pair[0].trait == trait])
        for trait in sorted({row.trait for row in known})
    )
    reasons: Counter[str] = Counter()
    for row in traits:
        reasons.update(row.abstained)
    overall = Agreement(
        trait="mean over traits",
        n=len(pairs),
        n_scored=sum(row.n_scored for row in traits),
        spearman=_mean([row.spearman for row in traits]),
        auc=_mean([row.auc for row in traits]),
        mae=_mean([row.mae for row in traits]),
        abstained=dict(sorted(reasons.items())),
    )
    return AgreementReport(
        judge=judge.identity,
        stand_in=judge.stand_in,
        traits=traits,
        overall=overall,
        rows=tuple(_row(labelled, judgement) for labelled, judgement in pairs),
    )


def check_sides(
    judge: Judge,
    contexts: Mapping[str, TraitContext],
    *,
    pos_threshold: float,
    neg_threshold: float,
    on_judged: Callable[[Judgement], None] | None = None,
) -> tuple[Sides, ...]:
    """Score every scenario of the traits; one row per trait, and the mean over traits at the end."""
    items = [
        JudgeItem(f"{trait}:{polarity}:{i}", "scenario", context, text, polarity=polarity, index=i)  # type: ignore[arg-type]
        for trait, context in sorted(contexts.items())
        for polarity, texts in (("positive", context.positives), ("negative", context.negatives))
        for i, text in enumerate(texts)
    ]
    judged: dict[str, list[tuple[JudgeItem, Judgement]]] = {}
    for item, judgement in zip(items, judge.score(items, on_judged=on_judged), strict=True):
        judged.setdefault(item.context.trait, []).append((item, judgement))
    rows = [_sides(trait, pairs, pos_threshold, neg_threshold) for trait, pairs in judged.items()]
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(row.abstained)
    mean = Sides(
        trait="mean over traits",
        n=sum(row.n for row in rows),
        n_scored=sum(row.n_scored for row in rows),
        accuracy=_mean([row.accuracy for row in rows]),
        auc=_mean([row.auc for row in rows]),
        kept_positive=_mean([row.kept_positive for row in rows]),
        kept_negative=_mean([row.kept_negative for row in rows]),
        abstained=dict(sorted(reasons.items())),
    )
    return (*rows, mean)


def _sides(
    trait: str, pairs: Sequence[tuple[JudgeItem, Judgement]], pos_threshold: float, neg_threshold: float
) -> Sides:
    of = {
        side: [j.value for item, j in pairs if item.polarity == side and isinstance(j, Score)]
        for side in ("positive", "negative")
    }
    n = Counter(item.polarity for item, _ in pairs)
    reasons = Counter(judged.reason for _, judged in pairs if isinstance(judged, Abstention))
    high, low = of["positive"], of["negative"]
    both = bool(high and low)
    return Sides(
        trait=trait,
        n=len(pairs),
        n_scored=len(high) + len(low),
        accuracy=(sum(v > 50 for v in high) / len(high) + sum(v < 50 for v in low) / len(low)) / 2
        if both
        else None,
        auc=_order(high, low),
        kept_positive=sum(v >= pos_threshold for v in high) / n["positive"] if n["positive"] else None,
        kept_negative=sum(v <= neg_threshold for v in low) / n["negative"] if n["negative"] else None,
        abstained=dict(sorted(reasons.items())),
    )


def agreement(trait: str, pairs: Sequence[tuple[Labelled, Judgement]]) -> Agreement:
    """The numbers of one trait. Abstentions are counted, never scored."""
    scored = [(row.label, judged.value) for row, judged in pairs if isinstance(judged, Score)]
    reasons = Counter(judged.reason for _, judged in pairs if isinstance(judged, Abstention))
    return Agreement(
        trait=trait,
        n=len(pairs),
        n_scored=len(scored),
        spearman=_spearman(scored),
        auc=_auc(scored),
        mae=sum(abs(label - score) for label, score in scored) / len(scored) if scored else None,
        abstained=dict(sorted(reasons.items())),
    )


def _row(labelled: Labelled, judgement: Judgement) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": labelled.id,
        "trait": labelled.trait,
        "label": labelled.label,
        "text": labelled.text,
    }
    if isinstance(judgement, Score):
        return {**row, "score": judgement.value, "error": judgement.value - labelled.label}
    return {**row, "abstained": judgement.reason}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _auc(scored: Sequence[tuple[float, float]]) -> float | None:
    """Mann–Whitney: the share of (high, low) pairs in the right order, ties count half."""
    return _order(
        [score for label, score in scored if label >= HIGH],
        [score for label, score in scored if label <= LOW],
    )


def _order(high: Sequence[float], low: Sequence[float]) -> float | None:
    if not high or not low:
        return None
    return sum((a > b) + 0.5 * (a == b) for a in high for b in low) / (len(high) * len(low))


def _spearman(scored: Sequence[tuple[float, float]]) -> float | None:
    """Pearson correlation of mid-ranks."""
    if len(scored) < 3:
        return None
    columns = [_ranks([pair[column] for pair in scored]) for column in (0, 1)]
    means = [sum(ranks) / len(ranks) for ranks in columns]
    a, b = ([rank - mean for rank in ranks] for ranks, mean in zip(columns, means, strict=True))
    scale = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    return sum(x * y for x, y in zip(a, b, strict=True)) / scale if scale else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    first = {value: order.index(value) for value in set(values)}
    count = Counter(values)
    return [first[value] + (count[value] - 1) / 2 for value in values]
