"""A toy language model with a planted truth: a direction that provably raises a class of tokens.

The stream is linear: h = E[last token] + Q[question], rotated by a fixed orthogonal matrix at every block,
and logits = U·h + b. Along the planted direction u every class token's logit rises and no other moves, so
under Gumbel sampling with shared noise an addition c·u, c > 0, can only turn a token into a class token.
Class tokens rise at different rates: a large dose makes one of them win always, the text loops, and the share
of distinct 3-grams falls. The judge reads the texts: trait = share of class tokens, coherence = share of
distinct 3-grams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from resources.judges.protocol import Abstention, JudgeItem, Judgement, Score, TraitContext
from resources.models.rows import GeneratedRow, GenerationOptions, GenerationRow
from trait_assets.steering.dose_search import Candidate, SearchOptions, SearchResult, run_together, search
from trait_assets.steering.questions import Half, read_questions
from trait_assets.steering.scoring import BASELINE, Request, Scorer, Task

LAYERS, WIDTH, VOCABULARY, CLASS, TOKENS = 6, 48, 96, 12, 24
NORM = 10.0


class Memory(dict):
    """A row cache that lasts as long as the test."""

    def put_many(self, rows: Any) -> None:
        self.update(rows)


@dataclass
class ToyModel:
    """`generate` in numpy. `calls`: rows per call."""

    seed: int
    planted: bool = True
    # how far along u the unsteered model stands already
    drift: float = 0.0
    calls: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.u = _unit(rng.standard_normal(WIDTH))
        off = np.eye(WIDTH) - np.outer(self.u, self.u)
        self.E = rng.standard_normal((VOCABULARY, WIDTH)) @ off
        self.E *= NORM / np.linalg.norm(self.E, axis=1, keepdims=True)
        self.U = 0.25 * rng.standard_normal((VOCABULARY, WIDTH)) @ off
        if self.planted:
            self.U[:CLASS] += np.linspace(0.5, 1.5, CLASS)[:, None] * self.u
        self.b = np.zeros(VOCABULARY)
        self.rotations = [np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0] for _ in range(LAYERS)]

    def direction(self, layer: int) -> np.ndarray:
        """The unit direction at that block's output that arrives at the head as u."""
        v = self.u
        for rotation in reversed(self.rotations[layer + 1 :]):
            v = v @ rotation
        return v.astype(np.float32)

    def arriving(self, layer: int, vector: np.ndarray) -> np.ndarray:
        for rotation in self.rotations[layer + 1 :]:
            vector = rotation @ vector
        return vector

    def generate(self, rows: Sequence[GenerationRow]) -> Iterator[GeneratedRow]:
        self.calls.append(len(rows))
        added = np.tile(self.drift * self.u, (len(rows), 1))
        for i, row in enumerate(rows):
            for step in row.interventions:
                added[i] += step.coefficient * self.arriving(step.layer, step.vector)
        noise = np.stack([_gumbel(self.seed, row.seed_key or row.key) for row in rows])
        last = np.array([row.prompt_ids[-1] % VOCABULARY for row in rows])
        question = np.stack([_noise(self.seed, row.seed_key or row.key) for row in rows])
        tokens = np.zeros((len(rows), TOKENS), dtype=int)
        for t in range(TOKENS):
            logits = (0.3 * self.E[last] + question + added) @ self.U.T + self.b + noise[:, t]
            last = logits.argmax(axis=1)
            tokens[:, t] = last
        for row, ids in zip(rows, tokens, strict=True):
            out = tuple(int(i) for i in ids)
            yield GeneratedRow(row.key, row.prompt_ids, out, " ".join(f"t{i}" for i in out), "length")


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


def _gumbel(seed: int, key: str) -> np.ndarray:
    return np.random.default_rng(_number(f"{seed}|{key}|noise")).gumbel(size=(TOKENS, VOCABULARY))


def _noise(seed: int, key: str) -> np.ndarray:
    return np.random.default_rng(_number(f"{seed}|{key}|question")).standard_normal(WIDTH)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def restless_judge(items: Sequence[JudgeItem]) -> Iterator[Judgement]:
    """Every question has a token class of its own, drawn at random: steering changes the scores, but no
    direction has an effect that holds over questions. The expected change of any setting is zero, exactly."""
    for item in items:
        if item.rubric == "coherence":
            yield from toy_judge([item])
            continue
        own = [_number(f"{item.prompt}|{t}") % 8 == 0 for t in range(VOCABULARY)]
        yield Score(item.key, 100.0 * sum(own[t] for t in item.text_ids) / len(item.text_ids))


def toy_judge(items: Sequence[JudgeItem]) -> Iterator[Judgement]:
    for item in items:
        tokens = item.text_ids
        if not tokens:
            yield Abstention(item.key, "empty")
        elif item.rubric == "steering":
            yield Score(item.key, 100.0 * sum(t < CLASS for t in tokens) / len(tokens))
        else:
            grams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
            yield Score(item.key, 100.0 * len(set(grams)) / max(len(grams), 1))


@dataclass
class Toy:
    """A toy model with a task, ready to be searched."""

    model: ToyModel
    task: Task
    cache: Memory = field(default_factory=Memory)
    judge: Any = toy_judge

    def scorer(self) -> Scorer:
        return Scorer(
            self.model.generate,
            self.judge,
            options=GenerationOptions(max_new_tokens=TOKENS, temperature=1.0),
            identity={"toy": self.model.seed},
            cache_for=lambda trait: self.cache,
        )

    def candidates(
        self, *, at: tuple[int, str] | None, methods: Sequence[str] = ("a", "b", "c")
    ) -> list[Candidate]:
        """One candidate per layer and method; the planted direction stands at `at`, all others are orthogonal
        to it."""
        rng = np.random.default_rng(self.model.seed + 10_000)
        out = []
        for method in methods:
            for layer in range(1, LAYERS):
                planted = self.model.direction(layer)
                v = rng.standard_normal(WIDTH)
                v = planted if (layer, method) == at else _unit(v - planted * (v @ planted))
                out.append(
                    Candidate(layer, method, "response[:]", "residual", v.astype(np.float32), len(out))
                )
        return out

    def run(
        self,
        candidates: Sequence[Candidate],
        options: SearchOptions | None = None,
        scorer: Scorer | None = None,
    ) -> SearchResult:
        scorer = scorer or self.scorer()
        options = options or SearchOptions(doses=(0.1, 0.2, 0.3, 0.5))
        halves: tuple[Half, ...] = ("search", "report")
        answers = scorer.answers({self.task.trait: (self.task, [Request(BASELINE, half) for half in halves])})
        baseline = {half: answers[self.task.trait]["baseline", half] for half in halves}
        steps = search(self.task, candidates, baseline, lambda layer: NORM, options)
        finished = list(run_together({self.task.trait: (self.task, steps)}, scorer.answers))
        if finished[0].error is not None:
            raise finished[0].error
        assert finished[0].result is not None
        return finished[0].result


def make_toy(seed: int, *, planted: bool = True, questions: int = 16, direction: str = "positive") -> Toy:
    texts = [f"question {seed} {i}" for i in range(questions)]
    asked = read_questions(
        {"questions": texts, "direction": direction}, trait="toy/class", where="steering.json", seed=seed
    )
    rng = np.random.default_rng(seed)
    prompts = tuple(
        (int(rng.integers(VOCABULARY)), i, int(rng.integers(VOCABULARY))) for i in range(questions)
    )
    return Toy(
        ToyModel(seed, planted), Task("toy/class", asked, TraitContext("toy/class", "class tokens"), prompts)
    )


@pytest.fixture
def toy() -> Any:
    """The maker of toys: `toy(seed, planted=…, questions=…, direction=…)`."""
    return make_toy


@pytest.fixture
def restless() -> Any:
    """A judge under which no direction has an effect."""
    return restless_judge
