"""The evaluation stages over a workspace: what is chosen, what is reported, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from storage.errors import UserError
from trait_assets.evaluation.across import best_vector, evaluate_on
from trait_assets.evaluation.evaluation import ExtractionEvaluationStage, VectorEvaluationStage
from trait_assets.pipeline import TraitResult, run
from trait_assets.vectors.extraction import VectorsStage

REPORT = "lab/extraction/{}/evaluation/evaluation.json"
TABLE = "lab/extraction/extraction_evaluation.json"
SUMMARY = {
    "best_method",
    "best_layer",
    "best_position",
    "best_component",
    "val_accuracy",
    "val_accuracy_low",
    "val_accuracy_high",
    "val_auc",
    "val_auc_low",
    "val_auc_high",
    "effect_size_d",
    "null_percentile",
    "permutation_p",
    "n_val_pos",
    "n_val_neg",
    "contrast",
    "raw_norm",
    "raw_norm_over_median_norm",
}


def evaluate(lab: Any, *traits: str) -> list[TraitResult]:
    for result in run(VectorsStage(), lab.context, traits):
        assert result.state in ("done", "current"), result.reason
    return list(run(VectorEvaluationStage(), lab.context, traits))


def report(lab: Any, trait: str) -> dict[str, Any]:
    return json.loads(lab.workspace.store.read_bytes(REPORT.format(trait)), parse_constant=_refuse)


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} in a JSON file")


def train_and_val(
    synthetic: ModuleType, n: int, n_val: int, d: int = 48, seed: int = 0, **kw: Any
) -> tuple[Any, Any]:
    train = synthetic.planted(n, d, seed=seed, **kw)
    val = synthetic.planted(n_val, d, seed=seed + 10_000, truth=train.truth, **kw)
    return train, val


def test_a_separable_trait_is_found_and_reported(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(
        tmp_path, methods=["mean_diff", "probe", "gradient", "lda", "random"], n_permutations=200
    )
    lab.put("a/one", *train_and_val(synthetic, 24, 10, layers=5, gap=6.0))
    lab.vetted("a/one", 55.5)
    (result,) = evaluate(lab, "a/one")
    assert result.state == "done", result.detail
    summary = result.manifest.summary
    assert set(summary) >= SUMMARY
    assert summary["best_layer"] >= 3
    assert summary["best_method"] != "random"
    assert summary["val_accuracy"] >= 0.9
    assert summary["val_accuracy_low"] < summary["val_accuracy"] <= summary["val_accuracy_high"]
    assert summary["effect_size_d"] > 3
    assert summary["permutation_p"] < 0.05
    assert summary["null_percentile"] >= 95
    assert summary["contrast"] == 55.5
    assert (summary["n_val_pos"], summary["n_val_neg"]) == (10, 10)
    assert "val_note" not in summary
    checks = {check["name"]: check["passed"] for check in summary["checks"]}
    assert all(checks.values()), checks
    found = report(lab, "a/one")
    assert len(found["rows"]) == 5 * 5
    row = found["rows"][0]
    for field in (
        "cv_accuracy",
        "cv_auc",
        "split_half_cosine",
        "overlap",
        "polarity_ok",
        "train_val_gap",
        "energy_top3",
    ):
        assert row[field] is not None, field
    assert len(found["layer_cosines"]["matrix"]) == 5
    assert found["method_cosines"]["methods"] == ["mean_diff", "probe", "gradient", "lda", "random"]
    assert len(found["projections"]) == 48 + 20
    pictures = [key for key in result.manifest.files if key.endswith(".png")]
    assert len(pictures) == 3
    for key in pictures:
        assert 1000 < lab.workspace.store.size(key) < 100_000
    names = {row["name"] for row in _metrics(lab, "vector_evaluation", "a/one")}
    assert {"val_auc", "cv_auc", "split_half_cosine", "permutation_p"} <= names


def _metrics(lab: Any, stage: str, trait: str | None) -> list[dict[str, Any]]:
    import io

    import pyarrow.parquet as pq

    folder = f"lab/metrics/{stage}/{trait}"
    keys = [key for key in lab.workspace.store.list(folder) if key.endswith(".parquet")]
    return [
        row
        for key in keys
        for row in pq.read_table(io.BytesIO(lab.workspace.store.read_bytes(key))).to_pylist()
    ]


def test_the_choice_does_not_look_at_held_out_rows(synthetic: ModuleType, tmp_path: Path) -> None:
    """Other held-out rows, even hostile ones, change every held-out number and nothing that was chosen."""
    train, val = train_and_val(synthetic, 24, 10, layers=5)
    reports = []
    for name, held in (
        ("one", val),
        ("two", synthetic.planted(10, 48, layers=5, truth=-train.truth, seed=9)),
    ):
        lab = synthetic.lab(tmp_path / name)
        lab.put("a/one", train, held)
        assert evaluate(lab, "a/one")[0].state == "done"
        reports.append(report(lab, "a/one"))
    one, two = reports
    for field in ("layer", "method", "threshold", "cv_auc", "cv_accuracy", "split_half_cosine"):
        assert one["best"][field] == two["best"][field]
    assert [r["cv_auc"] for r in one["rows"]] == [r["cv_auc"] for r in two["rows"]]
    assert one["best"]["val_auc"] > 0.8
    assert two["best"]["val_auc"] < 0.2
    assert two["best"]["effect_size_d"] < 0
    assert two["best"]["polarity_ok"] is False


def test_noise_is_not_called_a_trait(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, n_permutations=200, n_random=100)
    lab.put("a/noise", *train_and_val(synthetic, 20, 12, layers=6, gap=0.0))
    (result,) = evaluate(lab, "a/noise")
    summary = result.manifest.summary
    assert summary["permutation_p"] > 0.05
    assert summary["val_accuracy_low"] < 0.5 < summary["val_accuracy_high"]
    checks = {check["name"]: check["passed"] for check in summary["checks"]}
    assert not checks["better_than_shuffled_labels"]
    assert not checks["held_out_accuracy"]


def test_massive_dimensions_are_pointed_out(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=["mean_diff"])
    lab.put("a/massive", *train_and_val(synthetic, 20, 8, massive=3))
    (result,) = evaluate(lab, "a/massive")
    row = report(lab, "a/massive")["best"]
    assert row["massive_dimension"]
    assert row["energy_top3"] > 0.9
    check = next(c for c in result.manifest.summary["checks"] if c["name"] == "no_massive_dimension")
    assert not check["passed"]


def test_without_held_out_rows_nothing_is_invented(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, val_split=0)
    lab.put("a/one", synthetic.planted(20, 48, layers=3), None)
    (result,) = evaluate(lab, "a/one")
    summary = result.manifest.summary
    assert "val_split is 0" in summary["val_note"]
    for field in ("val_accuracy", "val_auc", "effect_size_d", "permutation_p", "null_percentile"):
        assert summary[field] is None
    assert summary["cv_auc"] > 0.7
    assert summary["best_layer"] is not None
    check = next(c for c in summary["checks"] if c["name"] == "held_out_numbers_exist")
    assert not check["passed"]
    rows = report(lab, "a/one")["rows"]
    assert all(row["val_auc"] is None and row["cv_auc"] is not None for row in rows)


def test_two_rows_per_side_are_evaluated_honestly(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path)
    lab.put("a/tiny", *train_and_val(synthetic, 2, 2, layers=2, gap=9.0))
    (result,) = evaluate(lab, "a/tiny")
    assert result.state == "done", result.detail
    summary = result.manifest.summary
    # two groups a side cannot be cross-validated with two rows a side left to train on: nothing is chosen
    assert summary["best_layer"] is None
    assert "too few groups" in summary["notes"]
    assert all(row["cv_auc"] is None for row in report(lab, "a/tiny")["rows"])


def test_unbalanced_and_grouped_rows(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path)
    train = synthetic.planted(12, 48, n_neg=40, layers=2, gap=5.0)
    val = synthetic.planted(4, 48, n_neg=11, layers=2, gap=5.0, truth=train.truth, seed=3)
    lab.put("a/one", train, val, groups=np.concatenate([np.arange(12) // 3, np.arange(40) // 4]))
    (result,) = evaluate(lab, "a/one")
    summary = result.manifest.summary
    assert (summary["n_train_pos"], summary["n_train_neg"]) == (12, 40)
    assert (summary["n_val_pos"], summary["n_val_neg"]) == (4, 11)
    assert summary["val_accuracy"] > 0.8


def test_an_evaluation_of_other_vectors_is_refused(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path)
    lab.put("a/one", *train_and_val(synthetic, 8, 4))
    list(run(VectorsStage(), lab.context, ["a/one"]))
    lab.put("a/one", *train_and_val(synthetic, 8, 4, seed=5))
    (result,) = run(VectorEvaluationStage(), lab.context, ["a/one"])
    assert result.state == "failed"
    assert "materialise `vectors` again" in result.reason


def test_a_changed_contrast_makes_the_evaluation_anew(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path)
    lab.put("a/one", *train_and_val(synthetic, 8, 4))
    assert evaluate(lab, "a/one")[0].state == "done"
    assert evaluate(lab, "a/one")[0].state == "current"
    lab.vetted("a/one", 12.0)
    (result,) = evaluate(lab, "a/one")
    assert result.state == "done"
    assert result.manifest.summary["contrast"] == 12.0


def test_the_table_gathers_all_traits_and_new_ones_join(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=["mean_diff", "probe"])
    joy, joy_val = train_and_val(synthetic, 20, 8, layers=3, gap=6.0, seed=1)
    lab.put("emotion/joy", joy, joy_val)
    # the opposite of joy: its vector points the other way
    gloom = synthetic.planted(20, 48, layers=3, gap=6.0, seed=7, truth=-joy.truth)
    lab.put("emotion/gloom", gloom, synthetic.planted(8, 48, layers=3, gap=6.0, seed=8, truth=-joy.truth))
    evaluate(lab, "emotion/joy", "emotion/gloom")
    stage = ExtractionEvaluationStage()
    (result,) = run(stage, lab.context, [None])
    assert result.state == "done", result.detail
    table = json.loads(lab.workspace.store.read_bytes(TABLE), parse_constant=_refuse)
    assert [row["trait"] for row in table["traits"]] == ["emotion/gloom", "emotion/joy"]
    assert table["cosine"]["matrix"][0][1] < -0.5
    cross = np.array(table["cross_auc"]["matrix"])
    assert cross[0, 0] > 0.9
    assert cross[0, 1] < 0.1
    assert result.manifest.summary["traits_with_held_out_numbers"] == 2
    assert [r.state for r in run(stage, lab.context, [None])] == ["current"]

    lab.put("tone/other", *train_and_val(synthetic, 20, 8, layers=3, gap=6.0, seed=40))
    evaluate(lab, "tone/other")
    (result,) = run(stage, lab.context, [None])
    assert result.state == "done"
    table = json.loads(lab.workspace.store.read_bytes(TABLE), parse_constant=_refuse)
    assert len(table["traits"]) == 3
    third = table["cross_auc"]["traits"].index("tone/other")
    assert 0.1 < table["cross_auc"]["matrix"][third][0] < 0.9
    assert abs(table["cosine"]["matrix"][third][0]) < 0.5


def test_traits_of_different_spaces_stand_side_by_side(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=["mean_diff"])
    lab.put("a/one", *train_and_val(synthetic, 12, 5, d=48, gap=5.0))
    lab.put("a/wide", *train_and_val(synthetic, 12, 5, d=64, gap=5.0))
    lab.put("a/elsewhere", *train_and_val(synthetic, 12, 5, d=48, gap=5.0), position="prompt[-1]")
    evaluate(lab, "a/one", "a/wide", "a/elsewhere")
    (result,) = run(ExtractionEvaluationStage(), lab.context, [None])
    table = lab.workspace.store.read_json(TABLE)
    names = table["cosine"]["traits"]
    one, wide, elsewhere = (names.index(f"a/{n}") for n in ("one", "wide", "elsewhere"))
    assert table["cosine"]["matrix"][one][wide] is None
    assert table["cosine"]["matrix"][one][elsewhere] is not None
    assert table["cross_auc"]["matrix"][one][wide] is None
    assert table["cross_auc"]["matrix"][one][elsewhere] is None
    assert table["cross_auc"]["matrix"][one][one] is not None
    assert result.state == "done"


def test_patterns_of_traits_decide_who_is_in_the_table(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=["mean_diff"])
    for seed, trait in enumerate(("my/one", "my/two", "tone/dry", "tone/wet")):
        lab.put(trait, *train_and_val(synthetic, 10, 4, seed=seed))
    evaluate(lab, "my/one", "my/two", "tone/dry", "tone/wet")
    narrowed = dataclasses.replace(
        lab.context, experiment=lab.context.experiment.with_overrides({"traits": ["my/*", "tone/wet"]})
    )
    (result,) = run(ExtractionEvaluationStage(), narrowed, [None])
    assert result.state == "done", result.detail
    rows = lab.workspace.store.read_json(TABLE)["traits"]
    assert [row["trait"] for row in rows] == ["my/one", "my/two", "tone/wet"]


def test_a_damaged_evaluation_is_named_and_does_not_stop_the_table(
    synthetic: ModuleType, tmp_path: Path
) -> None:
    lab = synthetic.lab(tmp_path, methods=["mean_diff"])
    for trait, seed in (("a/one", 0), ("a/two", 1)):
        lab.put(trait, *train_and_val(synthetic, 10, 4, seed=seed))
    evaluate(lab, "a/one", "a/two")
    path = lab.workspace.store.local_path(REPORT.format("a/two"))
    path.write_bytes(path.read_bytes()[:-20])
    (result,) = run(ExtractionEvaluationStage(), lab.context, [None])
    assert result.state == "done"
    assert [row["trait"] for row in lab.workspace.store.read_json(TABLE)["traits"]] == ["a/one"]
    assert "a/two" in result.manifest.summary["problems"]


def test_an_empty_table_says_what_to_do_first(synthetic: ModuleType, tmp_path: Path) -> None:
    (result,) = run(ExtractionEvaluationStage(), synthetic.lab(tmp_path).context, [None])
    assert result.state == "failed"
    assert "materialise `vector_evaluation` first" in result.reason


def test_transfer_to_another_trait(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=["mean_diff"])
    joy, joy_val = train_and_val(synthetic, 20, 8, layers=2, gap=6.0, seed=1)
    lab.put("emotion/joy", joy, joy_val)
    delight = synthetic.planted(15, 48, layers=2, gap=6.0, seed=7, truth=joy.truth)
    delight.x[:] += 4 * joy.truth.astype(np.float32)
    lab.put("emotion/delight", delight, synthetic.planted(5, 48, layers=2, gap=6.0, seed=8, truth=joy.truth))
    evaluate(lab, "emotion/joy")
    found = evaluate_on(lab.workspace, "lab", "emotion/joy", "emotion/delight")
    assert (found["n_pos"], found["n_neg"]) == (20, 20)
    assert found["auc"] > 0.8
    assert found["permutation_p"] < 0.01
    # the other scenarios sit elsewhere along the direction, which the train threshold does not follow
    assert found["accuracy"] < found["auc"]
    itself = evaluate_on(lab.workspace, "lab", "emotion/joy", "emotion/joy")
    assert (itself["n_pos"], itself["n_neg"]) == (8, 8)
    assert all(v is None or not isinstance(v, float) or math.isfinite(v) for v in found.values())


def test_transfer_refuses_what_cannot_be_compared(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=["mean_diff"])
    lab.put("a/one", *train_and_val(synthetic, 12, 4, layers=4, gap=5.0))
    lab.put("a/few", *train_and_val(synthetic, 12, 4, layers=1), layers=[0])
    lab.put("a/wide", *train_and_val(synthetic, 12, 4, d=50, layers=4))
    lab.put("a/no_val", synthetic.planted(12, 48, layers=2), None)
    with pytest.raises(UserError, match="not evaluated yet"):
        best_vector(lab.workspace, "lab", "a/one")
    evaluate(lab, "a/one", "a/no_val")
    with pytest.raises(UserError, match="was not captured at layer"):
        evaluate_on(lab.workspace, "lab", "a/one", "a/few")
    with pytest.raises(UserError, match="width 50"):
        evaluate_on(lab.workspace, "lab", "a/one", "a/wide")
    with pytest.raises(UserError, match="no held-out rows"):
        evaluate_on(lab.workspace, "lab", "a/no_val", "a/no_val")
    with pytest.raises(UserError, match="no activations of a/absent"):
        evaluate_on(lab.workspace, "lab", "a/one", "a/absent")


def test_several_positions_and_components_compete(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=["mean_diff"])
    weak, weak_val = train_and_val(synthetic, 16, 6, gap=0.5)
    strong, strong_val = train_and_val(synthetic, 16, 6, gap=8.0, seed=3)
    lab.put("a/one", weak, weak_val, more_sites={("prompt[-1]", "residual"): (strong, strong_val)})
    (result,) = evaluate(lab, "a/one")
    assert result.manifest.summary["best_position"] == "prompt[-1]"
    assert {row["position"] for row in report(lab, "a/one")["rows"]} == {"response[:]", "prompt[-1]"}
