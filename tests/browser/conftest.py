"""One finished small project, one `dagster dev` over it, one browser: shared by everything that looks at the UI."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import dagster as dg
import pytest
import yaml

from trait_assets.paths import REPOSITORY

TRAITS = ("emotion/gloom", "register/bureaucratic")
# the demo with every stage, small
DEMO = {
    "extraction_model": "embedded:smollm2-135m-instruct",
    "base_model": True,
    "traits": list(TRAITS),
    "max_new_tokens": 8,
    "scenario_limit": 10,
    "min_kept": 2,
    "methods": ["mean_diff", "random"],
    "layers": "10,17",
    "n_random": 20,
    "n_permutations": 20,
    "bootstrap": 100,
    "steer": {
        "questions": 4,
        "max_new_tokens": 8,
        "max_candidates": 1,
        "doses": [0.1, 0.2],
        "refine_steps": 0,
        "controls": 1,
        "bootstrap": 100,
    },
}
# what a new folder is computed for while the UI is looked at
QUICK = {
    "extraction_model": "embedded:smollm2-135m-instruct",
    "traits": ["my/*"],
    "prefill_only": True,
    "steering": False,
    "layers": "10",
    "methods": ["mean_diff"],
    "scenario_limit": 8,
    "n_random": 20,
    "n_permutations": 0,
    "bootstrap": 100,
}


@dataclass
class Dev:
    """The running `dagster dev` and its project."""

    root: Path
    address: str
    instance: dg.DagsterInstance

    @property
    def experiments(self) -> Path:
        return self.root / "experiments"

    def drop(self, traits: Mapping[str, str]) -> None:
        """Shipped traits under other names, all there at once, as a file manager moves a folder in."""
        for trait, source in traits.items():
            shutil.copytree(REPOSITORY / "datasets" / "traits" / source, self.root / "incoming" / trait)
        for category in (self.root / "incoming").iterdir():
            category.rename(self.root / "datasets" / category.name)

    def ticked(self, sensor: str) -> bool:
        """Has the sensor looked at the project?"""
        return any(
            self.instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=1)
            for state in self.instance.all_instigator_state()
            if state.instigator_name == sensor
        )

    def wait(self, until: Callable[[], bool], seconds: int) -> None:
        end = time.monotonic() + seconds
        while not until():
            runs = [(run.status.value, run.tags) for run in self.instance.get_runs()]
            assert time.monotonic() < end, f"not within {seconds} s; runs: {runs}"
            time.sleep(0.5)


@pytest.fixture(scope="module")
def dev(
    tmp_path_factory: pytest.TempPathFactory, load_helper: Callable[[Path], ModuleType], browser: Any
) -> Iterator[Dev]:
    """`dagster dev` over a project that the command line has filled; without a browser nobody would look at it."""
    root = tmp_path_factory.mktemp("ui")
    for trait in TRAITS:
        shutil.copytree(REPOSITORY / "datasets" / "traits" / trait, root / "datasets" / trait)
    for name, options in (("demo", DEMO), ("quick", QUICK)):
        (root / "experiments" / name).mkdir(parents=True)
        (root / "experiments" / name / "config.yaml").write_text(yaml.safe_dump(options))
    helper = load_helper(REPOSITORY / "tests" / "dagster_dev.py")
    env = helper.environment(root)

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *arguments],
            cwd=REPOSITORY,
            env=env,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    python("-m", "trait_assets.cli", "run", "-e", "demo")
    home = python("-c", "from trait_assets.launch import instance_folder; print(instance_folder('ui'))")
    with helper.serving(root, env, home) as address:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/server_info", timeout=2).read()
                break
            except OSError:
                time.sleep(0.5)
        with dg.DagsterInstance.from_config(home) as instance:
            yield Dev(root, address, instance)


@pytest.fixture(scope="module")
def page(dev: Dev, browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1500, "height": 900}, base_url=dev.address)
    page.set_default_timeout(120_000)
    yield page
    page.close()
