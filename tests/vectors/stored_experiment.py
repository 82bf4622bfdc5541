"""A small experiment in a workspace, made without models: vectors, activations, evaluation, manifests."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np

from storage import keys
from storage.manifest import Manifest, fingerprint
from storage.tensors import pack
from storage.workspace import Workspace
from trait_assets.vectors.extraction import VectorsStage
from trait_assets.vectors.vector import VectorFile, vector_folder

MODEL = {"model": "org/tiny", "revision": "a" * 40, "dtype": "float32"}
POSITION, COMPONENT = "response[:]", "residual"


def vector_file(
    trait: str = "tonal/dry",
    method: str = "mean_diff",
    *,
    n_layers: int = 5,
    width: int = 32,
    seed: int = 0,
    layers: list[int] | None = None,
    component: str = COMPONENT,
    position: str = POSITION,
) -> VectorFile:
    layers = list(range(n_layers)) if layers is None else layers
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((len(layers), width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    n = len(layers)
    return VectorFile(
        trait=trait,
        method=method,
        position=position,
        component=component,
        layers=layers,
        directions=directions.astype(np.float32),
        raw_norm=np.linspace(2, 6, n, dtype=np.float32),
        median_norm=np.linspace(10, 14, n, dtype=np.float32),
        threshold=np.full(n, 0.5, np.float32),
        sign=np.ones(n, np.float32),
        mean_positive=np.ones(n, np.float32),
        mean_negative=np.zeros(n, np.float32),
        train_accuracy=np.full(n, 0.9, np.float32),
        coefficient_norm=np.ones(n, np.float32),
        metadata={
            "model": MODEL,
            "n_layers": n_layers,
            "hook_site": component,
            "oriented": True,
            "vectors_fingerprint": "f" * 32,
            "excluded_layers": [],
            "fit": {},
        },
    )


def commit(
    workspace: Workspace,
    stage: str,
    trait: str,
    files: dict[str, Any],
    experiment: str = "demo",
    **changes: Any,
) -> Manifest:
    store = workspace.store
    records = {
        key: store.write_bytes(key, value) if isinstance(value, bytes) else store.write_json(key, value)
        for key, value in files.items()
    }
    values: dict[str, Any] = {
        "stage": stage,
        "experiment": experiment,
        "trait": trait,
        "fingerprint": fingerprint([stage, trait, experiment, sorted(r.sha256 for r in records.values())]),
        "status": "done",
        # lineage compares it with today's
        "code_version": VectorsStage.code_version if stage == "vectors" else "1",
        "run_id": "run-1",
        "created_at": datetime.now(UTC).isoformat(),
        "files": records,
    }
    manifest = Manifest(**{**values, **changes})
    workspace.commit(manifest)
    return manifest


def store_vectors(
    workspace: Workspace, *files: VectorFile, experiment: str = "demo", **changes: Any
) -> Manifest:
    content: dict[str, Any] = {}
    for file in files:
        folder = vector_folder(experiment, file.trait, file.position, file.component, file.method)
        content[f"{folder}/vectors.safetensors"] = file.pack()
        content[f"{folder}/metadata.json"] = file.record()
    return commit(workspace, "vectors", files[0].trait, content, experiment, **changes)


def store_activations(workspace: Workspace, trait: str = "tonal/dry", experiment: str = "demo") -> np.ndarray:
    from resources.models.positions import Position

    train = np.random.default_rng(1).standard_normal((6, 5, 32)).astype(np.float32)
    folder = keys.extraction(experiment, trait, "activations", Position.parse(POSITION).folder, COMPONENT)
    layers = np.arange(5, dtype=np.int64)
    commit(
        workspace,
        "activations",
        trait,
        {
            f"{folder}/train_all_layers.safetensors": pack({"activations": train, "layers": layers}, {}),
            f"{folder}/val_all_layers.safetensors": pack({"activations": train[:2], "layers": layers}, {}),
            f"{folder}/metadata.json": {"n_layers": 5, "n_examples_pos": 3, "hidden_dim": 32},
        },
        experiment,
    )
    return train
