"""Every check finds the fault it is there for, and the verdict is kept."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resources.models import selfcheck
from resources.models.rows import GenerationOptions, GenerationRow
from resources.models.selfcheck import SelfCheckError, ensure_checked, run_checks

ALL = [
    "llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3",
    "gemma3_multimodal", "olmo2", "glm4", "granite", "phi", "phi3", "gpt2", "gpt_neox",
]  # fmt: skip


@pytest.mark.parametrize("architecture", ALL)
def test_every_architecture_passes(tiny: Any, architecture: str) -> None:
    model = tiny.language_model(architecture)
    measured = run_checks(model)
    assert not model.batcher.solo
    assert measured["zero steering"] == 0
    assert max(measured[name] for name in ("padding", "device", "capture", "cached decoding")) < 1e-5
    assert measured["planted vector"] > 0.5


def spoil(model: Any, layer: int, change: Any) -> None:
    """Let `change(output, input)` alter what a block puts out."""
    block = model.anatomy.layers[layer]
    original = block.forward
    block.forward = lambda hidden_states, *args, **kwargs: change(
        original(hidden_states, *args, **kwargs), hidden_states
    )


def test_decoding_that_differs_is_found(tiny: Any) -> None:
    """A block that treats a lone token differently, as a broken cache does."""
    model = tiny.language_model("llama")
    spoil(model, 1, lambda out, given: out * 1.1 if given.shape[1] == 1 else out)
    with pytest.raises(SelfCheckError, match="'cached decoding' failed") as caught:
        run_checks(model)
    assert caught.value.check == "cached decoding"


def test_a_device_that_computes_wrongly_is_found(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that is right in float32 and wrong in the model's dtype, as devices have had it."""
    from resources.models.language_model import LanguageModel

    network = tiny.network("llama").to(torch.bfloat16)
    model = LanguageModel(network, tiny.byte_tokenizer(), tiny.identity("llama"))
    original = torch.nn.functional.scaled_dot_product_attention

    def wrong(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = original(query, *args, **kwargs)
        return out if query.dtype == torch.float32 else out * 1.2

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    with pytest.raises(SelfCheckError, match="'device' failed: cpu differs from the CPU") as caught:
        run_checks(model)
    assert caught.value.check == "device"


def test_steering_that_does_nothing_is_found(tiny: Any) -> None:
    """Hooks whose result is ignored, as a compiled or fused model ignores them."""

    def ignoring(block: Any, *args: Any, **kwargs: Any) -> Any:
        out = block.forward(*args, **kwargs)
        for hook in list(block._forward_hooks.values()):
            hook(block, args, out)
        return out

    model = tiny.language_model("llama")
    for layer in model.anatomy.layers:
        layer.__class__ = type("Fused", (type(layer),), {"__call__": ignoring})
    with pytest.raises(SelfCheckError, match="'planted vector' failed"):
        run_checks(model)


def test_hooks_that_change_bits_are_found(tiny: Any) -> None:
    """A block whose output is not what the next one receives while a hook stands on it."""
    model = tiny.language_model("llama")
    block = model.anatomy.layers[2]
    spoil(model, 2, lambda out, given: out * 1.01 if len(block._forward_hooks) else out)
    with pytest.raises(SelfCheckError, match="failed") as caught:
        run_checks(model)
    assert caught.value.check in ("zero steering", "capture")


def test_capture_that_differs_from_the_model_is_found(tiny: Any) -> None:
    """A block that acts otherwise when hidden states are asked for."""
    model = tiny.language_model("llama")
    original = model.anatomy.decoder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        model.asked = bool(kwargs.get("output_hidden_states"))
        return original(*args, **kwargs)

    model.anatomy.decoder.forward = forward
    spoil(model, 0, lambda out, given: out + 1 if model.asked else out)
    with pytest.raises(SelfCheckError, match="'capture' failed"):
        run_checks(model)


def test_a_model_that_padding_disturbs_goes_on_row_by_row(tiny: Any) -> None:
    """A block that looks at its neighbours in the batch."""
    model = tiny.language_model("llama")
    spoil(model, 1, lambda out, given: out + 0.1 * given.mean(dim=0, keepdim=True) if len(given) > 1 else out)
    with pytest.warns(UserWarning, match="going on with one row at a time"):
        run_checks(model)
    assert model.batcher.solo
    sizes: list[int] = []
    handle = model.anatomy.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    rows = [GenerationRow(str(index), (1, 40 + index, 50)) for index in range(3)]
    found = {row.key: row.ids for row in model.generate(rows, GenerationOptions(max_new_tokens=4))}
    handle.remove()
    assert set(sizes) == {1}
    alone = {row.key: next(model.generate([row], GenerationOptions(max_new_tokens=4))).ids for row in rows}
    assert found == alone


def test_hidden_states_that_are_missing_stop_nothing(tiny: Any) -> None:
    """Some classes give None without a word; capture does not depend on them."""
    model = tiny.language_model("llama")
    original = model.anatomy.decoder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("output_hidden_states", None)
        return original(*args, **kwargs)

    model.anatomy.decoder.forward = forward
    assert run_checks(model)["capture"] < 1e-6


def test_the_verdict_is_kept(tiny: Any, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    original = selfcheck.run_checks

    def counted(model: Any) -> Any:
        ran.append(model)
        return original(model)

    monkeypatch.setattr(selfcheck, "run_checks", counted)
    model = tiny.language_model("llama")
    ensure_checked(model)
    ensure_checked(tiny.language_model("llama"))
    assert len(ran) == 1
    monkeypatch.setattr(selfcheck.transformers, "__version__", "99.0")
    ensure_checked(model)
    assert len(ran) == 2
    records = list((cache_folder / "selfcheck").glob("*.json"))
    assert len(records) == 2
    for record in records:
        kept = json.loads(record.read_text())
        assert kept["measured"]["zero steering"] == 0
        record.write_text(json.dumps({**kept, "solo": True}))
    ensure_checked(model)
    assert model.batcher.solo
    assert len(ran) == 2
    for record in records:
        record.write_text("{ half a reco")
    ensure_checked(tiny.language_model("llama"))
    assert len(ran) == 3


def test_a_failure_is_not_kept(tiny: Any, cache_folder: Path) -> None:
    model = tiny.language_model("llama")
    spoil(model, 1, lambda out, given: out * 1.1 if given.shape[1] == 1 else out)
    for _ in range(2):
        with pytest.raises(SelfCheckError):
            ensure_checked(model)
    assert list((cache_folder / "selfcheck").glob("*.json")) == []


def test_lower_precision_passes_with_its_own_tolerance(tiny: Any) -> None:
    from resources.models.language_model import LanguageModel

    network = tiny.network("gemma3").to(torch.bfloat16)
    model = LanguageModel(network, tiny.byte_tokenizer(), tiny.identity("gemma3"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured = run_checks(model)
    assert np.isfinite(list(measured.values())).all()
