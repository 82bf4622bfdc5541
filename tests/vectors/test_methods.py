"""Every method against its closed form, an independent solver, or a planted truth."""

from __future__ import annotations

import warnings
from types import ModuleType

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_expit

from storage.errors import UserError
from trait_assets.vectors import methods
from trait_assets.vectors.linear import layer_space, scale_of, unit
from trait_assets.vectors.methods import METHODS, Directions, Task, get_method, method, random_directions


def task(
    x: np.ndarray,
    y: np.ndarray,
    *,
    seed: int = 0,
    subsets: np.ndarray | None = None,
    pairs: np.ndarray | None = None,
) -> Task:
    n = len(y)
    everything = np.ones((1, n), dtype=bool)
    return Task(
        x,
        y,
        np.arange(n),
        np.full(n, -1) if pairs is None else pairs,
        everything if subsets is None else subsets,
        range(x.shape[1]),
        seed,
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def standardised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float64)
    return (x - x.mean(axis=0)) / x.std(axis=0), x.std(axis=0)


@pytest.fixture(params=[(60, 20), (20, 300)], ids=["wide", "tall"])
def data(request: pytest.FixtureRequest, synthetic: ModuleType) -> tuple[np.ndarray, np.ndarray]:
    n, d = request.param
    made = synthetic.planted(n, d, layers=2, n_neg=n + 7, seed=5)
    return made.x + 40.0, made.y


def test_mean_diff_is_the_difference_of_class_means(data: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = data
    found = METHODS["mean_diff"].fit(task(x, y)).raw[0]
    expected = x[y].astype(np.float64).mean(axis=0) - x[~y].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_probe_equals_scikit_learn_at_the_same_strength(data: tuple[np.ndarray, np.ndarray]) -> None:
    from sklearn.linear_model import LogisticRegression

    x, y = data
    fitted = METHODS["probe"].fit(task(x, y))
    for layer in range(2):
        z, spread = standardised(x[:, layer])
        strength = fitted.info[layer]["C"]
        reference = LogisticRegression(C=strength, class_weight="balanced", tol=1e-10, max_iter=10_000).fit(
            z, y
        )
        assert cosine(fitted.raw[0, layer], reference.coef_[0] / spread) >= 0.999999
        np.testing.assert_allclose(
            np.linalg.norm(fitted.raw[0, layer]), np.linalg.norm(reference.coef_[0] / spread), rtol=1e-4
        )


def test_probe_chooses_its_strength_by_log_loss_of_inner_folds(synthetic: ModuleType) -> None:
    from sklearn.linear_model import LogisticRegression

    from trait_assets.activations.split import group_folds

    made = synthetic.planted(25, 120, seed=2, gap=2.0)
    z, _ = standardised(made.x[:, 0])
    fold = group_folds(np.arange(50), made.y, methods.PROBE_FOLDS, 0)
    losses = []
    for strength in np.array(methods.PROBE_STRENGTHS) / 120:
        total = 0.0
        for f in range(fold.max() + 1):
            model = LogisticRegression(C=strength, class_weight="balanced", tol=1e-9, max_iter=5000)
            model.fit(z[fold != f], made.y[fold != f])
            margins = np.where(made.y, 1, -1) * model.decision_function(z)
            total -= log_expit(margins[fold == f]).sum()
        losses.append(total)
    chosen = METHODS["probe"].fit(task(made.x, made.y)).info[0]["C"]
    assert chosen == pytest.approx(methods.PROBE_STRENGTHS[int(np.argmin(losses))] / 120)


def test_probe_balances_its_classes(synthetic: ModuleType) -> None:
    made = synthetic.planted(10, 30, n_neg=40, seed=1)
    weights = methods._balanced(made.y, np.ones((50, 1), dtype=bool))[:, 0]
    assert weights[made.y].sum() == pytest.approx(25)
    assert weights[~made.y].sum() == pytest.approx(25)
    threshold_side = made.x[:, 0] @ METHODS["probe"].fit(task(made.x, made.y)).raw[0, 0]
    # with the balance a midpoint threshold finds both sides, not the larger one alone
    middle = (threshold_side[made.y].mean() + threshold_side[~made.y].mean()) / 2
    assert (threshold_side[made.y] > middle).mean() > 0.9


def test_lda_is_the_ledoit_wolf_discriminant(data: tuple[np.ndarray, np.ndarray]) -> None:
    from sklearn.covariance import LedoitWolf

    x, y = data
    fitted = METHODS["lda"].fit(task(x, y))
    z, spread = standardised(x[:, 1])
    within = np.concatenate([z[y] - z[y].mean(axis=0), z[~y] - z[~y].mean(axis=0)])
    reference = LedoitWolf(assume_centered=True).fit(within)
    direction = np.linalg.solve(reference.covariance_, z[y].mean(axis=0) - z[~y].mean(axis=0)) / spread
    assert fitted.info[1]["shrinkage"] == pytest.approx(reference.shrinkage_, rel=1e-6)
    assert cosine(fitted.raw[0, 1], direction) >= 0.999999


def _ranking_loss(w: np.ndarray, z: np.ndarray, y: np.ndarray, tau: float) -> float:
    w = w / np.linalg.norm(w)
    return float(-log_expit(((z[y] @ w)[:, None] - (z[~y] @ w)[None, :]) / tau).mean())


def test_gradient_reaches_the_optimum_that_a_general_solver_finds(synthetic: ModuleType) -> None:
    made = synthetic.planted(15, 24, seed=3)
    fitted = METHODS["gradient"].fit(task(made.x, made.y))
    z, spread = standardised(made.x[:, 0])
    tau = float(fitted.info[0]["tau"])
    ours = fitted.raw[0, 0] * spread
    start = z[made.y].mean(axis=0) - z[~made.y].mean(axis=0)
    general = minimize(_ranking_loss, start, args=(z, made.y, tau), method="BFGS", options={"gtol": 1e-9}).x
    assert cosine(ours, general) >= 0.99999
    assert _ranking_loss(ours, z, made.y, tau) <= _ranking_loss(general, z, made.y, tau) + 1e-9
    # it has an objective of its own: the difference of means is not its optimum
    assert _ranking_loss(ours, z, made.y, tau) < _ranking_loss(start, z, made.y, tau) - 1e-3
    assert cosine(ours, start) < 0.99


@pytest.mark.parametrize(
    ("n", "d", "gap"), [(20, 64, 3.0), (20, 576, 3.0), (100, 576, 1.0), (200, 16, 0.3), (6, 4096, 2.0)]
)
def test_gradient_does_not_depend_on_its_seed(synthetic: ModuleType, n: int, d: int, gap: float) -> None:
    made = synthetic.planted(n, d, layers=2, gap=gap, seed=n)
    one, two = (METHODS["gradient"].fit(task(made.x, made.y, seed=s)) for s in (0, 1))
    for layer in range(2):
        assert one.info[layer]["converged"]
        assert cosine(one.raw[0, layer], two.raw[0, layer]) >= 0.999999


@pytest.mark.parametrize(
    "name", ["mean_diff", "mean_diff_tamed", "probe", "gradient", "lda", "pca_diff", "random"]
)
def test_methods_are_deterministic(synthetic: ModuleType, name: str) -> None:
    made = synthetic.planted(12, 80, layers=3, seed=8)
    one, two = (METHODS[name].fit(task(made.x, made.y, seed=4)).raw for _ in range(2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", ["mean_diff", "probe", "gradient", "lda", "pca_diff"])
def test_a_subset_is_fitted_as_if_it_were_alone(synthetic: ModuleType, name: str) -> None:
    """Only the label-free scale is shared: with equal scales a fold's fit equals a separate fit of its rows."""
    made = synthetic.planted(30, 100, seed=6)
    alone = np.zeros(60, dtype=bool)
    alone[5:55] = True
    fitted = (
        METHODS[name].fit(task(made.x, made.y, subsets=np.stack([np.ones(60, dtype=bool), alone]))).raw[1, 0]
    )
    separate = METHODS[name].fit(task(made.x[alone], made.y[alone])).raw[0, 0]
    # the separate fit standardises by its own 50 rows; the directions differ by that alone
    assert cosine(fitted, separate) >= (0.97 if name in ("probe", "gradient", "lda") else 0.9999)
    assert cosine(fitted, METHODS[name].fit(task(made.x, made.y)).raw[0, 0]) < 0.9999


PLANTED = [(20, 64), (20, 576), (50, 576), (100, 1024), (200, 64), (200, 4096)]


@pytest.mark.parametrize(("per_side", "d"), PLANTED)
def test_planted_truth_in_noise_with_massive_dimensions(synthetic: ModuleType, per_side: int, d: int) -> None:
    made = synthetic.planted(per_side, d, massive=3, gap=3.0, seed=per_side + d)
    found = {}
    for name in METHODS:
        raw = METHODS[name].fit(task(made.x, made.y)).raw[0]
        assert np.isfinite(raw).all(), name
        assert np.linalg.norm(raw) > 0, name
        found[name] = cosine(raw[0], made.truth)
    print(f"n = {2 * per_side}, d = {d}: " + ", ".join(f"{k} {v:+.2f}" for k, v in found.items()))
    # the ideal: mean difference without the massive dimensions, signal 3 against noise sqrt(2 d / per_side)
    ideal = 3.0 / np.sqrt(9.0 + 2 * d / per_side)
    for name in ("probe", "gradient", "lda", "mean_diff_tamed"):
        assert found[name] >= 0.85 * ideal - 0.05, name
    # the plain difference is swallowed by three dimensions out of d, which the report warns of
    assert found["mean_diff"] < 0.5 * ideal


def test_row_normalising_would_lose_the_direction_and_standardising_does_not(synthetic: ModuleType) -> None:
    from sklearn.linear_model import LogisticRegression

    made = synthetic.planted(20, 64, seed=0)
    x = made.x.copy()
    x[:, :, 0] = 30_000.0
    normalised = x[:, 0] / np.linalg.norm(x[:, 0], axis=1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = LogisticRegression(C=1.0).fit(normalised, made.y)
    assert np.linalg.norm(reference.coef_) < 0.05
    for name in ("probe", "gradient", "lda"):
        raw = METHODS[name].fit(task(x, made.y)).raw[0, 0]
        assert raw[0] == 0.0
        assert np.mean((x[:, 0] @ raw > np.median(x[:, 0] @ raw)) == made.y) > 0.95


def test_constant_dimensions_never_enter_a_direction(synthetic: ModuleType) -> None:
    made = synthetic.planted(10, 30, seed=0)
    x = made.x.copy()
    x[:, :, 3], x[:, :, 4] = 7.0, 0.0
    for name in ("mean_diff", "mean_diff_tamed", "probe", "gradient", "lda", "pca_diff"):
        raw = METHODS[name].fit(task(x, made.y)).raw[0, 0]
        np.testing.assert_allclose(raw[[3, 4]], 0.0, atol=1e-9)
        assert np.isfinite(raw).all()


def test_taming_leaves_ordinary_dimensions_alone() -> None:
    spread = np.array([1.0, 2.0, 1.0, 300.0, 0.0])
    factor = scale_of(spread, "tamed")
    np.testing.assert_allclose(factor, [1, 1, 1, 10 * 1.5 / 300, 0])


def test_pca_diff_takes_its_sign_from_the_labels(synthetic: ModuleType) -> None:
    made = synthetic.planted(30, 40, gap=8.0, seed=1)
    pairs = np.concatenate([np.arange(30), np.arange(30)])
    given = METHODS["pca_diff"].fit(task(made.x, made.y, pairs=pairs))
    assert given.info[0]["pairs"] == "given"
    assert cosine(given.raw[0, 0], made.truth) > 0.9
    flipped = METHODS["pca_diff"].fit(task(made.x, ~made.y, pairs=pairs))
    assert cosine(flipped.raw[0, 0], made.truth) < -0.9
    assert METHODS["pca_diff"].fit(task(made.x, made.y)).info[0]["pairs"] == "random"


def test_random_directions_are_a_seeded_family() -> None:
    family = random_directions(50, 300, 0, 7)
    np.testing.assert_array_equal(family[:10], random_directions(10, 300, 0, 7))
    np.testing.assert_allclose(np.linalg.norm(family, axis=1), 1)
    assert np.abs(family @ family.T - np.eye(50)).max() < 0.35
    assert not np.allclose(family, random_directions(50, 300, 1, 7))
    assert not np.allclose(family, random_directions(50, 300, 0, 8))


def test_row_space_coordinates_are_an_isometry_and_fold_the_scale_back() -> None:
    rng = np.random.default_rng(0)
    for n, d in ((12, 50), (50, 12)):
        rows = rng.standard_normal((n, d)) * rng.uniform(0.1, 30, d) + 5
        space = layer_space(rows, "standard")
        z, _ = standardised(rows)
        np.testing.assert_allclose(space.coords @ space.coords.T, z @ z.T, atol=1e-8)
        w = rng.standard_normal((space.coords.shape[1], 3))
        # projecting rows on the raw direction is projecting coordinates on w, up to an offset
        p = rows @ space.back(w)
        np.testing.assert_allclose(p - p.mean(axis=0), space.coords @ w, atol=1e-7)


def test_unit_never_divides_by_zero() -> None:
    directions, norms = unit(np.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 0.0]]))
    np.testing.assert_allclose(directions[0], [0.6, 0.8])
    np.testing.assert_array_equal(norms, [5, 0, 0, 0])
    assert (directions[1:] == 0).all()


def test_a_method_is_one_function_and_one_registration(
    synthetic: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trait_assets.vectors.fit import fit_vectors

    monkeypatch.setattr(methods, "METHODS", METHODS)

    @method("first_row", "the first positive row")
    def first_row(given: Task) -> Directions:
        raw = np.repeat(given.x[:1].astype(np.float64), len(given.subsets), axis=0)
        return Directions(raw, [{} for _ in given.layers])

    try:
        made = synthetic.planted(8, 16, layers=2, gap=9.0)
        file = fit_vectors(synthetic.activation_set(made.x, made.y), ["first_row"], 0)["first_row"]
        assert file.directions.shape == (2, 16)
        assert cosine(file.directions[1], made.x[0, 1]) == pytest.approx(1, abs=1e-6)
    finally:
        METHODS.pop("first_row", None)


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean `mean_diff`"):
        get_method("meandiff")
    with pytest.raises(UserError, match="choose from mean_diff"):
        get_method("xyz")
