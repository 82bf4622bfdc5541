"""Metric rows as Parquet: the truth over which the DuckDB index is built.

Belongs here: turning rows into one small file per (experiment, stage, trait, fingerprint, run),
atomically, and offering it to the index. Does not: SQL (`index.py`), what a row means.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from storage import keys
from storage.artifacts import ArtifactStore, FileRecord, to_json
from storage.errors import UserError
from storage.manifest import run_mark
from storage.text import well_formed, well_formed_tree

if TYPE_CHECKING:
    import pyarrow as pa

    from storage.index import Indexed, LineageIndex

_COLUMN = re.compile(r"[a-z_][a-z0-9_]{0,62}")
# Written into every row by `write`; a stage must not bring its own.
COMMON = ("experiment", "stage", "trait", "run_id", "fingerprint", "created_at")


class MetricsWriter:
    """Writes metric rows; they are safe once `write` returns, whatever became of the index."""

    def __init__(self, store: ArtifactStore, index: LineageIndex) -> None:
        self.store = store
        self.index = index

    def write(
        self,
        experiment: str | None,
        stage: str,
        trait: str | None,
        rows: Sequence[Mapping[str, Any]],
        run_id: str,
        fingerprint: str,
    ) -> Indexed:
        """Keep `rows` as Parquet and offer them to the index; see `keep`."""
        self.keep(experiment, stage, trait, rows, run_id, fingerprint)
        return self.index.take_in()

    def keep(
        self,
        experiment: str | None,
        stage: str,
        trait: str | None,
        rows: Sequence[Mapping[str, Any]],
        run_id: str,
        fingerprint: str,
        created_at: datetime | None = None,
    ) -> tuple[str, FileRecord]:
        """Keep `rows` as Parquet and leave a note for the index; gives the storage key and what was written.

        Values are None, bool, int, float, str; lists and dictionaries are kept as JSON text. A row's
        `table` says which table of the index it belongs to (default `metrics`); `schema/tables.sql` has
        their columns, and what has no column there lands in `extra`. UserError for NaN and bad column
        names.
        """
        key = metrics_key(experiment, stage, trait, fingerprint, run_id)
        common = {
            "experiment": experiment,
            "stage": keys.check_stage(stage),
            "trait": trait,
            "run_id": run_id,
            "fingerprint": fingerprint,
            "created_at": created_at or datetime.now(UTC),
        }
        data = encode_rows(rows, common)
        self.index.announce([key])
        return key, self.store.write_bytes(key, data)


def metrics_key(experiment: str | None, stage: str, trait: str | None, fingerprint: str, run_id: str) -> str:
    """One file per fingerprint and run: a repeated commit replaces its file, another run adds one."""
    return f"{keys.metrics(experiment, stage, trait)}/{fingerprint}-{run_mark(run_id)}.parquet"


def encode_rows(rows: Sequence[Mapping[str, Any]], common: Mapping[str, Any]) -> bytes:
    """The rows as the bytes of a Parquet file, `common` in front of each.

    A file without rows has the common columns only. Half a surrogate pair becomes U+FFFD: Parquet is UTF-8.
    Numbers of a column become int64, or float64 as soon as one is a float; a column that mixes other types
    becomes JSON text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names: dict[str, None] = {}
    for number, row in enumerate(rows):
        for name in row:
            if not isinstance(name, str) or not _COLUMN.fullmatch(name) or name in COMMON:
                raise UserError(
                    f"{name!r} cannot be the name of a metric column",
                    where=f"metric row {number}",
                    remedy=f"Use lower-case letters, digits and _; {', '.join(COMMON)} are filled in.",
                )
            names.setdefault(name)
    columns: dict[str, pa.Array] = {}
    for name, value in common.items():
        kind = pa.timestamp("us", tz="UTC") if isinstance(value, datetime) else pa.string()
        plain = well_formed(value) if isinstance(value, str) else value
        columns[name] = pa.array([plain] * len(rows), type=kind)
    for name in names:
        values = [_plain(row.get(name), f"metric row {i}, column {name}") for i, row in enumerate(rows)]
        columns[name] = _column(values)
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{value} is no metric", where=where, remedy="Give None where there is no number.")
    return well_formed_tree(to_json(value, where=where))


def _column(values: list[Any]) -> pa.Array:
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if not kinds or kinds == {str}:
        return pa.array(values, type=pa.string())
    if kinds == {bool}:
        return pa.array(values, type=pa.bool_())
    if kinds == {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return pa.array(values, type=pa.int64())
    if kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], type=pa.float64())
    texts = [
        value
        if value is None or isinstance(value, str)
        else json.dumps(value, sort_keys=True, ensure_ascii=False)
        for value in values
    ]
    return pa.array(texts, type=pa.string())
