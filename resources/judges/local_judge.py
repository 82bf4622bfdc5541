"""A judge that works offline: the trait's own scenarios, embedded by MiniLM, separated by a logistic
regression.

It is a stand-in: it knows a trait only through the scenarios that the vectors are extracted from, so its
scores carry no claim about the trait. Coherence comes from the unsteered model's log-probability together
with the share of distinct 3-grams, because looping text has a high likelihood. No prompts, no network, no
Dagster.
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from resources.judges.embedding import embed, embedding_identity
from resources.judges.protocol import (
    Abstention,
    CacheFor,
    JudgeItem,
    Judgement,
    ReferenceLogprob,
    RowCacheLike,
    Score,
    TraitContext,
)
from resources.judges.scoring import distinct_ngrams
from storage.manifest import fingerprint

METHOD = "minilm-logreg/2"
COHERENCE = "logprob-distinct3/2"
# inverse regularisation: unit-length embeddings need a weak penalty before probabilities leave the middle
REGULARISATION = 10.0
FOLDS = 5
NEAR_DUPLICATE = 0.97
CHUNK = 64


class LocalJudge:
    """See the module. `reference` gives mean token log-probabilities under the unsteered model; without it
    (and without token ids on the item) coherence is an abstention `no_reference`."""

    stand_in = True

    def __init__(
        self,
        cache_for: CacheFor,
        reference: ReferenceLogprob | None = None,
        on_progress: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        self._cache_for = cache_for
        self._reference = reference
        self._on_progress = on_progress
        self._usage: Counter[str] = Counter()
        self._of_trait: dict[str, Counter[str]] = {}
        self._caches: dict[str, RowCacheLike] = {}

    @property
    def identity(self) -> dict[str, Any]:
        return local_identity()

    def usage(self, trait: str | None = None) -> dict[str, float]:
        names = ("calls", "cache_hits", "prompt_tokens", "completion_tokens", "cost_usd", "abstentions")
        counts = self._usage if trait is None else self._of_trait.get(trait, Counter())
        return {name: float(counts[name]) for name in names}

    def _count(self, trait: str, name: str) -> None:
        self._usage[name] += 1
        self._of_trait.setdefault(trait, Counter())[name] += 1

    def score(
        self, items: Sequence[JudgeItem], *, on_judged: Callable[[Judgement], None] | None = None
    ) -> Iterator[Judgement]:
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            for item, judgement in zip(chunk, self._score_chunk(chunk), strict=True):
                if isinstance(judgement, Abstention):
                    self._count(item.context.trait, "abstentions")
                if on_judged is not None:
                    on_judged(judgement)
                yield judgement
            if self._on_progress is not None:
                self._on_progress(self.usage())

    def _score_chunk(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        judged: dict[int, Judgement] = {}
        open_items: list[int] = []
        keys: dict[int, str] = {}
        for i, item in enumerate(items):
            if not _judged_text(item).strip():
                judged[i] = Abstention(item.key, "empty")
                continue
            key = self._cache_key(item)
            row = None
            if key is not None:
                keys[i] = key
                row = self._cache(item.context.trait).get(key)
            if row is not None:
                self._count(item.context.trait, "cache_hits")
                judged[i] = Score(item.key, float(row["value"]), detail=dict(row["detail"]))
            else:
                open_items.append(i)
        coherence = [i for i in open_items if items[i].rubric == "coherence"]
        trait = [i for i in open_items if items[i].rubric != "coherence"]
        judged.update(zip(coherence, self._coherence([items[i] for i in coherence]), strict=True))
        judged.update(zip(trait, self._trait([items[i] for i in trait]), strict=True))
        for i in open_items:
            self._count(items[i].context.trait, "calls")
        fresh: dict[str, dict[str, Any]] = {}
        for i in open_items:
            judgement = judged[i]
            if isinstance(judgement, Score) and i in keys:
                fresh.setdefault(items[i].context.trait, {})[keys[i]] = {
                    "value": judgement.value,
                    "detail": dict(judgement.detail),
                }
        for trait_name, rows in fresh.items():
            self._cache(trait_name).put_many(rows)
        return [judged[i] for i in range(len(items))]

    def _cache(self, trait: str) -> RowCacheLike:
        if trait not in self._caches:
            self._caches[trait] = self._cache_for(trait)
        return self._caches[trait]

    def _cache_key(self, item: JudgeItem) -> str | None:
        if item.rubric == "coherence":
            # the score hangs on the reference model: cached only when it says which one it is
            reference = getattr(self._reference, "identity", None)
            if reference is None:
                return None
            return fingerprint(["coherence", COHERENCE, reference, item.prompt_ids, item.text_ids, item.text])
        place = [item.polarity, item.index] if item.rubric == "scenario" else None
        return fingerprint(
            [METHOD, embedding_identity(), fit_fingerprint(item.context), _judged_text(item), place]
        )

    def _trait(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        vectors = embed([_judged_text(item) for item in items])
        judged: list[Judgement] = []
        for item, vector in zip(items, vectors, strict=True):
            fit = fit_for(item.context)
            if fit is None:
                judged.append(Abstention(item.key, "too_few_scenarios"))
                continue
            detail: dict[str, Any] = {"fit": fit.fingerprint}
            row = fit.row_of(item) if item.rubric == "scenario" else None
            if row is not None:
                if fit.out_of_fold is None:
                    judged.append(Abstention(item.key, "too_few_scenarios"))
                    continue
                value = float(fit.out_of_fold[row])
                detail["out_of_fold"] = True
            else:
                value = fit.probability(vector)
            judged.append(Score(item.key, 100.0 * value, detail=detail))
        return judged

    def _coherence(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        if not items:
            return []
        logprobs: Mapping[str, float] = {}
        if self._reference is not None:
            # item keys may repeat over traits: the row number is what tells them apart
            rows = [
                (str(i), item.prompt_ids, item.text_ids)
                for i, item in enumerate(items)
                if item.text_ids and item.prompt_ids
            ]
            logprobs = self._reference(rows) if rows else {}
        judged: list[Judgement] = []
        for i, item in enumerate(items):
            logprob = logprobs.get(str(i))
            variety = distinct_ngrams(_units(item))
            if logprob is None or not math.isfinite(logprob):
                judged.append(Abstention(item.key, "no_reference", {"distinct_3": round(variety, 4)}))
                continue
            detail = {"distinct_3": round(variety, 4), "logprob": round(float(logprob), 4)}
            judged.append(Score(item.key, coherence_score(float(logprob), variety), detail=detail))
        return judged


def local_identity() -> dict[str, Any]:
    return {"kind": "local", "method": METHOD, "embedding": embedding_identity(), "coherence": COHERENCE}


# Calibrated on SmolLM2-135M-Instruct, see docs/judges.md: its ordinary answers have a mean log-probability of
# -0.5 to -1.6, sampled at temperature 1 -1.6 to -3.9, human texts -2.7 to -4.6, shuffled words -6.1 and less;
# its ordinary answers of forty tokens have 0.85 and more distinct 3-grams, a sentence of fourteen words said
# three times 0.35.
FLUENCY_MIDDLE, FLUENCY_WIDTH = -4.7, 0.45
VARIETY_MIDDLE, VARIETY_WIDTH = 0.72, 0.05


def coherence_score(logprob: float, distinct_3: float) -> float:
    """0–100, monotone in both: 100 · fluency · variety, each a logistic curve.

    `logprob`: mean log-probability (nats) per token under the unsteered model; `distinct_3`: share of
    distinct 3-grams of words. Looping text has a high likelihood, word salad has distinct 3-grams: only both
    together tell coherence.
    """
    fluency = 1.0 / (1.0 + math.exp(-(logprob - FLUENCY_MIDDLE) / FLUENCY_WIDTH))
    variety = 1.0 / (1.0 + math.exp(-(distinct_3 - VARIETY_MIDDLE) / VARIETY_WIDTH))
    return 100.0 * fluency * variety


def _units(item: JudgeItem) -> list[str]:
    """What n-grams are counted over: words, and single characters where a script or a loop has no spaces."""
    words = re.findall(r"\w+|[^\w\s]", item.text.lower())
    if words and max(len(word) for word in words) > 40:
        return [c for c in item.text.lower() if not c.isspace()]
    return words


def _judged_text(item: JudgeItem) -> str:
    return item.prompt if item.rubric == "scenario" else item.text


class TraitFit:
    """One trait's classifier: the whole fit, and each scenario's probability from folds that did not hold its
    group.

    Both are fitted on what distinguishes the lines of a pair (`voices`). A group is a pair (line i of both
    sides) joined with everything nearly identical to it, so that no scenario is scored by a fit that saw its
    twin.
    """

    def __init__(self, context: TraitContext) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GroupKFold

        self.context = context
        self.fingerprint = fit_fingerprint(context)
        n_pos = len(context.positives)
        texts = [*context.positives, *context.negatives]
        x = embed(voices(context.positives, context.negatives))
        y = np.array([1] * n_pos + [0] * len(context.negatives))

        def fitted(rows: np.ndarray) -> LogisticRegression:
            model = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=5000)
            return model.fit(x[rows], y[rows])

        whole = fitted(np.arange(len(y)))
        self._weights = whole.coef_[0].astype(np.float64)
        self._bias = float(whole.intercept_[0])
        groups = near_duplicate_groups(x, [*range(n_pos), *range(len(context.negatives))])
        folds = min(FOLDS, len(set(groups)))
        self.out_of_fold: np.ndarray | None = None
        if folds >= 2:
            scores = np.full(len(y), np.nan)
            for train, test in GroupKFold(folds).split(x, y, groups):
                if len(set(y[train])) == 2:
                    scores[test] = fitted(train).predict_proba(x[test])[:, 1]
            if np.isfinite(scores).all():
                self.out_of_fold = scores
        self._where = {text: row for row, text in reversed(list(enumerate(texts)))}

    def probability(self, vector: np.ndarray) -> float:
        z = float(vector.astype(np.float64) @ self._weights) + self._bias
        return 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, z))))

    def row_of(self, item: JudgeItem) -> int | None:
        """The training row that an item of the scenario rubric is; None for a text that the fit has not
        seen."""
        if item.index is not None and item.polarity is not None:
            side = self.context.positives if item.polarity == "positive" else self.context.negatives
            offset = 0 if item.polarity == "positive" else len(self.context.positives)
            if 0 <= item.index < len(side) and side[item.index] == item.prompt:
                return offset + item.index
        return self._where.get(item.prompt)


def voices(positives: Sequence[str], negatives: Sequence[str]) -> list[str]:
    """The texts of both sides, positives first, without the words that line i of both sides share at its two
    ends.

    Paired scenarios set the same scene and differ in the voice that follows; the scene is the same for both
    labels and only blurs the embedding. Where less than four words would be left of either line, both stay
    whole.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for a, b in zip_longest(positives, negatives):
        if a is None or b is None:
            sides[a is None].append(b if a is None else a)
            continue
        left, right = a.split(), b.split()
        shorter = min(len(left), len(right))
        head = next((k for k in range(shorter) if left[k] != right[k]), shorter)
        tail = next((k for k in range(shorter - head) if left[-1 - k] != right[-1 - k]), shorter - head)
        if shorter - head - tail < 4:
            sides[0].append(a)
            sides[1].append(b)
        else:
            sides[0].append(" ".join(left[head : len(left) - tail]))
            sides[1].append(" ".join(right[head : len(right) - tail]))
    return [*sides[0], *sides[1]]


def near_duplicate_groups(x: np.ndarray, pairs: Sequence[int]) -> list[int]:
    """Group number per row of `x` [n, width]: rows with the same pair number, or with a cosine above 0.97,
    share one."""
    parent = list(range(len(x)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[int, int] = {}
    for row, pair in enumerate(pairs):
        parent[root(row)] = root(first.setdefault(pair, row))
    close = np.argwhere(np.triu(x @ x.T > NEAR_DUPLICATE, k=1))
    for a, b in close:
        parent[root(int(a))] = root(int(b))
    return [root(i) for i in range(len(x))]


_fits: dict[str, TraitFit | None] = {}
_fit_lock = threading.Lock()
_fingerprints: dict[int, tuple[TraitContext, str]] = {}


def fit_fingerprint(context: TraitContext) -> str:
    """Hash of everything a fit depends on: both sides' scenarios in order."""
    known = _fingerprints.get(id(context))
    if known is not None and known[0] is context:
        return known[1]
    value = fingerprint([METHOD, list(context.positives), list(context.negatives)])
    if len(_fingerprints) > 4096:
        _fingerprints.clear()
    _fingerprints[id(context)] = (context, value)
    return value


def fit_for(context: TraitContext) -> TraitFit | None:
    """The trait's fit, made once per process and content; None when a side has no scenario at all."""
    key = fit_fingerprint(context)
    with _fit_lock:
        if key not in _fits:
            if len(_fits) > 1024:
                _fits.clear()
            _fits[key] = TraitFit(context) if context.positives and context.negatives else None
        return _fits[key]
