"""A result counts when its manifest is there, names its files, and they are the ones that were written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from storage import keys
from storage import manifest as manifest_module
from storage.errors import ArtifactError, UserError
from storage.manifest import SCHEMA_VERSION, Manifest, fingerprint
from storage.workspace import Workspace


def test_fingerprints_depend_on_content_alone() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": (1, 2), "a": 1})
    assert len(fingerprint({})) == 32
    different = [1, 1.0, True, "1", None, [], {}, [1], {"1": 1}, "", "ü", "u", [[]], [None], {"a": {}}]
    assert len({fingerprint(value) for value in different}) == len(different)


def test_a_fingerprint_is_the_hash_of_the_canonical_json() -> None:
    import hashlib

    text = '{"a":1,"b":[0.1,"\\u00fc"],"c":null}'
    assert fingerprint({"c": None, "b": [0.1, "ü"], "a": 1}) == hashlib.sha256(text.encode()).hexdigest()[:32]


@pytest.mark.parametrize(
    "value",
    [math.nan, {"a": [math.inf]}, {1: 2}, {"a": {1, 2}}, b"x", np.float64("nan"), np.int64(3), object()],
)
def test_what_has_no_unique_text_has_no_fingerprint(value: object) -> None:
    with pytest.raises(UserError):
        fingerprint(value)


def test_a_manifest_comes_back(any_workspace: Workspace, make_manifest) -> None:
    w = any_workspace
    record = w.store.write_bytes("demo/extraction/tonal/dry/v.bin", b"abc")
    manifest = make_manifest(
        inputs={"activations": "f" * 32},
        options={"layers": "all", "model": {"model": "m", "revision": "1"}},
        files={"demo/extraction/tonal/dry/v.bin": record},
        summary={"n": 3, "best": None},
        tables={"t": [{"layer": 1, "auc": 0.5}]},
        libraries={"numpy": "2"},
    )
    assert w.manifests.read("demo", "vectors", "tonal/dry") is None
    w.manifests.commit(manifest)
    assert w.manifests.read("demo", "vectors", "tonal/dry") == manifest
    assert w.manifests.verify(manifest) == []
    table = make_manifest(stage="steering_summary", trait=None)
    shared = make_manifest(stage="scenarios", experiment=None)
    w.manifests.commit(table)
    w.manifests.commit(shared)
    assert w.manifests.list() == [shared, table, manifest]
    assert w.manifests.list("demo") == [table, manifest]
    assert w.manifests.list(None) == [shared]
    assert w.manifests.delete("demo", "vectors", "tonal/dry")
    assert not w.manifests.delete("demo", "vectors", "tonal/dry")
    assert w.manifests.read("demo", "vectors", "tonal/dry") is None


def test_every_committed_manifest_stays_in_the_history(workspace: Workspace, make_manifest) -> None:
    for n in range(3):
        workspace.manifests.commit(make_manifest(fingerprint=fingerprint(n), tables={"t": [{"n": n}]}))
    workspace.manifests.commit(make_manifest(fingerprint=fingerprint(0), run_id="run-2"))
    kept = workspace.store.list(keys.history("demo", "vectors", "tonal/dry"))
    assert len(kept) == 4
    current = workspace.manifests.read("demo", "vectors", "tonal/dry")
    assert current is not None
    assert current.run_id == "run-2"


def test_a_manifest_that_names_an_unwritten_file_is_refused(workspace: Workspace, make_manifest) -> None:
    record = workspace.store.write_bytes("demo/x", b"1")
    workspace.store.delete("demo/x")
    with pytest.raises(ArtifactError, match="demo/x"):
        workspace.manifests.commit(make_manifest(files={"demo/x": record}))
    assert workspace.manifests.read("demo", "vectors", "tonal/dry") is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda store, data: store.write_bytes("demo/x", data[:-3]), "truncated: 997 of 1000"),
        (lambda store, data: store.write_bytes("demo/x", data + b"1"), "1001 "),
        (lambda store, data: store.write_bytes("demo/x", b"1" + data[1:]), "altered"),
        (lambda store, data: store.delete("demo/x"), "missing"),
    ],
)
def test_a_damaged_file_is_found_by_name(
    any_workspace: Workspace, make_manifest, damage, message: str
) -> None:
    w = any_workspace
    record = w.store.write_bytes("demo/x", b"0" * 1000)
    manifest = make_manifest(files={"demo/x": record, "demo/y": w.store.write_bytes("demo/y", b"fine")})
    w.manifests.commit(manifest)
    assert w.manifests.verify(manifest) == []
    damage(w.store, b"0" * 1000)
    (problem,) = w.manifests.verify(manifest)
    assert message in problem
    assert w.store.describe("demo/x") in problem


def test_an_unchanged_local_file_is_hashed_once(
    workspace: Workspace, make_manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = workspace.store.write_bytes("demo/x", b"0" * 1000)
    manifest = make_manifest(files={"demo/x": record})
    hashed = []
    real = manifest_module.hashlib.file_digest
    monkeypatch.setattr(
        manifest_module.hashlib,
        "file_digest",
        lambda file, name: hashed.append(file.name) or real(file, name),
    )
    workspace.manifests.commit(manifest)
    for _ in range(3):
        assert workspace.manifests.verify(manifest) == []
    assert len(hashed) == 1
    workspace.store.write_bytes("demo/x", b"1" * 1000)
    assert len(workspace.manifests.verify(manifest)) == 1


def _path(workspace: Workspace) -> Path:
    path = workspace.store.local_path(keys.manifest("demo", "vectors", "tonal/dry"))
    assert path is not None
    return path


def test_a_newer_manifest_is_named_and_not_guessed_at(workspace: Workspace, make_manifest) -> None:
    workspace.manifests.commit(make_manifest())
    record = json.loads(_path(workspace).read_text())
    record["schema_version"] = SCHEMA_VERSION + 1
    _path(workspace).write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=r"dry\.json: the manifest was written by a newer version"):
        workspace.manifests.read("demo", "vectors", "tonal/dry")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema_version": 1}',
        '{"schema_version": "1"}',
        '{"schema_version": true}',
        "null",
        "{broken",
    ],
)
def test_a_broken_manifest_is_named(workspace: Workspace, make_manifest, text: str) -> None:
    workspace.manifests.commit(make_manifest())
    _path(workspace).write_text(text)
    with pytest.raises(ArtifactError, match=r"dry\.json"):
        workspace.manifests.read("demo", "vectors", "tonal/dry")


def test_a_manifest_cannot_point_outside_the_root(workspace: Workspace, make_manifest) -> None:
    workspace.manifests.commit(make_manifest())
    record = json.loads(_path(workspace).read_text())
    record["files"] = {"../../etc/passwd": {"sha256": "0", "bytes": 1}}
    _path(workspace).write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="damaged"):
        workspace.manifests.read("demo", "vectors", "tonal/dry")


def test_manifest_fields_have_one_written_form(make_manifest) -> None:
    manifest: Manifest = make_manifest(files={})
    assert Manifest.from_record(json.loads(json.dumps(manifest.record())), "x") == manifest
