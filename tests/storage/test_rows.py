"""Rows that survive kills, damage, and other writers."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from storage import rows as rows_module
from storage.artifacts import ArtifactStore
from storage.errors import UserError
from storage.rows import COMPACT_ABOVE, DamagedSegment, RowCache, TensorJournal
from storage.workspace import Workspace

PREFIX = "_cache/judge/tonal/dry"


def test_rows_come_back(any_workspace: Workspace) -> None:
    cache = any_workspace.row_cache("judge", "tonal/dry")
    assert cache.get("a") is None
    assert "a" not in cache
    assert len(cache) == 0
    cache.put_many({"a": {"score": 1.5, "text": "ü\n\u2028"}, "b": {"score": None}})
    cache.put_many({})
    for reader in (cache, any_workspace.row_cache("judge", "tonal/dry")):
        assert reader.get("a") == {"score": 1.5, "text": "ü\n\u2028"}
        assert "b" in reader
        assert reader.keys() == ["a", "b"]
        assert len(reader) == 2
    assert len(any_workspace.row_cache("other", "tonal/dry")) == 0


def test_what_a_reader_does_to_its_row_stays_with_the_reader(workspace: Workspace) -> None:
    cache = workspace.row_cache("judge", "tonal/dry")
    cache.put_many({"a": {"list": [1]}})
    row = cache.get("a")
    assert row is not None
    row["list"].append(2)
    assert cache.get("a") == {"list": [1]}


def test_rows_that_are_there_cost_nothing(workspace: Workspace) -> None:
    cache = workspace.row_cache("judge", "tonal/dry")
    cache.put_many({"a": {"n": 1}})
    before = workspace.store.list()
    cache.put_many({"a": {"n": 1}})
    assert workspace.store.list() == before
    cache.put_many({"a": {"n": 2}})
    assert workspace.row_cache("judge", "tonal/dry").get("a") == {"n": 2}


def test_nan_is_refused_and_nothing_is_stored(workspace: Workspace) -> None:
    cache = workspace.row_cache("judge", "tonal/dry")
    with pytest.raises(UserError, match="score"):
        cache.put_many({"a": {"score": 1}, "b": {"score": float("nan")}})
    assert "a" not in cache
    assert workspace.store.list() == []


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-5], lambda d: d[:10] + b"?" + d[11:], lambda d: b"", lambda d: d + d]
)
def test_a_damaged_segment_costs_only_its_own_rows(workspace: Workspace, damage) -> None:
    cache = workspace.row_cache("judge", "tonal/dry")
    for key in "abc":
        cache.put_many({key: {"key": key}})
    victim = workspace.store.list()[1]
    workspace.store.write_bytes(victim, damage(workspace.store.read_bytes(victim)))
    fresh = workspace.row_cache("judge", "tonal/dry")
    with pytest.warns(DamagedSegment, match=victim.rsplit("/", 1)[1]):
        assert fresh.get("b") is None
    assert fresh.get("a") == {"key": "a"}
    assert fresh.get("c") == {"key": "c"}
    fresh.put_many({"b": {"key": "again"}})
    fresh.compact()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedSegment)
        assert workspace.row_cache("judge", "tonal/dry").keys() == ["a", "b", "c"]


def test_many_small_writes_are_compacted_without_loss(workspace: Workspace) -> None:
    cache = workspace.row_cache("judge", "tonal/dry")
    for n in range(3 * COMPACT_ABOVE):
        cache.put_many({f"k{n}": {"n": n}})
    assert len(workspace.store.list(PREFIX)) <= COMPACT_ABOVE + 1
    fresh = workspace.row_cache("judge", "tonal/dry")
    assert {key: fresh.get(key) for key in fresh.keys()} == {  # noqa: SIM118
        f"k{n}": {"n": n} for n in range(3 * COMPACT_ABOVE)
    }


def test_another_writer_is_seen_and_not_compacted_away(workspace: Workspace) -> None:
    one, other = (workspace.row_cache("judge", "tonal/dry") for _ in range(2))
    one.put_many({"a": {"n": 1}})
    other.put_many({"b": {"n": 2}})
    one.put_many({"c": {"n": 3}})
    one.compact()
    assert len(workspace.store.list(PREFIX)) == 1
    # `other` still knows segments that are gone
    other.put_many({"d": {"n": 4}})
    other.refresh()
    assert other.keys() == one_after(workspace) == ["a", "b", "c", "d"]
    one.refresh()
    assert one.get("d") == {"n": 4}


def one_after(workspace: Workspace) -> list[str]:
    return workspace.row_cache("judge", "tonal/dry").keys()


def test_a_missing_row_is_looked_for_again_after_a_while(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "RELIST_SECONDS", 0.0)
    one, other = (workspace.row_cache("judge", "tonal/dry") for _ in range(2))
    assert one.get("a") is None
    other.put_many({"a": {"n": 1}})
    assert one.get("a") == {"n": 1}


def test_threads_share_a_cache(workspace: Workspace) -> None:
    cache = workspace.row_cache("judge", "tonal/dry")

    def work(thread: int) -> None:
        for n in range(30):
            cache.put_many({f"{thread}-{n}": {"n": n}})
            assert cache.get(f"{thread}-{n}") == {"n": n}

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(workspace.row_cache("judge", "tonal/dry")) == 180


def test_processes_write_and_compact_at_once_without_loss(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import sys
        from storage.artifacts import ArtifactStore
        from storage.rows import RowCache
        cache = RowCache(ArtifactStore(sys.argv[1]), {PREFIX!r})
        for n in range(100):
            cache.put_many({{f"{{sys.argv[2]}}-{{n}}": {{"n": n}}}})
        """
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(i)], cwd=Path(__file__).parents[2]
        )
        for i in range(4)
    ]
    assert [worker.wait(120) for worker in workers] == [0] * 4
    cache = RowCache(ArtifactStore(tmp_path), PREFIX)
    assert cache.keys() == sorted(f"{i}-{n}" for i in range(4) for n in range(100))


def test_a_killed_writer_keeps_every_row_it_had_put(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import sys
        from storage.artifacts import ArtifactStore
        from storage.rows import RowCache
        cache = RowCache(ArtifactStore(sys.argv[1]), {PREFIX!r})
        n = len(cache)
        while True:
            cache.put_many({{f"k{{n}}": {{"n": n, "fill": "x" * 5000}}}})
            print(n, flush=True)
            n += 1
        """
    )
    put = -1
    for attempt in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert writer.stdout is not None
        first = int(writer.stdout.readline())
        time.sleep(0.3 + 0.1 * attempt)
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split(b"\n")[:-1]
        writer.stdout.close()
        writer.wait()
        assert first > put, "a row that was there was made again"
        put = int(rest[-1]) if rest else first
        cache = RowCache(ArtifactStore(tmp_path), PREFIX)
        assert {f"k{n}" for n in range(put + 1)} <= set(cache.keys())


def test_tensors_of_a_stage_in_progress_survive(any_workspace: Workspace) -> None:
    journal = any_workspace.journal("demo", "activations", "tonal/dry")
    assert journal.load() == {}
    rows = {
        f"row-{n}": {"response[:]|residual": np.full((3, 4), n, np.float32), "norms": np.ones(3, np.float16)}
        for n in range(5)
    }
    journal.put_many(dict(list(rows.items())[:3]))
    journal.put_many(dict(list(rows.items())[3:]))
    journal.put_many({})
    other = any_workspace.journal("demo", "activations", "tonal/dry")
    loaded = other.load()
    assert set(loaded) == set(rows)
    for key, row in rows.items():
        assert set(loaded[key]) == set(row)
        for name, array in row.items():
            np.testing.assert_array_equal(loaded[key][name], array)
            assert loaded[key][name].dtype == array.dtype
    other.put_many({"row-0": {"norms": np.zeros(1, np.float32)}})
    assert list(other.load()["row-0"]) == ["norms"]
    assert other.load().keys() == rows.keys()
    other.clear()
    assert journal.load() == {}


def test_a_torn_tensor_segment_costs_only_its_own_rows(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    journal = TensorJournal(store, "j")
    journal.put_many({"a": {"x": np.ones(100, np.float32)}})
    journal.put_many({"b": {"x": np.ones(100, np.float32)}})
    first = store.list("j")[0]
    data = store.read_bytes(first)
    # a flipped byte inside the numbers, which safetensors itself cannot see
    store.write_bytes(first, data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
    with pytest.warns(DamagedSegment):
        assert list(TensorJournal(store, "j").load()) == ["b"]
