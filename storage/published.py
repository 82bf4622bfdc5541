"""The snapshot of the index that one machine puts into the store for all others.

Belongs here: its two files, in which order they are written, when they count. Does not: making a snapshot, or an
index from it (`index.py`).

The record is written after the snapshot, and a snapshot counts only if its record describes it: so the pair holds
on object stores too. What a snapshot lacks, its readers take from the store's other files; it only saves time.
"""

from __future__ import annotations

import logging
import random
import time
from datetime import UTC, datetime

from storage.artifacts import ArtifactStore, FileRecord
from storage.errors import ArtifactError

# a folder that no experiment can have, as its name begins with "_"
SNAPSHOT = "_index/lineage.duckdb"
RECORD = "_index/lineage.json"
_LOOKS = 3

log = logging.getLogger("storage")


def put(store: ArtifactStore, data: bytes, schema: str) -> FileRecord:
    """Exchange the snapshot for `data`, a whole DuckDB file with this schema mark."""
    written = store.write_bytes(SNAPSHOT, data)
    store.write_json(
        RECORD,
        {
            "sha256": written.sha256,
            "bytes": written.bytes,
            "schema": schema,
            "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        },
    )
    return written


def get(store: ArtifactStore, schema: str) -> bytes | None:
    """The snapshot; None where there is none, none with this schema mark, or (with a warning) none that is whole."""
    for look in range(_LOOKS):
        if not store.exists(RECORD):
            return None
        try:
            record = store.read_json(RECORD)
            if record["schema"] != schema:
                return None
            return store.read_bytes(SNAPSHOT, FileRecord(record["sha256"], record["bytes"]))
        except (ArtifactError, KeyError, TypeError) as error:
            if look == _LOOKS - 1:
                log.warning("the snapshot %s is left aside: %s", store.describe(SNAPSHOT), error)
                return None
            # exchanged between the two reads: the next look sees the new pair
            time.sleep(random.uniform(0.1, 0.5))
    return None


def remove(store: ArtifactStore) -> None:
    """Take the snapshot away, its record first."""
    for key in (RECORD, SNAPSHOT):
        store.delete(key)
