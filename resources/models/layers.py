"""Layer lists: `16`, `5,10`, `5-20`, `30%-60%`, `all`, and mixes of them. Blocks are counted from 0.

Only the grammar; which module a layer is belongs to `anatomy`.
"""

from __future__ import annotations

import re

from storage.errors import UserError

_ITEM = re.compile(r"(?P<a>[0-9]+)(?P<ap>%?)(?:\s*-\s*(?P<b>[0-9]+)(?P<bp>%?))?")
_REMEDY = "Write layers as 16, 5,10, 5-20, 30%-60% or all; ranges include both ends."


def parse_layers(text: str, n_layers: int) -> list[int]:
    """Sorted layer numbers without repeats.

    `p%` is layer floor(n_layers · p / 100), at most the last. Anything else than the grammar, a layer that
    the model does not have, and a range that runs backwards is a UserError; nothing is dropped silently.
    """
    if text.strip() == "all":
        return list(range(n_layers))
    layers: set[int] = set()
    for raw in text.split(","):
        item = raw.strip()
        match = _ITEM.fullmatch(item)
        if match is None:
            raise UserError(
                f"{item!r} is not a layer or a range of layers", where=f"layers {text!r}", remedy=_REMEDY
            )
        first = _layer(text, match["a"], match["ap"], n_layers)
        if match["b"] is None:
            layers.add(first)
            continue
        if bool(match["ap"]) != bool(match["bp"]):
            raise UserError(
                f"{item!r} mixes a percentage and a number", where=f"layers {text!r}", remedy=_REMEDY
            )
        last = _layer(text, match["b"], match["bp"], n_layers)
        if last < first:
            raise UserError(f"{item!r} runs backwards", where=f"layers {text!r}", remedy=_REMEDY)
        layers.update(range(first, last + 1))
    return sorted(layers)


def _layer(text: str, digits: str, percent: str, n_layers: int) -> int:
    value = int(digits)
    if percent:
        if value > 100:
            raise UserError(f"{value}% is more than 100%", where=f"layers {text!r}", remedy=_REMEDY)
        return min(n_layers * value // 100, n_layers - 1)
    if value >= n_layers:
        raise UserError(
            f"layer {value} does not exist: the model has n_layers = {n_layers}",
            where=f"layers {text!r}",
            remedy=f"Use layers 0 to {n_layers - 1}.",
        )
    return value
