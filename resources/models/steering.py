"""Steering hooks: every row of a batch with its own interventions.

A plan is built for the rows that are in the batch now; rows carry their own settings, so a batch may be
split, shrunk or joined anywhere. Decides nothing about when steering applies: `generation` opens the hooks
for the forward passes that are to be steered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from resources.models.anatomy import Anatomy, Site, hooks
from resources.models.rows import Intervention
from storage.errors import UserError

_UNIT_TOLERANCE = 1e-3


def check(interventions: Sequence[Intervention], anatomy: Anatomy, *, row: str) -> None:
    """UserError for a site that the model lacks, a vector of another width, or one that is not a finite unit
    vector (a coefficient is a length, which only a unit direction makes true)."""
    for intervention in interventions:
        site = anatomy.site(intervention.component, intervention.layer)
        vector = np.asarray(intervention.vector)
        where = f"row {row!r}, layer {intervention.layer}"
        if vector.shape != (site.width,):
            raise UserError(
                f"the vector has shape {vector.shape}, but {intervention.component} has width {site.width}",
                where=where,
                remedy="Use vectors that were extracted from a model of this width.",
            )
        norm = float(np.linalg.norm(vector.astype(np.float64)))
        if not abs(norm - 1.0) <= _UNIT_TOLERANCE:
            raise UserError(
                f"the vector has norm {norm:.4g}; an intervention takes a unit direction",
                where=where,
                remedy="Divide the vector by its norm and put the length into the coefficient.",
            )
        if not np.isfinite(intervention.coefficient):
            raise UserError(f"the coefficient is {intervention.coefficient}", where=where)
        if intervention.operation not in _OPERATIONS:
            raise UserError(
                f"unknown operation {intervention.operation!r}",
                where=where,
                remedy=f"Use one of {', '.join(_OPERATIONS)}.",
            )


# h: [rows, tokens, width], v: [rows, 1, width], c: [rows, 1, 1], all fp32
_Operation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _add(h: torch.Tensor, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return h + c * v


def _add_norm_preserving(h: torch.Tensor, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """h' = h + c·v, scaled back to ‖h‖."""
    moved = h + c * v
    return moved * (h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def _ablate(h: torch.Tensor, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """h − (h·v)v."""
    return h - (h * v).sum(-1, keepdim=True) * v


def _clamp(h: torch.Tensor, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """h + (c − h·v)v: the projection becomes c."""
    return h + (c - (h * v).sum(-1, keepdim=True)) * v


_OPERATIONS: dict[str, _Operation] = {
    "add": _add,
    "add_norm_preserving": _add_norm_preserving,
    "ablate": _ablate,
    "clamp": _clamp,
}


@dataclass
class _Wave:
    """At most one intervention of each row, all of one operation."""

    operation: _Operation
    rows: list[int]
    vectors: torch.Tensor
    coefficients: torch.Tensor

    def to(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.vectors.device != device:
            self.vectors = self.vectors.to(device)
            self.coefficients = self.coefficients.to(device)
        return torch.tensor(self.rows, device=device), self.vectors, self.coefficients


@dataclass
class SteeringPlan:
    """Hooks for the rows of one batch, in batch order.

    `token_mask` ([rows, tokens], True where a real token is) restricts steering within one forward pass; None
    steers every token.
    """

    anatomy: Anatomy
    rows: Sequence[Sequence[Intervention]]
    token_mask: torch.Tensor | None = None
    _sites: list[tuple[Site, Any]] = field(init=False)

    def __post_init__(self) -> None:
        by_site: dict[tuple[str, int], list[tuple[int, Intervention]]] = defaultdict(list)
        for row, interventions in enumerate(self.rows):
            for intervention in interventions:
                by_site[intervention.component, intervention.layer].append((row, intervention))
        self._sites = []
        for (component, layer), entries in by_site.items():
            site = self.anatomy.site(component, layer)
            self._sites.append((site, self._hook(site, entries)))

    def __bool__(self) -> bool:
        return bool(self._sites)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Steer every forward pass inside the with block; no hook is left behind, whatever happens inside."""
        with hooks([(site.module, hook) for site, hook in self._sites]):
            yield

    def _hook(self, site: Site, entries: list[tuple[int, Intervention]]) -> Callable[..., Any]:
        rows = [row for row, _ in entries]
        only_additions = all(intervention.operation == "add" for _, intervention in entries)
        if only_additions and self.token_mask is None:
            return self._addition_hook(site, entries)
        waves = self._waves(entries)

        def steer(module: nn.Module, args: Any, output: Any) -> Any:
            value = site.read(output)
            touched = torch.tensor(sorted(set(rows)), device=value.device)
            # rows without an intervention here keep their bits: they are never computed with
            whole = value.float().clone()
            for wave in waves:
                index, vectors, coefficients = wave.to(value.device)
                whole[index] = wave.operation(whole[index], vectors[:, None], coefficients[:, None, None])
            changed = whole[touched].to(value.dtype)
            if self.token_mask is not None:
                mask = self.token_mask.to(value.device)[touched][..., None]
                changed = torch.where(mask, changed, value[touched])
            return site.write(output, value.index_copy(0, touched, changed))

        return steer

    def _addition_hook(self, site: Site, entries: list[tuple[int, Intervention]]) -> Callable[..., Any]:
        """Additions commute, so all of them are one dense [rows, 1, width] term, made once per plan."""
        total = np.zeros((len(self.rows), 1, site.width), dtype=np.float32)
        for row, intervention in entries:
            total[row, 0] += np.float32(intervention.coefficient) * np.asarray(
                intervention.vector, np.float32
            )
        terms = {torch.device("cpu"): torch.from_numpy(total)}

        def steer(module: nn.Module, args: Any, output: Any) -> Any:
            value = site.read(output)
            if value.device not in terms:
                terms[value.device] = terms[torch.device("cpu")].to(value.device)
            return site.write(output, (value.float() + terms[value.device]).to(value.dtype))

        return steer

    def _waves(self, entries: list[tuple[int, Intervention]]) -> list[_Wave]:
        """Split so that each row's interventions keep their order."""
        turn: dict[int, int] = defaultdict(int)
        grouped: dict[tuple[int, str], list[tuple[int, Intervention]]] = defaultdict(list)
        for row, intervention in entries:
            grouped[turn[row], intervention.operation].append((row, intervention))
            turn[row] += 1
        waves: list[_Wave] = []
        for (_, operation), members in sorted(grouped.items(), key=lambda item: item[0]):
            waves.append(
                _Wave(
                    operation=_OPERATIONS[operation],
                    rows=[row for row, _ in members],
                    vectors=torch.from_numpy(
                        np.stack([np.asarray(member.vector, dtype=np.float32) for _, member in members])
                    ),
                    coefficients=torch.tensor([float(member.coefficient) for _, member in members]),
                )
            )
        return waves
