"""Scores from train rows alone: cross-validation by group, and split-half stability. Layers and methods are
chosen by these.

Held-out rows are never seen here; that is the point. All folds and halves of a method are fitted in one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trait_assets.activations.split import group_folds
from trait_assets.evaluation.metrics import auc, auc_error
from trait_assets.vectors.linear import unit
from trait_assets.vectors.methods import METHODS, Task

FOLDS = 5
HALVES = 5
# Below this many rows the folds are drawn twice: single folds of four rows are noisy.
_REPEAT_BELOW = 120


@dataclass(frozen=True)
class TrainScores:
    """Per layer, [L] each; NaN where it cannot be computed. `note` says why.

    `cv_auc`: mean AUC within the left-out folds; `cv_accuracy`: balanced, at each fold's own train threshold;
    `cv_effect_size`: signed d within the left-out folds; `split_half_cosine`: mean cosine between the
    directions of two disjoint halves.
    """

    cv_auc: np.ndarray
    cv_accuracy: np.ndarray
    cv_effect_size: np.ndarray
    split_half_cosine: np.ndarray
    note: str | None = None


def subsets_for(groups: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, list[np.ndarray], int]:
    """Row subsets to fit on, [k, n] bool: first the folds' train rows, then pairs of halves.

    Returns them with the left-out rows of each fold and the number of fold subsets.
    """
    n = len(y)
    train, left_out = [], []
    for repeat in range(2 if n < _REPEAT_BELOW else 1):
        fold = group_folds(groups, y, FOLDS, seed + 1000 * repeat)
        for f in range(fold.max() + 1):
            if _two_sides(y, fold != f, 2) and _two_sides(y, fold == f, 1):
                train.append(fold != f)
                left_out.append(fold == f)
    n_folds = len(train)
    for half in range(HALVES):
        fold = group_folds(groups, y, 2, seed + 5000 + half)
        if fold.max() == 1 and _two_sides(y, fold == 0, 2) and _two_sides(y, fold == 1, 2):
            train.extend([fold == 0, fold == 1])
    return np.array(train).reshape(-1, n), left_out, n_folds


def _two_sides(y: np.ndarray, rows: np.ndarray, least: int) -> bool:
    return min((rows & y).sum(), (rows & ~y).sum()) >= least


def train_scores(method: str, task: Task, left_out: list[np.ndarray], n_folds: int) -> TrainScores:
    """Fit `method` on every subset of `task` (from `subsets_for`) and score the folds and the halves."""
    n_layers = task.x.shape[1]
    nothing = np.full(n_layers, np.nan)
    if not len(task.subsets):
        return TrainScores(
            nothing, nothing, nothing, nothing, "too few groups of scenarios to cross-validate"
        )
    directions, norms = unit(METHODS[method].fit(task).raw)
    scores = np.full((3, n_layers), np.nan)
    stable = np.full(n_layers, np.nan)
    for place in range(n_layers):
        found = norms[:, place] > 0
        if not found.all():
            continue
        if n_folds:
            p = task.x[:, place].astype(np.float64) @ directions[:n_folds, place].T
            scores[:, place] = _fold_scores(p, task.y, task.subsets[:n_folds], left_out)
        halves = directions[n_folds:, place]
        # a direction that no row decides is stable without meaning anything
        if len(halves) and METHODS[method].oriented:
            stable[place] = float((halves[0::2] * halves[1::2]).sum(axis=1).mean())
    note = None
    if not n_folds:
        note = "too few groups of scenarios to cross-validate"
    elif len(task.subsets) == n_folds:
        note = "too few groups of scenarios for two halves"
    return TrainScores(scores[0], scores[1], scores[2], stable, note)


def _fold_scores(p: np.ndarray, y: np.ndarray, train: np.ndarray, left_out: list[np.ndarray]) -> np.ndarray:
    """(AUC, balanced accuracy, d) over all folds; `p` [n, folds]. Only rows of one fold are ever compared."""
    pairs = won = 0.0
    hits, rows = np.zeros(2), np.zeros(2)
    gap, weight, squares, freedom = 0.0, 0.0, 0.0, 0
    for f, held in enumerate(left_out):
        column = p[:, f]
        threshold = (column[train[f] & y].mean() + column[train[f] & ~y].mean()) / 2
        pos, neg = column[held & y], column[held & ~y]
        n = len(pos) * len(neg)
        won += float(auc(column[held, None], y[held])[0]) * n
        pairs += n
        hits += [(pos > threshold).sum(), (neg <= threshold).sum()]
        rows += [len(pos), len(neg)]
        gap += (pos.mean() - neg.mean()) * n
        weight += n
        squares += float(((pos - pos.mean()) ** 2).sum() + ((neg - neg.mean()) ** 2).sum())
        freedom += len(pos) + len(neg) - 2
    spread = np.sqrt(squares / freedom) if freedom > 0 else 0.0
    d = gap / weight / spread if spread > 0 else np.nan
    return np.array([won / pairs, (hits / rows).mean(), d])


def choose(rows: list[dict[str, object]], n_pos: int, n_neg: int) -> int | None:
    """Index of the best row by train scores alone; None where none can be scored.

    Rows within one standard error (Hanley–McNeil at `n_pos`, `n_neg` train rows) of the highest `cv_auc`
    count as equal: on well-separated traits most layers reach 1. Among them the largest `cv_effect_size`
    wins, which does not saturate. Rows with `oriented` false (random directions) cannot be chosen.
    """
    scored = [
        (i, float(row["cv_auc"]), _number(row.get("cv_effect_size")))  # type: ignore[arg-type]
        for i, row in enumerate(rows)
        if row.get("oriented") and row.get("cv_auc") is not None
    ]
    if not scored:
        return None
    top = max(value for _, value, _ in scored)
    near = [item for item in scored if item[1] >= top - auc_error(top, n_pos, n_neg)]
    return max(near, key=lambda item: (item[2], item[1]))[0]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("-inf")
