"""Activations with a planted direction, laid out in a workspace as the activations stage leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from storage.manifest import SCHEMA_VERSION, Manifest, fingerprint
from storage.tensors import pack
from storage.workspace import Workspace
from trait_assets.activations.dataset import ActivationSet, folder
from trait_assets.experiments import Experiment, parse_experiment
from trait_assets.pipeline import StageContext
from trait_assets.progress import LogProgress


@dataclass
class Planted:
    """`truth` [d] unit; every layer carries it with strength growing with depth."""

    x: np.ndarray
    y: np.ndarray
    truth: np.ndarray


def planted(
    n: int,
    d: int,
    *,
    layers: int = 1,
    gap: float = 3.0,
    massive: int = 0,
    seed: int = 0,
    n_neg: int | None = None,
    truth: np.ndarray | None = None,
) -> Planted:
    """n positives and n_neg (default n) negatives; unit noise; `massive` leading dimensions at 3000 ± 300."""
    rng = np.random.default_rng(seed)
    if truth is None:
        truth = rng.standard_normal(d)
        truth[:massive] = 0.0
        truth /= np.linalg.norm(truth)
    n_neg = n if n_neg is None else n_neg
    y = np.arange(n + n_neg) < n
    strength = np.linspace(0.2, 1.0, layers) if layers > 1 else np.ones(1)
    x = rng.standard_normal((n + n_neg, layers, d))
    x[:, :, :massive] = 3000 + 300 * x[:, :, :massive]
    x += (y[:, None, None] - 0.5) * gap * strength[None, :, None] * truth
    return Planted(x.astype(np.float32), y, truth)


def activation_set(
    x: np.ndarray,
    y: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    pairs: Sequence[int | None] | None = None,
    part: str = "train",
    trait: str = "toy/planted",
    layers: Sequence[int] | None = None,
) -> ActivationSet:
    n = len(y)
    layers = list(range(x.shape[1])) if layers is None else list(layers)
    pairs = [None] * n if pairs is None else pairs
    rows = [{"key": f"r{i}", "pair": pair} for i, pair in enumerate(pairs)]
    metadata = {
        "rows": {part: rows},
        "median_norm": [float(np.sqrt(x.shape[2]))] * len(layers),
        "n_layers": max(layers) + 1,
        "notes": [],
    }
    groups = np.arange(n) if groups is None else groups
    return ActivationSet(
        trait,
        "response[:]",
        "residual",
        part,  # type: ignore[arg-type]
        x,
        np.asarray(y, dtype=bool),
        groups,
        [f"r{i}" for i in range(n)],
        layers,
        metadata,
    )


@dataclass
class Lab:
    """A workspace and an experiment over it."""

    workspace: Workspace
    context: StageContext
    written: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.context.experiment.name

    def put(
        self,
        trait: str,
        train: Planted,
        val: Planted | None,
        *,
        position: str = "response[:]",
        component: str = "residual",
        layers: Sequence[int] | None = None,
        more_sites: dict[tuple[str, str], tuple[Planted, Planted | None]] | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        """Write activations and their manifest."""
        self.written[trait] = self.written.get(trait, 0) + 1
        sites = {(position, component): (train, val), **(more_sites or {})}
        files = {}
        for (at, of), parts in sites.items():
            files |= self._site(trait, at, of, parts, layers, groups)
        options = {
            "positions": list(dict.fromkeys(p for p, _ in sites)),
            "components": list(dict.fromkeys(c for _, c in sites)),
        }
        self._commit("activations", trait, options, files, {})

    def _site(
        self,
        trait: str,
        position: str,
        component: str,
        parts: tuple[Planted, Planted | None],
        layers: Sequence[int] | None,
        groups: np.ndarray | None,
    ) -> dict[str, Any]:
        store, base = self.workspace.store, folder(self.name, trait, position, component)
        numbers = list(range(parts[0].x.shape[1])) if layers is None else list(layers)
        metadata: dict[str, Any] = {
            "trait": trait,
            "model": {"model": "toy", "revision": "1", "dtype": "float32"},
            "n_layers": max(numbers) + 1,
            "layers": numbers,
            "hidden_dim": parts[0].x.shape[2],
            "position": position,
            "component": component,
            "median_norm": [float(np.sqrt(parts[0].x.shape[2]))] * len(numbers),
            "dtype": "float32",
            "hook_site": component,
            "layer_convention": "0-based block output",
            "notes": [],
            "rows": {"train": [], "val": []},
        }
        files, group = {}, 0
        for part, data in (("train", parts[0]), ("val", parts[1])):
            if data is None:
                continue
            key = f"{base}/{part}_all_layers.safetensors"
            files[key] = store.write_bytes(key, pack({"activations": data.x}, {}))
            for i, positive in enumerate(data.y):
                metadata["rows"][part].append(
                    {
                        "key": f"{part}{i}",
                        "polarity": "positive" if positive else "negative",
                        "index": i,
                        "pair": None,
                        "group": int(groups[i]) if groups is not None and part == "train" else 10_000 + group,
                    }
                )
                group += 1
        files[f"{base}/metadata.json"] = store.write_json(f"{base}/metadata.json", metadata)
        return files

    def vetted(self, trait: str, contrast: float) -> None:
        """A manifest of vetted responses with a judged contrast."""
        self._commit("vetted_responses", trait, {}, {}, {"contrast": contrast})

    def _commit(
        self, stage: str, trait: str, options: dict[str, Any], files: dict[str, Any], summary: dict[str, Any]
    ) -> None:
        self.workspace.manifests.commit(
            Manifest(
                schema_version=SCHEMA_VERSION,
                stage=stage,
                experiment=self.name,
                trait=trait,
                fingerprint=fingerprint([stage, trait, self.written.get(trait, 0)]),
                status="done",
                code_version="1",
                inputs={},
                options=options,
                files=files,
                summary=summary,
                tables={},
                run_id="run",
                created_at="2026-01-01T00:00:00+00:00",
                libraries={},
            )
        )


def lab(root: Path, **options: Any) -> Lab:
    """An empty workspace with an experiment named `lab`; small null distributions unless asked otherwise."""
    values = {"extraction_model": "toy", "n_random": 40, "n_permutations": 60, "bootstrap": 100, **options}
    experiment: Experiment = parse_experiment("lab", values, where="test")
    workspace = Workspace(root / "experiments", root / "index.duckdb")
    context = StageContext(
        experiment,
        workspace,
        models=None,  # type: ignore[arg-type]
        judges=None,  # type: ignore[arg-type]
        dataset_root=root,
        run_id="run",
        progress=LogProgress(),
    )
    return Lab(workspace, context)
