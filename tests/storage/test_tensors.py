"""Arrays in safetensors files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from storage.errors import ArtifactError, UserError
from storage.tensors import open_local, pack, unpack

ARRAYS = {
    "train": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "half": np.array([[1.5, -2.0]], dtype=np.float16),
    "layers": np.array([1, 2, 3], dtype=np.int64),
    "scalar": np.array(3.0, dtype=np.float32),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "flag": np.array([True, False]),
}
METADATA = {"trait": "tonal/dry", "norm": 2.5, "layers": {"3": {"sign": 1}}, "text": "ü"}


def _same(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    np.testing.assert_array_equal(one, other)


def test_arrays_and_metadata_come_back(tmp_path: Path) -> None:
    data = pack(ARRAYS, METADATA)
    assert pack(dict(reversed(ARRAYS.items())), dict(reversed(METADATA.items()))) == data
    tensors, metadata = unpack(data)
    assert metadata == METADATA
    assert set(tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        _same(tensors[name], array)
    (tmp_path / "x.safetensors").write_bytes(data)
    mapped = open_local(tmp_path / "x.safetensors")
    assert mapped.metadata == METADATA
    assert set(mapped) == set(ARRAYS)
    for name, array in ARRAYS.items():
        _same(np.asarray(mapped[name]), array)


def test_safetensors_itself_reads_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(pack(ARRAYS, METADATA))
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        _same(file.get_tensor("train"), ARRAYS["train"])


def test_a_mapped_file_is_read_only_and_outlives_its_replacement(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack(ARRAYS, {}))
    view = open_local(path)["train"]
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0, 0] = 1
    other = tmp_path / "new"
    other.write_bytes(pack({"train": np.zeros((2, 3, 4), np.float32)}, {}))
    other.replace(path)
    _same(np.asarray(view), ARRAYS["train"])


def test_layouts_other_than_c_order_are_stored_right() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors, _ = unpack(pack({"t": array.T, "s": array[:, ::2], "b": array.astype(">f4")}, {}))
    np.testing.assert_array_equal(tensors["t"], array.T)
    np.testing.assert_array_equal(tensors["s"], array[:, ::2])
    np.testing.assert_array_equal(tensors["b"], array)


def test_types_that_numpy_does_not_have_are_refused_by_name() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with pytest.raises(UserError, match=r"'h' \(bfloat16\)"):
        pack({"h": np.zeros(3, dtype=ml_dtypes.bfloat16)}, {})


def test_torch_tensors_are_refused_by_name() -> None:
    import torch

    with pytest.raises(UserError, match=r"'h' \(torch\.bfloat16\)"):
        pack({"h": torch.zeros(3, dtype=torch.bfloat16)}, {})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="'o'"):
        pack({"o": np.array([object()])}, {})
    with pytest.raises(UserError, match="nan"):
        pack({}, {"norm": float("nan")})


@pytest.mark.parametrize("cut", [0, 4, 8, 20, -1])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, cut: int) -> None:
    data = pack(ARRAYS, METADATA)[:cut]
    with pytest.raises(ArtifactError, match="that file"):
        unpack(data, where="that file")
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"x\.safetensors"):
        open_local(tmp_path / "x.safetensors")


def test_a_garbled_header_is_an_error(tmp_path: Path) -> None:
    data = bytearray(pack(ARRAYS, METADATA))
    data[9] = 0xFF
    with pytest.raises(ArtifactError):
        unpack(bytes(data))
    (tmp_path / "x").write_bytes(bytes(data))
    with pytest.raises(ArtifactError):
        open_local(tmp_path / "x")
    with pytest.raises(ArtifactError):
        open_local(tmp_path / "missing")
