"""What every judge is asked and answers: plain rows, no network, no torch, no Dagster.

A judgement is a `Score` or an `Abstention` with its reason; nothing else exists, and neither is ever turned
into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

RubricName = Literal["scenario", "response", "steering", "coherence"]


@dataclass(frozen=True)
class TraitContext:
    """What a judge may know about a trait: its definition and, for a judge that is fitted, its scenarios."""

    trait: str
    definition: str
    positives: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class JudgeItem:
    """One text to judge.

    `rubric` scenario: `prompt` is judged (will its likely completion show the trait), with `polarity` and
    `index` (the row in its side of `context`) for judges that score out of fold. response: `text` is judged
    as the completion of
    `prompt`. steering: `text` as the answer to the question `prompt`. coherence: `text` for grammar, looping,
    being on topic. `prompt_ids`/`text_ids` let a judge ask the unsteered model for the log-probability of
    exactly these tokens.
    `template`: a user's own `eval_prompt` (placeholders question, answer).
    """

    key: str
    rubric: RubricName
    context: TraitContext
    prompt: str
    text: str = ""
    polarity: Literal["positive", "negative"] | None = None
    index: int | None = None
    prompt_ids: tuple[int, ...] = ()
    text_ids: tuple[int, ...] = ()
    template: str | None = None


@dataclass(frozen=True)
class Score:
    """`value`: 0–100. `mass`: probability mass that stood on integer tokens (None for judges without one)."""

    key: str
    value: float
    mass: float | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Abstention:
    """`reason`: a short slug: low_mass, unparseable, refusal, content_filter, out_of_range, empty, timeout,
    too_long, truncated …"""

    key: str
    reason: str
    detail: Mapping[str, Any] = field(default_factory=dict)


Judgement = Score | Abstention


class RowCacheLike(Protocol):
    """The part of `storage.rows.RowCache` that a judge needs: answers that were paid for are kept by content
    key."""

    def get(self, key: str) -> dict[str, Any] | None: ...

    def put_many(self, rows: Mapping[str, Mapping[str, Any]]) -> None: ...


# (trait) -> cache of that trait's judgements
CacheFor = Callable[[str], RowCacheLike]

# [(key, prompt_ids, text_ids)] -> {key: mean token log-probability (nats) of text_ids under the unsteered
# model}
ReferenceLogprob = Callable[[Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]], Mapping[str, float]]


# called now and then, from the thread that reads the scores, with what `Judge.usage` says
OnProgress = Callable[[Mapping[str, float]], None]


class Judge(Protocol):
    """Scores items in order, one judgement each, streaming as they come.

    `identity` holds everything that decides a score apart from the item (kind, model, rubric versions,
    thresholds of mass …): it is recorded with each score and part of every fingerprint. It must be had
    without network or model.
    `stand_in` is true for judges whose scores must not carry claims (the local one).
    """

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def stand_in(self) -> bool: ...

    def score(
        self, items: Sequence[JudgeItem], *, on_judged: Callable[[Judgement], None] | None = None
    ) -> Iterator[Judgement]: ...

    def usage(self, trait: str | None = None) -> dict[str, float]:
        """calls, cache_hits, prompt_tokens, completion_tokens, cost_usd, abstentions of this judge so far, or
        its part of one trait."""
        ...
