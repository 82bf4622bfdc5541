"""Vectors against other traits: cosines, cross-trait AUC, and transfer of one vector to other scenarios.

Reads stored vectors and activations; fits nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from storage import keys
from storage.errors import UserError
from trait_assets.activations.dataset import ActivationSet, has_part, load_activations
from trait_assets.evaluation import metrics
from trait_assets.evaluation.null import permutation_p
from trait_assets.evaluation.trait_report import number
from trait_assets.vectors.vector import TraitVector, load_vectors

if TYPE_CHECKING:
    from storage.workspace import Workspace

Matrix = list[list[float | None]]


def best_vector(workspace: Workspace, experiment: str, trait: str) -> TraitVector:
    """The vector that cross-validation chose; UserError where the trait is not evaluated or nothing could be
    chosen.
    """
    key = keys.extraction(experiment, trait, "evaluation", "evaluation.json")
    if not workspace.store.exists(key):
        raise UserError(
            f"{trait} is not evaluated yet", where=experiment, remedy="materialise `vector_evaluation` first"
        )
    best = workspace.store.read_json(key)["best"]
    if best is None:
        raise UserError(
            f"no vector of {trait} could be chosen: its train rows are too few to cross-validate",
            where=experiment,
            remedy="name layer, method, position and component yourself, or add scenarios",
        )
    return load_vectors(
        workspace, experiment, trait, best["position"], best["component"], best["method"]
    ).vector(best["layer"])


def cosine_matrix(vectors: Sequence[TraitVector]) -> Matrix:
    """Cosines of the vectors, None where two do not live in the same space (component or width)."""
    matrix: Matrix = []
    for a in vectors:
        line: list[float | None] = []
        for b in vectors:
            same = a.component == b.component and a.width == b.width
            value = float(a.direction.astype(np.float64) @ b.direction) if same else None
            line.append(None if value is None else round(float(np.clip(value, -1, 1)), 6))
        matrix.append(line)
    return matrix


def cross_auc_matrix(workspace: Workspace, experiment: str, vectors: Sequence[TraitVector]) -> Matrix:
    """[i][j]: AUC of the vector of trait i on the rows of trait j; 0.5 is "does not tell them apart".

    Off the diagonal all rows of j serve, since vector i saw none of them; on the diagonal only held-out rows.
    None where j was not captured at the vector's position, component or layer, or has no held-out rows
    (diagonal).
    """
    matrix: Matrix = [[None] * len(vectors) for _ in vectors]
    for j, target in enumerate(vectors):
        loaded: dict[tuple[str, str], list[ActivationSet]] = {}
        for i, vector in enumerate(vectors):
            site = (vector.position, vector.component)
            if site not in loaded:
                # one site at a time: activations of a large model take 100 MB each
                loaded.clear()
                loaded[site] = _parts(workspace, experiment, target.trait, *site)
            parts = [part for part in loaded[site] if i != j or part.part == "val"]
            scored = [_project(vector, part) for part in parts if vector.layer in part.layers]
            if scored and all(p is not None for p in scored):
                y = np.concatenate([part.y for part in parts])
                p = np.concatenate([p for p in scored if p is not None])
                if 0 < y.sum() < len(y):
                    matrix[i][j] = round(float(metrics.auc(p[:, None], y)[0]), 6)
    return matrix


def _parts(
    workspace: Workspace, experiment: str, trait: str, position: str, component: str
) -> list[ActivationSet]:
    try:
        train = load_activations(workspace, experiment, trait, position, component, "train")
    except UserError:
        # another trait of the experiment may have been captured before this position was asked for
        return []
    if not has_part(train.metadata, "val"):
        return [train]
    return [train, load_activations(workspace, experiment, trait, position, component, "val")]


def _project(vector: TraitVector, rows: ActivationSet) -> np.ndarray | None:
    if rows.X.shape[2] != vector.width:
        return None
    return vector.project(rows.X[:, rows.layers.index(vector.layer)])


def evaluate_on(
    workspace: Workspace,
    experiment: str,
    trait: str,
    on_trait: str,
    *,
    on_experiment: str | None = None,
    vector: TraitVector | None = None,
    permutations: int = 1000,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Transfer: the vector of `trait` (default the one chosen for it) on the scenarios of `on_trait`.

    `on_experiment` takes the other rows from another experiment: the way to try one vector on another
    scenario set, another position's worth of responses, or another model of the same width. All rows serve,
    except that a trait on itself in its own experiment uses held-out rows only. Threshold and sign stay those
    of the vector's own train rows, so `accuracy` shows a shifted threshold where `auc` does not. Errors:
    UserError for missing activations, layers or another width.
    """
    vector = vector or best_vector(workspace, experiment, trait)
    source = on_experiment or experiment
    train = load_activations(workspace, source, on_trait, vector.position, vector.component, "train")
    parts = [train]
    if has_part(train.metadata, "val"):
        parts.append(load_activations(workspace, source, on_trait, vector.position, vector.component, "val"))
    if source == experiment and on_trait == trait:
        parts = parts[1:]
        if not parts:
            raise UserError(
                f"{trait} has no held-out rows, and on its own train rows a vector always looks good",
                where=experiment,
                remedy="set val_split above 0, or choose another trait",
            )
    if vector.layer not in train.layers:
        raise UserError(
            f"{on_trait} was not captured at layer {vector.layer}",
            where=f"{source}/activations",
            remedy="capture that layer there too (option `layers`)",
        )
    place = train.layers.index(vector.layer)
    p = np.concatenate([vector.project(part.X[:, place]) for part in parts])[:, None]
    y = np.concatenate([part.y for part in parts])
    groups = np.concatenate([part.groups for part in parts])
    threshold = np.array([vector.threshold])
    low, high = metrics.accuracy_interval(p, y, threshold, groups)
    draws = metrics.group_draws(groups, y, bootstrap, seed)
    auc_low, auc_high = metrics.auc_interval(p, y, groups, draws)
    return {
        "trait": trait,
        "on_trait": on_trait,
        "on_experiment": source,
        "method": vector.method,
        "layer": vector.layer,
        "position": vector.position,
        "component": vector.component,
        "n_pos": int(y.sum()),
        "n_neg": int((~y).sum()),
        "auc": number(metrics.auc(p, y)[0]),
        "auc_low": number(auc_low[0]),
        "auc_high": number(auc_high[0]),
        "accuracy": number(metrics.balanced_accuracy(p, y, threshold)[0]),
        "accuracy_low": number(low[0]),
        "accuracy_high": number(high[0]),
        "effect_size_d": number(metrics.effect_size(p, y)[0]),
        "overlap": number(metrics.overlap(p, y)[0]),
        "permutation_p": number(permutation_p(p, y, groups, permutations, seed)[0]),
    }
