"""What a run says about its judge while it works, and the judge's options as they are typed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from resources.judges.openai_judge import OpenAIJudge, OpenAISettings
from resources.judges.protocol import JudgeItem, TraitContext
from resources.judges.resource import JudgeResource
from storage.artifacts import ArtifactStore
from storage.errors import UserError
from storage.rows import RowCache
from trait_assets.cli import judge_options, merge_settings
from trait_assets.judging import Spending


class Notes:
    def __init__(self) -> None:
        self.said: list[str] = []

    def advance(self, steps: int = 1, **counts: float) -> None: ...

    def note(self, text: str) -> None:
        self.said.append(text)


def test_spending_is_said_while_the_judge_works(openai_server: Any, tmp_path: Path) -> None:
    openai_server.latency_s = 0.01
    store = ArtifactStore(tmp_path)
    settings = OpenAISettings(
        model="loopback-1",
        base_url=openai_server.base_url,
        max_concurrency=4,
        max_calls=1000,
        max_cost_usd=5.0,
        prompt_usd_per_million=10.0,
        completion_usd_per_million=10.0,
    )
    notes = Notes()
    spending = Spending(notes, interval=0.05)
    judge = OpenAIJudge(settings, lambda trait: RowCache(store, "judgements"), spending.show, api_key="k")
    context = TraitContext("mood/loud", "HIGH: loud.\n\nLOW: quiet.")
    items = [JudgeItem(str(i), "steering", context, "q", f"text {i}") for i in range(60)]

    def script(request: Any) -> Any:
        # the first one hangs for a while: nothing is handed out, and yet it is said what goes on
        reply = sys.modules[type(openai_server).__module__].Reply
        return (
            reply(200, openai_server.scored(50, request), delay_s=1.3)
            if "text 0\n" in request.prompt
            else None
        )

    openai_server.script = script
    judged = judge.score(items)
    next(judged)
    assert notes.said
    list(judged)
    spending.show(judge.usage(), last=True)
    calls = [int(said.split()[0]) for said in notes.said]
    assert calls == sorted(calls)
    # 60 answers of 101 tokens at ten dollars per million
    assert notes.said[-1] == (
        "60 calls, 0 retries, 6,060 tokens, 0.0606 USD; budget: 60 of 1,000 calls, 0.0606 of 5.0000 USD"
    )


def test_a_judge_that_sends_nothing_is_not_spoken_of() -> None:
    notes = Notes()
    Spending(notes, interval=0).show({"calls": 5.0, "cost_usd": 0.0}, last=True)
    assert notes.said == []


def test_judge_options_as_they_are_typed() -> None:
    given = merge_settings({}, ["judge.max_cost_usd=2", "judge.show_prompt=false", "min_kept=5"])
    options = judge_options(given.pop("judge"), "openai", "m")
    assert given == {"min_kept": 5}
    assert options == {"max_cost_usd": 2, "show_prompt": False, "backend": "openai", "model": "m"}
    assert JudgeResource(**options).max_cost_usd == 2.0
    assert judge_options({}, None, None) == {}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"api_key": "sk-secret"}, "OPENAI_API_KEY"),
        ({"max_cots": 1}, "max_cost_usd"),
        ({"max_calls": -1}, "max_calls"),
        ({"scoring": "guess"}, "scoring"),
        ("openai", "--set judge"),
    ],
)
def test_wrong_judge_options_are_refused_by_name(given: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        judge_options(given, None, None)
    assert says in str(error.value)
    assert "sk-secret" not in str(error.value)
