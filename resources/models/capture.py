"""Capture: hidden states pooled on the fly, and log-probabilities of given responses.

One forward pass without the language-model head serves any number of positions and components; what is held
is one row per position, component and layer, never a hidden state of all tokens of all layers. Positions are
parsed in `positions`; where a component lives is `anatomy`'s knowledge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from resources.models.anatomy import Anatomy, first_tensor, hooks, input_device
from resources.models.batching import Batcher, is_out_of_memory
from resources.models.positions import Position
from resources.models.rows import CapturedRow, CaptureRow
from storage.errors import UserError


class NonFinite(UserError):
    """A hidden state overflowed; names the layer."""


class _Enough(Exception):
    """Raised by the last wanted layer's hook: the layers above it need not run."""


class Capturer:
    """Capture on one model. `forward`: the causal language model, used for log-probabilities alone."""

    def __init__(self, forward: Any, anatomy: Anatomy, batcher: Batcher) -> None:
        self.forward = forward
        self.anatomy = anatomy
        self.batcher = batcher
        self.device = input_device(anatomy.decoder)

    def capture(
        self,
        rows: Sequence[CaptureRow],
        positions: Mapping[str, Position],
        components: Sequence[str],
        layers: Sequence[int],
        *,
        on_rows: Callable[[int, int], None] | None = None,
    ) -> Iterator[CapturedRow]:
        """Rows batch by batch, longest first; `positions` by the name under which they are given back.
        `on_rows(rows, tokens)` is called after each batch.
        """
        for batch, result in self._in_batches(
            "extraction", rows, lambda part: self._capture_batch(part, positions, components, layers)
        ):
            if on_rows is not None:
                on_rows(len(batch), sum(_length(row) for row in batch))
            yield from result

    def logprobs(
        self, rows: Sequence[CaptureRow], *, on_rows: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[str, float]]:
        """(key, mean log-probability in nats per token of the response given the prompt), longest first."""
        for batch, result in self._in_batches("inference", rows, self._logprob_batch):
            if on_rows is not None:
                on_rows(len(batch), sum(_length(row) for row in batch))
            yield from result

    def _in_batches(
        self, mode: Any, rows: Sequence[CaptureRow], work: Callable[[Sequence[CaptureRow]], list[Any]]
    ) -> Iterator[tuple[Sequence[CaptureRow], list[Any]]]:
        # the longest go first: if they fit, all do
        result: list[Any]
        waiting = sorted(rows, key=_length, reverse=True)
        if waiting and self.batcher.uncalibrated(mode):
            first = waiting[:1]
            with self.batcher.calibration(mode, _length(first[0])), torch.inference_mode():
                result = work(first)
            del waiting[:1]
            yield first, result
        if waiting:
            self.batcher.announce(mode, _length(waiting[0]))
        while waiting:
            tokens = _length(waiting[0])
            batch = waiting[: self.batcher.rows(mode, tokens)]
            failure: Exception | None = None
            result = []
            try:
                with torch.inference_mode():
                    result = work(batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = error
            if failure is not None:
                self.batcher.shrink(mode, len(batch), tokens, failure, row=batch[0].key)
                continue
            del waiting[: len(batch)]
            yield batch, result

    def _capture_batch(
        self,
        rows: Sequence[CaptureRow],
        positions: Mapping[str, Position],
        components: Sequence[str],
        layers: Sequence[int],
    ) -> list[CapturedRow]:
        # Padding stands on the right: under a causal mask no real token ever sees it, so no mask is needed,
        # rows are exactly what they are alone, and attention takes its fastest path.
        lengths = [_length(row) for row in rows]
        ids = torch.empty((len(rows), max(lengths)), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index] = row.prompt_ids[-1]
            ids[index, : lengths[index]] = torch.tensor([*row.prompt_ids, *row.response_ids])
        spans = [
            [position.select(len(row.prompt_ids), len(row.response_ids)) for position in positions.values()]
            for row in rows
        ]
        pool = _Pool(spans, ids.shape[1])
        taken: dict[tuple[str, int], torch.Tensor] = {}
        norms: dict[int, torch.Tensor] = {}
        last = max(layers)

        def reader(component: str, layer: int) -> Callable[..., None]:
            site = self.anatomy.site(component, layer)

            def read(module: Any, args: Any, output: Any) -> None:
                taken[component, layer] = pool.mean(site.read(output))

            return read

        def norm_reader(layer: int) -> Callable[..., None]:
            def read(module: Any, args: Any, output: Any) -> None:
                norms[layer] = torch.linalg.vector_norm(first_tensor(output), dim=-1, dtype=torch.float32)

            return read

        def stop(module: Any, args: Any, output: Any) -> None:
            raise _Enough

        pairs = [
            (self.anatomy.site(component, layer).module, reader(component, layer))
            for component in components
            for layer in layers
        ]
        pairs += [(self.anatomy.layers[layer], norm_reader(layer)) for layer in layers]
        if last < len(self.anatomy.layers) - 1:
            pairs.append((self.anatomy.layers[last], stop))
        steps = torch.arange(ids.shape[1], device=self.device).expand(len(rows), -1)
        with hooks(pairs), suppress(_Enough):
            self.anatomy.decoder(input_ids=ids.to(self.device), position_ids=steps, use_cache=False)
        try:
            return self._collect(rows, positions, components, layers, spans, lengths, taken, norms)
        except NonFinite:
            if len(rows) == 1:
                raise
            # weight 0 times an infinite padding token is not a number either: decide on rows without padding
            return [
                captured
                for row in rows
                for captured in self._capture_batch([row], positions, components, layers)
            ]

    def _collect(
        self,
        rows: Sequence[CaptureRow],
        positions: Mapping[str, Position],
        components: Sequence[str],
        layers: Sequence[int],
        spans: Sequence[Sequence[tuple[int, int] | None]],
        lengths: Sequence[int],
        taken: dict[tuple[str, int], torch.Tensor],
        norms: dict[int, torch.Tensor],
    ) -> list[CapturedRow]:
        missing = [f"{component} of layer {layer}" for component in components for layer in layers
                   if (component, layer) not in taken]  # fmt: skip
        if missing:
            raise UserError(
                f"the forward pass of {self.anatomy.architecture} gave no {missing[0]}", where="capture"
            )
        # [layers, rows, tokens]; [layers, rows, positions, width] per component
        all_norms = torch.stack([norms[layer].cpu() for layer in layers]).numpy()
        states = {
            component: torch.stack([taken[component, layer].cpu() for layer in layers]).numpy()
            for component in components
        }
        captured: list[CapturedRow] = []
        for index, row in enumerate(rows):
            real = all_norms[:, index, : lengths[index]]
            self._check_finite(real, "residual", layers, row)
            pooled: dict[tuple[str, str], np.ndarray] = {}
            for place, position in enumerate(positions):
                if spans[index][place] is None:
                    continue
                for component in components:
                    value = states[component][:, index, place]
                    self._check_finite(value, component, layers, row)
                    pooled[position, component] = np.ascontiguousarray(value)
            median = (
                np.median(real[:, 1:], axis=1).astype(np.float32)
                if real.shape[1] > 1
                else np.full(len(layers), np.nan, dtype=np.float32)
            )
            empty = tuple(position for place, position in enumerate(positions) if spans[index][place] is None)
            captured.append(CapturedRow(key=row.key, pooled=pooled, norms=median, empty=empty))
        return captured

    def _check_finite(
        self, values: np.ndarray, component: str, layers: Sequence[int], row: CaptureRow
    ) -> None:
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            layer = layers[int(np.argmin(finite))]
            raise NonFinite(
                f"{component} of layer {layer} is not finite for row {row.key!r}",
                where=self.anatomy.architecture,
                remedy="Load the model in bfloat16 or float32: this is how float16 overflows.",
            )

    def _logprob_batch(self, rows: Sequence[CaptureRow]) -> list[tuple[str, float]]:
        # Padding stands on the left here, so that every response ends in the last column and one number tells
        # the head which columns are wanted.
        lengths = [_length(row) for row in rows]
        columns = max(lengths)
        ids = torch.zeros((len(rows), columns), dtype=torch.long)
        mask = torch.zeros((len(rows), columns), dtype=torch.long)
        for index, row in enumerate(rows):
            start = columns - lengths[index]
            ids[index, start:] = torch.tensor([*row.prompt_ids, *row.response_ids])
            mask[index, start:] = 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        wanted = max(len(row.response_ids) for row in rows) + 1
        logits = self.forward(
            input_ids=ids.to(self.device),
            attention_mask=None if bool(mask.all()) else mask.to(self.device),
            position_ids=positions.to(self.device),
            use_cache=False,
            logits_to_keep=wanted,
        ).logits
        found: list[tuple[str, float]] = []
        for index, row in enumerate(rows):
            count = len(row.response_ids)
            given = torch.log_softmax(logits[index, -count - 1 : -1].float(), dim=-1)
            target = torch.tensor(row.response_ids, device=given.device)
            value = float(given.gather(1, target[:, None]).mean())
            if not np.isfinite(value):
                raise NonFinite(
                    f"the log-probability of row {row.key!r} is not finite",
                    where=self.anatomy.architecture,
                    remedy="Load the model in bfloat16 or float32: this is how float16 overflows.",
                )
            found.append((row.key, value))
        return found


def _length(row: CaptureRow) -> int:
    return len(row.prompt_ids) + len(row.response_ids)


class _Pool:
    """Means over token spans: [rows, tokens, width] → [rows, positions, width], accumulated in fp32."""

    def __init__(self, spans: Sequence[Sequence[tuple[int, int] | None]], tokens: int) -> None:
        weights = np.zeros((len(spans), len(spans[0]), tokens), dtype=np.float32)
        for row, row_spans in enumerate(spans):
            for place, span in enumerate(row_spans):
                if span is not None:
                    weights[row, place, span[0] : span[1]] = 1.0 / (span[1] - span[0])
        self._weights = {torch.device("cpu"): torch.from_numpy(weights)}

    def mean(self, states: torch.Tensor) -> torch.Tensor:
        weights = self._weights.get(states.device)
        if weights is None:
            weights = self._weights[torch.device("cpu")].to(states.device)
            self._weights[states.device] = weights
        return torch.bmm(weights, states.float())
