"""Eight processes write metrics while a reader holds the database."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from storage.workspace import Workspace

WRITERS, WRITES, HELD = 8, 12, 20.0

WRITER = textwrap.dedent(
    f"""
    import json, sys
    from storage.workspace import Workspace
    root, database, worker = sys.argv[1:]
    workspace = Workspace(root, database)
    workspace.index.patience = 1.0
    seen = []
    for n in range({WRITES}):
        rows = [{{"name": "n", "value": n, "layer": int(worker)}}]
        seen.append(
            workspace.metrics.write("demo", "vectors", f"t/w{{worker}}-{{n}}", rows, f"run-{{worker}}", "f")
        )
    print(json.dumps(seen))
    """
)
READER = textwrap.dedent(
    f"""
    import sys, time
    import duckdb
    connection = duckdb.connect(sys.argv[1], read_only=True)
    print("held", flush=True)
    time.sleep({HELD})
    connection.close()
    """
)


def _start(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.slow
def test_no_row_is_lost_and_no_stage_fails(tmp_path: Path) -> None:
    root, database = str(tmp_path / "experiments"), str(tmp_path / "lineage.duckdb")
    workspace = Workspace(root, database)
    workspace.metrics.write("demo", "vectors", "t/first", [{"name": "n", "value": -1, "layer": -1}], "r", "f")
    reader = _start(READER, database)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "held\n"
    started = time.monotonic()
    writers = [_start(WRITER, root, database, str(i)) for i in range(WRITERS)]
    seen = [json.loads(writer.communicate(timeout=300)[0]) for writer in writers]
    took = time.monotonic() - started
    assert [writer.returncode for writer in writers] == [0] * WRITERS
    reader.communicate(timeout=60)
    outcomes = [outcome for of_one in seen for outcome in of_one]
    assert len(outcomes) == WRITERS * WRITES
    behind = outcomes.count("index_behind")
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
