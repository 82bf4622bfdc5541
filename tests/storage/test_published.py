"""One machine publishes the index, others begin with it; none of it is needed to get an answer right."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import duckdb
import pytest
from upath import UPath

from storage import published
from storage.forget import forget
from storage.manifest import Manifest
from storage.workspace import Workspace

COUNT = "SELECT trait, count(*) AS n FROM metrics GROUP BY trait ORDER BY trait"


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> str | UPath:
    """A store that several machines can reach."""
    import uuid

    name = f"bucket-{uuid.uuid4().hex}"
    if request.param == "memory":
        return f"memory://{name}/experiments"
    endpoint = request.getfixturevalue("s3_endpoint")
    options: dict[str, Any] = {"endpoint_url": endpoint, "key": "none", "secret": "none"}
    bucket = UPath(f"s3://{name}", **options, use_listings_cache=False, skip_instance_cache=True)
    bucket.fs.mkdir(name)
    return bucket / "experiments"


@pytest.fixture
def machine(remote, tmp_path):
    """machine("name"): a workspace over the shared store with an index of its own."""
    return lambda name, **more: Workspace(remote, tmp_path / name / "lineage.duckdb", **more)


def commit(workspace: Workspace, manifest: Manifest, n: int = 2) -> str:
    return workspace.commit(manifest, [{"name": "loss", "value": float(i), "layer": i} for i in range(n)])


def test_a_new_machine_begins_with_the_snapshot_and_takes_in_what_it_lacks(machine, make_manifest):
    writer = machine("writer")
    commit(writer, make_manifest(trait="tonal/dry"))
    commit(writer, make_manifest(trait="tonal/wet"), 3)
    where, size = writer.index.publish()
    assert where.endswith("_index/lineage.duckdb")
    assert size > 0
    reader = machine("reader")
    assert reader.index.catch_up() == 0
    commit(writer, make_manifest(trait="tonal/zesty"), 1)
    assert reader.index.sql(COUNT).rows == [("tonal/dry", 2), ("tonal/wet", 3), ("tonal/zesty", 1)]
    assert machine("third").index.catch_up() == 2


def test_any_duckdb_reads_the_snapshot(machine, make_manifest, tmp_path):
    writer = machine("writer")
    commit(writer, make_manifest())
    writer.index.publish()
    copy = tmp_path / "copy.duckdb"
    copy.write_bytes(writer.store.read_bytes(published.SNAPSHOT))
    with duckdb.connect(str(copy), read_only=True) as connection:
        assert connection.execute(COUNT).fetchall() == [("tonal/dry", 2)]


def test_a_damaged_snapshot_is_left_aside(machine, make_manifest, caplog):
    writer = machine("writer")
    commit(writer, make_manifest())
    writer.index.publish()
    whole = writer.store.read_bytes(published.SNAPSHOT)
    writer.store.write_bytes(published.SNAPSHOT, whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING, "storage"):
        assert machine("reader").index.sql(COUNT).rows == [("tonal/dry", 2)]
    assert "is left aside" in caplog.text
    assert "truncated" in caplog.text


def test_a_snapshot_of_another_schema_is_left_aside(machine, make_manifest):
    writer = machine("writer")
    commit(writer, make_manifest())
    published.put(writer.store, b"of another version", "0123456789abcdef")
    reader = machine("reader")
    assert reader.index.sql(COUNT).rows == [("tonal/dry", 2)]


def test_the_snapshot_never_replaces_an_index_that_is_there(machine, make_manifest):
    writer, reader = machine("writer"), machine("reader")
    commit(writer, make_manifest())
    assert reader.index.catch_up() == 2
    writer.store.write_bytes(published.SNAPSHOT, b"never looked at")
    assert reader.index.catch_up() == 0


def test_a_machine_that_keeps_no_index_leaves_nothing_behind(machine, make_manifest, tmp_path):
    worker = machine("worker", keep_index=False)
    assert commit(worker, make_manifest()) == "indexed"
    assert not (tmp_path / "worker").exists()
    assert machine("reader").index.sql(COUNT).rows == [("tonal/dry", 2)]


def test_forgetting_a_trait_takes_the_snapshot_away_and_reaches_other_machines(machine, make_manifest):
    writer, reader = machine("writer"), machine("reader")
    commit(writer, make_manifest(trait="tonal/dry"))
    commit(writer, make_manifest(trait="tonal/wet"))
    writer.index.publish()
    assert len(reader.index.sql(COUNT).rows) == 2
    forget(writer, "tonal/dry")
    assert not writer.store.exists(published.SNAPSHOT)
    assert not writer.store.exists(published.RECORD)
    assert reader.index.sql(COUNT).rows == [("tonal/wet", 2)]
