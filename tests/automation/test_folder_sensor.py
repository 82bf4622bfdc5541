"""The folder sensor: new, changed, deleted and broken trait folders."""

import json
from pathlib import Path

import dagster as dg
import pytest

from resources.store import StoreResource
from storage import keys
from trait_assets import automation, paths
from trait_assets.automation import build_folder_sensor, folder_changes, traits_in_flight
from trait_assets.definitions import build_defs
from trait_assets.partitions import contiguous_ranges, known_traits, register


def write_trait(root: Path, trait: str, *, positive: str = "I love this") -> None:
    folder = root / trait
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "positive.txt").write_text("".join(f"{positive} {i}\n" for i in range(12)))
    (folder / "negative.txt").write_text("".join(f"It is fine {i}\n" for i in range(12)))
    (folder / "definition.txt").write_text("HIGH (70-100): joy\nMID (30-70): some\nLOW (0-30): none\n")
    (folder / "steering.json").write_text(json.dumps({"questions": ["How are you?", "What is new?"]}))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRAITS_DATASETS", str(tmp_path / "traits"))
    monkeypatch.setenv("TRAITS_STORE", str(tmp_path / "results"))
    monkeypatch.setenv("TRAITS_STATE", str(tmp_path / "state"))
    (tmp_path / "traits").mkdir()
    return tmp_path / "traits"


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def store() -> StoreResource:
    return StoreResource(root=paths.results_root(), duckdb_path=str(paths.lineage_path()))


def tick(instance, cursor=None):
    """Evaluate as the daemon does, and carry its requests out."""
    context = dg.build_sensor_context(instance=instance, cursor=cursor, resources={"store": store()})
    result = build_folder_sensor().evaluate_tick(context)
    for request in result.dynamic_partitions_requests or []:
        if isinstance(request, dg.AddDynamicPartitionsRequest):
            instance.add_dynamic_partitions("traits", list(request.partition_keys))
        else:
            for key in request.partition_keys:
                instance.delete_dynamic_partition("traits", key)
    for event in result.asset_events:
        instance.report_runless_asset_event(event)
    return result


def materialisations(result) -> list[str]:
    return [event.partition for event in result.asset_events if isinstance(event, dg.AssetMaterialization)]


def test_a_new_folder_is_read_and_becomes_a_partition(root, instance):
    write_trait(root, "mood/joy")
    result = tick(instance)
    assert known_traits(instance) == ["mood/joy"]
    workspace = store().open()
    manifest = workspace.manifests.read(None, "scenarios", "mood/joy")
    assert len(workspace.store.read_json(keys.scenario_set("mood/joy"))["positives"]) == 12
    (event,) = result.asset_events
    assert event.partition == "mood/joy"
    assert event.tags["dagster/data_version"] == manifest.fingerprint
    assert event.metadata["positives"].value == 12
    again = tick(instance, result.cursor)
    assert not again.asset_events
    assert "nothing new" in again.skip_message


def test_an_edit_is_read_and_reported_for_that_trait_alone(root, instance):
    write_trait(root, "mood/joy")
    write_trait(root, "mood/calm")
    first = tick(instance)
    write_trait(root, "mood/calm", positive="I rest")
    second = tick(instance, first.cursor)
    assert materialisations(second) == ["mood/calm"]
    stored = store().open().store.read_json(keys.scenario_set("mood/calm"))
    assert stored["positives"][0]["prompt"] == "I rest 0"


def test_what_a_run_by_hand_has_read_is_not_told_twice(root, instance):
    write_trait(root, "mood/joy")
    write_trait(root, "mood/calm")
    register(instance, ["mood/calm", "mood/joy"])
    defs = build_defs(experiments=[], resources={"store": store()})
    run = defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance,
        tags={
            "dagster/asset_partition_range_start": "mood/calm",
            "dagster/asset_partition_range_end": "mood/joy",
        },
    )
    assert run.success
    first = tick(instance)
    assert not first.asset_events
    write_trait(root, "mood/joy", positive="I sing")
    assert materialisations(tick(instance, first.cursor)) == ["mood/joy"]


def test_another_instance_over_the_same_results_is_told(root, instance):
    write_trait(root, "mood/joy")
    tick(instance)
    with dg.DagsterInstance.ephemeral() as fresh:
        result = tick(fresh)
    assert materialisations(result) == ["mood/joy"]
    assert result.asset_events[0].metadata["state"].value == "current"


def test_a_file_that_cannot_be_read_is_named_until_it_is_mended(root, instance):
    write_trait(root, "mood/joy")
    write_trait(root, "mood/torn")
    (root / "mood" / "torn" / "positive.txt").write_bytes(b"fine\n\xff\xfe\n")
    first = tick(instance)
    assert known_traits(instance) == ["mood/joy"]
    second = tick(instance, first.cursor)
    assert "left out: mood/torn" in second.skip_message
    write_trait(root, "mood/torn")
    third = tick(instance, first.cursor)
    assert materialisations(third) == ["mood/torn"]
    assert known_traits(instance) == ["mood/joy", "mood/torn"]


def test_many_new_folders_are_read_over_several_ticks(root, instance, monkeypatch):
    for name in ("a", "b", "c"):
        write_trait(root, f"mood/{name}")
    monkeypatch.setattr(automation, "READ_SECONDS", 0.0)
    seen = []
    cursor = None
    for _ in range(3):
        result = tick(instance, cursor)
        cursor = result.cursor
        seen.append(materialisations(result))
    assert [trait for traits in seen for trait in traits] == ["mood/a", "mood/b", "mood/c"]
    assert known_traits(instance) == ["mood/a", "mood/b", "mood/c"]
    assert "nothing new" in tick(instance, cursor).skip_message


def test_a_broken_folder_stops_no_other(root, instance):
    write_trait(root, "mood/joy")
    (root / "mood" / "Bad Name").mkdir()
    (root / "mood" / "Bad Name" / "positive.txt").write_text("x\n")
    (root / "mood" / "half").mkdir()
    (root / "mood" / "half" / "positive.txt").write_text("x\n")
    tick(instance)
    assert known_traits(instance) == ["mood/joy"]


def test_a_comma_in_a_name_is_a_problem_and_not_a_partition(root, instance):
    write_trait(root, "mood/joy")
    write_trait(root, "mood/a,b")
    tick(instance)
    assert known_traits(instance) == ["mood/joy"]


def test_a_deleted_folder_goes_only_when_no_run_covers_it(root, instance):
    for trait in ("mood/a", "mood/b", "mood/c"):
        write_trait(root, trait)
    first = tick(instance)
    for name in ("positive.txt", "negative.txt", "definition.txt", "steering.json"):
        (root / "mood" / "b" / name).unlink()
    (root / "mood" / "b").rmdir()

    @dg.asset(partitions_def=dg.DynamicPartitionsDefinition(name="traits"))
    def stage() -> None: ...

    job = dg.Definitions([stage]).resolve_implicit_global_asset_job_def()
    run = instance.create_run_for_job(
        job,
        tags={"dagster/asset_partition_range_start": "mood/a", "dagster/asset_partition_range_end": "mood/c"},
        status=dg.DagsterRunStatus.STARTED,
    )
    assert traits_in_flight(instance) == {"mood/a", "mood/b", "mood/c"}
    tick(instance, first.cursor)
    assert "mood/b" in known_traits(instance)
    instance.report_run_failed(run)
    tick(instance, first.cursor)
    assert known_traits(instance) == ["mood/a", "mood/c"]


def test_a_root_that_cannot_be_read_deletes_nothing(root, instance, monkeypatch):
    write_trait(root, "mood/joy")
    first = tick(instance)
    monkeypatch.setenv("TRAITS_DATASETS", str(root / "unmounted"))
    result = tick(instance, first.cursor)
    assert "cannot be read" in result.skip_message
    assert known_traits(instance) == ["mood/joy"]


def test_changes_are_a_pure_difference():
    changes = folder_changes(
        on_disk={"a/new": "1", "a/same": "2", "a/edited": "3"},
        known={"a/same", "a/edited", "a/gone", "a/busy"},
        seen={"a/same": "2", "a/edited": "0", "a/gone": "9"},
        busy={"a/busy"},
    )
    assert changes.added == ["a/new"]
    assert changes.changed == ["a/edited", "a/new"]
    assert changes.deleted == ["a/gone"]
    assert changes.deferred == ["a/busy"]


def test_ranges_follow_the_order_of_registration(instance):
    register(instance, ["b/2", "b/1"])
    register(instance, ["a/1", "c/1"])
    known = known_traits(instance)
    assert known == ["b/1", "b/2", "a/1", "c/1"]
    assert contiguous_ranges(known, ["b/1", "a/1", "c/1"], 16) == [["b/1"], ["a/1", "c/1"]]
    assert contiguous_ranges(known, known, 3) == [["b/1", "b/2", "a/1"], ["c/1"]]
    assert contiguous_ranges(known, [], 3) == []
