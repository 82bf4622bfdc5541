"""The rules of the house, kept by walking the imports."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from trait_assets.paths import REPOSITORY

PACKAGES = ("trait_assets", "resources", "storage")
SOURCES = sorted(p for package in PACKAGES for p in (REPOSITORY / package).rglob("*.py"))
HEAVY = ("torch", "transformers", "sklearn", "openai", "matplotlib", "plotly", "pandas", "accelerate")


def imported(path: Path) -> set[str]:
    """Top-level names of every module that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def may_import_dagster(path: Path) -> bool:
    parts = path.relative_to(REPOSITORY).parts
    if parts[0] == "resources":
        return path.name == "resource.py" or parts == ("resources", "store.py")
    if parts[0] == "trait_assets":
        top = len(parts) == 2
        return path.name == "asset.py" or (
            top
            and path.name
            in {
                "stage.py",
                "definitions.py",
                "automation.py",
                "partitions.py",
                "checks.py",
                "launch.py",
                "coordinator.py",
                "cli.py",
            }
        )
    return False


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_only_the_shells_know_dagster(path):
    if not may_import_dagster(path):
        assert "dagster" not in imported(path)


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if p.relative_to(REPOSITORY).parts[0] in ("storage", "resources")],
    ids=lambda p: str(p.relative_to(REPOSITORY)),
)
def test_storage_and_resources_know_nothing_of_the_assets(path):
    assert "trait_assets" not in imported(path)
    if path.relative_to(REPOSITORY).parts[0] == "storage":
        assert "resources" not in imported(path)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_nothing_imports_the_datasets_library_or_pickle(path):
    # the folder datasets/ shadows the library's name; pickle never stands on a read path
    assert not imported(path) & {"datasets", "pickle", "cloudpickle", "dill"}


def test_no_python_under_datasets():
    assert not list((REPOSITORY / "datasets").rglob("*.py"))


def test_nothing_is_for_unix_alone():
    """No call that Windows lacks, and no module that it lacks without a way round: runs start as processes of their own,
    never by fork."""
    unix = {"fcntl", "pwd", "grp", "resource", "termios", "pty"}
    calls = {"fork", "forkpty", "getuid", "geteuid", "setsid", "killpg", "SIGKILL"}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # where a way round is written, `except ImportError` stands beside the import
        guarded = {
            node
            for attempt in ast.walk(tree)
            if isinstance(attempt, ast.Try)
            and any("ImportError" in ast.dump(handler.type or attempt) for handler in attempt.handlers)
            for node in ast.walk(attempt)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and node not in guarded:
                assert not {alias.name for alias in node.names} & unix, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert not (node.value.id in ("os", "signal") and node.attr in calls), path


def test_definitions_load_no_model_library_and_write_nothing(tmp_path):
    """`dagster dev` imports them again and again: no file is written, no address asked, no partition added."""
    code = f"""
import json, sys
touched = []
def hook(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        touched.append(event)
    elif event in ("os.mkdir", "os.rename", "os.remove", "sqlite3.connect"):
        touched.append(f"{{event}} {{arguments[0]}}")
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        touched.append(f"open {{arguments[0]}}")
sys.addaudithook(hook)
import trait_assets.definitions as d
heavy = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps(
    {{"heavy": heavy, "touched": touched, "assets": len(list(d.defs.resolve_all_asset_specs()))}}
))
"""
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "TRAITS_STATE": str(tmp_path / "state"),
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    before = sorted(p for p in tmp_path.rglob("*"))
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        check=True,
        timeout=120,
    )
    found = json.loads(out.stdout.strip().splitlines()[-1])
    assert found["heavy"] == []
    assert found["touched"] == []
    assert found["assets"] >= 10
    assert sorted(p for p in tmp_path.rglob("*")) == before
