"""How the store and its index scale: 400 traits × 3 experiments of synthetic results.

    python benchmarks/store.py [--traits 400] [--experiments 3]

Prints the time to rebuild the index from the files (goal: under 60 s), the time of lineage questions, by tree
and by SQL (goal: under 1 s), the cost of one commit, and of a snapshot, each as wall and as processor time: on a
shared machine only the latter says something. Nothing outside a temporary folder is touched.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from storage import keys
from storage.artifacts import encode_json
from storage.index import ROW_TABLES
from storage.lineage import Target, lineage
from storage.manifest import Manifest, fingerprint, history_key
from storage.metrics import encode_rows, metrics_key
from storage.workspace import Workspace

START = datetime(2026, 1, 1, tzinfo=UTC)
STAGES = ("vetted_scenarios", "responses", "vetted_responses", "activations", "vectors", "vector_evaluation")
METHODS = ("mean_diff", "probe", "gradient")
LAYERS = 30
TEXT = "The clerk put down the phone, looked at the queue, and began to explain the form once more. "


def rows_of(stage: str) -> list[dict[str, Any]]:
    """Metric rows as many and as long as a real trait has."""
    sides = [(polarity, i) for polarity in ("positive", "negative") for i in range(110)]
    place = {"position": "response[:]", "component": "residual"}
    vectors = [{**place, "method": m, "layer": layer} for m in METHODS for layer in range(LAYERS)]
    if stage == "scenarios":
        return [
            {"table": "scenarios", "polarity": p, "scenario_index": i, "line": i + 1, "prompt": TEXT * 2}
            for p, i in sides
        ]
    if stage == "responses":
        return [
            {
                "table": "responses",
                "polarity": p,
                "scenario_index": i,
                "question": TEXT * 2,
                "answer": TEXT * 4 + str(random.random()),
                "response_tokens": 64,
            }
            for p, i in sides
        ]
    if stage.startswith("vetted"):
        return [
            {
                "table": "judge_scores",
                "subject": stage[7:],
                "polarity": p,
                "scenario_index": i,
                "score": 100 * random.random(),
                "verdict": "kept",
                "judge": "gpt-4.1-mini",
            }
            for p, i in sides
        ]
    if stage == "activations":
        return [{"table": "activations", **place, "n_layers": LAYERS, "width": 2304}]
    if stage == "vectors":
        return [
            {"table": "vectors", **v, "norm": random.random(), "train_acc": random.random()} for v in vectors
        ]
    if stage == "vector_evaluation":
        named = [
            {"name": name, "value": random.random(), **v}
            for v in vectors
            for name in ("val_accuracy", "val_auc", "effect_size_d", "overlap", "cv_auc", "null_percentile")
        ]
        return named + [
            {"table": "evaluations", **v, "val_accuracy": random.random(), "val_auc": random.random()}
            for v in vectors
        ]
    runs = [
        {
            "table": "steering_runs",
            "kind": "vector",
            "half": "search",
            **random.choice(vectors),
            "dose": 0.1,
            "trait_mean": 100 * random.random(),
            "change": 20 * random.random(),
        }
        for _ in range(100)
    ]
    answers = [
        {
            "table": "generations",
            "kind": "vector",
            "half": "search",
            **random.choice(vectors),
            "question_index": i % 20,
            "response": TEXT * 2 + str(random.random()),
            "trait_score": 100 * random.random(),
        }
        for i in range(500)
    ]
    return runs + answers


def put(root: Path, key: str, data: bytes) -> None:
    """A plain write: syncing 25,000 files to disk is not what is measured here."""
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def synthesise(root: Path, traits: int, experiments: int) -> tuple[int, int]:
    """Write all files; gives the number of sources and of metric rows."""
    content = {stage: rows_of(stage) for stage in ("scenarios", *STAGES, "steering_results")}
    sources = rows = 0

    def result(stage: str, experiment: str | None, trait: str, inputs: dict[str, str], minute: int) -> str:
        nonlocal sources, rows
        mark = fingerprint([stage, experiment, trait])
        created = START + timedelta(minutes=minute)
        manifest = Manifest(
            stage=stage,
            experiment=experiment,
            trait=trait,
            fingerprint=mark,
            status="done",
            code_version="1",
            run_id=f"run-{minute}",
            created_at=created.isoformat(),
            inputs=inputs,
            options={
                "model": {"model": "org/model", "revision": "a" * 40},
                "judge": {"model": "gpt-4.1-mini"},
            },
            summary={f"number_{i}": random.random() for i in range(20)},
            libraries={"torch": "2.13.0", "numpy": "2.4"},
        )
        record = encode_json(manifest.sealed())
        put(root, manifest.key, record)
        put(root, history_key(manifest), record)
        common = {
            "experiment": experiment,
            "stage": stage,
            "trait": trait,
            "run_id": manifest.run_id,
            "fingerprint": mark,
            "created_at": created,
        }
        key = metrics_key(experiment, stage, trait, mark, manifest.run_id)
        put(root, key, encode_rows(content[stage], common))
        sources += 2
        rows += len(content[stage])
        return mark

    for t in range(traits):
        trait = f"c{t % 20}/trait-{t}"
        scenarios = result("scenarios", None, trait, {"files": fingerprint(t)}, t)
        put(root, keys.scenario_set(trait), b'{"positives": [], "negatives": []}')
        for e in range(experiments):
            made = {"scenarios": scenarios}
            for stage in (*STAGES, "steering_results"):
                made[stage] = result(stage, f"experiment-{e}", trait, dict(list(made.items())[-3:]), t)
    return sources, rows


@contextmanager
def timed(label: str) -> Iterator[None]:
    started, busy = time.perf_counter(), time.process_time()
    yield
    wall, busy = time.perf_counter() - started, time.process_time() - busy
    print(f"{label:<58}{wall:9.2f} s   (processor {busy:.2f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traits", type=int, default=400)
    parser.add_argument("--experiments", type=int, default=3)
    options = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory(prefix="traits-bench-") as folder:
        root = Path(folder) / "experiments"
        workspace = Workspace(root, Path(folder) / "lineage.duckdb")
        with timed("synthesise"):
            sources, rows = synthesise(root, options.traits, options.experiments)
        print(
            f"{sources} files, {rows} metric rows, {options.traits} traits × {options.experiments} experiments"
        )
        with timed("rebuild the index (goal: 60 s)"):
            workspace.index.rebuild()
        size = workspace.index.path.stat().st_size / 2**20
        with workspace.index.connect() as connection:
            kept = sum(
                connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0] for table in ROW_TABLES
            )
        assert kept == rows, (kept, rows)
        print(f"{size:.0f} MiB, {kept} rows")
        trait = "c7/trait-7"
        with timed("lineage tree of one steering result (goal: 1 s)"):
            node = lineage(workspace, Target("experiment-0", "steering_results", trait))
        assert node.state == "current", node.why
        with timed("snapshot"):
            copy = workspace.index.snapshot(Path(folder) / "copy.duckdb")
        import duckdb

        connection = duckdb.connect(str(copy), read_only=True)
        questions = {
            "the whole chain of one result": (
                "SELECT * FROM chain WHERE experiment = 'experiment-0' AND trait = ? "
                "AND stage = 'steering_results'",
                [trait],
            ),
            "best layer per trait, all experiments": (
                "SELECT experiment, trait, max_by(layer, val_auc) FROM current_evaluations GROUP BY ALL",
                [],
            ),
            "results out of date": ("SELECT count(*) FROM chain WHERE NOT is_current", []),
        }
        for label, (query, parameters) in questions.items():
            with timed(f"SQL: {label} (goal: 1 s)"):
                connection.execute(query, parameters).fetchall()
        connection.close()
        with timed("`traits sql`: catch up, snapshot, one question"):
            workspace.index.sql("SELECT count(*) FROM current_vectors")
        seconds = []
        for n in range(10):
            manifest = Manifest(
                stage="vectors",
                experiment="experiment-0",
                trait=trait,
                fingerprint=fingerprint(n),
                status="done",
                code_version="1",
                run_id="bench",
                created_at=datetime.now(UTC).isoformat(),
            )
            started = time.perf_counter()
            workspace.commit(manifest, rows_of("vectors"))
            seconds.append(time.perf_counter() - started)
        print(f"{'one commit into the full index, median of 10':<58}{statistics.median(seconds):9.3f} s")


if __name__ == "__main__":
    main()
