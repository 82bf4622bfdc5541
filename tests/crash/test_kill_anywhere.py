"""kill −9 at random moments over the whole pipeline, on the real embedded model."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from storage.artifacts import ArtifactStore
from storage.rows import RowCache, TensorJournal
from storage.tensors import unpack
from storage.workspace import Workspace
from trait_assets.paths import REPOSITORY

KILLS = int(os.environ.get("TRAITS_TEST_KILLS", "30"))
TRAITS = ["register/bureaucratic", "emotion/enthusiasm"]
OPTIONS: dict[str, Any] = {
    "extraction_model": "embedded:smollm2-135m-instruct",
    "traits": TRAITS,
    "base_model": True,
    "max_new_tokens": 8,
    "scenario_limit": 10,
    "min_kept": 2,
    "max_abstention_rate": 0.5,
    "batch_size": 4,
    "methods": ["mean_diff", "probe"],
    "layers": "10,17",
    "n_random": 20,
    "n_permutations": 20,
    "bootstrap": 100,
    "steer": {
        "questions": 8,
        "max_new_tokens": 8,
        "max_candidates": 1,
        "doses": [0.15],
        "refine_steps": 0,
        "controls": 1,
        "bootstrap": 200,
    },
}
# What may differ between two runs of the same thing: when it ran and how long it took.
PASSING = {
    "run_id",
    "created_at",
    "seconds_since_start",
    "generated_now",
    "from_cache",
    "captured_now",
    "reused",
    "judged_now",
    "rows_per_second",
    "tokens_per_second",
    "gpu_peak_gib",
    "judge_tokens",
    "judge_cost_usd",
    "libraries",
}


class Driver:
    """The process that forks pipelines; see pipeline_driver.py."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "TRAITS_"))}
        if cache := os.environ.get("TRAITS_CACHE"):
            environment["TRAITS_CACHE"] = cache
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).with_name("pipeline_driver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**environment, "PYTHONPATH": str(REPOSITORY)},
        )

    def run(self, root: Path, log: Path, kill_after: float | None = None) -> int:
        """The child's exit code, −9 when it was killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"root": str(root), "log": str(log)}) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:  # it had finished by then
                return int(self.process.stdout.readline())
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()


def project(root: Path) -> Path:
    folder = root / "experiments" / "small"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(OPTIONS))
    return root


def stored_rows(root: Path) -> set[tuple[str, str]]:
    """(prefix, key) of every row that is safely stored."""
    store = ArtifactStore(root / "experiments")
    rows: set[tuple[str, str]] = set()
    for prefix in {key.rsplit("/", 1)[0] for key in store.list() if key.endswith(".jsonl")}:
        rows |= {(prefix, key) for key in RowCache(store, prefix).keys()}  # noqa: SIM118
    for prefix in {key.rsplit("/", 1)[0] for key in store.list("small") if "/journal/" in key}:
        rows |= {(prefix, key) for key in TensorJournal(store, prefix).load()}
    return rows


def put_rows(log: Path) -> list[tuple[str, str]]:
    if not log.exists():
        return []
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [(prefix, key) for prefix, keys in lines for key in keys]


def compare(path: str, one: Any, other: Any) -> None:
    """Equal texts and structure, numbers to 1e-5 of their size."""
    if isinstance(one, dict):
        assert set(one) - PASSING == set(other) - PASSING, path
        for key in set(one) - PASSING:
            compare(f"{path}.{key}", one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            compare(f"{path}[{i}]", a, b)
    elif isinstance(one, float) and isinstance(other, float | int):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-5), path
    else:
        assert one == other, path


def assert_same_results(expected: Path, root: Path) -> None:
    stores = [Workspace(folder / "experiments", folder / "state" / "x.duckdb") for folder in (expected, root)]
    names = [
        {
            key
            for key in w.store.list()
            if not key.startswith("_cache/") and key.endswith((".json", ".safetensors"))
        }
        for w in stores
    ]
    kept = [{key for key in found if "/history/" not in key} for found in names]
    assert kept[0] == kept[1]
    for key in sorted(kept[0]):
        if "/manifests/" in key:
            one, other = (w.manifests.read_key(key) for w in stores)
            assert one is not None
            assert other is not None
            assert stores[1].manifests.verify(other) == []
            assert (one.status, one.inputs.keys(), set(one.files)) == (
                other.status,
                other.inputs.keys(),
                set(other.files),
            )
            compare(key, one.options, other.options)
            compare(key, one.summary, other.summary)
        elif key.endswith(".json"):
            compare(key, *(w.store.read_json(key) for w in stores))
        else:
            (a, _), (b, _) = (unpack(w.store.read_bytes(key)) for w in stores)
            assert a.keys() == b.keys(), key
            for name in a:
                scale = float(np.nanmax(np.abs(a[name]))) if a[name].size else 1.0
                np.testing.assert_allclose(
                    b[name], a[name], rtol=1e-5, atol=1e-5 * max(scale, 1.0), err_msg=key
                )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_thirty_random_moments_it_always_finishes_the_same(driver: Driver, tmp_path: Path) -> None:
    undisturbed = project(tmp_path / "undisturbed")
    # the first run also makes the model's cache; the second is the measure of time
    assert driver.run(undisturbed, tmp_path / "log-0") == 0
    shutil.rmtree(undisturbed)
    project(undisturbed)
    started = time.monotonic()
    assert driver.run(undisturbed, tmp_path / "log-1") == 0
    whole = time.monotonic() - started

    dice = random.Random(20)
    kills = rounds = 0
    stages_hit: set[str] = set()
    while kills < KILLS:
        rounds += 1
        root = project(tmp_path / f"round-{rounds}")
        safe: set[tuple[str, str]] = set()
        for attempt in range(1000):
            log = tmp_path / f"log-{rounds}-{attempt}"
            patience = dice.uniform(0.05, 0.5) * whole if kills < KILLS else None
            code = driver.run(root, log, patience)
            again = safe & set(put_rows(log))
            assert not again, f"finished rows were computed again: {sorted(again)[:3]}"
            if code == 0:
                break
            assert code == -signal.SIGKILL, "a restart failed by itself"
            kills += 1
            safe = stored_rows(root)
            done = {p.parent.parent.name for p in (root / "experiments").glob("*/manifests/*/*/*.json")}
            stages_hit.add(",".join(sorted(done)))
        assert_same_results(undisturbed, root)
        count = Workspace(root / "experiments", root / "state" / "lineage.duckdb").index
        assert count.sql("SELECT count(*) FROM current_vectors").rows == [(len(TRAITS) * 2 * 2,)]
        print(f"{kills} kills survived, results equal", file=sys.stderr, flush=True)
    print(f"{kills} kills in {rounds} rounds, {len(stages_hit)} different states met", file=sys.stderr)
    assert len(stages_hit) >= min(5, KILLS // 3)
