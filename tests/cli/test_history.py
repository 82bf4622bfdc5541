"""What a run by hand leaves in Dagster's history, for the UI: columns with their meaning and source, the state of every trait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest

from trait_assets import paths
from trait_assets.cli import open_workspace
from trait_assets.definitions import build_defs, load_experiments
from trait_assets.launch import open_instance
from trait_assets.pipeline import stages_of
from trait_assets.report import asset_page, overview
from trait_assets.report.contents import status_table

TRAIT = "register/bureaucratic"


@pytest.fixture
def instance(finished, monkeypatch) -> Iterator[dg.DagsterInstance]:
    for name, value in finished.copy.env.items():
        monkeypatch.setenv(name, value)
    for name in ("DAGSTER_HOME", "TRAITS_STORE"):
        monkeypatch.delenv(name, raising=False)
    with open_instance() as instance:
        yield instance


def metadata_of(instance: dg.DagsterInstance, asset: str, trait: str | None = None) -> dict[str, Any]:
    """The metadata of the newest materialisation, of one partition where one is asked for."""
    selected: Any = dg.AssetKey(["small", asset])
    if trait is not None:
        selected = dg.AssetRecordsFilter(asset_key=selected, asset_partitions=[trait])
    (record, *_) = instance.fetch_materializations(selected, limit=1).records
    return dict(record.asset_materialization.metadata)


def columns_of(asset: str) -> set[str]:
    graph = build_defs(experiments=load_experiments(paths.experiments_root())[0]).resolve_asset_graph()
    schema = graph.get(dg.AssetKey(["small", asset])).metadata["dagster/column_schema"]
    columns = schema.columns if isinstance(schema, dg.TableSchema) else schema.schema.columns
    assert all(column.description for column in columns)
    return {column.name for column in columns}


@pytest.mark.parametrize(
    ("table", "below"),
    [("extraction_evaluation", "vector_evaluation"), ("steering_summary", "steering_results")],
)
def test_each_column_of_a_table_leads_to_the_asset_and_column_that_it_comes_from(instance, table, below):
    lineage = metadata_of(instance, table)["dagster/column_lineage"].value
    named = columns_of(below)
    assert {dep.asset_key.path[-1] for deps in lineage.deps_by_column.values() for dep in deps} == {below}
    assert set(lineage.deps_by_column) <= columns_of(table)
    for column, deps in lineage.deps_by_column.items():
        assert {dep.column_name for dep in deps} <= named, column
    assert len(lineage.deps_by_column) >= 5


def test_numbers_that_a_stage_takes_over_lead_to_the_stage_that_made_them(instance):
    graph = build_defs(experiments=load_experiments(paths.experiments_root())[0]).resolve_asset_graph()
    found = 0
    for stage in stages_of(load_experiments(paths.experiments_root())[0][0]):
        if stage == "scenarios":
            continue
        lineage = metadata_of(instance, stage, TRAIT).get("dagster/column_lineage")
        for deps in lineage.value.deps_by_column.values() if lineage is not None else ():
            for dep in deps:
                assert graph.has(dep.asset_key)
                assert dep.column_name in columns_of(dep.asset_key.path[-1])
                found += 1
    assert found


def test_the_report_holds_the_state_of_every_trait_in_every_stage(instance):
    metadata = metadata_of(instance, "report")
    (table,) = [value for name, value in metadata.items() if name.replace("_", " ") == "trait status"]
    rows = {record.data["trait"]: record.data for record in table.records}
    assert set(rows) == {TRAIT, "emotion/enthusiasm"}
    assert {row["up to date"] for row in rows.values()} == {"8 of 8"}


def test_a_stage_that_is_not_up_to_date_stands_there_with_its_state_and_reason(instance):
    workspace = open_workspace()
    (experiment,) = load_experiments(paths.experiments_root())[0]
    stages = stages_of(experiment)

    def shown() -> dict[str, dict[str, Any]]:
        rows = overview.status_rows(workspace, experiment, paths.dataset_root(), None, stages)
        (table,) = asset_page.tables("report", {"trait_status": status_table(rows)}).values()
        return {row["trait"]: row for row in table}

    # the copy is shared: what is changed is changed back
    path = paths.dataset_root() / TRAIT / "positive.txt"
    written = path.read_bytes()
    try:
        path.write_bytes(written + b"One more of them, which is not stored yet, and\n")
        row = shown()[TRAIT]
    finally:
        path.write_bytes(written)
    assert row["not up to date"] == "scenarios stale"
    assert "the trait folder has changed since" in row["reason"]
    assert row["up to date"] == "7 of 8"
    assert shown()[TRAIT]["up to date"] == "8 of 8"
