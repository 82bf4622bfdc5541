"""A backfill of 120 partitions by eight workers at once, on Dagster's SQLite and one DuckDB file."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from storage.index import ROW_TABLES
from storage.workspace import Workspace
from trait_assets import pipeline
from trait_assets.experiments import parse_experiment
from trait_assets.paths import REPOSITORY
from trait_assets.progress import LogProgress
from trait_assets.scenarios.reading import ScenariosStage

WORKERS, TRAITS = 8, 120


def make_traits(root: Path) -> list[str]:
    names = []
    for n in range(TRAITS):
        name = f"kind-{n % 7}/t{n:03d}"
        folder = root / name
        folder.mkdir(parents=True)
        for side, word in (("positive", "grim"), ("negative", "merry")):
            lines = [f"In story {n}, chapter {i}, the {word} baker opened the shop and" for i in range(12)]
            (folder / f"{side}.txt").write_text("\n".join(lines) + "\n")
        (folder / "definition.txt").write_text("How grim it is.\n\nHIGH: grim.\n\nLOW: merry.\n")
        (folder / "steering.json").write_text(json.dumps({"questions": [f"What of day {n}?"]}))
        names.append(name)
    return sorted(names)


def counts(workspace: Workspace) -> dict[str, Any]:
    """Rows per table, and per trait in the table of scenarios."""
    workspace.index.catch_up()
    with workspace.index.connect(read_only=True) as connection:
        found: dict[str, Any] = {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0]
            for table in ("manifests", "inputs", "current_pointers", *ROW_TABLES)
        }
        found["per trait"] = connection.execute(
            "SELECT trait, polarity, count(*), min(prompt) FROM current_scenarios GROUP BY ALL ORDER BY ALL"
        ).fetchall()
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_workers_fill_120_partitions_like_one(tmp_path: Path) -> None:
    names = make_traits(tmp_path / "datasets")
    (tmp_path / "experiments" / "small").mkdir(parents=True)
    (tmp_path / "experiments" / "small" / "config.yaml").write_text(
        yaml.safe_dump({"extraction_model": "none"})
    )
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("DAGSTER_", "TRAITS_"))},
        "TRAITS_DATASETS": str(tmp_path / "datasets"),
        "TRAITS_EXPERIMENTS": str(tmp_path / "experiments"),
        "TRAITS_STATE": str(tmp_path / "state"),
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
    }
    program = str(Path(__file__).with_name("concurrent_worker.py"))
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", program, "small", ",".join(names[i::WORKERS])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        for i in range(WORKERS)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n", worker.communicate()[1]
    for worker in workers:  # all eight begin together
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    said = [worker.communicate(timeout=1500) for worker in workers]
    for worker, (_, errors) in zip(workers, said, strict=True):
        assert worker.returncode == 0, errors[-3000:]
        assert "database is locked" not in errors
    reports = [json.loads(out) for out, _ in said]
    states = {trait: state for report in reports for trait, state in report["states"].items()}
    assert states == dict.fromkeys(names, "done")
    assert not any(report["failures"] for report in reports)
    runs = [run for report in reports for run in report["runs"]]
    assert len(set(runs)) == TRAITS

    # Dagster's history has every run and every partition
    with dg.DagsterInstance.from_config(str(tmp_path / "state" / "instance" / "cli")) as instance:
        assert {record.run_id for record in instance.get_runs()} == set(runs)
        assert {record.status for record in instance.get_runs()} == {dg.DagsterRunStatus.SUCCESS}
        assert instance.get_materialized_partitions(dg.AssetKey("scenarios")) == set(names)

    # the store holds what one process alone leaves
    together = Workspace(tmp_path / "experiments", tmp_path / "state" / "lineage.duckdb")
    alone = Workspace(tmp_path / "alone", tmp_path / "alone.duckdb")
    context = pipeline.StageContext(
        experiment=parse_experiment("small", {"extraction_model": "none"}, where="test"),
        workspace=alone,
        models=None,  # type: ignore[arg-type]
        judges=None,  # type: ignore[arg-type]
        dataset_root=tmp_path / "datasets",
        run_id="alone",
        progress=LogProgress(logging.getLogger("quiet")),
    )
    assert {result.state for result in pipeline.run(ScenariosStage(), context, names)} == {"done"}
    assert counts(together) == counts(alone)
    assert together.index.pending() == 0
    behind = sum(report["behind"] for report in reports)
    print(f"{behind} of {WORKERS} workers were behind at some time", file=sys.stderr)
    # and so does a rebuilt index
    before = counts(together)
    together.index.rebuild()
    assert counts(together) == before
