"""What a stage's work took: shares that add up, rows in the index, numbers in the UI."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from trait_assets import metering, pipeline
from trait_assets.metering import Meter, Work
from trait_assets.pipeline import Outcome, Plan, StageContext
from trait_assets.stage import result_metadata


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_is_shared_by_tokens_and_adds_up() -> None:
    clock = Clock()
    meter = Meter(model="m", device="d", clock=clock)

    def rows() -> Iterator[tuple[str, int]]:
        for owner, tokens, seconds in (("a", 10, 4.0), ("b", 30, 0.0), ("a", 10, 1.0), ("b", 50, 5.0)):
            clock.now += seconds
            yield owner, tokens

    done = {}
    for number, (owner, tokens) in enumerate(meter.each("model", rows())):
        meter.add(owner, rows=1, tokens=tokens, prompt_tokens=1)
        clock.now += 100.0  # what is done with a row is not the model's time
        if number == 2:
            done["a"] = meter.settle("a")
    done["b"] = meter.settle("b")
    # after 5 s, 20 of 50 tokens were a's
    assert done["a"].model_seconds == pytest.approx(2.0)
    assert done["b"].model_seconds == pytest.approx(8.0)
    assert (done["a"].rows, done["a"].tokens, done["b"].tokens) == (2, 20, 80)
    assert (done["a"].model, done["a"].device) == ("m", "d")


def test_a_trait_that_did_nothing_new_took_nothing() -> None:
    meter = Meter()
    with meter.timed("model"):
        pass
    meter.add("a", rows=1, tokens=5)
    work = meter.settle("b")
    assert (work.rows, work.tokens, work.model_seconds, work.judge_cost_usd) == (0, 0, 0.0, None)


def test_loading_is_named_once_and_a_judge_by_its_calls() -> None:
    clock = Clock()
    meter = Meter(judge="j", clock=clock)

    def get() -> Any:
        clock.now += 3.0
        return SimpleNamespace(identity=SimpleNamespace(model="m"))

    assert meter.load(get).identity.model == meter.model == "m"
    usage = {
        "a": {"calls": 1.0, "prompt_tokens": 100.0, "completion_tokens": 2.0, "cost_usd": 0.5, "priced": 1.0},
        "b": {"calls": 3.0, "prompt_tokens": 300.0, "completion_tokens": 6.0, "cost_usd": 1.5, "priced": 1.0},
        "c": {"calls": 0.0, "prompt_tokens": 0.0, "completion_tokens": 0.0, "cost_usd": 0.0, "priced": 0.0},
    }
    with meter.timed("judge"):
        clock.now += 8.0
    for owner in usage:
        meter.add(owner)
    a, b, c = (meter.settle(owner, usage.__getitem__) for owner in usage)
    assert (a.load_seconds, b.load_seconds) == (3.0, 0.0)
    assert (a.judge_seconds, b.judge_seconds, c.judge_seconds) == (2.0, 6.0, 0.0)
    assert (a.judge_calls, b.judge_prompt_tokens, b.judge_completion_tokens) == (1, 300, 6)
    assert (a.judge_cost_usd, b.judge_cost_usd, c.judge_cost_usd) == (0.5, 1.5, None)


SUMMARY = {"n_positive": 1, "n_negative": 1, "model": "m", "mean_response_tokens": 3.0}


class Working:
    """A stage whose traits take what the test says."""

    name = "responses"
    code_version = "1"
    shared = False

    def __init__(self, work: dict[str, Work]) -> None:
        self.work = work

    def plan(self, ctx: StageContext, trait: Any) -> Plan:
        return Plan(trait, {}, {})

    def execute(self, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]:
        for plan in plans:
            yield Outcome(plan.trait, summary=dict(SUMMARY), work=self.work[plan.owner])


WORK = {
    "t/a": Work(
        rows=4,
        prompt_tokens=40,
        tokens=80,
        model_seconds=2.0,
        load_seconds=1.5,
        model="m",
        device="cpu x1 threads",
        judge="j",
        judge_calls=8,
        judge_prompt_tokens=900,
        judge_completion_tokens=16,
        judge_cost_usd=0.25,
    ),
    "t/b": Work(rows=2, prompt_tokens=20, tokens=20, model_seconds=3.0, model="m", device="cpu x1 threads"),
}


def test_the_index_holds_each_runs_throughput_and_spending(ctx: StageContext) -> None:
    list(pipeline.run(Working(WORK), ctx, list(WORK)))
    found = ctx.workspace.index.sql(
        "SELECT run_id, stage, model, device, results, rows, tokens, rows_per_second, tokens_per_second, "
        "judge_calls, judge_tokens, judge_cost_usd, seconds > 0, host_peak_bytes > 1e7 FROM run_work"
    )
    assert found.rows == [
        ("run-1", "responses", "m", "cpu x1 threads", 2, 6, 100, 1.2, 20.0, 8, 916, 0.25, True, True)
    ]
    per_trait = ctx.workspace.index.sql(
        "SELECT trait, tokens_per_second, load_seconds, judge_cost_usd FROM current_work ORDER BY trait"
    )
    assert per_trait.rows == [("t/a", 40.0, 1.5, 0.25), ("t/b", pytest.approx(6.6667), 0.0, None)]
    # what is up to date takes nothing, and adds no row
    list(pipeline.run(Working(WORK), ctx, list(WORK)))
    assert ctx.workspace.index.sql("SELECT count(*) FROM work").rows == [(2,)]


def test_the_ui_shows_it(ctx: StageContext) -> None:
    results = {r.trait: r for r in pipeline.run(Working(WORK), ctx, list(WORK))}
    shown = result_metadata(ctx.workspace, results["t/a"])
    text = {name: str(getattr(value, "value", value)) for name, value in shown.items()}
    assert {"rows_per_second", "tokens_per_second", "judge_tokens", "judge_cost_usd"} <= set(
        results["t/a"].manifest.summary  # type: ignore[union-attr]
    )
    # however the page words them, the numbers are on it
    everything = " ".join(text.values())
    assert "40" in everything
    assert "0.25" in everything
    assert "gpu_peak_gib" not in shown


def test_the_gpu_peak_is_summed_over_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch: the numbers of a real GPU need one."""
    reset: list[int] = []
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        reset_peak_memory_stats=reset.append,
        max_memory_allocated=lambda device: (device + 1) * (1 << 30),
        get_device_name=lambda device: "A GPU",
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, get_num_threads=lambda: 4))
    metering.reset_peaks()
    assert reset == [0, 1]
    assert metering.gpu_peak_bytes() == 3 << 30
    row = metering.record(Work(), seconds=1.0, gpu_peak_bytes=3 << 30, host_peak_bytes=None)
    assert metering.summary(row) == {"gpu_peak_gib": 3.0}
    devices = [SimpleNamespace(type="cuda"), SimpleNamespace(type="cuda")]
    assert metering.device_name(SimpleNamespace(devices=devices)) == "A GPU x2"
    assert metering.device_name(SimpleNamespace(devices=[SimpleNamespace(type="cpu")])) == "cpu x4 threads"


def test_without_a_gpu_there_is_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert metering.gpu_peak_bytes() is None
    assert metering.device_name(SimpleNamespace()) is None
    peak = metering.host_peak_bytes()
    assert peak is None or peak > 1e6
