"""Activations as later stages read them: arrays with labels, groups and keys. No capture, no model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from resources.models.positions import Position
from storage import keys
from storage.errors import UserError
from storage.tensors import unpack

if TYPE_CHECKING:
    from storage.workspace import Workspace

Part = Literal["train", "val"]


@dataclass(frozen=True, eq=False)
class ActivationSet:
    """Pooled hidden states of one (trait, position, component, part).

    `X`: [n, n_layers, width] float32, positives first; `y`: [n] bool, True for positive; `groups`: [n] int, rows of one
    group (a pair, near-duplicates) are never split; `layers`: the captured layer of each column.
    """

    trait: str
    position: str
    component: str
    part: Part
    X: np.ndarray
    y: np.ndarray
    groups: np.ndarray
    keys: list[str]
    layers: list[int]
    metadata: dict[str, Any]

    @property
    def median_norm(self) -> np.ndarray:
        """[n_layers]: median ‖h‖ of the residual stream at each captured layer, token 0 left out."""
        return np.asarray(self.metadata["median_norm"], dtype=np.float32)


def folder(experiment: str, trait: str, position: str, component: str) -> str:
    return keys.extraction(experiment, trait, "activations", Position.parse(position).folder, component)


def load_activations(
    workspace: Workspace, experiment: str, trait: str, position: str, component: str, part: Part = "train"
) -> ActivationSet:
    """Read one part. A part that does not exist is a `UserError` that says why."""
    base = folder(experiment, trait, position, component)
    if not workspace.store.exists(f"{base}/metadata.json"):
        raise UserError(
            f"no activations of {trait} at {position}, {component}",
            where=experiment,
            remedy="add this position and component to the experiment and materialise `activations`",
        )
    metadata = workspace.store.read_json(f"{base}/metadata.json")
    rows = metadata["rows"][part]
    if not rows:
        raise UserError(
            f"{trait} has no {part} rows at {position}, {component}",
            where=f"{experiment}/activations",
            remedy="set val_split above 0 and give the trait more scenarios"
            if part == "val"
            else "give the trait more scenarios",
        )
    tensors, _ = unpack(workspace.store.read_bytes(f"{base}/{part}_all_layers.safetensors"))
    return ActivationSet(
        trait=trait,
        position=position,
        component=component,
        part=part,
        X=tensors["activations"],
        y=np.array([row["polarity"] == "positive" for row in rows]),
        groups=np.array([row["group"] for row in rows], dtype=np.int64),
        keys=[row["key"] for row in rows],
        layers=list(metadata["layers"]),
        metadata=metadata,
    )


def has_part(metadata: dict[str, Any], part: Part) -> bool:
    return bool(metadata["rows"][part])


def activation_sites(options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(position, component) pairs of an activations manifest's options."""
    for position in options["positions"]:
        for component in options["components"]:
            yield position, component
