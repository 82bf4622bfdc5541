"""Loading and the pool: folders, GGUF, adapters, several devices, eviction, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resources.models import embedded, loading
from resources.models.loading import ModelPool, load, resolve_device, resolve_dtype, weight_bytes
from resources.models.rows import CaptureRow, GenerationOptions, GenerationRow, Intervention, ModelSpec
from resources.models.selfcheck import SelfCheckError
from storage.errors import UserError

PROMPT = (1, 40, 41, 42, 43, 44, 45)


@pytest.fixture
def saved(tiny: Any, tmp_path: Path, cache_folder: Path) -> Any:
    """Save a tiny model with its tokenizer; gives the folder."""

    def save(architecture: str = "llama", seed: int = 0, name: str = "model") -> str:
        folder = tmp_path / name
        tiny.network(architecture, seed).save_pretrained(folder)
        tiny.byte_tokenizer(tiny.CHAT).save_pretrained(folder)
        return str(folder)

    return save


def states(model: Any) -> np.ndarray:
    return next(model.capture([CaptureRow("a", PROMPT)], ["all[:]"])).pooled["all[:]", "residual"]


def test_a_folder(saved: Any, tiny: Any) -> None:
    model = load(ModelSpec(saved()))
    np.testing.assert_allclose(states(model), states(tiny.language_model("llama")), rtol=1e-6, atol=1e-6)
    assert model.has_chat_template
    assert model.dtype == torch.float32
    assert model.identity.dtype == "auto"
    assert not model.model.training


def test_dtype_is_what_was_asked(saved: Any) -> None:
    model = load(ModelSpec(saved(), dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert states(model).dtype == np.float32


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_a_model_over_two_devices(saved: Any, where: str, plainly: Any) -> None:
    """accelerate keeps half of the blocks elsewhere and brings them in: everything gives what one device gives."""
    folder = saved()
    placement = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    placement |= {f"model.layers.{layer}": "cpu" if layer < 2 else where for layer in range(4)}
    whole = load(ModelSpec(folder))
    split = load(ModelSpec(folder, device_map=json.dumps(placement)))
    np.testing.assert_allclose(states(split), states(whole), rtol=1e-6, atol=1e-6)
    rows = [
        GenerationRow("plain", PROMPT),
        GenerationRow("steered", PROMPT[:4], (Intervention(3, plainly.unit(1, 32), 3.0),)),
    ]
    options = GenerationOptions(max_new_tokens=6)
    expected = {row.key: row.ids for row in whole.generate(rows, options)}
    assert {row.key: row.ids for row in split.generate(rows, options)} == expected
    if where == "disk":
        assert any(parameter.device.type == "meta" for parameter in split.model.parameters())


def test_an_adapter_is_in_what_is_captured(saved: Any, tiny: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = saved()
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(tiny.network("llama"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    plain = load(ModelSpec(folder))
    model = load(ModelSpec(folder, adapter=str(tmp_path / "adapter")))
    assert model.components == plain.components
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        hidden = merged(input_ids=torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
    expected = np.stack([hidden[layer + 1][0].mean(0).numpy() for layer in range(3)])
    np.testing.assert_allclose(states(model)[:3], expected, rtol=1e-4, atol=1e-4)
    assert np.abs(states(model) - states(plain)).max() > 0.01
    ids = torch.tensor([PROMPT])
    theirs = merged.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=None
    )
    model.set_stops(frozenset())
    ours = next(model.generate([GenerationRow("a", PROMPT)], GenerationOptions(max_new_tokens=6)))
    assert ours.ids == tuple(theirs[0, len(PROMPT) :].tolist())


def test_what_cannot_be_loaded(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(saved())
    with pytest.raises(UserError, match="unknown device 'tpux'"):
        load(ModelSpec(str(folder), device="tpux"))
    with pytest.raises(UserError, match="is not available here"):
        load(ModelSpec(str(folder), device="cuda:99"))
    with pytest.raises(UserError, match="unknown device_map 'everywhere'"):
        load(ModelSpec(str(folder), device_map="everywhere"))
    with pytest.raises(UserError, match="device_map: is not JSON"):
        load(ModelSpec(str(folder), device_map="{model"))
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load(ModelSpec(str(folder), quantization="4bit"))
    monkeypatch.undo()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load(ModelSpec(str(folder)))


def test_remote_code_does_not_run(saved: Any) -> None:
    """A repository that brings its own code is refused unless that was turned on."""
    folder = Path(saved())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(UserError, match="trust_remote_code"):
        load(ModelSpec(str(folder)))


def test_auto_settings() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("mps")) == torch.bfloat16
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="unknown dtype 'float8'"):
        resolve_dtype("float8", torch.device("cpu"))


def test_the_pool_loads_once(saved: Any) -> None:
    pool = ModelPool()
    spec = ModelSpec(saved())
    first = pool.get(spec)
    assert pool.get(spec) is first
    assert pool.get(ModelSpec(spec.model), max_batch_rows=3) is first
    assert first.batcher.max_rows == 3
    assert pool.loads == 1
    pool.get(ModelSpec(spec.model, dtype="bfloat16"))
    assert pool.loads == 2


def test_the_pool_notices_that_the_files_changed(saved: Any) -> None:
    pool = ModelPool()
    spec = ModelSpec(saved(seed=0))
    before = states(pool.get(spec))
    saved(seed=1)
    after = states(pool.get(spec))
    assert pool.loads == 2
    assert np.abs(before - after).max() > 0.1


def test_the_pool_makes_room(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used model goes when the next one would not fit, and only then."""
    specs = [ModelSpec(saved(seed=seed, name=f"model {seed}")) for seed in range(3)]
    need = weight_bytes(specs[0], loading.identify(specs[0]), torch.float32)
    weights = sum(p.numel() * 4 for p in load(specs[0]).model.parameters())
    assert need == pytest.approx(weights, rel=0.1)
    half = weight_bytes(specs[0], loading.identify(specs[0]), torch.bfloat16)
    assert half == pytest.approx(need / 2, rel=0.01)
    pool = ModelPool()
    monkeypatch.setattr(loading, "device_bytes", lambda device: int((2.5 - len(pool._models)) * 1.15 * need))
    pool.get(specs[0])
    pool.get(specs[1])
    assert all(spec in pool for spec in specs[:2])
    pool.get(specs[0])
    pool.get(specs[2])
    assert specs[1] not in pool
    assert specs[0] in pool
    assert pool.loads == 3
    pool.clear()
    assert specs[0] not in pool


def test_a_failing_check_leaves_nothing_in_the_pool(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Any) -> None:
        raise SelfCheckError("capture", "differs", where="model")

    monkeypatch.setattr(loading, "ensure_checked", fail)
    pool = ModelPool()
    spec = ModelSpec(saved())
    with pytest.raises(SelfCheckError, match="self-check 'capture' failed"):
        pool.get(spec)
    assert spec not in pool


def test_the_resource_hands_out_pooled_models(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from resources.models.resource import ModelResource

    pool = ModelPool()
    monkeypatch.setattr(loading, "POOL", pool)
    resource = ModelResource(dtype="bfloat16", max_batch_rows=2)
    spec = resource.spec(saved())
    assert spec.dtype == "bfloat16"
    assert spec.trust_remote_code is False
    assert resource.identify(spec).dtype == "bfloat16"
    assert resource.has_chat_template(spec) is True
    model = resource.get(spec)
    assert resource.get(spec) is model
    assert model.batcher.max_rows == 2
    assert pool.loads == 1


def convert_slowly(folder: str, log: str) -> None:
    """In another process: convert the embedded model, noting each real conversion."""
    import os
    import time

    os.environ["TRAITS_CACHE"] = folder

    def convert(gguf: Path, target: Path) -> None:
        with Path(log).open("a") as stream:
            stream.write("converted\n")
        time.sleep(0.5)
        (target / "model.safetensors").write_bytes(b"weights")

    embedded.convert_gguf = convert
    embedded.converted_folder(embedded.DEFAULT_MODEL)


def test_two_processes_convert_once(tmp_path: Path, cache_folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    processes = [context.Process(target=convert_slowly, args=(str(cache_folder), str(log))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "converted\n"


def test_a_broken_conversion_leaves_nothing(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(embedded, "convert_gguf", fail)
    with pytest.raises(OSError, match="No space"):
        embedded.converted_folder(embedded.DEFAULT_MODEL)
    assert [path.name for path in (cache_folder / "embedded").iterdir() if path.is_dir()] == []


def test_what_a_killed_conversion_left_is_removed(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = embedded.embedded(embedded.DEFAULT_MODEL)
    abandoned = cache_folder / "embedded" / f"{made.name}-{embedded.package_version(made)}-v1.abc.partial"
    abandoned.mkdir(parents=True)
    (abandoned / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(embedded, "convert_gguf", lambda gguf, target: (target / "weights").write_bytes(b"w"))
    folder = embedded.converted_folder(embedded.DEFAULT_MODEL)
    assert [path for path in (cache_folder / "embedded").iterdir() if path.is_dir()] == [folder]


@pytest.mark.slow
def test_a_gguf_file_is_what_its_conversion_is(smollm2: Any, tmp_path: Path, cache_folder: Path) -> None:
    """The packaged GGUF read directly, and the safetensors that the embedded model was converted to."""
    source = embedded.embedded(embedded.DEFAULT_MODEL).gguf()
    shutil.copy(source, tmp_path / "model.gguf")
    model = load(ModelSpec(str(tmp_path / "model.gguf")))
    prompt = model.encode("What is the capital of France?", chat=True)
    assert prompt == smollm2.encode("What is the capital of France?", chat=True)
    rows = [CaptureRow("a", prompt.ids)]
    direct, converted = (next(each.capture(rows, ["all[:]"])) for each in (model, smollm2))
    np.testing.assert_allclose(
        direct.pooled["all[:]", "residual"], converted.pooled["all[:]", "residual"], rtol=1e-4, atol=1e-3
    )
