"""From a spec to a loaded model, and the pool that keeps loaded models for the life of the process.

Device and dtype are settled here. Who a model is was settled by `identity` before; what it can do is
`language_model`'s business.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import psutil
import torch

from resources.models.embedded import PREFIX, converted_folder
from resources.models.identity import identify, local_path
from resources.models.language_model import LanguageModel
from resources.models.rows import ModelIdentity, ModelSpec
from resources.models.selfcheck import ensure_checked
from storage.errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# room for activations that a freshly loaded model must leave on its device
_HEADROOM = 1.15


def load(
    spec: ModelSpec,
    *,
    identity: ModelIdentity | None = None,
    max_batch_rows: int | None = None,
) -> LanguageModel:
    """Load what the spec names, at the very revision its identity names.

    Raises UserError for what cannot be found or combined, and SelfCheckError where the model does not behave
    as everything downstream relies on.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    identity = identity or identify(spec)
    device = resolve_device(spec.device)
    dtype = resolve_dtype(spec.dtype, device)
    source, extra = model_source(spec, identity)
    placement = _placement(spec, device)
    quantization = _quantization(spec, device, dtype)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=spec.trust_remote_code, **extra)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=spec.trust_remote_code,
            **extra,
            **placement,
            **quantization,
        )
        if spec.adapter is not None:
            model = _with_adapter(model, spec.adapter, identity)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                "brings code of its own, which is not run unasked",
                where=f"model {spec.model!r}",
                remedy="Read that code, then set trust_remote_code on the models resource if you trust it.",
            ) from error
        raise UserError(
            f"cannot be loaded: {str(error).strip().splitlines()[0]}",
            where=f"model {spec.model!r}",
            remedy="Check that it is a causal language model that this transformers version knows.",
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if not placement and not quantization:
        model.to(device)  # type: ignore[arg-type]
    loaded = LanguageModel(model, tokenizer, identity, max_batch_rows=max_batch_rows)
    ensure_checked(loaded)
    return loaded


def resolve_device(device: str) -> torch.device:
    """`auto`: CUDA, else Apple Silicon, else the CPU. UserError for a device that is not there."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(
            f"unknown device {device!r}", where="device", remedy="Use auto, cpu, cuda, cuda:1 or mps."
        ) from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (wanted.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(wanted.type, False):
        raise UserError(f"device {device!r} is not available here", where="device", remedy="Use auto or cpu.")
    return wanted


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU, float32 on the CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in _DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", where="dtype", remedy=f"Use auto, {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def model_source(spec: ModelSpec, identity: ModelIdentity) -> tuple[str, dict[str, Any]]:
    """What from_pretrained is given: a folder, or a hub id pinned to its commit, or a GGUF file in its
    folder.
    """
    if spec.model.startswith(PREFIX):
        return str(converted_folder(spec.model)), {}
    path = local_path(spec.model)
    if path is None:
        return spec.model, {"revision": identity.revision}
    if path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return str(path), {}


def _placement(spec: ModelSpec, device: torch.device) -> dict[str, Any]:
    """`device_map`: a strategy of accelerate (auto, balanced, …), or a JSON object of module name to
    device.
    """
    if spec.device_map is None:
        return {}
    mapping: Any = spec.device_map
    if mapping.lstrip().startswith("{"):
        try:
            mapping = json.loads(mapping)
        except ValueError as error:
            raise UserError(f"is not JSON: {error}", where="device_map") from error
    elif mapping not in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise UserError(
            f"unknown device_map {mapping!r}",
            where="device_map",
            remedy="Use auto, balanced, balanced_low_0, sequential, or JSON of module names to devices.",
        )
    placement: dict[str, Any] = {"device_map": mapping}
    if isinstance(mapping, str) or "disk" in mapping.values():
        from resources.models.embedded import cache_root

        placement["offload_folder"] = str(cache_root() / "offload")
    return placement


def _quantization(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    if spec.quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{spec.quantization} quantisation needs bitsandbytes",
            where=f"model {spec.model!r}",
            remedy="Run: pip install bitsandbytes",
        )
    from transformers import BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        if spec.quantization == "4bit"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    placement = {} if spec.device_map else {"device_map": {"": str(device)}}
    return {"quantization_config": config, **placement}


def _with_adapter(model: Any, adapter: str, identity: ModelIdentity) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise UserError("an adapter needs peft", where=f"adapter {adapter!r}", remedy="Run: pip install peft")
    from peft import PeftModel

    path = local_path(adapter)
    extra = {} if path is not None else {"revision": identity.extra["adapter_revision"]}
    return PeftModel.from_pretrained(model, str(path or adapter), is_trainable=False, **extra)


class ModelPool:
    """Loaded models by spec. `get` loads on first use; `loads` counts how often that happened.

    Before a load, models that were used least recently go, until the estimate of the new weights fits the
    device's free memory. A model that somebody still holds stays alive for them; the pool only stops keeping
    it.
    """

    def __init__(self) -> None:
        self.loads = 0
        self._models: OrderedDict[ModelSpec, LanguageModel] = OrderedDict()
        self._lock = threading.RLock()

    def get(
        self, spec: ModelSpec, *, max_batch_rows: int | None = None, identity: ModelIdentity | None = None
    ) -> LanguageModel:
        with self._lock:
            identity = identity or identify(spec)
            kept = self._models.get(spec)
            if kept is not None and kept.identity == identity:
                self._models.move_to_end(spec)
                kept.batcher.max_rows = max_batch_rows
                return kept
            if kept is not None:
                # the files behind the spec changed
                del self._models[spec]
                del kept
            self._make_room(spec, identity)
            self.loads += 1
            model = load(spec, identity=identity, max_batch_rows=max_batch_rows)
            self._models[spec] = model
            return model

    def __contains__(self, spec: ModelSpec) -> bool:
        return spec in self._models

    def clear(self) -> None:
        with self._lock:
            self._models.clear()
            _collect()

    def _make_room(self, spec: ModelSpec, identity: ModelIdentity) -> None:
        device = resolve_device(spec.device)
        need = int(weight_bytes(spec, identity, resolve_dtype(spec.dtype, device)) * _HEADROOM)
        while self._models and device_bytes(device) < need:
            self._models.popitem(last=False)
            _collect()


def device_bytes(device: torch.device) -> int:
    """Free memory for weights on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return int(psutil.virtual_memory().available)


def weight_bytes(spec: ModelSpec, identity: ModelIdentity, dtype: torch.dtype) -> int:
    """Estimated bytes of the weights in the dtype they will be loaded in; 0 where the files are not here
    yet.
    """
    files = _weight_files(spec, identity)
    stored = sum(path.stat().st_size for path in files)
    if any(path.suffix == ".gguf" for path in files):
        # four to eight bits per weight become sixteen or thirty-two
        return stored * (8 if dtype == torch.float32 else 4)
    in_files = _stored_element_bytes(files)
    wanted = {"4bit": 0.6, "8bit": 1.1, None: float(torch.empty(0, dtype=dtype).element_size())}[
        spec.quantization
    ]
    return int(stored * wanted / in_files)


def _weight_files(spec: ModelSpec, identity: ModelIdentity) -> list[Path]:
    if spec.model.startswith(PREFIX):
        folder = converted_folder(spec.model)
    else:
        path = local_path(spec.model)
        if path is None:
            from huggingface_hub import constants

            name = "models--" + spec.model.replace("/", "--")
            path = Path(constants.HF_HUB_CACHE) / name / "snapshots" / identity.revision
        if path.is_file():
            return [path]
        folder = path
    if not folder.is_dir():
        return []
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def _stored_element_bytes(files: list[Path]) -> float:
    """Bytes per weight in the first safetensors file (2 where that cannot be told)."""
    sizes = {"F32": 4, "F64": 8, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1}
    for path in files:
        if path.suffix == ".safetensors":
            with path.open("rb") as handle:
                header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
            kinds = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
            return float(sizes.get(max(set(kinds), key=kinds.count), 2)) if kinds else 2.0
    return 2.0


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


POOL = ModelPool()
# a forked child must not use its parent's device contexts
os.register_at_fork(after_in_child=POOL.clear) if hasattr(os, "register_at_fork") else None
