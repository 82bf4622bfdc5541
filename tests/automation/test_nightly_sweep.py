"""The schedule `nightly_sweep`: what it asks for, in which batches, and that it asks for nothing twice a night."""

from __future__ import annotations

import logging

import dagster as dg
import pytest

from storage.errors import UserError
from storage.workspace import Workspace
from trait_assets import paths, stages
from trait_assets.automation import SWEEP, build_sweep, evaluate_sweep
from trait_assets.backfill import Backfill
from trait_assets.definitions import load_experiments
from trait_assets.experiments import Experiment
from trait_assets.launch import open_instance
from trait_assets.partitions import known_traits, register
from trait_assets.sweep import Need, backfills


def night(defs: dg.Definitions, instance: dg.DagsterInstance) -> list[dg.RunRequest] | str:
    """What one night asks for, or why it asks for nothing."""
    graph = {key.path[0] for key in defs.resolve_asset_graph().get_all_asset_keys()} - {"scenarios"}
    experiments = [e for e in load_experiments(paths.experiments_root())[0] if e.name in graph]
    workspace = Workspace(paths.results_root(), paths.lineage_path())
    result = evaluate_sweep(instance, workspace, experiments, logging.getLogger("sweep"))
    requests = [one for one in result if isinstance(one, dg.RunRequest)]
    reasons = [str(one.skip_message) for one in result if isinstance(one, dg.SkipReason)]
    assert bool(requests) != bool(reasons)
    return requests or reasons[0]


def test_the_schedule_is_evaluated_as_the_code_server_does(project):
    for name in ("t/a", "t/b"):
        project.folder(name)
    project.experiment("demo")
    repository = project.defs().get_repository_def()
    schedule = repository.get_schedule_def("nightly_sweep")
    with open_instance() as instance:
        register(instance, ["t/a", "t/b"])
        with dg.build_schedule_context(
            instance=instance,
            repository_def=repository,
            resources={"store": project.defs().resources["store"]},
        ) as context:
            tick = schedule.evaluate_tick(context)
            assert [traits_of(r, instance) for r in tick.run_requests] == [["t/a", "t/b"]]


def traits_of(request: dg.RunRequest, instance: dg.DagsterInstance) -> list[str]:
    if request.partition_key:
        return [request.partition_key]
    known = known_traits(instance)
    start, end = (request.tags[f"dagster/asset_partition_range_{name}"] for name in ("start", "end"))
    return known[known.index(start) : known.index(end) + 1]


def stages_in(request: dg.RunRequest) -> set[str]:
    return {key.path[-1] for key in request.asset_selection or ()}


def test_it_is_in_the_graph_and_runs_by_itself(project, monkeypatch):
    project.experiment("demo")
    (schedule,) = project.defs().get_repository_def().schedule_defs
    assert (schedule.name, schedule.cron_schedule) == ("nightly_sweep", SWEEP)
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    monkeypatch.setenv("TRAITS_SWEEP", "30 4 * * 1")
    assert project.defs().get_repository_def().get_schedule_def("nightly_sweep").cron_schedule == "30 4 * * 1"
    monkeypatch.setenv("TRAITS_SWEEP", "at night")
    with pytest.raises(UserError, match="TRAITS_SWEEP"):
        build_sweep([])


def test_what_is_missing_is_asked_for_in_batches_and_then_never_again(project, instance, registered):
    defs = project.defs()
    requests = night(defs, instance)
    assert [len(traits_of(r, instance)) for r in requests] == [4, 2]
    assert [t for r in requests for t in traits_of(r, instance)] == registered
    assert len({r.run_key for r in requests}) == len(requests)
    for request in requests:
        assert stages_in(request) == {"scenarios", "activations", "vectors", "vector_evaluation"}
        assert request.tags["trait_assets/launched_by"] == "nightly_sweep"
        assert project.run(defs, instance, request)
    assert night(defs, instance) == "everything is up to date: 6 traits in demo"


def test_experiments_have_runs_of_their_own_and_only_their_traits(project, instance, registered):
    project.experiment("few", traits=["t/3", "t/4"], steering=False)
    requests = night(project.defs(), instance)
    by_experiment = {r.tags["trait_assets/experiment"]: r for r in requests}
    assert set(by_experiment) == {"demo", "few"}
    assert traits_of(by_experiment["few"], instance) == ["t/3", "t/4"]
    assert "steering_results" not in stages_in(by_experiment["few"])


def test_an_edit_and_a_new_code_version_are_found_where_no_condition_saw_them(
    project, instance, registered, monkeypatch
):
    defs = project.defs()
    for request in night(defs, instance):
        project.run(defs, instance, request)
    project.folder("t/2", "I hate this")
    (request,) = night(defs, instance)
    assert request.partition_key == "t/2"
    assert "scenarios" in stages_in(request)
    assert project.run(defs, instance, request)
    assert "everything" in night(defs, instance)

    versions = stages.code_versions()
    monkeypatch.setattr(stages, "code_versions", lambda: {**versions, "vectors": "next"})
    requests = night(defs, instance)
    assert sum(len(traits_of(r, instance)) for r in requests) == 6
    assert stages_in(requests[0]) == {"vectors", "vector_evaluation"}


def test_a_permanently_failing_trait_is_tried_once_a_night_and_holds_nobody_up(project, instance, registered):
    project.broken.add(("activations", "t/5"))
    defs = project.defs()
    tries = []
    for _ in range(4):
        before = len(project.worked)
        for request in night(defs, instance):
            project.run(defs, instance, request)
        tries.append(project.worked[before:].count(("activations", "t/5")))
    assert tries == [1, 1, 1, 1]
    # no condition helped here: by the second night the others are through
    done = instance.get_materialized_partitions(dg.AssetKey(["demo", "vector_evaluation"]))
    assert done == set(registered) - {"t/5"}
    (request,) = night(defs, instance)
    assert traits_of(request, instance) == ["t/5"]


def test_what_a_run_or_a_backfill_covers_is_left_to_it(project, instance, registered):
    defs = project.defs()
    job = defs.resolve_implicit_global_asset_job_def()
    run = instance.create_run_for_job(
        job,
        tags={"dagster/asset_partition_range_start": "t/0", "dagster/asset_partition_range_end": "t/3"},
        status=dg.DagsterRunStatus.STARTED,
    )
    asked = {t for r in night(defs, instance) for t in traits_of(r, instance)}
    assert asked == set(registered[4:])

    from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill

    instance.add_backfill(
        PartitionBackfill.from_asset_partitions(
            backfill_id="waiting",
            asset_graph=defs.resolve_asset_graph(),
            partition_names=registered[4:],
            asset_selection=[dg.AssetKey(["demo", "vectors"])],
            backfill_timestamp=0.0,
            tags={},
            dynamic_partitions_store=instance,
            all_partitions=False,
            title=None,
            description=None,
            run_config=None,
        )
    )
    said = night(defs, instance)
    assert "in progress" in said
    assert "t/0" in said
    instance.report_run_failed(run)
    instance.update_backfill(instance.get_backfill("waiting").with_status(BulkActionStatus.COMPLETED_SUCCESS))
    assert len(night(defs, instance)) == 2


def test_a_new_history_is_told_what_is_there_and_nothing_is_computed(project, instance, registered):
    defs = project.defs()
    for request in night(defs, instance):
        project.run(defs, instance, request)
    computed = len(project.worked)
    with dg.DagsterInstance.ephemeral() as fresh:
        register(fresh, registered)
        for request in night(defs, fresh):
            assert project.run(defs, fresh, request)
        assert "everything" in night(defs, fresh)
    assert len(project.worked) == computed


def test_a_lost_manifest_is_missing_from_its_stage_on(project, instance, registered):
    defs = project.defs()
    for request in night(defs, instance):
        project.run(defs, instance, request)
    store = Workspace(paths.results_root(), paths.lineage_path()).store
    (path,) = store.root.glob("demo/manifests/activations/t/4.json")
    path.unlink()
    (request,) = night(defs, instance)
    assert request.partition_key == "t/4"
    assert stages_in(request) == {"activations", "vectors", "vector_evaluation"}


def test_a_folder_that_cannot_be_used_and_one_not_registered_are_left_to_the_sensor(
    project, instance, registered
):
    (project.root / "datasets" / "t" / "5" / "negative.txt").unlink()
    project.folder("t/99")
    asked = {t for r in night(project.defs(), instance) for t in traits_of(r, instance)}
    assert asked == set(registered) - {"t/5"}


def test_a_config_that_has_outgrown_the_loaded_graph_is_left_out_with_words(
    project, instance, registered, caplog
):
    (loaded,) = load_experiments(paths.experiments_root())[0]
    project.experiment("demo", prefill_only=False)
    workspace = Workspace(paths.results_root(), paths.lineage_path())
    evaluate_sweep(instance, workspace, [loaded], logging.getLogger("sweep"))
    assert "Reload definitions" in caplog.text


def test_a_night_without_an_experiment_says_so(project, instance):
    assert night(project.defs(), instance) == "everything is up to date: 0 traits in no experiment"


def test_traits_that_lack_different_stages_are_kept_apart():
    experiment = Experiment(name="demo", extraction_model="m")
    known = ["a/1", "a/2", "a/3", "a/4"]
    lacking = [
        Need("a/1", "responses", "missing"),
        Need("a/2", "vectors", "stale"),
        Need("a/3", "responses", "missing"),
        Need("a/4", "responses", "missing"),
    ]
    made: list[Backfill] = backfills(experiment, lacking, known, 16)
    assert [(one.stages[0], one.runs) for one in made] == [
        ("responses", [["a/1"], ["a/3", "a/4"]]),
        ("vectors", [["a/2"]]),
    ]
