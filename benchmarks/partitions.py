"""What many traits cost in Dagster itself: the real graph over 2,000 generated folders, stages that compute nothing.

    python benchmarks/partitions.py [--traits 2000] [--batch 16]

Prints, as wall and as processor time: loading the code location; ticks of the folder sensor; the bookkeeping of one trait
in one asset, in an empty and in a full history; ticks of the automation sensor, evaluated as the daemon evaluates them; a
tick of the nightly sweep; and what the UI asks of a webserver for a partitions page. Definitions, conditions, sensors, checks
and stored manifests are the real ones; only the work of the stages is left out. Wall times on a loaded machine are upper
bounds. Nothing outside a temporary folder is touched.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

T = TypeVar("T")
EXPERIMENT = "many"
# the numbers that real stages record
SUMMARY: dict[str, Any] = {
    "n_kept": 10,
    "n": 12,
    "positive_kept": 5,
    "negative_kept": 5,
    "contrast": 55.0,
    "n_positive": 12,
    "n_negative": 12,
    "mean_response_tokens": 20.0,
    "train_positive": 5,
    "train_negative": 5,
    "val_positive": 1,
    "val_negative": 1,
    "layers_captured": 30,
    "n_layers": 30,
    "layers": 30,
    "n_train_pos": 5,
    "n_train_neg": 5,
    "good_accuracy": 1,
    "traits": 1,
    "megabytes": 0.1,
    "model": "org/model",
    "methods": "mean_diff",
    "validated": True,
    "reason": "nothing was computed",
}
PARTITIONS_PAGE = """
query Page($key: AssetKeyInput!) {
  assetNodeOrError(assetKey: $key) {
    ... on AssetNode {
      partitionKeys
      partitionStats { numMaterialized numPartitions numFailed numMaterializing }
      assetPartitionStatuses {
        ... on DefaultPartitionStatuses {
          materializedPartitions unmaterializedPartitions failedPartitions materializingPartitions
        }
      }
    }
  }
}
"""
STALE = """
query Stale($key: AssetKeyInput!, $partitions: [String!]) {
  assetNodeOrError(assetKey: $key) { ... on AssetNode { staleStatusByPartition(partitions: $partitions) } }
}
"""


def write_folders(root: Path, count: int) -> list[str]:
    traits = []
    for i in range(count):
        trait = f"c{i // 100}/t{i:04d}"
        folder = root / trait
        folder.mkdir(parents=True)
        (folder / "positive.txt").write_text("".join(f"Positive {i} {j} and so\n" for j in range(12)))
        (folder / "negative.txt").write_text("".join(f"Negative {i} {j} and so\n" for j in range(12)))
        (folder / "definition.txt").write_text("HIGH (70-100): yes\nMID (30-70): some\nLOW (0-30): no\n")
        (folder / "steering.json").write_text(json.dumps({"questions": ["How?", "Why?"]}))
        traits.append(trait)
    return traits


def say(label: str, wall: float, cpu: float | None, note: str = "") -> None:
    spent = f"{cpu:7.2f}" if cpu is not None else "      –"
    print(f"{label:<66} {wall:7.2f} s wall {spent} s cpu   {note}", flush=True)


def timed(label: str, call: Callable[[], T], goal: str = "") -> T:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    say(label, time.perf_counter() - wall, time.process_time() - cpu, goal)
    return result


def leave_the_work_out() -> None:
    """Stages plan and compute nothing: each trait gets one small file, a few numbers and its declared checks."""
    from trait_assets.checks import CHECKS
    from trait_assets.pipeline import Check, Outcome, Plan
    from trait_assets.stages import all_stages

    def plan(self: Any, ctx: Any, trait: str | None) -> Plan:
        return Plan(trait, inputs={}, options={})

    def execute(self: Any, ctx: Any, plans: Sequence[Plan]) -> Iterator[Outcome]:
        for one in plans:
            yield Outcome(
                one.trait,
                files={f"{EXPERIMENT}/extraction/{one.trait}/{self.name}.json": {"n": 1}},
                summary=dict(SUMMARY),
                checks=[Check(name, True, text) for name, text in CHECKS[self.name].items()],
            )

    for stage in all_stages().values():
        if stage.name != "scenarios":
            type(stage).plan = plan  # type: ignore[method-assign]
            type(stage).execute = execute  # type: ignore[method-assign]


def request(url: str, text: str, variables: dict[str, Any]) -> dict[str, Any]:
    body = json.dumps({"query": text, "variables": variables}).encode()
    asked = urllib.request.Request(f"{url}/graphql", data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=300) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    if found.get("errors"):
        raise RuntimeError(found["errors"])
    return found["data"]


@contextlib.contextmanager
def webserver(home: Path, log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).parent / "dagster-webserver")
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(
            [program, "-m", "trait_assets.definitions", "-p", str(port), "-h", "127.0.0.1"],
            env={**os.environ, "DAGSTER_HOME": str(home)},
            cwd=Path(__file__).resolve().parents[1],
            stdout=out,
            stderr=out,
        )
        try:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError):
                    request(url, "{ version }", {})
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the webserver does not answer:\n{log.read_text()[-2000:]}")
                time.sleep(0.3)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def copy_history(home: Path, stages: dict[str, str], done: str, traits: Sequence[str]) -> None:
    """What Dagster wrote about the trait `done`, written about every other trait too: row by row in its database, because
    tens of thousands of events through its own interface take most of an hour. `stages`: asset key → as it is stored.
    """
    (path,) = home.rglob("runs/index.db")
    with sqlite3.connect(path) as database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(event_logs)") if row[1] != "id"]
        names = ", ".join(columns)
        marks = ", ".join("?" for _ in columns)
        (last,) = database.execute("SELECT max(id) FROM event_logs").fetchone()
        for key in stages.values():
            id_, *row = database.execute(
                f"SELECT id, {names} FROM event_logs WHERE asset_key = ? AND partition = ? "
                "AND dagster_event_type = 'ASSET_MATERIALIZATION' ORDER BY id DESC LIMIT 1",
                (key, done),
            ).fetchone()
            tags = database.execute(
                "SELECT asset_key, key, value, event_timestamp FROM asset_event_tags WHERE event_id = ?",
                (id_,),
            ).fetchall()
            for trait in traits:
                last += 1
                database.execute(
                    f"INSERT INTO event_logs (id, {names}) VALUES (?, {marks})",
                    (last, *(v.replace(done, trait) if isinstance(v, str) else v for v in row)),
                )
                database.executemany(
                    "INSERT INTO asset_event_tags (event_id, asset_key, key, value, event_timestamp) "
                    "VALUES (?, ?, ?, ?, ?)",
                    [(last, *tag) for tag in tags],
                )


def copy_manifests(workspace: Any, datasets: Path, done: str, traits: Sequence[str]) -> None:
    """The manifests of the trait `done`, written for every other trait too."""
    from storage.manifest import Manifests
    from trait_assets.pipeline import PIPELINE
    from trait_assets.scenarios.dataset import trait_hash

    manifests = Manifests(workspace.store)
    for stage in PIPELINE:
        model = manifests.read(None if stage == "scenarios" else EXPERIMENT, stage, done)
        assert model is not None
        for trait in traits:
            inputs = dict(model.inputs)
            if stage == "scenarios":
                inputs["files"] = trait_hash(datasets, trait)
            copy = dataclasses.replace(model, trait=trait, inputs=inputs, files={})
            workspace.store.write_json(copy.key, copy.sealed())


class Ticks:
    """The automation sensor's ticks, evaluated and stored as the daemon does it."""

    def __init__(self, defs: Any, instance: Any) -> None:
        from dagster._core.definitions.asset_daemon_cursor import AssetDaemonCursor

        self.graph = defs.resolve_asset_graph()
        self.instance = instance
        self.cursor = AssetDaemonCursor.empty()

    def tick(self) -> list[Any]:
        from dagster._core.definitions.partitions.context import partition_loading_context
        from dagster._daemon.asset_daemon import (
            asset_daemon_cursor_from_instigator_serialized_cursor,
            asset_daemon_cursor_to_instigator_serialized_cursor,
        )

        # the cursor goes through its stored form, as between two ticks of the daemon
        stored = asset_daemon_cursor_to_instigator_serialized_cursor(self.cursor)
        self.cursor_bytes = len(stored)
        cursor = asset_daemon_cursor_from_instigator_serialized_cursor(stored, self.graph)
        with partition_loading_context(datetime.now(UTC), self.instance):
            return self._evaluate(cursor)

    def _evaluate(self, cursor: Any) -> list[Any]:
        import dagster as dg
        from dagster._core.definitions.automation_tick_evaluation_context import (
            AutomationTickEvaluationContext,
        )

        requests, self.cursor, evaluations = AutomationTickEvaluationContext(
            evaluation_id=cursor.evaluation_id + 1,
            instance=self.instance,
            asset_graph=self.graph,
            cursor=cursor,
            materialize_run_tags={},
            observe_run_tags={},
            auto_observe_asset_keys=set(),
            asset_selection=dg.AssetSelection.all(),
            logger=logging.getLogger("quiet"),
            emit_backfills=True,
        ).evaluate()
        self.instance.schedule_storage.add_auto_materialize_asset_evaluations(
            cursor.evaluation_id + 1, [one.with_run_ids(set()) for one in evaluations]
        )
        return list(requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traits", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16, help="Traits of the two runs that are measured.")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options.traits, options.batch)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


def run(root: Path, count: int, size: int) -> None:
    traits = write_folders(root / "datasets", count)
    (root / "experiments" / EXPERIMENT).mkdir(parents=True)
    (root / "experiments" / EXPERIMENT / "config.yaml").write_text("extraction_model: org/model\n")
    os.environ.update(
        TRAITS_DATASETS=str(root / "datasets"),
        TRAITS_EXPERIMENTS=str(root / "experiments"),
        TRAITS_STATE=str(root / "state"),
    )
    load = [sys.executable, "-W", "ignore", "-c", "import trait_assets.definitions"]
    repository = Path(__file__).resolve().parents[1]
    subprocess.run(load, check=True, cwd=repository)
    cpu = os.times()
    wall = time.perf_counter()
    subprocess.run(load, check=True, cwd=repository)
    after = os.times()
    say(
        "load the code location, start of the process included",
        time.perf_counter() - wall,
        after.children_user + after.children_system - cpu.children_user - cpu.children_system,
        "goal < 3",
    )

    import dagster as dg

    from trait_assets.automation import build_folder_sensor, evaluate_sweep
    from trait_assets.definitions import build_defs, default_resources
    from trait_assets.launch import instance_folder
    from trait_assets.pipeline import PIPELINE
    from trait_assets.scenarios.dataset import trait_hash
    from trait_assets.stage import asset_key

    leave_the_work_out()
    defs = build_defs()
    experiment = next(e for e in _experiments())
    keys = [asset_key(None if s == "scenarios" else experiment, s) for s in PIPELINE]

    def sensor_tick(instance: Any, cursor: str | None) -> str | None:
        # opened at every tick, as the daemon's code server does: its paths come from the environment
        resources = {"store": default_resources()["store"]}
        context = dg.build_sensor_context(instance=instance, cursor=cursor, resources=resources)
        result = build_folder_sensor().evaluate_tick(context)
        for added in result.dynamic_partitions_requests or []:
            instance.add_dynamic_partitions("traits", list(added.partition_keys))
        for event in result.asset_events:
            instance.report_runless_asset_event(event)
        return result.cursor

    job = defs.resolve_implicit_global_asset_job_def()
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}

    def batch(instance: Any, names: Sequence[str], when: str) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        done = job.execute_in_process(
            instance=instance,
            asset_selection=keys,
            tags={
                "dagster/asset_partition_range_start": names[0],
                "dagster/asset_partition_range_end": names[-1],
            },
            run_config=quiet,
        )
        per = 1000 / (len(names) * len(keys))
        events = len(instance.all_logs(done.run_id))
        print(
            f"{'one trait in one asset, checks and manifests included, ' + when:<66} "
            f"{per * (time.perf_counter() - wall):7.1f} ms wall {per * (time.process_time() - cpu):6.1f} ms cpu   "
            f"{events * per / 1000:.1f} events",
            flush=True,
        )

    with dg.DagsterInstance.from_config(str(instance_folder("ui"))) as instance:
        wall, cpu = time.perf_counter(), time.process_time()
        cursor = sensor_tick(instance, None)
        read = len(instance.get_dynamic_partitions("traits"))
        say(
            f"folder sensor, first tick: {read} new folders read and reported",
            time.perf_counter() - wall,
            time.process_time() - cpu,
        )
        instance.add_dynamic_partitions("traits", traits[read:])
        batch(instance, traits[:size], "short history")

        rest = traits[size:]
        wall = time.perf_counter()
        copy_history(root / "state", {str(k): k.to_string() for k in keys}, traits[0], rest)
        copy_manifests(default_resources()["store"].open(), root / "datasets", traits[0], rest)
        cursor = json.dumps({trait: trait_hash(root / "datasets", trait) for trait in traits})
        print(
            f"(the history of all {count} traits was made in {time.perf_counter() - wall:.0f} s)", flush=True
        )

    home = instance_folder("ui")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        timed("folder sensor, nothing new", lambda: sensor_tick(instance, cursor), "goal < 1")
        (root / "datasets" / traits[7] / "positive.txt").write_text(
            "".join(f"Edited {j} and so\n" for j in range(12))
        )
        timed("folder sensor, one folder edited", lambda: sensor_tick(instance, cursor), "goal < 1")
        batch(instance, traits[size : 2 * size], "long history")

        ticks = Ticks(defs, instance)
        shape = f"{len(defs.resolve_asset_graph().get_all_asset_keys())} assets × {count} traits"
        timed(f"automation tick, the first, {shape}", ticks.tick)
        for _ in range(2):
            timed(
                "automation tick, nothing new",
                ticks.tick,
                f"goal < 5; cursor {ticks.cursor_bytes / 1000:.0f} kB",
            )
        for trait in traits[count // 2 : count // 2 + 3]:
            instance.report_runless_asset_event(
                dg.AssetMaterialization(keys[0], partition=trait, tags={"dagster/data_version": "2"})
            )
        requests = timed("automation tick, three traits edited", ticks.tick, "goal < 5")
        assert requests, "the edit was not noticed"
        workspace = default_resources()["store"].open()
        timed(
            "nightly sweep, all but one trait up to date",
            lambda: evaluate_sweep(instance, workspace, _experiments(), logging.getLogger("quiet")),
            "goal < 5",
        )

    with webserver(home, root / "webserver.log") as url:
        for name in ("scenarios", "vectors", "steering_results"):
            path = {"key": {"path": ["scenarios"] if name == "scenarios" else [EXPERIMENT, name]}}
            for how in ("first", "again"):
                found = timed(
                    f"partitions page of {name}, {how}",
                    lambda path=path: request(url, PARTITIONS_PAGE, path),  # type: ignore[misc]
                    "goal < 5",
                )
                assert found["assetNodeOrError"]["partitionStats"]["numPartitions"] == count
        timed(
            "stale states of 50 partitions of vectors",
            lambda: request(
                url, STALE, {"key": {"path": [EXPERIMENT, "vectors"]}, "partitions": traits[-50:]}
            ),
            "goal < 5",
        )
    size = sum(file.stat().st_size for file in (root / "state").rglob("*") if file.is_file())
    print(f"history on disk: {size / 1e6:.0f} MB")


def _experiments() -> list[Any]:
    from trait_assets.definitions import load_experiments
    from trait_assets.paths import experiments_root

    return load_experiments(experiments_root())[0]


if __name__ == "__main__":
    main()
