"""Do p-values and intervals mean what they say, over 500 simulated data sets each?"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest, norm

from trait_assets.evaluation.metrics import accuracy_interval, auc_interval, group_draws
from trait_assets.evaluation.null import permutation_p
from trait_assets.vectors.linear import unit
from trait_assets.vectors.methods import METHODS, Task

DRAWS = 500


@pytest.mark.parametrize("method", ["mean_diff", "probe", "gradient", "lda"])
def test_p_values_on_null_data_are_uniform(method: str) -> None:
    """The whole path: fit on train rows without any signal, test on held-out rows, 500 times."""
    n_train, n_val, d = 24, 24, 40
    y_train, y_val = np.arange(n_train) < n_train // 2, np.arange(n_val) < n_val // 2
    rng = np.random.default_rng(11)
    # the data sets are the layers of one task, which is what makes 500 fits quick
    train = rng.standard_normal((n_train, DRAWS, d)).astype(np.float32)
    val = rng.standard_normal((n_val, DRAWS, d))
    task = Task(
        train,
        y_train,
        np.arange(n_train),
        np.full(n_train, -1),
        np.ones((1, n_train), dtype=bool),
        range(DRAWS),
    )
    directions, _ = unit(METHODS[method].fit(task).raw[0])
    p = np.einsum("nld,ld->nl", val, directions)
    values = np.array(
        [permutation_p(p[:, [i]], y_val, np.arange(n_val), 199, seed=i)[0] for i in range(DRAWS)]
    )
    significant = float((values <= 0.05).mean())
    uniform = kstest(values, "uniform").pvalue
    print(f"{method}: KS p = {uniform:.3f}, called significant at 0.05: {significant:.3f}")
    assert uniform > 0.01
    # 500 draws at a true rate of 0.05 have a standard error of 0.01
    assert significant <= 0.05 + 0.02


def _coverage(true_auc: float, n: int, copies: int = 1) -> float:
    rng = np.random.default_rng(int(1000 * true_auc) + n + copies)
    gap = norm.ppf(true_auc) * np.sqrt(2)
    y = np.repeat(np.arange(2 * n) < n, copies)
    groups = np.repeat(np.arange(2 * n), copies)
    hits = 0
    for draw in range(DRAWS):
        # rows of one group are equal up to a little: near-duplicates
        p = np.repeat(rng.standard_normal(2 * n), copies) + gap * y
        p = p + (1e-6 * rng.standard_normal(len(p)) if copies > 1 else 0.0)
        draws = group_draws(groups, y, 300, draw)
        low, high = auc_interval(p[:, None], y, groups, draws)
        hits += int(low[0] <= true_auc <= high[0])
    return hits / DRAWS


@pytest.mark.parametrize(
    ("true_auc", "n", "copies"),
    [(0.5, 40, 1), (0.75, 40, 1), (0.9, 40, 1), (0.97, 40, 1), (0.75, 100, 1), (0.95, 100, 1), (0.85, 40, 3)],
)
def test_auc_interval_covers_the_truth(true_auc: float, n: int, copies: int) -> None:
    covered = _coverage(true_auc, n, copies)
    print(f"AUC {true_auc}, {n} groups per side × {copies}: {covered:.3f} of {DRAWS}")
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(("true_auc", "n"), [(0.75, 4), (0.95, 4), (0.9, 10)])
def test_auc_interval_of_few_rows_is_wide_rather_than_wrong(true_auc: float, n: int) -> None:
    assert _coverage(true_auc, n) >= 0.93


@pytest.mark.parametrize("n", [4, 10, 40])
def test_accuracy_interval_covers_the_truth(n: int) -> None:
    """Wilson's interval covers 95 % on average over shares; at a single share it goes up and down with it."""
    rng = np.random.default_rng(5)
    y = np.arange(2 * n) < n
    covered = []
    for truth in np.linspace(0.55, 0.95, 17):
        # positives a little harder than negatives
        right = rng.random((2 * n, 800)) < np.where(y, truth - 0.04, truth + 0.04)[:, None]
        p = np.where(right == y[:, None], 1.0, 0.0)
        low, high = accuracy_interval(p, y, np.full(800, 0.5), np.arange(2 * n))
        covered.append(float(((low <= truth) & (truth <= high)).mean()))
    print(f"accuracy, {n} per side: mean {np.mean(covered):.3f}, least {min(covered):.3f}")
    assert 0.93 <= np.mean(covered) <= 0.98
    assert min(covered) >= 0.90
