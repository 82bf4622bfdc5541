"""Removing all that is stored about a trait.

Belongs here: finding and deleting its files, caches and index rows. Does not: the trait's folder under
datasets/ and the partition in Dagster (the command line does those).
"""

from __future__ import annotations

from dataclasses import dataclass

from storage import keys
from storage.errors import UserError
from storage.index import ROW_TABLES, IndexBusy
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
    """Remove the trait's artifacts, manifests, metrics, caches and index rows, in every experiment.

    Manifests go first: a kill half way leaves files that count for nothing, and a second call removes
    them. Tables over all traits still show it until they are made again. UserError when nothing is stored
    under that name.
    """
    keys.check_trait(trait)
    found = _keys_of(workspace, trait)
    if not found:
        raise UserError(
            f"nothing is stored about {trait}", remedy="`traits status` lists the traits that have results."
        )
    if dry_run:
        return Forgotten(trait, tuple(found), 0)
    for key in found:
        workspace.store.delete(key)
    for folder in dict.fromkeys(_folders_of(workspace, trait)):
        workspace.store.delete_tree(folder)
    return Forgotten(trait, tuple(found), _forget_rows(workspace, trait))


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
    store = workspace.store
    manifests, rest = [], []
    for folder in _folders_of(workspace, trait):
        rest += store.list(folder)
        if "/manifests/" in folder and store.exists(f"{folder}.json"):
            manifests.append(f"{folder}.json")
    return manifests + rest


def _forget_rows(workspace: Workspace, trait: str) -> int:
    """Delete the trait's rows from the index. UserError when another program holds it all the time."""
    removed = 0
    try:
        with workspace.index.writing() as connection:
            for table in ("manifests", "inputs", "current_pointers", *ROW_TABLES):
                (count,) = connection.execute(
                    f"SELECT count(*) FROM {table} WHERE trait = ?", [trait]
                ).fetchall()[0]
                removed += int(count)
                connection.execute(f"DELETE FROM {table} WHERE trait = ?", [trait])
            connection.execute(
                "DELETE FROM sources WHERE contains(source, ?) OR contains(source, ?)",
                [f"/{trait}/", f"/{trait}.json"],
            )
    except IndexBusy as error:
        raise UserError(
            "the files are removed, but another program has the index open",
            where=str(workspace.index.path),
            remedy="Close it and run `traits rebuild-index`.",
        ) from error
    return removed
