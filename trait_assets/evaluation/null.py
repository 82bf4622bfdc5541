"""What chance gives: random directions and shuffled labels. The statistic itself comes from `metrics`."""

from __future__ import annotations

import numpy as np

from trait_assets.evaluation.metrics import auc


def permutation_p(p: np.ndarray, y: np.ndarray, groups: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """p-value of the held-out separation under shuffled labels, [c], for projections `p` [n, c]; NaN for 0
    draws.

    The direction is fixed (train rows made it); under the null the labels of the held-out rows are
    exchangeable. Labels are shuffled over blocks, a block being the rows of one group on one side, so that
    near-duplicates move together. Statistic: AUC, ties resolved by the difference of means. p = (1 + draws at
    or above the observed) / (1 + draws), an exact test (Phipson & Smyth 2010): it never is 0, and with few
    blocks it cannot be small.
    """
    if draws == 0:
        return np.full(p.shape[1], np.nan)
    _, block = np.unique(np.stack([groups, y]), axis=1, return_inverse=True)
    block = np.asarray(block).ravel()
    label = np.zeros(block.max() + 1, dtype=bool)
    label[block] = y
    rng = np.random.default_rng([seed, 86028121])
    shuffled = np.array([rng.permutation(label)[block] for _ in range(draws)])
    # a shuffle of unequal blocks may in principle move all rows to one side only if there were no blocks of
    # the other
    labels = np.concatenate([y[None], shuffled]).astype(np.float64)
    n_pos = labels.sum(axis=1, keepdims=True)
    n_neg = len(y) - n_pos
    reach = np.maximum(p.max(axis=0) - p.min(axis=0), 1e-300)
    ranks = _midranks(p)
    auc_of = (labels @ ranks - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)
    means = (labels @ p) / n_pos - ((1 - labels) @ p) / n_neg
    # smaller than any step between two AUCs, so it decides ties only
    statistic = auc_of + means / reach * (0.5 / (len(y) ** 2 + 1))
    at_least = (statistic[1:] >= statistic[0] - 1e-12).sum(axis=0)
    return (1 + at_least) / (1 + draws)


def _midranks(p: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(p, axis=0)


def random_null(
    train: np.ndarray, train_y: np.ndarray, held: np.ndarray, held_y: np.ndarray
) -> dict[str, np.ndarray]:
    """Held-out results of m random directions, from their projections `train` [n, m] and `held` [k, m].

    Each gets its threshold from train like any vector. `accuracy` [m] is that of the direction as drawn
    ("about 50 %" only on average); `auc` [m] is after train fixed the sign, which is the fair comparison for
    a vector whose sign train fixed.
    """
    pos, neg = train[train_y].mean(axis=0), train[~train_y].mean(axis=0)
    threshold = (pos + neg) / 2
    as_drawn = ((held[held_y] > threshold).mean(axis=0) + (held[~held_y] <= threshold).mean(axis=0)) / 2
    sign = np.where(pos >= neg, 1.0, -1.0)
    return {"accuracy": as_drawn, "auc": auc(held * sign, held_y)}


def percentile_within(value: float, null: np.ndarray) -> float:
    """Per cent of the null below `value`, ties counted half."""
    return float(100 * ((null < value).mean() + 0.5 * (null == value).mean()))
