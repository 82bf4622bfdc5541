"""The index over Parquet and manifests: the same from scratch as bit by bit, and never in the way."""

from __future__ import annotations

import io
import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from storage import keys
from storage.errors import UserError
from storage.index import ROW_TABLES, LineageIndex, schema
from storage.manifest import fingerprint
from storage.metrics import encode_rows, metrics_key
from storage.workspace import Workspace

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def commit(workspace: Workspace, make_manifest, minute: int = 0, rows=(), **changes) -> str:
    """One result; gives what became of the index."""
    created = (START + timedelta(minutes=minute)).isoformat()
    return workspace.commit(make_manifest(created_at=created, **changes), rows)


def contents(workspace: Workspace) -> dict[str, list[tuple]]:
    """Everything in the index but the times at which it was indexed."""
    workspace.index.catch_up()
    with workspace.index.connect() as connection:
        tables = connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()
        return {
            table: sorted(
                connection.execute(
                    f"SELECT * {'EXCLUDE (indexed_at)' if table == 'sources' else ''} FROM {table}"
                ).fetchall(),
                key=repr,
            )
            for (table,) in tables
        }


def test_rows_land_in_their_tables(any_workspace: Workspace) -> None:
    w = any_workspace
    rows = [
        {"name": "n_kept", "value": 12},
        {"name": "auc", "value": 0.75, "layer": 17, "method": "probe", "odd": {"a": [1]}},
        {"table": "evaluations", "layer": 3, "method": "probe", "val_auc": 1, "unknown_yet": True},
        {"table": "evaluations", "layer": 4, "method": "probe", "val_auc": None},
        {"table": "no_such_table", "name": "x", "value": 1.5},
    ]
    assert w.metrics.write("demo", "vectors", "tonal/dry", rows, "run-1", "f1") == "indexed"
    result = w.index.sql(
        "SELECT name, value, layer, method, extra, trait, run_id, fingerprint FROM metrics ORDER BY name"
    )
    assert result.rows == [
        ("auc", 0.75, 17, "probe", '{"odd": "{\\"a\\": [1]}"}', "tonal/dry", "run-1", "f1"),
        ("n_kept", 12.0, None, None, None, "tonal/dry", "run-1", "f1"),
        ("x", 1.5, None, None, None, "tonal/dry", "run-1", "f1"),
    ]
    evaluations = w.index.sql(
        "SELECT layer, val_auc, extra->>'$.unknown_yet' FROM evaluations ORDER BY layer"
    )
    assert evaluations.rows == [(3, 1.0, "true"), (4, None, None)]


def test_parquet_alone_tells_everything(workspace: Workspace) -> None:
    workspace.metrics.write("demo", "vectors", "tonal/dry", [{"name": "a", "value": 1}], "run-1", "f1")
    key = metrics_key("demo", "vectors", "tonal/dry", "f1", "run-1")
    table = pq.read_table(io.BytesIO(workspace.store.read_bytes(key)))
    (row,) = table.to_pylist()
    created = row.pop("created_at")
    assert abs((datetime.now(UTC) - created).total_seconds()) < 60
    assert row == {
        "experiment": "demo",
        "stage": "vectors",
        "trait": "tonal/dry",
        "run_id": "run-1",
        "fingerprint": "f1",
        "name": "a",
        "value": 1,
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"value": 1}, {"value": float("nan")}], "row 1, column value"),
        ([{"value": float("inf")}], "row 0, column value"),
        ([{"Bad Name": 1}], "Bad Name"),
        ([{"x; DROP TABLE metrics": 1}], "DROP"),
        ([{"run_id": "mine"}], "run_id"),
        ([{"value": {1, 2}}], "set"),
    ],
)
def test_rows_that_mean_nothing_are_refused(workspace: Workspace, rows, message: str) -> None:
    with pytest.raises(UserError, match=message):
        workspace.metrics.write("demo", "vectors", "tonal/dry", rows, "run-1", "f1")
    assert workspace.store.list() == []
    assert workspace.index.pending() == 0


def test_mixed_columns_keep_their_values() -> None:
    rows = [{"a": 1, "b": True, "c": 2**70, "d": None}, {"a": 0.5, "b": "x", "c": 1}, {"b": [1]}]
    table = pq.read_table(io.BytesIO(encode_rows(rows, {"stage": "s"})))
    assert table.to_pylist() == [
        {"stage": "s", "a": 1.0, "b": "true", "c": float(2**70), "d": None},
        {"stage": "s", "a": 0.5, "b": "x", "c": 1.0, "d": None},
        {"stage": "s", "a": None, "b": "[1]", "c": None, "d": None},
    ]


def test_no_rows_are_a_file_all_the_same(workspace: Workspace) -> None:
    assert workspace.metrics.write("demo", "vectors", None, [], "run-1", "f1") == "indexed"
    assert workspace.index.sql("SELECT count(*) FROM metrics").rows == [(0,)]
    assert workspace.index.sql("SELECT source FROM sources").rows == [
        (metrics_key("demo", "vectors", None, "f1", "run-1"),)
    ]


def test_history_stays_and_current_is_a_view(workspace: Workspace, make_manifest) -> None:
    for n, run in enumerate(["run-1", "run-2", "run-3"]):
        rows = [{"name": "auc", "value": 0.5 + n / 10}]
        commit(workspace, make_manifest, n, rows, fingerprint=fingerprint(n % 2), run_id=run)
    sql = workspace.index.sql
    assert sql("SELECT run_id, value FROM metrics ORDER BY run_id").rows == [
        ("run-1", 0.5),
        ("run-2", 0.6),
        ("run-3", 0.7),
    ]
    # run-3 came back to the fingerprint of run-1, and its own rows count
    assert sql("SELECT run_id, value FROM current_metrics").rows == [("run-3", 0.7)]
    assert sql("SELECT run_id FROM current_manifests").rows == [("run-3",)]
    assert sql("SELECT count(*) FROM manifests").rows == [(3,)]


def test_the_same_commit_twice_is_one(workspace: Workspace, make_manifest) -> None:
    for _ in range(2):
        commit(workspace, make_manifest, rows=[{"name": "a", "value": 1}], inputs={"x": "f"})
    for table in ("metrics", "manifests", "inputs", "current_pointers"):
        assert workspace.index.sql(f"SELECT count(*) FROM {table}").rows == [(1,)], table


def pipeline_of(workspace: Workspace, make_manifest, experiment: str, trait: str, n: int, minute: int) -> str:
    """A chain of three stages; gives the last fingerprint."""
    scenarios = fingerprint([trait, n])
    commit(
        workspace,
        make_manifest,
        minute,
        stage="scenarios",
        experiment=None,
        trait=trait,
        fingerprint=scenarios,
        rows=[{"table": "scenarios", "polarity": "positive", "line": 1, "prompt": f"line {n}"}],
    )
    activations = fingerprint([experiment, scenarios])
    commit(
        workspace,
        make_manifest,
        minute + 1,
        stage="activations",
        experiment=experiment,
        trait=trait,
        fingerprint=activations,
        inputs={"scenarios": scenarios},
        options={"model": {"model": "tiny", "revision": str(n), "dtype": "float32"}, "judge": {"kind": "x"}},
        rows=[{"table": "activations", "position": "response[:]", "n_layers": 3}],
    )
    vectors = fingerprint([activations])
    commit(
        workspace,
        make_manifest,
        minute + 2,
        experiment=experiment,
        trait=trait,
        fingerprint=vectors,
        inputs={"activations": activations},
        rows=[{"table": "vectors", "layer": i, "norm": 1.5 * i, "extra_note": "x"} for i in range(3)],
    )
    return vectors


def test_a_rebuilt_index_is_the_same(any_workspace: Workspace, make_manifest, tmp_path: Path) -> None:
    w = any_workspace
    for n, (experiment, trait) in enumerate([("demo", "a/x"), ("other", "a/x"), ("demo", "a/x")]):
        pipeline_of(w, make_manifest, experiment, trait, n, 10 * n)
    before = contents(w)
    assert set(before) >= set(ROW_TABLES)
    assert len(before["manifests"]) == 9
    w.index.rebuild()
    assert contents(w) == before
    w.index.path.unlink()
    assert contents(w) == before
    # beside nothing but the files
    elsewhere = LineageIndex(w.store, tmp_path / "else.duckdb")
    elsewhere.rebuild()
    assert elsewhere.sql("SELECT count(*) FROM vectors").rows == [(9,)]


def test_the_chain_says_what_is_out_of_date(workspace: Workspace, make_manifest) -> None:
    vectors = pipeline_of(workspace, make_manifest, "demo", "a/x", 0, 0)
    query = (
        "SELECT depth, input, input_fingerprint, is_current FROM chain "
        "WHERE stage = 'vectors' AND fingerprint = ? ORDER BY depth"
    )
    scenarios, activations = fingerprint(["a/x", 0]), fingerprint(["demo", fingerprint(["a/x", 0])])
    assert workspace.index.sql(query, [vectors]).rows == [
        (1, "activations", activations, True),
        (2, "scenarios", scenarios, True),
    ]
    # one line was edited: the scenario set is another now
    commit(
        workspace,
        make_manifest,
        50,
        stage="scenarios",
        experiment=None,
        trait="a/x",
        fingerprint=fingerprint("edited"),
    )
    assert workspace.index.sql(query, [vectors]).rows == [
        (1, "activations", activations, True),
        (2, "scenarios", scenarios, False),
    ]


def test_the_summary_views(workspace: Workspace, make_manifest) -> None:
    pipeline_of(workspace, make_manifest, "demo", "a/x", 0, 0)
    pipeline_of(workspace, make_manifest, "demo", "b/y", 0, 10)
    sql = workspace.index.sql
    assert sql("SELECT experiment, traits, stages, runs FROM experiments").rows == [("demo", 2, 2, 1)]
    assert sql("SELECT trait, category FROM traits ORDER BY trait").rows == [("a/x", "a"), ("b/y", "b")]
    assert sql("SELECT run_id, results, stages FROM runs").rows == [
        ("run-1", 6, ["activations", "scenarios", "vectors"])
    ]
    assert sql("SELECT role, model, revision, dtype, stages, traits FROM models").rows == [
        ("model", "tiny", "0", "float32", ["activations"], 2)
    ]
    assert sql("SELECT judge, traits FROM judges").rows == [('{"kind":"x"}', 2)]


def test_a_deleted_manifest_is_not_current(workspace: Workspace, make_manifest) -> None:
    commit(workspace, make_manifest, rows=[{"name": "a", "value": 1}])
    workspace.manifests.delete("demo", "vectors", "tonal/dry")
    workspace.index.rebuild()
    assert workspace.index.sql("SELECT count(*) FROM current_metrics").rows == [(0,)]
    assert workspace.index.sql("SELECT count(*) FROM metrics").rows == [(1,)]


def test_a_locked_index_is_behind_and_the_next_writer_catches_up(
    workspace: Workspace, make_manifest, caplog: pytest.LogCaptureFixture
) -> None:
    commit(workspace, make_manifest)
    workspace.index.patience = 0.2
    # another process holds the file
    holder = _hold(workspace.index.path)
    with caplog.at_level(logging.WARNING, logger="storage"):
        for n in range(3):
            rows = [{"name": "n", "value": n}]
            assert commit(workspace, make_manifest, n, rows, fingerprint=fingerprint(n)) == "index_behind"
    assert len([r for r in caplog.records if "behind" in r.message]) == 1
    assert workspace.index.pending() == 6
    holder.kill()
    holder.wait()
    assert commit(workspace, make_manifest, 9, fingerprint=fingerprint(9)) == "indexed"
    assert workspace.index.pending() == 0
    assert workspace.index.sql("SELECT list_sort(list(value)) FROM metrics").rows == [([0.0, 1.0, 2.0],)]


def _hold(path: Path, seconds: float = 60.0):
    import subprocess
    import sys

    program = (
        "import duckdb, sys, time; c = duckdb.connect(sys.argv[1], read_only=True); "
        "print('held', flush=True); time.sleep(float(sys.argv[2]))"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.stdout.close()
    return holder


def test_a_snapshot_can_be_taken_while_a_reader_holds_the_index(workspace: Workspace, make_manifest) -> None:
    commit(workspace, make_manifest, rows=[{"name": "a", "value": 1}])
    workspace.index.patience = 0.2
    holder = _hold(workspace.index.path)
    try:
        assert workspace.index.sql("SELECT value FROM metrics").rows == [(1.0,)]
    finally:
        holder.kill()
        holder.wait()


def test_rebuilding_under_a_reader_says_so(workspace: Workspace, make_manifest) -> None:
    commit(workspace, make_manifest)
    workspace.index.patience = 0.2
    holder = _hold(workspace.index.path)
    try:
        with pytest.raises(UserError, match="another program has the index open"):
            workspace.index.rebuild()
    finally:
        holder.kill()
        holder.wait()
    assert workspace.index.rebuild() == 2
    assert sorted(p.name for p in workspace.index.path.parent.iterdir()) == [
        "lineage.duckdb",
        "lineage.duckdb.pending",
    ]


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 1000, b"\x00" * 5000])
def test_a_damaged_database_fails_no_stage_and_can_be_rebuilt(
    workspace: Workspace, make_manifest, content: bytes
) -> None:
    commit(workspace, make_manifest, rows=[{"name": "a", "value": 1}])
    workspace.index.path.write_bytes(content)
    outcome = commit(workspace, make_manifest, 1, [{"name": "b", "value": 2}], fingerprint=fingerprint(2))
    assert outcome == "index_behind"
    with pytest.raises(UserError, match="rebuild-index"):
        workspace.index.sql("SELECT 1")
    workspace.index.rebuild()
    assert workspace.index.sql("SELECT list_sort(list(name)) FROM metrics").rows == [(["a", "b"],)]


def test_a_database_of_another_schema_is_filled_again(workspace: Workspace, make_manifest) -> None:
    commit(workspace, make_manifest, rows=[{"name": "a", "value": 1}])
    with workspace.index.connect() as connection:
        connection.execute("UPDATE about SET schema_mark = 'older'")
        connection.execute("CREATE TABLE stranger (x INTEGER)")
        connection.execute("DROP TABLE metrics CASCADE")
    commit(workspace, make_manifest, 1, [{"name": "b", "value": 2}], fingerprint=fingerprint(2))
    assert workspace.index.sql("SELECT list_sort(list(name)) FROM metrics").rows == [(["a", "b"],)]
    assert workspace.index.sql("SELECT count(*) FROM duckdb_tables() WHERE table_name = 'stranger'").rows == [
        (0,)
    ]


def test_unreadable_sources_are_left_out_by_name(
    workspace: Workspace, make_manifest, caplog: pytest.LogCaptureFixture
) -> None:
    commit(workspace, make_manifest, rows=[{"name": "a", "value": 1}])
    commit(workspace, make_manifest, 1, [{"name": "b", "value": 2}], fingerprint=fingerprint(2))
    victim = metrics_key("demo", "vectors", "tonal/dry", fingerprint(2), "run-1")
    workspace.store.write_bytes(victim, workspace.store.read_bytes(victim)[:-20])
    workspace.store.write_bytes(f"{keys.history('demo', 'vectors', 'tonal/dry')}/x-y.json", b"{torn")
    with caplog.at_level(logging.WARNING, logger="storage"):
        workspace.index.rebuild()
    named = [record.getMessage() for record in caplog.records]
    assert any(victim.rsplit("/", 1)[1] in message for message in named)
    assert any("x-y.json" in message for message in named)
    assert workspace.index.sql("SELECT list(name) FROM metrics").rows == [(["a"],)]


def test_a_note_whose_writer_died_does_not_stay_for_ever(workspace: Workspace, make_manifest) -> None:
    note = workspace.index.announce(["demo/metrics/vectors/tonal/dry/never-written.parquet"])
    assert note is not None
    commit(workspace, make_manifest)
    assert note.exists()
    import os

    os.utime(note, (0, 0))
    commit(workspace, make_manifest)
    assert not note.exists()
    torn = workspace.index.notes / "0-torn.json"
    torn.write_text("[")
    commit(workspace, make_manifest)
    assert not torn.exists()


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM metrics",
        "CREATE TABLE t (x INTEGER)",
        "DROP VIEW chain",
        "COPY metrics TO '/tmp/stolen.csv'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "ATTACH '/tmp/other.duckdb'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "SELEC 1",
        "SELECT * FROM nowhere",
        "",
    ],
)
def test_sql_reads_the_index_and_does_nothing_else(workspace: Workspace, make_manifest, query: str) -> None:
    commit(workspace, make_manifest, rows=[{"name": "a", "value": 1}])
    with pytest.raises(UserError) as caught:
        workspace.index.sql(query)
    assert "root:" not in str(caught.value)
    assert workspace.index.sql("SELECT count(*) FROM metrics").rows == [(1,)]


def test_every_table_carries_where_its_rows_came_from(workspace: Workspace) -> None:
    workspace.index.catch_up()
    for table in ("manifests", "inputs", "current_pointers", *ROW_TABLES):
        columns = workspace.index.sql(f"SELECT * FROM {table}").columns
        assert {"run_id", "fingerprint", "created_at", "experiment", "stage", "trait", "source"} <= set(
            columns
        )
    for view in ("experiments", "traits", "models", "judges", "runs"):
        columns = workspace.index.sql(f"SELECT * FROM {view}").columns
        assert {"run_id", "fingerprint", "created_at"} <= set(columns), view
    for table in ("manifests", "inputs", *ROW_TABLES):
        current = workspace.index.sql(f"SELECT * FROM current_{table}").columns
        assert current == workspace.index.sql(f"SELECT * FROM {table}").columns
    assert "is_current" in workspace.index.sql("SELECT * FROM chain").columns
    assert "CREATE TABLE" in schema("tables")


def test_an_empty_workspace_answers(any_workspace: Workspace) -> None:
    assert any_workspace.index.sql("SELECT count(*) FROM chain").rows == [(0,)]
    assert any_workspace.index.rebuild() == 0
    assert json.dumps(any_workspace.index.sql("SELECT 1 AS x").records()) == '[{"x": 1}]'
