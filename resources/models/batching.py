"""How many rows go through the model at once: from free memory, halved when it runs out.

The unit is bytes, not rows: what a batch costs is rows × bytes per row of that length, so that a limit found
on long rows lets short ones through in larger numbers. Knows configs and devices, no prompts.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil
import torch

from storage.errors import UserError

Mode = Literal["generation", "extraction", "inference"]

# what a forward pass keeps beside the tensors counted below: kernels' workspaces, masks, fragmentation
_OVERHEAD: dict[Mode, float] = {"generation": 1.25, "extraction": 1.5, "inference": 1.25}
# beyond these, a CPU gains nothing from more rows or tokens at once and answers later
_CPU_ROWS = 64
_CPU_TOKENS = 4096
_GPU_ROWS = 512
_USABLE = 0.9


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that decide memory. `bytes`: per element of the compute dtype."""

    n_layers: int
    hidden: int
    intermediate: int
    kv_width: int
    heads: int
    vocabulary: int
    bytes: int

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> Shape:
        heads = int(getattr(config, "num_attention_heads", 1) or 1)
        hidden = int(config.hidden_size)
        head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        intermediate = int(
            getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
        )
        experts = int(getattr(config, "num_experts_per_tok", None) or 1)
        return cls(
            n_layers=int(config.num_hidden_layers),
            hidden=hidden,
            intermediate=intermediate * experts,
            kv_width=kv_heads * head_dim,
            heads=heads,
            vocabulary=int(config.vocab_size),
            bytes=torch.empty(0, dtype=dtype).element_size(),
        )

    def row_bytes(self, mode: Mode, tokens: int) -> int:
        """Bytes that one row of `tokens` tokens needs while its batch is in flight.

        Forward pass: the live tensors of one block (residual in and out, attention input and output, gate and
        up projections). Generation adds the KV cache of all layers (twice while it is copied to a smaller
        batch) and one row of fp32 logits with its copy for sampling; inference adds logits for every token;
        extraction adds the fp32 copy of the hidden state that is pooled, and the pooled result of all layers.
        """
        block = tokens * (4 * self.hidden + 2 * self.intermediate + 2 * self.kv_width) * self.bytes
        if mode == "generation":
            cache = 2 * 2 * self.kv_width * tokens * self.n_layers * self.bytes
            need = block + cache + 3 * 4 * self.vocabulary
        elif mode == "extraction":
            need = block + 2 * 4 * tokens * self.hidden + 4 * self.n_layers * self.hidden
        else:
            need = block + 2 * 4 * tokens * self.vocabulary
        return int(need * _OVERHEAD[mode])


def free_bytes(devices: Sequence[torch.device]) -> int:
    """Free memory for more tensors on the fullest device; weights that are loaded are already gone from it.

    CUDA: free plus what torch has reserved and does not use. Apple Silicon: MPS_MEMORY_GB, else half the
    available unified memory. CPU: half the available memory, because other processes live there too.
    """
    found: list[int] = []
    for device in devices:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            found.append(free + idle)
        elif device.type == "mps":
            found.append(_mps_bytes())
        elif device.type == "cpu":
            found.append(psutil.virtual_memory().available // 2)
    return min(found) if found else psutil.virtual_memory().available // 2


def _mps_bytes() -> int:
    configured = os.environ.get("MPS_MEMORY_GB")
    if not configured:
        return psutil.virtual_memory().available // 2
    try:
        return int(float(configured) * 2**30)
    except ValueError as error:
        raise UserError(
            f"{configured!r} is not a number",
            where="environment variable MPS_MEMORY_GB",
            remedy="Write 16, say.",
        ) from error


class OutOfMemory(Exception):
    """A single row does not fit; carries what the user can do about it."""


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA and MPS raise their own classes or a RuntimeError; the CPU allocator's message differs again."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )


def release(error: BaseException | None) -> None:
    """Let go of what a failed forward pass holds: its traceback's frames keep every activation alive."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


@dataclass
class Batcher:
    """Batch sizes for one loaded model.

    `max_rows`: a fixed upper limit from the user (None: automatic). Out of memory lowers the byte budget of
    that mode to half of what failed; it is remembered, and since it is in bytes, shorter rows grow back by
    themselves.
    """

    shape: Shape
    devices: Sequence[torch.device]
    max_rows: int | None = None
    solo: bool = False
    budgets: dict[Mode, int] = field(default_factory=dict)
    measured: dict[Mode, float] = field(default_factory=dict)
    _told: set[tuple[Mode, int]] = field(default_factory=set)

    def row_bytes(self, mode: Mode, tokens: int) -> int:
        """The estimate, corrected by a calibration row where one was measured."""
        return max(1, int(self.shape.row_bytes(mode, tokens) * self.measured.get(mode, 1.0)))

    def rows(self, mode: Mode, tokens: int, *, free: int | None = None) -> int:
        """How many rows of `tokens` tokens may go at once (at least one).

        `free`: bytes that were free before the batch in flight took its share; by default what is free now.
        """
        if self.solo:
            return 1
        on_cpu = all(device.type == "cpu" for device in self.devices)
        usable = int((free_bytes(self.devices) if free is None else free) * _USABLE)
        budget = min(usable, self.budgets.get(mode, usable))
        limit = _CPU_ROWS if on_cpu else _GPU_ROWS
        if on_cpu and mode != "generation":
            limit = min(limit, max(1, _CPU_TOKENS // max(1, tokens)))
        return max(1, min(budget // self.row_bytes(mode, tokens), limit, self.max_rows or limit))

    def announce(self, mode: Mode, tokens: int) -> None:
        """Print the size that rows of `tokens` tokens get, once per mode and size.

        Sizes within an eighth of one already told are the same news: free memory is never twice the same.
        """
        rows = self.rows(mode, tokens)
        if any(told == mode and abs(size - rows) * 8 <= size for told, size in self._told):
            return
        self._told.add((mode, rows))
        print(
            f"Auto batch size: {rows} (mode={mode}, free={free_bytes(self.devices) / 2**30:.1f} GB,"
            f" per_seq={self.row_bytes(mode, tokens) / 2**20:.1f} MB)",
            file=sys.stderr,
            flush=True,
        )

    @contextmanager
    def calibration(self, mode: Mode, tokens: int) -> Iterator[None]:
        """Around the forward pass of one row of `tokens` tokens: on CUDA, its peak memory corrects the estimate."""
        cards = [device for device in self.devices if device.type == "cuda"]
        for card in cards:
            torch.cuda.reset_peak_memory_stats(card)
        before = [torch.cuda.memory_allocated(card) for card in cards]
        yield
        taken = [
            torch.cuda.max_memory_allocated(card) - held for card, held in zip(cards, before, strict=True)
        ]
        if taken:
            self.calibrate(mode, tokens, max(taken))

    def uncalibrated(self, mode: Mode) -> bool:
        """Whether measuring a row of this mode is possible and has not been done."""
        return mode not in self.measured and any(device.type == "cuda" for device in self.devices)

    def calibrate(self, mode: Mode, tokens: int, measured_bytes: float) -> None:
        """Correct the estimate by what one row of `tokens` tokens really took (never below a quarter of
        it).
        """
        self.measured[mode] = max(0.25, 1.1 * measured_bytes / self.shape.row_bytes(mode, tokens))

    def shrink(self, mode: Mode, rows: int, tokens: int, error: BaseException, *, row: str) -> None:
        """Remember that `rows` rows of `tokens` tokens did not fit; OutOfMemory where it was a single one."""
        release(error)
        if rows <= 1:
            raise OutOfMemory(
                f"out of memory in {mode} with a single row of {tokens} tokens (row {row!r}): use fewer new"
                " tokens, a shorter prompt, a quantised model or a larger device"
            )
        self.budgets[mode] = rows * self.row_bytes(mode, tokens) // 2
        print(
            f"Out of memory with {rows} rows (mode={mode}); going on with {rows // 2}",
            file=sys.stderr,
            flush=True,
        )
