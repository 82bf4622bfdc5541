"""Which model a spec means, settled without loading it: no torch, no transformers.

A hub id becomes a commit, local files become a content hash, an embedded model its package version and file
hash. Content hashes are remembered by path, size and modification time. Loading belongs to `loading`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from resources.models.embedded import PREFIX, cache_root, embedded, package_version
from resources.models.rows import ModelIdentity, ModelSpec
from storage.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
# what decides a model's numbers and its tokens; a README beside the weights does not
_RELEVANT = (*_WEIGHTS, ".json", ".jinja", ".model", ".txt", ".py")


def identify(spec: ModelSpec) -> ModelIdentity:
    """Resolve a spec to an identity; UserError for a model, revision or adapter that cannot be found.

    The hub is asked only where the local Hugging Face cache does not know the revision. `dtype` stays "auto"
    where the spec says so: the device decides at load.
    """
    extra: dict[str, Any] = {}
    if spec.model.startswith(PREFIX):
        _refuse_revision(spec)
        entry = embedded(spec.model)
        revision = f"{package_version(entry)}-{file_hash(entry.gguf())[:16]}"
    else:
        path = local_path(spec.model)
        if path is not None:
            _refuse_revision(spec)
            revision = content_hash(path, what=f"model {spec.model!r}")
        else:
            revision = hub_commit(spec.model, spec.revision, option="model")
    if spec.adapter is not None:
        adapter_path = local_path(spec.adapter)
        extra["adapter_revision"] = (
            content_hash(adapter_path, what=f"adapter {spec.adapter!r}")
            if adapter_path is not None
            else hub_commit(spec.adapter, None, option="adapter")
        )
    return ModelIdentity(
        model=spec.model,
        revision=revision,
        dtype=spec.dtype,
        quantization=spec.quantization,
        adapter=spec.adapter,
        extra=extra,
    )


def local_path(model: str) -> Path | None:
    """The folder or file that a model string names, or None where it can only be a hub id.

    A string that looks like a path but names nothing is a UserError: silently asking the hub for it would
    report the wrong mistake.
    """
    if not model.strip():
        raise UserError(
            "no model was named", where="model", remedy="Name a hub id, a folder or a .gguf file."
        )
    path = Path(model).expanduser()
    if path.exists():
        return path.resolve()
    looks_like_path = model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf") or "\\" in model
    if looks_like_path:
        raise UserError(
            "there is no such file or folder",
            where=f"model {model!r}",
            remedy="Correct the path to the model.",
        )
    return None


def content_hash(path: Path, *, what: str) -> str:
    """SHA-256 over a GGUF file, or over the names and contents of a folder's relevant files, shortened to 32
    hex.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError("is neither a folder nor a .gguf file", where=what)
        return file_hash(path)[:32]
    files = sorted(entry for entry in path.iterdir() if entry.is_file() and entry.suffix in _RELEVANT)
    if not any(entry.suffix in _WEIGHTS for entry in files):
        raise UserError(
            f"the folder {path} holds no weights ({', '.join(_WEIGHTS)})",
            where=what,
            remedy="Name a folder written by save_pretrained, a .gguf file, or a hub id.",
        )
    digest = hashlib.sha256()
    for entry in files:
        digest.update(f"{entry.name}\0{file_hash(entry)}\n".encode())
    return digest.hexdigest()[:32]


def file_hash(path: Path) -> str:
    """SHA-256 of a file, remembered under the cache folder by path, size and modification time."""
    stat = path.stat()
    resolved = str(path.resolve())
    stamp = [resolved, stat.st_size, stat.st_mtime_ns]
    name = hashlib.sha256(resolved.encode()).hexdigest()[:32]
    record = cache_root() / "hashes" / f"{name}.json"
    try:
        kept = json.loads(record.read_text())
        if kept["stamp"] == stamp:
            return str(kept["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no record, or one that a killed process left unreadable: hash again
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {"stamp": stamp, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small cache record so that readers see the old one or the new one."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    with os.fdopen(handle, "w") as stream:
        json.dump(content, stream)
    os.replace(partial, path)


def hub_commit(repo: str, revision: str | None, *, option: str) -> str:
    """The commit that a hub repository's revision (default: main) stands for, from the local cache or the
    hub.
    """
    where = f"{option} {repo!r}"
    if not _HUB_ID.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UserError(
            "is not a folder, a .gguf file, an embedded model or a hub id",
            where=where,
            remedy="Write a hub id as owner/name, or a path that exists.",
        )
    cached = _cached_commit(repo, revision)
    if cached is not None:
        return cached
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    named = f"revision {revision!r}" if revision else "it"
    try:
        commit = HfApi().model_info(repo, revision=revision, timeout=10).sha
    except RevisionNotFoundError as error:
        raise UserError(f"the hub has no revision {revision!r}", where=where) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            "the hub has no such model, or it is gated and you are not logged in",
            where=where,
            remedy="Correct the id, or run: hf auth login",
        ) from error
    except (HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        # the HTTP client's own errors derive from different bases in different huggingface_hub versions
        raise _unreachable(where, named, error) from error
    except Exception as error:
        if type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise _unreachable(where, named, error) from error
        raise
    if commit is None:
        raise UserError(f"the hub gave no commit for {named}", where=where)
    return str(commit)


def _unreachable(where: str, named: str, error: Exception) -> UserError:
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"{named} is not in the local Hugging Face cache and the hub cannot be reached ({detail})",
        where=where,
        remedy="Go online once, name a local folder, or use embedded:smollm2-135m-instruct.",
    )


def _cached_commit(repo: str, revision: str | None) -> str | None:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / ("models--" + repo.replace("/", "--"))
    name = revision or "main"
    if _COMMIT.fullmatch(name):
        return name if (folder / "snapshots" / name).is_dir() else None
    try:
        commit = (folder / "refs" / name).read_text().strip()
    except OSError:
        return None
    return commit if _COMMIT.fullmatch(commit) and (folder / "snapshots" / commit).is_dir() else None


def has_chat_template(spec: ModelSpec) -> bool | None:
    """Whether the tokenizer carries a chat template, read from its files alone.

    None where that cannot be told without downloading (a hub model that is not in the local cache).
    """
    if spec.model.startswith(PREFIX):
        return embedded(spec.model).chat_template
    path = local_path(spec.model)
    if path is None:
        commit = _cached_commit(spec.model, spec.revision)
        if commit is None:
            return None
        from huggingface_hub import constants

        path = (
            Path(constants.HF_HUB_CACHE) / f"models--{spec.model.replace('/', '--')}" / "snapshots" / commit
        )
        if not (path / "tokenizer_config.json").exists():
            return None
    if path.is_file():
        return _gguf_has_template(path)
    if (path / "chat_template.jinja").exists() or (path / "chat_template.json").exists():
        return True
    try:
        settings = json.loads((path / "tokenizer_config.json").read_text())
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise UserError(f"is not JSON: {error}", where=str(path / "tokenizer_config.json")) from error
    return bool(settings.get("chat_template"))


def _gguf_has_template(path: Path) -> bool:
    from gguf import GGUFReader

    return "tokenizer.chat_template" in GGUFReader(str(path)).fields


def _refuse_revision(spec: ModelSpec) -> None:
    if spec.revision is not None:
        raise UserError(
            f"revision {spec.revision!r} was given, but only hub models have revisions",
            where=f"model {spec.model!r}",
            remedy="Leave the revision out; local files are identified by their content.",
        )
