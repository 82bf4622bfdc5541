"""Tiny random networks, and a plain way to compute what they should give."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load(name: str) -> ModuleType:
    import importlib.util
    import sys

    full = f"tests_models_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The module tests/models/tiny.py."""
    return _load("tiny")


@pytest.fixture(scope="session")
def plainly() -> Any:
    """The module tests/models/plainly.py."""
    return _load("plainly")


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRAITS_CACHE", str(folder))
    return folder
