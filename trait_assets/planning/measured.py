"""Rates that were measured: by past runs, from the index, or by a calibration, which is a short run of its own.

A calibration runs the real stages on one trait with few rows in a temporary store, and reads what they took
from the same rows of the table `work`. Its result is kept beside the index, by model and device.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import UserError
from trait_assets.planning.arithmetic import Rates

if TYPE_CHECKING:
    from storage.workspace import Workspace
    from trait_assets.pipeline import StageContext

log = logging.getLogger("trait_assets")

# fewer tokens than these say little about speed
LEAST_TOKENS = 200
LEAST_CALLS = 20
# the newest so many runs count
RUNS = 5

# how often a stage puts a row in for what it took, summed over the newest runs
_QUERY = """
WITH newest AS (
    SELECT stage, run_id, max(created_at) AS last FROM work WHERE stage = ? GROUP BY ALL ORDER BY last DESC LIMIT ?
)
SELECT coalesce(sum(w.tokens), 0), coalesce(sum(w.model_seconds), 0), coalesce(sum(w.judge_calls), 0),
       coalesce(sum(w.judge_seconds), 0), coalesce(max(w.load_seconds), 0), count(*), max(w.created_at)
FROM work w JOIN newest USING (stage, run_id)
WHERE (? IS NULL OR w.model = ?) AND (? IS NULL OR w.device LIKE ?) AND (? IS NULL OR w.judge = ?)
"""


@dataclass(frozen=True)
class Measured:
    """What was measured, None where nothing was; `sources` as in `Rates`."""

    values: dict[str, float]
    sources: dict[str, str]

    def onto(self, rates: Rates) -> Rates:
        """`rates` with what was measured in place of what was assumed."""
        return replace(rates, **self.values, sources={**rates.sources, **self.sources})  # type: ignore[arg-type]


def from_index(
    workspace: Workspace, *, model: str, steered: str, device: str | None, judge: str, server: bool = False
) -> Measured:
    """Rates of the newest runs on the same model, device and judge. `server`: responses come from a server."""
    values: dict[str, float] = {}
    sources: dict[str, str] = {}

    def took(stage: str, model: str | None, judge: str | None) -> tuple[Any, ...]:
        place = device if model is not None else None
        if server and stage == "responses":
            place = "%server"
        parameters = [stage, RUNS, model, model, place, place, judge, judge]
        return tuple(workspace.index.sql(_QUERY, parameters).rows[0])

    for name, stage, of in (
        ("generate", "responses", model),
        ("capture", "activations", model),
        ("steer", "steering_results", steered),
    ):
        tokens, seconds, _, _, load, _, at = took(stage, of, None)
        if tokens >= LEAST_TOKENS and seconds > 0:
            values[name] = float(tokens) / float(seconds)
            sources[name] = f"past runs, {at:%Y-%m-%d}"
        if load > 1.0:
            values["load"] = float(load)
            sources["load"] = f"past runs, {at:%Y-%m-%d}"
    calls = seconds = 0.0
    newest: datetime | None = None
    for stage in ("vetted_scenarios", "vetted_responses"):
        _, _, judged, judging, _, _, at = took(stage, None, judge)
        if judged:
            calls, seconds, newest = calls + float(judged), seconds + float(judging), at
    if calls >= LEAST_CALLS and seconds > 0:
        values["judge"] = calls / seconds
        sources["judge"] = f"past runs, {newest:%Y-%m-%d}"
    return Measured(values, sources)


def kept_file(state: Path) -> Path:
    return state / "calibration.json"


def kept(state: Path, key: str) -> Measured | None:
    """The kept calibration of a model on a device."""
    try:
        entry = json.loads(kept_file(state).read_text(encoding="utf-8"))[key]
        return Measured(
            {str(k): float(v) for k, v in entry["values"].items()},
            {str(k): f"calibrated {entry['at'][:10]}" for k in entry["values"]},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(state: Path, key: str, measured: Measured) -> None:
    path = kept_file(state)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        entries = entries if isinstance(entries, dict) else {}
    except (OSError, ValueError):
        entries = {}
    entries[key] = {"values": measured.values, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    state.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


# of one calibration: rows per side on a CPU and on a GPU, and tokens per row. The steering search has all
# questions, so that a batch is about as full as it will be: small batches give fewer tokens a second
ROWS_CPU, ROWS_GPU = 16, 64
MOST_TOKENS = 32


def calibrate(ctx: StageContext, trait: str, *, say: Callable[[str], None] = lambda text: None) -> Measured:
    """Run every stage of one trait with few rows in a temporary store; a minute on two cores with a small model.

    The judge is the local stand-in whatever the experiment says: nothing is paid for. UserError where the
    trait cannot be run.
    """
    from storage.workspace import Workspace
    from trait_assets import pipeline
    from trait_assets.stages import all_stages

    e = ctx.experiment
    gpu = _has_gpu()
    rows = ROWS_GPU if gpu else ROWS_CPU
    if e.scenario_limit is not None:
        rows = min(rows, e.scenario_limit)
    steer = {
        **e.steer.model_dump(),
        "max_new_tokens": min(e.steer.max_new_tokens, MOST_TOKENS),
        "max_candidates": min(e.steer.max_candidates, 32 if gpu else 8),
        "doses": e.steer.doses[:1],
        "refine_steps": 0,
        "controls": 0,
        "prompting_baseline": False,
        "multi_layer": False,
        "bootstrap": 100,
    }
    overrides: dict[str, Any] = {
        "scenario_limit": rows,
        "vet": False,
        "min_kept": 2,
        "steer": steer,
        "traits": [trait],
        "generation": {"backend": "local"},
    }
    if e.max_new_tokens is None or e.max_new_tokens > MOST_TOKENS:
        overrides["max_new_tokens"] = MOST_TOKENS
    if e.max_new_tokens is None and e.base_model:
        overrides.pop("max_new_tokens")
    small = e.with_overrides(overrides)
    from resources.judges.resource import JudgeResource

    with tempfile.TemporaryDirectory(prefix="traits-calibration-") as folder:
        workspace = Workspace(Path(folder) / "store", Path(folder) / "lineage.duckdb")
        short = replace(
            ctx,
            experiment=small,
            workspace=workspace,
            judges=JudgeResource(backend="local"),
            run_id="calibration",
            force=False,
        )
        stages = all_stages()
        started = time.monotonic()
        say("calibrating: libraries and the local judge")
        start = _time_imports()
        judged = _judgements_per_second(short, trait)
        for name in pipeline.stages_of(small):
            say(f"calibrating: {name}")
            for result in pipeline.run(stages[name], short, [trait]):
                if result.state == "failed":
                    raise UserError(
                        f"the calibration could not run {name}: {result.reason}",
                        where=trait,
                        remedy="mend that first, or plan without --calibrate",
                    )
        found = _of_run(workspace)
        found.values.update(start=start, judge=judged)
        found.sources.update(dict.fromkeys(("start", "judge"), "calibrated now"))
        log.info("calibrated in %.0f s", time.monotonic() - started)
    return found


def _time_imports() -> float:
    """Seconds that a run spends on importing: Dagster's side in a process of its own, the libraries here."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", "import trait_assets.launch"], check=True)
    import matplotlib.figure  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.linear_model  # noqa: F401

    return time.perf_counter() - started


def _judgements_per_second(ctx: StageContext, trait: str) -> float:
    """Of the local judge, the texts that it is fitted on counted as well."""
    from trait_assets.judging import VettedScenariosStage
    from trait_assets.pipeline import run
    from trait_assets.scenarios.reading import ScenariosStage
    from trait_assets.scenarios.selection import read_scenario_set

    list(run(ScenariosStage(), ctx, [trait]))
    items = [row.item for row in VettedScenariosStage().rows(ctx, trait)]
    scenarios = read_scenario_set(ctx, trait)
    texts = len(items) + len(scenarios.positives) + len(scenarios.negatives)
    started = time.perf_counter()
    judge = ctx.judges.judge(lambda name: ctx.workspace.row_cache("judgements", name))
    list(judge.score(items))
    return texts / (time.perf_counter() - started)


def _of_run(workspace: Workspace) -> Measured:
    table = {
        str(row[0]): dict(
            zip(("tokens", "model_s", "calls", "judge_s", "load_s", "seconds"), row[1:], strict=True)
        )
        for row in workspace.index.sql(
            "SELECT stage, sum(tokens), sum(model_seconds), sum(judge_calls), sum(judge_seconds), "
            "max(load_seconds), sum(seconds) FROM work GROUP BY stage"
        ).rows
    }
    (used,) = workspace.index.sql(
        "SELECT coalesce(max(train_positive + train_negative + val_positive + val_negative) "
        "* max(n_layers) * count(*), 0) FROM activations"
    ).rows[0]
    (methods,) = workspace.index.sql("SELECT count(DISTINCT method) FROM vectors").rows[0]
    values: dict[str, float] = {}
    for name, stage in (("generate", "responses"), ("capture", "activations"), ("steer", "steering_results")):
        row = table.get(stage)
        if row and row["tokens"] and row["model_s"]:
            values[name] = row["tokens"] / row["model_s"]
    loads = [row["load_s"] for row in table.values() if row["load_s"]]
    if loads:
        values["load"] = max(loads)
    fits = float(used) * max(1, int(methods))
    if fits:
        for name, stage in (("fit", "vectors"), ("evaluate", "vector_evaluation")):
            if stage in table:
                values[name] = 1000.0 * table[stage]["seconds"] / fits
    return Measured(values, dict.fromkeys(values, "calibrated now"))


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def device_here() -> str:
    """The name that `metering.device_name` gives to what this machine computes on."""
    from types import SimpleNamespace

    from resources.models.loading import resolve_device
    from trait_assets.metering import device_name

    return str(device_name(SimpleNamespace(devices=[resolve_device("auto")])))
