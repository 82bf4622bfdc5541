"""Each metric against an independent computation or a known value."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from trait_assets.evaluation import metrics
from trait_assets.evaluation.null import percentile_within, permutation_p, random_null


def two_normals(gap: float, n: int, seed: int = 0, columns: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """n rows per side, unit spread, means `gap` apart."""
    y = np.arange(2 * n) < n
    p = np.random.default_rng(seed).standard_normal((2 * n, columns)) + gap * y[:, None]
    return p, y


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_auc_equals_scikit_learn(seed: int, n_pos: int, n_neg: int, ties: bool) -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    p = rng.standard_normal((n_pos + n_neg, 3))
    p = np.round(p) if ties else p
    y = np.arange(n_pos + n_neg) < n_pos
    np.testing.assert_allclose(metrics.auc(p, y), [roc_auc_score(y, p[:, c]) for c in range(3)])


def test_a_flipped_direction_shows() -> None:
    p, y = two_normals(3, 50)
    assert metrics.effect_size(p, y)[0] == pytest.approx(-metrics.effect_size(-p, y)[0])
    assert metrics.effect_size(-p, y)[0] < -2
    assert metrics.auc(-p, y)[0] < 0.1
    assert metrics.separation(-p, y)[0] < -2
    assert metrics.balanced_accuracy(-p, y, np.array([-1.5]))[0] < 0.15


def test_effect_size_is_cohens_d() -> None:
    p = np.array([[1.0], [2.0], [3.0], [7.0], [9.0]])
    y = np.array([False, False, False, True, True])
    pooled = np.sqrt((2 * 1.0 + 1 * 2.0) / 3)
    assert metrics.effect_size(p, y)[0] == pytest.approx((8 - 2) / pooled)


def test_effect_size_of_one_row_or_of_no_spread_is_undefined() -> None:
    y = np.array([True, False, False])
    assert np.isnan(metrics.effect_size(np.array([[1.0], [2.0], [3.0]]), y)[0])
    assert np.isnan(metrics.overlap(np.array([[1.0], [2.0], [3.0]]), y)[0])
    four = np.array([True, True, False, False])
    assert np.isnan(metrics.effect_size(np.array([[5.0], [5.0], [1.0], [1.0]]), four)[0])


def test_accuracy_uses_the_given_threshold_and_balances() -> None:
    y = np.array([True] * 2 + [False] * 8)
    p = np.array([[1.0], [1.0]] + [[0.0]] * 8)
    assert metrics.balanced_accuracy(p, y, np.array([0.5]))[0] == 1.0
    assert metrics.balanced_accuracy(p, y, np.array([2.0]))[0] == 0.5
    # a shifted threshold must cost accuracy: it is not fitted to these rows
    assert metrics.balanced_accuracy(p + 5, y, np.array([0.5]))[0] == 0.5


@pytest.mark.parametrize("gap", [0.0, 1.0, 2.0, 4.0])
def test_overlap_is_the_integral(gap: float) -> None:
    p, y = two_normals(gap, 4000, seed=1)
    assert metrics.overlap(p, y)[0] == pytest.approx(2 * norm.cdf(-gap / 2), abs=0.03)


def test_overlap_at_the_ends() -> None:
    y = np.arange(20) < 10
    assert metrics.overlap(np.zeros((20, 1)), y)[0] == 1.0
    far = np.where(y, 1000.0, 0.0)[:, None] + np.random.default_rng(0).standard_normal((20, 1))
    assert metrics.overlap(far, y)[0] == pytest.approx(0.0, abs=1e-6)
    # it is no function of d alone: two humps on either side of the other class overlap little at d = 0
    humps = np.concatenate([np.repeat([-5.0, 5.0], 50), np.zeros(100)])[:, None]
    humps += np.random.default_rng(1).normal(0, 0.3, (200, 1))
    split = np.arange(200) < 100
    assert abs(metrics.effect_size(humps, split)[0]) < 0.2
    assert metrics.overlap(humps, split)[0] < 0.2


def test_wilson_interval_has_its_known_values() -> None:
    # statsmodels' proportion_confint(method="wilson")
    assert metrics.wilson(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    assert metrics.wilson(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert metrics.wilson(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-4)


def test_accuracy_interval_counts_near_duplicates_once() -> None:
    p, y = two_normals(2.0, 20)
    threshold = np.array([1.0])
    alone = np.subtract(*metrics.accuracy_interval(p, y, threshold, np.arange(40)))[0]
    copies = np.repeat(np.arange(40), 5)
    repeated = np.subtract(*metrics.accuracy_interval(p[copies], y[copies], threshold, copies))[0]
    assert repeated == pytest.approx(alone)
    ignored = np.subtract(*metrics.accuracy_interval(p[copies], y[copies], threshold, np.arange(200)))[0]
    assert abs(ignored) < 0.6 * abs(alone)


def test_bootstrap_draws_whole_groups_and_keeps_both_sides() -> None:
    groups = np.array([0, 0, 1, 2, 2, 2, 3, 4])
    y = np.array([True, False, True, False, False, False, False, True])
    draws = metrics.group_draws(groups, y, 200, 0)
    assert draws.shape == (200, 8)
    assert (draws[:, 3] == draws[:, 4]).all()
    assert (draws[:, y].sum(axis=1) > 0).all()
    assert (draws[:, ~y].sum(axis=1) > 0).all()
    # the strata keep their numbers of groups: one mixed, two of positives, two of negatives
    assert (draws[:, 0] == 1).all()
    assert (draws[:, 2] + draws[:, 7] == 2).all()
    assert (draws[:, 3] + draws[:, 6] == 2).all()


def test_interval_of_perfect_separation_is_not_a_point() -> None:
    p, y = two_normals(20, 4)
    draws = metrics.group_draws(np.arange(8), y, 300, 0)
    low, high = metrics.auc_interval(p, y, np.arange(8), draws)
    assert high[0] == 1.0
    assert low[0] < 0.8


def test_energy_in_the_largest_dimensions() -> None:
    massive = np.zeros((1, 100))
    massive[0, [3, 50]] = 1.0
    flat = np.full((1, 100), 0.1)
    np.testing.assert_allclose(metrics.energy_in_top(np.concatenate([massive, flat])), [1.0, 0.03])


def test_p_value_counts_the_observed_labels_too() -> None:
    p, y = two_normals(30, 20)
    assert permutation_p(p, y, np.arange(40), 199, 0)[0] == pytest.approx(1 / 200)
    assert np.isnan(permutation_p(p, y, np.arange(40), 0, 0)[0])
    assert permutation_p(-p, y, np.arange(40), 199, 0)[0] == pytest.approx(1.0)


def test_p_value_of_three_and_three_rows_cannot_be_small() -> None:
    p, y = two_normals(30, 3)
    # 20 ways to label them, one of which is as good
    assert permutation_p(p, y, np.arange(6), 4000, 0)[0] == pytest.approx(1 / 20, abs=0.015)


def test_p_value_shuffles_near_duplicates_together() -> None:
    """Five copies of each row are no more evidence than one."""
    p, y = two_normals(1.0, 6, seed=3)
    copies = np.repeat(np.arange(12), 5)
    alone = permutation_p(p, y, np.arange(12), 3000, 0)[0]
    assert permutation_p(p[copies], y[copies], copies, 3000, 0)[0] == pytest.approx(alone, abs=0.04)
    assert permutation_p(p[copies], y[copies], np.arange(60), 3000, 0)[0] < 0.5 * alone


def test_random_directions_score_half_on_average_but_widely() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(40) < 20
    rows = rng.standard_normal((80, 300)) + 1.5 * np.concatenate([y, y])[:, None] * rng.standard_normal(300)
    family = rng.standard_normal((300, 300))
    p = rows @ family / np.sqrt(300)
    null = random_null(p[:40], y, p[40:], y)
    assert null["accuracy"].mean() == pytest.approx(0.5, abs=0.06)
    assert np.quantile(null["accuracy"], 0.95) > 0.7
    # after train has fixed the sign, a random direction is better than chance where the classes are far apart
    assert null["auc"].mean() > 0.6


def test_percentile_within_counts_ties_half() -> None:
    assert percentile_within(0.5, np.array([0.4, 0.5, 0.5, 0.6])) == pytest.approx(50.0)
    assert percentile_within(1.0, np.zeros(10)) == 100.0
