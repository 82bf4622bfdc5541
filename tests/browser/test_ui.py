"""The Dagster UI in a real browser, over a project that the command line filled."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trait_assets.paths import REPOSITORY

pytestmark = pytest.mark.browser

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
CHEAP = {
    "extraction_model": "embedded:smollm2-135m-instruct",
    "prefill_only": True,
    "steering": False,
    "layers": "10,17",
    "methods": ["mean_diff", "random"],
    "scenario_limit": 12,
    "n_random": 20,
    "n_permutations": 20,
    "bootstrap": 100,
}
TRAITS = ("emotion/gloom", "register/bureaucratic")


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a webserver over a finished small project."""
    if not Path(CHROMIUM).exists():
        pytest.skip("no chromium on this machine")
    root = tmp_path_factory.mktemp("ui")
    for trait in TRAITS:
        shutil.copytree(REPOSITORY / "datasets" / "traits" / trait, root / "datasets" / trait)
    (root / "experiments" / "cheap").mkdir(parents=True)
    (root / "experiments" / "cheap" / "config.yaml").write_text(yaml.safe_dump(CHEAP))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "DAGSTER_", "TRAITS_"))}
    env.update(
        TRAITS_DATASETS=str(root / "datasets"),
        TRAITS_EXPERIMENTS=str(root / "experiments"),
        TRAITS_STATE=str(root / "state"),
    )
    code = "from trait_assets.launch import instance_folder; print(instance_folder('ui'))"
    filled = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "trait_assets.cli", "run", "-e", "cheap"],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert filled.returncode == 0, filled.stderr[-2000:]
    home = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [str(Path(sys.executable).parent / "dagster-webserver"), "-w", "workspace.yaml", "-p", str(port)],
        cwd=REPOSITORY,
        env={**env, "DAGSTER_HOME": home},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/server_info", timeout=2).read()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(ui: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def test_the_graph_of_an_experiment_is_drawn_with_its_assets(ui: str, page: Any) -> None:
    page.goto(f"{ui}/locations/traits/asset-groups/cheap/lineage")
    for name in ("activations", "vectors", "vector_evaluation"):
        page.get_by_text(name, exact=True).first.wait_for()


def test_a_partition_page_shows_its_numbers_and_opens_its_picture(ui: str, page: Any) -> None:
    page.goto(f"{ui}/assets/cheap/vector_evaluation?view=partitions&partition=emotion%2Fgloom")
    for number in ("best_method", "val_accuracy", "fingerprint"):
        page.get_by_text(number, exact=True).first.wait_for()
    page.get_by_text("[Show Markdown]").first.click()
    picture = page.locator("img[src^='data:image/png;base64,']").first
    picture.wait_for()
    assert picture.evaluate("image => image.naturalWidth") > 300


def test_the_checks_of_a_trait_are_listed(ui: str, page: Any) -> None:
    page.goto(f"{ui}/assets/cheap/vector_evaluation?view=checks")
    for check in ("held_out_accuracy", "better_than_random_directions"):
        page.get_by_text(check, exact=True).first.wait_for()
