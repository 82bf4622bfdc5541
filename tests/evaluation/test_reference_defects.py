"""Faults known from a published evaluation of trait vectors; each test shows that it cannot happen here.

1. Two held-out rows a side, a lone survivor giving NaN and an order-dependent best vector. 2. The evaluator
ignoring the position, component and methods of the run. 3. A fixed number of layers: those of a larger model
never evaluated. 4. The default run finding no held-out data and evaluating nothing, in silence. 5. A finished
table to which new traits are never added, or which forgets the old ones. 6. Choosing and reporting on the
same rows, without an interval. And of the metrics: a threshold taken from the held-out rows, an effect size
without its sign, an overlap that is a function of the effect size, and random directions judged by a single
one.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from trait_assets.activations.split import RowInfo, split_rows
from trait_assets.evaluation import metrics
from trait_assets.evaluation.crossval import choose
from trait_assets.evaluation.evaluation import ExtractionEvaluationStage, VectorEvaluationStage
from trait_assets.pipeline import run
from trait_assets.vectors.extraction import VectorsStage


def evaluated(lab: Any, trait: str) -> dict[str, Any]:
    list(run(VectorsStage(), lab.context, [trait]))
    (result,) = run(VectorEvaluationStage(), lab.context, [trait])
    assert result.state == "done", result.reason
    return lab.workspace.store.read_json(f"lab/extraction/{trait}/evaluation/evaluation.json")


def test_1_one_surviving_row_gives_null_and_never_nan(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=["mean_diff", "probe"])
    train = synthetic.planted(14, 24, layers=3)
    lab.put("a/one", train, synthetic.planted(1, 24, n_neg=3, layers=3, seed=4))
    report = evaluated(lab, "a/one")
    text = lab.workspace.store.read_bytes("lab/extraction/a/one/evaluation/evaluation.json").decode()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert all(row["effect_size_d"] is None and row["val_auc"] is not None for row in report["rows"])
    # the choice does not depend on the order of the rows
    counts = report["counts"][0]
    chosen = choose(report["rows"], counts["n_train_pos"], counts["n_train_neg"])
    backwards = list(reversed(report["rows"]))
    assert (
        backwards[choose(backwards, counts["n_train_pos"], counts["n_train_neg"])] == report["rows"][chosen]
    )


def test_1_sixteen_lines_a_side_hold_out_three_and_say_that_it_is_little() -> None:
    rng = np.random.default_rng(0)
    rows = [
        RowInfo(f"{p}:{i}", p, i, " ".join(map(str, rng.integers(0, 10**6, 8))), None)
        for p in ("positive", "negative")
        for i in range(16)
    ]
    split = split_rows(rows, val_split=0.2, seed=0)
    assert len(split.val) == 6
    assert any("intervals are wide" in note for note in split.notes)


def test_2_position_component_and_methods_of_the_run_are_the_evaluated_ones(
    synthetic: ModuleType, tmp_path: Path
) -> None:
    lab = synthetic.lab(tmp_path, methods=["lda", "random"])
    train, val = synthetic.planted(14, 24), synthetic.planted(6, 24, seed=3)
    lab.put("a/one", train, val, position="prompt[-3:]", component="attn_out")
    report = evaluated(lab, "a/one")
    assert {(r["position"], r["component"]) for r in report["rows"]} == {("prompt[-3:]", "attn_out")}
    assert {r["method"] for r in report["rows"]} == {"lda", "random"}


def test_3_layers_past_26_and_captured_subsets_are_evaluated(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=["mean_diff"])
    train = synthetic.planted(14, 24, layers=30, gap=6.0)
    lab.put("a/deep", train, synthetic.planted(6, 24, layers=30, gap=6.0, truth=train.truth, seed=3))
    report = evaluated(lab, "a/deep")
    assert [r["layer"] for r in report["rows"]] == list(range(30))
    assert report["rows"][-1]["val_auc"] is not None
    assert report["best"]["layer"] >= 20
    lab.put(
        "a/some", synthetic.planted(14, 24, layers=3), synthetic.planted(6, 24, layers=3), layers=[5, 31, 60]
    )
    assert [r["layer"] for r in evaluated(lab, "a/some")["rows"]] == [5, 31, 60]


def test_4_a_run_without_held_out_rows_says_so(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=["mean_diff"])
    lab.put("a/one", synthetic.planted(14, 24), None)
    report = evaluated(lab, "a/one")
    assert "no held-out" in report["val_note"]
    assert report["rows"]
    assert report["best"]["val_accuracy"] is None


def test_5_new_traits_join_the_table_and_old_ones_stay(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=["mean_diff"])
    key = "lab/extraction/extraction_evaluation.json"
    for i, trait in enumerate(("a/one", "b/two", "a/three")):
        lab.put(trait, synthetic.planted(10, 24, seed=i), synthetic.planted(4, 24, seed=i + 50))
        evaluated(lab, trait)
        (result,) = run(ExtractionEvaluationStage(), lab.context, [None])
        assert result.state == "done"
        assert len(lab.workspace.store.read_json(key)["traits"]) == i + 1


def test_5_every_trait_keeps_its_own_norms(synthetic: ModuleType, tmp_path: Path) -> None:
    """The scale of the activations is each trait's own, not that of whichever trait came first."""
    lab = synthetic.lab(tmp_path, methods=["mean_diff"])
    for trait, d in (("a/one", 24), ("a/two", 96)):
        lab.put(trait, synthetic.planted(10, d), synthetic.planted(4, d, seed=2))
        assert evaluated(lab, trait)["best"]["median_norm"] == np.float32(np.sqrt(d))


def test_6_choice_and_report_use_different_rows_and_carry_intervals(
    synthetic: ModuleType, tmp_path: Path
) -> None:
    """On noise, the best of many layers looks good where it was chosen and stays at chance where it is
    reported.
    """
    chosen, reported = [], []
    for seed in range(4):
        lab = synthetic.lab(tmp_path / str(seed), methods=["mean_diff", "lda"])
        train = synthetic.planted(12, 24, layers=12, gap=0.0, seed=seed)
        lab.put("a/noise", train, synthetic.planted(12, 24, layers=12, gap=0.0, seed=100 + seed))
        best = evaluated(lab, "a/noise")["best"]
        chosen.append(best["cv_auc"])
        reported.append(best["val_auc"])
        assert best["val_auc_low"] < best["val_auc"] < best["val_auc_high"]
        assert best["val_accuracy_low"] < best["val_accuracy"] < best["val_accuracy_high"]
    assert np.mean(chosen) > 0.65
    assert abs(np.mean(reported) - 0.5) < 0.15


def test_the_threshold_comes_from_train(synthetic: ModuleType, tmp_path: Path) -> None:
    """Held-out rows that are shifted along the vector must lose accuracy and keep their AUC."""
    lab = synthetic.lab(tmp_path, methods=["mean_diff"])
    train = synthetic.planted(20, 24, gap=6.0)
    val = synthetic.planted(8, 24, gap=6.0, truth=train.truth, seed=3)
    val.x[:] += 8 * train.truth.astype(np.float32)
    lab.put("a/one", train, val)
    best = evaluated(lab, "a/one")["best"]
    assert best["val_auc"] > 0.9
    assert best["val_accuracy"] <= 0.6


def test_polarity_is_never_hidden() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(40) < 20
    p = rng.standard_normal((40, 1)) - 3 * y[:, None]
    assert metrics.effect_size(p, y)[0] < -2
    assert metrics.auc(p, y)[0] < 0.05
    assert metrics.balanced_accuracy(p, y, np.array([-1.5]))[0] < 0.15


def test_overlap_is_no_function_of_the_effect_size() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(400) < 200
    normal = rng.standard_normal((400, 1)) + 2.0 * y[:, None]
    tailed = rng.standard_t(3, (400, 1))
    tailed = tailed / np.sqrt(metrics.effect_size(tailed + 0.0 * y[:, None], y).size + 2) + 2.0 * y[:, None]
    d = [metrics.effect_size(p, y)[0] for p in (normal, tailed)]
    overlaps = [metrics.overlap(p, y)[0] for p in (normal, tailed)]
    assert overlaps[0] == np.clip(overlaps[0], 0.25, 0.40)
    # max(0, 1 - d/4) would give 0.5 for the first
    assert abs(overlaps[0] - max(0.0, 1 - d[0] / 4)) > 0.1


def test_random_is_a_distribution(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=["mean_diff"], n_random=100)
    train = synthetic.planted(20, 24, gap=6.0)
    lab.put("a/one", train, synthetic.planted(10, 24, gap=6.0, truth=train.truth, seed=3))
    best = evaluated(lab, "a/one")["best"]
    assert best["random_accuracy_p05"] < 0.4
    assert best["random_accuracy_p95"] > 0.6
    assert best["random_accuracy_p05"] < best["random_accuracy_mean"] < best["random_accuracy_p95"]
    assert json.dumps(best, allow_nan=False)
