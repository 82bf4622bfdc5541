"""What stages are handed when they need neither model nor judge."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from storage.workspace import Workspace
from trait_assets.experiments import parse_experiment
from trait_assets.pipeline import StageContext
from trait_assets.progress import LogProgress


@pytest.fixture
def ctx(tmp_path: Path) -> StageContext:
    return StageContext(
        experiment=parse_experiment("e", {"extraction_model": "m"}, where="test"),
        workspace=Workspace(tmp_path / "experiments", tmp_path / "lineage.duckdb"),
        models=None,  # type: ignore[arg-type]
        judges=None,  # type: ignore[arg-type]
        dataset_root=tmp_path,
        run_id="run-1",
        progress=LogProgress(logging.getLogger("test")),
    )
