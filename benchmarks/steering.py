"""The search for layer, method and dose, timed against a straightforward loop. Run: python benchmarks/steering.py

One trait on the embedded small model with the local judge: candidates = layers × methods, 8 questions × 48 tokens.

- search: the coarse ladder for all candidates in one batch per rung, hopeless ones dropped, brackets bisected.
- loop: one `model.generate` of transformers per configuration (all 8 questions in one padded batch, a hook that
  adds the vector), over a fixed grid of doses as fine as the search's last bracket and as wide as the search's range.

Both judge every answer with the same judge, and both are timed with judging. The best effect is the largest mean
change among coherent settings on the same questions. With `--timed N` the loop runs N configurations drawn at
random and its time is scaled up; its best effect is then not known. On a shared machine only the ratio of times
taken in the same run counts.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resources.judges.local_judge import LocalJudge
from resources.judges.protocol import JudgeItem, Score
from resources.models.language_model import LanguageModel
from resources.models.resource import ModelResource
from resources.models.rows import CaptureRow, GenerationOptions
from trait_assets.activations.dataset import ActivationSet
from trait_assets.judging import trait_context
from trait_assets.scenarios.dataset import ScenarioSet, load_trait
from trait_assets.steering.dose_search import BEYOND_LADDER, Candidate, SearchOptions, search
from trait_assets.steering.questions import read_questions
from trait_assets.steering.scoring import BASELINE, Request, Scorer, Task
from trait_assets.vectors.fit import fit_vectors

MODEL = "embedded:smollm2-135m-instruct"
TRAITS = Path(__file__).parents[1] / "datasets" / "traits"
QUESTIONS, TOKENS = 8, 48
METHODS = ("mean_diff", "probe", "gradient")
LADDER = (0.06, 0.12, 0.18, 0.26)
# as fine and as wide as the search: two bisections of the ladder's steps of 0.06 to 0.08 end at brackets of 0.015
# to 0.02, and what is still coherent at the top of the ladder is driven up to twice that dose
GRID = tuple(round(float(d), 2) for d in np.arange(0.06, BEYOND_LADDER * LADDER[-1] + 0.001, 0.02))
COHERENT = 70.0


class Memory:
    """A row cache in memory."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}

    def get(self, key: str) -> dict[str, Any] | None:
        return self._rows.get(key)

    def put_many(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        self._rows.update({key: dict(row) for key, row in rows.items()})


@dataclass(frozen=True)
class Setup:
    model: LanguageModel
    task: Task
    candidates: list[Candidate]
    norms: list[float]


def new_judge(model: LanguageModel) -> LocalJudge:
    caches: dict[str, Memory] = {}

    def reference(
        rows: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]],
    ) -> dict[str, float]:
        return dict(model.logprobs([CaptureRow(*row) for row in rows if row[2]]))

    return LocalJudge(lambda trait: caches.setdefault(trait, Memory()), reference)


def new_scorer(model: LanguageModel, judge: LocalJudge) -> Scorer:
    options = GenerationOptions(max_new_tokens=TOKENS, temperature=0.0, seed=0)
    rows = Memory()
    return Scorer(
        lambda asked: model.generate(asked, options, steer_from="response"),
        judge.score,
        options=options,
        identity=model.identity.record(),
        cache_for=lambda trait: rows,
    )


def vectors(model: LanguageModel, scenarios: ScenarioSet, layers: Sequence[int]) -> list[Candidate]:
    """Directions between the trait's two sides, over the tokens of the scenarios themselves."""
    texts = [*scenarios.positives, *scenarios.negatives]
    # the first token carries a massive activation: it stands as the prompt, and is left out of the mean
    ids = [model.encode(s.prompt, s.system_prompt, chat=False).ids for s in texts]
    rows = [CaptureRow(str(i), row[:1], row[1:]) for i, row in enumerate(ids)]
    captured = {r.key: r for r in model.capture(rows, ["response[:]"], layers=list(layers))}
    x = np.stack([captured[r.key].pooled["response[:]", "residual"] for r in rows]).astype(np.float32)
    y = np.arange(len(rows)) < len(scenarios.positives)
    metadata = {
        "rows": {"train": [{"key": r.key, "pair": None} for r in rows]},
        "median_norm": [1.0] * len(layers),
        "n_layers": model.n_layers,
    }
    keys = [r.key for r in rows]
    found = ActivationSet(
        scenarios.trait,
        "response[:]",
        "residual",
        "train",
        x,
        y,
        np.arange(len(y)),
        keys,
        list(layers),
        metadata,
    )
    out: list[Candidate] = []
    for method, file in fit_vectors(found, METHODS, 0).items():
        for layer in layers:
            vector = file.vector(layer)
            direction = np.ascontiguousarray(vector.direction * vector.sign, dtype=np.float32)
            out.append(Candidate(layer, method, "response[:]", "residual", direction, len(out)))
    return out


def setup(trait: str, layers: Sequence[int], methods: int) -> Setup:
    resource = ModelResource()
    model = resource.get(resource.spec(MODEL))
    scenarios = load_trait(TRAITS, trait, require_steering=True)
    assert scenarios.steering is not None
    record = {"questions": list(scenarios.steering.questions), "direction": scenarios.steering.direction}
    questions = read_questions(
        record, trait=trait, where="steering.json", limit=2 * QUESTIONS, search_share=0.5
    )
    assert len(questions.search) == QUESTIONS
    prompts = tuple(model.encode(text, chat=True).ids for text in questions.texts)
    task = Task(trait, questions, trait_context(scenarios), prompts)
    candidates = [c for c in vectors(model, scenarios, layers) if c.method in METHODS[:methods]]
    plain = new_scorer(model, new_judge(model)).answers({trait: (task, [Request(BASELINE, "search")])})
    rows = [
        CaptureRow(str(i), task.prompts[a.question], a.ids)
        for i, a in enumerate(plain[trait]["baseline", "search"])
    ]
    norms = np.nanmedian(np.stack([r.norms for r in model.capture(rows, ["all[:]"])]), axis=0)
    return Setup(model, task, candidates, [float(n) for n in norms])


def run_search(made: Setup) -> tuple[float, float, str, int]:
    """(seconds until layer, method and dose are found, best coherent effect, its name, settings measured)"""
    trait = made.task.trait
    scorer = new_scorer(made.model, new_judge(made.model))
    started = time.perf_counter()
    asked = {trait: (made.task, [Request(BASELINE, "search"), Request(BASELINE, "report")])}
    unsteered = scorer.answers(asked)[trait]
    baseline = {half: unsteered["baseline", half] for half in ("search", "report")}
    options = SearchOptions(doses=LADDER, controls=0, prompting=False, coherence_threshold=COHERENT)
    steps = search(made.task, made.candidates, baseline, made.norms.__getitem__, options)  # type: ignore[arg-type]
    seconds = None
    requests = next(steps)
    while True:
        if requests and requests[0].half == "report" and seconds is None:
            seconds = time.perf_counter() - started
        try:
            requests = steps.send(scorer.answers({trait: (made.task, requests)})[trait])
        except StopIteration as stop:
            result = stop.value
            break
    runs = [r for r in result.runs if r.half == "search"]
    fit = [r for r in runs if r.measured.coherent(COHERENT)]
    best = max(fit, key=lambda r: r.effect(made.task.sign) or -np.inf)
    effect = best.effect(made.task.sign)
    assert effect is not None
    if seconds is None:
        seconds = time.perf_counter() - started
    return seconds, effect, best.setting.name, len(runs)


def straightforward(
    made: Setup, candidate: Candidate | None, dose: float
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Greedy answers of one configuration by transformers' own `generate` on a left-padded batch."""
    import torch

    network, tokenizer = made.model.model, made.model.tokenizer
    prompts = [made.task.prompts[q] for q in made.task.questions.search]
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    handle = None
    if candidate is not None:
        added = torch.from_numpy(candidate.direction) * (dose * made.task.sign * made.norms[candidate.layer])

        def hook(module: Any, given: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden[:, -1] += added
            return output

        handle = network.model.layers[candidate.layer].register_forward_hook(hook)
    try:
        with torch.inference_mode():
            out = network.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=pad,
                repetition_penalty=1.0,
            )  # fmt: skip
    finally:
        if handle is not None:
            handle.remove()
    for question, row in zip(made.task.questions.search, out[:, longest:].tolist(), strict=True):
        # padding and end of turn are the same token on this model
        yield question, tuple(row[: row.index(pad)] if pad in row else row)


def judged(
    made: Setup, judge: LocalJudge, rows: Sequence[tuple[int, tuple[int, ...]]]
) -> tuple[list[Any], list[Any]]:
    items = [
        JudgeItem(
            key=f"{q}|{rubric}",
            rubric=rubric,
            context=made.task.context,
            prompt=made.task.questions.texts[q],
            text=made.model.decode(ids),
            prompt_ids=made.task.prompts[q],
            text_ids=ids,
        )
        for q, ids in rows
        for rubric in ("steering", "coherence")
    ]
    found = {j.key: j.value if isinstance(j, Score) else None for j in judge.score(items)}
    return [found[f"{q}|steering"] for q, _ in rows], [found[f"{q}|coherence"] for q, _ in rows]


def run_loop(made: Setup, timed: int | None) -> tuple[float, float | None, str | None, int, int]:
    """(seconds for the whole grid, best coherent effect, its name, configurations run, configurations in all)"""
    grid: list[tuple[Candidate, float]] = [(c, d) for c in made.candidates for d in GRID]
    drawn = grid
    if timed is not None and timed < len(grid):
        drawn = [grid[i] for i in np.random.default_rng(0).choice(len(grid), timed, replace=False)]
    judge = new_judge(made.model)
    plain, _ = judged(made, judge, list(straightforward(made, None, 0.0)))
    best, name = None, None
    started = time.perf_counter()
    for candidate, dose in drawn:
        traits, coherences = judged(made, judge, list(straightforward(made, candidate, dose)))
        pairs = [
            (a - b) * made.task.sign
            for a, b in zip(traits, plain, strict=True)
            if a is not None and b is not None
        ]
        known = [c for c in coherences if c is not None]
        if pairs and known and np.mean(known) >= COHERENT and (best is None or np.mean(pairs) > best):
            best, name = float(np.mean(pairs)), f"{candidate.name}|{dose:g}"
    seconds = (time.perf_counter() - started) * len(grid) / len(drawn)
    whole = len(drawn) == len(grid)
    return seconds, best if whole else None, name if whole else None, len(drawn), len(grid)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trait", default="register/bureaucratic")
    parser.add_argument("--quick", action="store_true", help="3 layers × 2 methods in place of 6 × 3")
    parser.add_argument(
        "--timed", type=int, help="run so many configurations of the loop and scale its time up"
    )
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    layers = [11, 15, 19] if given.quick else [9, 11, 13, 15, 17, 19]
    made = setup(given.trait, layers, 2 if given.quick else 3)
    print(f"{os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")
    print(f"{given.trait}: {len(made.candidates)} candidates, {QUESTIONS} questions × {TOKENS} tokens")
    seconds, effect, name, settings = run_search(made)
    print(
        f"  search  {seconds:8.1f} s  {settings:4d} settings   best coherent effect {effect:+.1f} ({name})",
        flush=True,
    )
    loop, loop_effect, loop_name, ran, whole = run_loop(made, given.timed)
    scaled = "" if ran == whole else f" (scaled up from {ran})"
    found = "" if loop_effect is None else f"   best coherent effect {loop_effect:+.1f} ({loop_name})"
    print(f"  loop    {loop:8.1f} s  {whole:4d} settings{scaled}{found}")
    print(f"  ratio   {loop / seconds:8.1f}    (goal: at least 8)")


if __name__ == "__main__":
    main()
