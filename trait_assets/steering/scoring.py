"""Scores of steered answers and the statistics made of them.

Here: what one answer is worth (trait, coherence, share of distinct 3-grams), paired changes with their
intervals, and the `Scorer` that turns settings × questions into scored answers, each row generated and judged
once. Not here: which settings to try (dose_search.py), Dagster, the store's layout.

The scorer knows a model only as a callable that generates rows and a judge only as a callable that scores
items.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from resources.judges.protocol import (
    Abstention,
    JudgeItem,
    Judgement,
    RowCacheLike,
    RubricName,
    Score,
    TraitContext,
)
from resources.models.rows import GeneratedRow, GenerationOptions, GenerationRow, Intervention
from storage.manifest import fingerprint
from trait_assets.metering import Meter
from trait_assets.steering.questions import Half, Questions

Kind = Literal["baseline", "vector", "random", "prompting", "combination"]

# rows of a running generation are written to the cache in bites of this size, or this often
FLUSH_ROWS = 32
FLUSH_SECONDS = 20.0
RUBRICS: tuple[RubricName, ...] = ("steering", "coherence")


class Generate(Protocol):
    """`LanguageModel.generate` with its options bound."""

    def __call__(self, rows: Sequence[GenerationRow]) -> Iterable[GeneratedRow]: ...


class JudgeAll(Protocol):
    """`Judge.score`."""

    def __call__(self, items: Sequence[JudgeItem]) -> Iterable[Judgement]: ...


@dataclass(frozen=True, eq=False)
class Setting:
    """What is done to the model while it answers.

    `name` identifies it within a trait. `interventions` is empty for the baseline and for prompting. `doses`
    are relative (‖added‖ ÷ median ‖h‖, negative when the direction is steered away from), `coefficients` the
    lengths added; `layers`, `methods`, `doses`, `coefficients` run in parallel, one entry per intervention.
    """

    kind: Kind
    name: str
    interventions: tuple[Intervention, ...] = ()
    layers: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    doses: tuple[float, ...] = ()
    coefficients: tuple[float, ...] = ()
    position: str | None = None
    component: str | None = None

    def record(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "methods": list(self.methods),
            "doses": list(self.doses),
            "coefficients": list(self.coefficients),
            "position": self.position,
            "component": self.component,
            "operation": self.interventions[0].operation if self.interventions else None,
        }


BASELINE = Setting("baseline", "baseline")
PROMPTING = Setting("prompting", "prompting")


@dataclass(frozen=True)
class Task:
    """One trait's side of a steering evaluation: what is asked, and how answers are judged.

    `prompts[i]`: token ids of question i; `prompted[i]`: the same behind the system prompt of the prompting
    baseline (empty when there is none).
    """

    trait: str
    questions: Questions
    context: TraitContext
    prompts: tuple[tuple[int, ...], ...]
    prompted: tuple[tuple[int, ...], ...] = ()

    @property
    def sign(self) -> int:
        """+1 when a higher trait score is success, −1 when a lower one is."""
        return -1 if self.questions.direction == "negative" else 1


@dataclass(frozen=True, eq=False)
class Request:
    """One setting on the questions of one half."""

    setting: Setting
    half: Half


@dataclass(frozen=True)
class Answer:
    """One generated answer with its scores; a score is None when the judge abstained, and the reason says
    why.

    `distinct_3`: share of distinct 3-grams of tokens, 0–1, None for fewer than 3 tokens.
    """

    question: int
    text: str
    ids: tuple[int, ...]
    finish_reason: str
    trait: float | None
    coherence: float | None
    distinct_3: float | None
    trait_reason: str | None = None
    coherence_reason: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


# (setting name, half) → answers in the order of the half's questions
Answers = dict[tuple[str, Half], list[Answer]]


def distinct_ngrams(ids: Sequence[int], n: int = 3) -> float | None:
    """Share of distinct n-grams among all n-grams: 1 without repetition, near 0 in a loop; None below n
    tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


# --- statistics over questions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """Paired change of the trait score against the unsteered answer to the same question, in judge points.

    `mean` is steered − baseline, whatever the direction; `low` and `high` its 95 % interval over questions;
    `wrong_way` the fraction of questions that moved against the wanted direction; `n` the pairs in which both
    answers were scored. All are None without a single pair; the interval also below 2 pairs.
    """

    mean: float | None
    low: float | None
    high: float | None
    wrong_way: float | None
    n: int
    differences: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A setting's numbers on one half. `n` answers, of which `trait_n` have a trait score and `coherence_n` a
    coherence score; `abstentions` counts answers that miss either. `success_rate`: share of trait scores
    above 50 (below 50 when the trait is to be lowered). `coherence_se`: standard error of the mean over
    questions."""

    n: int
    trait_n: int
    trait_mean: float | None
    coherence_n: int
    coherence_mean: float | None
    coherence_se: float | None
    success_rate: float | None
    distinct_3: float | None
    abstentions: int
    change: Change

    def coherent(self, threshold: float, *, confidence: float | None = None) -> bool:
        """Mean coherence reaches `threshold`, and the judge had something to say on nearly every answer: a
        dose that empties the answers is not coherent. With `confidence` the one-sided lower t bound of the
        mean reaches it."""
        if self.coherence_mean is None or self.abstentions > allowed_abstentions(self.n):
            return False
        slack = 0.0
        if confidence is not None and self.coherence_se and self.coherence_n > 1:
            from scipy import stats

            slack = float(stats.t.ppf(confidence, self.coherence_n - 1)) * self.coherence_se
        return self.coherence_mean - slack >= threshold

    def record(self) -> dict[str, Any]:
        return {
            "trait_mean": self.trait_mean,
            "coherence_mean": self.coherence_mean,
            "n": self.n,
            "trait_n": self.trait_n,
            "coherence_n": self.coherence_n,
            "change": self.change.mean,
            "change_low": self.change.low,
            "change_high": self.change.high,
            "change_n": self.change.n,
            "wrong_way_fraction": self.change.wrong_way,
            "success_rate": self.success_rate,
            "distinct_3": self.distinct_3,
            "abstentions": self.abstentions,
        }


def allowed_abstentions(n: int, rate: float = 0.10) -> int:
    """How many of n answers may go unscored: the rate, rounded up, so that one always may."""
    return math.ceil(rate * n)


def measure(
    answers: Sequence[Answer],
    baseline: Sequence[Answer],
    *,
    sign: int = 1,
    draws: int = 2000,
    seed: int = 0,
) -> Measured:
    """Numbers of one setting against the unsteered answers to the same questions.

    An answer without a score is left out of the mean in question and counted; a pair counts when both sides
    were scored.
    """
    traits = [a.trait for a in answers if a.trait is not None]
    coherences = [a.coherence for a in answers if a.coherence is not None]
    distinct = [a.distinct_3 for a in answers if a.distinct_3 is not None]
    before = {a.question: a.trait for a in baseline}
    differences = [
        a.trait - b for a in answers if a.trait is not None and (b := before.get(a.question)) is not None
    ]
    success = [(t - 50) * sign > 0 for t in traits]
    return Measured(
        n=len(answers),
        trait_n=len(traits),
        trait_mean=_mean(traits),
        coherence_n=len(coherences),
        coherence_mean=_mean(coherences),
        coherence_se=standard_error(coherences),
        success_rate=_mean([float(s) for s in success]),
        distinct_3=_mean(distinct),
        abstentions=sum(a.trait is None or a.coherence is None for a in answers),
        change=paired_change(differences, sign=sign, draws=draws, seed=seed),
    )


def paired_change(differences: Sequence[float], *, sign: int = 1, draws: int = 2000, seed: int = 0) -> Change:
    """Mean of paired differences with its bootstrap interval and the fraction that went against `sign`."""
    if not differences:
        return Change(None, None, None, None, 0)
    low, high = (
        bootstrap_interval(differences, draws=draws, seed=seed) if len(differences) > 1 else (None, None)
    )
    wrong = sum(d * sign < 0 for d in differences) / len(differences)
    return Change(_mean(differences), low, high, wrong, len(differences), tuple(differences))


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of a mean, widened for small samples.

    The percentile interval resamples a variance that is (n−1)/n too small and knows no t-tails: over 6 to 12
    questions it covers some 85–90 % in place of 95 %. Hesterberg's expanded percentile interval (What
    Teachers Should Know About the Bootstrap, 2015, section 4.1) takes the quantiles at α' =
    Φ(√(n/(n−1))·t(α/2, n−1)) instead; it equals the plain one for large n.
    """
    from scipy import stats

    sample = np.asarray(values, dtype=np.float64)
    n = len(sample)
    if n < 2:
        raise ValueError("an interval needs at least two values")
    tail = float(stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1)))
    generator = np.random.default_rng(seed)
    means = sample[generator.integers(0, n, size=(draws, n))].mean(axis=1)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None below two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


# --- from settings to scored answers ------------------------------------------------------------------------


class Scorer:
    """Generates and judges answers, each row once.

    A row is known by everything that decides its text: model identity, prompt ids, interventions (layer,
    site, operation, vector hash, length added), options, first steered position. Rows go to the cache while
    generation runs, so that a killed process finds them again. Judgements are cached by the judge.

    `cache_for(trait)`: that trait's store of generated rows. `identity`: the record of the steered model.
    """

    def __init__(
        self,
        generate: Generate,
        judge: JudgeAll,
        *,
        options: GenerationOptions,
        identity: Mapping[str, Any],
        steer_from: str = "response",
        cache_for: Callable[[str], RowCacheLike],
        on_rows: Callable[[int, int], None] | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._meter = meter if meter is not None else Meter()
        self._generate = generate
        self._judge = judge
        self._cache_for = cache_for
        self._on_rows = on_rows
        # hashed once: the same for every row
        self._common = fingerprint({"model": dict(identity), "options": options.record(), "from": steer_from})
        # trait → rows generated; a row of several traits counts for the first
        self.generated: dict[str, int] = {}
        self.reused = 0

    def row_key(self, prompt_ids: Sequence[int], setting: Setting) -> str:
        return fingerprint(
            {
                "common": self._common,
                "prompt": list(prompt_ids),
                "interventions": [
                    {
                        "layer": i.layer,
                        "component": i.component,
                        "operation": i.operation,
                        "coefficient": i.coefficient,
                        "vector": vector_hash(i.vector),
                    }
                    for i in setting.interventions
                ],
            }
        )

    def answers(self, asked: Mapping[str, tuple[Task, Sequence[Request]]]) -> dict[str, Answers]:
        """trait → {(setting name, half) → answers in the order of the half's questions}, all traits in one
        generation."""
        wanted = list(self._rows(asked))
        texts = self._texts(wanted)
        scores = self._scores(wanted, texts)
        out: dict[str, Answers] = {trait: {} for trait in asked}
        for row in wanted:
            text = texts[row.trait, row.key]
            trait_score, trait_reason = _value(scores[row.task.trait, row.key, row.question, "steering"])
            coherence, coherence_reason = _value(scores[row.task.trait, row.key, row.question, "coherence"])
            out[row.trait].setdefault((row.setting.name, row.half), []).append(
                Answer(
                    question=row.question,
                    text=text["text"],
                    ids=tuple(text["ids"]),
                    finish_reason=text["finish_reason"],
                    trait=trait_score,
                    coherence=coherence,
                    distinct_3=distinct_ngrams(text["ids"]),
                    trait_reason=trait_reason,
                    coherence_reason=coherence_reason,
                    detail=dict(scores[row.task.trait, row.key, row.question, "coherence"].detail),
                )
            )
        return out

    def _rows(self, asked: Mapping[str, tuple[Task, Sequence[Request]]]) -> Iterator[_Row]:
        for trait, (task, requests) in asked.items():
            for request in requests:
                for question in task.questions.of(request.half):
                    prompts = task.prompted if request.setting.kind == "prompting" else task.prompts
                    ids = prompts[question]
                    key = self.row_key(ids, request.setting)
                    yield _Row(trait, task, request.setting, request.half, question, ids, key)

    def _texts(self, wanted: Sequence[_Row]) -> dict[tuple[str, str], dict[str, Any]]:
        """(trait, row key) → generated row, from the cache or from the model."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        missing: dict[str, _Row] = {}
        owners: dict[str, set[str]] = {}
        for row in wanted:
            cached = self._cache_for(row.trait).get(row.key)
            if cached is not None:
                found[row.trait, row.key] = cached
            else:
                missing.setdefault(row.key, row)
                owners.setdefault(row.key, set()).add(row.trait)
        self.reused += len(found)
        if not missing:
            return found
        pending: dict[str, dict[str, dict[str, Any]]] = {}
        waiting = 0
        flushed = time.monotonic()

        def flush() -> None:
            for trait, rows in pending.items():
                self._cache_for(trait).put_many(rows)
            pending.clear()

        try:
            results = self._generate([_generation_row(row) for row in missing.values()])
            for generated in self._meter.each("model", iter(results)):
                value = {
                    "ids": list(generated.ids),
                    "text": generated.text,
                    "finish_reason": generated.finish_reason,
                }
                for trait in owners[generated.key]:
                    found[trait, generated.key] = value
                    pending.setdefault(trait, {})[generated.key] = value
                waiting += 1
                owner = missing[generated.key].trait
                self.generated[owner] = self.generated.get(owner, 0) + 1
                prompt = len(missing[generated.key].prompt_ids)
                self._meter.add(owner, rows=1, tokens=len(generated.ids), prompt_tokens=prompt)
                if self._on_rows is not None:
                    self._on_rows(1, len(generated.ids))
                if waiting >= FLUSH_ROWS or time.monotonic() - flushed > FLUSH_SECONDS:
                    flush()
                    waiting, flushed = 0, time.monotonic()
        finally:
            # what is generated is kept, also when the next batch fails
            flush()
        absent = [row.key for row in missing.values() if (row.trait, row.key) not in found]
        if absent:
            raise RuntimeError(f"the model returned {len(missing) - len(absent)} of {len(missing)} rows")
        return found

    def _scores(
        self, wanted: Sequence[_Row], texts: Mapping[tuple[str, str], Mapping[str, Any]]
    ) -> dict[tuple[str, str, int, str], Judgement]:
        items: dict[str, JudgeItem] = {}
        names: dict[str, tuple[str, str, int, str]] = {}
        for row in wanted:
            text = texts[row.trait, row.key]
            question = row.task.questions.texts[row.question]
            # coherence is asked of the plain question: what the prompting baseline was told is no excuse for
            # its answer
            plain = row.task.prompts[row.question]
            for rubric in RUBRICS:
                name = (row.trait, row.key, row.question, rubric)
                key = "|".join(map(str, name))
                names[key] = name
                items[key] = JudgeItem(
                    key=key,
                    rubric=rubric,
                    context=row.task.context,
                    prompt=question,
                    text=text["text"],
                    prompt_ids=plain,
                    text_ids=tuple(text["ids"]),
                    template=row.task.questions.eval_prompt if rubric == "steering" else None,
                )
        with self._meter.timed("judge"):
            judged = {names[j.key]: j for j in self._judge(list(items.values()))}
        if len(judged) != len(items):
            raise RuntimeError(f"the judge answered {len(judged)} of {len(items)} items")
        return judged


@dataclass(frozen=True, eq=False)
class _Row:
    trait: str
    task: Task
    setting: Setting
    half: Half
    question: int
    prompt_ids: tuple[int, ...]
    key: str


def _generation_row(row: _Row) -> GenerationRow:
    # steered and unsteered answers to one question draw the same noise, so that a sampled pair differs by the
    # steering alone
    noise = hashlib.sha256(repr(row.task.prompts[row.question]).encode()).hexdigest()[:16]
    return GenerationRow(row.key, row.prompt_ids, row.setting.interventions, seed_key=noise)


def _value(judgement: Judgement) -> tuple[float | None, str | None]:
    if isinstance(judgement, Score):
        return float(judgement.value), None
    if isinstance(judgement, Abstention):
        return None, judgement.reason
    raise TypeError(f"not a judgement: {judgement!r}")


_HASHES: dict[int, tuple[Any, str]] = {}


def vector_hash(vector: np.ndarray) -> str:
    """sha256 of the float32 bytes. Kept per array object, because one direction is used in hundreds of
    rows."""
    known = _HASHES.get(id(vector))
    if known is not None and known[0] is vector:
        return known[1]
    digest = hashlib.sha256(np.ascontiguousarray(vector, dtype=np.float32).tobytes()).hexdigest()
    if len(_HASHES) > 4096:
        _HASHES.clear()
    _HASHES[id(vector)] = (vector, digest)
    return digest
