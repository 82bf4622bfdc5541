"""Vectors and their evaluation, timed side by side. Run: python benchmarks/vectors.py [--quick]

1. The probe with 5 × 5 cross-validation on every layer, against scikit-learn layer by layer on the same folds and
   strengths: time ratio, and the cosine of the two directions.
2. The whole evaluation of one trait: four methods × 30 layers at 200 × 576, with null distributions and bootstrap.
3. The smooth AUC: time, and agreement of two seeds.

On a shared machine only the ratio of times taken in the same run counts; CPU seconds are printed beside wall seconds.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from trait_assets.activations.dataset import ActivationSet
from trait_assets.activations.split import group_folds
from trait_assets.evaluation.trait_report import EvaluationOptions, choose_best, evaluate_site
from trait_assets.vectors.fit import fit_vectors
from trait_assets.vectors.methods import METHODS, PROBE_FOLDS, PROBE_STRENGTHS, Task

T = TypeVar("T")


def rows(n: int, layers: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """n rows, half of each side, a planted direction, correlated dimensions and three massive ones."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) < n // 2
    truth = rng.standard_normal(d)
    truth /= np.linalg.norm(truth)
    x = np.empty((n, layers, d), dtype=np.float32)
    for layer in range(layers):
        shared = rng.standard_normal((n, 20)) @ rng.standard_normal((20, d)) * 0.5
        x[:, layer] = rng.standard_normal((n, d)) + shared + (y[:, None] - 0.5) * 4 * truth
    x[:, :, :3] *= 200
    return x, y


def timed(work: Callable[[], T]) -> tuple[T, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def task(x: np.ndarray, y: np.ndarray, seed: int = 0) -> Task:
    n = len(y)
    return Task(x, y, np.arange(n), np.full(n, -1), np.ones((1, n), dtype=bool), range(x.shape[1]), seed)


def probe_against_scikit_learn(layers: int, n: int, d: int, reference_layers: int) -> None:
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.preprocessing import StandardScaler

    x, y = rows(n, layers, d)
    fold = group_folds(np.arange(n), y, PROBE_FOLDS, 0)
    splits = [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in range(PROBE_FOLDS)]

    def reference() -> list[np.ndarray]:
        found = []
        for layer in range(reference_layers):
            scaler = StandardScaler().fit(x[:, layer])
            z = scaler.transform(x[:, layer])
            model = LogisticRegressionCV(
                Cs=np.array(PROBE_STRENGTHS) / d,
                cv=splits,
                scoring="neg_log_loss",
                class_weight="balanced",
                max_iter=1000,
                tol=1e-6,
                use_legacy_attributes=False,
            ).fit(z, y)
            found.append(model.coef_[0] / scaler.scale_)
        return found

    ours, wall, cpu = timed(lambda: METHODS["probe"].fit(task(x, y)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, their_wall, their_cpu = timed(reference)
    scale = layers / reference_layers
    cosines, same = [], 0
    for layer, direction in enumerate(theirs):
        # the same strength, when the two log losses are a hair apart and the choice differs
        strength = float(ours.info[layer]["C"])
        z_scale = x[:, layer].astype(np.float64).std(axis=0)
        z = (x[:, layer] - x[:, layer].astype(np.float64).mean(axis=0)) / z_scale
        exact = LogisticRegression(C=strength, class_weight="balanced", tol=1e-8, max_iter=5000).fit(z, y)
        cosines.append(_cosine(ours.raw[0, layer], exact.coef_[0] / z_scale))
        same += _cosine(ours.raw[0, layer], direction) > 0.9999
    note = "" if scale == 1 else f" (scaled up from {reference_layers} layers)"
    print(f"probe, 5 folds × 5 strengths, {layers} layers × {n} × {d}")
    print(f"  all layers at once   {wall:7.1f} s wall {cpu:7.1f} s CPU")
    print(f"  scikit-learn         {their_wall * scale:7.1f} s wall {their_cpu * scale:7.1f} s CPU{note}")
    print(
        f"  ratio                {their_wall * scale / wall:7.1f} wall   {their_cpu * scale / cpu:7.1f} CPU"
    )
    print(
        f"  least cosine at the same strength {min(cosines):.7f}; same strength chosen at {same} of {len(theirs)} layers"
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def activation_set(x: np.ndarray, y: np.ndarray, part: str) -> ActivationSet:
    n, layers, _ = x.shape
    metadata = {
        "rows": {part: [{"key": str(i), "pair": None} for i in range(n)]},
        "median_norm": [1.0] * layers,
        "n_layers": layers,
    }
    keys = [str(i) for i in range(n)]
    return ActivationSet(
        "bench/planted",
        "response[:]",
        "residual",
        part,  # type: ignore[arg-type]
        x,
        y,
        np.arange(n),
        keys,
        list(range(layers)),
        metadata,
    )


def whole_evaluation(n: int, layers: int, d: int) -> None:
    x, y = rows(n, layers, d)
    held = np.zeros(n, dtype=bool)
    held[::5] = True
    train, val = activation_set(x[~held], y[~held], "train"), activation_set(x[held], y[held], "val")
    methods = ["mean_diff", "probe", "gradient", "lda"]
    files, wall, cpu = timed(lambda: fit_vectors(train, methods, 0))
    options = EvaluationOptions(n_random=100, n_permutations=200, bootstrap=1000)
    (found, _), wall_2, cpu_2 = timed(lambda: evaluate_site(train, val, files, options))
    best = choose_best(found, int(train.y.sum()), int((~train.y).sum()))
    assert best is not None
    print(
        f"one trait, {len(methods)} methods × {layers} layers at {n} × {d}, 100 random, 200 shuffles, 1000 draws"
    )
    print(f"  fitting    {wall:6.1f} s wall {cpu:6.1f} s CPU")
    print(f"  evaluation {wall_2:6.1f} s wall {cpu_2:6.1f} s CPU   (goal: under 20 s on two quiet cores)")
    print(f"  chosen {best['method']} at layer {best['layer']}: held-out AUC {best['val_auc']:.3f}")


def smooth_auc(n: int, layers: int, d: int) -> None:
    x, y = rows(n, layers, d)
    one, wall, cpu = timed(lambda: METHODS["gradient"].fit(task(x, y, 0)))
    two = METHODS["gradient"].fit(task(x, y, 1))
    least = min(_cosine(one.raw[0, i], two.raw[0, i]) for i in range(layers))
    steps = max(float(info["newton_steps"]) for info in one.info)
    print(f"smooth AUC, {layers} layers × {n} × {d}")
    print(
        f"  {wall:6.1f} s wall {cpu:6.1f} s CPU, {steps:.0f} Newton steps, two seeds agree to cosine {least:.9f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer layers; the ratio stays meaningful")
    parser.add_argument(
        "--reference-layers", type=int, default=None, help="layers that scikit-learn is timed on"
    )
    given = parser.parse_args()
    layers = 4 if given.quick else 33
    print(f"{os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")
    probe_against_scikit_learn(layers, 400, 4096, given.reference_layers or layers)
    whole_evaluation(200, 30, 576)
    smooth_auc(400, layers, 4096)


if __name__ == "__main__":
    main()
