"""The shortlist: spread over depth and methods, filtered by detection, named exactly when asked."""

from __future__ import annotations

from typing import Any

import pytest

from storage.errors import UserError
from trait_assets.steering.candidates import Scored, read_scored, shortlist, window_layers


def rows(
    methods: tuple[str, ...] = ("mean_diff", "probe", "gradient"), layers: int = 30, **merit: Any
) -> list[Scored]:
    return [
        Scored(layer, method, "response[:]", "residual", merit.get("auc", 0.99), merit.get("stability", 0.8))
        for method in methods
        for layer in range(layers)
    ]


def choose(scored: list[Scored], limit: int = 6, **options: Any) -> list[Scored]:
    given: dict[str, Any] = {"trait": "a/b", "layers": None, "methods": None, "explicit": None} | options
    return shortlist(scored, limit=limit, **given)


def test_every_method_is_spread_over_the_window() -> None:
    chosen = choose(rows(), layers=window_layers(30, (0.25, 0.75)))
    assert len(chosen) == 6
    for method in ("mean_diff", "probe", "gradient"):
        layers = sorted(s.layer for s in chosen if s.method == method)
        assert len(layers) == 2
        assert 8 <= layers[0] <= 14 < layers[1] <= 21


def test_the_stablest_layer_of_a_band_stands_for_it() -> None:
    scored = rows(("probe",))
    scored[11] = Scored(11, "probe", "response[:]", "residual", 0.99, 0.99)
    scored[19] = Scored(19, "probe", "response[:]", "residual", 0.99, 0.99)
    chosen = choose(scored, limit=2, layers=window_layers(30, (0.25, 0.75)))
    assert sorted(s.layer for s in chosen) == [11, 19]


def test_what_does_not_separate_is_left_out() -> None:
    scored = rows(("probe",), auc=0.5) + rows(("mean_diff",), auc=0.9)
    assert {s.method for s in choose(scored)} == {"mean_diff"}
    # unless nothing else is there
    assert {s.method for s in choose(rows(("probe",), auc=0.5))} == {"probe"}


def test_unknown_numbers_do_not_exclude() -> None:
    scored = read_scored(
        {
            "layer": i,
            "method": m,
            "position": "p",
            "component": "c",
            "cv_auc": None,
            "split_half_cosine": float("nan"),
        }
        for i in range(5)
        for m in ("probe", "random")
    )
    assert {s.method for s in scored} == {"probe"}
    assert scored[0].auc is None
    assert scored[0].stability is None
    assert len(choose(scored, limit=3)) == 3


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7, 24, 500])
def test_never_more_than_the_limit_never_twice(limit: int) -> None:
    scored = rows()
    chosen = choose(scored, limit=limit)
    assert len(chosen) == min(limit, len(scored))
    assert len(set(chosen)) == len(chosen)


def test_gaps_between_captured_layers() -> None:
    scored = [s for s in rows(("probe",)) if s.layer in (0, 1, 2, 29)]
    assert sorted(s.layer for s in choose(scored, limit=4)) == [0, 1, 2, 29]
    assert 29 in [s.layer for s in choose(scored, limit=2)]


def test_directions_that_agree_are_steered_once() -> None:
    def cosine(a: Scored, b: Scored) -> float:
        return 0.99 if {a.method, b.method} == {"probe", "gradient"} else 0.3

    chosen = choose(rows(), layers=window_layers(30, (0.25, 0.75)), cosine=cosine)
    assert len(chosen) == 6
    sites = [s.layer for s in chosen if s.method in ("probe", "gradient")]
    assert len(sites) == len(set(sites))


def test_errors_name_the_option() -> None:
    for options, said in (
        ({"methods": ["pca"]}, "steer.methods"),
        ({"layers": []}, "steer.layers"),
        ({"explicit": [{"layer": 3}]}, "steer.candidates[1]"),
        ({"explicit": [{"layer": 99, "method": "probe"}]}, "steer.candidates[1]"),
        ({"explicit": [{"layer": 3, "method": "probe", "position": "prompt[-1]"}]}, "steer.candidates[1]"),
    ):
        with pytest.raises(UserError) as caught:
            choose(rows(), **options)
        assert said in str(caught.value)


def test_window() -> None:
    assert window_layers(30, (0.25, 0.75)) == list(range(8, 22))
    assert window_layers(1, (0.25, 0.75)) == [0]
    assert window_layers(4, (0.0, 1.0)) == [0, 1, 2, 3]
