"""Vectors that explain themselves: what is stored, that it comes back exactly, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors import safe_open

from storage.errors import ArtifactError, UserError
from storage.tensors import pack
from trait_assets.vectors.fit import check_rows, fit_vectors, task_of
from trait_assets.vectors.methods import METHODS
from trait_assets.vectors.vector import VectorFile


@pytest.fixture
def files(synthetic: ModuleType) -> dict[str, VectorFile]:
    made = synthetic.planted(20, 50, layers=4, gap=4.0, seed=2)
    rows = synthetic.activation_set(made.x + 3, made.y, layers=[2, 5, 6, 30])
    facts = {"model": {"model": "toy", "revision": "abc", "dtype": "float32"}, "hook_site": "residual"}
    return fit_vectors(rows, list(METHODS), 0, metadata=facts)


def test_directions_are_unit_and_lengths_are_kept_apart(
    files: dict[str, VectorFile], synthetic: ModuleType
) -> None:
    made = synthetic.planted(20, 50, layers=4, gap=4.0, seed=2)
    x = made.x + 3
    for name, file in files.items():
        np.testing.assert_allclose(np.linalg.norm(file.directions, axis=1), 1, atol=1e-6)
        assert file.directions.dtype == np.float32
        p = np.einsum("nld,ld->nl", x.astype(np.float64), file.directions.astype(np.float64))
        pos, neg = p[made.y].mean(axis=0), p[~made.y].mean(axis=0)
        np.testing.assert_allclose(file.raw_norm, np.abs(pos - neg), rtol=1e-4)
        np.testing.assert_allclose(file.threshold, (pos + neg) / 2, atol=1e-4)
        np.testing.assert_allclose(file.mean_positive, pos, atol=1e-4)
        np.testing.assert_array_equal(file.sign, np.where(pos >= neg, 1, -1))
        accuracy = (
            (p[made.y] > file.threshold).mean(axis=0) + (p[~made.y] <= file.threshold).mean(axis=0)
        ) / 2
        np.testing.assert_allclose(file.train_accuracy, accuracy)
        if name != "random":
            assert (file.sign == 1).all()
    difference = x[made.y].mean(axis=0) - x[~made.y].mean(axis=0)
    np.testing.assert_allclose(files["mean_diff"].raw_norm, np.linalg.norm(difference, axis=1), rtol=1e-5)
    np.testing.assert_allclose(files["mean_diff"].median_norm, np.sqrt(50), rtol=1e-6)


def test_bytes_round_trip_exactly(files: dict[str, VectorFile]) -> None:
    for file in files.values():
        back = VectorFile.from_bytes(file.pack())
        assert back.pack() == file.pack()
        np.testing.assert_array_equal(back.directions, file.directions)
        assert back.layers == [2, 5, 6, 30]
        assert back.metadata == file.metadata
        assert back.vector(30).digest == file.vector(30).digest


def test_a_stranger_finds_everything_in_the_header(files: dict[str, VectorFile], tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    path.write_bytes(files["probe"].pack())
    with safe_open(path, framework="np") as opened:
        (header,) = (json.loads(text) for text in opened.metadata().values())
        assert opened.get_tensor("directions").shape == (4, 50)
        assert opened.get_tensor("layers").tolist() == [2, 5, 6, 30]
    assert header["model"]["revision"] == "abc"
    assert header["position"] == "response[:]"
    assert header["component"] == "residual"
    assert header["method"] == "probe"
    assert header["hook_site"] == "residual"
    assert "unit length" in header["tensors"]["directions"]
    assert header["fit"]["30"]["C"] > 0


def test_one_vector_projects_and_classifies(files: dict[str, VectorFile], synthetic: ModuleType) -> None:
    made = synthetic.planted(20, 50, layers=4, gap=4.0, seed=2)
    vector = files["mean_diff"].vector(30)
    x = made.x[:, 3] + 3
    assert vector.project(x).shape == (40,)
    assert (vector.classify(x) == made.y).mean() == vector.train_accuracy
    assert vector.baseline == vector.threshold
    with pytest.raises(UserError, match="width 49 do not fit a vector of width 50"):
        vector.project(x[:, :49])


def test_a_missing_layer_names_those_there_are(files: dict[str, VectorFile]) -> None:
    with pytest.raises(UserError, match="layers 2,5-6,30"):
        files["probe"].vector(7)
    assert files["probe"].select([30, 5]).layers == [30, 5]
    with pytest.raises(UserError, match="layer 1"):
        files["probe"].select([1])


def test_metadata_json_has_the_promised_keys(files: dict[str, VectorFile]) -> None:
    record = json.loads(json.dumps(files["probe"].record(), allow_nan=False))
    assert record["trait"] == "toy/planted"
    assert record["method"] == "probe"
    assert set(record["layers"]) == {"2", "5", "6", "30"}
    assert {"norm", "baseline", "train_acc"} <= set(record["layers"]["30"])
    assert record["layers"]["30"]["train_acc"] >= 0.9


def test_a_median_norm_that_was_not_measured_is_null(synthetic: ModuleType) -> None:
    made = synthetic.planted(6, 10)
    rows = synthetic.activation_set(made.x, made.y)
    rows.metadata["median_norm"] = [None]
    file = VectorFile.from_bytes(fit_vectors(rows, ["mean_diff"], 0)["mean_diff"].pack())
    assert np.isnan(file.median_norm[0])
    assert file.record()["layers"]["0"]["norm_over_median_norm"] is None
    json.dumps(file.record(), allow_nan=False)


def test_a_foreign_file_is_refused() -> None:
    with pytest.raises(ArtifactError, match="no vector file"):
        VectorFile.from_bytes(pack({"directions": np.zeros((1, 2), np.float32)}, {"format": "other"}))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_name_layer_and_row(synthetic: ModuleType, bad: float) -> None:
    made = synthetic.planted(6, 10, layers=3)
    made.x[4, 2, 1] = bad
    with pytest.raises(UserError, match=r"not finite at layers \[2\] \(first in row r4\)"):
        fit_vectors(synthetic.activation_set(made.x, made.y), ["mean_diff"], 0)


@pytest.mark.parametrize(("n_pos", "n_neg"), [(0, 5), (5, 0), (1, 5), (5, 1), (1, 1)])
def test_one_side_or_one_row_is_refused(synthetic: ModuleType, n_pos: int, n_neg: int) -> None:
    x = np.random.default_rng(0).standard_normal((n_pos + n_neg, 2, 8)).astype(np.float32)
    rows = synthetic.activation_set(x, np.arange(n_pos + n_neg) < n_pos)
    with pytest.raises(UserError, match=f"{n_pos} positive and {n_neg} negative train rows"):
        check_rows(rows)


def test_equal_rows_are_an_error_and_a_constant_layer_is_left_out(synthetic: ModuleType) -> None:
    made = synthetic.planted(6, 10, layers=3)
    same = np.ones_like(made.x)
    with pytest.raises(UserError, match="same activations at every layer"):
        fit_vectors(synthetic.activation_set(same, made.y), ["probe"], 0)
    made.x[:, 1] = 4.0
    for file in fit_vectors(synthetic.activation_set(made.x, made.y), list(METHODS), 0).values():
        assert file.layers == [0, 2]
        assert file.metadata["excluded_layers"] == [{"layer": 1, "reason": "every row is the same"}]
        with pytest.raises(UserError, match="every row is the same"):
            file.vector(1)


def test_sides_that_are_copies_of_each_other_are_an_error(synthetic: ModuleType) -> None:
    x = np.random.default_rng(0).standard_normal((5, 2, 8)).astype(np.float32)
    rows = synthetic.activation_set(np.concatenate([x, x]), np.arange(10) < 5)
    for name in ("mean_diff", "probe", "gradient", "lda"):
        with pytest.raises(UserError, match="do not differ"):
            fit_vectors(rows, [name], 0)


def test_layers_that_were_not_captured_are_refused(synthetic: ModuleType) -> None:
    made = synthetic.planted(4, 8, layers=3)
    with pytest.raises(UserError, match=r"layers \[7\] were not captured"):
        task_of(synthetic.activation_set(made.x, made.y), 0, [1, 7])


@pytest.mark.parametrize("name", list(METHODS))
def test_two_rows_per_side_give_finite_vectors(synthetic: ModuleType, name: str) -> None:
    made = synthetic.planted(2, 40, layers=2, gap=6.0)
    file = fit_vectors(synthetic.activation_set(made.x, made.y), [name], 0)[name]
    assert np.isfinite(file.directions).all()
    np.testing.assert_allclose(np.linalg.norm(file.directions, axis=1), 1, atol=1e-6)
