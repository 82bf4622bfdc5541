"""The loop that every stage runs in: skip what is current, commit each trait, keep failures apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from storage.errors import ArtifactError, UserError
from trait_assets import pipeline
from trait_assets.pipeline import Outcome, Plan, StageContext


class Doubling:
    """A stage that doubles a number that the test gives it per trait."""

    name = "vectors"
    code_version = "1"
    shared = False

    def __init__(self, numbers: dict[str, Any]) -> None:
        self.numbers = numbers
        self.computed: list[str] = []

    def plan(self, ctx: StageContext, trait: Any) -> Plan:
        number = self.numbers[trait]
        if isinstance(number, Exception):
            raise number
        return Plan(trait, {"scenarios": "x"}, {"number": number})

    def execute(self, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]:
        for plan in plans:
            assert plan.trait is not None
            self.computed.append(plan.trait)
            number = plan.options["number"]
            if number == "breaks":
                raise RuntimeError("the device is gone")
            if number == "bad":
                yield Outcome(plan.trait, error=UserError("no rows", where=plan.trait))
                continue
            yield Outcome(
                plan.trait,
                files={f"e/{plan.trait}/double.json": {"double": 2 * number}},
                summary={"double": 2 * number},
                metrics=[{"name": "double", "value": 2.0 * number}],
            )


def run(stage, ctx, traits=("t/a", "t/b", "t/c")):
    return {result.trait: result for result in pipeline.run(stage, ctx, list(traits))}


def test_each_trait_is_committed_and_then_current(ctx):
    stage = Doubling({"t/a": 1, "t/b": 2, "t/c": 3})
    first = run(stage, ctx)
    assert {r.state for r in first.values()} == {"done"}
    assert ctx.workspace.store.read_json("e/t/b/double.json") == {"double": 4}
    second = run(stage, ctx)
    assert {r.state for r in second.values()} == {"current"}
    assert second["t/b"].manifest.summary["double"] == 4
    assert stage.computed == ["t/a", "t/b", "t/c"]


def test_half_a_surrogate_pair_in_a_models_text_reaches_neither_the_index_nor_the_ui(ctx):
    """From a model's answer, a check's sentence and an error, through commit, index and UI metadata."""

    class Broken(Doubling):
        def execute(self, ctx, plans):
            for plan in plans:
                if plan.trait == "t/c":
                    yield Outcome(plan.trait, error=RuntimeError("said \ud83d"))
                    continue
                answer = {"answer": "broken \ud83d", "system_prompt": "\ude00"}
                yield Outcome(
                    plan.trait,
                    files={f"e/{plan.trait}/answers.json": [answer]},
                    summary={"sample": answer["answer"]},
                    metrics=[{"table": "responses", **answer}],
                    tables={"answers": [answer]},
                    checks=[pipeline.Check("odd", False, "broken \ud83d", values={"text": "\ud83d"})],
                )

    results = run(Broken({"t/a": 1, "t/b": 2, "t/c": 3}), ctx)
    assert {t: r.state for t, r in results.items()} == {"t/a": "done", "t/b": "done", "t/c": "failed"}
    assert not any(r.index_behind for r in results.values())
    rows = ctx.workspace.index.sql("SELECT answer, system_prompt FROM current_responses").rows
    assert rows == [("broken \ufffd", "\ufffd")] * 2
    # what the UI is given
    manifest = results["t/a"].manifest
    assert manifest.summary["sample"] == "broken \ufffd"
    assert results["t/c"].reason == "RuntimeError: said \ufffd"
    shown = [manifest.summary, manifest.tables, results["t/c"].detail]
    json.dumps(shown, ensure_ascii=False).encode("utf-8")


def test_a_changed_option_recomputes_its_trait_alone(ctx):
    stage = Doubling({"t/a": 1, "t/b": 2, "t/c": 3})
    run(stage, ctx)
    stage.numbers["t/b"] = 20
    assert {t: r.state for t, r in run(stage, ctx).items()} == {
        "t/a": "current",
        "t/b": "done",
        "t/c": "current",
    }
    assert ctx.workspace.store.read_json("e/t/b/double.json") == {"double": 40}


def test_a_new_code_version_recomputes_all(ctx):
    stage = Doubling({"t/a": 1, "t/b": 2, "t/c": 3})
    run(stage, ctx)
    stage.code_version = "2"
    assert {r.state for r in run(stage, ctx).values()} == {"done"}


def test_a_failing_trait_leaves_the_others_alone(ctx):
    stage = Doubling({"t/a": UserError("no file", where="positive.txt"), "t/b": "bad", "t/c": 3})
    results = run(stage, ctx)
    assert {t: r.state for t, r in results.items()} == {"t/a": "failed", "t/b": "failed", "t/c": "done"}
    assert results["t/a"].reason == "positive.txt: no file"
    assert results["t/a"].detail is None
    assert ctx.workspace.manifests.read("e", "vectors", "t/b") is None


def test_a_defect_keeps_what_was_committed_and_fails_the_rest_with_its_trace(ctx):
    stage = Doubling({"t/a": 1, "t/b": "breaks", "t/c": 3})
    results = run(stage, ctx)
    assert {t: r.state for t, r in results.items()} == {"t/a": "done", "t/b": "failed", "t/c": "failed"}
    assert "the device is gone" in results["t/c"].reason
    assert "RuntimeError" in results["t/b"].detail


def test_a_damaged_file_is_rebuilt(ctx, tmp_path):
    stage = Doubling({"t/a": 1})
    run(stage, ctx, ["t/a"])
    path = ctx.workspace.store.local_path("e/t/a/double.json")
    path.write_text(path.read_text().replace("2", "3"))
    with pytest.raises(ArtifactError, match="double"):
        ctx.upstream("vectors", "t/a")
    assert run(stage, ctx, ["t/a"])["t/a"].state == "done"
    assert ctx.workspace.store.read_json("e/t/a/double.json") == {"double": 2}


@pytest.mark.parametrize("damage", ["truncated", "missing", "newer manifest", "broken manifest"])
def test_whatever_is_damaged_is_named_and_rebuilt(ctx, damage):
    stage = Doubling({"t/a": 1})
    run(stage, ctx, ["t/a"])
    store = ctx.workspace.store
    manifest = next(key for key in ctx.workspace.manifests.keys() if key.endswith("t/a.json"))  # noqa: SIM118
    key = manifest if "manifest" in damage else "e/t/a/double.json"
    path = store.local_path(key)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "missing":
        path.unlink()
    elif damage == "newer manifest":
        path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    else:
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ArtifactError) as caught:
        ctx.upstream("vectors", "t/a")
    assert store.describe(key) in str(caught.value)
    assert run(stage, ctx, ["t/a"])["t/a"].state == "done"
    assert ctx.upstream("vectors", "t/a").summary["double"] == 2
    assert store.read_json("e/t/a/double.json") == {"double": 2}


def test_a_trait_that_the_experiment_leaves_out_is_skipped(ctx):
    from dataclasses import replace

    narrow = replace(ctx, experiment=ctx.experiment.with_overrides({"traits": ["t/a"]}))
    stage = Doubling({"t/a": 1, "t/b": 2})
    results = run(stage, narrow, ["t/a", "t/b"])
    assert results["t/b"].state == "skipped"
    assert results["t/b"].manifest.status == "skipped"
    assert stage.computed == ["t/a"]


def test_a_missing_input_says_what_to_materialise(ctx):
    with pytest.raises(UserError, match="materialise `responses` first"):
        ctx.upstream("responses", "t/a")


def test_force_recomputes(ctx):
    from dataclasses import replace

    stage = Doubling({"t/a": 1})
    run(stage, ctx, ["t/a"])
    assert run(stage, replace(ctx, force=True), ["t/a"])["t/a"].state == "done"
