"""Fixtures of the scenarios' tests: generated traits, the shipped ones, and folders written by others."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("TRAITS_SHARED", REPO.parent / "shared"))


@pytest.fixture(scope="session")
def corpus() -> ModuleType:
    """tests/scenarios/corpus.py, which writes clean traits."""
    name = "tests_scenarios_corpus"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "corpus.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def public_traits() -> Path:
    """Trait folders written by others, where this checkout has them."""
    root = SHARED / "traits_public"
    if not root.is_dir():
        pytest.skip(f"no folder {root}: set TRAITS_SHARED to a folder that holds traits_public")
    return root


@pytest.fixture
def shipped_traits() -> Path:
    return REPO / "datasets" / "traits"
