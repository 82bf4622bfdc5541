"""One finished small project, one `dagster dev` over it, one browser: shared by everything that looks at the UI."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from trait_assets.paths import REPOSITORY

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
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
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    """`dagster dev` over a project that the command line has filled."""
    if not Path(CHROMIUM).exists():
        pytest.skip("no chromium on this machine")
    root = tmp_path_factory.mktemp("ui")
    for trait in TRAITS:
        shutil.copytree(REPOSITORY / "datasets" / "traits" / trait, root / "datasets" / trait)
    for name, options in (("demo", DEMO), ("quick", QUICK)):
        (root / "experiments" / name).mkdir(parents=True)
        (root / "experiments" / name / "config.yaml").write_text(yaml.safe_dump(options))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "DAGSTER_", "TRAITS_"))}
    env.update(
        TRAITS_DATASETS=str(root / "datasets"),
        TRAITS_EXPERIMENTS=str(root / "experiments"),
        TRAITS_STATE=str(root / "state"),
    )

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with (root / "dev.log").open("w") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "dagster"), "dev", "-w", "workspace.yaml", "-p", str(port)],
            cwd=REPOSITORY,
            env={**env, "DAGSTER_HOME": home},
            stdout=log,
            stderr=log,
            # with all that it starts, so that all of it can be ended
            start_new_session=True,
        )
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{address}/server_info", timeout=2).read()
                    break
                except OSError:
                    time.sleep(0.5)
            with dg.DagsterInstance.from_config(home) as instance:
                yield Dev(root, address, instance)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            # on a busy machine it takes its time over its children, and whatever is left would go on ticking
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


@pytest.fixture(scope="module")
def page(dev: Dev) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 900}, base_url=dev.address)
        page.set_default_timeout(120_000)
        yield page
        browser.close()
