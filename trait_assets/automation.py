"""What runs by itself: new and changed trait folders, what follows from them, tables after their rows, the nightly sweep.

The folder sensor is a shell over a pure difference (`folder_changes`), the nightly sweep over `sweep.py`. The conditions are
named and explained here and are tested by simulated ticks.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus

from storage.errors import UserError
from trait_assets.partitions import TRAITS, known_traits, traits_partitions
from trait_assets.paths import dataset_root

if TYPE_CHECKING:
    from storage.workspace import Workspace
    from trait_assets.backfill import Backfill
    from trait_assets.experiments import Experiment
    from trait_assets.pipeline import TraitResult

# when the nightly sweep looks; TRAITS_SWEEP sets another cron schedule
SWEEP = "0 2 * * *"
# Dagster ends a sensor's tick after 60 s; hundreds of new folders are read over several ticks
READ_SECONDS = 15.0
# the methods' annotations disagree about what a condition is over
AC: Any = dg.AutomationCondition


def keep_fresh() -> dg.AutomationCondition:
    """Request a trait when it is new, or when an input's content or the stage's code changed.

    Edges, not levels: a bare `missing()` would ask for a permanently failing trait at every tick, and excluding failed ones
    would leave the healthy traits of a failed batch behind for ever. What no edge led to, the nightly sweep finds.
    """
    changed = AC.any_deps_updated().replace("newly_updated", AC.data_version_changed())
    # an input that is there for the first time: so the good traits of a batch that failed for another go on at once
    appeared = AC.any_deps_match((~AC.missing()).newly_true())
    return (
        (AC.newly_missing() | changed | appeared | AC.code_version_changed()).since_last_handled()
        & ~AC.in_progress()
        & ~AC.any_deps_in_progress()
        & ~AC.any_deps_missing()
    ).with_label("keep_fresh")


def refresh_table() -> dg.AutomationCondition:
    """Rebuild a table once after a wave of updates below it has come to rest."""
    return (
        AC.any_deps_updated().since_last_handled() & ~AC.any_deps_in_progress() & ~AC.in_progress()
    ).with_label("refresh_table")


@dataclass(frozen=True)
class FolderChanges:
    """What differs between the trait folders and the instance."""

    added: list[str]
    changed: list[str]
    deleted: list[str]
    deferred: list[str]


def folder_changes(
    on_disk: Mapping[str, str], known: Collection[str], seen: Mapping[str, str], busy: Collection[str]
) -> FolderChanges:
    """Compare trait → content hash on disk with the partitions known and the hashes last reported.

    A key that a queued or running run covers is not deleted now: the run would die of a missing partition.
    """
    known_set, busy_set = set(known), set(busy)
    gone = sorted(known_set - set(on_disk))
    return FolderChanges(
        added=sorted(set(on_disk) - known_set),
        changed=sorted(t for t, content in on_disk.items() if seen.get(t) != content),
        deleted=[t for t in gone if t not in busy_set],
        deferred=[t for t in gone if t in busy_set],
    )


def traits_in_flight(instance: dg.DagsterInstance) -> set[str]:
    """Traits covered by a run that is queued or running, ranges included, or by a backfill that is not through yet."""
    known = known_traits(instance)
    covered: set[str] = set()
    filters = dg.RunsFilter(
        statuses=[
            dg.DagsterRunStatus.QUEUED,
            dg.DagsterRunStatus.NOT_STARTED,
            dg.DagsterRunStatus.STARTING,
            dg.DagsterRunStatus.STARTED,
            dg.DagsterRunStatus.CANCELING,
        ]
    )
    for record in instance.get_run_records(filters):
        tags = record.dagster_run.tags
        if key := tags.get("dagster/partition"):
            covered.add(key)
        start, end = (
            tags.get("dagster/asset_partition_range_start"),
            tags.get("dagster/asset_partition_range_end"),
        )
        if start in known and end in known:
            covered.update(known[known.index(start) : known.index(end) + 1])
        elif start or end:
            # a range whose end is gone cannot be resolved: hold every deletion back
            covered.update(known)
    for backfill in instance.get_backfills(
        BulkActionsFilter(statuses=[BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING])
    ):
        data = backfill.asset_backfill_data
        subsets = data.target_subset.partitions_subsets_by_asset_key.values() if data is not None else ()
        with partition_loading_context(datetime.now(UTC), instance):
            for subset in subsets:
                covered.update(subset.get_partition_keys())
    return covered


@dataclass
class Reading:
    """What one tick read: the results of the stage `scenarios`, and why the other folders cannot be used."""

    results: dict[str, TraitResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def read_folders(workspace: Workspace, root: Path, traits: Sequence[str], *, seconds: float) -> Reading:
    """Bring the stage `scenarios` up to date for changed folders, here and now: it only reads text.

    Stops after about `seconds`; what is in neither result is left for the next tick.
    """
    from trait_assets.experiments import Experiment
    from trait_assets.pipeline import StageContext, run
    from trait_assets.progress import LogProgress
    from trait_assets.scenarios.reading import ScenariosStage

    context = StageContext(
        # shared stages read no option, no model and no judge; the context still wants them
        experiment=Experiment(name="shared", extraction_model="none"),
        workspace=workspace,
        models=None,  # type: ignore[arg-type]
        judges=None,  # type: ignore[arg-type]
        dataset_root=root,
        run_id="folder-sensor",
        progress=LogProgress(logging.getLogger("trait_assets")),
    )
    reading = Reading()
    started = time.monotonic()
    for trait in traits:
        (result,) = run(ScenariosStage(), context, [trait])
        if result.state == "failed":
            reading.failed[trait] = result.reason or "cannot be read"
        else:
            reading.results[trait] = result
        if time.monotonic() - started > seconds:
            break
    return reading


def evaluate_folders(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    """One tick: read new and changed folders into `scenarios`, add their partitions, delete what is gone and idle.

    The later stages take the scenario sets from the store, so a materialisation is reported only of what was read.
    A folder that cannot be read gets no partition and is named at every tick until it is mended.
    """
    from trait_assets.scenarios.dataset import discover, trait_hash

    root = dataset_root()
    if not root.is_dir():
        # "cannot be read" is not "empty": never delete on it
        return dg.SkipReason(f"{root} cannot be read")
    found = discover(root)
    on_disk = {trait: trait_hash(root, trait) for trait in found.traits}
    seen: dict[str, str] = json.loads(context.cursor) if context.cursor else {}
    instance = context.instance
    known = set(known_traits(instance))
    # a folder that is broken today still has its partition: it may be half saved
    broken = set(found.problems) & known
    changes = folder_changes(on_disk, known - broken, seen, traits_in_flight(instance))
    workspace = context.resources.store.open()
    reading = read_folders(workspace, root, changes.changed, seconds=READ_SECONDS)
    left_out = {**found.problems, **reading.failed}
    for folder, reason in left_out.items():
        context.log.warning("trait folder %s is left out: %s", folder, reason)
    events = scenario_events(instance, workspace, reading)
    requests: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
    if added := [trait for trait in sorted(reading.results) if trait not in known]:
        requests.append(traits_partitions.build_add_request(added))
    if changes.deleted:
        requests.append(traits_partitions.build_delete_request(changes.deleted))
    read = {trait: on_disk[trait] for trait in reading.results}
    cursor = {trait: value for trait, value in {**seen, **read}.items() if trait in on_disk}
    if not requests and not events and cursor == seen:
        return dg.SkipReason(
            f"{len(on_disk) - len(reading.failed)} traits, nothing new"
            + (f"; left out: {', '.join(sorted(left_out))}" if left_out else "")
        )
    return dg.SensorResult(
        dynamic_partitions_requests=requests, asset_events=events, cursor=json.dumps(cursor)
    )


def scenario_events(
    instance: dg.DagsterInstance, workspace: Workspace, reading: Reading
) -> list[dg.AssetMaterialization]:
    """What the tick reports of the folders that it read: a materialisation of each, failed checks in its metadata.

    Check results themselves are left to runs: outside a run Dagster takes one per check and partition, ever.

    A folder that a run by hand has read already is known to this instance by that run's own event: telling it twice
    would send every experiment over it once more.
    """
    from trait_assets.stage import result_metadata

    key = dg.AssetKey("scenarios")
    current = [trait for trait, result in reading.results.items() if result.state != "done"]
    told = told_at(instance, key, current)
    events: list[dg.AssetMaterialization] = []
    for trait, result in reading.results.items():
        manifest = result.manifest
        assert manifest is not None
        if told.get(trait, 0.0) >= datetime.fromisoformat(manifest.created_at).timestamp():
            continue
        events.append(
            dg.AssetMaterialization(
                asset_key=key,
                partition=trait,
                metadata={**result_metadata(workspace, result), "read_by": "the folder sensor"},
                tags={"dagster/data_version": manifest.fingerprint},
            )
        )
    return events


def told_at(instance: dg.DagsterInstance, key: dg.AssetKey, traits: Sequence[str]) -> dict[str, float]:
    """When this instance last heard of a materialisation of each trait, as a POSIX timestamp."""
    if not traits:
        return {}
    told: dict[str, float] = {}
    storage_ids = instance.get_latest_storage_id_by_partition(
        key, dg.DagsterEventType.ASSET_MATERIALIZATION, set(traits)
    )
    if not storage_ids:
        return {}
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=key, storage_ids=list(storage_ids.values())), limit=len(storage_ids)
    ).records
    for record in records:
        if record.partition_key is not None:
            told[record.partition_key] = record.timestamp
    return told


def build_folder_sensor() -> dg.SensorDefinition:
    return dg.SensorDefinition(
        name="trait_folders",
        evaluation_fn=evaluate_folders,
        minimum_interval_seconds=10,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reads new and changed folders under datasets/traits and adds their partitions.",
        required_resource_keys={"store"},
    )


def build_automation_sensor() -> dg.AutomationConditionSensorDefinition:
    return dg.AutomationConditionSensorDefinition(
        name="keep_experiments_fresh",
        target=dg.AssetSelection.all(),
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=15,
        description="Turns the conditions of the assets into batched backfills.",
    )


def evaluate_sweep(
    instance: dg.DagsterInstance,
    workspace: Workspace,
    experiments: Sequence[Experiment],
    log: logging.Logger,
) -> list[dg.RunRequest | dg.SkipReason]:
    """One night: a run request for every range of neighbouring traits that lack something, in batches of the policy's size.

    A trait is in one run per experiment, so a permanently failing one is tried once. The runs go through the queue like
    any others, so the pools' limits hold. What a run or backfill in progress covers is left to it.
    """
    from trait_assets.experiments import load_experiment
    from trait_assets.paths import experiments_root
    from trait_assets.pipeline import stages_of
    from trait_assets.stage import TRAITS_PER_RUN, asset_key
    from trait_assets.sweep import backfills, in_words, needs

    known = known_traits(instance)
    registered = set(known)
    busy = traits_in_flight(instance)
    told: dict[dg.AssetKey, set[str]] = {}
    requests: list[dg.RunRequest | dg.SkipReason] = []
    waiting: set[str] = set()
    for loaded in experiments:
        try:
            experiment = load_experiment(experiments_root(), loaded.name)
        except UserError as error:
            log.warning("experiment %s is left out: %s", loaded.name, error)
            continue
        if stages_of(experiment) != stages_of(loaded):
            log.warning(
                "experiment %s is left out: its config has another graph than the one loaded; press "
                "`Reload definitions`",
                loaded.name,
            )
            continue
        keys = {s: asset_key(None if s == "scenarios" else loaded, s) for s in stages_of(loaded)}
        for key in keys.values():
            if key not in told:
                told[key] = instance.get_materialized_partitions(key)
        lacking = [
            need
            for need in needs(
                workspace, experiment, dataset_root(), {s: told[key] for s, key in keys.items()}
            )
            if need.trait in registered
        ]
        waiting.update(need.trait for need in lacking if need.trait in busy)
        free = [need for need in lacking if need.trait not in busy]
        if free:
            log.info("%s: %s", loaded.name, in_words(free))
        for backfill in backfills(loaded, free, known, TRAITS_PER_RUN):
            for run in backfill.runs:
                requests.append(_range_request(backfill, run, [keys[stage] for stage in backfill.stages]))
    if requests:
        return requests
    names = ", ".join(experiment.name for experiment in experiments)
    if waiting:
        return [dg.SkipReason(f"runs in progress cover what is missing: {', '.join(sorted(waiting)[:10])}")]
    return [dg.SkipReason(f"everything is up to date: {len(known)} traits in {names or 'no experiment'}")]


def _range_request(backfill: Backfill, run: Sequence[str], keys: Sequence[dg.AssetKey]) -> dg.RunRequest:
    tags = {"trait_assets/launched_by": "nightly_sweep", "trait_assets/experiment": backfill.experiment}
    if len(run) > 1:
        tags["dagster/asset_partition_range_start"] = run[0]
        tags["dagster/asset_partition_range_end"] = run[-1]
    return dg.RunRequest(
        run_key=f"{backfill.experiment}/{backfill.stages[0]}/{run[0]}",
        partition_key=run[0] if len(run) == 1 else None,
        asset_selection=list(keys),
        tags=tags,
    )


def build_sweep(experiments: Sequence[Experiment]) -> dg.ScheduleDefinition:
    """The schedule `nightly_sweep` over the trait assets of these experiments."""
    from trait_assets.pipeline import stages_of
    from trait_assets.stage import asset_key

    keys = {asset_key(None, "scenarios")} | {
        asset_key(None if stage == "scenarios" else experiment, stage)
        for experiment in experiments
        for stage in stages_of(experiment)
    }

    def evaluate(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        # Dagster takes several requests from a generator alone
        yield from evaluate_sweep(context.instance, context.resources.store.open(), experiments, context.log)

    cron = os.environ.get("TRAITS_SWEEP", SWEEP)
    try:
        return dg.ScheduleDefinition(
            name="nightly_sweep",
            cron_schedule=cron,
            target=dg.AssetSelection.assets(*sorted(keys)),
            execution_fn=evaluate,
            required_resource_keys={"store"},
            default_status=dg.DefaultScheduleStatus.RUNNING,
            description=(
                "Once a night, whatever is missing, failed or out of date in any trait of any experiment is tried "
                "again, in batches. TRAITS_SWEEP sets another cron schedule (UTC)."
            ),
        )
    except dg.DagsterInvalidDefinitionError as error:
        raise UserError(
            f"`{cron}` is no cron schedule", where="TRAITS_SWEEP", remedy=f"write e.g. TRAITS_SWEEP='{SWEEP}'"
        ) from error


def sensors() -> Iterator[dg.SensorDefinition]:
    yield build_folder_sensor()
    yield build_automation_sensor()


__all__ = [
    "TRAITS",
    "FolderChanges",
    "build_sweep",
    "evaluate_folders",
    "evaluate_sweep",
    "folder_changes",
    "keep_fresh",
    "refresh_table",
    "sensors",
]
