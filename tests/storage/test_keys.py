"""Names that are refused, and the layout."""

from __future__ import annotations

from pathlib import PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import keys
from storage.artifacts import ArtifactStore
from storage.errors import UserError

BAD_TRAITS = [
    "",
    "a",
    "a/b/c",
    "../x",
    "/etc/x",
    "a/..",
    "a/",
    "/a",
    "a,b/c",
    "a/b,c",
    "ü/x",
    "a/ü",
    "A/b",
    "a/B",
    "a/b.c",
    "a/v1.5",
    "con/x",
    "a/con",
    "a/nul",
    "lpt1/x",
    "-a/b",
    "_a/b",
    "a/_b",
    "a/b\n",
    "a /b",
    "a\\b",
    "a/" + "x" * 300,
    "a|b/c",
    "a/b...c",
]


@pytest.mark.parametrize("trait", BAD_TRAITS)
def test_bad_trait_names_are_refused_by_every_key(trait: str) -> None:
    for make in (
        keys.check_trait,
        keys.scenario_set,
        lambda t: keys.extraction("demo", t, "x"),
        lambda t: keys.steering("demo", t, "p", "x"),
        lambda t: keys.manifest("demo", "vectors", t),
        lambda t: keys.history("demo", "vectors", t),
        lambda t: keys.row_cache("judge", t),
        lambda t: keys.journal("demo", "vectors", t),
        lambda t: keys.metrics("demo", "vectors", t),
        lambda t: keys.picture("demo", "vectors", t, "p"),
    ):
        with pytest.raises(UserError) as caught:
            make(trait)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "ü", "con", "_shared", "-x", "a.b", "x" * 101, "a\n"])
def test_bad_experiment_names_are_refused(name: str) -> None:
    with pytest.raises(UserError):
        keys.check_experiment(name)
    with pytest.raises(UserError):
        keys.extraction(name, "a/b", "x")


def test_the_layout() -> None:
    trait = "tonal/dry-wit"
    assert keys.scenario_set(trait) == "_scenarios/tonal/dry-wit/scenario_set.json"
    assert keys.extraction("demo", trait, "responses", "pos.json") == (
        "demo/extraction/tonal/dry-wit/responses/pos.json"
    )
    assert keys.extraction("demo", None, "extraction_evaluation.json") == (
        "demo/extraction/extraction_evaluation.json"
    )
    assert keys.steering("demo", trait, "response_all", "results.json") == (
        "demo/steering/tonal/dry-wit/response_all/results.json"
    )
    assert keys.manifest("demo", "vectors", trait) == "demo/manifests/vectors/tonal/dry-wit.json"
    assert keys.manifest("demo", "steering_summary", None) == "demo/manifests/steering_summary.json"
    assert keys.manifest(None, "scenarios", trait) == "_shared/manifests/scenarios/tonal/dry-wit.json"
    assert keys.row_cache("judge", trait) == "_cache/judge/tonal/dry-wit"
    assert keys.journal("demo", "activations", trait) == "demo/journal/activations/tonal/dry-wit"
    assert keys.metrics("demo", "vectors", trait) == "demo/metrics/vectors/tonal/dry-wit"


def test_rest_and_position_cannot_escape() -> None:
    for rest in ("..", "../x", "/x", "a b", ""):
        with pytest.raises(UserError):
            keys.extraction("demo", "a/b", rest)
        with pytest.raises(UserError):
            keys.steering("demo", "a/b", rest, "x")


_name = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,12}", fullmatch=True)
_traits = st.tuples(_name, _name).map("/".join)


def _legal(trait: str) -> bool:
    try:
        keys.check_trait(trait)
    except UserError:
        return False
    return True


@given(_traits, _traits, _name, _name)
def test_two_results_never_share_a_key(one: str, other: str, experiment: str, second: str) -> None:
    if not (_legal(one) and _legal(other)):
        return
    for a, b in ((experiment, experiment), (experiment, second), (None, experiment)):
        try:
            made = [
                key
                for e in (a, b)
                for trait in (one, other, None)
                for key in (
                    keys.manifest(e, "vectors", trait),
                    keys.history(e, "vectors", trait),
                    keys.metrics(e, "vectors", trait),
                    keys.journal(e, "vectors", trait),
                )
            ]
        except UserError:  # a device name as an experiment
            return
        kinds = 4
        expected = len({a, b}) * len({one, other, None}) * kinds
        assert len(set(made)) == expected
        # also where upper and lower case are one, and as Windows paths
        assert len({PureWindowsPath(key.lower()) for key in made}) == expected
        for key in made:
            ArtifactStore.check_key(key)
