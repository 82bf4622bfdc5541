"""Rules that find what would teach a vector something else than its trait."""

from __future__ import annotations

from pathlib import Path

from trait_assets.scenarios.dataset import read_folder
from trait_assets.scenarios.findings import Finding

LINT_VERSION = 1


def fast_findings(folder: Path, label: str) -> list[Finding]:
    """Findings that need no model and no fit, of one trait folder."""
    return list(read_folder(folder, label).findings)
