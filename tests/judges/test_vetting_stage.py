"""The vetting stage on stored traits with an LLM judge: what is committed, what fails, what is asked again."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from resources.judges.resource import JudgeResource
from storage.workspace import Workspace
from trait_assets import pipeline
from trait_assets.experiments import parse_experiment
from trait_assets.judging import VettedScenariosStage
from trait_assets.pipeline import StageContext, TraitResult
from trait_assets.progress import LogProgress
from trait_assets.stage import partial_failure, result_metadata

TRAITS = Path(__file__).parents[2] / "datasets" / "traits"
BUREAUCRATIC, ENTHUSIASM = "register/bureaucratic", "emotion/enthusiasm"
BOTH = [BUREAUCRATIC, ENTHUSIASM]


@pytest.fixture
def vet(
    tmp_path: Path, openai_server: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str | None, TraitResult]]:
    """vet(trait, …, **options): a run of the stage in one workspace, judged by the loopback server."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    datasets = tmp_path / "datasets"
    for trait in BOTH:
        shutil.copytree(TRAITS / trait, datasets / trait)
    workspace = Workspace(tmp_path / "experiments", tmp_path / "lineage.duckdb")

    def run(
        *traits: str, judge: dict[str, Any] | None = None, **options: Any
    ) -> dict[str | None, TraitResult]:
        given = {"extraction_model": "m", "scenario_limit": 15, **options}
        ctx = StageContext(
            experiment=parse_experiment("e", given, where="test"),
            workspace=workspace,
            models=None,  # type: ignore[arg-type]
            judges=JudgeResource(
                backend="openai", base_url=openai_server.base_url, model="loopback-1", **(judge or {})
            ),
            dataset_root=datasets,
            run_id="run-1",
            progress=LogProgress(logging.getLogger("test")),
        )
        return {r.trait: r for r in pipeline.run(VettedScenariosStage(), ctx, list(traits or BOTH))}

    run.workspace = workspace  # type: ignore[attr-defined]
    return run


def scores(vet: Any, trait: str, name: str = "scenario_scores.json") -> dict[str, Any]:
    root = Path(vet.workspace.store.root) / "e" / "extraction" / trait / "vetting"
    return json.loads((root / name).read_text())


def script_for(server: Any, decide: Callable[[Any], tuple[int, dict[str, Any]] | None]) -> None:
    module = sys.modules[type(server).__module__]

    def script(request: Any) -> Any:
        decided = decide(request)
        return None if decided is None else module.Reply(decided[0], decided[1])

    server.script = script


def test_each_trait_gets_its_scores_its_numbers_and_its_tables(vet: Any, openai_server: Any) -> None:
    results = vet()
    assert {t: r.state for t, r in results.items()} == dict.fromkeys(BOTH, "done")
    for trait, result in results.items():
        record = scores(vet, str(trait))
        assert len(record["results"]) == 30
        assert (record["judge"]["model"], record["stand_in"]) == ("loopback-1", False)
        manifest = result.manifest
        assert manifest is not None
        s = manifest.summary
        assert s["n"] == s["n_kept"] + s["n_failed"] + s["n_abstained"] == 30
        assert s["judged_now"] == 30
        # nobody said what this judge costs: no number is invented
        assert "judge_cost_usd" not in s
        assert s["contrast"] == pytest.approx(s["positive_mean"] - s["negative_mean"], abs=1e-3)
        histogram = manifest.tables["histogram"]
        assert len(histogram) == 10
        assert sum(row["positive"] + row["negative"] for row in histogram) == 30
        # inputs of the rubric, the judge and its rubrics are on record
        assert manifest.options["judge"]["rubrics"]["scenario"] == "scenario/1"
        assert manifest.options["pos_threshold"] == 60
    assert max(openai_server.asked.values()) == 1


def test_the_worst_offenders_are_a_table_on_the_page_of_the_run(vet: Any, openai_server: Any) -> None:
    words = openai_server.word_rule
    # a quarter of the texts is misjudged, the positives worst
    odd = {"0": 12, "1": 70, "2": 30, "3": 55}
    openai_server.rule = lambda request: odd.get(request.key[0], words(request))
    result = vet(BUREAUCRATIC, min_kept=2)[BUREAUCRATIC]
    assert result.manifest is not None
    worst = result.manifest.tables["worst"]
    assert 2 <= len(worst) == min(10, result.manifest.summary["n_failed"])
    assert [row["misses_by"] for row in worst] == sorted((row["misses_by"] for row in worst), reverse=True)
    assert worst[0]["misses_by"] > 20
    metadata = result_metadata(vet.workspace, result)
    tables = [v for v in metadata.values() if isinstance(v, dg.TableMetadataValue)]
    shown = [{str(cell) for r in table.records for cell in r.data.values()} for table in tables]
    assert any({str(row["text"]) for row in worst} <= cells for cells in shown)
    assert any({"0–10", "90–100"} <= cells for cells in shown)


def test_changed_thresholds_and_gates_read_the_kept_answers(vet: Any, openai_server: Any) -> None:
    first = vet()
    asked = len(openai_server.requests)
    kept = {trait: scores(vet, str(trait))["kept"] for trait in first}
    for options in (
        {"pos_threshold": 90, "neg_threshold": 10, "min_kept": 3},
        {"pair_filter": True, "max_abstention_rate": 0.5, "judge": {"min_mass": 0.1}},
        {"judge": {"max_concurrency": 3, "timeout_s": 5.0, "max_calls": 100_000}},
    ):
        again = vet(**options)
        assert {r.state for r in again.values()} == {"done"}, options
    assert len(openai_server.requests) == asked
    vet()
    assert {trait: scores(vet, str(trait))["kept"] for trait in first} == kept
    # what is asked, or who is asked, does ask
    vet(judge={"variant": "int4"})
    assert len(openai_server.requests) == 2 * asked


def test_a_pair_filter_drops_the_partner_of_what_failed(vet: Any, openai_server: Any) -> None:
    vet(BUREAUCRATIC, min_kept=2)
    lines = {row["key"]: row for row in scores(vet, BUREAUCRATIC)["results"]}
    victim = next(row for row in lines.values() if row["polarity"] == "positive" and row["verdict"] == "kept")
    text = (TRAITS / BUREAUCRATIC / "positive.txt").read_text().splitlines()[victim["pair"]]
    openai_server.reset()
    openai_server.rule = lambda request: 5 if text in request.prompt else openai_server.word_rule(request)
    judge = {"variant": "asked anew"}
    plain = vet(BUREAUCRATIC, min_kept=2, judge=judge)[BUREAUCRATIC]
    kept = set(scores(vet, BUREAUCRATIC)["kept"])
    assert victim["key"] not in kept
    paired = vet(BUREAUCRATIC, min_kept=2, judge=judge, pair_filter=True)[BUREAUCRATIC]
    record = scores(vet, BUREAUCRATIC)
    partner = next(
        row["key"]
        for row in lines.values()
        if row["pair"] == victim["pair"] and row["polarity"] == "negative"
    )
    assert partner in kept
    assert partner in record["excluded_by_pair"]
    assert plain.manifest is not None
    assert paired.manifest is not None
    assert paired.manifest.summary["n_excluded_by_pair"] == len(record["excluded_by_pair"]) >= 1


@pytest.mark.parametrize("options", [{"vet": False}, {"vet_scenarios": False}])
def test_vetting_that_is_switched_off_asks_nothing_and_keeps_all(
    vet: Any, openai_server: Any, options: dict[str, Any]
) -> None:
    results = vet(**options)
    assert {r.state for r in results.values()} == {"skipped"}
    assert openai_server.requests == []


def test_too_few_kept_fails_that_trait_alone_and_shows_why(vet: Any, openai_server: Any) -> None:
    words = openai_server.word_rule
    openai_server.rule = lambda request: 30 if request.trait == ENTHUSIASM else words(request)
    results = vet()
    assert results[BUREAUCRATIC].state == "done"
    failure = results[ENTHUSIASM]
    assert failure.state == "failed"
    reason = str(failure.reason)
    assert f"{ENTHUSIASM}, vetting of scenarios: only 0 of 15 positive scenarios kept, 10 needed" in reason
    assert "look at the worst offenders" in reason
    record = scores(vet, ENTHUSIASM, "failed_scenario_scores.json")
    assert "failed_scenario_scores.json" in reason
    assert len(record["results"]) == 30
    assert [row["key"] for row in failure.tables["worst"]] == [row["key"] for row in record["worst"]]
    assert vet.workspace.manifests.read("e", "vetted_scenarios", ENTHUSIASM) is None
    # the failure that Dagster shows has the tables, for the trait that failed
    shown = partial_failure("vetted_scenarios", [failure], 2).metadata
    (worst,) = [value for name, value in shown.items() if "worst" in name]
    assert ENTHUSIASM in next(name for name in shown if "worst" in name)
    assert isinstance(worst, dg.TableMetadataValue)
    assert len(worst.records) == 10
    # once it passes, the record of the failure goes
    openai_server.rule = words
    assert vet(ENTHUSIASM, judge={"variant": "asked anew"})[ENTHUSIASM].state == "done"
    with pytest.raises(FileNotFoundError):
        scores(vet, ENTHUSIASM, "failed_scenario_scores.json")


def test_an_abstaining_judge_fails_the_gate_with_its_reasons(vet: Any, openai_server: Any) -> None:
    module = sys.modules[type(openai_server).__module__]
    filtered = module.error_body("filtered", "content_filter")
    asked: list[str] = []

    def decide(request: Any) -> tuple[int, dict[str, Any]] | None:
        asked.append(request.trait)
        return (
            (400, filtered) if request.trait == BUREAUCRATIC and asked.count(BUREAUCRATIC) % 5 == 0 else None
        )

    script_for(openai_server, decide)
    results = vet(min_kept=2)
    assert (results[BUREAUCRATIC].state, results[ENTHUSIASM].state) == ("failed", "done")
    assert "abstained on 6 of 30 scenarios (20%, limit 10%): content_filter 6" in str(
        results[BUREAUCRATIC].reason
    )
    allowed = vet(BUREAUCRATIC, min_kept=2, max_abstention_rate=0.2)[BUREAUCRATIC]
    assert allowed.manifest is not None
    assert allowed.manifest.summary["abstained_content_filter"] == 6
    assert allowed.manifest.summary["n_scored"] == 24


def test_a_quota_that_runs_out_keeps_the_traits_that_were_done(vet: Any, openai_server: Any) -> None:
    module = sys.modules[type(openai_server).__module__]
    gone = module.error_body("You exceeded your current quota", "insufficient_quota")
    script_for(openai_server, lambda request: (429, gone) if len(openai_server.requests) > 42 else None)
    results = vet(judge={"max_concurrency": 2})
    assert (results[BUREAUCRATIC].state, results[ENTHUSIASM].state) == ("done", "failed")
    assert "what was scored is kept" in str(results[ENTHUSIASM].reason)
    assert "billing" in str(results[ENTHUSIASM].reason)
    assert len(openai_server.requests) <= 45
    openai_server.script = None
    openai_server.reset()
    again = vet()
    assert (again[BUREAUCRATIC].state, again[ENTHUSIASM].state) == ("current", "done")
    assert 60 - 42 <= len(openai_server.requests) <= 60 - 42 + 1
    assert again[ENTHUSIASM].manifest is not None
    assert again[ENTHUSIASM].manifest.summary["judged_now"] == len(openai_server.requests)


def test_what_a_trait_cost_is_its_own(vet: Any) -> None:
    prices = {"prompt_usd_per_million": 10.0, "completion_usd_per_million": 10.0}
    results = vet(judge=prices)
    # thirty answers of 101 tokens at ten dollars per million, for either trait
    costs = [r.manifest.summary["judge_cost_usd"] for r in results.values() if r.manifest is not None]
    assert costs == [pytest.approx(30 * 101 * 1e-5)] * 2


def test_a_spent_budget_says_so_and_goes_on_where_it_stopped(vet: Any, openai_server: Any) -> None:
    results = vet(judge={"max_calls": 35, "max_concurrency": 4})
    assert (results[BUREAUCRATIC].state, results[ENTHUSIASM].state) == ("done", "failed")
    assert "the budget max_calls 35 is used up after 35 calls" in str(results[ENTHUSIASM].reason)
    assert len(openai_server.requests) == 35
    assert vet(judge={"max_calls": 60})[ENTHUSIASM].state == "done"
    assert len(openai_server.requests) == 60


def test_forcing_the_stage_makes_it_anew_from_the_kept_answers(
    vet: Any, openai_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vet(BUREAUCRATIC)
    asked = len(openai_server.requests)
    run = pipeline.run
    monkeypatch.setattr(
        pipeline, "run", lambda stage, ctx, traits: run(stage, replace(ctx, force=True), traits)
    )
    assert vet(BUREAUCRATIC)[BUREAUCRATIC].state == "done"
    assert len(openai_server.requests) == asked
