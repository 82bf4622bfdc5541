"""A small project of its own per module: two traits, one experiment, the real embedded model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from trait_assets.paths import REPOSITORY

SMALL = {
    "extraction_model": "embedded:smollm2-135m-instruct",
    "base_model": True,
    "max_new_tokens": 12,
    "scenario_limit": 12,
    "min_kept": 4,
    "max_abstention_rate": 0.2,
    "methods": ["mean_diff", "probe", "random"],
    "layers": "10,17",
    "n_random": 20,
    "n_permutations": 20,
    "bootstrap": 100,
    "steer": {
        "questions": 8,
        "max_new_tokens": 10,
        "max_candidates": 2,
        "doses": [0.1, 0.2],
        "refine_steps": 0,
        "controls": 2,
        "bootstrap": 200,
    },
}


@dataclass
class Project:
    """Folders of a user's project, and the command line run in them."""

    root: Path

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def experiments(self) -> Path:
        return self.root / "experiments"

    @property
    def env(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "DAGSTER_", "TRAITS_"))}
        if cache := os.environ.get("TRAITS_CACHE"):
            env["TRAITS_CACHE"] = cache
        env.update(
            TRAITS_DATASETS=str(self.datasets),
            TRAITS_EXPERIMENTS=str(self.experiments),
            TRAITS_STATE=str(self.root / "state"),
            HF_HUB_OFFLINE="1",
        )
        return env

    def experiment(self, name: str, **options: Any) -> None:
        folder = self.experiments / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(options))

    def traits(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """`traits …` as a user types it, in a process of its own."""
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "trait_assets.cli", *arguments],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={**self.env, **(env or {})},
            timeout=580,
            check=False,
        )

    def run(self, *arguments: str, **kwargs: Any) -> dict[str, Any]:
        """`traits run … --json`, which must succeed."""
        result = self.traits(*arguments, "--json", **kwargs)
        assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
        return json.loads(result.stdout)


def copy_traits(target: Path, *traits: str) -> None:
    for trait in traits:
        shutil.copytree(REPOSITORY / "datasets" / "traits" / trait, target / trait)


@pytest.fixture(scope="session")
def small_options() -> dict[str, Any]:
    return SMALL


@pytest.fixture(scope="session")
def make_project(tmp_path_factory) -> Callable[..., Project]:
    """make_project("register/bureaucratic", …): a project of its own with copies of these shipped traits."""

    def make(*traits: str) -> Project:
        project = Project(tmp_path_factory.mktemp("project"))
        project.datasets.mkdir()
        copy_traits(project.datasets, *traits)
        return project

    return make


@dataclass
class Finished:
    """A project whose experiment `small` is computed, what that run reported, and a copy of the project to look at."""

    project: Project
    report: dict[str, Any]
    copy: Project


@pytest.fixture(scope="session")
def finished(make_project: Callable[..., Project], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`traits run -e small` on two traits, once for all modules. Only test_end_to_end changes the project itself."""
    project = make_project("register/bureaucratic", "emotion/enthusiasm")
    project.experiment("small", **SMALL)
    report = project.run("run", "-e", "small")
    copy = Project(tmp_path_factory.mktemp("finished") / "copy")
    shutil.copytree(project.root, copy.root)
    return Finished(project, report, copy)


@pytest.fixture(scope="module")
def project(make_project) -> Project:
    project = make_project("register/bureaucratic", "emotion/enthusiasm")
    project.experiment("small", **SMALL)
    return project
