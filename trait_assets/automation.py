"""What runs by itself: new and changed trait folders, missing partitions, tables after their rows.

The folder sensor is a shell over a pure difference (`folder_changes`). The conditions are named and explained here and are
tested by simulated ticks.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg

from trait_assets.partitions import TRAITS, known_traits, traits_partitions
from trait_assets.paths import dataset_root

SWEEP = "0 * * * *"
# the methods' annotations disagree about what a condition is over
AC: Any = dg.AutomationCondition


def keep_fresh(sweep: str = SWEEP) -> dg.AutomationCondition:
    """Request a trait when it is new, when an input's content or the stage's code changed, or when a sweep finds it missing.

    Edges, not levels: a bare `missing()` would ask for a permanently failing trait at every tick, and excluding failed ones
    would leave the healthy traits of a failed batch behind for ever. The sweep gives every missing trait one try an hour.
    """
    changed = AC.any_deps_updated().replace("newly_updated", AC.data_version_changed())
    # an input that is there for the first time: so the good traits of a batch that failed for another go on at once
    appeared = AC.any_deps_match((~AC.missing()).newly_true())
    missed = AC.missing() & AC.cron_tick_passed(sweep)
    return (
        (AC.newly_missing() | changed | appeared | AC.code_version_changed() | missed).since_last_handled()
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
    """Traits covered by a run that is queued or running, ranges included."""
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
    return covered


def evaluate_folders(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    """One tick: add new traits, report changed scenarios as materialisations of `scenarios`, delete what is gone and idle."""
    from trait_assets.scenarios.dataset import discover, trait_hash

    root = dataset_root()
    if not root.is_dir():
        # "cannot be read" is not "empty": never delete on it
        return dg.SkipReason(f"{root} cannot be read")
    found = discover(root)
    on_disk = {trait: trait_hash(root, trait) for trait in found.traits}
    seen: dict[str, str] = json.loads(context.cursor) if context.cursor else {}
    instance = context.instance
    busy = traits_in_flight(instance)
    # a folder that is broken today still has its partition: it may be half saved
    broken = {folder for folder in found.problems if folder in set(known_traits(instance))}
    changes = folder_changes(on_disk, set(known_traits(instance)) - broken, seen, busy)
    for folder, reason in found.problems.items():
        context.log.warning("trait folder %s is left out: %s", folder, reason)
    events = [
        dg.AssetMaterialization(
            asset_key="scenarios",
            partition=trait,
            metadata={"content_hash": on_disk[trait], "state": "reported by the folder sensor"},
            tags={"dagster/data_version": on_disk[trait]},
        )
        for trait in changes.changed
    ]
    requests: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
    if changes.added:
        requests.append(traits_partitions.build_add_request(changes.added))
    if changes.deleted:
        requests.append(traits_partitions.build_delete_request(changes.deleted))
    if not requests and not events:
        return dg.SkipReason(
            f"{len(on_disk)} traits, nothing new"
            + (f"; left out: {', '.join(sorted(found.problems))}" if found.problems else "")
        )
    cursor = dict(on_disk.items())
    return dg.SensorResult(
        dynamic_partitions_requests=requests, asset_events=events, cursor=json.dumps(cursor)
    )


def build_folder_sensor() -> dg.SensorDefinition:
    return dg.SensorDefinition(
        name="trait_folders",
        evaluation_fn=evaluate_folders,
        minimum_interval_seconds=10,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Adds a partition for each new folder under datasets/traits and reports changed scenarios.",
        asset_selection=None,
    )


def build_automation_sensor() -> dg.AutomationConditionSensorDefinition:
    return dg.AutomationConditionSensorDefinition(
        name="keep_experiments_fresh",
        target=dg.AssetSelection.all(),
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=15,
        description="Turns the conditions of the assets into batched backfills.",
    )


def sensors() -> Iterator[dg.SensorDefinition]:
    yield build_folder_sensor()
    yield build_automation_sensor()


__all__ = [
    "TRAITS",
    "FolderChanges",
    "evaluate_folders",
    "folder_changes",
    "keep_fresh",
    "refresh_table",
    "sensors",
]
