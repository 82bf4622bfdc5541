"""Everything that a run has written, in the clear: for tests that look for what must not be there.

Databases are read through their own engines and compressed blobs are opened, because a text inside a compressed
page is not found by looking at the bytes of the file.
"""

from __future__ import annotations

import contextlib
import gzip
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb


def everything_written(root: Path) -> Iterator[tuple[str, bytes]]:
    """(place, content) of every file under `root`, and of every row of its SQLite, DuckDB and Parquet files."""
    for path in sorted(root.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        yield str(path), data
        if data.startswith(b"SQLite format 3"):
            yield from _sqlite(path)
        elif data[8:12] == b"DUCK":
            yield from _duckdb(path)
        elif data.startswith(b"PAR1"):
            with duckdb.connect() as connection:
                for row in connection.execute("SELECT * FROM read_parquet(?)", [str(path)]).fetchall():
                    yield f"{path}: a row", _plain(row)
        elif data.startswith(b"\x1f\x8b"):
            yield f"{path} opened", gzip.decompress(data)


def holders(root: Path, secret: str) -> list[str]:
    """The places that hold `secret`."""
    return [place for place, content in everything_written(root) if secret.encode() in content]


def _sqlite(path: Path) -> Iterator[tuple[str, bytes]]:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for row in connection.execute(f'SELECT * FROM "{table}"'):
                yield f"{path}: {table}", _plain(row)
    finally:
        connection.close()


def _duckdb(path: Path) -> Iterator[tuple[str, bytes]]:
    with duckdb.connect(str(path), read_only=True) as connection:
        tables = connection.execute(
            "SELECT table_schema, table_name FROM information_schema.tables WHERE table_type = 'BASE TABLE'"
        ).fetchall()
        for schema, table in tables:
            for row in connection.execute(f'SELECT * FROM "{schema}"."{table}"').fetchall():
                yield f"{path}: {table}", _plain(row)


def _plain(row: tuple[Any, ...]) -> bytes:
    cells = []
    for cell in row:
        if isinstance(cell, bytes):
            with contextlib.suppress(zlib.error):
                cell = zlib.decompress(cell)
            cells.append(cell)
        else:
            cells.append(str(cell).encode("utf-8", "replace"))
    return b"\x1f".join(cells)
