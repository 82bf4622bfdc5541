"""Stores to run the same tests on: a local folder, memory, and S3 where a server can be started."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from storage.manifest import Manifest, fingerprint
from storage.workspace import Workspace


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server_module = pytest.importorskip("moto.server", reason="moto's server is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["local", "memory", "s3"])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> str | UPath:
    """The root of an empty store of each kind."""
    if request.param == "local":
        return str(tmp_path / "experiments")
    name = f"bucket-{uuid.uuid4().hex}"
    if request.param == "memory":
        return f"memory://{name}/experiments"
    options: dict[str, Any] = {
        "endpoint_url": request.getfixturevalue("s3_endpoint"),
        "key": "none",
        "secret": "none",
        "use_listings_cache": False,
        # its instances are cached by arguments, and event loops of earlier tests with them
        "skip_instance_cache": True,
    }
    bucket = UPath(f"s3://{name}", **options)
    bucket.fs.mkdir(name)
    return bucket / "experiments"


@pytest.fixture
def any_workspace(any_root: str | UPath, tmp_path: Path) -> Workspace:
    return Workspace(any_root, tmp_path / "state" / "lineage.duckdb")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "experiments", tmp_path / "state" / "lineage.duckdb")


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    def make(**changes: Any) -> Manifest:
        values: dict[str, Any] = {
            "stage": "vectors",
            "experiment": "demo",
            "trait": "tonal/dry",
            "fingerprint": fingerprint({"n": 1}),
            "status": "done",
            "code_version": "1",
            "run_id": "run-1",
            "created_at": datetime(2026, 3, 1, 12, 0, tzinfo=UTC).isoformat(),
        }
        return Manifest(**{**values, **changes})

    return make
