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
from datetime import datetime
from typing import Any, Literal

from storage import keys
from storage.artifacts import ArtifactStore, FileRecord, to_json
from storage.errors import ArtifactError, UserError
from storage.text import well_formed

SCHEMA_VERSION = 1
CHECKSUM = "checksum"


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
    `libraries`: name → version; `rows`: the same as `files` for its metric rows, filled in by the commit.
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
    rows: dict[str, FileRecord] = field(default_factory=dict)
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
        content = {name: value for name, value in record.items() if name != CHECKSUM}
        if CHECKSUM in record and record[CHECKSUM] != _checksum(content):
            raise ArtifactError(
                "the manifest is damaged (it was altered after it was written)", where=where, remedy=remedy
            )
        try:
            known = {f.name: record[f.name] for f in fields(cls) if f.name in record}
            known["files"] = _file_records(record["files"])
            known["rows"] = _file_records(record.get("rows", {}))
            manifest = cls(**known)
            manifest._check()
        except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
            raise ArtifactError(
                f"the manifest is damaged ({type(error).__name__}: {error})", where=where, remedy=remedy
            ) from error
        return manifest

    def _check(self) -> None:
        """ValueError or UserError where a field is not what it must be; whoever reads it may rely on that."""
        for name in ("stage", "fingerprint", "code_version", "run_id", "created_at"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}")
        if self.status not in ("done", "skipped"):
            raise ValueError(f"status is {self.status!r}")
        datetime.fromisoformat(self.created_at)
        ArtifactStore.check_key(self.key)
        ArtifactStore.check_key(history_key(self))
        for name in ("options", "summary"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} is no object")
        for name in ("inputs", "libraries"):
            for key, value in getattr(self, name).items():
                if not isinstance(value, str):
                    raise ValueError(f"{name}: {key!r} is {value!r}")
        for name, table in self.tables.items():
            if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
                raise ValueError(f"the table {name!r} is no list of objects")

    def sealed(self, **changes: Any) -> dict[str, Any]:
        """What is written: the record with `changes`, and a checksum by which a flipped byte is noticed."""
        record = to_json({**self.record(), **changes}, where=self.key)
        return {**record, CHECKSUM: _checksum(record)}


def _checksum(record: Any) -> str:
    # ASCII: a text reads back from its escapes as the same text, but not always as the same escapes
    text = json.dumps(record, sort_keys=True, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def _file_records(record: Any) -> dict[str, FileRecord]:
    return {
        ArtifactStore.check_key(key): FileRecord(str(entry["sha256"]), int(entry["bytes"]))
        for key, entry in record.items()
    }


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
        return parse(record, key, self.store.describe(key))

    def commit(self, manifest: Manifest) -> None:
        """Make the result count: the very last write. All files it names must have been written before.

        ArtifactError where a file is not there, or is not the one that was written any more: then another run
        wrote the same result at the same time, and its manifest will count. A copy without tables goes to the
        history first, so that history never lacks what was current once.
        """
        keys.check_stage(manifest.stage)
        for key, record in (manifest.files | manifest.rows).items():
            problem = self._written(key, record)
            if problem is not None:
                raise ArtifactError(
                    f"the manifest names {key}, but {problem}",
                    where=self.store.describe(manifest.key),
                    remedy="If another run writes the same result, let it finish, then run again.",
                )
        self.store.write_json(history_key(manifest), manifest.sealed(tables={}))
        self.store.write_json(manifest.key, manifest.sealed())
        if self._on_commit is not None:
            self._on_commit(manifest)

    def _written(self, key: str, record: FileRecord) -> str | None:
        """Like `_verify_file`, without fetching what was just sent over a network."""
        if self.store.local_path(key) is not None:
            return self._verify_file(key, record)
        try:
            size = self.store.size(key)
        except ArtifactError as error:
            return error.what
        return None if size == record.bytes else f"the file has {size} bytes instead of {record.bytes}"

    def verify(self, manifest: Manifest) -> list[str]:
        """What is wrong with the files of `manifest`, one sentence each; empty when all are there and
        unaltered.

        On a local disk a file is hashed once per process as long as its size, time and inode stay the same.
        """
        problems = []
        for key, record in sorted((manifest.files | manifest.rows).items()):
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


def parse(record: Any, key: str, where: str) -> Manifest:
    """The manifest in the parsed file at `key`, current or history; ArtifactError where it belongs elsewhere.

    A copied experiment folder keeps the names of the one it was copied from: its manifests name files that are
    not its own.
    """
    manifest = Manifest.from_record(record, where)
    if key not in (manifest.key, history_key(manifest)):
        raise ArtifactError(
            f"the manifest is damaged (it belongs to {manifest.key})",
            where=where,
            remedy="Run its stage again; a copied or renamed folder builds its own results.",
        )
    return manifest


def history_key(manifest: Manifest) -> str:
    """Where the permanent copy of `manifest` lies; the same result committed twice by one run lies there
    once.
    """
    folder = keys.history(manifest.experiment, manifest.stage, manifest.trait)
    return f"{folder}/{manifest.fingerprint}-{run_mark(manifest.run_id)}.json"


def run_mark(run_id: str) -> str:
    """A run id, which may hold any characters, as 12 hex characters for file names."""
    # as Parquet holds it, so that the mark can be told from the rows
    return hashlib.sha256(well_formed(run_id).encode("utf-8")).hexdigest()[:12]
