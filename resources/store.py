"""The Dagster shell over `storage`: where results are kept.

Belongs here: three settings and `open`. Does not: anything about files, manifests or metrics (`storage/`).
"""

from __future__ import annotations

import os

import dagster as dg
from pydantic import Field

from storage.workspace import Workspace


class StoreResource(dg.ConfigurableResource):
    """Injected into every asset."""

    root: str = Field("experiments", description="Folder or fsspec URL (s3://…) of the results.")
    duckdb_path: str = Field(
        os.path.join(".state", "lineage.duckdb"),
        description="The index over manifests and metrics, on a local disk; it can be rebuilt at any time.",
    )
    keep_index: bool = Field(
        True,
        description="Take every result into the index at once. Off where runs have no disk of their own to keep it on.",
    )

    def open(self) -> Workspace:
        """The workspace; opening writes nothing."""
        return Workspace(self.root, self.duckdb_path, keep_index=self.keep_index)
