"""The `scenarios` stage: one artifact per trait, findings as checks, and nobody pays for another's bad
file."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from storage.keys import scenario_set
from storage.workspace import Workspace
from trait_assets.experiments import parse_experiment
from trait_assets.pipeline import StageContext, run
from trait_assets.progress import LogProgress
from trait_assets.scenarios.dataset import ScenarioSet
from trait_assets.scenarios.reading import ScenariosStage


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    nobody: Any = None
    return StageContext(
        experiment=parse_experiment(
            "any", {"extraction_model": "embedded:smollm2-135m-instruct"}, where="test"
        ),
        workspace=Workspace(str(tmp_path / "experiments"), tmp_path / "lineage.duckdb"),
        models=nobody,
        judges=nobody,
        dataset_root=tmp_path / "traits",
        run_id="run",
        progress=LogProgress(logging.getLogger("test")),
    )


def test_each_trait_is_stored_and_a_bad_one_fails_alone(context: StageContext, corpus: ModuleType) -> None:
    root = context.dataset_root
    corpus.clean_trait(root, "made/good", 1)
    broken = corpus.clean_trait(root, "made/broken", 2)
    (broken / "negative.txt").write_bytes(b"caf\xe9\n")
    faulty = corpus.clean_trait(root, "made/faulty", 3)
    text = (faulty / "positive.txt").read_text(encoding="utf-8").split("\n")
    (faulty / "negative.txt").write_text("\n".join([text[0], *text[2:]]), encoding="utf-8")
    stage = ScenariosStage()
    wanted = ["made/good", "made/broken", "made/faulty", "made/none"]
    results = {r.trait: r for r in run(stage, context, wanted)}
    assert {trait: r.state for trait, r in results.items()} == {
        "made/good": "done",
        "made/broken": "failed",
        "made/faulty": "done",
        "made/none": "failed",
    }
    assert "negative.txt:1: is not UTF-8" in str(results["made/broken"].reason)
    assert "there is no trait" in str(results["made/none"].reason)
    stored = ScenarioSet.from_json(context.workspace.store.read_json(scenario_set("made/good")))
    assert len(stored.positives) == 110
    assert stored.findings == ()
    good, bad = results["made/good"].manifest, results["made/faulty"].manifest
    assert good is not None
    assert bad is not None
    assert all(check["passed"] for check in good.summary["checks"])
    failed = {check["name"] for check in bad.summary["checks"] if not check["passed"]}
    assert "no_line_on_both_sides" in failed
    assert bad.summary["lint_errors"] >= 100
    assert any(row["code"] == "both-sides" for row in bad.tables["findings"])


def test_an_unchanged_folder_does_no_work_and_a_changed_line_does(
    context: StageContext, corpus: ModuleType
) -> None:
    folder = corpus.clean_trait(context.dataset_root, "made/good", 1)
    stage = ScenariosStage()
    assert [r.state for r in run(stage, context, ["made/good"])] == ["done"]
    assert [r.state for r in run(stage, context, ["made/good"])] == ["current"]
    (folder / "README.md").write_text("notes", encoding="utf-8")
    assert [r.state for r in run(stage, context, ["made/good"])] == ["current"]
    with (folder / "positive.txt").open("a", encoding="utf-8") as file:
        file.write("Another line of some length that nobody else has written yet\n")
    result = next(iter(run(stage, context, ["made/good"])))
    assert result.state == "done"
    assert result.manifest is not None
    assert result.manifest.summary["positives"] == 111
    assert result.manifest.summary["paired"] is False


def test_steering_is_optional_here(context: StageContext, corpus: ModuleType) -> None:
    folder = corpus.clean_trait(context.dataset_root, "made/good", 1)
    (folder / "steering.json").unlink()
    result = next(iter(run(ScenariosStage(), context, ["made/good"])))
    assert result.state == "done"
    assert (
        ScenarioSet.from_json(context.workspace.store.read_json(scenario_set("made/good"))).steering is None
    )
