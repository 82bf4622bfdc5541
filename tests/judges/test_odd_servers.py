"""Servers, keys and clocks that are not as they should be: each must end in a score, an abstention that says
why, or an error that says what to do, and never in a key that is shown, a budget that is overrun, or the same
question sent twice."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from resources.api_client import _delay, retry_after
from resources.judges.client import Answer, classify, ledger_of
from resources.judges.openai_judge import OpenAIJudge, OpenAISettings, cut_by_the_server, openai_identity
from resources.judges.protocol import Abstention, JudgeItem, Judgement, Score, TraitContext
from resources.judges.resource import JudgeResource
from resources.judges.rubric import render
from storage.artifacts import ArtifactStore
from storage.errors import UserError
from storage.rows import RowCache

SECRET = "sk-test-71c5e02b9d4f"
CONTEXT = TraitContext("mood/loud", "HIGH (70-100): loud shouting.\n\nLOW (0-30): quiet whispering.")


def items(n: int, tag: str = "text", context: TraitContext = CONTEXT) -> list[JudgeItem]:
    return [
        JudgeItem(f"k{i}", "steering", context, f"question {i}", f"{tag} number {i} is loud")
        for i in range(n)
    ]


@pytest.fixture
def caches(tmp_path: Path) -> Callable[[str], RowCache]:
    store = ArtifactStore(tmp_path / "store")
    return lambda trait: RowCache(store, f"_cache/judgements/{trait}")


@pytest.fixture
def make(openai_server: Any, caches: Callable[[str], RowCache]) -> Callable[..., OpenAIJudge]:
    def build(api_key: str = SECRET, **options: Any) -> OpenAIJudge:
        settings = OpenAISettings(**{"model": "loopback-1", "base_url": openai_server.base_url, **options})
        return OpenAIJudge(settings, caches, api_key=api_key)

    return build


def module_of(server: Any) -> Any:
    return sys.modules[type(server).__module__]


def reason(judgement: Judgement) -> str:
    return judgement.reason if isinstance(judgement, Abstention) else "score"


# keys


@pytest.mark.parametrize(
    "spoilt", [f"{SECRET}\nx", f"{SECRET}…", f"{SECRET} b", f"{SECRET}\x00", "clé-" + SECRET]
)
def test_a_key_that_no_header_carries_is_refused_and_not_shown(
    make: Any, openai_server: Any, spoilt: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        make(api_key=spoilt)
    shown = "".join(traceback.format_exception(error.value)) + repr(error.value) + caplog.text
    assert SECRET not in shown
    assert openai_server.requests == []


def test_blanks_around_a_key_are_dropped(make: Any, openai_server: Any) -> None:
    list(make(api_key=f" {SECRET}\n").score(items(1)))
    assert openai_server.requests[0].headers["authorization"] == f"Bearer {SECRET}"


def test_a_short_stand_in_for_a_key_does_not_blot_messages(make: Any, openai_server: Any) -> None:
    module = module_of(openai_server)
    openai_server.script = lambda request: module.Reply(404, module.error_body("none of the models is there"))
    with pytest.raises(UserError, match="none of the models is there"):
        list(make(api_key="none").score(items(1)))


@pytest.mark.parametrize(
    "address", ["me:hunter2@host/v1", "ftp://me:hunter2@host/v1", "http://me:hunter2@host/v1"]
)
def test_a_password_in_an_address_is_refused_and_not_shown(address: str, make: Any) -> None:
    with pytest.raises(UserError, match="base_url") as error:
        make(base_url=address)
    assert "hunter2" not in str(error.value)


# answers in odd shapes


def _answered(server: Any, text: str | None, logprobs: Any, **message: Any) -> Any:
    module = module_of(server)
    body = module.completion(text)
    body["choices"][0]["logprobs"] = logprobs
    body["choices"][0]["message"] |= message
    return module.Reply(200, json.dumps(body))


@pytest.mark.parametrize(
    "alternatives",
    [
        [{"token": "85", "logprob": -0.1}, {"token": "x", "logprob": float("-inf")}],
        [{"token": "85", "logprob": -0.1}, {"token": "x", "logprob": float("nan")}],
        [{"token": "85", "logprob": -0.1}, {"token": "x", "logprob": None}],
    ],
)
def test_alternatives_without_a_probability_are_left_out(
    openai_server: Any, make: Any, alternatives: list[dict[str, Any]]
) -> None:
    content = [{"token": "85", "logprob": -0.1, "top_logprobs": alternatives}]
    openai_server.script = lambda request: _answered(openai_server, "85", {"content": content})
    (score,) = make().score(items(1))
    assert isinstance(score, Score)
    assert score.value == pytest.approx(85)
    # and what was kept reads back
    assert list(make().score(items(1))) == [score]
    assert len(openai_server.requests) == 1


@pytest.mark.parametrize(
    "logprobs",
    [
        [1],
        "none",
        {"tokens": ["85"], "token_logprobs": [-0.1]},
        {"content": [{"token": "85"}]},
        {"content": [None]},
        {"content": [{"token": "85", "logprob": -0.1, "top_logprobs": 3}]},
    ],
)
def test_what_is_no_log_probability_leaves_the_text(openai_server: Any, make: Any, logprobs: Any) -> None:
    openai_server.script = lambda request: _answered(openai_server, "85", logprobs)
    (score,) = make().score(items(1))
    assert isinstance(score, Score)
    assert (score.value, score.detail["read"]) == (85, "text")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_that_the_server_takes_out_is_noticed(openai_server: Any, make: Any, name: str) -> None:
    def script(request: Any) -> Any:
        if request.body["max_tokens"] < 1000:
            return _answered(openai_server, None, None, **{name: "Let me see"})
        return _answered(openai_server, "62", None, **{name: "Perhaps 90? No."})

    openai_server.script = script
    judged = list(make().score(items(6)))
    assert [j.value for j in judged if isinstance(j, Score)] == [62] * 6
    assert len(openai_server.requests) == 7


def test_thinking_that_never_ends_is_an_abstention(openai_server: Any, make: Any) -> None:
    openai_server.script = lambda request: _answered(openai_server, "", None, reasoning_content="hm " * 9)
    (judged,) = make().score(items(1))
    assert reason(judged) == "unfinished"


@pytest.mark.parametrize("body", ["<html>Bad gateway</html>", "{}", '{"choices": []}', "[]", "null", ""])
def test_a_success_without_an_answer_is_tried_again(openai_server: Any, make: Any, body: str) -> None:
    reply = module_of(openai_server).Reply
    openai_server.script = lambda request: reply(200, body) if request.attempt == 0 else None
    assert all(isinstance(j, Score) for j in make().score(items(3)))
    assert len(openai_server.requests) == 6


# truncation that nobody announces


def test_a_server_that_silently_shortens_the_question_is_found_out(openai_server: Any, make: Any) -> None:
    module = module_of(openai_server)
    long = JudgeItem("long", "steering", CONTEXT, "question", "so loud " * 1200)
    context = 1024

    def script(request: Any) -> Any:
        tokens = min(context, int(1.3 * len(request.prompt.split())))
        return module.Reply(200, module.completion("85", [("85", 0.9)], prompt_tokens=tokens))

    openai_server.script = script
    cut, short = make().score([long, items(1)[0]])
    assert (reason(cut), reason(short)) == ("truncated", "score")
    assert isinstance(cut, Abstention)
    assert cut.detail["prompt_tokens"] == 1024 < 2400 < cut.detail["words"]
    # a larger context later: only what was cut is asked again, and only on request
    context = 100_000
    assert reason(next(iter(make().score([long])))) == "truncated"
    assert len(openai_server.requests) == 2
    again = list(make(retry_abstentions=True).score([long, items(1)[0]]))
    assert [reason(j) for j in again] == ["score", "score"]
    assert len(openai_server.requests) == 3


@pytest.mark.parametrize(
    ("words", "counted", "cut"), [(2000, 5000, False), (2000, 0, False), (2000, 512, True), (50, 9, False)]
)
def test_only_fewer_tokens_than_words_of_a_long_question_count_as_cut(
    words: int, counted: int, cut: bool
) -> None:
    rendered = render(JudgeItem("k", "steering", CONTEXT, "q", "word " * words))
    answer = Answer("85", None, "stop", None, False, "text", prompt_tokens=counted)
    assert (cut_by_the_server(rendered, answer) is not None) == cut


# one name, two models


def test_kept_answers_of_another_address_are_used_and_mentioned(
    openai_server: Any, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = "same-name-elsewhere"
    judged = list(make(model=model).score(items(4)))
    with module_of(openai_server).OpenAIServer() as other:
        again = make(model=model, base_url=other.base_url)
        assert list(again.score(items(4))) == judged
        assert other.requests == []
        assert f"4 kept answers of '{model}' came from a server at another address" in caplog.text
        assert "127.0.0.1" not in caplog.text
        # said once, not for every trait and run of a process
        caplog.clear()
        list(make(model=model, base_url=other.base_url).score(items(4)))
        assert "another address" not in caplog.text
        # whoever knows better says so, and is asked anew
        list(make(model=model, base_url=other.base_url, variant="int4").score(items(4)))
        assert len(other.requests) == 4


def test_a_variant_is_another_judge_and_none_changes_nothing() -> None:
    plain = OpenAISettings(model="m", base_url="http://a:1/v1")
    other = OpenAISettings(model="m", base_url="http://a:1/v1", variant="int4")
    assert openai_identity(plain) != openai_identity(other)
    assert "variant" not in openai_identity(plain)
    resource = JudgeResource(backend="openai", model="m", base_url="http://a:1/v1", variant="int4")
    assert resource.identity() == openai_identity(other)


def test_a_trait_keeps_the_answer_that_its_twin_in_another_trait_got(
    openai_server: Any, make: Any, caches: Any
) -> None:
    openai_server.latency_s = 0.05
    other = TraitContext("mood/quiet", "HIGH: quiet.\n\nLOW: loud.")
    twins = [JudgeItem(c.trait, "coherence", c, "", "One and the same text.") for c in (CONTEXT, other)]
    first, second = make().score(twins)
    assert first.value == second.value
    assert len(openai_server.requests) == 1
    assert list(make().score(twins)) == [first, second]
    assert len(openai_server.requests) == 1
    assert len(caches("mood/quiet")) == 1


# rate, waiting, clocks


def test_the_rate_holds_over_many_short_runs(openai_server: Any, make: Any) -> None:
    for i in range(21):
        list(make(requests_per_minute=60 * 40).score(items(1, f"run {i}")))
    times = [request.at for request in openai_server.requests]
    # a bucket of one second may be used up at once after a pause, and there was none
    assert times[-1] - times[0] >= 20 / 40 * 0.9


def test_time_in_our_own_queue_is_no_waiting_on_the_server(openai_server: Any, make: Any) -> None:
    module = module_of(openai_server)

    def script(request: Any) -> Any:
        if request.attempt == 0:
            return module.Reply(
                429, module.error_body("slow down", "rate_limit_exceeded"), {"retry-after": "0.05"}
            )
        return None

    openai_server.script = script
    # the last of them waits three seconds for its first turn
    judge = make(requests_per_minute=60 * 20, max_concurrency=8, max_wait_s=1.5)
    assert {reason(j) for j in judge.score(items(30))} == {"score"}


def test_a_date_is_read_by_the_servers_clock() -> None:
    theirs = datetime.now(UTC) + timedelta(hours=5)
    headers = {
        "date": format_datetime(theirs, usegmt=True),
        "retry-after": format_datetime(theirs + timedelta(seconds=30), usegmt=True),
    }
    assert retry_after(headers) == pytest.approx(30, abs=0.01)
    assert retry_after({**headers, "date": "yesterday"}) == pytest.approx(5 * 3600 + 30, abs=3)


def test_a_server_that_asks_for_no_wait_is_not_hammered() -> None:
    for nothing in (None, 0.0):
        delays = [_delay(nothing, 5) for _ in range(400)]
        # full jitter over half a second times 2⁴
        assert 3.0 < sum(delays) / len(delays) < 5.0
        assert 0 <= min(delays) < max(delays) <= 8.0
    assert all(2.0 <= _delay(2.0, 9) <= 2.25 for _ in range(50))


# verdicts of particular providers


def test_limits_per_minute_in_the_words_of_a_quota_are_waited_for() -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "33s"}]
    error = {"code": 429, "message": "You exceeded your current quota", "status": "RESOURCE_EXHAUSTED"}
    assert classify(429, {"error": {**error, "details": details}}).kind == "rate"
    assert classify(429, {"error": error}).kind == "fatal"


def test_a_flagged_text_is_no_wrong_key(openai_server: Any, make: Any) -> None:
    module = module_of(openai_server)
    message = 'openai/gpt-4o requires moderation. Your input was flagged for "violence".'

    def script(request: Any) -> Any:
        return module.Reply(403, module.error_body(message)) if "number 2 " in request.prompt else None

    openai_server.script = script
    judged = [reason(j) for j in make().score(items(5))]
    assert judged == ["score", "score", "content_filter", "score", "score"]


@pytest.mark.parametrize(
    "message",
    [
        "the request exceeds the available context size. try increasing the context size",
        "The decoder prompt (length 5000) is longer than the maximum model length of 2048.",
        "This model's maximum context length is 8192 tokens",
    ],
)
def test_a_question_too_long_for_the_context_is_named_so(message: str) -> None:
    assert classify(400, {"error": {"message": message}}).kind == "too_long"


# budgets


def test_answers_of_unknown_length_do_not_overrun_the_budget(openai_server: Any, make: Any) -> None:
    module = module_of(openai_server)
    openai_server.latency_s = 0.02
    openai_server.script = lambda request: module.Reply(
        200, module.completion("62", prompt_tokens=300, completion_tokens=4000)
    )
    judge = make(model="gpt-5-mini", max_tokens=50_000, max_concurrency=16)
    with pytest.raises(UserError, match="max_tokens 50000"):
        list(judge.score(items(60)))
    usage = judge.usage()
    spent = usage["prompt_tokens"] + usage["completion_tokens"]
    assert 8 * 4300 <= spent <= 50_000


def test_two_judges_in_two_threads_share_one_budget(openai_server: Any, make: Any) -> None:
    openai_server.latency_s = 0.01
    judges = [make(max_calls=40, max_concurrency=8) for _ in range(2)]
    errors: list[str] = []

    def work(judge: OpenAIJudge, tag: str) -> None:
        try:
            list(judge.score(items(60, tag)))
        except UserError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work, args=(j, f"side {i}")) for i, j in enumerate(judges)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(errors) == 2
    assert "max_calls 40" in errors[0]
    assert sum(openai_server.answered.values()) == 40
    ledger = ledger_of(judges[0].settings)
    assert (ledger.calls, ledger.in_flight, ledger.reserved_prompt, ledger.reserved_completion) == (
        40,
        0,
        0,
        0,
    )
    usage = judges[0].usage()
    assert (usage["budget_calls"], usage["budget_calls_spent"]) == (40, 40)
    assert "budget_tokens" not in usage


def test_usage_is_told_apart_by_trait(openai_server: Any, make: Any) -> None:
    other = TraitContext("mood/quiet", "HIGH: quiet.\n\nLOW: loud.")
    judge = make(prompt_usd_per_million=1.0, completion_usd_per_million=1.0, max_concurrency=4)
    list(judge.score([*items(7), *items(5, "other", other), JudgeItem("e", "steering", other, "q", "")]))
    loud, quiet, both = judge.usage("mood/loud"), judge.usage("mood/quiet"), judge.usage()
    assert (loud["calls"], quiet["calls"], both["calls"]) == (7, 5, 12)
    assert (loud["abstentions"], quiet["abstentions"]) == (0, 1)
    assert loud["cost_usd"] == pytest.approx(7 * 101e-6)
    assert both["cost_usd"] == pytest.approx(12 * 101e-6)
    assert judge.usage("no/such")["calls"] == 0
    list(judge.score(items(7)))
    assert judge.usage("mood/loud")["cache_hits"] == 7


# what a run leaves behind


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files through /proc")
def test_no_connection_and_no_thread_outlives_a_run(openai_server: Any, make: Any) -> None:
    module = module_of(openai_server)

    def clients() -> int:
        return sum(thread.name == "judge" for thread in threading.enumerate())

    def sockets() -> int:
        count = 0
        for name in os.listdir("/proc/self/fd"):
            try:
                count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
            except OSError:
                continue
        return count

    list(make().score(items(4, "warm")))
    time.sleep(0.2)
    before = sockets()
    for i in range(5):
        list(make().score(items(8, f"whole {i}")))
        running = make(max_concurrency=4).score(items(60, f"closed {i}"))
        next(running)
        running.close()
    openai_server.script = lambda request: module.Reply(401, module.error_body("no"))
    for i in range(5):
        with pytest.raises(UserError):
            list(make().score(items(8, f"failed {i}")))
    assert clients() == 0
    deadline = time.monotonic() + 5
    # the server's ends of the connections are in this process too, and close when it notices
    while sockets() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sockets() <= before
