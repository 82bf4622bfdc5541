"""The DuckDB index over manifests and metric rows: fast questions, nothing that the files do not hold.

Belongs here: the database file, short connections, taking files in, rebuilding, snapshots. Does not: the
tree of what a number was made from (`lineage.py`), writing Parquet (`metrics.py`).

DuckDB locks its file for one process at a time, and one open reader refuses every writer. So a writer
announces its files in a folder of notes first, tries for a while to get the lock, and leaves the notes to
the next writer when it does not get it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from storage import keys
from storage.artifacts import ArtifactStore
from storage.errors import ArtifactError, UserError
from storage.manifest import Manifest, Manifests, history_key
from storage.text import well_formed, well_formed_tree

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

log = logging.getLogger("storage")

Indexed = Literal["indexed", "index_behind"]

# Tables that metric rows may name in their column `table`.
ROW_TABLES = (
    "scenarios",
    "responses",
    "judge_scores",
    "activations",
    "vectors",
    "evaluations",
    "steering_runs",
    "generations",
    "metrics",
)
_CHUNK = 500
# How long a note whose file does not exist (its writer was killed in between, or is still writing) is kept.
_NOTE_HOURS = 1.0

# duckdb refuses to open one file twice in one process in different modes, so threads take turns
_path_locks: dict[str, threading.RLock] = {}
_path_locks_guard = threading.Lock()


class IndexBusy(Exception):
    """Another process holds the database file."""


@dataclass(frozen=True)
class QueryResult:
    """Column names and rows of a query, plain Python values."""

    columns: list[str]
    rows: list[tuple[Any, ...]]

    def records(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def schema(part: str) -> str:
    """The text of `schema/{part}.sql`."""
    return resources.files("storage").joinpath("schema", f"{part}.sql").read_text(encoding="utf-8")


@cache
def schema_mark() -> str:
    """Changes with every change of the schema: a database with another mark is filled again."""
    return hashlib.sha256((schema("tables") + schema("views")).encode()).hexdigest()[:16]


class LineageIndex:
    """`path`: the database file, on a local disk. `patience`: seconds to wait for the lock before being
    behind.
    """

    def __init__(self, store: ArtifactStore, path: str | os.PathLike[str], *, patience: float = 10.0) -> None:
        self.store = store
        self.path = Path(os.path.abspath(path))
        self.patience = patience
        self.notes = self.path.with_name(self.path.name + ".pending")
        self._behind = False
        self._unannounced: list[str] = []
        with _path_locks_guard:
            self._lock = _path_locks.setdefault(str(self.path), threading.RLock())

    # Connections

    @contextmanager
    def connect(
        self, *, read_only: bool = False, patience: float | None = None
    ) -> Iterator[duckdb.DuckDBPyConnection]:
        """A short connection. Retries with full jitter while another process holds the file; then
        IndexBusy.
        """
        import duckdb

        wait = self.patience if patience is None else patience
        deadline = time.monotonic() + wait
        with self._lock:
            if not read_only:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            attempt = 0
            while True:
                try:
                    connection = duckdb.connect(str(self.path), read_only=read_only)
                    break
                except (duckdb.IOException, duckdb.ConnectionException) as error:
                    text = str(error)
                    if "lock" not in text and "different configuration" not in text:
                        raise
                    if time.monotonic() >= deadline:
                        raise IndexBusy(text) from error
                    pause = random.uniform(0, min(1.0, 0.02 * 2**attempt))
                    time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                    attempt = min(attempt + 1, 10)
            try:
                yield connection
            finally:
                connection.close()

    @contextmanager
    def writing(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """One transaction on an up-to-date schema. IndexBusy when another process holds the file."""
        with self.connect() as connection:
            self._prepare(connection)
            connection.execute("BEGIN")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(self._database_error()):
                    connection.execute("ROLLBACK")
                raise

    # Taking files in

    def announce(self, sources: Sequence[str]) -> Path | None:
        """Leave a note that these files are (about to be) there; whoever writes next takes them in.

        Where no note can be left (a full disk), this process keeps it in mind, and None is returned.
        """
        note = self.notes / f"{time.time_ns():020d}-{uuid.uuid4().hex}.json"
        temporary = note.with_suffix(".tmp")
        try:
            self.notes.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(list(sources)), encoding="utf-8")
            os.replace(temporary, note)
        except OSError as error:
            log.warning("no note can be left for the index in %s: %s", self.notes, error)
            with suppress(OSError):
                temporary.unlink()
            self._unannounced.extend(sources)
            return None
        return note

    def take_in(self) -> Indexed:
        """Take in everything that was announced. Never raises for the database's sake: "index_behind"
        says it all.
        """
        try:
            # who was refused once does not let every further trait wait as long
            with self.connect(
                patience=min(self.patience, 0.5) if self._behind else self.patience
            ) as connection:
                self._prepare(connection)
                self._take_in_notes(connection)
            self._behind = False
            return "indexed"
        except IndexBusy:
            why, remedy = "another process holds it", "the next writer catches up"
        except (self._database_error(), OSError) as error:
            why = str(error).splitlines()[0]
            full = "no space left" in why.lower()
            remedy = "free some space" if full else "rebuild it with `traits rebuild-index`"
        if not self._behind:
            log.warning("the index %s is behind: %s; nothing is lost, %s", self.path, why, remedy)
        self._behind = True
        return "index_behind"

    @staticmethod
    def _database_error() -> type[Exception]:
        import duckdb

        return duckdb.Error

    def announce_manifest(self, manifest: Manifest) -> None:
        """Hook of `Manifests`: whoever takes files in next takes this manifest in, too."""
        self.announce([history_key(manifest)])

    def pending(self) -> int:
        """How many notes wait to be taken in."""
        return len(self._note_paths())

    def _note_paths(self) -> list[Path]:
        try:
            return sorted(path for path in self.notes.iterdir() if path.suffix == ".json")
        except FileNotFoundError:
            return []

    def _take_in_notes(self, connection: duckdb.DuckDBPyConnection) -> None:
        done: list[Path] = []
        sources: list[str] = []
        for note in self._note_paths():
            try:
                named = json.loads(note.read_text(encoding="utf-8"))
                age = time.time() - note.stat().st_mtime
            except FileNotFoundError:
                continue
            except ValueError:  # a torn note, after a power cut
                done.append(note)
                continue
            present = [source for source in named if self.store.exists(source)]
            sources.extend(present)
            if len(present) == len(named) or age > _NOTE_HOURS * 3600:
                done.append(note)
        in_mind = [source for source in self._unannounced if self.store.exists(source)]
        self._ingest(connection, sources + in_mind)
        self._unannounced.clear()
        for note in done:
            with suppress(FileNotFoundError):
                note.unlink()

    def _prepare(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Create what is missing; a database of another schema is emptied and filled again."""
        tables = {row[0] for row in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
        if "about" in tables:
            marks = connection.execute("SELECT * FROM about").fetchall()
            if marks == [(schema_mark(),)]:
                return
            self._drop_all(connection)
            self._create(connection)
            self._ingest(connection, self.sources_on_disk())
            return
        self._create(connection)

    @staticmethod
    def _drop_all(connection: duckdb.DuckDBPyConnection) -> None:
        views = connection.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
        tables = connection.execute("SELECT table_name FROM duckdb_tables() WHERE NOT internal").fetchall()
        for kind, names in (("VIEW", views), ("TABLE", tables)):
            for (name,) in names:
                quoted = str(name).replace('"', '""')
                connection.execute(f'DROP {kind} IF EXISTS "{quoted}" CASCADE')

    @staticmethod
    def _create(connection: duckdb.DuckDBPyConnection) -> None:
        connection.execute("BEGIN")
        connection.execute(schema("tables"))
        connection.execute(schema("views"))
        connection.execute("DELETE FROM about")
        connection.execute("INSERT INTO about VALUES (?)", [schema_mark()])
        connection.execute("COMMIT")

    def sources_on_disk(self) -> list[str]:
        """Storage keys of all files that the index is made of."""
        found: list[str] = []
        for top in self.store.children():
            if top != keys.SHARED and top.startswith("_"):
                continue
            found += [key for key in self.store.list(f"{top}/history") if key.endswith(".json")]
            found += [key for key in self.store.list(f"{top}/metrics") if key.endswith(".parquet")]
        return found

    def _ingest(self, connection: duckdb.DuckDBPyConnection, sources: Sequence[str]) -> None:
        """Put the files' rows in place of whatever they had in the index before; one transaction per
        chunk.
        """
        unique = list(dict.fromkeys(sources))
        for start in range(0, len(unique), _CHUNK):
            self._ingest_chunk(connection, unique[start : start + _CHUNK])

    def _ingest_chunk(self, connection: duckdb.DuckDBPyConnection, sources: list[str]) -> None:
        import pyarrow as pa

        loaded = dict(zip(sources, self._load(sources), strict=True))
        schemas = {
            name: connection.sql(f"SELECT * FROM {name} LIMIT 0").to_arrow_table().schema
            for name in ("sources", "manifests", "inputs", "current_pointers", *ROW_TABLES)
        }
        manifests = [content for content in loaded.values() if isinstance(content, tuple)]
        parts: dict[str, list[pa.Table]] = {name: [] for name in ROW_TABLES}
        for source, content in loaded.items():
            if isinstance(content, pa.Table):
                for name, rows in _by_table(content):
                    parts[name].append(_fit(rows, schemas[name], source))
        now = datetime.now(UTC).replace(tzinfo=None)
        done = [
            {"source": source, "indexed_at": now} for source, content in loaded.items() if content is not None
        ]
        touched = {(m.experiment, m.stage, m.trait) for m, _ in manifests}
        pointers = self._pointers(touched)
        connection.execute("BEGIN")
        try:
            self._remove(connection, sources, ("manifests", "inputs", *ROW_TABLES))
            self._forget_pointers(connection, touched)
            _insert(connection, "sources", schemas, done)
            _insert(connection, "manifests", schemas, [_manifest_row(m, s) for m, s in manifests])
            _insert(connection, "inputs", schemas, [row for m, s in manifests for row in _input_rows(m, s)])
            _insert(connection, "current_pointers", schemas, pointers)
            for name in ROW_TABLES:
                _insert_tables(connection, name, parts[name])
            connection.execute("COMMIT")
        except BaseException:
            with suppress(self._database_error()):  # a failed COMMIT has ended the transaction itself
                connection.execute("ROLLBACK")
            raise

    def _remove(
        self, connection: duckdb.DuckDBPyConnection, sources: list[str], tables: Iterable[str]
    ) -> None:
        known = connection.execute(
            "SELECT source FROM sources WHERE source IN (SELECT unnest(?::VARCHAR[]))", [sources]
        ).fetchall()
        if not known:
            return
        again = [row[0] for row in known]
        for table in (*tables, "sources"):
            connection.execute(f"DELETE FROM {table} WHERE source IN (SELECT unnest(?::VARCHAR[]))", [again])

    def _forget_pointers(
        self, connection: duckdb.DuckDBPyConnection, touched: set[tuple[str | None, str, str | None]]
    ) -> None:
        import pyarrow as pa

        if not touched:
            return
        names = ("experiment", "stage", "trait")
        columns = {
            name: pa.array([place[i] for place in touched], pa.string()) for i, name in enumerate(names)
        }
        connection.register("touched", pa.table(columns))
        try:
            connection.execute(
                "DELETE FROM current_pointers c USING touched t WHERE c.stage = t.stage "
                "AND c.experiment IS NOT DISTINCT FROM t.experiment AND c.trait IS NOT DISTINCT FROM t.trait"
            )
        finally:
            connection.unregister("touched")

    def _pointers(self, touched: Iterable[tuple[str | None, str, str | None]]) -> list[dict[str, Any]]:
        """What counts now in these places, as the manifests on disk say."""
        manifests = Manifests(self.store)

        def read(place: tuple[str | None, str, str | None]) -> Manifest | None:
            try:
                return manifests.read(*place)
            except ArtifactError as error:
                log.warning("left out of the index: %s", error)
                return None

        found = self._in_parallel(read, list(touched))
        return [_head(manifest, history_key(manifest)) for manifest in found if manifest is not None]

    def _in_parallel(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Files on a local disk are read faster than threads take turns; over a network waiting is shared."""
        if len(items) < 8 or self.store.local_path("x") is not None:
            return [work(item) for item in items]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(work, items))

    def _load(self, sources: Sequence[str]) -> list[Any]:
        """Manifests as (manifest, source), Parquet as Arrow tables, None for what cannot be read (with a
        warning).
        """
        return self._in_parallel(self._load_one, sources)

    def _load_one(self, source: str) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            data = self.store.read_bytes(source)
            if source.endswith(".json"):
                where = self.store.describe(source)
                try:
                    return Manifest.from_record(json.loads(data), where), source
                except ValueError as error:
                    raise ArtifactError(f"the manifest is not valid JSON ({error})", where=where) from error
            return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        except (ArtifactError, pa.ArrowException) as error:
            log.warning("left out of the index: %s: %s", self.store.describe(source), error)
            return None

    # Whole database

    def catch_up(self) -> int:
        """Take in every file on disk that the index does not have yet, announced or not; gives their
        number.
        """
        with self.connect() as connection:
            self._prepare(connection)
            self._take_in_notes(connection)
            known = {row[0] for row in connection.execute("SELECT source FROM sources").fetchall()}
            missing = [source for source in self.sources_on_disk() if source not in known]
            self._ingest(connection, missing)
        return len(missing)

    def rebuild(self) -> int:
        """Build the database from the files alone, then put it in place of the old one; gives the number
        of files.

        UserError when another process holds the old one all the time.
        """
        import duckdb

        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.tmp")
        sources = self.sources_on_disk()
        try:
            connection = duckdb.connect(str(fresh))
            try:
                self._create(connection)
                self._ingest(connection, sources)
            finally:
                connection.close()
            with self._lock:
                self._wait_for_others()
                with suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + ".wal").unlink()
                os.replace(fresh, self.path)
        finally:
            for leftover in (fresh, fresh.with_name(fresh.name + ".wal")):
                with suppress(FileNotFoundError):
                    leftover.unlink()
        # what was written meanwhile, also by a writer that still had the old file open
        return len(sources) + self.catch_up()

    def _wait_for_others(self) -> None:
        import duckdb

        if not self.path.exists():
            return
        try:
            with self.connect():
                return
        except IndexBusy as error:
            raise UserError(
                "another program has the index open",
                where=str(self.path),
                remedy="Close it (a notebook, a SQL shell) and run again.",
            ) from error
        except duckdb.Error as error:
            log.warning("the old index %s cannot be opened and is replaced: %s", self.path, error)

    def snapshot(self, target: str | os.PathLike[str]) -> Path:
        """Copy the database to `target`; the copy can be held open for as long as one likes.

        UserError when a writer does not let go of the file in time.
        """
        target = Path(target)
        if not self.path.exists():
            self.catch_up()
        try:
            with self.connect(read_only=True, patience=max(self.patience, 30.0)):
                shutil.copyfile(self.path, target)
                wal = self.path.with_name(self.path.name + ".wal")
                if wal.exists():
                    shutil.copyfile(wal, target.with_name(target.name + ".wal"))
        except IndexBusy as error:
            raise UserError(
                "another program is writing to the index all the time",
                where=str(self.path),
                remedy="Try again.",
            ) from error
        return target

    def sql(self, query: str, parameters: Sequence[Any] = ()) -> QueryResult:
        """Run a query, read-only, on a snapshot that was brought up to date first. UserError for faulty SQL.

        The query sees the index and nothing else: no files, no network, no extensions.
        """
        import duckdb

        if not query.strip():
            raise UserError("the query is empty", where="SQL", remedy="Try `SHOW TABLES`.")
        try:
            with suppress(IndexBusy):
                self.catch_up()
        except duckdb.Error as error:
            raise UserError(
                f"the index cannot be opened ({str(error).splitlines()[0]})",
                where=str(self.path),
                remedy="Rebuild it with `traits rebuild-index`.",
            ) from error
        with tempfile.TemporaryDirectory(prefix="traits-sql-") as folder:
            copy = self.snapshot(Path(folder) / "index.duckdb")
            connection = duckdb.connect(
                str(copy),
                read_only=True,
                config={"enable_external_access": "false", "autoinstall_known_extensions": "false"},
            )
            try:
                connection.execute("SET lock_configuration = true")
                cursor = connection.execute(well_formed(query), well_formed_tree(list(parameters)))
                columns = [column[0] for column in cursor.description or []]
                return QueryResult(columns, cursor.fetchall())
            except duckdb.Error as error:
                raise UserError(
                    str(error), where="SQL", remedy="`SHOW TABLES` lists what can be asked."
                ) from error
            finally:
                connection.close()


def _naive(created_at: str) -> datetime:
    moment = datetime.fromisoformat(created_at)
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


def _head(manifest: Manifest, source: str) -> dict[str, Any]:
    return {
        "experiment": manifest.experiment,
        "stage": manifest.stage,
        "trait": manifest.trait,
        "run_id": manifest.run_id,
        "fingerprint": manifest.fingerprint,
        "created_at": _naive(manifest.created_at),
        "source": source,
    }


def _manifest_row(manifest: Manifest, source: str) -> dict[str, Any]:
    def text(value: Any) -> str:
        # DuckDB's JSON has no half surrogate pairs either, not even escaped
        return json.dumps(well_formed_tree(value), sort_keys=True, ensure_ascii=False)

    return {
        **_head(manifest, source),
        "status": manifest.status,
        "code_version": manifest.code_version,
        "options": text(manifest.options),
        "summary": text(manifest.summary),
        "libraries": text(manifest.libraries),
        "n_files": len(manifest.files),
        "n_bytes": sum(record.bytes for record in manifest.files.values()),
    }


def _input_rows(manifest: Manifest, source: str) -> list[dict[str, Any]]:
    head = _head(manifest, source)
    return [{**head, "input": name, "input_fingerprint": value} for name, value in manifest.inputs.items()]


def _insert(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    schemas: dict[str, pa.Schema],
    rows: list[dict[str, Any]],
) -> None:
    import pyarrow as pa

    if rows:
        _insert_tables(connection, name, [pa.Table.from_pylist(well_formed_tree(rows), schema=schemas[name])])


def _insert_tables(connection: duckdb.DuckDBPyConnection, name: str, parts: list[pa.Table]) -> None:
    import pyarrow as pa

    if not parts:
        return
    connection.register("incoming", pa.concat_tables(parts))
    try:
        connection.execute(f"INSERT INTO {name} BY NAME SELECT * FROM incoming")
    finally:
        connection.unregister("incoming")


def _by_table(rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """The rows of one Parquet file by the table they belong to."""
    import pyarrow.compute as pc

    if rows.num_rows == 0:
        return
    if "table" not in rows.column_names:
        yield "metrics", rows
        return
    wanted = pc.fill_null(rows["table"].combine_chunks(), "metrics")
    rows = rows.drop_columns(["table"])
    names = wanted.unique().to_pylist()
    if len(names) == 1:
        yield names[0] if names[0] in ROW_TABLES else "metrics", rows
        return
    for name in names:
        yield name if name in ROW_TABLES else "metrics", rows.filter(pc.equal(wanted, name))


def _fit(rows: pa.Table, target: pa.Schema, source: str) -> pa.Table:
    """The rows in the columns of their table; what has no column there, or another type, goes to `extra`."""
    import pyarrow as pa

    n = rows.num_rows
    fitted: dict[str, Any] = {"source": pa.array([source] * n, type=pa.string())}
    extra: dict[str, list[Any]] = {}
    for name in rows.column_names:
        column = rows[name]
        if column.null_count == n:
            continue
        if name in target.names and name not in ("source", "extra"):
            wanted = target.field(name).type
            if column.type == wanted:
                fitted[name] = column
                continue
            with suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
                fitted[name] = column.cast(wanted)
                continue
        extra[name] = column.to_pylist()
    if extra:
        texts = []
        for values in zip(*extra.values(), strict=True):
            given = {key: value for key, value in zip(extra, values, strict=True) if value is not None}
            texts.append(json.dumps(given, sort_keys=True, ensure_ascii=False) if given else None)
        fitted["extra"] = pa.array(texts, type=pa.string())
    columns = [fitted[field.name] if field.name in fitted else pa.nulls(n, field.type) for field in target]
    return pa.table(columns, schema=target)
