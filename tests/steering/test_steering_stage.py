"""The stage on a tiny real model: what it stores, what it refuses, what it never does twice."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from storage import keys
from storage.errors import UserError
from trait_assets import pipeline
from trait_assets.steering.by_hand import steer_by_hand
from trait_assets.steering.evaluation import SteeringStage, SteeringSummaryStage

TESTS = Path(__file__).parents[1]


def load(path: Path) -> ModuleType:
    name = f"tests_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


tiny = load(TESTS / "models" / "tiny.py")
stored = load(TESTS / "vectors" / "stored_experiment.py")
steered = load(TESTS / "steering" / "steered_experiment.py")
TRAIT = steered.TRAIT


def run(ctx: Any, trait: str = TRAIT) -> Any:
    (result,) = pipeline.run(SteeringStage(), ctx, [trait])
    if result.detail:
        raise AssertionError(result.detail)
    return result


def results(ctx: Any, trait: str = TRAIT, file: str = "results.json") -> Any:
    return ctx.workspace.store.read_json(keys.steering(ctx.experiment.name, trait, folder(), file))


def folder() -> str:
    from resources.models.positions import Position

    return Position.parse("response[:]").folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One steered trait, for the tests that only look: (context, models, judge, result)."""
    root = tmp_path_factory.mktemp("steered")
    model, u = steered.digit_model(tiny)
    ctx, models, judge = steered.context(root, model)
    steered.store_inputs(ctx.workspace, stored.commit, u)
    return ctx, models, judge, run(ctx)


def test_the_planted_layer_and_method_are_validated(finished: Any) -> None:
    _, _, _, result = finished
    summary = result.manifest.summary
    assert result.state == "done"
    assert summary["validated"] is True, summary["reason"]
    assert (summary["best_method"], summary["best_layer"]) == ("probe", 2)
    assert summary["change_low"] > summary["random_change"]
    assert summary["n_report"] == 10
    assert summary["n_search"] == 6
    assert summary["judge_is_stand_in"] is True
    for name in (
        "baseline_trait",
        "steered_trait",
        "coherence",
        "distinct_3",
        "prompting_change",
        "random_bar",
    ):
        assert isinstance(summary[name], float), name


def test_results_hold_every_run_and_every_answer(finished: Any) -> None:
    ctx, _, _, result = finished
    record = results(ctx)
    kinds = [(r["kind"], r["half"]) for r in record["runs"]]
    assert kinds.count(("random", "report")) == 5
    assert kinds.count(("prompting", "report")) == 1
    assert kinds.count(("vector", "report")) == 1
    assert not set(record["questions"]["search"]) & set(record["questions"]["report"])
    assert record["best"]["reported"]["change"] == result.manifest.summary["change"]
    for key in ("application_model", "vector_source", "judge", "generation", "median_norm", "options"):
        assert record[key], key
    for entry in record["runs"]:
        config = entry["config"]
        for layer, dose, coefficient in zip(
            config["layers"], config["doses"], config["coefficients"], strict=True
        ):
            assert coefficient == pytest.approx(dose * record["median_norm"][layer], rel=1e-5)
    rows = results(ctx, file="generations.json")
    assert len(rows) == sum(r["result"]["n"] for r in record["runs"]) + 16
    assert {"question", "response", "trait_score", "coherence_score", "abstained", "dose"} <= set(rows[0])
    # numbers in results.json are those of the stored answers
    entry = next(r for r in record["runs"] if (r["kind"], r["half"]) == ("vector", "report"))
    mine = [r["trait_score"] for r in rows if (r["name"], r["half"]) == (entry["name"], "report")]
    assert np.mean(mine) == pytest.approx(entry["result"]["trait_mean"])


def test_pictures_tables_and_checks(finished: Any) -> None:
    ctx, _, _, result = finished
    pictures = [k for k in result.manifest.files if k.endswith(".png")]
    assert len(pictures) == 2
    for key in pictures:
        data = ctx.workspace.store.read_bytes(key)
        assert data.startswith(b"\x89PNG")
        assert 2_000 < len(data) < 100_000
    assert {"runs", "samples"} <= set(result.manifest.tables)
    sample = result.manifest.tables["samples"][0]
    assert {"question", "unsteered", "steered"} <= set(sample)
    checks = {c["name"]: c["passed"] for c in result.manifest.summary["checks"]}
    assert checks == dict.fromkeys(
        ("validated", "coherent", "more_than_random", "abstention_rate", "questions_split"), True
    )


def test_metrics_are_indexed(finished: Any) -> None:
    ctx, _, _, _ = finished
    ctx.workspace.index.take_in()
    query = "SELECT count(*), sum(best::INT) FROM steering_runs WHERE trait = 'toy/digits'"
    with ctx.workspace.index.connect(read_only=True) as connection:
        runs, best = connection.execute(query).fetchone()
        answers = connection.execute("SELECT count(*) FROM generations").fetchone()[0]
    assert runs == len(results(ctx)["runs"]) + 2
    assert best == 1
    assert answers == len(results(ctx, file="generations.json"))


def test_summary_over_traits(finished: Any) -> None:
    ctx, _, _, result = finished
    (table,) = pipeline.run(SteeringSummaryStage(), ctx, [None])
    assert table.state == "done", table.reason
    record = ctx.workspace.store.read_json(
        keys.steering(ctx.experiment.name, None, None, "steering_summary.json")
    )
    (row,) = record["traits"]
    assert row["trait"] == TRAIT
    assert row["validated"] is True
    assert row["change"] == result.manifest.summary["change"]
    assert table.manifest.inputs == {TRAIT: result.manifest.fingerprint}
    (again,) = pipeline.run(SteeringSummaryStage(), ctx, [None])
    assert again.state == "current"
    # a pattern that covers the trait covers it here too
    covered = {"traits": [TRAIT.split("/")[0] + "/*"]}
    patterned = replace(ctx, experiment=ctx.experiment.with_overrides(covered))
    (same,) = pipeline.run(SteeringSummaryStage(), patterned, [None])
    assert same.manifest is not None
    assert same.manifest.inputs == table.manifest.inputs


def test_nothing_is_generated_twice(finished: Any) -> None:
    ctx, models, judge, result = finished
    rows, asked = len(models.rows), judge.asked
    assert run(ctx).state == "current"
    assert (len(models.rows), judge.asked) == (rows, asked)
    # a changed threshold changes the result's fingerprint, and no row
    steer = ctx.experiment.steer.model_copy(update={"coherence_threshold": 60.0})
    changed = replace(ctx, experiment=ctx.experiment.model_copy(update={"steer": steer}))
    again = run(changed)
    assert again.state == "done"
    assert again.manifest.fingerprint != result.manifest.fingerprint
    assert len(models.rows) == rows
    # forced: everything once more, and the same result
    forced = run(replace(ctx, force=True))
    assert len(models.rows) > rows
    for field in ("change", "coherence", "best_dose", "random_change"):
        assert forced.manifest.summary[field] == pytest.approx(result.manifest.summary[field], abs=1e-6)


def test_batch_size_and_a_pulled_plug_change_no_result(finished: Any, tmp_path: Path) -> None:
    expected = results(finished[0])
    model, u = steered.digit_model(tiny, max_batch_rows=5)
    ctx, models, _ = steered.context(tmp_path, model)
    steered.store_inputs(ctx.workspace, stored.commit, u)
    models.fail_after = 41
    (broken,) = pipeline.run(SteeringStage(), ctx, [TRAIT])
    assert broken.state == "failed"
    assert "the plug was pulled" in broken.reason
    models.fail_after = None
    models.rows.clear()
    resumed = run(ctx)
    assert resumed.state == "done"
    made = sum(models.rows)
    kept = len(results(ctx, file="generations.json")) - made
    assert kept >= 32, "rows made before the failure are reused"
    for a, b in zip(results(ctx)["runs"], expected["runs"], strict=True):
        assert a["name"] == b["name"]
        assert a["config"] == b["config"]
        for field in ("trait_mean", "coherence_mean", "change", "change_low"):
            assert a["result"][field] == pytest.approx(b["result"][field], abs=1e-9)


def test_two_traits_share_each_generation_and_fail_apart(tmp_path: Path) -> None:
    model, u = steered.digit_model(tiny)
    ctx, models, _ = steered.context(tmp_path, model, steer={"doses": [0.5], "refine_steps": 0})
    steered.store_inputs(ctx.workspace, stored.commit, u)
    steered.store_inputs(ctx.workspace, stored.commit, u, trait="toy/more")
    steered.store_inputs(ctx.workspace, stored.commit, u[:16] / np.linalg.norm(u[:16]), trait="toy/narrow")
    found = {r.trait: r for r in pipeline.run(SteeringStage(), ctx, [TRAIT, "toy/more", "toy/narrow"])}
    assert found[TRAIT].state == found["toy/more"].state == "done"
    assert found["toy/narrow"].state == "failed"
    assert "width 16" in found["toy/narrow"].reason
    assert "width 32" in found["toy/narrow"].reason
    # unsteered answers, one rung, the report: three generations for both traits, and what is the same row is
    # one row
    assert len(models.rows) == 3
    assert models.rows[0] == 16


def refused(tmp_path: Path, *, options: dict[str, Any] | None = None, **inputs: Any) -> str:
    model, u = steered.digit_model(tiny)
    ctx, models, _ = steered.context(tmp_path, model, **(options or {}))
    steered.store_inputs(ctx.workspace, stored.commit, u, **inputs)
    (result,) = pipeline.run(SteeringStage(), ctx, [TRAIT])
    assert result.state == "failed"
    assert result.detail is None, result.detail
    assert models.rows == [], "nothing may be generated before bad input is named"
    return result.reason


def test_no_steering_file(tmp_path: Path) -> None:
    reason = refused(tmp_path, steering=None)
    assert "toy/digits/steering.json" in reason
    assert "--no-steering" in reason


def test_fewer_layers(tmp_path: Path) -> None:
    reason = refused(tmp_path, n_layers=7, options={"steer": {"layers": "5,6"}})
    assert "layer 5" in reason or "layer 6" in reason
    assert "has 4 layers" in reason


@pytest.mark.parametrize(
    ("steer", "said"),
    [
        ({"layers": "9"}, "steer.layers"),
        ({"methods": ["lda"]}, "`lda`"),
        ({"candidates": [{"layer": 2}]}, "steer.candidates[1]"),
        (
            {"candidates": [{"layer": 2, "method": "probe"}, {"layer": 3, "method": "no"}]},
            "steer.candidates[2]",
        ),
        ({"candidates": [{"layer": 2, "method": "probe", "dose": 1}]}, "dose"),
        ({"questions": 1}, "1 different question"),
    ],
)
def test_bad_options(tmp_path: Path, steer: dict[str, Any], said: str) -> None:
    assert said in refused(tmp_path, options={"steer": steer})


def test_explicit_candidates(tmp_path: Path) -> None:
    model, u = steered.digit_model(tiny)
    wanted = [{"layer": 2, "method": "probe"}, {"layer": 1, "method": "mean_diff"}]
    ctx, _, _ = steered.context(tmp_path, model, steer={"candidates": wanted, "doses": [0.5], "controls": 1})
    steered.store_inputs(ctx.workspace, stored.commit, u)
    run(ctx)
    searched = {
        (r["config"]["layers"][0], r["config"]["methods"][0])
        for r in results(ctx)["runs"]
        if r["half"] == "search"
    }
    assert searched == {(2, "probe"), (1, "mean_diff")}


def test_another_model_and_tokenizer_are_flagged(tmp_path: Path) -> None:
    model, u = steered.digit_model(tiny)
    ctx, _, _ = steered.context(tmp_path, model, steer={"doses": [0.5], "refine_steps": 0, "controls": 1})
    source = {"model": "org/other", "revision": "b" * 40, "dtype": "float32"}
    steered.store_inputs(ctx.workspace, stored.commit, u, model=source, n_layers=6)
    ctx.workspace.store.write_json(
        keys.extraction(ctx.experiment.name, TRAIT, "responses", "pos.json"),
        [{"question": "q", "answer": "another text", "response_token_ids": [40, 41, 42]}],
    )
    flags = run(ctx).manifest.summary["flags"]
    assert "org/other" in flags
    assert "6 layers" in flags
    assert "another tokenizer" in flags
    # the same tokens: no such flag
    ctx.workspace.store.write_json(
        keys.extraction(ctx.experiment.name, TRAIT, "responses", "pos.json"),
        [{"question": "q", "answer": model.decode([40, 41, 42]), "response_token_ids": [40, 41, 42]}],
    )
    flags = run(replace(ctx, force=True)).manifest.summary["flags"]
    assert "another tokenizer" not in flags


def test_three_questions_are_flagged(tmp_path: Path) -> None:
    model, u = steered.digit_model(tiny)
    ctx, _, _ = steered.context(tmp_path, model, steer={"doses": [0.5], "refine_steps": 0, "controls": 1})
    steering = {"questions": ["How?", "When?", "Why?", "how?"], "direction": "positive", "eval_prompt": None}
    steered.store_inputs(ctx.workspace, stored.commit, u, steering=steering)
    summary = run(ctx).manifest.summary
    assert summary["validated"] is False
    assert "only 3 questions" in summary["flags"]
    assert "repeated" in summary["flags"]


def test_steering_switched_off(tmp_path: Path) -> None:
    model, u = steered.digit_model(tiny)
    ctx, _, _ = steered.context(tmp_path, model, steering=False)
    steered.store_inputs(ctx.workspace, stored.commit, u, steering=None)
    assert run(ctx).state == "skipped"


def test_vectors_newer_than_their_evaluation_are_refused(tmp_path: Path) -> None:
    model, u = steered.digit_model(tiny)
    ctx, _, _ = steered.context(tmp_path, model)
    steered.store_inputs(ctx.workspace, stored.commit, u)
    stored.commit(ctx.workspace, "vectors", TRAIT, {}, experiment=ctx.experiment.name)
    (result,) = pipeline.run(SteeringStage(), ctx, [TRAIT])
    assert result.state == "failed"
    assert "vector_evaluation" in result.reason


def test_last_digits_of_the_evaluation_are_no_other_search(tmp_path: Path) -> None:
    model, u = steered.digit_model(tiny)
    options = []
    for index, auc in enumerate((0.95, 0.950001)):
        ctx, _, _ = steered.context(tmp_path / str(index), model)
        steered.store_inputs(ctx.workspace, stored.commit, u, cv_auc=auc)
        plan = SteeringStage().plan(ctx, TRAIT)
        assert plan.payload.chosen[0].record()["cv_auc"] == auc
        options.append(plan.options)
    assert options[0] == options[1]


def test_by_hand_uses_the_result_and_shows_both_texts(finished: Any) -> None:
    ctx, _, _, result = finished
    shown = steer_by_hand(ctx, TRAIT, "Tell me about hats.", max_new_tokens=12)
    assert (shown.method, shown.layer) == ("probe", 2)
    assert [row.dose for row in shown.rows] == [0.0, result.manifest.summary["best_dose"]]
    assert shown.median_norm == results(ctx)["median_norm"][2]
    assert sum(c.isdigit() for c in shown.rows[1].text) > sum(c.isdigit() for c in shown.rows[0].text)
    assert shown.rows[1].coefficient == pytest.approx(shown.rows[1].dose * shown.median_norm, rel=1e-5)
    assert "validated" in " ".join(shown.notes)
    table = shown.table()
    assert table.row_count == 2
    both = steer_by_hand(
        ctx, TRAIT, "Hats?", doses=[0.5, -0.5], layer=1, method="mean_diff", max_new_tokens=6
    )
    assert [row.dose for row in both.rows] == [0.0, 0.5, -0.5]
    assert both.layer == 1


def test_by_hand_without_a_steering_result(tmp_path: Path) -> None:
    model, u = steered.digit_model(tiny)
    ctx, _, _ = steered.context(tmp_path, model)
    steered.store_inputs(ctx.workspace, stored.commit, u)
    shown = steer_by_hand(ctx, TRAIT, "Hats?", max_new_tokens=6)
    assert (shown.method, shown.layer) == ("mean_diff", 1)
    assert shown.median_norm > 0
    assert any("never steered" in note for note in shown.notes)
    for bad, said in (
        ({"prompt": "  "}, "empty"),
        ({"doses": [9.0]}, "out of range"),
        ({"doses": [float("nan")]}, "out of range"),
        ({"layer": 44}, "no mean_diff vector at layer 44"),
        ({"method": "lda"}, "lda"),
        ({"position": "response[5"}, "response[5"),
    ):
        arguments = {"prompt": "Hats?", **bad}
        with pytest.raises(UserError) as caught:
            steer_by_hand(ctx, TRAIT, **arguments)
        assert said in str(caught.value)
    with pytest.raises(UserError, match="toy/none"):
        steer_by_hand(ctx, "toy/none", "Hats?")
