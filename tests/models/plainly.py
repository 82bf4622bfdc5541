"""What generation and capture should give, computed the slow way: one row, no cache, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from resources.models.rows import GenerationRow, Intervention


def states(model: Any, ids: Sequence[int]) -> list[torch.Tensor]:
    """Residual stream before block 0 and after every block: n_layers + 1 of [tokens, hidden]."""
    found: list[torch.Tensor] = []
    layers = model.anatomy.layers

    def before(module: Any, args: Any, kwargs: Any) -> None:
        found.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    def after(module: Any, args: Any, output: Any) -> None:
        found.append((output if isinstance(output, torch.Tensor) else output[0])[0].clone())

    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        forward(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return found


def forward(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of the whole causal model."""
    with torch.no_grad():
        output = model.causal(
            input_ids=torch.tensor([list(ids)]),
            position_ids=torch.arange(len(ids))[None],
            attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
            use_cache=False,
        )
    return output.logits[0].float()


def apply(state: torch.Tensor, intervention: Intervention) -> torch.Tensor:
    """One intervention on [tokens, width], from its definition."""
    vector = torch.tensor(np.asarray(intervention.vector), dtype=torch.float64)
    h = state.double()
    c = intervention.coefficient
    projection = (h @ vector)[:, None] * vector
    if intervention.operation == "add":
        h = h + c * vector
    elif intervention.operation == "add_norm_preserving":
        moved = h + c * vector
        h = moved / moved.norm(dim=-1, keepdim=True) * h.norm(dim=-1, keepdim=True)
    elif intervention.operation == "ablate":
        h = h - projection
    else:
        h = h - projection + c * vector
    return h.to(state.dtype)


def steered_logits(
    model: Any, row: GenerationRow, new_tokens: int, *, steer_from: str = "response"
) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy continuation of a row and the logits of each step, recomputing the whole text at every step."""
    start = len(row.prompt_ids) - 1 if steer_from == "response" else 0
    ids = list(row.prompt_ids)
    logits: list[torch.Tensor] = []
    for _ in range(new_tokens):
        handles = []
        for intervention in row.interventions:
            module = model.anatomy.site(intervention.component, intervention.layer).module

            def hook(
                module: Any, args: Any, output: Any, intervention: Intervention = intervention
            ) -> torch.Tensor | tuple[Any, ...]:
                tensor = output if isinstance(output, torch.Tensor) else output[0]
                changed = tensor.clone()
                changed[0, start:] = apply(tensor[0, start:], intervention)
                return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

            handles.append(module.register_forward_hook(hook))
        try:
            last = forward(model, ids)[-1]
        finally:
            for handle in handles:
                handle.remove()
        logits.append(last)
        ids.append(int(last.argmax()))
    return ids[len(row.prompt_ids) :], logits


def unit(seed: int, width: int) -> np.ndarray:
    vector = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return vector / np.linalg.norm(vector)


class Logits:
    """Collects each step's logits of each row from `generate(…, observe=…)`."""

    def __init__(self) -> None:
        self.by_key: dict[str, dict[int, torch.Tensor]] = {}

    def __call__(self, keys: list[str], counts: list[int], logits: torch.Tensor) -> None:
        for key, count, row in zip(keys, counts, logits, strict=True):
            # finished rows are carried along for a while; what they say then is not theirs
            self.by_key.setdefault(key, {}).setdefault(count, row.clone())

    def of(self, key: str, steps: int) -> torch.Tensor:
        return torch.stack([self.by_key[key][step] for step in range(steps)])
