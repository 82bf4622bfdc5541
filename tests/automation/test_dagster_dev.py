"""A real `dagster dev`: folders that appear become partitions and are computed, in one batch, with no reload."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def dev(dagster_dev: Any) -> Iterator[Any]:
    with dagster_dev() as running:
        yield running


def test_new_folders_become_partitions_and_one_batch_and_a_broken_one_stops_nobody(dev) -> None:
    # the daemon looks at an empty folder first, so that the traits are new to it
    dev.wait(lambda: bool(dev.ticks("trait_folders")) and bool(dev.ticks("keep_experiments_fresh")), 120)
    dev.drop("emotion/gloom", "register/bureaucratic", "emotion/anger")
    (dev.root / "datasets" / "emotion" / "anger" / "negative.txt").unlink()
    good = {"emotion/gloom", "register/bureaucratic"}

    dev.wait(lambda: good <= set(dev.instance.get_dynamic_partitions("traits")), 120)
    dev.wait(lambda: dev.materialized("vector_evaluation") == good, 400)
    assert set(dev.instance.get_dynamic_partitions("traits")) == good
    dev.wait(lambda: all(run.is_finished for run in dev.instance.get_runs()), 120)
    runs = list(dev.instance.get_runs())
    batches = [run for run in runs if "dagster/asset_partition_range_start" in run.tags]
    assert len(batches) == 1
    assert all(run.status == dg.DagsterRunStatus.SUCCESS for run in runs)
    assert len(dev.instance.get_backfills()) >= 1
    dev.wait(
        lambda: any("emotion/anger" in (tick.skip_reason or "") for tick in dev.ticks("trait_folders")), 60
    )


def test_an_edit_refreshes_that_trait_alone(dev) -> None:
    before = {run.run_id for run in dev.instance.get_runs()}
    dev.edit("emotion/gloom")

    def refreshed() -> bool:
        new = [run for run in dev.instance.get_runs() if run.run_id not in before]
        return bool(new) and all(run.status == dg.DagsterRunStatus.SUCCESS for run in new)

    dev.wait(refreshed, 400)
    covered = {
        tag
        for run in dev.instance.get_runs()
        if run.run_id not in before
        for name, tag in run.tags.items()
        if name
        in ("dagster/partition", "dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
    }
    assert covered == {"emotion/gloom"}
