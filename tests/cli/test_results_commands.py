"""The commands about stored results, as they are typed, on a small stored experiment."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from storage.workspace import Workspace
from trait_assets.cli import app
from trait_assets.launch import open_instance
from trait_assets.partitions import TRAITS, register

TRAIT, OTHER = "tonal/dry", "tonal/dry-wit"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    path = Path(__file__).parents[1] / "vectors" / "stored_experiment.py"
    spec = importlib.util.spec_from_file_location("tests_stored_experiment", path)
    assert spec is not None
    assert spec.loader is not None
    stored = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stored)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.delenv("TRAITS_STORE", raising=False)
    monkeypatch.setenv("TRAITS_EXPERIMENTS", str(tmp_path / "experiments"))
    monkeypatch.setenv("TRAITS_STATE", str(tmp_path / "state"))
    w = Workspace(tmp_path / "experiments", tmp_path / "state" / "lineage.duckdb")
    for trait in (TRAIT, OTHER):
        stored.store_vectors(w, stored.vector_file(trait))
        stored.store_activations(w, trait)
    stored.store_vectors(w, stored.vector_file(TRAIT, seed=1), experiment="second")
    return w


def traits(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_lineage_and_sql(results: Workspace) -> None:
    tree = json.loads(traits("lineage", f"demo/{TRAIT}/vectors", "--json").stdout)
    assert (tree["title"], tree["state"]) == ("vectors of tonal/dry in demo", "current")
    vectors = results.store.root / f"demo/extraction/{TRAIT}/vectors/response_all/residual/mean_diff"
    data = (vectors / "vectors.safetensors").read_bytes()
    (vectors / "vectors.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    tree = json.loads(traits("lineage", f"demo/{TRAIT}/vectors", "--json").stdout)
    assert tree["state"] == "damaged"
    assert str(vectors) in tree["why"]
    assert "vectors of tonal/dry in demo" in traits("lineage", f"demo/{TRAIT}/vectors").stdout
    traits("rebuild-index")
    query = "SELECT experiment, trait FROM current_manifests WHERE stage = 'vectors' ORDER BY ALL"
    assert json.loads(traits("sql", query, "--json").stdout) == [
        {"experiment": "demo", "trait": TRAIT},
        {"experiment": "demo", "trait": OTHER},
        {"experiment": "second", "trait": TRAIT},
    ]
    assert "DROP" in traits("sql", "DROP TABLE metrics", code=2).stderr


def test_diff(results: Workspace) -> None:
    found = json.loads(traits("diff", "demo", "second", "--traits", TRAIT, "--json").stdout)
    assert len(found["cosines"]) == 5
    assert all(abs(row["cosine"]) < 0.9 for row in found["cosines"])
    assert "cosine between the vectors" in traits("diff", "demo", "second").stdout
    assert "nowhere has no results" in traits("diff", "demo", "nowhere", code=2).stderr


@pytest.mark.parametrize("kind", ["pt", "safetensors", "gguf", "persona"])
def test_export(results: Workspace, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    more = ["--architecture", "llama"] if kind == "gguf" else []
    said = traits("export", "-e", "demo", "-t", TRAIT, "--format", kind, "-o", str(out), *more).stdout
    assert "wrote" in said
    assert ("layer 0 is left out" in said) == (kind == "gguf")
    assert [path for path in out.rglob("*") if path.is_file()]


def test_exported_tensors_load_from_the_promised_paths(
    results: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    out = str(tmp_path / "out")
    traits("export", "-e", "demo", "-t", TRAIT, "--format", "pt", "--activations", "-o", out)
    monkeypatch.chdir(tmp_path / "out" / "demo" / "extraction" / TRAIT)
    vector = torch.load("vectors/response_all/residual/mean_diff/layer3.pt")
    assert vector.shape == (32,)
    assert f"Norm: {vector.norm():.2f}" == "Norm: 5.00"
    train_acts = torch.load("activations/response_all/residual/train_all_layers.pt")
    assert train_acts.shape == (6, 5, 32)
    val_acts = torch.load("activations/response_all/residual/val_all_layers.pt")
    assert val_acts.shape == (2, 5, 32)


def test_forget_leaves_nothing(results: Workspace, tmp_path: Path) -> None:
    with open_instance() as instance:
        register(instance, [TRAIT, OTHER])
    before = results.store.list()
    assert "files of tonal/dry" in traits("forget", TRAIT, "--dry-run").stdout
    assert results.store.list() == before
    traits("forget", TRAIT, "--yes")
    assert [key for key in results.store.list() if "tonal/dry/" in key or "tonal/dry." in key] == []
    assert [key for key in results.store.list() if OTHER in key] == [key for key in before if OTHER in key]
    left = json.loads(traits("sql", "SELECT DISTINCT trait FROM manifests", "--json").stdout)
    assert left == [{"trait": OTHER}]
    with open_instance() as instance:
        assert list(instance.get_dynamic_partitions(TRAITS)) == [OTHER]
        register(instance, [TRAIT])
    traits("forget", TRAIT, "--yes")
    with open_instance() as instance:
        assert not instance.has_dynamic_partition(TRAITS, TRAIT), "a partition alone is removed, too"
    assert "nothing is stored" in traits("forget", TRAIT, "--yes", code=2).stderr
