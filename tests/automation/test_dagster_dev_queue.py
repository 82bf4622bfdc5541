"""A real `dagster dev`: which runs a backfill makes, that runs wait for the GPU, the nightly sweep, and killed runs."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

A, B, C, D = TRAITS = ("emotion/anger", "emotion/gloom", "register/archaic", "register/bureaucratic")
RANGE = "dagster/asset_partition_range_"
# the stage that holds the pool `gpu`
ACTIVATIONS = dg.AssetKey(["cheap", "activations"])


@pytest.fixture(scope="module")
def dev(dagster_dev: Any) -> Iterator[Any]:
    # every minute is night
    with dagster_dev(TRAITS_SWEEP="* * * * *") as running:
        running.wait(lambda: running.ticks("trait_folders") and running.ticks("keep_experiments_fresh"), 240)
        running.drop(*TRAITS)
        running.wait(lambda: running.materialized("vector_evaluation") == set(TRAITS), 900)
        settle(running)
        yield running


def settle(dev: Any) -> None:
    dev.wait(lambda: all(run.is_finished for run in dev.instance.get_runs()), 400)


def worker_of(dev: Any, run_id: str) -> int | None:
    """The process id that the run itself has told of."""
    for entry in dev.instance.all_logs(run_id):
        if found := re.search(r"Started process for run \(pid: (\d+)\)", entry.message):
            return int(found.group(1))
    return None


def spans(dev: Any) -> list[tuple[float, float]]:
    """Begin and end of every run that has a step in the pool `gpu`."""
    return sorted(
        (record.start_time, record.end_time)
        for record in dev.instance.get_run_records()
        if record.start_time and record.end_time and ACTIVATIONS in (record.dagster_run.asset_selection or ())
    )


def test_traits_that_are_no_neighbours_are_two_runs_of_one_backfill(dev):
    done = dev.traits("backfill", "-e", "cheap", "-t", f"{A},{C},{D}", "--url", dev.url, "--json")
    assert done.returncode == 0, done.stderr
    (launched,) = json.loads(done.stdout)["backfills"]
    assert sorted(launched["runs"]) == [[A], [C, D]]
    dev.wait(lambda: len(dev.runs(dagster__backfill=launched["id"])) == 2, 240)
    dev.wait(lambda: all(r.is_finished for r in dev.runs(dagster__backfill=launched["id"])), 400)
    runs = dev.runs(dagster__backfill=launched["id"])
    assert all(run.status == dg.DagsterRunStatus.SUCCESS for run in runs)
    # what the run list and the partitions page show of them
    covered = sorted(
        (run.tags.get("dagster/partition"), run.tags.get(RANGE + "start"), run.tags.get(RANGE + "end"))
        for run in runs
    )
    assert (None, C, D) in covered
    assert any(A in names for names in covered)
    assert launched["id"] in {one.backfill_id for one in dev.instance.get_backfills()}


def test_what_is_lost_is_found_by_the_sweep_and_mended_alone(dev):
    settle(dev)
    (dev.root / "experiments" / "cheap" / "manifests" / "vectors" / f"{B}.json").unlink()
    dev.wait(lambda: dev.runs(trait_assets__launched_by="nightly_sweep", dagster__partition=B), 240)
    settle(dev)
    run = dev.runs(trait_assets__launched_by="nightly_sweep", dagster__partition=B)[0]
    assert run.status == dg.DagsterRunStatus.SUCCESS
    assert {key.path[-1] for key in run.asset_selection} == {"vectors", "vector_evaluation"}
    dev.wait(
        lambda: any("everything is up to date" in (t.skip_reason or "") for t in dev.ticks("nightly_sweep")),
        240,
    )


def test_a_killed_and_a_cancelled_run_free_the_gpu_for_the_next(dev):
    settle(dev)
    before = {run.run_id for run in dev.instance.get_runs()}

    def started() -> list[dg.DagsterRun]:
        return [
            run
            for run in dev.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
            if run.run_id not in before and ACTIVATIONS in (run.asset_selection or ())
        ]

    dev.edit(A)
    dev.wait(started, 240)
    (first, *_) = started()
    dev.wait(lambda: worker_of(dev, first.run_id), 30)
    os.kill(worker_of(dev, first.run_id), signal.SIGKILL)
    dev.wait(lambda: dev.instance.get_run_by_id(first.run_id).status == dg.DagsterRunStatus.FAILURE, 240)
    # a killed process is tried again by itself
    dev.wait(lambda: [r for r in dev.instance.get_runs() if r.parent_run_id == first.run_id], 120)
    settle(dev)
    (again,) = [r for r in dev.instance.get_runs() if r.parent_run_id == first.run_id]
    assert again.status == dg.DagsterRunStatus.SUCCESS

    before |= {run.run_id for run in dev.instance.get_runs()}
    dev.edit(D)
    dev.wait(started, 240)
    (second, *_) = started()
    body = {"query": f'mutation {{ terminateRun(runId: "{second.run_id}") {{ __typename }} }}'}
    request = urllib.request.Request(
        f"{dev.url}/graphql", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=60).read()
    dev.wait(lambda: dev.instance.get_run_by_id(second.run_id).is_finished, 120)
    settle(dev)
    dev.edit(B)
    began = time.time()
    dev.wait(lambda: any(start > began for start, _ in spans(dev)), 300)
    settle(dev)
    assert dev.instance.event_log_storage.get_concurrency_info("gpu").active_slot_count == 0


def test_no_two_runs_ever_had_the_gpu_at_once(dev):
    """Last: over everything that the tests above have started, sweeps and the first batch on a fresh database included."""
    settle(dev)
    held = spans(dev)
    assert len(held) >= 5
    for (_, end), (start, _) in itertools.pairwise(held):
        assert start >= end - 0.5


def test_status_beside_it_says_that_all_is_current(dev):
    settle(dev)
    rows = json.loads(dev.traits("status", "-e", "cheap", "--json").stdout)
    assert {row["trait"] for row in rows} == set(TRAITS)
