"""How a direction is found from labelled activations. Adding a method: one function and one `@method(...)`
line.

A method sees a `Task`: the rows of all layers, their labels, and k row subsets; it returns one direction per
layer and subset. Fitting many subsets at once is what makes cross-validation, split halves and repeats
affordable. A method never sees held-out rows, never normalises and never picks a layer; units, signs and
thresholds are `fit.py`'s business.

All arithmetic is float64 (float32 inside the many-subset solvers) and deterministic under `Task.seed`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import expit, log_expit

from storage.errors import UserError
from trait_assets.activations.split import group_folds
from trait_assets.vectors.linear import LayerSpace, Scaling, layer_space

# Regularisation strengths of the probe, in units of 1 / (number of live dimensions): ‖z‖² of a standardised
# row is about that number, so the grid means the same at every width.
PROBE_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
PROBE_FOLDS = 5
# 1 − cos(w, −∇loss) below which the smooth-AUC direction counts as converged.
CONVERGED = 1e-8
# The scale τ of the smooth AUC never makes the class means more than this many units apart: past that the
# loss is flat.
WIDEST_GAP = 8.0


@dataclass
class Task:
    """What a method is given.

    `x` [n, L, d] float32; `y` [n] bool, True = positive; `groups` [n] int; `pairs` [n] int, -1 = unpaired;
    `subsets` [k, n] bool, the first usually all rows; `layers`: labels of the L layers, for messages and
    seeds.
    """

    x: np.ndarray
    y: np.ndarray
    groups: np.ndarray
    pairs: np.ndarray
    subsets: np.ndarray
    layers: Sequence[int]
    seed: int = 0
    spaces: dict[tuple[Scaling, int], LayerSpace] = field(default_factory=dict)

    def space(self, scaling: Scaling, place: int) -> LayerSpace:
        """The feature space of the layer at `place` (0…L-1), computed once per scaling."""
        if (scaling, place) not in self.spaces:
            self.spaces[scaling, place] = layer_space(self.x[:, place], scaling)
        return self.spaces[scaling, place]


Facts = dict[str, float | int | bool | str]


@dataclass
class Directions:
    """`raw` [k, L, d] float64, not normalised; `info`: one dict per layer about the first subset's fit."""

    raw: np.ndarray
    info: list[Facts]


Fit = Callable[[Task], Directions]


@dataclass(frozen=True)
class Method:
    """A registered method. `oriented`: the labels fix its sign (all but `random`)."""

    name: str
    title: str
    fit: Fit
    oriented: bool = True


METHODS: dict[str, Method] = {}


def method(name: str, title: str, *, oriented: bool = True) -> Callable[[Fit], Fit]:
    """Register the decorated function under `name`."""

    def register(fit: Fit) -> Fit:
        METHODS[name] = Method(name, title, fit, oriented)
        return fit

    return register


def get_method(name: str) -> Method:
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
        raise UserError(
            f"there is no vector method `{name}`",
            where="option `methods`",
            remedy=f"did you mean `{close[0]}`?" if close else f"choose from {', '.join(METHODS)}",
        )
    return METHODS[name]


@method("mean_diff", "difference of class means")
def mean_diff(task: Task) -> Directions:
    """v = μ₊ − μ₋ in raw activation space (contrastive activation addition; Rimsky et al. 2024, arXiv
    2312.06681).
    """
    return Directions(_mean_differences(task), [{} for _ in task.layers])


@method("mean_diff_tamed", "difference of class means, massive dimensions tamed")
def mean_diff_tamed(task: Task) -> Directions:
    """v = s² · (μ₊ − μ₋), with s = min(1, 10 · median spread / spread) per dimension.

    Ordinary dimensions are untouched. A massive one (Sun et al. 2024, arXiv 2402.17762) is noise on a huge
    scale: its class difference is large by its spread alone, so it is weighed down as a diagonal discriminant
    would do it.
    """
    differences = _mean_differences(task)
    info: list[Facts] = []
    for place in range(len(task.layers)):
        scale = task.space("tamed", place).scale
        differences[:, place] *= scale**2
        info.append({"tamed_dimensions": int(((scale > 0) & (scale < 1)).sum())})
    return Directions(differences, info)


@method("probe", "L2 logistic regression")
def probe(task: Task) -> Directions:
    """w = argmin Σᵢ cᵢ log(1 + exp(−yᵢ(w·zᵢ + b))) + ‖w‖² / 2C on standardised z; v = w / σ.

    Classes are balanced by cᵢ = n / 2n_class; C comes from group-aware cross-validation within the same
    subset (least log loss), anew for every subset. Solved in the row space, to which an L2-regularised
    solution is confined. Rows are standardised, not normalised: with a massive dimension a row-normalised
    probe can return exactly zero.
    """
    folds = [_inner_folds(task, subset) for subset in task.subsets]
    raw = np.empty((len(task.subsets), *task.x.shape[1:]))
    info: list[Facts] = []
    for place in range(len(task.layers)):
        space = task.space("standard", place)
        strengths = np.array(PROBE_STRENGTHS) / max(space.live, 1)
        chosen = _choose_strengths(space, task.y, task.subsets, folds, strengths)
        weights = _balanced(task.y, task.subsets.T)
        w, _ = logistic_columns(space.coords, space.eigenvalues, task.y, weights, strengths[chosen])
        w[:, 0], steps = _newton(space.coords, task.y, weights[:, 0], strengths[chosen[0]], w[:, 0])
        raw[:, place] = space.back(w).T
        info.append({"C": float(strengths[chosen[0]]), "newton_steps": steps})
    return Directions(raw, info)


@method("gradient", "smooth AUC, optimised to convergence")
def gradient(task: Task) -> Directions:
    """v minimises the mean logistic ranking loss over all positive × negative pairs, a smooth AUC.

    Loss(w) = mean over i ∈ pos, j ∈ neg of log(1 + exp(−w·(zᵢ − zⱼ)/τ)), ‖w‖ ≤ 1, on standardised z; v = w /
    σ. This is the RankNet loss (Burges et al. 2005) of a linear score; τ, the within-class spread along the
    difference of means, sets the scale at which a pair counts as separated. Loss and ball are convex: there
    is one optimum, whatever the start. Solved by Newton steps from a seeded random start; `kkt` is 1 − cos(w,
    −∇loss) at the end (0 at an optimum on the sphere), and `converged` says that it is as good as 0.
    """
    coords = _stacked_coords(task, "standard")
    n_layers, _, r = coords.shape
    start = np.stack(
        [np.random.default_rng([task.seed, 104729, layer]).standard_normal(r) for layer in task.layers]
    )
    raw = np.empty((len(task.subsets), *task.x.shape[1:]))
    info: list[Facts] = []
    columns = np.empty((n_layers, r, len(task.subsets)))
    for k, subset in enumerate(task.subsets):
        # folds and halves are compared, not stored: they may stop earlier
        tolerance = 1e-10 if k == 0 else 1e-7
        columns[:, :, k], facts = smooth_auc_directions(
            coords[:, subset], task.y[subset], start, tolerance=tolerance
        )
        if k == 0:
            info = [
                {
                    "converged": bool(facts["kkt"][place] <= CONVERGED),
                    **{name: float(values[place]) for name, values in facts.items()},
                }
                for place in range(n_layers)
            ]
    for place in range(n_layers):
        space = task.space("standard", place)
        raw[:, place] = space.back(columns[place, : space.coords.shape[1]]).T
    return Directions(raw, info)


@method("lda", "mass-mean: Fisher's discriminant with Ledoit–Wolf shrinkage")
def lda(task: Task) -> Directions:
    """v = Σ⁻¹(μ₊ − μ₋) on standardised z, scale folded back, Σ the pooled within-class covariance.

    Σ is shrunk towards its mean variance by the amount of Ledoit & Wolf (2004), computed for the full width d
    although the algebra stays in the row space. Called mass-mean probing by Marks & Tegmark (2023, arXiv
    2310.06824).
    """
    raw = np.empty((len(task.subsets), *task.x.shape[1:]))
    info: list[Facts] = []
    for place in range(len(task.layers)):
        space = task.space("standard", place)
        columns = np.empty((space.coords.shape[1], len(task.subsets)))
        shrinkages = []
        for k, subset in enumerate(task.subsets):
            columns[:, k], shrinkage = _shrunk_discriminant(space.coords[subset], task.y[subset], space.live)
            shrinkages.append(shrinkage)
        raw[:, place] = space.back(columns).T
        info.append({"shrinkage": shrinkages[0]})
    return Directions(raw, info)


@method("pca_diff", "first principal axis of paired differences")
def pca_diff(task: Task) -> Directions:
    """v = first right singular vector of the unit-length differences h⁺ − h⁻; the labels fix its sign.

    Representation engineering (Zou et al. 2023, arXiv 2310.01405). Pairs are those of the data where there
    are at least two complete ones in the subset; otherwise rows are paired at random under the seed.
    """
    raw = np.empty((len(task.subsets), *task.x.shape[1:]))
    info: list[Facts] = [{} for _ in task.layers]
    for k, subset in enumerate(task.subsets):
        pairs, kind = _pairs(task, subset)
        for place in range(len(task.layers)):
            differences = task.x[pairs[:, 0], place].astype(np.float64) - task.x[pairs[:, 1], place]
            norms = np.linalg.norm(differences, axis=1, keepdims=True)
            differences = differences / np.where(norms > 0, norms, 1.0)
            values, vectors = np.linalg.eigh(differences @ differences.T)
            axis = differences.T @ vectors[:, -1]
            raw[k, place] = axis * (1.0 if axis @ differences.sum(axis=0) >= 0 else -1.0)
            if k == 0:
                share = values[-1] / max(values.sum(), 1e-300)
                info[place] = {"pairs": kind, "n_pairs": len(pairs), "explained": float(share)}
    return Directions(raw, info)


@method("random", "a seeded random direction", oriented=False)
def random(task: Task) -> Directions:
    """v ~ N(0, I): a sanity check, and the family from which null distributions are drawn
    (`random_directions`).
    """
    d = task.x.shape[2]
    one = np.stack([random_directions(1, d, task.seed, layer)[0] for layer in task.layers])
    return Directions(np.repeat(one[None], len(task.subsets), axis=0), [{} for _ in task.layers])


def random_directions(n: int, d: int, seed: int, layer: int) -> np.ndarray:
    """[n, d] float64 unit directions; the first m of a longer family are the family of length m."""
    drawn = np.random.default_rng([seed, 15485863, layer]).standard_normal((n, d))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def _mean_differences(task: Task) -> np.ndarray:
    """[k, L, d] μ₊ − μ₋ of each subset; an offset common to all rows is removed first, for precision."""
    weights = []
    for subset in task.subsets:
        positive, negative = subset & task.y, subset & ~task.y
        weights.append(positive / positive.sum() - negative / negative.sum())
    on_rows = np.array(weights)
    raw = np.empty((len(task.subsets), *task.x.shape[1:]))
    for place in range(len(task.layers)):
        rows = task.x[:, place].astype(np.float64)
        raw[:, place] = on_rows @ (rows - rows.mean(axis=0))
    return raw


def _inner_folds(task: Task, subset: np.ndarray) -> np.ndarray:
    """[F, n] bool: the held-out rows of each fold inside one subset; empty when groups are too few."""
    fold = np.full(len(task.y), -1)
    fold[subset] = group_folds(task.groups[subset], task.y[subset], PROBE_FOLDS, task.seed)
    return np.array([fold == f for f in range(fold.max() + 1)]).reshape(-1, len(fold))


def _balanced(y: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Class-balanced sample weights, [n, k], zero outside each subset; each class of a subset sums to half
    its rows.
    """
    positive = members & y[:, None]
    negative = members & ~y[:, None]
    half = members.sum(axis=0) / 2
    return positive * (half / np.maximum(positive.sum(axis=0), 1)) + negative * (
        half / np.maximum(negative.sum(axis=0), 1)
    )


def _choose_strengths(
    space: LayerSpace, y: np.ndarray, subsets: np.ndarray, folds: list[np.ndarray], strengths: np.ndarray
) -> np.ndarray:
    """Index into `strengths` per subset: least class-balanced log loss over its inner folds."""
    middle = len(strengths) // 2
    chosen = np.full(len(subsets), middle)
    held: list[np.ndarray] = []
    owner: list[int] = []
    for k, fold in enumerate(folds):
        held.extend(fold)
        owner.extend([k] * len(fold))
    if not held:
        return chosen
    test = np.array(held).T
    train = subsets[owner].T & ~test
    n_strengths = len(strengths)
    weights = np.repeat(_balanced(y, train), n_strengths, axis=1)
    w, b = logistic_columns(
        space.coords, space.eigenvalues, y, weights, np.tile(strengths, test.shape[1]), rough=True
    )
    margins = np.where(y, 1.0, -1.0)[:, None] * (space.coords @ w + b)
    loss = -log_expit(margins).reshape(len(y), test.shape[1], n_strengths)
    loss = (loss * _balanced(y, test)[:, :, None]).sum(axis=0)
    for k in set(owner):
        total = loss[np.array(owner) == k].sum(axis=0)
        chosen[k] = int(np.argmin(total))
    return chosen


def logistic_columns(
    coords: np.ndarray,
    eigenvalues: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray,
    strengths: np.ndarray,
    *,
    rough: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Many logistic regressions over the same rows at once: w [r, c], b [c].

    `coords` [n, r] centred with orthogonal columns; `weights` [n, c] sample weights; `strengths` [c] values
    of C. Accelerated gradient descent with restarts (O'Donoghue & Candès 2015), preconditioned by the
    diagonal bound ¼ max(weight) λ + 1/C on the Hessian (Böhning & Lindsay 1988), under which a step of 1
    never overshoots. `rough` stops early, in float32: enough for choosing C.
    """
    dtype = np.float32 if rough else np.float64
    tolerance, limit = (3e-3, 200) if rough else (1e-5, 1000)
    x = np.ascontiguousarray(coords, dtype=dtype)
    sign = np.where(y, 1.0, -1.0).astype(dtype)[:, None]
    weights = weights.astype(dtype)
    heaviest = weights.max(axis=0)
    bound = (0.25 * heaviest * eigenvalues[:, None] + 1 / strengths).astype(dtype)
    bound_b = (0.25 * heaviest * len(y)).astype(dtype)
    ridge = (1 / strengths).astype(dtype)
    r, c = x.shape[1], len(strengths)
    done_w, done_b = np.zeros((r, c), dtype), np.zeros(c, dtype)
    active = np.arange(c)
    w: np.ndarray = done_w.copy()
    b: np.ndarray = done_b.copy()
    at_w, at_b = w, b
    momentum = np.ones(c, dtype)
    for _ in range(limit):
        scores = x @ at_w + at_b
        pull = weights * sign * expit(-(sign * scores))
        grad_w = ridge * at_w - x.T @ pull
        grad_b = -pull.sum(axis=0)
        new_w = at_w - grad_w / bound
        new_b = at_b - grad_b / bound_b
        move_w, move_b = new_w - w, new_b - b
        restart = ((at_w - new_w) * bound * move_w).sum(axis=0) + (at_b - new_b) * bound_b * move_b > 0
        next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        factor = np.where(restart, 0, (momentum - 1) / next_momentum).astype(dtype)
        momentum = np.where(restart, 1, next_momentum).astype(dtype)
        at_w, at_b = new_w + factor * move_w, new_b + factor * move_b
        w, b = new_w, new_b
        # the size of a full step in the metric of the bound, against the size of the solution
        size = np.sqrt((w**2 * bound).sum(axis=0)) + 1e-12
        settled = np.sqrt((grad_w**2 / bound).sum(axis=0)) <= tolerance * size
        if settled.all():
            break
        if settled.sum() > len(settled) // 2:
            done_w[:, active[settled]], done_b[active[settled]] = w[:, settled], b[settled]
            go = ~settled
            active, w, b, at_w, at_b = active[go], w[:, go], b[go], at_w[:, go], at_b[go]
            momentum, weights, bound = momentum[go], weights[:, go], bound[:, go]
            bound_b, ridge = bound_b[go], ridge[go]
    done_w[:, active], done_b[active] = w, b
    return done_w.astype(np.float64), done_b.astype(np.float64)


def _newton(
    coords: np.ndarray, y: np.ndarray, weights: np.ndarray, strength: float, start: np.ndarray
) -> tuple[np.ndarray, int]:
    """Polish one logistic regression to its optimum by damped Newton steps; returns w [r] and the steps
    taken.
    """
    used = weights > 0
    x = np.column_stack([coords[used], np.ones(used.sum())])
    sign, c = np.where(y[used], 1.0, -1.0), weights[used]
    ridge = np.full(x.shape[1], 1 / strength)
    ridge[-1] = 1e-10
    w = np.append(start, 0.0)

    def objective(at: np.ndarray) -> float:
        return float(-(c * log_expit(sign * (x @ at))).sum() + 0.5 * (ridge * at**2).sum())

    value = objective(w)
    for step in range(1, 51):
        p = expit(-sign * (x @ w))
        grad = ridge * w - x.T @ (c * sign * p)
        hessian = (x.T * (c * p * (1 - p))) @ x
        hessian[np.diag_indices_from(hessian)] += ridge
        direction = np.linalg.solve(hessian, grad)
        decrement = float(grad @ direction)
        if decrement <= 1e-12 * max(abs(value), 1e-300):
            return w[:-1], step
        size = 1.0
        while size > 1e-8:
            trial = objective(w - size * direction)
            if trial <= value - 1e-4 * size * decrement:
                break
            size /= 2
        else:
            return w[:-1], step
        w, value = w - size * direction, trial
    return w[:-1], 50


def _stacked_coords(task: Task, scaling: Scaling) -> np.ndarray:
    """Coordinates of all layers, [L, n, r]; layers of lower rank are padded with empty dimensions."""
    spaces = [task.space(scaling, place) for place in range(len(task.layers))]
    r = max(space.coords.shape[1] for space in spaces)
    stacked = np.zeros((len(spaces), len(task.y), r))
    for place, space in enumerate(spaces):
        stacked[place, :, : space.coords.shape[1]] = space.coords
    return stacked


def smooth_auc_directions(
    rows: np.ndarray, y: np.ndarray, start: np.ndarray, *, tolerance: float = 1e-10, limit: int = 60
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The smooth-AUC optimum in the unit ball for several problems over the same labels.

    `rows` [L, m, r], `start` [L, r]. Returns w [L, r] and facts, [L] each. A few projected gradient steps
    leave the start behind; then Newton steps on the sphere, where with the multiplier μ = −w·∇f > 0 the
    Hessian P(∇²f + μI)P is positive definite, or in the ball where the optimum lies inside it, with
    backtracking.
    """
    full = None
    if rows.shape[1] < rows.shape[2]:
        # the optimum lies in the span of these rows: m coordinates do
        values, vectors = np.linalg.eigh(rows @ rows.transpose(0, 2, 1))
        keep = values > values[:, -1:] * 1e-12
        root = np.sqrt(np.where(keep, values, 1.0))[:, None, :]
        basis = rows.transpose(0, 2, 1) @ np.where(keep[:, None, :], vectors / root, 0.0)
        full, rows = basis, np.where(keep[:, None, :], vectors * root, 0.0)
        start = (start[:, None, :] @ basis)[:, 0]
    pos, neg = rows[:, y], rows[:, ~y]
    difference = pos.mean(axis=1) - neg.mean(axis=1)
    length = np.linalg.norm(difference, axis=1)
    axis = difference / np.maximum(length, 1e-300)[:, None]
    spread = np.sqrt((_dots(pos, axis).var(axis=1) + _dots(neg, axis).var(axis=1)) / 2)
    tau = np.maximum(np.maximum(spread, length / WIDEST_GAP), 1e-12)
    pos, neg = pos / tau[:, None, None], neg / tau[:, None, None]
    n_pairs = pos.shape[1] * neg.shape[1]

    def margins(w: np.ndarray) -> np.ndarray:
        return _dots(pos, w)[:, :, None] - _dots(neg, w)[:, None, :]

    def loss(w: np.ndarray) -> np.ndarray:
        return -log_expit(margins(w)).sum(axis=(1, 2)) / n_pairs

    def slope(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pull = expit(-margins(w))
        grad = _back(neg, pull.sum(axis=1)) - _back(pos, pull.sum(axis=2))
        return grad / n_pairs, pull

    # ∇²f ≼ ¼ E (zᵢ − zⱼ)(zᵢ − zⱼ)ᵀ, and E ‖zᵢ − zⱼ‖² ≤ top
    top = 2 * ((pos**2).sum(axis=(1, 2)) / pos.shape[1] + (neg**2).sum(axis=(1, 2)) / neg.shape[1])
    w = start / np.maximum(np.linalg.norm(start, axis=1), 1e-300)[:, None]
    for _ in range(5):
        grad, _ = slope(w)
        w = _into_ball(w - grad * (4 / np.maximum(top, 1e-300))[:, None])
    at_centre = length / tau / 2
    value = loss(w)
    kkt = np.ones(len(w))
    steps = 0
    for _ in range(limit):
        steps += 1
        grad, pull = slope(w)
        norm = np.linalg.norm(w, axis=1)
        inward = -(w * grad).sum(axis=1)
        grad_norm = np.linalg.norm(grad, axis=1)
        outer = (norm > 1 - 1e-9) & (inward > 0)
        # inside the ball the optimum is where the gradient is nothing of what it was at the centre
        inside = grad_norm / np.maximum(at_centre, 1e-12)
        kkt = np.where(outer, 1 - inward / np.maximum(norm * grad_norm, 1e-300), inside)
        if (kkt <= tolerance).all():
            break
        curve = pull * (1 - pull) / n_pairs
        pos_t, neg_t = pos.transpose(0, 2, 1), neg.transpose(0, 2, 1)
        cross = pos_t @ (curve @ neg)
        hessian = (pos_t * curve.sum(axis=2)[:, None, :]) @ pos + (
            neg_t * curve.sum(axis=1)[:, None, :]
        ) @ neg
        hessian -= cross + cross.transpose(0, 2, 1)
        shift = np.where(outer, inward, 1e-9 * np.maximum(top, 1e-300))
        diagonal = np.arange(hessian.shape[1])
        hessian[:, diagonal, diagonal] += shift[:, None]
        solved = np.linalg.solve(hessian, np.stack([grad, w], axis=2))
        for_grad, for_w = solved[:, :, 0], solved[:, :, 1]
        tangent = np.where(
            outer, (w * for_grad).sum(axis=1) / np.maximum((w * for_w).sum(axis=1), 1e-300), 0.0
        )
        direction = tangent[:, None] * for_w - for_grad
        size = np.ones(len(w))
        new, new_value = w, value
        for _ in range(30):
            moved = w + size[:, None] * direction
            length_of = np.linalg.norm(moved, axis=1)
            moved /= np.where(outer | (length_of > 1), length_of, 1.0)[:, None]
            trial = loss(moved)
            better = trial <= value + 1e-15 * np.abs(value)
            new, new_value = np.where(better[:, None], moved, w), np.where(better, trial, value)
            if better.all():
                break
            size = np.where(better, size, size / 2)
        stuck = (np.abs(new - w).max(axis=1) <= 1e-12) | (kkt <= tolerance)
        w, value = new, new_value
        if stuck.all():
            break
    facts = {
        "kkt": kkt,
        "ball": np.linalg.norm(w, axis=1),
        "tau": tau,
        "newton_steps": np.full(len(w), steps),
    }
    return (w if full is None else (full @ w[:, :, None])[:, :, 0]), facts


def _dots(rows: np.ndarray, w: np.ndarray) -> np.ndarray:
    """[L, m] products of rows [L, m, r] with w [L, r]."""
    return (rows @ w[:, :, None])[:, :, 0]


def _back(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[L, r] sums of rows [L, m, r] weighted by [L, m]."""
    return (weights[:, None, :] @ rows)[:, 0]


def _into_ball(w: np.ndarray) -> np.ndarray:
    return w / np.maximum(1.0, np.linalg.norm(w, axis=1))[:, None]


def _shrunk_discriminant(rows: np.ndarray, y: np.ndarray, width: int) -> tuple[np.ndarray, float]:
    """Σ_shrunk⁻¹ Δμ in coordinates [r], and the Ledoit–Wolf shrinkage for `width` dimensions."""
    positive, negative = rows[y], rows[~y]
    difference = positive.mean(axis=0) - negative.mean(axis=0)
    within = np.concatenate([positive - positive.mean(axis=0), negative - negative.mean(axis=0)])
    n = len(within)
    small = within.shape[1] > n
    gram = within @ within.T if small else within.T @ within
    squares = (within**2).sum(axis=1)
    mean_variance = squares.sum() / n / width
    covariance_norm = (gram**2).sum() / n**2
    fourth = (squares**2).sum() / n
    beta = (fourth - covariance_norm) / (width * n)
    delta = covariance_norm / width - mean_variance**2
    shrinkage = 1.0 if delta <= 0 else float(np.clip(beta / delta, 0.0, 1.0))
    # rows without any spread inside their class leave nothing to whiten
    floor = max(shrinkage * mean_variance, 1e-6 * mean_variance, 1e-12)
    keep = (1 - shrinkage) / n
    if keep == 0:
        return difference / floor, shrinkage
    if small:
        # Woodbury: (aI + cWᵀW)⁻¹ = (I − Wᵀ (a/c I + WWᵀ)⁻¹ W) / a
        inner = gram + np.eye(n) * (floor / keep)
        return (difference - within.T @ np.linalg.solve(inner, within @ difference)) / floor, shrinkage
    return np.linalg.solve(keep * gram + floor * np.eye(len(gram)), difference), shrinkage


def _pairs(task: Task, subset: np.ndarray) -> tuple[np.ndarray, str]:
    """[p, 2] row numbers (positive, negative), and where they come from."""
    positive, negative = np.flatnonzero(subset & task.y), np.flatnonzero(subset & ~task.y)
    partner = {int(task.pairs[j]): int(j) for j in negative if task.pairs[j] >= 0}
    matched = [(int(i), partner[int(task.pairs[i])]) for i in positive if int(task.pairs[i]) in partner]
    if len(matched) >= 2:
        return np.array(matched), "given"
    rng = np.random.default_rng([task.seed, 32452843])
    n = max(len(positive), len(negative))
    left = np.resize(rng.permutation(positive), n)
    right = np.resize(rng.permutation(negative), n)
    return np.column_stack([left, right]), "random"
