"""The LLM judge against a real HTTP server on the loopback, with the faults that such servers have."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resources.api_client import _Gate, retry_after
from resources.judges.client import Abilities, ClientSettings, classify
from resources.judges.openai_judge import OpenAIJudge, OpenAISettings, openai_identity
from resources.judges.protocol import Abstention, JudgeItem, Judgement, Score, TraitContext
from resources.judges.resource import JudgeResource
from storage.artifacts import ArtifactStore
from storage.errors import UserError
from storage.rows import RowCache
from trait_assets.scenarios.vetting import Candidate, apply_thresholds

ROOT = Path(__file__).parents[2]
KEY = "sk-test-3f8a1c77d2e94b60"
CONTEXT = TraitContext("mood/loud", "HIGH (70-100): loud shouting.\n\nLOW (0-30): quiet whispering.")


def items(n: int, tag: str = "text", rubric: str = "steering") -> list[JudgeItem]:
    return [
        JudgeItem(f"k{i}", rubric, CONTEXT, f"question {i}", f"{tag} number {i} is loud")  # type: ignore[arg-type]
        for i in range(n)
    ]


@pytest.fixture
def caches(tmp_path: Path) -> Callable[[str], RowCache]:
    store = ArtifactStore(tmp_path / "store")
    return lambda trait: RowCache(store, f"_cache/judgements/{trait}")


@pytest.fixture
def make(openai_server: Any, caches: Callable[[str], RowCache]) -> Callable[..., OpenAIJudge]:
    def build(**options: Any) -> OpenAIJudge:
        key = options.pop("api_key", KEY)
        progress = options.pop("on_progress", None)
        settings = OpenAISettings(**{"model": "loopback-1", "base_url": openai_server.base_url, **options})
        return OpenAIJudge(settings, caches, progress, api_key=key)

    return build


def module_of(server: Any) -> Any:
    return sys.modules[type(server).__module__]


def constant(server: Any, value: float) -> None:
    server.rule = lambda request: value


# what a run gives


def test_scores_come_in_order_and_nothing_is_asked_twice(openai_server: Any, make: Any) -> None:
    openai_server.latency_s = 0.02
    openai_server.rule = lambda request: int(request.sections["QUESTION"].split()[1])
    seen: list[str] = []
    progress: list[dict[str, float]] = []
    judge = make(max_concurrency=8, on_progress=progress.append)
    judged = list(judge.score(items(60), on_judged=lambda j: seen.append(j.key)))
    assert [j.key for j in judged] == [f"k{i}" for i in range(60)]
    assert sorted(seen) == sorted(f"k{i}" for i in range(60))
    # the value is the expectation over the server's alternatives, near what it says
    assert all(isinstance(j, Score) and abs(j.value - i) < 4 for i, j in enumerate(judged))
    assert 2 <= openai_server.most_in_flight <= 8
    assert set(openai_server.asked.values()) == {1}
    assert judge.usage()["calls"] == 60
    assert progress[-1]["items_left"] == 0

    again = make()
    assert list(again.score(items(60))) == judged
    assert again.usage() == {**again.usage(), "calls": 0.0, "requests": 0.0, "cache_hits": 60.0}
    assert len(openai_server.requests) == 60


def test_the_expectation_is_the_servers_distribution(openai_server: Any, make: Any) -> None:
    completion = module_of(openai_server).completion
    reply = module_of(openai_server).Reply
    openai_server.script = lambda request: reply(
        200, completion("80", [("80", 0.6), ("90", 0.2), ("no", 0.2)])
    )
    (score,) = make().score(items(1))
    assert isinstance(score, Score)
    assert score.value == pytest.approx((80 * 0.6 + 90 * 0.2) / 0.8)
    assert score.mass == pytest.approx(0.8)
    body = openai_server.requests[0].body
    assert (body["temperature"], body["logprobs"], body["top_logprobs"]) == (0, True, 20)


def test_twins_in_one_run_are_asked_once(openai_server: Any, make: Any) -> None:
    openai_server.latency_s = 0.05
    twins = [JudgeItem(f"k{i}", "steering", CONTEXT, "same", "same loud text") for i in range(12)]
    judged = list(make().score(twins))
    assert len({j.value for j in judged if isinstance(j, Score)}) == 1
    assert [j.key for j in judged] == [f"k{i}" for i in range(12)]
    assert len(openai_server.requests) == 1


def test_what_is_changed_is_asked_again_and_nothing_else(openai_server: Any, make: Any) -> None:
    list(make().score(items(10)))
    changed = items(10)
    changed[4] = JudgeItem("k4", "steering", CONTEXT, "question 4", "another text")
    list(make().score(changed))
    assert len(openai_server.requests) == 11
    list(make(model="loopback-2").score(items(10)))
    assert len(openai_server.requests) == 21


def test_another_limit_of_mass_reads_again_without_asking(openai_server: Any, make: Any) -> None:
    completion, reply = module_of(openai_server).completion, module_of(openai_server).Reply
    openai_server.script = lambda request: reply(200, completion("80", [("80", 0.2), ("I", 0.8)]))
    (strict,) = make(min_mass=0.25).score(items(1))
    (lax,) = make(min_mass=0.1).score(items(1))
    assert strict == Abstention("k0", "low_mass", strict.detail)
    assert isinstance(lax, Score)
    assert lax.value == pytest.approx(80)
    assert len(openai_server.requests) == 1


def test_empty_and_overlong_texts_are_abstentions_that_cost_nothing(openai_server: Any, make: Any) -> None:
    odd = [
        JudgeItem("a", "response", CONTEXT, "p", ""),
        JudgeItem("b", "response", CONTEXT, "p", " \n\t"),
        JudgeItem("c", "steering", CONTEXT, "p", "x" * 30_000),
        JudgeItem("d", "scenario", CONTEXT, ""),
    ]
    judged = list(make().score(odd))
    assert [(j.key, j.reason) for j in judged if isinstance(j, Abstention)] == [
        ("a", "empty"),
        ("b", "empty"),
        ("c", "too_long"),
        ("d", "empty"),
    ]
    assert openai_server.requests == []


def test_coherence_asks_for_language_then_for_the_topic(openai_server: Any, make: Any) -> None:
    def rule(request: Any) -> float:
        sections = request.sections
        if "PROMPT" in sections:
            return 20 if "ducks" in sections["TEXT"] else 90
        return 15 if "loop" in sections["TEXT"] else 95

    openai_server.rule = rule
    texts = ["A fine answer.", "All about ducks.", "loop loop loop"]
    good, off_topic, broken = make().score([JudgeItem(t, "coherence", CONTEXT, "Tea?", t) for t in texts])
    assert good.value > 85
    assert good.detail["on_topic"] > 80
    assert off_topic.value == 50
    assert off_topic.detail["language"] > 85
    assert broken.value < 25
    # the broken text was not worth a second question
    assert len(openai_server.requests) == 5


# tokenisers and models that differ


@pytest.mark.parametrize(
    ("tokeniser", "read"),
    [("whole", "logprobs"), ("space", "logprobs"), ("digits", "text"), ("none", "text")],
)
def test_every_tokeniser_gives_the_score(openai_server: Any, make: Any, tokeniser: str, read: str) -> None:
    openai_server.tokeniser = tokeniser
    openai_server.rule = lambda request: 85
    (score,) = make().score(items(1))
    assert isinstance(score, Score)
    assert score.value == pytest.approx(85, abs=2)
    assert score.detail["read"] == read
    assert len(openai_server.requests) == 1


def test_few_alternatives_score_with_a_flag(openai_server: Any, make: Any) -> None:
    openai_server.tokeniser = "few"
    constant(openai_server, 80)
    (score,) = make().score(items(1))
    assert isinstance(score, Score)
    assert score.value == pytest.approx((80 * 0.3 + 85 * 0.1) / 0.4)
    assert score.mass == pytest.approx(0.4)
    assert score.detail["low_mass"]
    assert score.detail["fewer_alternatives"]


@pytest.mark.parametrize(
    ("said", "top", "value"),
    [
        ("100", [("10", 0.9), ("90", 0.1)], 100),
        ("85", [("8", 0.6), ("80", 0.3), ("7", 0.1)], 85),
        ("85/100", [("85", 0.9), ("80", 0.1)], 84.5),
    ],
)
def test_a_first_token_that_is_a_piece_of_the_number_is_no_score(
    openai_server: Any, make: Any, said: str, top: list[tuple[str, float]], value: float
) -> None:
    completion, reply = module_of(openai_server).completion, module_of(openai_server).Reply
    openai_server.script = lambda request: reply(200, completion(said, top))
    (score,) = make().score(items(1))
    assert isinstance(score, Score)
    assert score.value == pytest.approx(value)
    (forced,) = make(scoring="logprobs").score(items(1))
    assert isinstance(forced, Score if value == 84.5 else Abstention)


def test_a_cut_answer_of_a_digit_tokeniser_is_asked_for_a_text(openai_server: Any, make: Any) -> None:
    completion, reply = module_of(openai_server).completion, module_of(openai_server).Reply

    def script(request: Any) -> Any:
        if request.body.get("logprobs"):
            return reply(200, completion("8 out of the", [("8", 0.9), ("7", 0.1)], finish="length"))
        return reply(200, completion("8 of the 9 sentences are loud. Score: 83"))

    openai_server.script = script
    (score,) = make().score(items(1))
    assert isinstance(score, Score)
    assert score.value == 83
    assert list(make().score(items(1))) == [score]
    assert len(openai_server.requests) == 2
    (forced,) = make(scoring="logprobs").score(items(1))
    assert forced.reason == "split_digits"


@pytest.mark.parametrize(
    "refused",
    [
        {"max_tokens"},
        {"temperature"},
        {"logprobs"},
        {"max_tokens", "temperature", "logprobs"},
        {"system"},
        {"max_tokens", "max_completion_tokens"},
    ],
)
def test_a_refused_parameter_is_adapted_to_once(openai_server: Any, make: Any, refused: set[str]) -> None:
    openai_server.reject = refused
    constant(openai_server, 70)
    judged = list(make().score(items(30)))
    assert all(isinstance(j, Score) and abs(j.value - 70) < 2 for j in judged)
    assert len(openai_server.requests) == 30 + len(refused)
    # and remembered: a second judge of the process does not run into it again
    list(make().score(items(5, "other")))
    assert len(openai_server.requests) == 35 + len(refused)


def test_reasoning_families_are_known_by_name() -> None:
    for model in ("gpt-5", "gpt-5-mini", "o3", "o4-mini", "openai/gpt-5-nano"):
        abilities = Abilities.expected(model)
        assert (abilities.token_param, abilities.temperature, abilities.logprobs) == (
            "max_completion_tokens",
            False,
            False,
        )
    for model in ("gpt-4.1-mini", "gpt-4o", "gpt-5-chat-latest", "olmo-2", "o1ive", "llama3"):
        assert Abilities.expected(model) == Abilities()


def test_a_model_that_thinks_aloud_gets_room_and_is_read_as_text(openai_server: Any, make: Any) -> None:
    completion, reply = module_of(openai_server).completion, module_of(openai_server).Reply

    def script(request: Any) -> Any:
        if request.body["max_tokens"] < 1000:
            return reply(200, completion("<think>Let me", [("<think>", 0.99)], finish="length"))
        return reply(200, completion("<think>Perhaps 90? No.</think>\n62"))

    openai_server.script = script
    judged = list(make().score(items(8)))
    assert [j.value for j in judged if isinstance(j, Score)] == [62] * 8
    assert len(openai_server.requests) == 9


# abstentions


def test_filters_refusals_and_garbage_are_abstentions_with_their_reason(
    openai_server: Any, make: Any
) -> None:
    module = module_of(openai_server)
    completion, reply, error_body = module.completion, module.Reply, module.error_body
    replies = {
        0: reply(400, error_body("filtered", "content_filter")),
        1: reply(200, completion("", finish="content_filter")),
        2: reply(200, completion(None, refusal="I can't help with that.")),
        3: reply(200, completion("I can't rate this, it would be 100% wrong.", [("I", 0.99)])),
        4: reply(200, completion("There are 2 of them.")),
        5: reply(200, completion("Score: 250")),
        6: reply(200, completion("")),
        7: reply(
            400, error_body("This model's maximum context length is 8192 tokens", "context_length_exceeded")
        ),
    }
    openai_server.script = lambda request: replies.get(int(request.sections["QUESTION"].split()[1]))
    judged = list(make(max_concurrency=1).score(items(9)))
    reasons = [j.reason if isinstance(j, Abstention) else "score" for j in judged]
    assert reasons == [
        "content_filter",
        "content_filter",
        "refusal",
        "refusal",
        "unparseable",
        "out_of_range",
        "empty",
        "too_long",
        "score",
    ]
    # an answer is an answer: asked again only on request
    asked = len(openai_server.requests)
    judge = make()
    list(judge.score(items(9)))
    assert len(openai_server.requests) == asked + 1
    assert judge.usage()["abstentions"] == 8
    openai_server.script = None
    assert all(isinstance(j, Score) for j in make(retry_abstentions=True).score(items(9)))


def test_rows_that_always_time_out_are_counted_not_dropped(openai_server: Any, make: Any) -> None:
    reply = module_of(openai_server).Reply

    def script(request: Any) -> Any:
        return reply(delay_s=5.0) if "number 3 " in request.prompt else None

    openai_server.script = script
    judge = make(timeout_s=0.3, max_attempts=2)
    judged = list(judge.score(items(8)))
    assert [j.reason for j in judged if isinstance(j, Abstention)] == ["timeout"]
    assert len(judged) == 8
    summary = apply_thresholds([Candidate(j.key, "positive", j) for j in judged]).summary()
    assert (summary["n"], summary["n_scored"], summary["abstained_timeout"]) == (8, 7, 1)
    assert judge.usage()["abstentions"] == 1
    # no answer is kept for it: the next run asks for exactly this one
    openai_server.script = None
    before = len(openai_server.requests)
    assert all(isinstance(j, Score) for j in make(timeout_s=5).score(items(8)))
    assert len(openai_server.requests) == before + 1


def test_garbage_leaves_the_mean_alone_and_fails_the_gate_above_the_limit(
    openai_server: Any, make: Any
) -> None:
    module = module_of(openai_server)
    openai_server.rule = lambda request: 5 * (int(request.sections["QUESTION"].split()[1]) % 20)
    clean = [j.value for j in make().score(items(120, "clean")) if isinstance(j, Score)]
    assert len(clean) == 120

    def vetted(every: int) -> tuple[list[Judgement], Any]:
        """Garbage for every so many-th question, which are the highest scores: failures follow content."""

        def script(request: Any) -> Any:
            if (int(request.sections["QUESTION"].split()[1]) + 1) % every:
                return None
            return module.Reply(200, module.completion(module.GARBAGE, [("It", 0.9)]))

        openai_server.script = script
        judged = list(make().score(items(120, f"every {every}")))
        rows = [
            Candidate(f"{side}{j.key}", side, j if side == "positive" else Score(j.key, 5.0))  # type: ignore[arg-type]
            for side in ("positive", "negative")
            for j in judged
        ]
        return judged, apply_thresholds(rows, min_per_side=2)

    judged, few = vetted(20)
    # 6 of 120: the rate is five in a hundred, and the mean is that of the very rows that have a score
    assert [i for i, j in enumerate(judged) if isinstance(j, Abstention)] == list(range(19, 120, 20))
    assert few.abstention_rate == pytest.approx(6 / 240)
    assert few.positive.abstained / few.positive.total == pytest.approx(0.05)
    scored = [value for i, value in enumerate(clean) if (i + 1) % 20]
    assert few.positive.mean == pytest.approx(sum(scored) / 114)
    assert few.abstention_reasons == {"low_mass": 6}
    assert few.passed
    _, many = vetted(4)
    assert many.abstention_rate == pytest.approx(30 / 240)
    assert not many.passed
    assert "abstained on 30 of 240" in many.problems[0]
    assert "low_mass 30" in many.problems[0]


# faults


def _fault_run(
    openai_server: Any, make: Any, n: int, concurrency: int, timeout_s: float, seed: int
) -> tuple[list[Judgement], OpenAIJudge]:
    openai_server.faults = module_of(openai_server).Faults(
        rate_limited=0.60,
        retry_after=0.25,
        server_error=0.05,
        reset=0.02,
        hang=0.02,
        hang_s=2 * timeout_s,
        garbage=0.03,
        content_filter=0.02,
        seed=seed,
    )
    judge = make(max_concurrency=concurrency, timeout_s=timeout_s)
    return list(judge.score(items(n))), judge


def _check_fault_run(openai_server: Any, judged: list[Judgement], judge: OpenAIJudge, n: int) -> None:
    assert [j.key for j in judged] == [f"k{i}" for i in range(n)]
    abstained = {j.key for j in judged if isinstance(j, Abstention)}
    bad = {
        f"k{request.sections['QUESTION'].split()[1]}"
        for request in openai_server.requests
        if openai_server.outcome.get(request.key) in ("garbage", "content_filter")
    }
    assert abstained == bad
    assert set(openai_server.answered.values()) == {1}
    assert len(openai_server.answered) == n
    assert judge.usage()["calls"] == n


def test_no_item_is_lost_to_faults(openai_server: Any, make: Any) -> None:
    # with this seed no question hangs twice, which would be ten seconds of waiting
    judged, judge = _fault_run(openai_server, make, 150, concurrency=24, timeout_s=5.0, seed=6)
    _check_fault_run(openai_server, judged, judge, 150)
    reasons = Counter(j.reason for j in judged if isinstance(j, Abstention))
    assert set(reasons) <= {"low_mass", "content_filter"}


@pytest.mark.slow
def test_fault_run_of_two_thousand(openai_server: Any, make: Any) -> None:
    """How long it takes, and of what the rate allows: `benchmarks/judges.py --only rate`."""
    judged, judge = _fault_run(openai_server, make, 2000, concurrency=48, timeout_s=15.0, seed=1)
    _check_fault_run(openai_server, judged, judge, 2000)
    # every kind of fault was met, in about its share
    met = Counter(openai_server.replied)
    total = len(openai_server.requests)
    for kind, share in (("rate_limited", 0.6), ("server_error", 0.05), ("reset", 0.02), ("hang", 0.02)):
        assert met[kind] / total == pytest.approx(share, rel=0.35), kind
    assert sum(isinstance(j, Abstention) for j in judged) == met["garbage"] + met["content_filter"] > 0
    # the second run has all of it, and asks nothing
    openai_server.reset()
    assert list(make().score(items(2000))) == judged
    assert openai_server.requests == []


def test_a_rate_limit_that_nobody_passes_is_waited_for_together(openai_server: Any, make: Any) -> None:
    openai_server.capacity = 40.0
    openai_server.faults = module_of(openai_server).Faults(retry_after=0.2)
    judge = make(max_concurrency=16)
    judged = list(judge.score(items(120)))
    assert all(isinstance(j, Score) for j in judged)
    # requests refused stay a fraction of what hammering would make of 120 items over three seconds
    assert judge.usage()["requests"] < 6 * 120


def test_the_clients_own_rate_is_kept(openai_server: Any, make: Any) -> None:
    list(make(requests_per_minute=60 * 40).score(items(40)))
    times = [request.at for request in openai_server.requests]
    assert times[-1] - times[0] >= 39 / 40 * 0.9


def test_a_dead_server_ends_the_run_with_a_remedy(caches: Any) -> None:
    settings = OpenAISettings(model="m", base_url="http://127.0.0.1:9/v1", timeout_s=1.0)
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached") as error:
        list(OpenAIJudge(settings, caches, api_key=KEY).score(items(100)))
    assert "base_url" in str(error.value)
    assert time.monotonic() - start < 30


def test_a_server_that_dies_under_way_keeps_what_was_scored(openai_server: Any, make: Any) -> None:
    module = module_of(openai_server)
    answered: list[int] = []

    def script(request: Any) -> Any:
        if len(answered) >= 20:
            return module.Reply(500, module.error_body("dead"))
        answered.append(1)
        return None

    openai_server.script = script
    judge = make(max_concurrency=4, max_attempts=1)
    got: list[Judgement] = []
    with pytest.raises(UserError, match="in a row got no answer"):
        got.extend(judge.score(items(200)))
    assert sum(isinstance(j, Score) for j in got) >= 16
    assert len(openai_server.requests) < 60
    openai_server.script = None
    openai_server.reset()
    assert len(list(make().score(items(200)))) == 200
    assert len(openai_server.requests) == 180


# ends at once


@pytest.mark.parametrize(
    ("status", "message", "code", "remedy", "requests"),
    [
        (401, f"Incorrect API key provided: {KEY}.", "invalid_api_key", "OPENAI_API_KEY", 1),
        (403, "Project has no access to this model", None, "OPENAI_API_KEY", 1),
        (429, "You exceeded your current quota", "insufficient_quota", "billing", 1),
        (404, "The model `nope` does not exist", "model_not_found", "model name", 1),
        # may be the question's fault: the options are to blame when the third one fares no better
        (400, "Invalid value somewhere", None, "options", 3),
    ],
)
def test_what_no_retry_can_mend_ends_at_once(
    openai_server: Any, make: Any, status: int, message: str, code: str | None, remedy: str, requests: int
) -> None:
    module = module_of(openai_server)
    openai_server.script = lambda request: module.Reply(status, module.error_body(message, code))
    with pytest.raises(UserError) as error:
        list(make(max_concurrency=16).score(items(50)))
    assert remedy in str(error.value)
    assert "what was scored is kept" in str(error.value)
    assert KEY not in str(error.value)
    assert len(openai_server.requests) == requests


def test_a_question_that_is_refused_does_not_keep_the_others_from_being_asked(
    openai_server: Any, make: Any
) -> None:
    module = module_of(openai_server)

    def script(request: Any) -> Any:
        if "number 0 " in request.prompt:
            return module.Reply(400, module.error_body("Invalid value somewhere"))
        return None

    openai_server.script = script
    judged = list(make().score(items(12)))
    assert [j.reason for j in judged if isinstance(j, Abstention)] == ["rejected"]
    assert isinstance(judged[0], Abstention)


def test_quota_that_runs_out_under_way_keeps_what_was_scored(openai_server: Any, make: Any) -> None:
    module = module_of(openai_server)

    def script(request: Any) -> Any:
        if len(openai_server.requests) > 30:
            return module.Reply(
                429, module.error_body("You exceeded your current quota", "insufficient_quota")
            )
        return None

    openai_server.script = script
    with pytest.raises(UserError, match="quota"):
        list(make(max_concurrency=4).score(items(200)))
    assert len(openai_server.requests) <= 36
    openai_server.script = None
    openai_server.reset()
    list(make().score(items(200)))
    assert len(openai_server.requests) == 170


@pytest.mark.parametrize(
    ("limit", "fewest", "most"),
    [({"max_calls": 25}, 25, 25), ({"max_tokens": 2500}, 20, 25), ({"max_cost_usd": 0.01}, 80, 100)],
)
def test_the_budget_is_kept(
    openai_server: Any, make: Any, limit: dict[str, Any], fewest: int, most: int
) -> None:
    # every answer of the server reports 101 tokens; at a dollar per million, 100 of them are a cent
    prices = {"prompt_usd_per_million": 1.0, "completion_usd_per_million": 1.0}
    judge = make(max_concurrency=8, **limit, **prices)
    with pytest.raises(UserError, match="budget") as error:
        list(judge.score(items(300)))
    assert next(iter(limit)) in str(error.value)
    assert fewest <= judge.usage()["calls"] <= most
    # the budget is the process's: the next judge of the same server has nothing left, but reads what is kept
    again = make(**limit, **prices)
    with pytest.raises(UserError, match="budget"):
        list(again.score(items(300)))
    assert again.usage()["cache_hits"] == judge.usage()["calls"]


def test_usage_counts_tokens_and_cost(openai_server: Any, make: Any) -> None:
    judge = make(prompt_usd_per_million=2.0, completion_usd_per_million=8.0)
    list(judge.score(items(10)))
    usage = judge.usage()
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (1000, 10)
    assert usage["cost_usd"] == pytest.approx((1000 * 2 + 10 * 8) / 1e6)
    assert usage["priced"] == 1
    assert make().usage()["priced"] == 0


def test_prices_are_those_of_the_family() -> None:
    assert ClientSettings("gpt-4.1-mini-2025-04-14").price() == (0.4, 1.6)
    assert ClientSettings("gpt-4.1-mini", base_url="http://localhost:8000/v1").price() is None
    assert ClientSettings("unheard-of").price() is None


# kill and cancel


SCORE_SLOWLY = """
import json, sys
sys.path.insert(0, {root!r})
from resources.judges.openai_judge import OpenAIJudge, OpenAISettings
from resources.judges.protocol import JudgeItem, TraitContext
from storage.artifacts import ArtifactStore
from storage.rows import RowCache
store = ArtifactStore({store!r})
context = TraitContext("mood/loud", {definition!r})
items = [
    JudgeItem(f"k{{i}}", "steering", context, f"question {{i}}", f"text number {{i}} is loud")
    for i in range(400)
]
judge = OpenAIJudge(
    OpenAISettings(model="loopback-1", base_url={base_url!r}, max_concurrency=8),
    lambda trait: RowCache(store, f"_cache/judgements/{{trait}}"),
    api_key="k",
)
print(json.dumps([getattr(j, "value", None) for j in judge.score(items)]))
"""


def test_kill_in_the_middle_asks_nothing_again_but_what_was_in_flight(
    openai_server: Any, tmp_path: Path
) -> None:
    openai_server.latency_s = 0.02
    code = textwrap.dedent(SCORE_SLOWLY).format(
        root=str(ROOT),
        store=str(tmp_path / "store"),
        definition=CONTEXT.definition,
        base_url=openai_server.base_url,
    )

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    for goal in (60, 180):
        process = start()
        deadline = time.monotonic() + 120
        while len(openai_server.answered) < goal:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    cache = RowCache(ArtifactStore(tmp_path / "store"), "_cache/judgements/mood/loud")
    kept = len(cache)
    assert kept >= 180 - 16
    asked_before = dict(openai_server.asked)
    out, err = start().communicate(timeout=200)
    assert len(json.loads(out)) == 400, err
    assert None not in json.loads(out)
    # what was kept was not asked again …
    assert sum(openai_server.asked.values()) - sum(asked_before.values()) == 400 - kept
    # … and what was asked twice is at most what was in flight at each kill
    assert sum(count - 1 for count in openai_server.asked.values()) <= 2 * 8


def test_a_closed_generator_stops_asking_and_keeps_what_came(
    openai_server: Any, make: Any, caches: Any
) -> None:
    openai_server.latency_s = 0.02
    judge = make(max_concurrency=4)
    running = judge.score(items(500))
    for _ in range(10):
        next(running)
    running.close()
    asked = len(openai_server.requests)
    time.sleep(0.3)
    assert len(openai_server.requests) == asked < 100
    assert len(caches(CONTEXT.trait)) >= 10


def test_a_cache_that_cannot_write_is_an_error_not_a_loss(openai_server: Any) -> None:
    class Broken:
        def get(self, key: str) -> None:
            return None

        def put_many(self, rows: Any) -> None:
            raise OSError("disk full")

    settings = OpenAISettings(model="loopback-1", base_url=openai_server.base_url)
    openai_server.latency_s = 0.01
    with pytest.raises(OSError, match="disk full"):
        list(OpenAIJudge(settings, lambda trait: Broken(), api_key=KEY).score(items(300)))
    # answers that cannot be kept are not bought: the first one to fail ends the asking
    assert len(openai_server.requests) <= 2 * settings.max_concurrency


def test_it_works_inside_a_running_event_loop(make: Any) -> None:
    async def notebook() -> list[Judgement]:
        return list(make().score(items(3)))

    assert len(asyncio.run(notebook())) == 3


# the key, the identity, the resource


def test_the_key_is_nowhere(
    openai_server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    store = ArtifactStore(tmp_path / "store")
    resource = JudgeResource(base_url=openai_server.base_url, model="loopback-1", api_key=KEY)
    judge = resource.judge(lambda trait: RowCache(store, f"_cache/judgements/{trait}"))
    judged = list(judge.score(items(20)))
    module = module_of(openai_server)
    openai_server.script = lambda request: module.Reply(
        401, module.error_body(f"Incorrect API key provided: {KEY}")
    )
    with pytest.raises(UserError) as error:
        list(judge.score(items(3, "more")))
    assert openai_server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not any(KEY in path.read_text(encoding="utf-8", errors="replace") for path in written)
    shown = [
        repr(resource),
        repr(judge),
        repr(judged),
        json.dumps(judge.identity),
        json.dumps(resource.identity()),
    ]
    shown += [
        str(error.value),
        repr(error.value),
        caplog.text,
        *capfd.readouterr(),
        json.dumps(judge.usage()),
    ]
    assert not any(KEY in text for text in shown)


def test_identity_needs_no_network_no_key_and_no_heavy_import() -> None:
    code = """
import sys
from resources.judges.resource import JudgeResource
remote = JudgeResource(backend="openai", model="m", base_url="http://nowhere.invalid/v1", api_key="sk-x")
print(remote.identity(), JudgeResource(backend="local").identity())
heavy = [m for m in ("torch", "transformers", "sklearn", "openai", "pandas") if m in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sk-x" not in done.stdout
    assert "nowhere" not in done.stdout


def test_identity_changes_with_what_decides_a_score_and_only_with_that() -> None:
    base = OpenAISettings(model="m", base_url="http://a:1/v1")
    identity = openai_identity(base)
    for change in (
        {"model": "n"},
        {"min_mass": 0.5},
        {"show_prompt": False},
        {"scoring": "text"},
        {"base_url": None},
    ):
        assert openai_identity(OpenAISettings(**{**base.__dict__, **change})) != identity
    for change in (
        {"base_url": "http://b:2/v1"},
        {"max_concurrency": 3},
        {"timeout_s": 1.0},
        {"max_calls": 9},
    ):
        assert openai_identity(OpenAISettings(**{**base.__dict__, **change})) == identity


def test_auto_takes_the_llm_judge_when_a_key_or_a_server_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert JudgeResource().resolved_backend() == "local"
    assert JudgeResource(base_url="http://localhost:1/v1").resolved_backend() == "openai"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert JudgeResource().resolved_backend() == "openai"
    assert JudgeResource().identity()["model"] == "gpt-4.1-mini"
    assert JudgeResource(backend="local").resolved_backend() == "local"
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    assert JudgeResource().identity()["api"] == "compatible"


def test_bad_options_are_refused_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, caches: Any
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        JudgeResource(backend="openai").judge(caches)
    with pytest.raises(UserError, match="base_url"):
        JudgeResource(base_url="localhost:8000").judge(caches)
    with pytest.raises(UserError, match="password") as error:
        JudgeResource(base_url="http://me:secret@host/v1").judge(caches)
    assert "secret" not in str(error.value)
    with pytest.raises(UserError, match="max_cost_usd"):
        JudgeResource(api_key=KEY, model="unheard-of", max_cost_usd=1.0).judge(caches)


# small parts


def test_who_asked_first_goes_first_on_every_try_and_a_cancelled_wait_shuts_nobody_out() -> None:
    async def main() -> tuple[list[int], bool]:
        gate = _Gate()
        order: list[int] = []
        opened = asyncio.Event()

        async def work(ticket: int) -> None:
            async with gate.hold(ticket):
                if ticket == 0:
                    await opened.wait()
                order.append(ticket)

        first = asyncio.create_task(work(0))
        await asyncio.sleep(0)
        later = {ticket: asyncio.create_task(work(ticket)) for ticket in (9, 4, 7, 3, 8)}
        await asyncio.sleep(0)
        later[4].cancel()
        await asyncio.sleep(0)
        opened.set()
        # called, and cancelled before it could begin
        while not first.done():
            later[3].cancel()
            await asyncio.sleep(0)
        await asyncio.gather(first, *later.values(), return_exceptions=True)
        return order, gate._open

    order, is_open = asyncio.run(main())
    assert [ticket for ticket in order if ticket > 3] == [7, 8, 9]
    assert is_open


def test_retry_after_in_seconds_milliseconds_and_as_a_date() -> None:
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    from datetime import UTC, datetime, timedelta
    from email.utils import format_datetime

    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 27 <= (retry_after({"retry-after": date}) or 0) <= 31
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


@pytest.mark.parametrize(
    ("status", "error", "kind", "param"),
    [
        (429, {"message": "Rate limit reached", "code": "rate_limit_exceeded"}, "rate", ""),
        (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}, "fatal", ""),
        (503, {"message": "overloaded"}, "fault", ""),
        (408, {}, "fault", ""),
        (
            400,
            {
                "message": "Unsupported parameter: 'max_tokens' is not supported",
                "code": "unsupported_parameter",
                "param": "max_tokens",
            },
            "adapt",
            "max_tokens",
        ),
        (
            400,
            {
                "message": "Unsupported value: 'temperature' does not support 0",
                "code": "unsupported_value",
                "param": "temperature",
            },
            "adapt",
            "temperature",
        ),
        (
            400,
            {"message": "You are not allowed to request logprobs from this model", "param": None},
            "adapt",
            "logprobs",
        ),
        (422, {"message": "top_logprobs must be less than or equal to 5"}, "adapt", "top_logprobs"),
        (400, {"message": "System role not supported"}, "adapt", "system"),
        (400, {"message": "filtered", "code": "content_filter"}, "content_filter", ""),
        (400, {"message": "Invalid prompt: flagged", "code": "invalid_prompt"}, "content_filter", ""),
        (
            400,
            {
                "message": "maximum context length is 4096",
                "code": "context_length_exceeded",
                "param": "messages",
            },
            "too_long",
            "",
        ),
        (404, {"message": "no such model"}, "fatal", ""),
        (400, {"message": "something else"}, "rejected", ""),
    ],
)
def test_error_responses_are_told_apart(status: int, error: dict[str, Any], kind: str, param: str) -> None:
    for body in (error, {"error": error}):
        verdict = classify(status, body)
        assert (verdict.kind, verdict.param) == (kind, param)


def test_error_bodies_that_are_no_json_are_survived() -> None:
    assert classify(502, "<html>Bad gateway</html>").kind == "fault"
    assert classify(400, None).kind == "rejected"
    assert classify(500, ["what"]).kind == "fault"
