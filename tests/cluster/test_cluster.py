"""A backfill on two Ray workers, with Postgres and S3, through the kill of a worker: the same numbers as on one machine."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import numpy as np
import pytest

from storage import keys
from storage.artifacts import ArtifactStore
from storage.manifest import Manifests
from storage.rows import RowCache

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(3600)]

EXPERIMENT = "tiny"
STAGES = ("responses", "activations", "vectors", "vector_evaluation", "steering_results")
# what differs from run to run by its nature
INCIDENTAL = ("seconds", "second", "created_at", "run_id", "_per_s", "elapsed", "generated_now", "from_cache")


def differences(a: Any, b: Any, where: str = "$") -> list[str]:
    """Where two parsed JSON documents differ by more than 1e-5 or in a word."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{where}.{key}: only in one" for key in a.keys() ^ b.keys()]
        for key in a.keys() & b.keys():
            if not any(word in key for word in INCIDENTAL):
                found += differences(a[key], b[key], f"{where}.{key}")
        return found
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} entries"]
        return [
            d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}[{i}]")
        ]
    if isinstance(a, float) or isinstance(b, float):
        return [] if math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5) else [f"{where}: {a} and {b}"]
    return [] if a == b else [f"{where}: {a!r} and {b!r}"]


def compare(one: ArtifactStore, other: ArtifactStore, traits: list[str]) -> tuple[list[str], int]:
    """Differences between the results of two stores, and how many files were compared."""
    from storage.tensors import unpack

    found: list[str] = []
    files = 0
    for trait in traits:
        for stage in STAGES:
            a = Manifests(one).read(EXPERIMENT, stage, trait)
            b = Manifests(other).read(EXPERIMENT, stage, trait)
            assert a is not None, f"{stage} of {trait} is missing on one machine"
            assert b is not None, f"{stage} of {trait} is missing on the cluster"
            found += [f"{stage} of {trait} options {d}" for d in differences(a.options, b.options)]
            if a.fingerprint != b.fingerprint:
                found.append(f"{stage} of {trait}: other inputs or options")
            names = sorted(key for key in a.files if key.endswith((".json", ".safetensors")))
            assert names == sorted(key for key in b.files if key.endswith((".json", ".safetensors")))
            for key in names:
                files += 1
                left, right = one.read_bytes(key, a.files[key]), other.read_bytes(key, b.files[key])
                if key.endswith(".json"):
                    found += [f"{key} {d}" for d in differences(json.loads(left), json.loads(right))]
                    continue
                tensors, others = unpack(left)[0], unpack(right)[0]
                assert tensors.keys() == others.keys()
                for name, tensor in tensors.items():
                    if not np.allclose(tensor, others[name], rtol=1e-5, atol=1e-5):
                        found.append(f"{key} {name}: {np.abs(tensor - others[name]).max()}")
    return found, files


@pytest.fixture
def stores(cluster, monkeypatch) -> tuple[ArtifactStore, ArtifactStore]:
    """(one machine's, the cluster's)."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, cluster.env[name])
    return ArtifactStore(cluster.base / "alone" / "results"), ArtifactStore(cluster.store)


def test_a_backfill_on_two_workers_survives_the_kill_of_one(cluster, stores):
    machines, web = cluster.machines, cluster.web
    alone, shared = stores

    launched = json.loads(
        cluster.traits(
            "backfill", "-e", EXPERIMENT, "--chunk", "2", "--url", web.url, "--json", machine="laptop"
        ).stdout
    )
    batches = [run for one in launched["backfills"] for run in one["runs"]]
    assert sorted(map(len, batches)) == [2, 2, 2]

    # two runs at once, one per worker, each with the GPU that its pool stands for
    placed = machines.wait(
        lambda: len(found := cluster.running_on()) == 2 and found, 600, "a run on each of both workers"
    )
    assert set(placed) == {"worker1", "worker2"}
    runs = {run["runId"]: run for run in web.runs()}
    assert all(
        json.loads(runs[run]["tags"]["dagster-ray/config"]) == {"num_gpus": 1} for run in placed.values()
    )

    # the kill: as soon as one of them has stored rows of a trait that it has not finished
    def half_done() -> tuple[str, str, list[str]] | None:
        for node, run in cluster.running_on().items():
            for trait in traits_of(runs.get(run, {"tags": {}}), batches):
                segments = cluster.stored(f"_cache/generations/{trait}/")
                if segments and not cluster.stored(f"{EXPERIMENT}/manifests/responses/{trait}.json"):
                    return node, run, segments
        return None

    victim, killed_run, _ = machines.wait(
        half_done, 600, "a run with stored rows and an unfinished trait", 0.05
    )
    next(node for node in cluster.nodes if node.name == victim).kill()
    killed_at = time.monotonic()
    traits = traits_of(runs[killed_run], batches)
    assert cluster.stored(f"{EXPERIMENT}/manifests/steering_results/") == []
    kept = {trait: len(RowCache(shared, keys.row_cache("generations", trait))) for trait in traits}
    finished = {trait: Manifests(shared).read(EXPERIMENT, "responses", trait) for trait in traits}
    assert any(kept[trait] for trait in traits if finished[trait] is None)

    # another machine takes its place
    cluster.join("worker3")

    # all of it ends well: the killed run failed, its retry and the others succeeded
    ends = ("SUCCESS", "FAILURE", "CANCELED")
    machines.wait(
        lambda: (
            any(run["tags"].get("dagster/parent_run_id") == killed_run for run in web.runs())
            and all(run["status"] in ends for run in web.runs())
        ),
        1800,
        "every run has ended",
        2,
    )
    runs = {run["runId"]: run for run in web.runs()}
    retries = [run for run in runs.values() if run["tags"].get("dagster/parent_run_id") == killed_run]
    assert runs[killed_run]["status"] == "FAILURE"
    assert [run["status"] for run in retries] == ["SUCCESS"]
    assert json.loads(retries[0]["tags"]["dagster-ray/config"]) == {"num_gpus": 1}
    assert sorted(run["status"] for run in runs.values()) == ["FAILURE", "SUCCESS", "SUCCESS", "SUCCESS"]
    print(f"retried and done {time.monotonic() - killed_at:.0f} s after the kill; runs {len(runs)}")
    machines.wait(
        lambda: set(web.backfills().values()) == {"COMPLETED_SUCCESS"},
        120,
        f"backfills end: {web.backfills()}",
        2,
    )

    # what was finished was not done again: whole traits by their manifest, single rows by their key
    for trait in traits:
        now = Manifests(shared).read(EXPERIMENT, "responses", trait)
        assert now is not None
        if finished[trait] is not None:
            assert now.run_id == killed_run
        else:
            assert now.run_id == retries[0]["runId"]
            assert now.summary["from_cache"] == kept[trait]
            assert now.summary["generated_now"] == 2 * cluster.options["scenario_limit"] - kept[trait]

    # and the numbers are those of one machine
    cluster.traits(
        "run", "-e", EXPERIMENT, machine="alone", TRAITS_STORE=str(cluster.base / "alone" / "results")
    )
    found, files = compare(alone, shared, cluster.names)
    assert files >= 5 * len(cluster.names)
    assert found == []


def traits_of(run: dict[str, Any], batches: list[list[str]]) -> list[str]:
    """The traits of a range run: a batch is known by its first trait."""
    first = run["tags"].get("dagster/asset_partition_range_start")
    return next((batch for batch in batches if batch[0] == first), [])


def test_any_machine_reads_the_results_of_the_cluster(cluster):
    """From a machine that has never seen a run: an empty state folder, and the store's URL."""
    rows = json.loads(cluster.traits("show", "-e", EXPERIMENT, "--json", machine="stranger").stdout)
    assert [row["trait"] for row in rows] == cluster.names
    counted = json.loads(
        cluster.traits(
            "sql",
            "SELECT trait, count(*) AS n FROM manifests WHERE stage = 'vectors' GROUP BY trait ORDER BY trait",
            "--json",
            machine="stranger",
        ).stdout
    )
    assert [row["trait"] for row in counted] == cluster.names
    tree = cluster.traits("lineage", f"{EXPERIMENT}/{cluster.names[0]}", machine="stranger").stdout
    assert "responses" in tree
