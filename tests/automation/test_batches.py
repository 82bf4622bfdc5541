"""Batches of traits as Dagster sees them: what a failing trait leaves behind, whose events are whose, what counts as stale."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import dagster as dg
import pytest
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import ModuleTarget

from storage.workspace import Workspace
from trait_assets import paths
from trait_assets.activations.extraction import ActivationsStage
from trait_assets.launch import open_instance
from trait_assets.partitions import register

STAGES = ("activations", "vectors", "vector_evaluation")
TRAITS = [f"t/{name}" for name in "abcde"]


@pytest.fixture
def five(project):
    for trait in TRAITS:
        project.folder(trait)
    project.experiment("demo", prefill_only=True, steering=False)
    return project


def batch(
    project: Any,
    instance: dg.DagsterInstance,
    stages: Sequence[str],
    traits: Sequence[str],
    defs: dg.Definitions | None = None,
) -> dg.ExecuteInProcessResult:
    keys = [dg.AssetKey(["scenarios"] if stage == "scenarios" else ["demo", stage]) for stage in stages]
    tags = {}
    if len(traits) > 1:
        tags = {
            "dagster/asset_partition_range_start": traits[0],
            "dagster/asset_partition_range_end": traits[-1],
        }
    job = (defs or project.defs()).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance,
        asset_selection=keys,
        partition_key=traits[0] if len(traits) == 1 else None,
        tags=tags,
        raise_on_error=False,
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )


def materialized(instance: dg.DagsterInstance, stage: str) -> set[str]:
    return instance.get_materialized_partitions(dg.AssetKey(["demo", stage]))


def test_one_failing_trait_of_a_batch_leaves_the_others_done_and_is_redone_alone(five, instance):
    register(instance, TRAITS)
    five.broken.add(("vectors", "t/c"))
    run = batch(five, instance, ("scenarios", *STAGES), TRAITS)
    assert not run.success
    (failure,) = [event.step_failure_data for event in run.all_events if event.is_step_failure]
    message = failure.user_failure_data.description
    assert "1 of 5 traits failed" in message
    assert "t/c" in message
    assert "it cannot be done — mend it" in message
    assert failure.user_failure_data.metadata["failed_traits"].value == ["t/c"]
    good = set(TRAITS) - {"t/c"}
    assert materialized(instance, "activations") == set(TRAITS)
    assert materialized(instance, "vectors") == good
    assert materialized(instance, "vector_evaluation") == set()
    manifests = Workspace(paths.results_root(), paths.lineage_path()).manifests
    assert {t for t in TRAITS if manifests.read("demo", "vectors", t)} == good
    # every trait's event carries its own version, which the batch's one version cannot
    told = instance.fetch_materializations(dg.AssetKey(["demo", "vectors"]), limit=20).records
    versions = {
        record.partition_key: record.asset_materialization.tags["dagster/data_version"] for record in told
    }
    assert versions == {t: manifests.read("demo", "vectors", t).fingerprint for t in good}

    five.broken.clear()
    five.worked.clear()
    assert batch(five, instance, STAGES, TRAITS).success
    assert [trait for stage, trait in five.worked if stage in ("activations", "vectors")] == ["t/c"]


def test_trait_assets_tell_only_of_partitions_and_tables_only_of_themselves(five, instance):
    register(instance, TRAITS)
    runs = [
        batch(five, instance, ("scenarios", *STAGES), TRAITS[:3]),
        batch(five, instance, ("scenarios", *STAGES), TRAITS[3:4]),
    ]
    tables = five.defs().resolve_implicit_global_asset_job_def()
    runs.append(
        tables.execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey(["demo", "extraction_evaluation"])],
        )
    )
    assert all(run.success for run in runs)
    seen = {}
    for run in runs:
        for event in run.all_events:
            if event.is_step_materialization:
                name = event.asset_key.path[-1]
                seen.setdefault(name, set()).add(event.partition is None)
    assert seen == {
        **{name: {False} for name in ("scenarios", *STAGES)},
        "extraction_evaluation": {True},
    }


def test_checks_carry_their_trait_in_a_batch_and_alone(five, instance):
    register(instance, TRAITS)
    batch(five, instance, ("scenarios", "activations"), TRAITS[:3])
    batch(five, instance, ("scenarios", "activations"), TRAITS[3:4])
    for asset, check in (("scenarios", "no_duplicates"), ("demo/activations", "activations_vary")):
        key = dg.AssetCheckKey(dg.AssetKey(asset.split("/")), check)
        found = instance.event_log_storage.get_asset_check_partition_info([key])
        assert {info.partition_key for info in found if info.partition_key} == set(TRAITS[:4])


def test_a_trait_with_nothing_to_check_leaves_no_check_unanswered(five, instance, monkeypatch):
    register(instance, TRAITS)
    plan = ActivationsStage.plan

    def left_out(self: Any, ctx: Any, trait: Any) -> Any:
        made = plan(self, ctx, trait)
        return replace(made, skipped="not in this experiment") if trait == TRAITS[1] else made

    monkeypatch.setattr(ActivationsStage, "plan", left_out)
    assert batch(five, instance, ("scenarios", "activations"), TRAITS[:3]).success
    key = dg.AssetCheckKey(dg.AssetKey(["demo", "activations"]), "activations_vary")
    records = instance.event_log_storage.get_asset_check_execution_history(key, limit=20)
    assert {record.status.value for record in records} == {"SUCCEEDED"}
    said = {
        record.partition: record.event.dagster_event.event_specific_data.description for record in records
    }
    assert set(said) == {*TRAITS[:3], None}
    assert said[TRAITS[1]] == "The stage was skipped: there is nothing to check."
    assert said[None] == "2 of 2 traits pass"


def test_only_the_edited_trait_is_requested_after_a_batch(five, instance):
    register(instance, TRAITS)
    defs = five.defs()
    assert batch(five, instance, ("scenarios", *STAGES), TRAITS, defs).success
    cursor = dg.evaluate_automation_conditions(defs, instance).cursor
    five.folder("t/b", "I hate this")
    assert batch(five, instance, ("scenarios",), ["t/b"], defs).success
    result = dg.evaluate_automation_conditions(defs, instance, cursor=cursor)
    for stage in STAGES:
        assert result.get_requested_partitions(dg.AssetKey(["demo", stage])) == {"t/b"}


def test_traits_that_were_there_before_the_conditions_wait_for_the_sweep_and_new_ones_do_not(five, instance):
    register(instance, TRAITS[:4])
    defs = five.defs()
    for trait in TRAITS[:4]:
        instance.report_runless_asset_event(
            dg.AssetMaterialization("scenarios", partition=trait, tags={"dagster/data_version": "1"})
        )
    first = dg.evaluate_automation_conditions(defs, instance)
    asked = {first.get_requested_partitions(dg.AssetKey(["demo", stage])) is not None for stage in STAGES}
    assert first.total_requested == 0, asked
    register(instance, TRAITS)
    instance.report_runless_asset_event(
        dg.AssetMaterialization("scenarios", partition=TRAITS[4], tags={"dagster/data_version": "1"})
    )
    second = dg.evaluate_automation_conditions(defs, instance, cursor=first.cursor)
    assert second.get_requested_partitions(dg.AssetKey(["demo", "activations"])) == {TRAITS[4]}


def test_no_job_is_offered_whose_backfill_would_be_a_run_per_trait(five):
    names = [job.name for job in five.defs().get_repository_def().get_all_jobs()]
    # those that Dagster makes for itself are not shown
    assert names
    assert all(name.startswith("__") for name in names)


STALE = """
query($key: AssetKeyInput!, $partitions: [String!]) {
  assetNodeOrError(assetKey: $key) {
    ... on AssetNode { partitionKeys staleStatusByPartition(partitions: $partitions) }
    ... on Error { message }
  }
}
"""


def test_the_ui_shows_the_edited_trait_alone_as_stale(five):
    from dagster_graphql.schema import create_schema

    with open_instance() as instance:
        register(instance, TRAITS[:3])
        assert batch(five, instance, ("scenarios", "activations"), TRAITS[:3]).success
        five.folder("t/b", "I hate this")
        assert batch(five, instance, ("scenarios",), ["t/b"]).success
        target = ModuleTarget("trait_assets.definitions", None, str(paths.REPOSITORY), "traits")
        with WorkspaceProcessContext(instance, target) as process:
            answer = create_schema().execute(
                STALE,
                context_value=process.create_request_context(),
                variables={"key": {"path": ["demo", "activations"]}, "partitions": TRAITS[:3]},
            )
    assert not answer.errors
    node = json.loads(json.dumps(answer.data))["assetNodeOrError"]
    assert node["partitionKeys"] == TRAITS[:3]
    assert node["staleStatusByPartition"] == ["FRESH", "STALE", "FRESH"]


def test_a_folder_that_goes_between_two_stages_costs_only_what_was_never_read(five, instance):
    register(instance, TRAITS[:2])
    assert batch(five, instance, ("scenarios",), TRAITS[:1]).success
    for trait in TRAITS[:2]:
        shutil.rmtree(five.root / "datasets" / trait)
    run = batch(five, instance, STAGES, TRAITS[:2])
    (failure,) = [event.step_failure_data for event in run.all_events if event.is_step_failure]
    assert "t/b has no `scenarios` yet" in failure.user_failure_data.description
    # what was read is kept and says what it was made from; what was not has no result, so no row in any table
    assert materialized(instance, "activations") == {"t/a"}
    manifests = Workspace(paths.results_root(), paths.lineage_path()).manifests
    assert manifests.read("demo", "activations", "t/b") is None
    assert batch(five, instance, STAGES, TRAITS[:1]).success
    assert materialized(instance, "vector_evaluation") == {"t/a"}
