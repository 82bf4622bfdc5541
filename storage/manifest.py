"""Fingerprints, and the manifest that makes a result count.

Belongs here: what a result was made from, which files it consists of, whether they are still the ones.
Does not: what goes into a stage's fingerprint (the stage knows), the tables over all manifests
(`lineage.py`).

A manifest is written after all files it names. Readers trust only what a manifest names and whose hash
matches, so this holds on object stores, which have no atomic rename, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from storage import keys
from storage.artifacts import ArtifactStore, FileRecord
from storage.errors import ArtifactError, UserError

SCHEMA_VERSION = 1


def fingerprint(obj: Any) -> str:
    """SHA-256 of the canonical JSON of `obj` (sorted keys, no spaces), its first 32 hex characters.

    UserError for NaN, infinities, keys that are no strings, and every type that JSON does not have: two
    objects that differ must never share a text.
    """
    _check(obj, "$")
    text = json.dumps(obj, sort_keys=True, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def _check(obj: Any, where: str) -> None:
    if isinstance(obj, dict):
        for key, value in obj.items():
            if type(key) is not str:
                raise UserError(f"the key {key!r} is no string and cannot be fingerprinted", where=where)
            _check(value, f"{where}.{key}")
    elif isinstance(obj, list | tuple):
        for i, value in enumerate(obj):
            _check(value, f"{where}[{i}]")
    elif isinstance(obj, float) and not math.isfinite(obj):
        raise UserError(f"{obj} cannot be fingerprinted", where=where)
    elif obj is not None and not isinstance(obj, bool | int | float | str):
        raise UserError(f"a {type(obj).__name__} cannot be fingerprinted", where=where)


@dataclass(frozen=True)
class Manifest:
    """One finished (or deliberately skipped) result of a stage.

    `fingerprint`: of everything that decides the result; `inputs`: name of an input → its fingerprint;
    `options`: the options that matter, as given; `files`: storage key → hash and size; `summary`: a few
    plain numbers and words for people; `tables`: small tables for the UI; `created_at`: UTC, ISO 8601;
    `libraries`: name → version.
    """

    stage: str
    experiment: str | None
    trait: str | None
    fingerprint: str
    status: Literal["done", "skipped"]
    code_version: str
    run_id: str
    created_at: str
    inputs: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def key(self) -> str:
        return keys.manifest(self.experiment, self.stage, self.trait)

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: Any, where: str) -> Manifest:
        """The manifest in a parsed file; ArtifactError naming `where` when it is none or a newer one."""
        remedy = "Delete it and run its stage again."
        if not isinstance(record, dict) or type(record.get("schema_version")) is not int:
            raise ArtifactError("this is not a manifest", where=where, remedy=remedy)
        if record["schema_version"] > SCHEMA_VERSION:
            raise ArtifactError(
                f"the manifest was written by a newer version (schema {record['schema_version']}, "
                f"this one knows {SCHEMA_VERSION})",
                where=where,
                remedy="Update this program, or delete the manifest to build the result again.",
            )
        try:
            known = {f.name: record[f.name] for f in fields(cls) if f.name in record}
            known["files"] = {
                ArtifactStore.check_key(key): FileRecord(str(entry["sha256"]), int(entry["bytes"]))
                for key, entry in record["files"].items()
            }
            manifest = cls(**known)
            if manifest.status not in ("done", "skipped") or not isinstance(manifest.fingerprint, str):
                raise ValueError(f"status {manifest.status!r}")
        except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
            raise ArtifactError(
                f"the manifest is damaged ({type(error).__name__}: {error})", where=where, remedy=remedy
            ) from error
        return manifest


# (path, size, mtime_ns, inode) -> sha256, for this process: a file that was hashed once and did not
# change since
_hashed: dict[tuple[str, int, int, int], str] = {}
_hashed_lock = threading.Lock()


class Manifests:
    """All manifests of a store.

    `on_commit` is told of each manifest after it was committed (the index hooks in there); it must not raise.
    """

    def __init__(self, store: ArtifactStore, on_commit: Callable[[Manifest], object] | None = None) -> None:
        self.store = store
        self._on_commit = on_commit

    def read(self, experiment: str | None, stage: str, trait: str | None) -> Manifest | None:
        """The current manifest, None where there is none; ArtifactError naming a broken or newer one."""
        return self.read_key(keys.manifest(experiment, stage, trait))

    def read_key(self, key: str) -> Manifest | None:
        """Like `read`, by storage key (current manifests and history alike)."""
        if not self.store.exists(key):
            return None
        try:
            record = self.store.read_json(key)
        except ArtifactError:
            if not self.store.exists(key):  # deleted between the two looks
                return None
            raise
        return Manifest.from_record(record, self.store.describe(key))

    def commit(self, manifest: Manifest) -> None:
        """Make the result count: the very last write. All files it names must have been written before.

        A copy without tables goes to the history first, so that history never lacks what was current once.
        """
        keys.check_stage(manifest.stage)
        absent = [key for key in manifest.files if not self.store.exists(key)]
        if absent:
            raise ArtifactError(
                f"the manifest names a file that was not written: {absent[0]}",
                where=self.store.describe(manifest.key),
            )
        record = manifest.record()
        self.store.write_json(history_key(manifest), {**record, "tables": {}})
        self.store.write_json(manifest.key, record)
        if self._on_commit is not None:
            self._on_commit(manifest)

    def verify(self, manifest: Manifest) -> list[str]:
        """What is wrong with the files of `manifest`, one sentence each; empty when all are there and
        unaltered.

        On a local disk a file is hashed once per process as long as its size, time and inode stay the same.
        """
        problems = []
        for key, record in sorted(manifest.files.items()):
            problem = self._verify_file(key, record)
            if problem is not None:
                problems.append(f"{self.store.describe(key)}: {problem}")
        return problems

    def _verify_file(self, key: str, record: FileRecord) -> str | None:
        path = self.store.local_path(key)
        if path is None:
            try:
                return record.problem(self.store.read_bytes(key))
            except ArtifactError as error:
                return error.what
        try:
            stat = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return "the file is missing"
        if stat.st_size != record.bytes:
            kind = "truncated" if stat.st_size < record.bytes else "longer than it was"
            return f"the file is {kind}: {stat.st_size} of {record.bytes} bytes"
        mark = (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        with _hashed_lock:
            digest = _hashed.get(mark)
        if digest is None:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            with _hashed_lock:
                _hashed[mark] = digest
        if digest != record.sha256:
            return "the file was altered after it was written (its SHA-256 differs)"
        return None

    def delete(self, experiment: str | None, stage: str, trait: str | None) -> bool:
        """Take the result back: its files no longer count. The history stays. False when there was none."""
        return self.store.delete(keys.manifest(experiment, stage, trait))

    def keys(self, experiment: str | Literal["*"] | None = "*") -> list[str]:
        """Storage keys of the current manifests: of one experiment, of what is shared (None), or of all."""
        if experiment == "*":
            tops = [name for name in self.store.children() if name == keys.SHARED or not name.startswith("_")]
        else:
            tops = [keys.scope(experiment)]
        return [key for top in tops for key in self.store.list(f"{top}/manifests") if key.endswith(".json")]

    def list(self, experiment: str | Literal["*"] | None = "*") -> list[Manifest]:
        """All current manifests, by storage key. ArtifactError for a broken one."""
        found = (self.read_key(key) for key in self.keys(experiment))
        return [manifest for manifest in found if manifest is not None]


def history_key(manifest: Manifest) -> str:
    """Where the permanent copy of `manifest` lies; the same result committed twice by one run lies there
    once.
    """
    folder = keys.history(manifest.experiment, manifest.stage, manifest.trait)
    return f"{folder}/{manifest.fingerprint}-{run_mark(manifest.run_id)}.json"


def run_mark(run_id: str) -> str:
    """A run id, which may hold any characters, as 12 hex characters for file names."""
    return hashlib.sha256(run_id.encode("utf-8", "surrogatepass")).hexdigest()[:12]
