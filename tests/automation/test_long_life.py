"""What runs for weeks does not grow: the daemon's evaluations over many ticks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trait_assets.paths import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_memory_is_bounded_over_300_ticks(project):
    for name in ("a", "b", "c"):
        project.folder(f"t/{name}")
    project.experiment("demo")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("long_life.py"))],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["megabytes"]) == 300
    assert found["requested"] > 0
    # the first hundred ticks fill caches; after that 200 ticks, a tenth of them with work, add next to nothing
    early, late = max(found["megabytes"][80:100]), max(found["megabytes"][-20:])
    assert late - early < 15, (early, late)
