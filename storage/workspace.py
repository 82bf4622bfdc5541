"""One experiment folder with everything that keeps it: the handle that stages and tools are given.

Belongs here: putting the parts together. Does not: their inside, Dagster, and where the root comes from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from upath import UPath

from storage import keys
from storage.artifacts import ArtifactStore
from storage.index import Indexed, LineageIndex
from storage.manifest import Manifest, Manifests
from storage.metrics import MetricsWriter
from storage.rows import RowCache, TensorJournal


class Workspace:
    """`root`: the experiments folder or URL; `duckdb_path`: the index, on a local disk; it can always be
    rebuilt. `keep_index`: whether commits go into it at once (see `LineageIndex`).
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | UPath,
        duckdb_path: str | os.PathLike[str],
        *,
        keep_index: bool = True,
    ) -> None:
        self.store = ArtifactStore(root)
        self.index = LineageIndex(self.store, Path(duckdb_path), kept=keep_index)
        self.manifests = Manifests(self.store, self.index.announce_manifest)
        self.metrics = MetricsWriter(self.store, self.index)

    def commit(self, manifest: Manifest, rows: Sequence[Mapping[str, Any]] = ()) -> Indexed:
        """Make a result count: its metric rows first, its manifest last, then one look at the index.

        In this order a kill never leaves a result that counts without its rows. "index_behind": the index was
        locked; nothing is lost, the next writer takes it in.
        """
        key, record = self.metrics.keep(
            manifest.experiment,
            manifest.stage,
            manifest.trait,
            rows,
            manifest.run_id,
            manifest.fingerprint,
            datetime.fromisoformat(manifest.created_at),
        )
        self.manifests.commit(replace(manifest, rows={key: record}))
        return self.index.take_in()

    def row_cache(self, kind: str, trait: str) -> RowCache:
        """Rows by content key, shared by all experiments (`kind`: what the rows are, such as judge)."""
        return RowCache(self.store, keys.row_cache(kind, trait))

    rows = row_cache

    def journal(self, experiment: str | None, stage: str, trait: str | None) -> TensorJournal:
        """Arrays of a stage in progress."""
        return TensorJournal(self.store, keys.journal(experiment, stage, trait))

    def row_journal(self, experiment: str | None, stage: str, trait: str | None) -> RowCache:
        """JSON rows of a stage in progress."""
        return RowCache(self.store, keys.journal(experiment, stage, trait))

    @staticmethod
    def picture_key(experiment: str | None, stage: str, trait: str | None, name: str) -> str:
        return keys.picture(experiment, stage, trait, name)
