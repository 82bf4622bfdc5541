"""The DuckDB index over manifests and metric rows: fast questions, nothing that the files do not hold.

Belongs here: the database file, short connections, taking files in, rebuilding, snapshots. Does not: the
tree of what a number was made from (`lineage.py`), writing Parquet (`metrics.py`).

DuckDB locks its file for one process at a time, and one open reader refuses every writer. So a writer
announces its files in a folder of notes first, tries for a while to get the lock, and leaves the notes to
the next writer when it does not get it.

Many machines share one store: each may have an index of its own, which reads the store's files and so needs
no other machine; runs there may leave it alone (`kept=False`); and one writer puts a snapshot into the store
(`publish`), with which a machine that has no index begins instead of reading every small file.
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

from storage import keys, published
from storage.artifacts import ArtifactStore
from storage.errors import ArtifactError, UserError
from storage.manifest import Manifest, Manifests, history_key, parse
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
    "work",
    "metrics",
)
_CHUNK = 500
# How DuckDB says that somebody else has the file: another process (Linux and macOS, Windows), this process.
_LOCKED = ("Could not set lock", "being used by another process", "different configuration")
# How long a note whose file does not exist (its writer was killed in between, or is still writing) is kept.
_NOTE_HOURS = 1.0

# duckdb refuses to open one file twice in one process in different modes, so threads take turns
_path_locks: dict[str, threading.RLock] = {}
_path_locks_guard = threading.Lock()


# experiment, stage, trait
Place = tuple[str | None, str, str | None]


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
    behind. `kept`: whether what this process commits goes into the index at once; where it does not, the
    index finds it in the store as soon as somebody asks.
    """

    def __init__(
        self,
        store: ArtifactStore,
        path: str | os.PathLike[str],
        *,
        patience: float = 10.0,
        kept: bool = True,
    ) -> None:
        self.store = store
        self.kept = kept
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
                    if not any(said in text for said in _LOCKED):
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
            with _transaction(connection):
                yield connection

    # Taking files in

    def announce(self, sources: Sequence[str]) -> Path | None:
        """Leave a note that these files are (about to be) there; whoever writes next takes them in.

        Where no note can be left (a full disk), this process keeps it in mind, and None is returned; also
        where the index is not kept.
        """
        if not self.kept:
            return None
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
        says it all. Does nothing where the index is not kept.
        """
        if not self.kept:
            return "indexed"
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
                if not isinstance(named, list):
                    raise TypeError("no list of keys")
                named = [ArtifactStore.check_key(key) for key in named]
                age = time.time() - note.stat().st_mtime
            except FileNotFoundError:
                continue
            except (ValueError, TypeError, UserError):  # torn by a power cut, or no note of ours
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
        with _transaction(connection):
            connection.execute(schema("tables"))
            connection.execute(schema("views"))
            connection.execute("DELETE FROM about")
            connection.execute("INSERT INTO about VALUES (?)", [schema_mark()])

    def _tops(self) -> list[str]:
        return [top for top in self.store.children() if top == keys.SHARED or not top.startswith("_")]

    def sources_on_disk(self) -> list[str]:
        """Storage keys of all files that the index is made of."""
        found: list[str] = []
        for top in self._tops():
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
        self._ingest_loaded(connection, dict(zip(sources, self._load(sources), strict=True)))

    def _ingest_loaded(self, connection: duckdb.DuckDBPyConnection, loaded: dict[str, Any]) -> None:
        """One transaction; where a file's content is refused, it alone is left out, with a warning."""
        import duckdb

        try:
            self._put(connection, loaded)
        except (duckdb.DataError, duckdb.IntegrityError, duckdb.InvalidInputException) as error:
            sources = list(loaded)
            if len(sources) == 1:
                why = str(error).splitlines()[0]
                log.warning("left out of the index: %s: %s", self.store.describe(sources[0]), why)
                return
            half = len(sources) // 2
            for part in (sources[:half], sources[half:]):
                self._ingest_loaded(connection, {source: loaded[source] for source in part})

    def _put(self, connection: duckdb.DuckDBPyConnection, loaded: dict[str, Any]) -> None:
        import pyarrow as pa

        sources = list(loaded)
        schemas = _schemas(
            connection, "sources", "seen", "manifests", "inputs", "current_pointers", *ROW_TABLES
        )
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
        pointers, seen = self._pointers(touched)
        with _transaction(connection):
            self._remove(connection, sources)
            self._point(connection, schemas, touched, pointers, seen)
            _insert(connection, "sources", schemas, done)
            _insert(connection, "manifests", schemas, [_manifest_row(m, s) for m, s in manifests])
            _insert(connection, "inputs", schemas, [row for m, s in manifests for row in _input_rows(m, s)])
            for name in ROW_TABLES:
                _insert_tables(connection, name, parts[name])

    @staticmethod
    def _remove(connection: duckdb.DuckDBPyConnection, sources: list[str]) -> None:
        known = connection.execute(
            "SELECT source FROM sources WHERE source IN (SELECT unnest(?::VARCHAR[]))", [sources]
        ).fetchall()
        if not known:
            return
        again = [row[0] for row in known]
        for table in ("manifests", "inputs", *ROW_TABLES, "sources"):
            connection.execute(f"DELETE FROM {table} WHERE source IN (SELECT unnest(?::VARCHAR[]))", [again])

    @staticmethod
    def _point(
        connection: duckdb.DuckDBPyConnection,
        schemas: dict[str, pa.Schema],
        touched: set[Place],
        pointers: list[dict[str, Any]],
        seen: list[dict[str, Any]],
    ) -> None:
        """Exchange what counts in these places, and which state of their manifests that is."""
        import pyarrow as pa

        if not touched:
            return
        names = ("experiment", "stage", "trait")
        columns = {
            name: pa.array([place[i] for place in touched], pa.string()) for i, name in enumerate(names)
        }
        with _registered(connection, "touched", pa.table(columns)):
            connection.execute(
                "DELETE FROM current_pointers c USING touched t WHERE c.stage = t.stage "
                "AND c.experiment IS NOT DISTINCT FROM t.experiment AND c.trait IS NOT DISTINCT FROM t.trait"
            )
        connection.execute(
            "DELETE FROM seen WHERE manifest IN (SELECT unnest(?::VARCHAR[]))",
            [[keys.manifest(*place) for place in touched]],
        )
        _insert(connection, "current_pointers", schemas, pointers)
        _insert(connection, "seen", schemas, seen)

    def _pointers(self, touched: Iterable[Place]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of `current_pointers` and `seen`: what counts now in these places, as the manifests on disk say."""
        manifests = Manifests(self.store)

        def read(place: Place) -> tuple[str, str | None, Manifest | None]:
            key = keys.manifest(*place)
            # before it is read: what is written in between is seen the next time
            mark = self.store.mark(key)
            try:
                return key, mark, manifests.read_key(key)
            except ArtifactError as error:
                log.warning("left out of the index: %s", error)
                return key, mark, None

        found = self._in_parallel(read, list(touched))
        pointers = [
            _head(manifest, history_key(manifest)) for _, _, manifest in found if manifest is not None
        ]
        return pointers, [{"manifest": key, "mark": mark} for key, mark, _ in found if mark is not None]

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
                    return parse(json.loads(data), source, where), source
                except ValueError as error:
                    raise ArtifactError(f"the manifest is not valid JSON ({error})", where=where) from error
            try:
                file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
                table = file.read(use_threads=False)
                table.validate(full=True)
            except (pa.ArrowException, OSError, ValueError) as error:
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ArtifactError(
                    f"the rows are damaged ({why})", where=self.store.describe(source)
                ) from error
            self._check_place(table, source)
            return table
        except ArtifactError as error:
            log.warning("left out of the index: %s", error)
            return None

    def _check_place(self, rows: pa.Table, source: str) -> None:
        """ArtifactError where the rows belong to another place: a copied folder must not count them twice."""
        from storage.metrics import COMMON, metrics_key

        absent = [name for name in COMMON if name not in rows.column_names]
        if absent:
            raise ArtifactError(f"the rows have no {absent[0]}", where=self.store.describe(source))
        if rows.num_rows == 0:
            return
        row = {name: rows[name][0].as_py() for name in COMMON}
        try:
            key = metrics_key(
                row["experiment"], row["stage"], row["trait"], row["fingerprint"], row["run_id"]
            )
        except (UserError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"the rows are damaged ({error})", where=self.store.describe(source)
            ) from error
        if key != source:
            raise ArtifactError(f"the rows belong to {key}", where=self.store.describe(source))

    # Whole database

    def catch_up(self) -> int:
        """Make the index what a rebuilt one would be; gives the number of files that it did not have yet.

        Files that were never announced (another machine wrote them, or a writer was killed) are taken in, rows of
        files that are gone go, and manifests that were exchanged or removed by other means count as they are now.
        A machine without an index begins with the snapshot that was published, where there is one.
        """
        self._begin_with_published()
        with self.connect() as connection:
            self._prepare(connection)
            self._take_in_notes(connection)
            known = {row[0] for row in connection.execute("SELECT source FROM sources").fetchall()}
            present = self.sources_on_disk()
            missing = [source for source in present if source not in known]
            self._ingest(connection, missing)
            self._drop_sources(connection, sorted(known.difference(present)))
            self._look_at_manifests(connection)
        return len(missing)

    def publish(self) -> tuple[str, int]:
        """Bring the index up to date and put a snapshot of it into the store, for every machine and every DuckDB;
        gives its URL and its bytes. UserError when another process does not let go of the index.

        One machine does this, now and then (`storage/published.py`).
        """
        import duckdb

        with suppress(IndexBusy):  # `snapshot` waits longer, and says so when it waits in vain
            self.catch_up()
        with tempfile.TemporaryDirectory(prefix="traits-index-") as folder:
            copy = self.snapshot(Path(folder) / "index.duckdb")
            connection = duckdb.connect(str(copy))
            try:
                # one file, without a log beside it
                connection.execute("CHECKPOINT")
            finally:
                connection.close()
            written = published.put(self.store, copy.read_bytes(), schema_mark())
        return self.store.describe(published.SNAPSHOT), written.bytes

    def _begin_with_published(self) -> None:
        """Put the published snapshot where this machine's index belongs, unless it has one. On a local disk the
        files themselves are as near.
        """
        if self.store.local_path("x") is not None or self.path.exists():
            return
        data = published.get(self.store, schema_mark())
        if data is None:
            return
        fresh = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.tmp")
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fresh.write_bytes(data)
                # another process may have made one meanwhile: that one has less, but may be open
                if not self.path.exists():
                    os.replace(fresh, self.path)
            finally:
                with suppress(FileNotFoundError):
                    fresh.unlink()

    def _drop_sources(self, connection: duckdb.DuckDBPyConnection, gone: list[str]) -> None:
        if gone:
            with _transaction(connection):
                self._remove(connection, gone)

    def _look_at_manifests(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Read the manifests that are not in the state in which the index saw them."""
        present = {
            key: mark
            for top in self._tops()
            for key, mark in self.store.marks(f"{top}/manifests").items()
            if _place_of(key) is not None
        }
        seen = dict(connection.execute("SELECT manifest, mark FROM seen").fetchall())
        changed = [key for key in present.keys() | seen.keys() if present.get(key) != seen.get(key)]
        touched = {place for key in changed if (place := _place_of(key)) is not None}
        if not touched:
            return
        pointers, marks = self._pointers(touched)
        schemas = _schemas(connection, "seen", "current_pointers")
        with _transaction(connection):
            self._point(connection, schemas, touched, pointers, marks)

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
                # The log first: POSIX drops this process's lock on the database as soon as any handle on it is
                # closed, so from the end of its copy on a writer may write again.
                wal = self.path.with_name(self.path.name + ".wal")
                with suppress(FileNotFoundError):
                    shutil.copyfile(wal, target.with_name(target.name + ".wal"))
                shutil.copyfile(self.path, target)
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
        except OSError as error:
            raise UserError(
                f"the index cannot be written ({error.strerror or error})",
                where=str(self.path),
                remedy="Check its folder, or set TRAITS_STATE to one that you may write to.",
            ) from error
        with tempfile.TemporaryDirectory(prefix="traits-sql-") as folder:
            try:
                copy = self.snapshot(Path(folder) / "index.duckdb")
            except OSError as error:
                raise UserError(
                    f"the index cannot be copied ({error.strerror or error})",
                    where=folder,
                    remedy="Free some space there, or set TMPDIR to another disk.",
                ) from error
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


def _place_of(key: str) -> Place | None:
    """The place of a current manifest, from its key; None for another file."""
    top, _, rest = key.partition("/manifests/")
    stage, _, trait = rest.removesuffix(".json").partition("/")
    place = (None if top == keys.SHARED else top, stage, trait or None)
    try:
        return place if keys.manifest(*place) == key else None
    except UserError:
        return None


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
        # unescaped, so that `_insert` mends half surrogate pairs: DuckDB's JSON takes no escaped ones either
        return json.dumps(value, sort_keys=True, ensure_ascii=False)

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
    with _registered(connection, "incoming", pa.concat_tables(parts)):
        connection.execute(f"INSERT INTO {name} BY NAME SELECT * FROM incoming")


@contextmanager
def _transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """All of the block or nothing of it."""
    import duckdb

    connection.execute("BEGIN")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(duckdb.Error):  # a failed COMMIT has ended the transaction itself
            connection.execute("ROLLBACK")
        raise


def _schemas(connection: duckdb.DuckDBPyConnection, *tables: str) -> dict[str, pa.Schema]:
    return {name: connection.sql(f"SELECT * FROM {name} LIMIT 0").to_arrow_table().schema for name in tables}


@contextmanager
def _registered(connection: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> Iterator[None]:
    import duckdb

    connection.register(name, table)
    try:
        yield
    finally:
        # in a transaction that failed even this is refused, and would hide why it failed
        with suppress(duckdb.Error):
            connection.unregister(name)


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
