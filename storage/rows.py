"""Rows that outlive a killed process: content-addressed JSON rows, and tensors of a stage in progress.

Belongs here: append-only segment files, written whole and checked by hash. Does not: what a key is made
of, or when a stage is finished (`manifest.py`).

Each `put_many` is one new file whose name holds the hash of its content, so that writers never touch one
another's files and a torn or altered file is recognised, left out with a warning, and costs only its own
rows.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from storage.artifacts import ArtifactStore, encode_json
from storage.errors import ArtifactError
from storage.tensors import pack, unpack

COMPACT_ABOVE = 64
# How long a missing row is believed to be missing before the folder is looked at again for other
# processes' files.
RELIST_SECONDS = 1.0


class DamagedSegment(UserWarning):
    """A segment file is torn or altered; its rows will be computed again."""


def _segment_name(data: bytes, suffix: str) -> str:
    digest = hashlib.sha256(data).hexdigest()[:32]
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}-{digest}.{suffix}"


def _intact(name: str, data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest()[:32] == name.rsplit("-", 1)[-1].split(".")[0]


class _Segments:
    """The segment files of one folder: which were read, which are damaged."""

    def __init__(self, store: ArtifactStore, prefix: str, suffix: str) -> None:
        self.store = store
        self.prefix = store.check_key(prefix)
        self.suffix = suffix
        self.read: set[str] = set()
        self._damaged: dict[str, int] = {}

    def names(self) -> list[str]:
        return [name for name in self.store.children(self.prefix) if name.endswith(f".{self.suffix}")]

    def new(self) -> list[tuple[str, bytes]]:
        """(name, content) of intact segments not read before, oldest first.

        A segment that vanishes under way was compacted: its rows lie in a newer one, so look again. What is
        listed every time and never there (a folder of that name) is left out like a torn one.
        """
        absent: set[str] = set()
        while True:
            found: list[tuple[str, bytes]] = []
            vanished = False
            for name in self.names():
                if name in self.read:
                    continue
                try:
                    data = self.store.read_bytes(f"{self.prefix}/{name}")
                except ArtifactError:
                    if name not in absent:
                        absent.add(name)
                        vanished = True
                        break
                    data = b""
                if _intact(name, data):
                    found.append((name, data))
                elif self._damaged.get(name) != len(data):
                    # On a store without atomic writes it may be unfinished: it is read again when it has
                    # grown.
                    self._damaged[name] = len(data)
                    warnings.warn(
                        f"{self.store.describe(f'{self.prefix}/{name}')} is torn or altered and was left "
                        "out; its rows will be computed again",
                        DamagedSegment,
                        stacklevel=4,
                    )
            if not vanished:
                self.read.update(name for name, _ in found)
                return found

    def write(self, data: bytes) -> str:
        name = _segment_name(data, self.suffix)
        self.store.write_bytes(f"{self.prefix}/{name}", data)
        self.read.add(name)
        return name


class RowCache:
    """JSON rows by content key, shared by threads and processes.

    A key must hold everything that decides its row; where two writers put the same key, either row may stay.
    """

    def __init__(self, store: ArtifactStore, prefix: str) -> None:
        self._segments = _Segments(store, prefix, "jsonl")
        self._rows: dict[str, dict[str, Any]] = {}
        self._lock = threading.RLock()
        self._looked: float | None = None

    def get(self, key: str) -> dict[str, Any] | None:
        """The row, or None. The caller owns the copy it gets."""
        with self._lock:
            if key not in self._rows:
                self._look()
            row = self._rows.get(key)
            return None if row is None else json.loads(json.dumps(row))

    def __contains__(self, key: object) -> bool:
        with self._lock:
            if key not in self._rows:
                self._look()
            return key in self._rows

    def __len__(self) -> int:
        with self._lock:
            self._look()
            return len(self._rows)

    def keys(self) -> list[str]:
        with self._lock:
            self._look()
            return sorted(self._rows)

    def put_many(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep all rows: when this returns they survive a kill. Rows that are already there in the same
        form cost nothing.

        UserError for NaN and types that JSON does not have, naming the row.
        """
        with self._lock:
            self._look()
            lines = []
            fresh: dict[str, dict[str, Any]] = {}
            for key, row in rows.items():
                line = encode_json({"key": key, "row": dict(row)}, indent=None)
                plain = json.loads(line)["row"]
                if self._rows.get(key) != plain:
                    lines.append(line)
                    fresh[key] = plain
            if not fresh:
                return
            self._segments.write(b"".join(lines))
            self._rows.update(fresh)
            if len(self._segments.read) > COMPACT_ABOVE:
                self.compact()

    def refresh(self) -> None:
        """Take in what other processes have written since."""
        with self._lock:
            self._look(force=True)

    def _look(self, force: bool = False) -> None:
        now = time.monotonic()
        if not force and self._looked is not None and now - self._looked < RELIST_SECONDS:
            return
        for _, data in self._segments.new():
            for line in data.splitlines():
                entry = json.loads(line)
                self._rows[entry["key"]] = entry["row"]
        self._looked = time.monotonic()

    def compact(self) -> None:
        """Write all rows into one segment, then remove the segments they came from.

        Only segments that were read are removed, so rows that another process adds meanwhile stay; a kill
        between the two steps leaves rows twice, never not at all.
        """
        with self._lock:
            self._look(force=True)
            present = set(self._segments.names())
            merged = [name for name in self._segments.read if name in present]
            self._segments.read.intersection_update(present)
            if len(merged) < 2:
                return
            data = b"".join(
                encode_json({"key": key, "row": row}, indent=None) for key, row in sorted(self._rows.items())
            )
            self._segments.write(data)
            for name in merged:
                self._segments.store.delete(f"{self._segments.prefix}/{name}")
                self._segments.read.discard(name)


class TensorJournal:
    """Arrays by row key, for a stage in progress: what was put survives a kill, `clear` ends it."""

    def __init__(self, store: ArtifactStore, prefix: str) -> None:
        self._segments = _Segments(store, prefix, "safetensors")
        self._lock = threading.RLock()

    def put_many(self, rows: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Keep all rows in one new segment. UserError for types that numpy files do not have (bfloat16)."""
        if not rows:
            return
        tensors: dict[str, np.ndarray] = {}
        names: list[dict[str, Any]] = []
        for i, (key, row) in enumerate(rows.items()):
            names.append({"key": key, "names": list(row)})
            tensors.update({f"{i}/{j}": tensor for j, tensor in enumerate(row.values())})
        data = pack(tensors, {"rows": names})
        with self._lock:
            self._segments.write(data)

    def load(self) -> dict[str, dict[str, np.ndarray]]:
        """All rows; where a key was put twice, the later one."""
        rows: dict[str, dict[str, np.ndarray]] = {}
        with self._lock:
            self._segments.read.clear()
            for name, data in self._segments.new():
                tensors, metadata = unpack(data, where=name)
                for i, entry in enumerate(metadata["rows"]):
                    rows[entry["key"]] = {name: tensors[f"{i}/{j}"] for j, name in enumerate(entry["names"])}
        return rows

    def clear(self) -> None:
        """Remove everything."""
        with self._lock:
            self._segments.store.delete_tree(self._segments.prefix)
            self._segments.read.clear()
