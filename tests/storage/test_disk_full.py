"""A full disk is a clear error, damages nothing, and work goes on when there is space again."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from storage.artifacts import ArtifactStore
from storage.errors import UserError
from storage.rows import RowCache, TensorJournal
from storage.workspace import Workspace

SIZE = 24 * 1024 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all space that is left."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    return ballast


def _artifact(root: Path, n: int) -> None:
    ArtifactStore(root).write_bytes("demo/extraction/t/x/a.bin", bytes([n]) * 100_000)


def _manifest(root: Path, n: int, make_manifest) -> None:
    w = Workspace(root, root.parent.parent / "lineage.duckdb")
    w.manifests.commit(make_manifest(trait="t/x", summary={"n": n, "fill": "x" * 100_000}))


def _rows(root: Path, n: int) -> None:
    RowCache(ArtifactStore(root), "_cache/judge/t/x").put_many({"row": {"n": n, "fill": "x" * 100_000}})


def _tensors(root: Path, n: int) -> None:
    journal = TensorJournal(ArtifactStore(root), "demo/journal/activations/t/x")
    journal.put_many({"row": {"x": np.full(50_000, n, np.float32)}})


def _metrics(root: Path, n: int) -> None:
    w = Workspace(root, root.parent.parent / "lineage.duckdb")
    rows = [{"name": f"metric {i} {hash((i, n))}", "value": n + i / 7} for i in range(5000)]
    w.metrics.write("demo", "vectors", "t/x", rows, "run-1", "f")


def _files(root: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "write", [_artifact, _manifest, _rows, _tensors, _metrics], ids=lambda f: f.__name__[1:]
)
def test_a_full_disk(small_disk: Path, write: Callable[..., None], make_manifest) -> None:
    root = small_disk / "experiments"
    arguments = (make_manifest,) if write is _manifest else ()
    write(root, 1, *arguments)
    before = _files(root)
    ballast = fill(small_disk)
    with pytest.raises(UserError, match="no space left") as caught:
        write(root, 2, *arguments)
    assert str(root) in str(caught.value)
    assert "Free some space" in str(caught.value)
    assert _files(root) == before, "what was there is there, and nothing half-written"
    ballast.unlink()
    write(root, 2, *arguments)
    after = _files(root)
    assert after != before


def test_a_database_without_space_is_behind_and_nothing_else(small_disk: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "experiments", small_disk / "lineage.duckdb")
    assert (
        workspace.metrics.write("demo", "vectors", "t/x", [{"name": "a", "value": 1}], "r", "f") == "indexed"
    )
    ballast = fill(small_disk)
    rows = [{"name": f"n{i}", "value": i} for i in range(20_000)]
    assert workspace.metrics.write("demo", "vectors", "t/y", rows, "r", "f") == "index_behind"
    ballast.unlink()
    assert workspace.metrics.write("demo", "vectors", "t/z", [], "r", "f") == "indexed"
    assert workspace.index.sql("SELECT count(*) FROM metrics").rows == [(20_001,)]
