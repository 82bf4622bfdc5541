"""The grammar of layer lists."""

from __future__ import annotations

import pytest

from resources.models.layers import parse_layers
from storage.errors import UserError


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("16", [16]),
        ("5,10", [5, 10]),
        ("10, 5,5", [5, 10]),
        ("5-8", [5, 6, 7, 8]),
        ("7-7", [7]),
        ("30%-60%", list(range(7, 16))),
        ("50%", [13]),
        ("100%", [25]),
        ("0%", [0]),
        ("all", list(range(26))),
        ("1,24-25,50%-51%", [1, 13, 24, 25]),
    ],
)
def test_layers_of_a_model_with_26(text: str, layers: list[int]) -> None:
    assert parse_layers(text, 26) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("26", "layer 26 does not exist: the model has n_layers = 26"),
        ("20-30", "layer 30 does not exist"),
        ("8-5", "'8-5' runs backwards"),
        ("60%-30%", "runs backwards"),
        ("101%", "101% is more than 100%"),
        ("5-50%", "mixes a percentage and a number"),
        ("", "'' is not a layer"),
        ("5,", "'' is not a layer"),
        ("-1", "'-1' is not a layer"),
        ("1.5", "'1.5' is not a layer"),
        ("5:8", "'5:8' is not a layer"),
        ("all,5", "'all' is not a layer"),
        ("best", "'best' is not a layer"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_layers(text, 26)
