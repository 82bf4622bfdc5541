"""From needs and rates to an estimate: per stage rows, tokens, seconds, GPU hours, judge calls, cost, bytes.

Put together here; the arithmetic is in `arithmetic`, facts in `survey`, measured rates in `measured`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trait_assets.planning.arithmetic import (
    GIB,
    ON_GPU,
    ModelShape,
    Need,
    Options,
    Price,
    Rates,
    Trait,
    needs_of,
    seconds_of,
)


@dataclass(frozen=True)
class StageEstimate:
    """One stage over all traits. `traits`: with work to do; `current`: up to date."""

    stage: str
    traits: int
    current: int
    need: Need
    seconds: float
    gpu_hours: float
    judge_usd: float | None

    def record(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "traits": self.traits,
            "up_to_date": self.current,
            "rows": round(self.need.rows),
            "prompt_tokens": round(self.need.prompt_tokens),
            "tokens": round(self.need.tokens),
            "seconds": round(self.seconds, 1),
            "gpu_hours": round(self.gpu_hours, 4),
            "judge_calls": round(self.need.judge_calls),
            "judge_tokens": round(self.need.judge_prompt_tokens + self.need.judge_completion_tokens),
            "judge_usd": None if self.judge_usd is None else round(self.judge_usd, 4),
            "storage_bytes": round(self.need.storage_bytes),
        }


@dataclass(frozen=True)
class Estimate:
    """The whole. `overhead_seconds`: starting runs and loading models; `notes`: what a reader must know."""

    stages: list[StageEstimate]
    rates: Rates
    overhead_seconds: float
    runs: int
    llm_judge: bool
    on_gpu: bool
    notes: list[str] = field(default_factory=list)

    @property
    def need(self) -> Need:
        return sum((stage.need for stage in self.stages), Need())

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages) + self.overhead_seconds

    @property
    def gpu_hours(self) -> float:
        """GPUs are held while a run generates, captures or steers, and while it loads the model."""
        held = self.overhead_seconds / 3600 * self.rates.gpus if self.on_gpu and self.runs else 0.0
        return sum(stage.gpu_hours for stage in self.stages) + held

    @property
    def judge_usd(self) -> float | None:
        costs = [stage.judge_usd for stage in self.stages if stage.judge_usd is not None]
        return sum(costs) if costs else None

    def record(self) -> dict[str, Any]:
        need = self.need
        return {
            "stages": [stage.record() for stage in self.stages],
            "total": {
                "seconds": round(self.seconds, 1),
                "overhead_seconds": round(self.overhead_seconds, 1),
                "runs": self.runs,
                "gpu_hours": round(self.gpu_hours, 4) if self.on_gpu else None,
                "gpus_per_run": self.rates.gpus if self.on_gpu else 0,
                "rows": round(need.rows),
                "tokens": round(need.tokens),
                "judge_calls": round(need.judge_calls),
                "judge_tokens": round(need.judge_prompt_tokens + need.judge_completion_tokens),
                "judge_usd": None if self.judge_usd is None else round(self.judge_usd, 4),
                "storage_bytes": round(need.storage_bytes),
            },
            "rates": {
                name: {"value": round(getattr(self.rates, name), 4), "source": self.rates.sources.get(name)}
                for name in (
                    "generate",
                    "capture",
                    "steer",
                    "judge",
                    "fit",
                    "evaluate",
                    "load",
                    "start",
                    "per_result",
                )
            },
            "judge": "llm" if self.llm_judge else "local stand-in",
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Todo:
    """Traits alike: `count` of them with these facts, of which `left` per stage is to be done (default all)."""

    facts: Trait
    count: int = 1
    left: dict[str, float] | None = None


def estimate(
    options: Options,
    model: ModelShape,
    steered: ModelShape,
    todo: Sequence[Todo],
    rates: Rates,
    *,
    traits_per_run: int = 16,
    price: Price | None = None,
    on_gpu: bool = False,
    notes: Sequence[str] = (),
) -> Estimate:
    """Add up what is to be done. Runs are batches of `traits_per_run`; each starts once and loads each model
    once."""
    stages = []
    busy = 0
    for stage in options.stages:
        total = Need()
        working = current = 0
        for group in todo:
            left = 1.0 if group.left is None else group.left.get(stage, 1.0)
            if not left:
                current += group.count
                continue
            working += group.count
            total = total + needs_of(options, model, steered, group.facts)[stage] * (left * group.count)
        busy = max(busy, working)
        seconds = seconds_of(stage, total, rates, results=working)
        stages.append(
            StageEstimate(
                stage,
                working,
                current,
                total,
                seconds,
                seconds / 3600 * rates.gpus if on_gpu and stage in ON_GPU else 0.0,
                price.of(total) if price is not None and options.llm_judge else None,
            )
        )
    runs = -(-busy // traits_per_run) if busy else 0
    same = model.name == steered.name
    loads = any(s.traits for s in stages if s.stage in ON_GPU)
    models = 1 if same or "steering_results" not in options.stages else 2
    overhead = runs * (rates.start + (rates.load * models if loads else 0.0))
    return Estimate(stages, rates, overhead, runs, options.llm_judge, on_gpu, list(notes))


def say_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 72 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def say_bytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size < GIB else f"{size / 1e9:.1f} GB"


def say_count(count: float) -> str:
    if count < 1e5:
        return f"{count:,.0f}"
    return f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:,.2f} G"
