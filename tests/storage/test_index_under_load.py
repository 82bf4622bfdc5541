"""Eight processes write metrics while a reader holds the database."""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path

import pytest

from storage.workspace import Workspace

WRITERS, WRITES, HELD = 8, 12, 20.0


def _write(root: str, database: str, worker: int, outcomes) -> None:
    workspace = Workspace(root, database)
    workspace.index.patience = 1.0
    seen = []
    for n in range(WRITES):
        rows = [{"name": "n", "value": n, "layer": worker}]
        seen.append(
            workspace.metrics.write("demo", "vectors", f"t/w{worker}-{n}", rows, f"run-{worker}", "f")
        )
    outcomes.put((worker, seen))


def _read(database: str, held, seconds: float) -> None:
    import duckdb

    connection = duckdb.connect(database, read_only=True)
    held.set()
    time.sleep(seconds)
    connection.close()


@pytest.mark.slow
def test_no_row_is_lost_and_no_stage_fails(tmp_path: Path) -> None:
    root, database = str(tmp_path / "experiments"), str(tmp_path / "lineage.duckdb")
    workspace = Workspace(root, database)
    workspace.metrics.write("demo", "vectors", "t/first", [{"name": "n", "value": -1, "layer": -1}], "r", "f")
    context = multiprocessing.get_context("spawn")
    held, outcomes = context.Event(), context.Queue()
    reader = context.Process(target=_read, args=(database, held, HELD))
    reader.start()
    assert held.wait(60)
    started = time.monotonic()
    writers = [context.Process(target=_write, args=(root, database, i, outcomes)) for i in range(WRITERS)]
    for writer in writers:
        writer.start()
    seen = dict(outcomes.get(timeout=300) for _ in writers)
    took = time.monotonic() - started
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    reader.join(60)
    behind = sum(outcome == "index_behind" for all_of_one in seen.values() for outcome in all_of_one)
    print(f"{behind} of {WRITERS * WRITES} writes behind, {took:.1f} s", file=sys.stderr)
    assert behind > 0, "the reader was meant to be in the way"
    # whoever writes next takes everything in
    last = [{"name": "n", "value": 0, "layer": 99}]
    assert workspace.metrics.write("demo", "vectors", "t/last", last, "r", "f") == "indexed"
    assert workspace.index.pending() == 0
    with workspace.index.connect() as connection:
        rows = connection.execute("SELECT layer, CAST(value AS INTEGER) FROM metrics").fetchall()
    expected = [(i, n) for i in range(WRITERS) for n in range(WRITES)] + [(-1, -1), (99, 0)]
    assert sorted(rows) == sorted(expected)
