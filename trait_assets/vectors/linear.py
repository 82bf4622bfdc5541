"""Linear algebra over all layers: scaled feature spaces, their row-space coordinates, and directions back in
raw space.

With n rows of width d ≫ n, every L2-regularised linear solution lies in the span of the n rows. So the rows
of a layer are rotated once into r ≤ min(n, d) coordinates, all fits of a layer (folds, halves, regularisation
strengths) run there, and the solutions are rotated back. This is exact, not an approximation. What is fitted
is not decided here (see `methods`).

Conventions: X is [n, L, d] float32, never copied whole; one layer at a time is brought to float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Scaling = Literal["raw", "standard", "tamed"]
# A dimension is tamed when its spread exceeds this many times the median spread of its layer.
TAME_AT = 10.0


@dataclass(frozen=True)
class LayerSpace:
    """The rows of one layer, centred and scaled, in orthogonal coordinates.

    `coords` [n, r] float64: an isometric image of Z = (X - mean) · scale, with orthogonal columns of squared
    length `eigenvalues` [r]. `live`: how many of the d dimensions vary at all.
    """

    mean: np.ndarray
    scale: np.ndarray
    coords: np.ndarray
    eigenvalues: np.ndarray
    live: int
    _rows: np.ndarray
    _basis: np.ndarray | None
    _row_basis: np.ndarray | None

    def back(self, w: np.ndarray) -> np.ndarray:
        """Directions in raw space, [d, k], of weights on the coordinates, [r, k]: the scale is folded back
        in.
        """
        if self._basis is not None:
            return self.scale[:, None] * (self._basis @ w)
        assert self._row_basis is not None
        on_rows = self._row_basis @ w
        z_weights = self._rows.T @ on_rows - self.mean[:, None] * on_rows.sum(axis=0)
        return self.scale[:, None] ** 2 * z_weights


def layer_space(rows: np.ndarray, scaling: Scaling) -> LayerSpace:
    """`rows`: [n, d]. The scale uses no labels, so cross-validation and permutation tests over it stay
    honest.
    """
    rows = np.asarray(rows, dtype=np.float64)
    n, d = rows.shape
    mean, spread = moments(rows)
    scale = scale_of(spread, scaling)
    z = (rows - mean) * scale
    if d <= n:
        eigenvalues, basis = np.linalg.eigh(z.T @ z)
    else:
        eigenvalues, basis = np.linalg.eigh(z @ z.T)
    keep = eigenvalues > max(eigenvalues[-1], 0.0) * max(n, d) * 1e-12
    eigenvalues, basis = eigenvalues[keep][::-1], basis[:, keep][:, ::-1]
    live = int((scale > 0).sum())
    if d <= n:
        return LayerSpace(mean, scale, z @ basis, eigenvalues, live, rows, basis, None)
    root = np.sqrt(eigenvalues)
    return LayerSpace(mean, scale, basis * root, eigenvalues, live, rows, None, basis / root)


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per dimension, [d] each; a constant dimension has spread exactly 0."""
    mean = rows.mean(axis=0)
    spread = np.sqrt(((rows - mean) ** 2).mean(axis=0))
    # float32 storage makes a constant look as if it moved by its last bit
    constant = spread <= 1e-6 * np.abs(rows).max(axis=0)
    return mean, np.where(constant, 0.0, spread)


def scale_of(spread: np.ndarray, scaling: Scaling) -> np.ndarray:
    """Factor per dimension, [d]; constant dimensions get 0 and so can never enter a direction.

    `raw`: 1. `standard`: 1/spread. `tamed`: 1 for ordinary dimensions; for those that spread more than
    TAME_AT times the median, TAME_AT · median / spread, so that a direction (which carries the factor
    squared) gives them no more than their share of evidence, as a diagonal discriminant would.
    """
    live = spread > 0
    factor = np.zeros_like(spread)
    if scaling == "raw":
        factor[live] = 1.0
    elif scaling == "standard":
        factor[live] = 1.0 / spread[live]
    elif live.any():
        limit = TAME_AT * np.median(spread[live])
        factor[live] = np.minimum(1.0, limit / spread[live])
    return factor


def unit(directions: np.ndarray, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions and the norms divided by. A zero or non-finite direction stays zero, with norm 0."""
    norms = np.linalg.norm(directions.astype(np.float64), axis=axis)
    safe = np.where(np.isfinite(norms) & (norms > 0), norms, 0.0)
    divisor = np.expand_dims(np.where(safe > 0, safe, 1.0), axis)
    scaled = np.where(np.expand_dims(safe > 0, axis), directions / divisor, 0.0)
    return scaled, safe
