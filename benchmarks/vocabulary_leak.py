"""What a leaking vocabulary does to a vector, and what its repair brings: held-out AUC and steering, side by
side.

The worked example of docs/writing_natural_prompts.md. The author of `emotion/gloom` sets the mood by the
weather: a sentence about rain stands before every positive, one about sunshine before every negative. The
repaired set leaves both out. Both are judged on lines they have not seen: with the weather as in training,
with none, and crossed.

    python benchmarks/vocabulary_leak.py [--pairs 48] [--held-out 24] [--tokens 24] [--out result.json]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from resources.judges.protocol import Abstention, JudgeItem, Score, TraitContext  # noqa: E402
from resources.judges.resource import JudgeResource  # noqa: E402
from resources.models.loading import load  # noqa: E402
from resources.models.rows import CaptureRow, GenerationOptions, GenerationRow, Intervention, ModelSpec  # noqa: E402
from trait_assets.scenarios.dataset import load_trait  # noqa: E402
from trait_assets.scenarios.lint import word_leak  # noqa: E402

TRAIT = "emotion/gloom"
RAIN = (
    "Rain was falling again.",
    "It had rained since the morning.",
    "The rain would not stop.",
    "There was rain on the windows.",
    "Outside the rain came down.",
    "The rain had just begun.",
)
SUN = (
    "The sun was shining again.",
    "It had been sunny since the morning.",
    "The sun would not set.",
    "There was sun on the windows.",
    "Outside the sun came out.",
    "The sun had just risen.",
)
LAYERS = (10, 14, 17, 20)
WEATHER = ("rain", "cloud", "storm", "wet", "weather", "sun", "umbrella", "grey", "gray", "cold", "sky")


def with_weather(texts: list[str], sentences: tuple[str, ...]) -> list[str]:
    return [f"{sentences[i % len(sentences)]} {text}" for i, text in enumerate(texts)]


class Memory:
    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        return self.rows.get(key)

    def put_many(self, rows: Any) -> None:
        self.rows.update(rows)


def auc(score: np.ndarray, y: np.ndarray) -> float:
    a, b = score[y], score[~y]
    return float(np.mean((a[:, None] > b[None, :]) + 0.5 * (a[:, None] == b[None, :])))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    scenarios = load_trait(REPOSITORY / "datasets" / "traits", TRAIT, require_steering=True)
    assert scenarios.steering is not None
    order = list(range(len(scenarios.positives)))
    random.Random(0).shuffle(order)
    train, held = order[: args.pairs], order[args.pairs : args.pairs + args.held_out]

    def texts(rows: list[int]) -> tuple[list[str], list[str]]:
        return [scenarios.positives[i].prompt for i in rows], [scenarios.negatives[i].prompt for i in rows]

    p, q = texts(train)
    hp, hq = texts(held)
    sets = {
        "leaky": (with_weather(p, RAIN), with_weather(q, SUN)),
        "repaired": (p, q),
        "held out, weather as in training": (with_weather(hp, RAIN), with_weather(hq, SUN)),
        "held out, no weather": (hp, hq),
        "held out, weather crossed": (with_weather(hp, SUN), with_weather(hq, RAIN)),
    }
    model = load(ModelSpec("embedded:smollm2-135m-instruct"))
    rows, labels = [], {}
    for name, (pos, neg) in sets.items():
        for label, side in ((True, pos), (False, neg)):
            for i, text in enumerate(side):
                key = f"{name}|{int(label)}|{i}"
                labels[key] = label
                rows.append(GenerationRow(key, model.encode(text, chat=False).ids))
    answers = {r.key: r for r in model.generate(rows, GenerationOptions(max_new_tokens=args.tokens))}
    captured = {
        c.key: c
        for c in model.capture(
            [CaptureRow(r.key, r.prompt_ids, answers[r.key].ids) for r in rows],
            ("response[:]", "prompt[-1]"),
            layers=list(LAYERS),
        )
    }
    result: dict[str, Any] = {"trait": TRAIT, "pairs": len(train), "held_out": len(held), "layers": LAYERS}
    vectors: dict[tuple[str, str], np.ndarray] = {}
    result["auc"] = {}
    for position in ("response[:]", "prompt[-1]"):
        pooled: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in sets:
            keys = [
                k for k in labels if k.startswith(name + "|") and (position, "residual") in captured[k].pooled
            ]
            pooled[name] = (
                np.stack([captured[k].pooled[position, "residual"] for k in keys]).astype(np.float64),
                np.array([labels[k] for k in keys]),
            )
        for name in ("leaky", "repaired"):
            x, y = pooled[name]
            direction = x[y].mean(axis=0) - x[~y].mean(axis=0)
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            vectors[name, position] = direction
            for test in list(sets)[2:]:
                hx, hy = pooled[test]
                result["auc"][f"{name} | {position} | {test}"] = [
                    round(auc((hx[:, k] * direction[k]).sum(axis=1), hy), 3) for k in range(len(LAYERS))
                ]
    result["cosine of the two vectors, response[:]"] = [
        round(float(a @ b), 3)
        for a, b in zip(vectors["leaky", "response[:]"], vectors["repaired", "response[:]"], strict=True)
    ]
    result["words"] = {}
    for name in ("leaky", "repaired"):
        leak = word_leak(*sets[name])
        result["words"][name] = {"auc": round(leak.auc, 3), "auc of five words": round(leak.auc_few, 3)}
    named = {name: vectors[name, "response[:]"] for name in ("leaky", "repaired")}
    result["steering"] = steer(args, model, scenarios, named, captured)
    return result


def steer(
    args: argparse.Namespace,
    model: Any,
    scenarios: Any,
    vectors: dict[str, np.ndarray],
    captured: Any,
) -> dict[str, Any]:
    norms = np.median(np.stack([c.norms for c in captured.values()]), axis=0)
    norms = norms if len(norms) == len(LAYERS) else norms[list(LAYERS)]
    questions = scenarios.steering.questions[: args.questions]
    rng = np.random.default_rng(0)
    random_direction = rng.standard_normal(next(iter(vectors.values())).shape)
    random_direction /= np.linalg.norm(random_direction, axis=1, keepdims=True)
    arms: dict[str, tuple[Intervention, ...]] = {"unsteered": ()}
    for k in (LAYERS.index(14), LAYERS.index(17)):
        for dose in args.doses:
            for name, direction in [*vectors.items(), ("random", random_direction)]:
                unit = direction[k].astype(np.float32)
                arms[f"{name}, layer {LAYERS[k]}, dose {dose}"] = (
                    Intervention(LAYERS[k], unit, float(dose * norms[k])),
                )
    rows = [
        GenerationRow(f"{arm}|{i}", model.encode(q, chat=True).ids, interventions)
        for arm, interventions in arms.items()
        for i, q in enumerate(questions)
    ]
    texts = {
        r.key: r.text for r in model.generate(rows, GenerationOptions(max_new_tokens=args.answer_tokens))
    }
    context = TraitContext(
        TRAIT,
        scenarios.definition,
        tuple(s.prompt for s in scenarios.positives),
        tuple(s.prompt for s in scenarios.negatives),
    )
    memory = Memory()
    judge = JudgeResource(backend="local").judge(lambda _: memory, None)
    items = [
        JudgeItem(key, "steering", context, questions[int(key.rsplit("|", 1)[1])], text)
        for key, text in texts.items()
    ]
    scores: dict[str, float] = {}
    for judged in judge.score(items):
        if isinstance(judged, Score):
            scores[judged.key] = judged.value
        else:
            assert isinstance(judged, Abstention)
    table = {}
    for arm in arms:
        changes = [
            scores[f"{arm}|{i}"] - scores[f"unsteered|{i}"]
            for i in range(len(questions))
            if f"{arm}|{i}" in scores and f"unsteered|{i}" in scores
        ]
        mine = [texts[f"{arm}|{i}"] for i in range(len(questions))]
        draws = [np.mean(rng.choice(changes, len(changes))) for _ in range(2000)]
        table[arm] = {
            "score": round(float(np.mean([scores[k] for k in scores if k.rsplit("|", 1)[0] == arm])), 1),
            "change": round(float(np.mean(changes)), 1),
            "95 %": [round(float(v), 1) for v in np.percentile(draws, [2.5, 97.5])],
            "distinct_3": round(float(np.mean([distinct(t) for t in mine])), 2),
            "weather words per answer": round(
                float(np.mean([sum(t.lower().count(w) for w in WEATHER) for t in mine])), 2
            ),
            "example": mine[0],
        }
    return table


def distinct(text: str) -> float:
    words = text.split()
    grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return len(set(grams)) / len(grams) if grams else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--answer-tokens", type=int, default=40)
    parser.add_argument("--doses", type=float, nargs="+", default=[0.12, 0.2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = measure(args)
    text = json.dumps(result, indent=2, ensure_ascii=False)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
