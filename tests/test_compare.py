"""Two experiments side by side."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from storage.errors import UserError
from storage.workspace import Workspace
from trait_assets.compare import Difference, compare_experiments, show


def _stored() -> Any:
    from importlib import util

    path = Path(__file__).parent / "vectors" / "stored_experiment.py"
    spec = util.spec_from_file_location("stored_experiment", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stored = _stored()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "experiments", tmp_path / "lineage.duckdb")


def test_options_inputs_numbers_and_vectors(workspace: Workspace) -> None:
    shared: dict[str, Any] = {"inputs": {"scenarios": "same"}, "libraries": {"torch": "2"}}
    stored.commit(
        workspace,
        "responses",
        "tonal/dry",
        {},
        "one",
        options={"temperature": 0.0, "model": {"model": "m", "revision": "1"}},
        summary={"mean_tokens": 10.0, "seconds_since_start": 3.0, "mode": "chat"},
        **shared,
    )
    stored.commit(
        workspace,
        "responses",
        "tonal/dry",
        {},
        "two",
        options={"temperature": 0.7, "model": {"model": "m", "revision": "2"}},
        summary={"mean_tokens": 12.5, "seconds_since_start": 9.0, "mode": "chat"},
        code_version="2",
        **shared,
    )
    stored.store_vectors(workspace, stored.vector_file(seed=0), experiment="one")
    stored.store_vectors(workspace, stored.vector_file(seed=0, layers=[0, 1]), experiment="two")
    stored.commit(workspace, "steering_results", "tonal/dry", {}, "one")
    result = compare_experiments(workspace, "one", "two")
    responses = {(d.kind, d.name): (d.a, d.b) for d in result.differences if d.stage == "responses"}
    assert responses == {
        ("code", "code_version"): ("1", "2"),
        ("option", "temperature"): (0.0, 0.7),
        ("option", "model.revision"): ("1", "2"),
        ("number", "mean_tokens"): (10.0, 12.5),
    }
    assert Difference("tonal/dry", "steering_results", "result", "state", "done", None) in result.differences
    assert [(c.layer, round(c.cosine or 0, 5)) for c in result.cosines] == [(0, 1.0), (1, 1.0)]
    json.dumps(result.record(), allow_nan=False)
    out = io.StringIO()
    Console(file=out, width=160, color_system=None).print(show(result))
    assert "temperature" in out.getvalue()
    assert "1.0000" in out.getvalue()


def test_vectors_of_other_widths_and_seeds(workspace: Workspace) -> None:
    stored.store_vectors(workspace, stored.vector_file(seed=0), experiment="one")
    stored.store_vectors(workspace, stored.vector_file(seed=5), experiment="two")
    stored.store_vectors(workspace, stored.vector_file(width=16), experiment="three")
    result = compare_experiments(workspace, "one", "two")
    expected = (stored.vector_file(seed=0).directions * stored.vector_file(seed=5).directions).sum(axis=1)
    assert [c.cosine for c in result.cosines] == pytest.approx(expected.tolist(), abs=1e-6)
    wider = compare_experiments(workspace, "one", "three")
    assert {(c.cosine, c.note) for c in wider.cosines} == {(None, "widths 32 and 16")}
    Console(file=io.StringIO()).print(show(wider))


def test_the_same_experiment_does_not_differ_from_itself(workspace: Workspace) -> None:
    stored.store_vectors(workspace, stored.vector_file(), experiment="one")
    result = compare_experiments(workspace, "one", "one")
    assert result.differences == ()
    assert result.same == (("tonal/dry", "vectors"),)
    assert [c.cosine for c in result.cosines] == pytest.approx([1.0] * 5)


def test_some_traits_only_and_nothing_at_all(workspace: Workspace) -> None:
    for trait in ("tonal/dry", "tonal/wet"):
        stored.store_vectors(workspace, stored.vector_file(trait), experiment="one")
        stored.store_vectors(workspace, stored.vector_file(trait, seed=3), experiment="two")
    result = compare_experiments(workspace, "one", "two", ["tonal/wet"])
    assert {c.trait for c in result.cosines} == {"tonal/wet"}
    with pytest.raises(UserError, match="three has no results"):
        compare_experiments(workspace, "one", "three")
    with pytest.raises(UserError):
        compare_experiments(workspace, "../x", "one")


def test_a_broken_manifest_is_a_difference_that_says_so(workspace: Workspace) -> None:
    for name in ("one", "two"):
        stored.store_vectors(workspace, stored.vector_file(), experiment=name)
    workspace.store.write_bytes("two/manifests/vectors/tonal/dry.json", b"{broken")
    (difference,) = compare_experiments(workspace, "one", "two").differences
    assert difference.a == "done"
    assert "not valid JSON" in difference.b


def test_what_a_run_took_is_no_difference(workspace: Workspace) -> None:
    from collections import defaultdict

    from trait_assets.metering import summary

    measured = summary(defaultdict(lambda: 1.0))
    assert len(measured) >= 5
    for name, factor in (("one", 1), ("two", 3)):
        took = {key: value * factor for key, value in measured.items()} | {"captured_now": factor}
        stored.store_vectors(workspace, stored.vector_file(), experiment=name, summary=took)
    assert compare_experiments(workspace, "one", "two").differences == ()
