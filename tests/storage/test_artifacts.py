"""Keys that cannot escape, writes that are whole or not there, JSON that reads back as it was."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from upath import UPath

from storage.artifacts import ArtifactStore, FileRecord
from storage.errors import ArtifactError, UserError

BAD_KEYS = [
    "",
    "/etc/x",
    "../x",
    "a/../x",
    "a/..",
    ".",
    "./a",
    "a//b",
    "a/",
    "a\\b",
    "C:/x",
    "C:x",
    "a,b",
    "ü",
    "a b",
    "a\n",
    "a\x00b",
    "a|b",
    "a*",
    "~",
    "CON",
    "con.json",
    "a/Nul",
    "lpt1.txt",
    "a/com9",
    "name.",
    "x" * 300,
    "/".join(["x" * 100] * 8),
    "file:///etc/passwd",
    "memory://x",
    f".x.{'0' * 32}.tmp",
]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_key_that_could_leave_the_root_is_refused_everywhere(tmp_path: Path, key: str) -> None:
    store = ArtifactStore(tmp_path / "root")
    for attempt in (
        lambda: store.write_bytes(key, b"x"),
        lambda: store.read_bytes(key),
        lambda: store.exists(key),
        lambda: store.delete(key),
        lambda: store.delete_tree(key),
        lambda: store.local_path(key),
    ):
        with pytest.raises(UserError):
            attempt()
    assert list(tmp_path.rglob("*")) == []


@given(st.text(max_size=40))
def test_whatever_the_key_it_stays_inside_the_root(text: str) -> None:
    store = ArtifactStore("/some/root")
    try:
        path = store.local_path(text)
    except UserError:
        return
    assert path is not None
    assert Path(os.path.normpath(path)) == path
    assert path.is_relative_to("/some/root")
    windows = PureWindowsPath("C:/root").joinpath(*text.split("/"))
    assert windows.is_relative_to("C:/root")
    assert "\\" not in text


def test_bytes_and_json_come_back(any_root: str | UPath) -> None:
    store = ArtifactStore(any_root)
    record = store.write_bytes("demo/a/x.bin", b"\x00\xff" * 1000)
    assert record == FileRecord.of(b"\x00\xff" * 1000)
    assert store.read_bytes("demo/a/x.bin", record) == b"\x00\xff" * 1000
    assert store.exists("demo/a/x.bin")
    assert not store.exists("demo/a")
    assert store.size("demo/a/x.bin") == 2000
    value = {"b": [1, 2.5, None, True], "a": {"text": "ü \u2028 \ud800"}, "n": 10**20}
    store.write_json("demo/a/y.json", value)
    assert store.read_json("demo/a/y.json") == value
    store.write_bytes("demo/a/x.bin", b"replaced")
    assert store.read_bytes("demo/a/x.bin") == b"replaced"
    assert store.list() == ["demo/a/x.bin", "demo/a/y.json"]
    assert store.list("demo/a") == store.list("demo") == store.list()
    assert store.list("demo/a/x.bin") == []
    assert store.list("nowhere") == []
    assert store.children("demo") == ["a"]
    assert store.children("nowhere") == []
    assert store.delete("demo/a/x.bin")
    assert not store.delete("demo/a/x.bin")
    with pytest.raises(ArtifactError, match=r"x\.bin: the file is missing"):
        store.read_bytes("demo/a/x.bin")
    with pytest.raises(ArtifactError, match=r"x\.bin"):
        store.size("demo/a/x.bin")
    assert store.delete_tree("demo") == 1
    assert store.list() == []
    assert store.delete_tree("demo") == 0


def test_a_folder_is_not_taken_for_its_neighbour_with_the_same_beginning(any_root: str | UPath) -> None:
    store = ArtifactStore(any_root)
    for key in ("t/dry/x", "t/dry-wit/x", "t/dry.json"):
        store.write_bytes(key, b"1")
    assert store.list("t/dry") == ["t/dry/x"]
    assert store.delete_tree("t/dry") == 1
    assert store.list() == ["t/dry-wit/x", "t/dry.json"]


def test_json_is_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    first = store.write_json("a.json", {"x": 1, "y": [1.0, {"p": 2, "q": 3}], 7: "layer"})
    second = store.write_json("b.json", {7: "layer", "y": (1.0, {"q": 3, "p": 2}), "x": np.int64(1)})
    assert first == second
    assert store.read_json("a.json")["7"] == "layer"


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"layers": [{"norm": 1.0}, {"norm": math.nan}]}, r"\$\.layers\[1\]\.norm"),
        ({"a": {"b": math.inf}}, r"\$\.a\.b"),
        ({"a": np.float32("nan")}, r"\$\.a"),
        ({"a": {1, 2}}, r"\$\.a.*set"),
        ({"a": b"x"}, r"\$\.a.*bytes"),
        ({"a": np.zeros(3)}, r"\$\.a.*ndarray"),
        ({("a", "b"): 1}, "neither a string nor an integer"),
        ({"1": 1, 1: 2}, "as a string and as an integer"),
    ],
)
def test_what_json_does_not_have_is_refused_by_its_place(tmp_path: Path, value: object, place: str) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(UserError, match=place) as caught:
        store.write_json("x.json", value)
    assert str(tmp_path) in str(caught.value)
    assert store.list() == []


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": NaN}', b"\xff\xfe", b'{"a": 1} extra'])
def test_broken_json_is_named(tmp_path: Path, data: bytes) -> None:
    store = ArtifactStore(tmp_path)
    store.write_bytes("x.json", data)
    with pytest.raises(ArtifactError, match=r"x\.json: the file is not valid JSON"):
        store.read_json("x.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "truncated: 9 of 10"),
        (lambda data: data + b"x", "11 bytes instead of 10"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "altered"),
    ],
)
def test_a_damaged_file_is_named_on_read(any_root: str | UPath, damage, message: str) -> None:
    store = ArtifactStore(any_root)
    record = store.write_bytes("d/x.bin", b"0123456789")
    store.write_bytes("d/x.bin", damage(b"0123456789"))
    with pytest.raises(ArtifactError, match=message) as caught:
        store.read_bytes("d/x.bin", record)
    assert "x.bin" in str(caught.value)


def test_a_root_may_be_given_relative_and_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = ArtifactStore("experiments")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.write_bytes("x", b"1")
    assert (tmp_path / "experiments" / "x").read_bytes() == b"1"
    assert store.describe("x") == str(tmp_path / "experiments" / "x")
    assert ArtifactStore(f"file://{tmp_path}/experiments").read_bytes("x") == b"1"


def test_a_remote_store_describes_itself_by_url() -> None:
    store = ArtifactStore("memory://bucket/exp")
    assert store.describe("a/b.json") == "memory://bucket/exp/a/b.json"
    assert store.local_path("a/b.json") is None


def test_a_file_in_the_way_of_a_folder_is_a_clear_error(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.write_bytes("a", b"1")
    with pytest.raises(UserError, match="cannot be written"):
        store.write_bytes("a/b", b"1")


def test_no_unfinished_file_is_ever_seen(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.write_bytes("d/x", b"1")
    leftover = tmp_path / "d" / f".x.{'0' * 32}.tmp"
    leftover.write_bytes(b"torn")
    assert store.list() == ["d/x"]
    assert store.children("d") == ["x"]
    assert store.remove_leftovers() == 0
    os.utime(leftover, (0, 0))
    assert store.remove_leftovers() == 1
    leftover.write_bytes(b"torn")
    store.delete_tree("d")
    assert not (tmp_path / "d").exists()


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from storage.artifacts import ArtifactStore
        store = ArtifactStore(sys.argv[1])
        sizes = [200_000, 300_000]
        i = 0
        while True:
            store.write_json("x.json", {"n": i, "fill": [i] * sizes[i % 2]})
            if i == 0:
                print("ready", flush=True)
            i += 1
        """
    )
    for attempt in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.07 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        value = json.loads((tmp_path / "x.json").read_bytes())
        assert value["fill"] == [value["n"]] * [200_000, 300_000][value["n"] % 2]
        assert ArtifactStore(tmp_path).list() == ["x.json"]
