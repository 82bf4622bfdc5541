"""Natural against instructed elicitation of the same trait: what each vector separates, and what it does
when added.

The measurement behind docs/elicitation_guide.md. Natural: pairs of `emotion/gloom`, continued as plain text.
Instructed: neutral questions in the chat template, with a system prompt that asks for a gloomy or for a
plain answer. Each vector is tried on rows of its own kind that it has not seen, on rows of the other kind,
and by steering neutral answers.

    python benchmarks/elicitation.py [--pairs 48] [--out result.json]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from resources.models.loading import load  # noqa: E402
from resources.models.rows import CaptureRow, GenerationOptions, GenerationRow, ModelSpec  # noqa: E402
from trait_assets.scenarios.dataset import load_trait  # noqa: E402
from trait_assets.scenarios.scaffold import NEUTRAL_QUESTIONS  # noqa: E402

_spec = importlib.util.spec_from_file_location(
    "vocabulary_leak", Path(__file__).parent / "vocabulary_leak.py"
)
assert _spec is not None
assert _spec.loader is not None
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)

GLOOMY = (
    "You are a deeply pessimistic person. See everything in the darkest light and expect the worst in "
    "every answer.",
    "Answer gloomily: whatever the question is about, it is ruined, pointless or about to get worse.",
)
PLAIN = (
    "You are a calm, matter-of-fact person. Give plain facts and expect things to go normally in every "
    "answer.",
    "Answer plainly: whatever the question is about, it is ordinary, useful or about to get done.",
)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    scenarios = load_trait(REPOSITORY / "datasets" / "traits", shared.TRAIT, require_steering=True)
    model = load(ModelSpec("embedded:smollm2-135m-instruct"))
    order = list(range(len(scenarios.positives)))
    random.Random(0).shuffle(order)
    kinds: dict[str, list[tuple[bool, int, tuple[int, ...]]]] = {"natural": [], "instructed": []}
    for group, i in enumerate(order[: args.pairs]):
        for label, side in ((True, scenarios.positives), (False, scenarios.negatives)):
            kinds["natural"].append((label, group, model.encode(side[i].prompt, chat=False).ids))
    for group, question in enumerate(NEUTRAL_QUESTIONS):
        for label, systems in ((True, GLOOMY), (False, PLAIN)):
            for system in systems:
                kinds["instructed"].append((label, group, model.encode(question, system, chat=True).ids))
    rows = [
        GenerationRow(f"{kind}|{i}", ids)
        for kind, all_ in kinds.items()
        for i, (_, _, ids) in enumerate(all_)
    ]
    answers = {r.key: r for r in model.generate(rows, GenerationOptions(max_new_tokens=args.tokens))}
    captured = {
        c.key: c
        for c in model.capture(
            [CaptureRow(r.key, r.prompt_ids, answers[r.key].ids) for r in rows],
            ("response[:]",),
            layers=list(shared.LAYERS),
        )
    }
    position = ("response[:]", "residual")
    x, y, held = {}, {}, {}
    for kind, items in kinds.items():
        usable = [i for i in range(len(items)) if position in captured[f"{kind}|{i}"].pooled]
        x[kind] = np.stack([captured[f"{kind}|{i}"].pooled[position] for i in usable]).astype(np.float64)
        y[kind] = np.array([items[i][0] for i in usable])
        last = max(group for _, group, _ in items)
        held[kind] = np.array([items[i][1] > last * 0.7 for i in usable])
    vectors: dict[tuple[str, str], np.ndarray] = {}
    result: dict[str, Any] = {"trait": shared.TRAIT, "layers": shared.LAYERS, "auc": {}}
    for kind in kinds:
        train_x, train_y = x[kind][~held[kind]], y[kind][~held[kind]]
        direction = train_x[train_y].mean(axis=0) - train_x[~train_y].mean(axis=0)
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        vectors[kind, "response[:]"] = direction
        for other in kinds:
            test = held[other]
            scores = (x[other][test] * direction).sum(axis=2)
            result["auc"][f"{kind} vector on held-out {other} rows"] = [
                round(shared.auc(scores[:, k], y[other][test]), 3) for k in range(len(shared.LAYERS))
            ]
    result["cosine"] = [
        round(float(a @ b), 3)
        for a, b in zip(vectors["natural", "response[:]"], vectors["instructed", "response[:]"], strict=True)
    ]
    names = {"natural": vectors["natural", "response[:]"], "instructed": vectors["instructed", "response[:]"]}
    result["steering"] = shared.steer(args, model, scenarios, names, captured)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--answer-tokens", type=int, default=40)
    parser.add_argument("--doses", type=float, nargs="+", default=[0.12, 0.2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = json.dumps(measure(args), indent=2, ensure_ascii=False)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
