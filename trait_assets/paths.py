"""Where things are on this machine: from the environment, else beside the repository's own files, never the cwd."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def dataset_root() -> Path:
    """Folder of `category/trait` folders; TRAITS_DATASETS overrides datasets/traits."""
    return Path(os.environ.get("TRAITS_DATASETS", REPOSITORY / "datasets" / "traits"))


def experiments_root() -> Path:
    """Folder of the experiments' config files; TRAITS_EXPERIMENTS overrides experiments/."""
    return Path(os.environ.get("TRAITS_EXPERIMENTS", REPOSITORY / "experiments"))


def results_root() -> str:
    """Where results are stored: TRAITS_STORE (a folder or an fsspec URL), else beside the config files."""
    return os.environ.get("TRAITS_STORE", str(experiments_root()))


def state_root() -> Path:
    """Dagster's history and the DuckDB index; TRAITS_STATE overrides .state/."""
    return Path(os.environ.get("TRAITS_STATE", REPOSITORY / ".state"))


def compute_logs_root() -> Path:
    """What runs print, and what the web server hands out under /logs."""
    return state_root().resolve() / "dagster" / "compute_logs"


def lineage_path() -> Path:
    return state_root() / "lineage.duckdb"


def keeps_index() -> bool:
    """Whether runs take their results into this machine's DuckDB index; TRAITS_INDEX=off says no, on machines that come
    and go."""
    return os.environ.get("TRAITS_INDEX", "on").lower() not in ("off", "0", "no", "false")


def device_map() -> str | None:
    """How a model is spread over the GPUs of a machine (`device_map` of the model resource): TRAITS_DEVICE_MAP, else not
    at all."""
    return os.environ.get("TRAITS_DEVICE_MAP") or None
