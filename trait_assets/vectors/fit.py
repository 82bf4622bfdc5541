"""From labelled train rows to finished vectors: unit directions with norm, threshold, sign and train
accuracy.

The methods themselves are in `methods`; where rows come from and where vectors go is `extraction`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.errors import UserError
from trait_assets.vectors.linear import moments, unit
from trait_assets.vectors.methods import METHODS, Task, get_method
from trait_assets.vectors.vector import VectorFile

if TYPE_CHECKING:
    from trait_assets.activations.dataset import ActivationSet

# |h·v| may carry this much of a row's length in rounding alone
_NO_SEPARATION = 1e-6


def task_of(
    activations: ActivationSet,
    seed: int,
    layers: Sequence[int] | None = None,
    subsets: np.ndarray | None = None,
) -> Task:
    """The fitting task of some layers (default all) and row subsets (default one, all rows)."""
    chosen = list(activations.layers) if layers is None else list(layers)
    missing = [layer for layer in chosen if layer not in activations.layers]
    if missing:
        raise UserError(
            f"layers {missing} were not captured",
            where=f"{activations.trait}, {activations.position}, {activations.component}",
            remedy=f"captured layers are {activations.layers}",
        )
    places = [activations.layers.index(layer) for layer in chosen]
    x = activations.X if chosen == list(activations.layers) else activations.X[:, places]
    pairs = [row.get("pair") for row in activations.metadata.get("rows", {}).get(activations.part, [])]
    pair_of = np.array([-1 if pair is None else int(pair) for pair in pairs] or [-1] * len(activations.y))
    if subsets is None:
        subsets = np.ones((1, len(activations.y)), dtype=bool)
    return Task(x, activations.y, activations.groups, pair_of, subsets, chosen, seed)


def check_rows(activations: ActivationSet) -> None:
    """UserError for one-sided, too few or non-finite rows, naming what to do."""
    where = f"{activations.trait}, {activations.position}, {activations.component}"
    n_pos, n_neg = int(activations.y.sum()), int((~activations.y).sum())
    if min(n_pos, n_neg) < 2:
        raise UserError(
            f"{n_pos} positive and {n_neg} negative train rows; a direction needs at least 2 of each",
            where=where,
            remedy="add scenarios, lower the vetting thresholds, or lower val_split",
        )
    finite = np.array([bool(np.isfinite(activations.X[:, i]).all()) for i in range(activations.X.shape[1])])
    if not finite.all():
        bad = [activations.layers[i] for i in np.flatnonzero(~finite)]
        row = int(np.flatnonzero(~np.isfinite(activations.X[:, np.flatnonzero(~finite)[0]]).all(axis=1))[0])
        raise UserError(
            f"activations are not finite at layers {bad} (first in row {activations.keys[row]})",
            where=where,
            remedy="load the model as bfloat16 or float32 (float16 overflows), or leave these layers out",
        )


def constant_layers(task: Task) -> dict[int, str]:
    """Layers at which nothing can be fitted, with the reason: every row is the same there."""
    found = {}
    for place, layer in enumerate(task.layers):
        _, spread = moments(task.x[:, place].astype(np.float64))
        if not spread.any():
            found[int(layer)] = "every row is the same"
    return found


def fit_vectors(
    activations: ActivationSet, methods: Sequence[str], seed: int, *, metadata: dict[str, Any] | None = None
) -> dict[str, VectorFile]:
    """Fit every method on all train rows and all layers.

    Layers without any variation are left out and named in `metadata["excluded_layers"]`, as is a layer where
    a method found no direction. Errors: UserError for rows that cannot carry a direction at all.
    """
    for name in methods:
        get_method(name)
    check_rows(activations)
    task = task_of(activations, seed)
    excluded = constant_layers(task)
    kept = [layer for layer in task.layers if layer not in excluded]
    if not kept:
        raise UserError(
            "every row has the same activations at every layer",
            where=f"{activations.trait}, {activations.position}, {activations.component}",
            remedy="choose a position that differs between rows (prompt[0] is the same in every chat prompt)",
        )
    if excluded:
        task = task_of(activations, seed, kept)
    return {
        name: _finish(name, task, activations, dict(excluded), dict(metadata or {}))
        for name in dict.fromkeys(methods)
    }


def _finish(
    name: str, task: Task, activations: ActivationSet, excluded: dict[int, str], metadata: dict[str, Any]
) -> VectorFile:
    fitted = METHODS[name].fit(task)
    directions, norms = unit(fitted.raw[0])
    y = task.y
    rows: dict[str, list[float]] = {key: [] for key in ("pos", "neg", "accuracy", "norm", "median")}
    kept, places, facts = [], [], {}
    for place, layer in enumerate(task.layers):
        x = task.x[:, place].astype(np.float64)
        p = x @ directions[place]
        pos, neg = float(p[y].mean()), float(p[~y].mean())
        size = float(np.median(np.linalg.norm(x - x.mean(axis=0), axis=1)))
        if norms[place] == 0 or (METHODS[name].oriented and pos - neg <= _NO_SEPARATION * size):
            excluded[int(layer)] = f"{name} found no direction: the sides do not differ"
            continue
        kept.append(int(layer))
        places.append(place)
        threshold = (pos + neg) / 2
        rows["pos"].append(pos)
        rows["neg"].append(neg)
        rows["accuracy"].append(float(((p[y] > threshold).mean() + (p[~y] <= threshold).mean()) / 2))
        rows["norm"].append(float(norms[place]))
        median = activations.metadata["median_norm"][activations.layers.index(layer)]
        rows["median"].append(np.nan if median is None else float(median))
        if fitted.info[place]:
            facts[str(layer)] = fitted.info[place]
    if not kept:
        raise UserError(
            f"{name} found no direction at any layer: the positive and negative rows do not differ",
            where=f"{activations.trait}, {activations.position}, {activations.component}",
            remedy="check that the scenarios of the two sides differ",
        )
    pos_mean, neg_mean = np.array(rows["pos"]), np.array(rows["neg"])
    return VectorFile(
        trait=activations.trait,
        method=name,
        position=activations.position,
        component=activations.component,
        layers=kept,
        directions=directions[places].astype(np.float32),
        raw_norm=np.abs(pos_mean - neg_mean),
        median_norm=np.array(rows["median"]),
        threshold=(pos_mean + neg_mean) / 2,
        sign=np.where(pos_mean >= neg_mean, 1, -1),
        mean_positive=pos_mean,
        mean_negative=neg_mean,
        train_accuracy=np.array(rows["accuracy"]),
        coefficient_norm=np.array(rows["norm"]),
        metadata={
            **metadata,
            "title": METHODS[name].title,
            "oriented": METHODS[name].oriented,
            "n_layers": activations.metadata.get("n_layers"),
            "hidden_dim": int(task.x.shape[2]),
            "n_train_pos": int(y.sum()),
            "n_train_neg": int((~y).sum()),
            "excluded_layers": [
                {"layer": layer, "reason": reason} for layer, reason in sorted(excluded.items())
            ],
            "fit": facts,
        },
    )
