"""A real `dagster dev`: folders that appear become partitions and are computed, in one batch, with no reload."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.scheduler.instigation import InstigatorTick

from trait_assets.paths import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHEAP = {
    "extraction_model": "embedded:smollm2-135m-instruct",
    "prefill_only": True,
    "steering": False,
    "layers": "10",
    "methods": ["mean_diff"],
    "scenario_limit": 12,
    "n_random": 20,
    "n_permutations": 0,
    "bootstrap": 100,
}


@dataclass
class Dev:
    root: Path
    instance: dg.DagsterInstance

    def drop(self, *traits: str) -> None:
        """Copy shipped trait folders in, each complete at once, as a file manager moves them."""
        for trait in traits:
            target = self.root / "datasets" / trait
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(REPOSITORY / "datasets" / "traits" / trait, self.root / "incoming" / trait)
            (self.root / "incoming" / trait).rename(target)

    def materialized(self, asset: str) -> set[str]:
        return self.instance.get_materialized_partitions(dg.AssetKey(["cheap", asset]))

    def ticks(self, sensor: str) -> list[InstigatorTick]:
        """The latest ticks of a sensor."""
        return [
            tick
            for state in self.instance.all_instigator_state()
            if state.instigator_name == sensor
            for tick in self.instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=5)
        ]

    def wait(self, until: Callable[[], bool], seconds: int) -> float:
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if until():
                return time.monotonic() - started
            time.sleep(1)
        raise AssertionError(f"not within {seconds} s; runs: {[r.status for r in self.instance.get_runs()]}")


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    root = tmp_path_factory.mktemp("dev")
    (root / "datasets").mkdir()
    (root / "experiments" / "cheap").mkdir(parents=True)
    (root / "experiments" / "cheap" / "config.yaml").write_text(yaml.safe_dump(CHEAP))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "DAGSTER_", "TRAITS_"))}
    env.update(
        TRAITS_DATASETS=str(root / "datasets"),
        TRAITS_EXPERIMENTS=str(root / "experiments"),
        TRAITS_STATE=str(root / "state"),
    )
    code = (
        "from trait_assets.launch import instance_folder, open_instance\n"
        "with open_instance(): print(instance_folder('ui'))"
    )
    home = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (root / "dev.log").open("w") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "dagster"), "dev", "-w", "workspace.yaml", "-p", str(port)],
            cwd=REPOSITORY,
            env={**env, "DAGSTER_HOME": home},
            stdout=log,
            stderr=log,
        )
        try:
            with dg.DagsterInstance.from_config(home) as instance:
                yield Dev(root, instance)
        finally:
            process.terminate()
            process.wait(60)


def test_new_folders_become_partitions_and_one_batch_and_a_broken_one_stops_nobody(dev: Dev) -> None:
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


def test_an_edit_refreshes_that_trait_alone(dev: Dev) -> None:
    before = {run.run_id for run in dev.instance.get_runs()}
    path = dev.root / "datasets" / "emotion" / "gloom" / "positive.txt"
    lines = path.read_text().split("\n")
    lines[0] = lines[1].replace("the", "that", 1)
    path.write_text("\n".join(lines))

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
