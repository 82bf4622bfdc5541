"""What happens to a store in the wild: links, copied folders, flipped bytes, other people's files, lost races."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import keys
from storage.artifacts import ArtifactStore
from storage.errors import ArtifactError, UserError
from storage.forget import forget
from storage.index import ROW_TABLES, LineageIndex
from storage.manifest import Manifests, fingerprint, history_key
from storage.metrics import metrics_key
from storage.rows import DamagedSegment, RowCache
from storage.workspace import Workspace

ROOT = Path(__file__).parents[2]
PLACE = ("demo", "vectors", "tonal/dry")


def result(workspace: Workspace, make_manifest: Callable[..., Any], n: int = 1, **changes: Any) -> Any:
    """One result with two files and three rows."""
    trait = changes.get("trait", "tonal/dry")
    experiment = changes.get("experiment", "demo")
    files = {
        f"{experiment}/extraction/{trait}/{name}": workspace.store.write_bytes(
            f"{experiment}/extraction/{trait}/{name}", bytes(random.Random(n).randbytes(400))
        )
        for name in ("a.bin", "b/c.bin")
    }
    manifest = make_manifest(fingerprint=fingerprint([n, trait]), files=files, summary={"n": n}, **changes)
    rows = [{"name": f"number {i}", "value": n + i / 7} for i in range(3)]
    assert workspace.commit(manifest, rows) == "indexed"
    return manifest


def everything(index: LineageIndex) -> dict[str, list[tuple[Any, ...]]]:
    tables = ("sources", "seen", "manifests", "inputs", "current_pointers", *ROW_TABLES)
    index.catch_up()
    with index.connect(read_only=True) as connection:
        return {
            table: sorted(
                connection.execute(
                    f"SELECT * {'EXCLUDE (indexed_at)' if table == 'sources' else ''} FROM {table}"
                ).fetchall(),
                key=repr,
            )
            for table in tables
        }


def assert_like_rebuilt(workspace: Workspace, tmp_path: Path) -> None:
    """The index as it is answers like one made from the files alone."""
    fresh = LineageIndex(workspace.store, tmp_path / f"fresh-{time.time_ns()}.duckdb")
    fresh.rebuild()
    assert everything(workspace.index) == everything(fresh)


# Links


def test_a_link_out_of_the_root_is_neither_written_nor_deleted_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "x.bin").write_bytes(b"mine")
    store = ArtifactStore(tmp_path / "experiments")
    store.write_bytes("demo/extraction/t/other/x.bin", b"1")
    (tmp_path / "experiments/demo/extraction/t/dry").symlink_to(precious)
    for attempt in (
        lambda: store.write_bytes("demo/extraction/t/dry/x.bin", b"theirs"),
        lambda: store.write_bytes("demo/extraction/t/dry/new/y.bin", b"theirs"),
        lambda: store.delete("demo/extraction/t/dry/x.bin"),
        lambda: store.delete_tree("demo/extraction/t/dry"),
    ):
        with pytest.raises(UserError, match="a link leads out of the results folder"):
            attempt()
    assert [(p.name, p.read_bytes()) for p in precious.iterdir()] == [("x.bin", b"mine")]
    # a tree above the link goes, the link's target stays
    assert store.delete_tree("demo") == 1
    assert (precious / "x.bin").read_bytes() == b"mine"


def test_a_linked_file_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    outside = tmp_path / "passwd"
    outside.write_bytes(b"root")
    store = ArtifactStore(tmp_path / "experiments")
    store.write_bytes("demo/x", b"1")
    (tmp_path / "experiments/demo/x").unlink()
    (tmp_path / "experiments/demo/x").symlink_to(outside)
    store.write_bytes("demo/x", b"2")
    assert outside.read_bytes() == b"root"
    assert store.read_bytes("demo/x") == b"2"


def test_the_root_itself_may_be_a_link_and_links_may_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "experiments").symlink_to(tmp_path / "big-disk")
    store = ArtifactStore(tmp_path / "experiments")
    store.write_bytes("demo/x", b"1")
    (tmp_path / "big-disk/also").symlink_to(tmp_path / "big-disk/demo")
    store.write_bytes("also/y", b"2")
    assert (tmp_path / "big-disk/demo/y").read_bytes() == b"2"
    # the disk is exchanged under a running process
    (tmp_path / "experiments").unlink()
    (tmp_path / "other-disk").mkdir()
    (tmp_path / "experiments").symlink_to(tmp_path / "other-disk")
    store.write_bytes("demo/x", b"3")
    assert (tmp_path / "other-disk/demo/x").read_bytes() == b"3"


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(tmp_path)
    store.write_bytes("demo/x", b"1")

    def refused(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)  # root may read everything
    with pytest.raises(UserError, match=r"demo/x: the file cannot be read \(Permission denied\)"):
        store.read_bytes("demo/x")


# Races


def test_a_folder_that_another_process_removes_does_not_fail_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clears a journal while another writes into it: the folder goes between its making and its use."""
    import storage.artifacts as artifacts

    store = ArtifactStore(tmp_path)
    make, made = artifacts._make_folders, []

    def make_and_lose(folder: Path) -> None:
        make(folder)
        made.append(folder)
        if len(made) <= 3:
            assert ArtifactStore(tmp_path).delete_tree("demo/journal") == 0

    monkeypatch.setattr(artifacts, "_make_folders", make_and_lose)
    store.write_bytes("demo/journal/vectors/t/dry/n", b"1")
    assert len(made) == 4
    assert store.read_bytes("demo/journal/vectors/t/dry/n") == b"1"


WRITER = textwrap.dedent(
    """
    import sys
    from datetime import UTC, datetime
    from storage.errors import ArtifactError
    from storage.manifest import Manifest, fingerprint
    from storage.workspace import Workspace
    root, database, me = sys.argv[1:]
    workspace = Workspace(root, database)
    lost = 0
    for n in range(12):
        mark = f"{me}-{n}"
        files = {}
        for name in ("a.bin", "b.bin"):
            key = f"demo/extraction/tonal/dry/{name}"
            files[key] = workspace.store.write_bytes(key, (mark + name).encode() * 1000)
        manifest = Manifest(
            stage="vectors", experiment="demo", trait="tonal/dry", fingerprint=fingerprint(mark),
            status="done", code_version="1", run_id=f"run-{me}", created_at=datetime.now(UTC).isoformat(),
            files=files, summary={"mark": mark},
        )
        try:
            workspace.commit(manifest, [{"name": "n", "value": n}])
        except ArtifactError as error:
            assert "If another run writes the same result" in str(error)
            lost += 1
    print(lost)
    """
)


def test_two_writers_of_one_result_never_leave_a_mixture_that_counts(
    tmp_path: Path, make_manifest: Callable[..., Any]
) -> None:
    root, database = tmp_path / "experiments", tmp_path / "lineage.duckdb"
    workspace = Workspace(root, database)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(root), str(database), str(i)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for i in range(2)
    ]
    whole = damaged = 0
    while any(writer.poll() is None for writer in writers):
        time.sleep(0.003)
        manifest = workspace.manifests.read(*PLACE)
        if manifest is None:
            continue
        contents = []
        try:
            for key, record in manifest.files.items():
                contents.append(workspace.store.read_bytes(key, record))
        except ArtifactError:
            damaged += 1  # said by name, never handed out
            continue
        mark = manifest.summary["mark"]
        assert contents == [(mark + name).encode() * 1000 for name in ("a.bin", "b.bin")]
        whole += 1
    assert [writer.wait() for writer in writers] == [0, 0]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()
    assert whole > 0
    # whoever comes last finds either a whole result, or one that is known to be damaged and is made again
    manifest = workspace.manifests.read(*PLACE)
    assert manifest is not None
    if workspace.manifests.verify(manifest):
        result(workspace, make_manifest, 99)
    last = workspace.manifests.read(*PLACE)
    assert last is not None
    assert workspace.manifests.verify(last) == []
    assert_like_rebuilt(workspace, tmp_path)


def test_a_result_whose_files_another_run_exchanged_is_not_committed(
    any_workspace: Workspace, make_manifest: Callable[..., Any]
) -> None:
    store = any_workspace.store
    record = store.write_bytes("demo/extraction/tonal/dry/a.bin", b"ours")
    store.write_bytes("demo/extraction/tonal/dry/a.bin", b"theirs, longer")
    with pytest.raises(ArtifactError, match="If another run writes the same result"):
        any_workspace.commit(make_manifest(files={"demo/extraction/tonal/dry/a.bin": record}))
    assert any_workspace.manifests.read(*PLACE) is None


# Copies


def test_a_copied_experiment_counts_for_nothing_until_it_is_built(
    workspace: Workspace, make_manifest: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result(workspace, make_manifest)
    before = workspace.index.sql("SELECT count(*) FROM current_metrics").rows
    root = workspace.store.local_path("demo")
    assert root is not None
    shutil.copytree(root, root.with_name("copy"))
    with pytest.raises(ArtifactError, match=r"copy/manifests.*it belongs to demo/manifests/vectors"):
        workspace.manifests.read("copy", "vectors", "tonal/dry")
    with caplog.at_level(logging.WARNING, logger="storage"):
        assert workspace.index.sql("SELECT count(*) FROM current_metrics").rows == before == [(3,)]
        assert workspace.index.sql("SELECT count(*) FROM manifests").rows == [(1,)]
    named = [record.getMessage() for record in caplog.records]
    assert any("the rows belong to demo/metrics" in message for message in named)
    assert any("it belongs to demo/manifests" in message for message in named)
    # built under its own name it counts beside the other
    result(workspace, make_manifest, experiment="copy")
    assert workspace.index.sql("SELECT count(*) FROM current_metrics").rows == [(6,)]


def test_a_folder_removed_by_hand_is_gone_from_the_answers_too(
    any_workspace: Workspace, make_manifest: Callable[..., Any], tmp_path: Path
) -> None:
    w = any_workspace
    result(w, make_manifest, trait="a/x")
    result(w, make_manifest, experiment="other")
    for part in ("extraction", "manifests", "history", "metrics"):
        w.store.delete_tree(f"other/{part}")
    assert w.index.sql("SELECT DISTINCT experiment FROM metrics").rows == [("demo",)]
    assert w.index.sql("SELECT count(*) FROM current_manifests").rows == [(1,)]
    # a manifest taken back, or exchanged by other means than a commit, is noticed without a rebuild
    w.manifests.delete("demo", "vectors", "a/x")
    assert w.index.sql("SELECT count(*) FROM current_metrics").rows == [(0,)]
    assert w.index.sql("SELECT count(*) FROM metrics").rows == [(3,)]
    assert_like_rebuilt(w, tmp_path)


def test_a_run_killed_between_its_manifest_and_its_note_is_current_all_the_same(
    workspace: Workspace, make_manifest: Callable[..., Any], tmp_path: Path
) -> None:
    result(workspace, make_manifest, 1)
    # another process looked at the history just before the manifest was there
    second = make_manifest(fingerprint=fingerprint("second"), run_id="run-2")
    workspace.store.write_json(history_key(second), second.sealed(tables={}))
    assert workspace.index.sql("SELECT fingerprint FROM current_manifests").rows == [
        (fingerprint([1, "tonal/dry"]),)
    ]
    # the manifest is written, and its writer is killed before it can say so
    Manifests(workspace.store).commit(second)
    assert workspace.index.sql("SELECT fingerprint FROM current_manifests").rows == [(fingerprint("second"),)]
    assert_like_rebuilt(workspace, tmp_path)


# Damage


def test_a_flipped_byte_anywhere_is_named(
    workspace: Workspace, make_manifest: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One byte of every file of a result, at many places: named on read, never a raw error, never believed."""
    result(workspace, make_manifest)
    dice = random.Random(7)
    store = workspace.store
    tried = 0
    for key in store.list():
        path = store.local_path(key)
        assert path is not None
        whole = path.read_bytes()
        places = sorted({0, len(whole) - 1, *dice.sample(range(len(whole)), 18)})
        for place in places:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << dice.randrange(8)
            path.write_bytes(bytes(flipped))
            caplog.clear()
            if "/history/" in key:
                # what was, but does not count: the index leaves it out by name
                index = LineageIndex(store, tmp_path / "x" / "flipped.duckdb")
                index.announce([key])
                with caplog.at_level(logging.WARNING, logger="storage"):
                    assert index.take_in() == "indexed"
                said = any(key.rsplit("/", 1)[1] in r.getMessage() for r in caplog.records)
                assert said, (key, place, whole[place : place + 20])
            else:
                try:
                    manifest = workspace.manifests.read(*PLACE)
                    assert manifest is not None
                    said_so = workspace.manifests.verify(manifest)
                except ArtifactError as error:
                    said_so = [str(error)]
                assert any(str(path) in line for line in said_so), (key, place)
            tried += 1
        path.write_bytes(whole)
    assert tried > 80


def test_rows_that_rotted_are_left_out_by_name_and_nothing_else_is(
    workspace: Workspace, make_manifest: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Parquet files of other makers and of damaged disks beside good ones: no stage fails, no rebuild fails."""
    for n in range(4):
        result(workspace, make_manifest, n, trait=f"a/t{n}")
    good = workspace.index.sql("SELECT count(*) FROM metrics").rows
    common = {
        "experiment": "demo",
        "stage": "vectors",
        "trait": "a/bad",
        "run_id": "r",
        "fingerprint": "f",
    }
    key = metrics_key("demo", "vectors", "a/bad", "f", "r")
    folder = key.rsplit("/", 1)[0]

    def parquet(table: pa.Table) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        return buffer.getvalue()

    created = pa.array([None], pa.timestamp("us", tz="UTC"))
    columns = {name: pa.array([value]) for name, value in common.items()}
    bad_utf8 = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")]
    )
    bad = {
        "no-common-columns": parquet(pa.table({"name": ["x"], "value": [1.0]})),
        "no-time": parquet(pa.table({**columns, "created_at": created, "name": ["x"]})),
        "not-utf8": parquet(pa.table({**columns, "created_at": created.fill_null(0), "name": bad_utf8})),
        "not-parquet": b"PAR1" + b"\xff" * 200 + b"PAR1",
        "empty": b"",
        "odd-types": parquet(
            pa.table({**{n: pa.array([[1]]) for n in common}, "created_at": created.fill_null(0)})
        ),
    }
    for name, data in bad.items():
        # under its own name, where nothing but its content is wrong
        workspace.store.write_bytes(key, data)
        with caplog.at_level(logging.WARNING, logger="storage"):
            caplog.clear()
            assert workspace.index.sql("SELECT count(*) FROM metrics").rows == good, name
        assert any(key.rsplit("/", 1)[1] in r.getMessage() for r in caplog.records), name
        # a stage that commits meanwhile is not held up
        workspace.index.announce([key])
        result(workspace, make_manifest, 3, trait="a/t3")
        workspace.store.delete(key)
        workspace.store.write_bytes(f"{folder}/{name}.parquet", data)
    workspace.index.rebuild()
    assert workspace.index.sql("SELECT count(*) FROM metrics").rows == good


def test_manifests_of_the_wrong_shape_fail_no_stage(
    workspace: Workspace, make_manifest: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    manifest = result(workspace, make_manifest)
    record = manifest.record()
    wrong: list[dict[str, Any]] = [
        {"created_at": "2026-13-45"},
        {"created_at": 5},
        {"inputs": ["x"]},
        {"inputs": {"a": 1}},
        {"options": None},
        {"summary": [1]},
        {"experiment": "../x"},
        {"trait": "a/b/c"},
        {"stage": "Bad Stage"},
        {"fingerprint": "../../x"},
        {"fingerprint": None},
        {"status": "maybe"},
        {"files": {"/etc/passwd": {"sha256": "0", "bytes": 1}}},
        {"rows": {"../x": {"sha256": "0", "bytes": 1}}},
        {"libraries": {"torch": {}}},
        {"tables": {"t": [1]}},
        {"run_id": 7},
    ]
    place = f"{keys.history(*PLACE)}/odd.json"
    for change in wrong:
        for key in (place, keys.manifest(*PLACE)) if "created_at" in change else (place,):
            before = workspace.store.read_bytes(key) if workspace.store.exists(key) else None
            workspace.store.write_bytes(key, json.dumps({**record, **change}).encode())
            with pytest.raises(ArtifactError, match="damaged"):
                workspace.manifests.read_key(key)
            workspace.index.announce([key])
            assert workspace.index.take_in() == "indexed", change
            if before is None:
                workspace.store.delete(key)
            else:
                workspace.store.write_bytes(key, before)
    workspace.store.write_bytes(place, json.dumps({**record, "created_at": "soon"}).encode())
    workspace.index.rebuild()
    assert workspace.index.sql("SELECT count(*) FROM current_manifests").rows == [(1,)]


@pytest.mark.parametrize(
    "note", ["[", "{}", "5", "null", "[1]", '[["a"]]', '["../../etc/passwd"]', '["a\\u0000"]', '"abc"']
)
def test_a_note_that_is_none_is_thrown_away(
    workspace: Workspace, make_manifest: Callable[..., Any], note: str
) -> None:
    workspace.index.notes.mkdir(parents=True)
    (workspace.index.notes / "0-odd.json").write_text(note)
    result(workspace, make_manifest)
    assert workspace.index.pending() == 0


def test_a_segment_that_is_listed_and_never_there_does_not_hang(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    cache = RowCache(store, "_cache/judge/t/x")
    cache.put_many({"k": {"n": 1}})
    (tmp_path / "_cache/judge/t/x" / f"0-{'0' * 8}-{'0' * 32}.jsonl").mkdir()
    (tmp_path / "_cache/judge/t/x" / f"1-{'0' * 8}-{'0' * 32}.jsonl").symlink_to("nowhere")
    with pytest.warns(DamagedSegment):
        assert RowCache(store, "_cache/judge/t/x").get("k") == {"n": 1}


# The database


def test_a_writer_killed_with_rows_in_its_log_loses_none_in_a_snapshot(
    workspace: Workspace, make_manifest: Callable[..., Any]
) -> None:
    """The write-ahead log is copied with the database, and before it."""
    result(workspace, make_manifest)
    program = textwrap.dedent(
        """
        import duckdb, os, signal, sys
        connection = duckdb.connect(sys.argv[1])
        connection.execute("PRAGMA disable_checkpoint_on_shutdown")
        connection.execute("INSERT INTO about VALUES ('from the log')")
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", program, str(workspace.index.path)], check=False)
    assert done.returncode == -signal.SIGKILL
    wal = workspace.index.path.with_name(workspace.index.path.name + ".wal")
    assert wal.stat().st_size > 0
    copy = workspace.index.snapshot(workspace.index.path.with_name("copy.duckdb"))
    import duckdb

    with duckdb.connect(str(copy), read_only=True) as connection:
        assert ("from the log",) in connection.execute("SELECT * FROM about").fetchall()


def test_nobody_writes_while_a_snapshot_is_copied(
    workspace: Workspace, make_manifest: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """POSIX gives a lock back when any handle of the process on that file is closed."""
    result(workspace, make_manifest)
    index = workspace.index
    wal = index.path.with_name(index.path.name + ".wal")
    wal_seen: list[bool] = []
    program = "import duckdb, sys; duckdb.connect(sys.argv[1]).close()"
    real = shutil.copyfile

    def copy(source: Any, target: Any) -> Any:
        # a writer tries between the two copies as well as before them
        other = subprocess.run(
            [sys.executable, "-c", program, str(index.path)], capture_output=True, text=True, check=False
        )
        assert "Could not set lock" in other.stderr, f"a writer got in before {source} was copied"
        wal_seen.append(Path(source) == wal)
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy)
    index.snapshot(index.path.with_name("copy.duckdb"))
    assert wal_seen == [True, False]


def test_a_path_that_speaks_of_locks_is_not_taken_for_one(tmp_path: Path) -> None:
    index = LineageIndex(ArtifactStore(tmp_path / "e"), tmp_path / "locks" / "lock.duckdb", patience=30)
    (tmp_path / "locks").mkdir()
    index.path.write_bytes(b"no database at all" * 1000)
    started = time.monotonic()
    with pytest.raises(UserError, match="rebuild-index"):
        index.sql("SELECT 1")
    assert time.monotonic() - started < 10


def test_a_state_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"a file where the folder should be")
    index = LineageIndex(ArtifactStore(tmp_path / "e"), tmp_path / "state" / "lineage.duckdb")
    with pytest.raises(UserError, match="TRAITS_STATE"):
        index.sql("SELECT 1")
    assert index.take_in() == "index_behind"


# Object stores


@pytest.fixture
def bucket(s3_endpoint: str) -> Any:
    import uuid

    from upath import UPath

    name = f"bucket-{uuid.uuid4().hex}"
    path = UPath(
        f"s3://{name}",
        endpoint_url=s3_endpoint,
        key="none",
        secret="none",
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    path.fs.mkdir(name)
    return path


def test_objects_named_like_folders_are_no_files(bucket: Any) -> None:
    """Consoles and sync tools leave empty objects that end in a slash."""
    store = ArtifactStore(bucket / "experiments")
    store.write_bytes("demo/history/vectors/t/x/a.json", b"1")
    name = str(bucket.path).strip("/")
    for marker in ("experiments/", "experiments/demo/", "experiments/demo/history/"):
        bucket.fs.call_s3("put_object", Bucket=name, Key=marker, Body=b"") if hasattr(
            bucket.fs, "sync_call"
        ) else bucket.fs.pipe_file(f"{name}/{marker}", b"")
    assert store.list() == ["demo/history/vectors/t/x/a.json"]
    assert store.children() == ["demo"]
    assert store.children("demo") == ["history"]
    assert store.children("demo/history/vectors/t/x/a.json") == []
    assert list(store.marks("demo")) == store.list("demo")
    assert store.marks("demo")[store.list()[0]] == store.mark(store.list()[0])


def test_a_bucket_that_is_not_there_is_named(bucket: Any) -> None:
    from upath import UPath

    store = ArtifactStore(UPath("s3://no-such-bucket-anywhere/experiments", **bucket.storage_options))
    assert store.list() == []
    with pytest.raises(UserError, match=r"no-such-bucket-anywhere.*cannot be written"):
        store.write_bytes("demo/x", b"1")


def test_a_large_object_goes_in_parts_and_is_whole(bucket: Any) -> None:
    """Beyond one part an upload is many requests; what is visible is one or the other whole object."""
    store = ArtifactStore(bucket / "experiments")
    first = store.write_bytes("demo/x.bin", b"old")
    data = os.urandom(1 << 20) * 60
    record = store.write_bytes("demo/x.bin", data)
    assert store.size("demo/x.bin") == len(data)
    assert store.read_bytes("demo/x.bin", record) == data
    with pytest.raises(ArtifactError):
        store.read_bytes("demo/x.bin", first)


def test_an_upload_that_is_killed_leaves_the_old_object(bucket: Any, s3_endpoint: str) -> None:
    store = ArtifactStore(bucket / "experiments")
    record = store.write_bytes("demo/x.bin", b"old" * 1000)
    program = textwrap.dedent(
        """
        import os, signal, sys, threading
        from upath import UPath
        from storage.artifacts import ArtifactStore
        store = ArtifactStore(UPath(sys.argv[1], endpoint_url=sys.argv[2], key="none", secret="none"))
        store.exists("demo/x.bin")
        print("ready", flush=True)
        threading.Timer(float(sys.argv[3]), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        data = os.urandom(1 << 20) * 120
        while True:
            store.write_bytes("demo/x.bin", data)
        """
    )
    url = f"s3://{str(bucket.path).strip('/')}/experiments"
    for seconds in ("0.1", "0.4"):
        writer = subprocess.run(
            [sys.executable, "-c", program, url, s3_endpoint, seconds], cwd=ROOT, check=False
        )
        assert writer.returncode == -signal.SIGKILL
        length = store.size("demo/x.bin")
        assert length in (3000, 120 << 20)
        if length == 3000:
            assert store.read_bytes("demo/x.bin", record) == b"old" * 1000
    assert store.list() == ["demo/x.bin"]


def test_forgetting_goes_through_no_link(workspace: Workspace, make_manifest, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "x.bin").write_bytes(b"mine")
    result(workspace, make_manifest)
    folder = workspace.store.local_path("demo/extraction/tonal/dry")
    assert folder is not None
    shutil.rmtree(folder)
    folder.symlink_to(precious)
    with pytest.raises(UserError, match="a link leads out"):
        forget(workspace, "tonal/dry")
    assert (precious / "x.bin").read_bytes() == b"mine"
