"""Vectors in other programs' files, and back.

Belongs here: four formats, each with what it says and cannot say about a vector, and the checks before a
foreign vector is let in. Does not: fitting, steering, the store's own form (`vector.py`).

- `pt`: one file per layer, `vectors/{position}/{component}/{method}/layer{N}.pt`, a plain [hidden] tensor
  whose length is the raw norm, beside metadata.json; activations as `{train,val}_all_layers.pt`.
- `safetensors`: one self-describing file with all layers.
- `gguf`: a control vector for llama.cpp: `direction.{N}` is added to the output of block N (0-based) at every
  position, the prompt's too; block 0 cannot be reached, only the residual stream can. Each direction has the
  length of the median ‖h‖ of its layer, so the scale given to llama.cpp is the dose.
- `persona`: the layout of the persona vectors code: one tensor [layers + 1, hidden], row 0 for the embedding,
  row k + 1 for the output of block k; absent layers are zero.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from resources.models.positions import Position
from storage.artifacts import ArtifactStore, FileRecord, encode_json
from storage.errors import UserError
from trait_assets.vectors.vector import VectorFile, load_vectors, vector_folder

if TYPE_CHECKING:
    from storage.workspace import Workspace

Format = Literal["pt", "safetensors", "gguf", "persona"]
FORMATS: tuple[Format, ...] = ("pt", "safetensors", "gguf", "persona")
LAYER_CONVENTION = "0-based; component residual is the output of that block, before any final norm"
_GGUF_ARCHITECTURE = "controlvector"
# Facts that llama.cpp does not read, under our own prefix, so that a file can say what it is.
_GGUF_OWN = "trait_vectors"
_LAYER_FILE = re.compile(r"layer(\d+)\.pt")
_METHOD = re.compile(r"[A-Za-z0-9_+-]{1,80}")
_DIRECTION = re.compile(r"direction\.(\d+)")

# Hugging Face's model_type → llama.cpp's architecture, where they differ.
_LLAMA_CPP = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_neox": "gptneox",
    "gpt_bigcode": "starcoder",
    "phi": "phi2",
    "phimoe": "phimoe",
    "granitemoe": "granitemoe",
    "olmo_1124": "olmo2",
    "cohere": "command-r",
}


@dataclass(frozen=True)
class Exported:
    """A written file; `note` says what the reader must know, such as layers that the format cannot hold."""

    path: Path
    format: Format
    layers: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Fit:
    """What a foreign vector must fit. None: not checked. `model`: the identity record's `model`."""

    width: int | None = None
    n_layers: int | None = None
    model: str | None = None
    component: str = "residual"


# Export


def export_vectors(
    workspace: Workspace,
    experiment: str,
    trait: str,
    out: Path,
    *,
    format: Format,
    positions: Iterable[str] | None = None,
    components: Iterable[str] | None = None,
    methods: Iterable[str] | None = None,
    layers: Sequence[int] | None = None,
    architecture: str | None = None,
) -> list[Exported]:
    """Write the trait's current vectors under the folder `out`; narrows by position, component, method,
    layers.

    `architecture`: llama.cpp's name of the model's architecture, for `gguf`; found out where it can be.
    UserError when there are no such vectors, they are damaged, or the format cannot hold them.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", where="--format", remedy=f"Use {', '.join(FORMATS)}.")
    files = _chosen(workspace, experiment, trait, positions, components, methods)
    written: list[Exported] = []
    for file in files:
        chosen = file if layers is None else file.select(list(layers))
        if format == "pt":
            written.append(_export_pt(chosen, out, experiment))
        elif format == "safetensors":
            path = out / f"{_name(chosen)}.safetensors"
            _write(path, chosen.pack())
            written.append(Exported(path, format, tuple(chosen.layers)))
        elif format == "gguf":
            written.append(_export_gguf(chosen, out, architecture))
        else:
            written.append(_export_persona(chosen, out))
    return written


def _chosen(
    workspace: Workspace,
    experiment: str,
    trait: str,
    positions: Iterable[str] | None,
    components: Iterable[str] | None,
    methods: Iterable[str] | None,
) -> list[VectorFile]:
    stored: dict[str, FileRecord] = {}
    for stage in ("imported_vectors", "vectors"):
        manifest = workspace.manifests.read(experiment, stage, trait)
        stored |= {} if manifest is None else manifest.files
    if not stored:
        raise UserError(f"{trait} has no vectors in {experiment}", remedy="Materialise `vectors` first.")
    wanted = [None if choice is None else set(choice) for choice in (positions, components, methods)]
    files = []
    for key, record in sorted(stored.items()):
        if not key.endswith("/vectors.safetensors"):
            continue
        data = workspace.store.read_bytes(key, record)
        file = VectorFile.from_bytes(data, workspace.store.describe(key))
        own = (file.position, file.component, file.method)
        if all(choice is None or value in choice for choice, value in zip(wanted, own, strict=True)):
            files.append(file)
    if not files:
        raise UserError(
            f"{trait} has no vectors like that in {experiment}",
            remedy="Leave out what narrows it, or add it to the experiment and materialise `vectors`.",
        )
    return files


def _name(file: VectorFile) -> str:
    trait = file.trait.replace("/", ".")
    return f"{trait}.{Position.parse(file.position).folder}.{file.component}.{file.method}"


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, like every file of ours."""
    store = ArtifactStore(path.parent)
    store.write_bytes(path.name, data)


def _torch_bytes(tensor: np.ndarray) -> bytes:
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(torch.from_numpy(np.array(tensor, dtype=np.float32)), buffer)
    return buffer.getvalue()


def _lengths(file: VectorFile) -> np.ndarray:
    """[L, d]: each direction with its raw norm as length."""
    return file.directions.astype(np.float32) * np.asarray(file.raw_norm, dtype=np.float32)[:, None]


def _export_pt(file: VectorFile, out: Path, experiment: str) -> Exported:
    folder = out / vector_folder(experiment, file.trait, file.position, file.component, file.method)
    for layer, vector in zip(file.layers, _lengths(file), strict=True):
        _write(folder / f"layer{layer}.pt", _torch_bytes(vector))
    record = file.record()
    model = record.get("model")
    record["model_identity"] = model
    record["model"] = model.get("model") if isinstance(model, Mapping) else model
    _write(folder / "metadata.json", encode_json(record))
    return Exported(folder, "pt", tuple(file.layers))


def export_activations(workspace: Workspace, experiment: str, trait: str, out: Path) -> list[Exported]:
    """Write `activations/{position}/{component}/{train,val}_all_layers.pt` and metadata.json under `out`.

    Each tensor is [n_examples, n_layers, hidden] float32, positives first. UserError when there are none.
    """
    manifest = workspace.manifests.read(experiment, "activations", trait)
    if manifest is None:
        raise UserError(
            f"{trait} has no activations in {experiment}", remedy="Materialise `activations` first."
        )
    from storage.tensors import unpack

    written = []
    for key, record in sorted(manifest.files.items()):
        target = out / key
        if key.endswith("/metadata.json"):
            _write(target, workspace.store.read_bytes(key, record))
        elif key.endswith("_all_layers.safetensors"):
            data = workspace.store.read_bytes(key, record)
            tensors, _ = unpack(data, where=workspace.store.describe(key))
            path = target.with_suffix(".pt")
            _write(path, _torch_bytes(tensors["activations"]))
            written.append(Exported(path, "pt", tuple(int(layer) for layer in tensors["layers"])))
    return written


def _export_gguf(file: VectorFile, out: Path, architecture: str | None) -> Exported:
    import gguf

    if file.component != "residual":
        raise UserError(
            f"a control vector of llama.cpp acts on the residual stream, not on {file.component}",
            where=f"{file.trait}, {file.method}",
            remedy="Export vectors of component residual.",
        )
    layers = [layer for layer in file.layers if layer >= 1]
    note = "" if len(layers) == len(file.layers) else "layer 0 is left out: llama.cpp cannot steer block 0"
    if not layers:
        raise UserError(
            "llama.cpp cannot steer block 0", where=file.trait, remedy="Choose a layer from 1 on."
        )
    chosen = file.select(layers)
    norms = np.asarray(chosen.median_norm, dtype=np.float64)
    if not np.isfinite(norms).all():
        raise UserError(
            "the median norm of some layers is unknown, so a scale would mean nothing",
            where=file.trait,
            remedy="Extract the vectors again with responses of more than one token.",
        )
    model = file.metadata.get("model")
    record: Mapping[str, Any] = model if isinstance(model, Mapping) else {}
    hint = architecture or llama_cpp_architecture(record)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{_name(file)}.gguf"
    temporary = path.with_name(f".{path.name}.tmp")
    writer = gguf.GGUFWriter(temporary, _GGUF_ARCHITECTURE)
    try:
        writer.add_string(f"{_GGUF_ARCHITECTURE}.model_hint", hint)
        writer.add_int32(f"{_GGUF_ARCHITECTURE}.layer_count", len(layers))
        writer.add_string("general.name", f"{file.trait} ({file.method})")
        writer.add_string(
            "general.description",
            "The scale is the dose: 1.0 adds a vector as long as the median hidden state of its layer.",
        )
        for name, value in {
            "trait": file.trait,
            "method": file.method,
            "position": file.position,
            "component": file.component,
            "layer_convention": LAYER_CONVENTION,
            "operation": "add",
            "model": str(record.get("model") or ""),
            "revision": str(record.get("revision") or ""),
            "fingerprint": str(file.metadata.get("vectors_fingerprint") or ""),
        }.items():
            writer.add_string(f"{_GGUF_OWN}.{name}", value)
        for layer, direction, norm in zip(layers, chosen.directions, norms, strict=True):
            writer.add_tensor(f"direction.{layer}", (direction.astype(np.float64) * norm).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except BaseException:
        writer.close()
        temporary.unlink(missing_ok=True)
        raise
    writer.close()
    temporary.replace(path)
    return Exported(path, "gguf", tuple(layers), note)


def llama_cpp_architecture(model: Mapping[str, Any]) -> str:
    """llama.cpp's name of the architecture of the model in an identity record, without loading or
    fetching it.

    UserError that asks for the name where the model's config is not on this machine.
    """
    name = str(model.get("model") or "")
    found = _gguf_architecture_of(name) or _config_architecture(name, model.get("revision"))
    if found is None:
        raise UserError(
            f"the architecture of {name or 'the model'} is not known on this machine",
            where="export to gguf",
            remedy="Name it as llama.cpp does, for example --architecture llama.",
        )
    return _LLAMA_CPP.get(found, found)


def _gguf_architecture_of(name: str) -> str | None:
    from resources.models.embedded import PREFIX, embedded

    path = embedded(name).gguf() if name.startswith(PREFIX) else Path(name)
    if path.suffix != ".gguf" or not path.is_file():
        return None
    import gguf

    field = gguf.GGUFReader(path).get_field("general.architecture")
    return None if field is None else str(field.contents())


def _config_architecture(name: str, revision: Any) -> str | None:
    local = Path(name) / "config.json"
    if not local.is_file():
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(name, "config.json", revision=revision or None)
        except ValueError:  # not a hub id
            return None
        if not isinstance(cached, str):
            return None
        local = Path(cached)
    config = json.loads(local.read_text(encoding="utf-8"))
    text = config.get("text_config")
    kind = (text if isinstance(text, dict) else config).get("model_type") or config.get("model_type")
    return None if kind is None else str(kind)


_PERSONA_NAMES = {
    "response[:]": "response_avg_diff",
    "prompt[:]": "prompt_avg_diff",
    "prompt[-1]": "prompt_last_diff",
}


def _export_persona(file: VectorFile, out: Path) -> Exported:
    if file.component != "residual":
        raise UserError(
            f"this layout holds the residual stream, not {file.component}",
            where=f"{file.trait}, {file.method}",
            remedy="Export vectors of component residual.",
        )
    n_layers = file.metadata.get("n_layers")
    if n_layers is None:
        raise UserError(
            "the vectors do not say how many layers their model has",
            where=file.trait,
            remedy="Materialise `vectors` again.",
        )
    stacked = np.zeros((int(n_layers) + 1, file.directions.shape[1]), dtype=np.float32)
    for layer, vector in zip(file.layers, _lengths(file), strict=True):
        stacked[layer + 1] = vector
    kind = _PERSONA_NAMES.get(file.position, Position.parse(file.position).folder)
    suffix = "" if file.method == "mean_diff" else f"_{file.method}"
    # a dot, which no name has: a_b/c and a/b_c are two traits
    path = out / f"{file.trait.replace('/', '.')}_{kind}{suffix}.pt"
    _write(path, _torch_bytes(stacked))
    missing = int(n_layers) - len(file.layers)
    return Exported(
        path,
        "persona",
        tuple(file.layers),
        f"{missing} layers were not extracted and are zero" if missing else "",
    )


# Import


def import_vectors(
    path: Path,
    *,
    trait: str,
    fit: Fit,
    format: Format | None = None,
    position: str | None = None,
    any_model: bool = False,
) -> VectorFile:
    """Read a foreign file (or, for `pt`, its folder) as vectors of `trait`.

    Refused with a UserError: a hook site, operation, width, layer or model that does not fit (`any_model`
    lets another model of the same shape through), zero or non-finite vectors, files that would run code.
    Raw norms are the stored lengths; what the file does not tell (median ‖h‖, threshold, accuracies) is
    unknown afterwards.
    """
    path = Path(path)
    if not path.exists():
        raise UserError("there is no such file", where=str(path))
    kind = format or _format_of(path)
    readers = {"pt": _read_pt, "safetensors": _read_safetensors, "gguf": _read_gguf, "persona": _read_persona}
    if kind not in readers:
        raise UserError(f"unknown format {kind!r}", where="--format", remedy=f"Use {', '.join(FORMATS)}.")
    where = str(path)
    try:
        vectors, facts = readers[kind](path, fit)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # what a foreign file may hold is open
        raise UserError(
            f"this file has not the form that its name promises ({type(error).__name__}: {error})",
            where=where,
            remedy="Say what it is with --format, or export it again.",
        ) from error
    method = facts.get("method") or kind
    if not isinstance(method, str) or not _METHOD.fullmatch(method):
        raise UserError(f"the file names the method {method!r}, which cannot be a folder", where=where)
    place = position or facts.get("position") or "response[:]"
    if not isinstance(place, str):
        raise UserError(f"the file names the position {place!r}, which is no text", where=where)
    Position.parse(place)
    _check_facts(facts, fit, where, any_model)
    _check_vectors(vectors, fit, where)
    layers = sorted(vectors)
    stacked = np.stack([vectors[layer] for layer in layers]).astype(np.float64)
    norms = np.linalg.norm(stacked, axis=1)
    unknown = np.full(len(layers), np.nan, dtype=np.float32)
    model = facts.get("model")
    metadata: dict[str, Any] = {
        "model": model if isinstance(model, Mapping) else {"model": model or fit.model},
        "hook_site": fit.component,
        "layer_convention": LAYER_CONVENTION,
        "oriented": True,
        "imported_from": {"format": kind, "name": path.name, "sha256": _digest(path)},
    }
    if fit.n_layers is not None:
        metadata["n_layers"] = fit.n_layers
    return VectorFile(
        trait=trait,
        method=f"imported-{method}",
        position=place,
        component=fit.component,
        layers=layers,
        directions=(stacked / norms[:, None]).astype(np.float32),
        raw_norm=norms.astype(np.float32),
        median_norm=np.array(
            [facts.get("median_norm", {}).get(layer, np.nan) for layer in layers], np.float32
        ),
        threshold=unknown,
        sign=np.ones(len(layers), dtype=np.float32),
        mean_positive=unknown,
        mean_negative=unknown,
        train_accuracy=unknown,
        coefficient_norm=unknown,
        metadata=metadata,
    )


def _format_of(path: Path) -> str:
    if path.is_dir():
        return "pt"
    if path.suffix == ".gguf":
        return "gguf"
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix == ".pt":
        return "pt" if _LAYER_FILE.fullmatch(path.name) else "persona"
    raise UserError(
        "the format cannot be told from the name",
        where=str(path),
        remedy=f"Say --format {'|'.join(FORMATS)}.",
    )


def _digest(path: Path) -> str:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _load_torch(path: Path) -> np.ndarray:
    """One plain tensor; never anything that a pickle could run."""
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch passes on whatever a foreign file provokes, of many types
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"this is no file with plain tensors ({why})",
            where=str(path),
            remedy="Ask for a file that torch.load(weights_only=True) reads.",
        ) from error
    if not isinstance(loaded, torch.Tensor):
        raise UserError(
            f"the file holds a {type(loaded).__name__}, not a tensor",
            where=str(path),
            remedy="Store the tensor alone with torch.save.",
        )
    return loaded.detach().to(torch.float32).numpy()


def _read_pt(path: Path, fit: Fit) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else sorted(folder.iterdir())
    vectors = {}
    for file in files:
        match = _LAYER_FILE.fullmatch(file.name)
        if match:
            vectors[int(match.group(1))] = _load_torch(file)
    if not vectors:
        raise UserError("there is no layer{N}.pt here", where=str(path))
    facts: dict[str, Any] = {}
    described = folder / "metadata.json"
    if described.is_file():
        try:
            metadata = json.loads(described.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"not valid JSON ({error})", where=str(described)) from error
        for name in ("model", "method", "position"):
            facts[name] = metadata.get(name)
        facts["component"] = metadata.get("hook_site") or metadata.get("component")
        facts["model"] = metadata.get("model_identity") or facts["model"]
    return vectors, facts


def _read_safetensors(path: Path, fit: Fit) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
    file = VectorFile.from_bytes(path.read_bytes(), str(path))
    vectors = dict(zip(file.layers, _lengths(file), strict=True))
    norms = {layer: float(norm) for layer, norm in zip(file.layers, file.median_norm, strict=True)}
    return vectors, {
        "model": file.metadata.get("model"),
        "method": file.method,
        "position": file.position,
        "component": file.metadata.get("hook_site") or file.component,
        "median_norm": norms,
    }


def _read_gguf(path: Path, fit: Fit) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        raise UserError(f"this is no whole GGUF file ({error})", where=str(path)) from error

    def text(name: str) -> str | None:
        field = reader.get_field(name)
        return None if field is None else str(field.contents())

    if text("general.architecture") != _GGUF_ARCHITECTURE:
        raise UserError(
            f"this GGUF file is a {text('general.architecture')}, not a control vector", where=str(path)
        )
    vectors = {}
    for tensor in reader.tensors:
        match = _DIRECTION.fullmatch(tensor.name)
        if match is None:
            continue
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            raise UserError(f"{tensor.name} is {tensor.tensor_type.name}, not F32", where=str(path))
        vectors[int(match.group(1))] = np.array(tensor.data, dtype=np.float32).reshape(-1)
    if not vectors:
        raise UserError("there is no direction.{N} in this file", where=str(path))
    facts: dict[str, Any] = {
        name: text(f"{_GGUF_OWN}.{name}") or None
        for name in ("model", "method", "position", "component", "operation", "layer_convention")
    }
    # other programs write an operation, too; a direction to project out is not one to add
    for name in reader.fields:
        if name.endswith((".mode", ".operation")) and not name.startswith(_GGUF_OWN):
            facts["operation"] = text(name)
    if facts["layer_convention"] not in (None, LAYER_CONVENTION):
        raise UserError(f"its layers count otherwise ({facts['layer_convention']})", where=str(path))
    if facts["layer_convention"] is not None:
        # our own files: the length is the median norm of the layer
        facts["median_norm"] = {k: float(np.linalg.norm(v.astype(np.float64))) for k, v in vectors.items()}
    return vectors, facts


def _read_persona(path: Path, fit: Fit) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
    stacked = _load_torch(path)
    if stacked.ndim != 2:
        raise UserError(
            f"the tensor has shape {list(stacked.shape)}, not [layers + 1, hidden]", where=str(path)
        )
    if fit.n_layers is not None and stacked.shape[0] != fit.n_layers + 1:
        raise UserError(
            f"the tensor has {stacked.shape[0]} rows, a model of {fit.n_layers} layers {fit.n_layers + 1}",
            where=str(path),
            remedy="Use vectors that were extracted from this model.",
        )
    # row 0 is the embedding, which no block gives
    vectors = {row - 1: stacked[row] for row in range(1, stacked.shape[0]) if stacked[row].any()}
    kinds = {kind: position for position, kind in _PERSONA_NAMES.items()}
    position = next((p for kind, p in kinds.items() if path.stem.endswith(kind)), None)
    return vectors, {"method": "mean_diff", "position": position, "component": "residual"}


def _check_facts(facts: Mapping[str, Any], fit: Fit, where: str, any_model: bool) -> None:
    component = facts.get("component") or "residual"
    if component != fit.component:
        raise UserError(
            f"the vectors belong to hook site {component}, not {fit.component}",
            where=where,
            remedy=f"Import them for component {component}.",
        )
    operation = facts.get("operation") or "add"
    if operation != "add":
        raise UserError(
            f"the vectors are made for the operation {operation!r}; here a vector is added",
            where=where,
            remedy="Extract a vector to add; one to project out is another one.",
        )
    model = facts.get("model")
    named = model.get("model") if isinstance(model, Mapping) else model
    if named and fit.model and named != fit.model and not any_model:
        raise UserError(
            f"the vectors come from {named}, not from {fit.model}",
            where=where,
            remedy="Use vectors of this model, or allow another one with --any-model.",
        )


def _check_vectors(vectors: Mapping[int, np.ndarray], fit: Fit, where: str) -> None:
    if not vectors:
        raise UserError("there is no vector in this file", where=where)
    widths = {vector.shape for vector in vectors.values()}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise UserError(f"the vectors have the shapes {sorted(map(list, widths))}", where=where)
    (width,) = next(iter(widths))
    if fit.width is not None and width != fit.width:
        raise UserError(
            f"the vectors have width {width}, the model's {fit.component} has width {fit.width}",
            where=where,
            remedy="Use vectors that were extracted from a model of this width.",
        )
    if fit.n_layers is not None and max(vectors) >= fit.n_layers:
        raise UserError(
            f"there is a vector of layer {max(vectors)}, the model has {fit.n_layers} layers (0-based)",
            where=where,
            remedy="Use vectors that were extracted from a model of this depth.",
        )
    for layer, vector in sorted(vectors.items()):
        if not np.isfinite(vector).all() or not vector.any():
            raise UserError(f"the vector of layer {layer} is zero or not finite", where=where)


def save_imported(workspace: Workspace, experiment: str, file: VectorFile, *, run_id: str) -> str:
    """Keep imported vectors in an experiment, beside its own; gives the storage key.

    They are found by `load_vectors` under their method (`imported-…`), and have a manifest of the stage
    `imported_vectors`, so that lineage shows where they came from.
    """
    from datetime import UTC, datetime

    from storage.manifest import Manifest, fingerprint

    folder = vector_folder(experiment, file.trait, file.position, file.component, file.method)
    files = {
        f"{folder}/vectors.safetensors": workspace.store.write_bytes(
            f"{folder}/vectors.safetensors", file.pack()
        ),
        f"{folder}/metadata.json": workspace.store.write_json(f"{folder}/metadata.json", file.record()),
    }
    before = workspace.manifests.read(experiment, "imported_vectors", file.trait)
    if before is not None:
        files = {**before.files, **files}
    source = dict(file.metadata["imported_from"])
    sources = {**(before.inputs if before is not None else {}), folder: str(source["sha256"])}
    options = {"model": file.metadata["model"], "imported": source}
    manifest = Manifest(
        stage="imported_vectors",
        experiment=experiment,
        trait=file.trait,
        fingerprint=fingerprint({"inputs": sources, "options": options}),
        status="done",
        code_version="1",
        run_id=run_id,
        created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        inputs=sources,
        options=options,
        files=files,
        summary={"layers": len(file.layers), "method": file.method},
    )
    rows = [
        {
            "table": "vectors",
            "position": v.position,
            "component": v.component,
            "method": v.method,
            "layer": v.layer,
        }
        | {"norm": v.raw_norm}
        for v in file
    ]
    workspace.commit(manifest, rows)
    return f"{folder}/vectors.safetensors"


__all__ = [
    "FORMATS",
    "Exported",
    "Fit",
    "Format",
    "export_activations",
    "export_vectors",
    "import_vectors",
    "llama_cpp_architecture",
    "load_vectors",
    "save_imported",
]
