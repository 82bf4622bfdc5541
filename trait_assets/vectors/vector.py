"""A trait vector that explains itself, and the file that holds all layers of one method.

Here belong the content, the storage form and the reading of vectors. Fitting them (`fit`), judging them
(`trait_assets.evaluation`) and using them on a model (`trait_assets.steering`) do not.

A direction is a unit vector in the space of one hook site of one layer. Its length is kept apart as
`raw_norm`, the distance between the class means along it in activation units, and so is the scale of the
place, `median_norm` (median ‖h‖ of the residual stream at that layer, token 0 left out). A dose r adds r ·
median_norm · direction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from resources.models.positions import Position
from storage import keys
from storage.errors import ArtifactError, UserError
from storage.tensors import open_local, pack, unpack

if TYPE_CHECKING:
    from storage.workspace import Workspace

FORMAT = "trait-vectors/1"
_PER_LAYER = (
    "raw_norm",
    "median_norm",
    "threshold",
    "sign",
    "mean_positive",
    "mean_negative",
    "train_accuracy",
    "coefficient_norm",
)


@dataclass(frozen=True, eq=False)
class TraitVector:
    """One direction.

    `direction` [d] float32, length 1; `raw_norm`, `threshold`, `mean_positive`, `mean_negative` in activation
    units; `median_norm` NaN where it was not measured; `sign` +1 when positives project higher (always, but
    for `random`).
    """

    trait: str
    method: str
    layer: int
    position: str
    component: str
    direction: np.ndarray
    raw_norm: float
    median_norm: float
    threshold: float
    sign: int
    mean_positive: float
    mean_negative: float
    train_accuracy: float
    metadata: dict[str, Any]

    @property
    def baseline(self) -> float:
        """The middle between the class means along the direction; the threshold is this."""
        return self.threshold

    @property
    def width(self) -> int:
        return int(self.direction.shape[0])

    @property
    def digest(self) -> str:
        """SHA-256 of the direction's bytes, first 32 hex characters: what steering keys its rows by."""
        return hashlib.sha256(np.ascontiguousarray(self.direction, dtype="<f4").tobytes()).hexdigest()[:32]

    @property
    def hook_site(self) -> str:
        return str(self.metadata.get("hook_site", self.component))

    def project(self, h: np.ndarray) -> np.ndarray:
        """Scores h·v̂ of activations [..., d], in activation units. Errors: UserError for another width."""
        if h.shape[-1] != self.width:
            raise UserError(
                f"activations of width {h.shape[-1]} do not fit a vector of width {self.width}",
                where=f"{self.trait}, {self.method}, layer {self.layer}",
                remedy="use activations of the model and component that the vector was extracted from",
            )
        return np.asarray(h, dtype=np.float64) @ self.direction.astype(np.float64)

    def classify(self, h: np.ndarray) -> np.ndarray:
        """True where the projection lies above the train threshold."""
        return self.project(h) > self.threshold


@dataclass(frozen=True, eq=False)
class VectorFile:
    """All layers of one (trait, position, component, method). Arrays are per layer, in the order of `layers`.

    `directions` [L, d] float32; `coefficient_norm` [L]: length of the method's own solution before it was
    made a unit vector, in the method's own units (a probe's logits per activation unit).
    """

    trait: str
    method: str
    position: str
    component: str
    layers: list[int]
    directions: np.ndarray
    raw_norm: np.ndarray
    median_norm: np.ndarray
    threshold: np.ndarray
    sign: np.ndarray
    mean_positive: np.ndarray
    mean_negative: np.ndarray
    train_accuracy: np.ndarray
    coefficient_norm: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def baseline(self) -> np.ndarray:
        return self.threshold

    @property
    def oriented(self) -> bool:
        return bool(self.metadata.get("oriented", True))

    def __iter__(self) -> Any:
        return (self.vector(layer) for layer in self.layers)

    def vector(self, layer: int) -> TraitVector:
        """The vector of one layer; UserError naming the layers there are."""
        if layer not in self.layers:
            excluded = {int(e["layer"]): e["reason"] for e in self.metadata.get("excluded_layers", [])}
            why = f": {excluded[layer]}" if layer in excluded else ""
            raise UserError(
                f"there is no {self.method} vector at layer {layer}{why}",
                where=f"{self.trait}, {self.position}, {self.component}",
                remedy=f"choose from layers {_ranges(self.layers)}",
            )
        i = self.layers.index(layer)
        return TraitVector(
            trait=self.trait,
            method=self.method,
            layer=layer,
            position=self.position,
            component=self.component,
            direction=np.array(self.directions[i], dtype=np.float32),
            raw_norm=float(self.raw_norm[i]),
            median_norm=float(self.median_norm[i]),
            threshold=float(self.threshold[i]),
            sign=int(self.sign[i]),
            mean_positive=float(self.mean_positive[i]),
            mean_negative=float(self.mean_negative[i]),
            train_accuracy=float(self.train_accuracy[i]),
            metadata={k: v for k, v in self.metadata.items() if k != "layers"},
        )

    def select(self, layers: Sequence[int]) -> VectorFile:
        """The same file with some of its layers."""
        for layer in layers:
            self.vector(layer)
        places = [self.layers.index(layer) for layer in layers]
        arrays = {name: getattr(self, name)[places] for name in ("directions", *_PER_LAYER)}
        return replace(self, layers=list(layers), **arrays)

    def pack(self) -> bytes:
        """The safetensors bytes; the header says what a stranger needs to use the vectors."""
        tensors = {
            name: np.asarray(getattr(self, name), dtype=np.float32) for name in ("directions", *_PER_LAYER)
        }
        tensors["layers"] = np.asarray(self.layers, dtype=np.int64)
        header = {
            **self.metadata,
            "format": FORMAT,
            "trait": self.trait,
            "method": self.method,
            "position": self.position,
            "component": self.component,
            "tensors": {
                "directions": "[layer, width], unit length",
                "layers": "block index of each row, counted from 0",
                "raw_norm": "distance between the class means along the direction, activation units",
                "median_norm": "median norm of the residual stream at that layer, token 0 left out",
                "threshold": "middle between the class means along the direction (train rows)",
                "sign": "+1: positives project higher",
            },
        }
        return pack(tensors, header)

    @classmethod
    def unpack(cls, tensors: Any, header: dict[str, Any], where: str) -> VectorFile:
        if header.get("format") != FORMAT:
            raise ArtifactError(
                f"this is no vector file of the form {FORMAT} (it says {header.get('format')!r})",
                where=where,
                remedy="materialise `vectors` again, or read it with the version that wrote it",
            )
        metadata = {
            k: v
            for k, v in header.items()
            if k not in ("format", "trait", "method", "position", "component", "tensors")
        }
        return cls(
            trait=header["trait"],
            method=header["method"],
            position=header["position"],
            component=header["component"],
            layers=[int(layer) for layer in tensors["layers"]],
            directions=tensors["directions"],
            metadata=metadata,
            **{name: np.asarray(tensors[name]) for name in _PER_LAYER},
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "vector file") -> VectorFile:
        tensors, header = unpack(data, where=where)
        return cls.unpack(tensors, header, where)

    def record(self) -> dict[str, Any]:
        """metadata.json: the same facts for people and for tools without safetensors."""
        per_layer = {}
        for i, layer in enumerate(self.layers):
            per_layer[str(layer)] = {
                "norm": _plain(self.raw_norm[i]),
                "baseline": _plain(self.threshold[i]),
                "train_acc": _plain(self.train_accuracy[i]),
                "median_norm": _plain(self.median_norm[i]),
                "norm_over_median_norm": _plain(self.raw_norm[i] / self.median_norm[i]),
                "coefficient_norm": _plain(self.coefficient_norm[i]),
                "sign": int(self.sign[i]),
                "mean_positive": _plain(self.mean_positive[i]),
                "mean_negative": _plain(self.mean_negative[i]),
                **self.metadata.get("fit", {}).get(str(layer), {}),
            }
        known = {k: v for k, v in self.metadata.items() if k != "fit"}
        return {
            **known,
            "trait": self.trait,
            "method": self.method,
            "position": self.position,
            "component": self.component,
            "layers": per_layer,
        }


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _ranges(layers: Sequence[int]) -> str:
    parts: list[str] = []
    start = previous = layers[0] if layers else 0
    for layer in [*layers[1:], None]:
        if layer is not None and layer == previous + 1:
            previous = layer
            continue
        parts.append(str(start) if start == previous else f"{start}-{previous}")
        if layer is not None:
            start = previous = layer
    return ",".join(parts)


def vector_folder(experiment: str, trait: str, position: str, component: str, method: str) -> str:
    return keys.extraction(experiment, trait, "vectors", Position.parse(position).folder, component, method)


def load_vectors(
    workspace: Workspace, experiment: str, trait: str, position: str, component: str, method: str
) -> VectorFile:
    """Read one file, memory-mapped on a local disk. A missing one is a UserError that says what to run."""
    key = f"{vector_folder(experiment, trait, position, component, method)}/vectors.safetensors"
    store = workspace.store
    if not store.exists(key):
        raise UserError(
            f"no {method} vectors of {trait} at {position}, {component}",
            where=experiment,
            remedy="add this method, position and component to the experiment and materialise `vectors`",
        )
    local = store.local_path(key)
    if local is None:
        return VectorFile.from_bytes(store.read_bytes(key), store.describe(key))
    mapped = open_local(local)
    return VectorFile.unpack(mapped, mapped.metadata, store.describe(key))
