"""Named arrays and their description in one safetensors file.

Belongs here: packing, unpacking, memory-mapping. Does not: what the arrays mean; torch (bf16 must be cast
by the caller, numpy has no such type).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from storage.artifacts import encode_json
from storage.errors import ArtifactError, UserError

# The one entry of the header's __metadata__: safetensors allows strings only, and one entry has one order.
METADATA_KEY = "traits"
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_ALLOWED = frozenset(np.dtype(kind) for kind in _DTYPES.values())


def pack(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> bytes:
    """The bytes of a safetensors file, equal for equal input.

    `metadata` goes into the header as JSON. UserError for NaN in the metadata, for torch tensors, and for
    types that numpy does not have (bfloat16).
    """
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, np.generic):
            tensor = np.asarray(tensor)
        if not isinstance(tensor, np.ndarray) or tensor.dtype.newbyteorder("=") not in _ALLOWED:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise UserError(
                f"the tensor {name!r} ({kind}) cannot be stored",
                remedy="Cast it to a numpy array of float32, float16 or an integer type first.",
            )
        # little-endian, C order; unlike ascontiguousarray this keeps 0-dimensional arrays as they are
        arrays[name] = np.asarray(tensor, dtype=tensor.dtype.newbyteorder("<"), order="C")
    return save(
        {name: arrays[name] for name in sorted(arrays)},
        metadata={METADATA_KEY: encode_json(dict(metadata), indent=None).decode("utf-8").rstrip("\n")},
    )


def unpack(data: bytes, *, where: str = "tensor file") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays (own memory) and the metadata. ArtifactError when the bytes are no whole safetensors
    file.
    """
    try:
        header, _ = _header(data, len(data), where)
        tensors = load(data)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"the tensors cannot be read ({error})", where=where, remedy="Run its stage again."
        ) from error
    return tensors, _metadata(header)


def _header(data: bytes | memoryview, size: int, where: str) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:8], "little") if size >= 8 else -1
    if length < 2 or 8 + length > size:
        raise ArtifactError(
            "the file is truncated or no safetensors file", where=where, remedy="Run its stage again."
        )
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        end = max(
            (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"the header cannot be read ({error})", where=where, remedy="Run its stage again."
        ) from error
    if 8 + length + end != size:
        raise ArtifactError(
            f"the file has {size} bytes, its header says {8 + length + end}",
            where=where,
            remedy="Run its stage again.",
        )
    return header, 8 + length


def _metadata(header: Mapping[str, Any]) -> dict[str, Any]:
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    return {} if text is None else json.loads(text)


class TensorFile(Mapping[str, np.ndarray]):
    """A safetensors file on a local disk, memory-mapped: an array costs memory only where it is touched.

    The arrays are read-only views that stay valid as long as they are referenced, also after the file was
    replaced.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        except (FileNotFoundError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ArtifactError(
                "the file is missing or empty", where=str(path), remedy="Run its stage again."
            ) from error
        header, self._start = _header(self._bytes[:8].tobytes() + self._lead(), self._bytes.size, str(path))
        self.metadata: dict[str, Any] = _metadata(header)
        self._entries = {key: entry for key, entry in header.items() if key != "__metadata__"}

    def _lead(self) -> bytes:
        length = int.from_bytes(self._bytes[:8].tobytes(), "little")
        return self._bytes[8 : 8 + min(length, self._bytes.size)].tobytes()

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry["dtype"] not in _DTYPES:
            raise ArtifactError(f"the tensor {name!r} has the type {entry['dtype']}", where=str(self.path))
        begin, end = entry["data_offsets"]
        raw = self._bytes[self._start + begin : self._start + end]
        return np.asarray(raw).view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def open_local(path: str | os.PathLike[str]) -> TensorFile:
    """Memory-map a file that `pack` wrote. ArtifactError when it is missing, truncated or no safetensors
    file.
    """
    return TensorFile(path)
