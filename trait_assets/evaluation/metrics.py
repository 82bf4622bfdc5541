"""What a direction separates: accuracy, AUC, effect size, overlap, and their intervals. Numbers in, numbers
out.

Every function takes projections of labelled rows on c directions at once, `p` [n, c], and returns [c].
Thresholds and signs come from train rows and are passed in; nothing here chooses anything. What is undefined
(an effect size of one row) is NaN here and becomes null in every stored file.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm, t

# Least standard error of an AUC, as a share of the Hanley–McNeil error at that AUC: when every draw of a
# bootstrap is perfectly separated its spread is 0, and 0 is not the truth.
_ERROR_FLOOR = 0.5


def auc(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of positive × negative pairs in which the positive projects higher (ties count half), [c]."""
    return _comparisons(p, y).mean(axis=(0, 1))


def _comparisons(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    difference = p[y][:, None] - p[~y][None, :]
    return (difference > 0) + 0.5 * (difference == 0)


def balanced_accuracy(p: np.ndarray, y: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Mean of the share of positives above and the share of negatives at or below `threshold` [c], [c]."""
    return ((p[y] > threshold).mean(axis=0) + (p[~y] <= threshold).mean(axis=0)) / 2


def effect_size(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed Cohen's d, [c]: (mean₊ − mean₋) / pooled sample deviation. A flipped direction is negative.

    NaN with fewer than two rows on a side or without any spread.
    """
    pos, neg = p[y], p[~y]
    if len(pos) < 2 or len(neg) < 2:
        return np.full(p.shape[1], np.nan)
    squares = ((pos - pos.mean(axis=0)) ** 2).sum(axis=0) + ((neg - neg.mean(axis=0)) ** 2).sum(axis=0)
    spread = np.sqrt(squares / (len(p) - 2))
    difference = pos.mean(axis=0) - neg.mean(axis=0)
    # what floating point leaves of a spread of nothing is nothing
    real = spread > 1e-9 * np.maximum(np.abs(p).max(axis=0), 1e-300)
    return np.where(real, difference / np.where(real, spread, 1.0), np.nan)


def separation(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """mean₊ − mean₋ in activation units, [c], signed."""
    return p[y].mean(axis=0) - p[~y].mean(axis=0)


def overlap(p: np.ndarray, y: np.ndarray, points: int = 400) -> np.ndarray:
    """∫ min(f₊, f₋), [c]: the overlapping coefficient of the two class densities, 0 (apart) to 1 (the same).

    Densities are Gaussian kernel estimates with Silverman's bandwidth (0.9 min(s, IQR/1.34) n^-1/5); the
    integral is taken numerically over the joint range. NaN with fewer than two rows on a side.
    """
    pos, neg = p[y], p[~y]
    result = np.full(p.shape[1], np.nan)
    if len(pos) < 2 or len(neg) < 2:
        return result
    for column in range(p.shape[1]):
        a, b = pos[:, column], neg[:, column]
        reach = float(max(a.max(), b.max()) - min(a.min(), b.min()))
        if reach <= 1e-9 * float(np.abs(p[:, column]).max()):
            result[column] = 1.0
            continue
        width_a, width_b = max(_silverman(a), 1e-3 * reach), max(_silverman(b), 1e-3 * reach)
        margin = 4 * max(width_a, width_b)
        grid = np.linspace(min(a.min(), b.min()) - margin, max(a.max(), b.max()) + margin, points)
        density = np.minimum(_kernel_density(a, width_a, grid), _kernel_density(b, width_b, grid))
        result[column] = float(np.clip(np.trapezoid(density, grid), 0.0, 1.0))
    return result


def _silverman(values: np.ndarray) -> float:
    quartiles = np.quantile(values, [0.25, 0.75])
    spread = float(values.std(ddof=1))
    robust = float(quartiles[1] - quartiles[0]) / 1.34
    return 0.9 * (min(spread, robust) if robust > 0 else spread) * len(values) ** -0.2


def _kernel_density(values: np.ndarray, width: float, grid: np.ndarray) -> np.ndarray:
    z = (grid[:, None] - values[None, :]) / width
    return np.exp(-0.5 * z * z).mean(axis=1) / (width * np.sqrt(2 * np.pi))


def wilson(share: np.ndarray | float, n: float, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of proportions observed in `n` rows each; `n` may be an effective number."""
    z = float(norm.ppf((1 + level) / 2))
    share = np.asarray(share, dtype=np.float64)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # at 0 and 1 the bound is 0 and 1; rounding must not move it past the estimate
    return np.maximum(0.0, np.minimum(middle - half, share)), np.minimum(
        1.0, np.maximum(middle + half, share)
    )


def accuracy_interval(
    p: np.ndarray, y: np.ndarray, threshold: np.ndarray, groups: np.ndarray, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the balanced accuracy, ([c], [c]).

    Wilson's interval of the balanced share. Near-duplicates are not independent, so a group counts once per
    side; with G₊ and G₋ groups the effective number of rows is 4 / (1/G₊ + 1/G₋), which is G₊ + G₋ for even
    sides.
    """
    effective = 4 / (1 / len(np.unique(groups[y])) + 1 / len(np.unique(groups[~y])))
    return wilson(balanced_accuracy(p, y, threshold), effective, level)


def group_draws(groups: np.ndarray, y: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """How often each row occurs in each bootstrap draw, [draws, n].

    Whole groups are drawn with replacement, within strata of what a group holds (positives, negatives, both),
    so no draw loses a side.
    """
    ids, inverse = np.unique(groups, return_inverse=True)
    has = np.zeros((len(ids), 2), dtype=bool)
    has[inverse, y.astype(int)] = True
    stratum = has[:, 0] * 2 + has[:, 1]
    rng = np.random.default_rng([seed, 49979687])
    counts = np.zeros((draws, len(ids)), dtype=np.float64)
    for kind in np.unique(stratum):
        members = np.flatnonzero(stratum == kind)
        counts[:, members] = rng.multinomial(
            len(members), np.full(len(members), 1 / len(members)), size=draws
        )
    return counts[:, inverse]


def auc_interval(
    p: np.ndarray, y: np.ndarray, groups: np.ndarray, draws: np.ndarray, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the AUC, ([c], [c]), from `draws` of `group_draws`.

    The standard error is that of the group bootstrap, never below half of Hanley & McNeil's (1982); the
    interval is t on the logit scale, with 2 G − 2 degrees of freedom for G groups on the smaller side. A
    percentile interval covers too little where it matters: over 600 simulations at 40 rows per side, 90 % at
    an AUC of 0.90 and 87 % at 0.97. This one covers 94 to 97 % there, and more than it says below 10 rows per
    side.
    """
    above = _comparisons(p, y)
    n_pos, n_neg, c = above.shape
    estimate = above.mean(axis=(0, 1))
    weight_pos, weight_neg = draws[:, y], draws[:, ~y]
    totals = np.maximum(weight_pos.sum(axis=1) * weight_neg.sum(axis=1), 1.0)
    error = np.empty(c)
    for column in range(c):
        drawn = ((weight_pos @ above[:, :, column]) * weight_neg).sum(axis=1) / totals
        error[column] = drawn.std(ddof=1)
    sides = min(len(np.unique(groups[y])), len(np.unique(groups[~y])))
    # the estimate is drawn in from 0 and 1 by half a pair, so that the logit exists
    inner = (estimate * n_pos * n_neg + 0.5) / (n_pos * n_neg + 1)
    error = np.maximum(error, _ERROR_FLOOR * _hanley_mcneil(inner, n_pos, n_neg))
    half = t.ppf((1 + level) / 2, max(2 * sides - 2, 1)) * error / (inner * (1 - inner))
    low, high = expit(logit(inner) - half), expit(logit(inner) + half)
    return np.minimum(low, estimate), np.maximum(high, estimate)


def _hanley_mcneil(a: np.ndarray, n_pos: int, n_neg: int) -> np.ndarray:
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + (n_pos - 1) * (q1 - a * a) + (n_neg - 1) * (q2 - a * a)) / (n_pos * n_neg)
    return np.sqrt(np.maximum(variance, 0.0))


def auc_error(a: float, n_pos: int, n_neg: int) -> float:
    """Hanley & McNeil's standard error of an AUC, with the estimate drawn in from 0 and 1 by half a pair."""
    inner = np.array([(a * n_pos * n_neg + 0.5) / (n_pos * n_neg + 1)])
    return float(_hanley_mcneil(inner, n_pos, n_neg)[0])


def energy_in_top(directions: np.ndarray, top: int = 3) -> np.ndarray:
    """Share of ‖v‖² in the `top` largest dimensions, [c], of `directions` [c, d]: near 1 is a massive
    dimension.
    """
    squares = directions.astype(np.float64) ** 2
    largest = np.sort(squares, axis=1)[:, -top:].sum(axis=1)
    return largest / np.maximum(squares.sum(axis=1), 1e-300)
