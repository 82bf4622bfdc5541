"""Which vectors are worth steering with: a shortlist from the numbers of stage 4.

Here: ranking and spreading candidates, and loading their directions. Not here: steering them. How well a
vector separates says almost nothing about how well it steers, so the shortlist is spread over depth and
methods and only filtered by detection: the layer of each depth band that separates best and most stably
stands for its band.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from storage.workspace import Workspace
    from trait_assets.steering.dose_search import Candidate
    from trait_assets.vectors.vector import VectorFile

# below this cross-validated AUC a direction does not even separate what it was fitted on
LEAST_AUC = 0.6
# two directions at one site with a larger cosine are one candidate: steering with both would measure the same
# twice
SAME_COSINE = 0.95
NULL_METHODS = ("random",)


@dataclass(frozen=True)
class Scored:
    """One vector with its stage-4 numbers from train rows: cross-validated AUC and split-half cosine, None if
    unknown.
    """

    layer: int
    method: str
    position: str
    component: str
    auc: float | None = None
    stability: float | None = None

    @property
    def family(self) -> tuple[str, str, str]:
        return self.method, self.position, self.component

    @property
    def merit(self) -> float:
        """0–1: separation above chance, times stability over halves of the data."""
        separation = 0.5 if self.auc is None else max(0.0, 2 * self.auc - 1)
        return separation * (0.5 if self.stability is None else max(0.0, self.stability))

    def place(self) -> dict[str, Any]:
        """Which vector it is, without its numbers: these differ in the last digits between machines."""
        return {
            "layer": self.layer,
            "method": self.method,
            "position": self.position,
            "component": self.component,
        }

    def record(self) -> dict[str, Any]:
        return {**self.place(), "cv_auc": self.auc, "split_half_cosine": self.stability}


Cosine = Callable[[Scored, Scored], float]


def read_scored(rows: Iterable[Mapping[str, Any]]) -> list[Scored]:
    """The rows of evaluation.json as candidates; null methods are left out."""
    return [
        Scored(
            layer=int(row["layer"]),
            method=str(row["method"]),
            position=str(row["position"]),
            component=str(row["component"]),
            auc=_finite(row.get("cv_auc")),
            stability=_finite(row.get("split_half_cosine")),
        )
        for row in rows
        if row["method"] not in NULL_METHODS
    ]


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def shortlist(
    scored: Sequence[Scored],
    *,
    trait: str,
    layers: Sequence[int] | None,
    methods: Sequence[str] | None,
    explicit: Sequence[Mapping[str, Any]] | None,
    limit: int,
    cosine: Cosine | None = None,
) -> list[Scored]:
    """At most `limit` candidates. `layers`: those allowed (None: all); `methods`: those allowed.

    The limit is shared out over families (method × position × component). Within a family the allowed layers
    are cut into as many bands as it has places, and the best of each band is taken; ties go to the middle of
    the band. `explicit` ({layer, method, position?, component?}) names them instead. Raises UserError for
    what does not exist.
    """
    if explicit is not None:
        return _explicit(scored, explicit, trait)
    if methods is not None:
        known = sorted({s.method for s in scored})
        for method in methods:
            if method not in known:
                raise UserError(
                    f"{trait} has no vectors of method `{method}`",
                    where="steer.methods",
                    remedy=f"choose from {', '.join(known)}, or add it to `methods` and run `vectors`",
                )
    allowed = [
        s
        for s in scored
        if (layers is None or s.layer in layers) and (methods is None or s.method in methods)
    ]
    if not allowed:
        there = sorted({s.layer for s in scored})
        raise UserError(
            f"{trait} has no vector to steer with at the layers and methods asked for",
            where="steer.layers",
            remedy=f"set steer.layers to some of {', '.join(map(str, there))}, or widen steer.depth_window",
        )
    separating = [s for s in allowed if s.auc is None or s.auc >= LEAST_AUC]
    pool = separating or allowed
    families: dict[tuple[str, str, str], list[Scored]] = {}
    for s in pool:
        families.setdefault(s.family, []).append(s)
    # families that lead come first when there are more of them than places
    order = sorted(families, key=lambda f: -max(s.merit for s in families[f]))[:limit]
    places = {f: limit // len(order) + (1 if i < limit % len(order) else 0) for i, f in enumerate(order)}
    chosen: list[Scored] = []

    def is_new(s: Scored) -> bool:
        return s not in chosen and not any(_same(s, c, cosine) for c in chosen)

    for family in order:
        for band in _bands(families[family], places[family]):
            fresh = [s for s in band if is_new(s)]
            if fresh:
                middle = (band[0].layer + band[-1].layer) / 2
                # detection is noisy: differences in the second decimal are none
                ordered = sorted(fresh, key=lambda s: abs(s.layer - middle))
                chosen.append(max(ordered, key=lambda s: round(s.merit, 1)))
    # a place that stayed empty goes to whoever is next best
    for s in sorted(pool, key=lambda s: -s.merit):
        if len(chosen) >= limit:
            break
        if s.family in places and is_new(s):
            chosen.append(s)
    return sorted(chosen, key=lambda s: -s.merit)


def _same(a: Scored, b: Scored, cosine: Cosine | None) -> bool:
    if cosine is None or (a.layer, a.component) != (b.layer, b.component):
        return False
    return cosine(a, b) > SAME_COSINE


def _bands(family: Sequence[Scored], places: int) -> list[list[Scored]]:
    """The family's layers cut into bands of equal depth, empty ones left out; every layer by itself if they
    fit."""
    ordered = sorted(family, key=lambda s: s.layer)
    if len(ordered) <= places:
        return [[s] for s in ordered]
    low, high = ordered[0].layer, ordered[-1].layer + 1
    width = (high - low) / places
    bands: list[list[Scored]] = [[] for _ in range(places)]
    for s in ordered:
        bands[min(int((s.layer - low) / width), places - 1)].append(s)
    return [band for band in bands if band]


def _explicit(scored: Sequence[Scored], explicit: Sequence[Mapping[str, Any]], trait: str) -> list[Scored]:
    out: list[Scored] = []
    for number, wanted in enumerate(explicit, 1):
        where = f"steer.candidates[{number}]"
        unknown = set(wanted) - {"layer", "method", "position", "component"}
        if unknown or "layer" not in wanted or "method" not in wanted:
            raise UserError(
                "a candidate is {layer, method, position (optional), component (optional)}"
                + (f", not {', '.join(sorted(map(str, unknown)))}" if unknown else ""),
                where=where,
                remedy="correct this entry",
            )
        hits = [
            s
            for s in scored
            if s.layer == wanted["layer"]
            and s.method == wanted["method"]
            and wanted.get("position") in (None, s.position)
            and wanted.get("component") in (None, s.component)
        ]
        if not hits:
            raise UserError(
                f"{trait} has no vector {dict(wanted)}",
                where=where,
                remedy="name a layer, method, position and component that `vectors` holds",
            )
        out.extend(h for h in hits if h not in out)
    return out


def window_layers(n_layers: int, window: tuple[float, float]) -> list[int]:
    """Layers whose depth (layer ÷ (n_layers − 1)) lies in the window, ends included."""
    if n_layers == 1:
        return [0]
    return [i for i in range(n_layers) if window[0] <= i / (n_layers - 1) <= window[1]]


class Directions:
    """Unit directions of one trait's vectors, read once per file, each pointing towards the trait."""

    def __init__(self, workspace: Workspace, experiment: str, trait: str) -> None:
        self._workspace = workspace
        self._experiment = experiment
        self._trait = trait
        self._files: dict[tuple[str, str, str], VectorFile] = {}

    def of(self, s: Scored) -> np.ndarray:
        """[hidden] float32. UserError when there is no such file or layer."""
        import numpy as np

        from trait_assets.vectors.vector import load_vectors

        if s.family not in self._files:
            self._files[s.family] = load_vectors(
                self._workspace, self._experiment, self._trait, s.position, s.component, s.method
            )
        vector = self._files[s.family].vector(s.layer)
        return np.ascontiguousarray(vector.direction * vector.sign, dtype=np.float32)

    def cosine(self, a: Scored, b: Scored) -> float:
        return float(self.of(a) @ self.of(b))

    def candidates(self, chosen: Sequence[Scored]) -> list[Candidate]:
        from trait_assets.steering.dose_search import Candidate

        return [
            Candidate(s.layer, s.method, s.position, s.component, self.of(s), rank, s.record())
            for rank, s in enumerate(chosen)
        ]
