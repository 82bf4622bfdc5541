"""Numbers made of answers, and the scorer that generates and judges each row once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from resources.judges.protocol import Abstention, JudgeItem, Judgement, Score
from trait_assets.steering.scoring import (
    BASELINE,
    Answer,
    Request,
    bootstrap_interval,
    distinct_ngrams,
    measure,
    paired_change,
    vector_hash,
)


def answer(question: int, trait: float | None, coherence: float | None = 90.0) -> Answer:
    return Answer(question, "text", (1, 2, 3), "stop", trait, coherence, 1.0)


def test_distinct_ngrams() -> None:
    assert distinct_ngrams([1, 2, 3, 4]) == 1.0
    assert distinct_ngrams([1, 2, 3, 1, 2, 3, 1, 2]) == 3 / 6
    assert distinct_ngrams([7] * 12) == 1 / 10
    assert distinct_ngrams([1, 2]) is None


def test_interval_covers_at_its_level_on_small_samples() -> None:
    rng = np.random.default_rng(0)
    for n in (6, 12):
        hits = plain = 0
        for seed in range(400):
            sample = rng.normal(5, 20, n)
            low, high = bootstrap_interval(sample, seed=seed, draws=1000)
            hits += low <= 5 <= high
            resampled = sample[np.random.default_rng(seed).integers(0, n, (1000, n))].mean(axis=1)
            a, b = np.quantile(resampled, [0.025, 0.975])
            plain += a <= 5 <= b
        # 95 % within three standard errors of 400 draws; the plain percentile interval is the one that is too
        # short
        assert hits / 400 >= 0.917
        assert plain < hits


def test_interval_is_deterministic_and_shrinks_to_the_percentile_interval() -> None:
    sample = np.random.default_rng(1).normal(0, 1, 400)
    assert bootstrap_interval(sample, seed=5) == bootstrap_interval(sample, seed=5)
    low, high = bootstrap_interval(sample, draws=20_000)
    half = 1.96 * sample.std(ddof=1) / 20
    assert low == pytest.approx(sample.mean() - half, abs=0.01)
    assert high == pytest.approx(sample.mean() + half, abs=0.01)


def test_change_is_paired_and_counts_the_wrong_way() -> None:
    before = [answer(0, 10), answer(1, 80), answer(2, 50), answer(3, None)]
    after = [answer(0, 30), answer(1, 90), answer(2, 45), answer(3, 99)]
    numbers = measure(after, before)
    assert numbers.change.mean == pytest.approx((20 + 10 - 5) / 3)
    assert numbers.change.n == 3
    assert numbers.change.wrong_way == pytest.approx(1 / 3)
    assert numbers.trait_mean == pytest.approx((30 + 90 + 45 + 99) / 4)
    lowered = measure(after, before, sign=-1)
    assert lowered.change.wrong_way == pytest.approx(2 / 3)
    assert lowered.success_rate == pytest.approx(2 / 4)
    assert numbers.success_rate == pytest.approx(2 / 4)


def test_no_scores_make_no_numbers() -> None:
    numbers = measure([answer(0, None, None)], [answer(0, 4.0)])
    assert numbers.trait_mean is None
    assert numbers.change.mean is None
    assert numbers.abstentions == 1
    assert not numbers.coherent(0)
    assert paired_change([3.0]).low is None


def test_a_dose_that_empties_answers_is_not_coherent() -> None:
    answers = [answer(i, 90, 95) for i in range(7)] + [answer(7 + i, None, None) for i in range(3)]
    numbers = measure(answers, answers)
    assert numbers.coherence_mean == 95
    assert not numbers.coherent(70)
    # one of ten may go unscored
    assert measure(answers[:7] + answers[8:9], answers).coherent(70)


def test_sure_coherence_asks_for_more() -> None:
    answers = [answer(i, 50, c) for i, c in enumerate([95, 50, 90, 60, 85, 62])]
    numbers = measure(answers, answers)
    assert numbers.coherent(70)
    assert not numbers.coherent(70, confidence=0.9)


def test_hash_follows_content() -> None:
    v = np.arange(4, dtype=np.float32)
    assert vector_hash(v) == vector_hash(v.copy())
    assert vector_hash(v) != vector_hash(v + 1e-6)


def asked(toy: Any, settings: Sequence[Any], half: str = "report") -> dict[str, Any]:
    return {toy.task.trait: (toy.task, [Request(s, half) for s in settings])}  # type: ignore[arg-type]


def test_unchanged_rows_are_never_generated_again(toy: Any) -> None:
    made = toy(1)
    made.scorer().answers(asked(made, [BASELINE]))
    first = list(made.model.calls)
    again = made.scorer()
    again.answers(asked(made, [BASELINE]))
    assert made.model.calls == first
    assert again.generated == {}
    assert again.reused == len(made.task.questions.report)


def test_row_keys_hold_everything_that_decides_a_text(toy: Any) -> None:
    from dataclasses import replace

    from resources.models.rows import GenerationOptions, Intervention
    from trait_assets.steering.scoring import Scorer, Setting

    made = toy(1)

    def scorer(**changes: Any) -> Scorer:
        given: dict[str, Any] = {
            "options": GenerationOptions(max_new_tokens=8),
            "identity": {"model": "m", "revision": "1"},
            "steer_from": "response",
            "cache_for": lambda trait: made.cache,
        } | changes
        return Scorer(made.model.generate, made.judge, **given)

    v = np.zeros(4, dtype=np.float32)
    v[0] = 1
    base = Intervention(2, v, 3.0)

    def key(scorer: Scorer, intervention: Intervention, prompt: tuple[int, ...] = (1, 2)) -> str:
        return scorer.row_key(prompt, Setting("vector", "any name", (intervention,)))

    plain = scorer()
    keys = {
        key(plain, base),
        key(plain, base, (1, 3)),
        key(plain, replace(base, layer=3)),
        key(plain, replace(base, coefficient=3.001)),
        key(plain, replace(base, vector=v[::-1].copy())),
        key(plain, replace(base, operation="add_norm_preserving")),
        key(plain, replace(base, component="attn_contribution")),
        key(scorer(steer_from="all"), base),
        key(scorer(identity={"model": "m", "revision": "2"}), base),
        key(scorer(options=GenerationOptions(max_new_tokens=9)), base),
        key(scorer(options=GenerationOptions(max_new_tokens=8, seed=1)), base),
    }
    assert len(keys) == 11
    assert key(plain, replace(base, vector=v.copy())) == key(plain, base)


def test_a_failure_keeps_the_rows_made_before_it(toy: Any) -> None:
    made = toy(2)
    real = made.model.generate

    def breaks(rows: Any) -> Iterator[Any]:
        for i, row in enumerate(real(rows)):
            if i == 3:
                raise MemoryError("no room")
            yield row

    made.model.generate = breaks
    with pytest.raises(MemoryError):
        made.scorer().answers(asked(made, [BASELINE]))
    assert len(made.cache) == 3
    made.model.generate = real
    resumed = made.scorer()
    resumed.answers(asked(made, [BASELINE]))
    assert resumed.generated == {made.task.trait: len(made.task.questions.report) - 3}


def test_abstentions_stay_abstentions(toy: Any) -> None:
    made = toy(3)

    def shy(items: Sequence[JudgeItem]) -> Iterator[Judgement]:
        for item in items:
            if item.rubric == "steering" and item.prompt.endswith(" 1"):
                yield Abstention(item.key, "refusal")
            else:
                yield Score(item.key, 80.0)

    made.judge = shy
    made.scorer().answers(asked(made, [BASELINE]))
    half = "report" if 1 in made.task.questions.report else "search"
    answers = made.scorer().answers(asked(made, [BASELINE], half))[made.task.trait]["baseline", half]
    shy_one = next(a for a in answers if a.question == 1)
    assert shy_one.trait is None
    assert shy_one.trait_reason == "refusal"
    assert shy_one.coherence == 80.0


def test_judge_is_asked_with_the_plain_prompt_and_own_rubric(toy: Any) -> None:
    from dataclasses import replace

    from trait_assets.steering.scoring import PROMPTING

    made = toy(4)
    task = replace(
        made.task,
        prompted=tuple((9, *p) for p in made.task.prompts),
        questions=replace(made.task.questions, eval_prompt="Q {question} A {answer}"),
    )
    seen: list[JudgeItem] = []

    def watching(items: Sequence[JudgeItem]) -> Iterator[Judgement]:
        seen.extend(items)
        return (Score(i.key, 50.0) for i in items)

    made.judge = watching
    made.scorer().answers({task.trait: (task, [Request(PROMPTING, "search")])})
    assert {i.rubric for i in seen} == {"steering", "coherence"}
    assert len({i.key for i in seen}) == len(seen) == 2 * len(task.questions.search)
    for item in seen:
        assert item.prompt_ids in task.prompts
        assert item.template == ("Q {question} A {answer}" if item.rubric == "steering" else None)
        assert item.text_ids


def test_a_judge_that_loses_items_is_an_error(toy: Any) -> None:
    made = toy(5)
    made.judge = lambda items: iter([Score(items[0].key, 1.0)])
    with pytest.raises(RuntimeError, match="judge answered 1 of"):
        made.scorer().answers(asked(made, [BASELINE]))
