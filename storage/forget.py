"""Removing all that is stored about a trait.

Belongs here: finding and deleting its files, caches and index rows, and the tables over all traits that show
it. Does not: the partition in Dagster (the command line does that), the trait's folder under datasets/.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from storage import keys, published
from storage.errors import UserError
from storage.index import ROW_TABLES
from storage.workspace import Workspace

# Folders of an experiment (and of what is shared) that have a part per stage and trait.
_PER_STAGE = ("manifests", "history", "metrics", "pictures", "journal")


@dataclass(frozen=True)
class Forgotten:
    """`keys`: storage keys that were (or, in a trial, would be) removed; `rows`: rows removed from the
    index.
    """

    trait: str
    keys: tuple[str, ...]
    rows: int


def forget(workspace: Workspace, trait: str, *, dry_run: bool = False) -> Forgotten:
    """Remove the trait's artifacts, manifests, metrics, caches and index rows, in every experiment, and the
    tables over all traits that show it (the next run makes those again, without it).

    Manifests go first: a kill half way leaves files that count for nothing, and a second call removes
    them. The index is made anew, so that its file does not hold deleted rows either. UserError when nothing
    is stored under that name, or when another program holds the index (the files are removed by then).
    """
    keys.check_trait(trait)
    found = _keys_of(workspace, trait)
    if not found:
        raise UserError(
            f"nothing is stored about {trait}", remedy="`traits status` lists the traits that have results."
        )
    if dry_run:
        return Forgotten(trait, tuple(found), 0)
    rows = _rows_of(workspace, trait)
    for key in found:
        workspace.store.delete(key)
    for folder in dict.fromkeys(_folders_of(workspace, trait)):
        workspace.store.delete_tree(folder)
    # the snapshot for other machines has the rows, too; whoever publishes makes another
    published.remove(workspace.store)
    try:
        workspace.index.rebuild()
    except UserError as error:
        raise UserError(
            "the files are removed, but another program has the index open",
            where=str(workspace.index.path),
            remedy="Close it and run `traits rebuild-index`.",
        ) from error
    return Forgotten(trait, tuple(found), rows)


def _folders_of(workspace: Workspace, trait: str) -> list[str]:
    store = workspace.store
    tops = store.children()
    folders = [f"_scenarios/{trait}"]
    folders += [f"_cache/{kind}/{trait}" for kind in store.children("_cache")]
    for top in tops:
        if top.startswith("_") and top != keys.SHARED:
            continue
        folders += [f"{top}/extraction/{trait}", f"{top}/steering/{trait}"]
        for part in _PER_STAGE:
            folders += [
                f"{top}/{part}/{stage}/{trait}"
                for stage in store.children(f"{top}/{part}")
                if "." not in stage
            ]
    return folders


def _keys_of(workspace: Workspace, trait: str) -> list[str]:
    """What to delete, current manifests first, each key once."""
    store = workspace.store
    manifests, rest = [], []
    for folder in _folders_of(workspace, trait):
        rest += store.list(folder)
        if "/manifests/" in folder and store.exists(f"{folder}.json"):
            manifests.append(f"{folder}.json")
    table_manifests, table_rest = _tables_of(workspace, trait)
    return list(dict.fromkeys([*table_manifests, *manifests, *table_rest, *rest]))


def _tables_of(workspace: Workspace, trait: str) -> tuple[list[str], list[str]]:
    """(current manifests, everything else) of the results over all traits that this trait went into."""
    store = workspace.store
    # no neighbour whose name only begins or ends alike
    named = re.compile(rf"(?<![a-z0-9_-]){re.escape(trait)}(?![a-z0-9_-])".encode())
    manifests: list[str] = []
    rest: list[str] = []
    for top in store.children():
        if top.startswith("_") and top != keys.SHARED:
            continue
        for name in store.children(f"{top}/manifests"):
            key = f"{top}/manifests/{name}"
            if not name.endswith(".json"):
                continue
            data = store.read_bytes(key)
            if named.search(data):
                manifests.append(key)
                rest += _files_named_in(data)
                rest += store.list(f"{top}/pictures/{name.removesuffix('.json')}/_table")
        for stage in store.children(f"{top}/history"):
            for key in store.list(f"{top}/history/{stage}/_table"):
                data = store.read_bytes(key)
                if named.search(data):
                    # the rows lie beside the history, under the same name
                    rows = key.replace("/history/", "/metrics/", 1).removesuffix(".json") + ".parquet"
                    rest += [key, *([rows] if store.exists(rows) else []), *_files_named_in(data)]
    return manifests, [key for key in rest if store.exists(key)]


def _files_named_in(manifest: bytes) -> list[str]:
    """The files of a manifest; of one that cannot be read, none: its stage overwrites them."""
    try:
        return sorted(json.loads(manifest)["files"])
    except (ValueError, KeyError, TypeError):
        return []


def _rows_of(workspace: Workspace, trait: str) -> int:
    """How many rows the index has of the trait."""
    tables = ("manifests", "inputs", "current_pointers", *ROW_TABLES)
    counts = " UNION ALL ".join(f"SELECT count(*) AS n FROM {table} WHERE trait = $1" for table in tables)
    try:
        return int(workspace.index.sql(f"SELECT sum(n) FROM ({counts})", [trait]).rows[0][0])
    except UserError:  # a broken index is made anew anyway
        return 0
