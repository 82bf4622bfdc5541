"""A full disk is a clear error, damages nothing, and work goes on when there is space again."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from storage.artifacts import ArtifactStore
from storage.errors import UserError
from storage.manifest import fingerprint
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


def test_a_stage_meets_a_full_disk_at_every_point_of_its_commit(
    small_disk: Path, tmp_path: Path, make_manifest
) -> None:
    """Page by page more space: each write of a result in turn is the one that finds none."""
    workspace = Workspace(small_disk / "experiments", tmp_path / "lineage.duckdb")

    def stage(n: int) -> None:
        files = {}
        # each larger than the one before, since a file that is replaced gives its own space back
        for name, size in (("metadata.json", 3_000), ("picture.png", 14_000), ("a.safetensors", 30_000)):
            key = f"demo/extraction/t/x/{name}"
            files[key] = workspace.store.write_bytes(key, random.Random(f"{n}{name}").randbytes(size))
        summary = {"n": n, "fill": "x" * 150_000}
        rows = [
            {"name": f"metric {n} {i}", "value": i / 7, "text": random.randbytes(12).hex()}
            for i in range(4000)
        ]
        workspace.commit(
            make_manifest(trait="t/x", fingerprint=fingerprint(n), files=files, summary=summary), rows
        )

    def attempt(work: Callable[[int], None], n: int) -> UserError | None:
        try:
            work(n)
        except UserError as error:
            return error
        return None

    def state() -> str:
        """What a reader finds: the old result whole, or damage by name; never a mixture that counts."""
        manifest = workspace.manifests.read("demo", "vectors", "t/x")
        assert manifest is not None
        problems = workspace.manifests.verify(manifest)
        return "; ".join(problems) if problems else f"result {manifest.summary['n']}"

    stage(0)
    failed_at: set[str] = set()
    for n, pages in enumerate((0, 2, 6, 10, 20, 30, 40, 50, 70, 80, 120), 1):
        ballast = fill(small_disk)
        with open(ballast, "rb+") as file:
            file.truncate(ballast.stat().st_size - 4096 * pages)
        error = attempt(stage, n)
        if error is not None:
            said = str(error)
            assert "no space left" in said
            assert "Free some space" in said
            assert error.where is not None
            part = Path(error.where).relative_to(small_disk / "experiments" / "demo").parts
            failed_at.add(part[-1] if part[0] == "extraction" else part[0])
            said = state()
            assert said == f"result {n - 1}" or "altered" in said or "of" in said
            ballast.unlink()
            stage(n)  # goes on when space is back
        else:
            ballast.unlink()
            assert state() == f"result {n}"
            break
        assert state() == f"result {n}"
        assert not list(small_disk.rglob("*.tmp"))
    else:
        pytest.fail("there was never enough space")
    assert failed_at == {"metadata.json", "picture.png", "a.safetensors", "metrics", "history", "manifests"}
    count = workspace.index.sql("SELECT count(DISTINCT fingerprint) FROM current_metrics").rows
    assert count == [(1,)]
