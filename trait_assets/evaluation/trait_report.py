"""The evaluation of one trait's vectors: one row per layer × method × position × component, and the row that
train chooses.

Arrays and vectors in, plain rows out. What the numbers mean is in `metrics`, `null` and `crossval`; where
they are kept is `evaluation`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trait_assets.evaluation import metrics
from trait_assets.evaluation.crossval import choose, subsets_for, train_scores
from trait_assets.evaluation.null import percentile_within, permutation_p, random_null
from trait_assets.vectors.fit import task_of
from trait_assets.vectors.methods import random_directions

if TYPE_CHECKING:
    from trait_assets.activations.dataset import ActivationSet
    from trait_assets.vectors.vector import VectorFile

# More than this share of ‖v‖² in three dimensions is a direction about those dimensions.
MASSIVE_ENERGY = 0.5
TOP_DIMENSIONS = 3


@dataclass(frozen=True)
class EvaluationOptions:
    """Sizes of the null distributions and of the bootstrap, and the seed of all of them."""

    n_random: int = 100
    n_permutations: int = 200
    bootstrap: int = 1000
    seed: int = 0


Row = dict[str, Any]


def evaluate_site(
    train: ActivationSet,
    val: ActivationSet | None,
    files: Mapping[str, VectorFile],
    options: EvaluationOptions,
) -> tuple[list[Row], list[str]]:
    """Rows of one position and component, and notes. Without `val` the held-out fields are None.

    Only train rows decide `cv_*`, `split_half_cosine`, thresholds and signs.
    """
    rows: list[Row] = []
    notes: list[str] = []
    subsets, left_out, n_folds = subsets_for(train.groups, train.y, options.seed)
    layers = sorted({layer for file in files.values() for layer in file.layers})
    if not layers:
        return rows, notes
    task = task_of(train, options.seed, layers, subsets)
    nulls = _null_by_layer(train, val, layers, options) if val is not None else {}
    draws = (
        metrics.group_draws(val.groups, val.y, options.bootstrap, options.seed) if val is not None else None
    )
    for method, file in files.items():
        scores = train_scores(method, task, left_out, n_folds)
        if scores.note and scores.note not in notes:
            notes.append(scores.note)
        energy = metrics.energy_in_top(file.directions, TOP_DIMENSIONS)
        held = _held_out(val, file, draws, nulls, options) if val is not None else {}
        for i, layer in enumerate(file.layers):
            place = layers.index(layer)
            row: Row = {
                "layer": layer,
                "method": method,
                "position": file.position,
                "component": file.component,
                "oriented": file.oriented,
                "train_accuracy": number(file.train_accuracy[i]),
                "cv_auc": number(scores.cv_auc[place]),
                "cv_accuracy": number(scores.cv_accuracy[place]),
                "cv_effect_size": number(scores.cv_effect_size[place]),
                "split_half_cosine": number(scores.split_half_cosine[place]),
                "raw_norm": number(file.raw_norm[i]),
                "median_norm": number(file.median_norm[i]),
                "raw_norm_over_median_norm": number(file.raw_norm[i] / file.median_norm[i]),
                "energy_top3": number(energy[i]),
                "massive_dimension": bool(energy[i] > MASSIVE_ENERGY),
                "threshold": number(file.threshold[i]),
            }
            row |= {name: number(values[i]) for name, values in held.items()} or dict.fromkeys(
                HELD_OUT_FIELDS
            )
            if val is not None:
                row["polarity_ok"] = bool(held["separation"][i] > 0)
                if row["train_accuracy"] is not None and row["val_accuracy"] is not None:
                    row["train_val_gap"] = row["train_accuracy"] - row["val_accuracy"]
            rows.append(row)
    return rows, notes


HELD_OUT_FIELDS = (
    "val_accuracy",
    "val_accuracy_low",
    "val_accuracy_high",
    "val_auc",
    "val_auc_low",
    "val_auc_high",
    "effect_size_d",
    "separation",
    "overlap",
    "polarity_ok",
    "train_val_gap",
    "permutation_p",
    "null_percentile",
    "null_auc_mean",
    "null_auc_p05",
    "null_auc_p95",
    "random_accuracy_mean",
    "random_accuracy_p05",
    "random_accuracy_p95",
)


def _held_out(
    val: ActivationSet,
    file: VectorFile,
    draws: np.ndarray | None,
    nulls: dict[int, dict[str, np.ndarray]],
    options: EvaluationOptions,
) -> dict[str, np.ndarray]:
    """Held-out numbers of all layers of one file, each [L]."""
    assert draws is not None
    places = [val.layers.index(layer) for layer in file.layers]
    p = np.stack(
        [val.X[:, place].astype(np.float64) @ file.directions[i] for i, place in enumerate(places)], axis=1
    )
    threshold = np.asarray(file.threshold, dtype=np.float64)
    low, high = metrics.accuracy_interval(p, val.y, threshold, val.groups)
    auc_low, auc_high = metrics.auc_interval(p, val.y, val.groups, draws)
    auc = metrics.auc(p, val.y)
    null = [nulls[layer] for layer in file.layers]
    return {
        "val_accuracy": metrics.balanced_accuracy(p, val.y, threshold),
        "val_accuracy_low": low,
        "val_accuracy_high": high,
        "val_auc": auc,
        "val_auc_low": auc_low,
        "val_auc_high": auc_high,
        "effect_size_d": metrics.effect_size(p, val.y),
        "separation": metrics.separation(p, val.y),
        "overlap": metrics.overlap(p, val.y),
        "permutation_p": permutation_p(p, val.y, val.groups, options.n_permutations, options.seed),
        "null_percentile": np.array([percentile_within(auc[i], n["auc"]) for i, n in enumerate(null)]),
        "null_auc_mean": np.array([n["auc"].mean() for n in null]),
        "null_auc_p05": np.array([np.quantile(n["auc"], 0.05) for n in null]),
        "null_auc_p95": np.array([np.quantile(n["auc"], 0.95) for n in null]),
        "random_accuracy_mean": np.array([n["accuracy"].mean() for n in null]),
        "random_accuracy_p05": np.array([np.quantile(n["accuracy"], 0.05) for n in null]),
        "random_accuracy_p95": np.array([np.quantile(n["accuracy"], 0.95) for n in null]),
    }


def _null_by_layer(
    train: ActivationSet, val: ActivationSet, layers: Sequence[int], options: EvaluationOptions
) -> dict[int, dict[str, np.ndarray]]:
    found = {}
    for layer in layers:
        place = train.layers.index(layer)
        # the seed is moved on: the stored `random` vector is not a member of the null it is compared with
        family = random_directions(options.n_random, train.X.shape[2], options.seed + 1, layer).astype(
            np.float32
        )
        found[layer] = random_null(train.X[:, place] @ family.T, train.y, val.X[:, place] @ family.T, val.y)
    return found


def choose_best(rows: list[Row], n_pos: int, n_neg: int) -> Row | None:
    """The row that cross-validation on train chooses, or None; see `crossval.choose`."""
    index = choose(rows, n_pos, n_neg)
    return None if index is None else rows[index]


def cosines(directions: np.ndarray) -> list[list[float]]:
    """Cosine matrix of unit directions [k, d], rounded to what float32 carries."""
    matrix = np.clip(directions.astype(np.float64) @ directions.T.astype(np.float64), -1.0, 1.0)
    return [[round(float(value), 6) for value in line] for line in matrix]


def number(value: Any) -> float | None:
    """A plain float, or None for what is not a finite number: no NaN ever reaches a file."""
    value = float(value)
    return value if np.isfinite(value) else None
