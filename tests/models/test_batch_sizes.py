"""Batch sizes from memory: what a row is estimated to need, which memory counts, and what is remembered."""

from __future__ import annotations

import re
from typing import Any

import psutil
import pytest
import torch

from resources.models import batching
from resources.models.batching import Batcher, OutOfMemory, Shape, free_bytes, is_out_of_memory
from resources.models.rows import GenerationOptions, GenerationRow
from storage.errors import UserError

GB = 2**30
CPU = torch.device("cpu")
# Llama 3.1 8B in bfloat16: 8 key-value heads of 128, 32 layers
LLAMA_8B = Shape(32, 4096, 14336, 1024, 32, 128256, 2)


def test_the_kv_cache_is_counted_exactly() -> None:
    """2 · key-value width · layers · bytes per token, twice while it is copied: 256 KiB per token for an 8B
    Llama.
    """
    without = LLAMA_8B.row_bytes("generation", 0)
    per_token = (LLAMA_8B.row_bytes("generation", 1000) - without) / 1000 / 1.25
    block = (4 * 4096 + 2 * 14336 + 2 * 1024) * 2
    assert per_token - block == pytest.approx(2 * 2 * 1024 * 32 * 2, rel=1e-6)


def test_logits_of_every_token_are_counted_for_inference() -> None:
    assert LLAMA_8B.row_bytes("inference", 1000) > 2 * 4 * 1000 * 128256
    assert LLAMA_8B.row_bytes("extraction", 1000) < LLAMA_8B.row_bytes("inference", 1000) / 4


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_multimodal", "mixtral", "gpt_neox"])
def test_shapes_are_read_from_any_config(tiny: Any, architecture: str) -> None:
    shape = tiny.language_model(architecture).batcher.shape
    assert (shape.n_layers, shape.hidden, shape.vocabulary, shape.bytes) == (4, 32, 300, 4)
    assert shape.kv_width == (32 if architecture in ("gpt2", "gpt_neox") else 16)
    assert shape.intermediate == {"gpt2": 128, "mixtral": 96}.get(architecture, 48)


def test_free_memory_is_the_least_over_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {"cuda:0": (10 * GB, 2 * GB, GB), "cuda:1": (4 * GB, 3 * GB, GB)}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (cards[str(device)][0], 80 * GB))
    monkeypatch.setattr(cuda, "memory_reserved", lambda device: cards[str(device)][1])
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: cards[str(device)][2])
    devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    assert free_bytes(devices[:1]) == 11 * GB
    assert free_bytes(devices) == 6 * GB


def test_apple_silicon_takes_half_or_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    device = [torch.device("mps")]
    available = 12 * GB
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": available})())
    monkeypatch.delenv("MPS_MEMORY_GB", raising=False)
    assert free_bytes(device) == 6 * GB
    monkeypatch.setenv("MPS_MEMORY_GB", "9.5")
    assert free_bytes(device) == int(9.5 * GB)
    monkeypatch.setenv("MPS_MEMORY_GB", "much")
    with pytest.raises(UserError, match="MPS_MEMORY_GB: 'much' is not a number"):
        free_bytes(device)


def on_a_card(free: int, **settings: Any) -> Batcher:
    batcher = Batcher(LLAMA_8B, [torch.device("cuda:0")], **settings)
    return batcher


def test_rows_fill_the_memory_and_no_more() -> None:
    batcher = on_a_card(0)
    for mode in ("generation", "extraction", "inference"):
        rows = batcher.rows(mode, 512, free=20 * GB)  # type: ignore[arg-type]
        need = batcher.row_bytes(mode, 512)  # type: ignore[arg-type]
        assert rows * need <= 0.9 * 20 * GB < (rows + 1) * need
    assert batcher.rows("generation", 512, free=1) == 1
    assert batcher.rows("generation", 8, free=10**15) == 512
    assert on_a_card(0, max_rows=7).rows("generation", 8, free=10**15) == 7
    assert on_a_card(0, solo=True).rows("generation", 8, free=10**15) == 1


def test_a_cpu_gets_no_more_rows_than_help_it() -> None:
    batcher = Batcher(LLAMA_8B, [CPU])
    assert batcher.rows("generation", 50, free=10**15) == 64
    assert batcher.rows("extraction", 1024, free=10**15) == 4
    assert batcher.rows("extraction", 100_000, free=10**15) == 1


def test_memory_that_ran_out_is_remembered_by_mode_in_bytes() -> None:
    batcher = on_a_card(0)
    before = batcher.rows("extraction", 1000, free=40 * GB)
    batcher.shrink("extraction", before, 1000, MemoryError(), row="a")
    assert batcher.rows("extraction", 1000, free=40 * GB) == before // 2
    assert batcher.rows("extraction", 250, free=40 * GB) > 1.8 * before // 2
    assert batcher.rows("generation", 1000, free=40 * GB) == on_a_card(0).rows(
        "generation", 1000, free=40 * GB
    )
    batcher.shrink("extraction", before // 2, 1000, MemoryError(), row="a")
    assert batcher.rows("extraction", 1000, free=40 * GB) == before // 4
    with pytest.raises(OutOfMemory, match="row 'a'"):
        batcher.shrink("extraction", 1, 1000, MemoryError(), row="a")


def test_a_measured_row_corrects_the_estimate() -> None:
    batcher = on_a_card(0)
    guess = batcher.rows("extraction", 1000, free=40 * GB)
    batcher.calibrate("extraction", 1000, LLAMA_8B.row_bytes("extraction", 1000) * 2)
    assert batcher.rows("extraction", 1000, free=40 * GB) == pytest.approx(guess / 2.2, abs=1)
    batcher.calibrate("extraction", 1000, 0)
    assert batcher.rows("extraction", 1000, free=40 * GB) <= 4 * guess + 4
    assert not Batcher(LLAMA_8B, [CPU]).uncalibrated("extraction")


def test_the_line_that_tells_the_size(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.language_model("llama")
    rows = [GenerationRow("a", (1, 40, 41))]
    list(model.generate(rows, GenerationOptions(max_new_tokens=2)))
    list(model.generate(rows, GenerationOptions(max_new_tokens=2)))
    told = capsys.readouterr().err
    line = r"Auto batch size: 64 \(mode=generation, free=\d+\.\d GB, per_seq=\d+\.\d MB\)\n"
    assert re.fullmatch(line, told)


def test_a_size_is_told_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again when another size came between, nor when free memory moved a little; again for another
    mode."""
    free = [10 * GB]
    monkeypatch.setattr(batching, "free_bytes", lambda devices: free[0])
    batcher = Batcher(LLAMA_8B, [torch.device("cuda:0")])
    for tokens in (1000, 100, 1000, 100):
        batcher.announce("extraction", tokens)
    free[0] = int(9.7 * GB)
    batcher.announce("extraction", 1000)
    assert capsys.readouterr().err.count("Auto batch size") == 2
    batcher.announce("generation", 1000)
    free[0] = 5 * GB
    batcher.announce("extraction", 1000)
    told = re.findall(r"mode=(\w+), free=(\S+) GB", capsys.readouterr().err)
    assert told == [("generation", "9.7"), ("extraction", "5.0")]


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
            True,
        ),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_memory(error: BaseException, memory: bool) -> None:
    assert is_out_of_memory(error) is memory


def test_a_failed_pass_lets_go_of_its_tensors() -> None:
    """The traceback's frames would keep the activations of the failed pass alive."""
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []

    def forward() -> None:
        activation = torch.zeros(1000)
        held.append(weakref.ref(activation))
        raise MemoryError

    try:
        forward()
    except MemoryError as error:
        kept = error
    assert held[0]() is not None
    batching.release(kept)
    assert held[0]() is None
