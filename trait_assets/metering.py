"""What a stage's work took: rows, tokens, seconds, memory, what a judge was paid. Counted while it runs.

Rows of many traits share one batch, so time is measured for the batch and shared out when a trait is done, in
proportion to its tokens (of the judge: its calls). The parts of all traits of a run add up to what was
measured. What is done with the numbers (index, UI, planning) is decided elsewhere; nothing here imports torch.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from resources.models.rows import ModelIdentity

T = TypeVar("T")
M = TypeVar("M", bound="HasIdentity")
GIB = float(1 << 30)


class HasIdentity(Protocol):
    """A model, loaded or served."""

    identity: ModelIdentity


@dataclass(frozen=True)
class Work:
    """One trait's part of a stage's work.

    `rows`, `prompt_tokens`, `tokens`: what went through the model anew (cached rows took nothing), tokens are
    those generated, or captured; `model_seconds`, `judge_seconds`: this trait's share of the time spent there;
    `load_seconds`: loading the model, named by the first trait that needed it. `judge_cost_usd` is None where
    nobody said a price.
    """

    rows: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    model_seconds: float = 0.0
    judge_seconds: float = 0.0
    load_seconds: float = 0.0
    model: str | None = None
    device: str | None = None
    judge: str | None = None
    judge_calls: int = 0
    judge_prompt_tokens: int = 0
    judge_completion_tokens: int = 0
    judge_cost_usd: float | None = None


@dataclass
class Meter:
    """Counts and clocks of one stage in one process. `owner` is a trait."""

    model: str | None = None
    device: str | None = None
    judge: str | None = None
    clock: Callable[[], float] = time.perf_counter
    _counts: dict[str, Counter[str]] = field(default_factory=dict)
    _pools: Counter[str] = field(default_factory=Counter)
    _load: float = 0.0

    def add(self, owner: str, **counts: int) -> None:
        """`rows`, `tokens`, `prompt_tokens` that the model has done anew."""
        self._counts.setdefault(owner, Counter()).update(counts)

    def load(self, get: Callable[[], M]) -> M:
        """The model that `get` gives; the time it takes is named by the first trait that is settled."""
        started = self.clock()
        model = get()
        self._load += self.clock() - started
        self.model, self.device = model.identity.model, device_name(model)
        return model

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time spent here belongs to `name`: model or judge."""
        started = self.clock()
        try:
            yield
        finally:
            self._pools[name] += self.clock() - started  # type: ignore[assignment]

    def each(self, name: str, results: Iterator[T]) -> Iterator[T]:
        """The same results; the time until each one comes belongs to `name`, what is done with it does not."""
        while True:
            with self.timed(name):
                try:
                    result = next(results)
                except StopIteration:
                    return
            yield result

    def settle(self, owner: str, usage_of: Callable[[str], Mapping[str, float]] | None = None) -> Work:
        """The trait is done: its counts and its share of the time. `usage_of(trait)`: the judge's part of it, as
        `Judge.usage` says."""
        counts = self._counts.setdefault(owner, Counter())
        if usage_of is not None:
            for trait, counted in self._counts.items():
                counted["calls"] = int(usage_of(trait).get("calls", 0))
        usage = usage_of(owner) if usage_of is not None else {}
        seconds = {
            "model": self._share(owner, "model", ("tokens", "prompt_tokens", "rows")),
            "judge": self._share(owner, "judge", ("calls", "rows")),
        }
        self._counts.pop(owner)
        load, self._load = self._load, 0.0
        return Work(
            rows=counts["rows"],
            prompt_tokens=counts["prompt_tokens"],
            tokens=counts["tokens"],
            model_seconds=seconds["model"],
            judge_seconds=seconds["judge"],
            load_seconds=load,
            model=self.model,
            device=self.device,
            judge=self.judge,
            judge_calls=int(usage.get("calls", 0)),
            judge_prompt_tokens=int(usage.get("prompt_tokens", 0)),
            judge_completion_tokens=int(usage.get("completion_tokens", 0)),
            judge_cost_usd=float(usage["cost_usd"]) if usage.get("priced") else None,
        )

    def _share(self, owner: str, pool: str, weights: tuple[str, ...]) -> float:
        for weight in weights:
            everything = sum(counts[weight] for counts in self._counts.values())
            if everything:
                share = self._pools[pool] * self._counts[owner][weight] / everything
                self._pools[pool] -= share  # type: ignore[assignment]
                return float(share)
        return 0.0


def record(
    work: Work, *, seconds: float, gpu_peak_bytes: int | None, host_peak_bytes: int | None
) -> dict[str, Any]:
    """The row of the table `work`. `seconds`: from the trait before (or the start) until this one was done, so
    that they add up to the stage's duration in the run."""
    return {
        "table": "work",
        "seconds": round(seconds, 4),
        "model": work.model,
        "device": work.device,
        "rows": work.rows,
        "prompt_tokens": work.prompt_tokens,
        "tokens": work.tokens,
        "model_seconds": round(work.model_seconds, 4),
        "load_seconds": round(work.load_seconds, 4),
        "rows_per_second": _rate(work.rows, work.model_seconds),
        "tokens_per_second": _rate(work.tokens, work.model_seconds),
        "gpu_peak_bytes": gpu_peak_bytes,
        "host_peak_bytes": host_peak_bytes,
        "judge": work.judge,
        "judge_seconds": round(work.judge_seconds, 4),
        "judge_calls": work.judge_calls,
        "judge_prompt_tokens": work.judge_prompt_tokens,
        "judge_completion_tokens": work.judge_completion_tokens,
        "judge_cost_usd": work.judge_cost_usd,
    }


def summary(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of it the UI shows: only what there was."""
    shown: dict[str, Any] = {}
    for name in ("rows_per_second", "tokens_per_second"):
        if row[name] is not None:
            shown[name] = round(row[name], 2)
    if row["gpu_peak_bytes"]:
        shown["gpu_peak_gib"] = round(row["gpu_peak_bytes"] / GIB, 2)
    if row["judge_prompt_tokens"]:
        shown["judge_tokens"] = row["judge_prompt_tokens"] + row["judge_completion_tokens"]
    if row["judge_cost_usd"] is not None:
        shown["judge_cost_usd"] = round(row["judge_cost_usd"], 6)
    return shown


def _rate(amount: float, seconds: float) -> float | None:
    return round(amount / seconds, 4) if amount and seconds > 0 else None


def device_name(model: Any) -> str | None:
    """What a loaded model computes on, the same for equal machines: "NVIDIA H100 80GB HBM3 x2",
    "cpu x2 threads", "mps". None for a model that is not loaded here."""
    devices = getattr(model, "devices", None)
    torch = sys.modules.get("torch")
    if not devices or torch is None:
        return None
    if devices[0].type == "cuda":
        name = str(torch.cuda.get_device_name(devices[0]))
        return name if len(devices) == 1 else f"{name} x{len(devices)}"
    if devices[0].type == "cpu":
        return f"cpu x{torch.get_num_threads()} threads"
    return str(devices[0].type)


def reset_peaks() -> None:
    """The GPU's peak is counted from here."""
    for torch, device in _cuda():
        torch.cuda.reset_peak_memory_stats(device)


def gpu_peak_bytes() -> int | None:
    """Most memory that torch held since `reset_peaks`, over all GPUs; None without one."""
    peaks = [int(torch.cuda.max_memory_allocated(device)) for torch, device in _cuda()]
    return sum(peaks) if peaks else None


def host_peak_bytes() -> int | None:
    """Most resident memory of this process so far; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _cuda() -> list[tuple[Any, int]]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return []
    return [(torch, device) for device in range(torch.cuda.device_count())]
