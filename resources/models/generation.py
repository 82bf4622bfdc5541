"""The decode loop: many rows at once, each with its own steering, seed and end.

Rows wait in a queue sorted by length. A prompt, all but its last token, is computed once per distinct prompt
and shared by its rows; from the last prompt token on every forward pass is one token wide. Rows that finish
leave the batch and waiting ones take their places. A model's own generation_config plays no part. What a
prompt is belongs to `prompts`, what steering does to `steering`, how many rows fit to `batching`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from resources.models import kv_cache
from resources.models.anatomy import Anatomy, cache_argument, input_device
from resources.models.batching import Batcher, free_bytes, is_out_of_memory
from resources.models.rows import FinishReason, GenerationOptions, GenerationRow, SteerFrom
from resources.models.steering import SteeringPlan

# finished rows are carried along until they are this share of the batch: leaving costs a copy of the cache
_LEAVE = 8
# waiting rows join when at least this share of the batch is free: joining costs a copy of the cache too
_JOIN = 4
# leading columns that are padding in every row are dropped from this many on
_TRIM = 16

# (keys of the rows in the batch, how many tokens each has already, logits of the next one [rows, vocabulary])
Observer = Callable[[list[str], list[int], torch.Tensor], None]


@dataclass(eq=False)
class Running:
    """One row on its way. `limit`: the most tokens it may get; `uniform`: its own stream of random
    numbers.
    """

    row: GenerationRow
    limit: int
    ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    uniform: np.random.Generator | None = None

    @property
    def total(self) -> int:
        """Tokens of prompt and longest possible response."""
        return len(self.row.prompt_ids) + self.limit

    def restart(self, options: GenerationOptions) -> None:
        self.ids = []
        self.uniform = row_noise(self.row, options) if options.temperature > 0 else None


@dataclass
class _Batch:
    """Rows that are decoded together, in batch order.

    `mask`: [rows, columns] bool, False where the cache holds padding; `tokens`: [rows, 1] what goes in next,
    at `positions` [rows, 1]; `seen`: [rows, vocabulary] bool, only with a repetition penalty.
    """

    running: list[Running]
    cache: Any
    mask: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    seen: torch.Tensor | None
    plan: SteeringPlan
    padded: bool

    @property
    def active(self) -> int:
        return sum(entry.finish is None for entry in self.running)


def row_noise(row: GenerationRow, options: GenerationOptions) -> np.random.Generator:
    """A row's random numbers, from the seed and its key alone: neighbours and order have no part in them."""
    name = f"{options.seed}\0{row.key if row.seed_key is None else row.seed_key}"
    words = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words))


class DecodeLoop:
    """Generation on one model.

    `forward` is the causal language model (with its head), `anatomy.decoder` the stack below it; `stops`: ids
    that end a response.
    """

    def __init__(
        self, forward: Any, anatomy: Anatomy, batcher: Batcher, *, stops: frozenset[int], context_length: int
    ) -> None:
        self.forward = forward
        self.anatomy = anatomy
        self.batcher = batcher
        self.stops = stops
        self.context_length = context_length
        self.device = input_device(anatomy.decoder)
        self._cache_argument = cache_argument(forward)
        self._decoder_cache_argument = cache_argument(anatomy.decoder)

    def run(
        self,
        rows: Sequence[GenerationRow],
        options: GenerationOptions,
        *,
        steer_from: SteerFrom,
        observe: Observer | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[Running]:
        """Rows as they finish. `on_step` is called after each forward pass with the number of tokens it
        gave.
        """
        queue = [self._start(row, options) for row in rows]
        # ascending, so that those who join later are about as long as the batch has become; equal prompts
        # together
        queue.sort(key=lambda entry: (len(entry.row.prompt_ids), entry.row.prompt_ids))
        if queue:
            self.batcher.announce("generation", max(entry.total for entry in queue))
        batch: _Batch | None = None
        free = 0
        while queue or batch is not None:
            if batch is None:
                free = free_bytes(self.batcher.devices)
            joining = self._joining(batch, queue, free)
            in_flight = [*(batch.running if batch else []), *joining]
            failure: Exception | None = None
            finished: list[Running] = []
            given = 0
            try:
                with torch.inference_mode():
                    if joining:
                        batch = self._join(batch, joining, options, steer_from)
                    assert batch is not None
                    given = batch.active
                    finished = self._step(batch, options, observe)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = error
            if failure is not None:
                # the failed pass may have grown some layers of the cache and not others: these rows start
                # again
                batch = None
                again = [entry for entry in in_flight if entry.finish is None]
                longest = max(again, key=lambda entry: entry.total)
                self.batcher.shrink("generation", len(again), longest.total, failure, row=longest.row.key)
                for entry in again:
                    entry.restart(options)
                waiting = [entry for entry in queue if entry not in joining]
                queue = sorted([*again, *waiting], key=lambda entry: (entry.total, entry.row.prompt_ids))
                continue
            del queue[: len(joining)]
            if on_step is not None:
                on_step(given)
            yield from finished
            if finished:
                with torch.inference_mode():
                    batch = self._leave(batch, at_least=_LEAVE)

    def _start(self, row: GenerationRow, options: GenerationOptions) -> Running:
        limit = min(options.max_new_tokens, self.context_length - len(row.prompt_ids))
        entry = Running(row, limit)
        entry.restart(options)
        return entry

    def _joining(self, batch: _Batch | None, queue: Sequence[Running], free: int) -> list[Running]:
        """The rows that enter before the next step: as many from the head of the queue as there is room
        for.
        """
        if not queue or (batch is not None and not kv_cache.joinable(batch.cache)):
            return []
        active = 0 if batch is None else batch.active
        longest = max((entry.total for entry in batch.running), default=0) if batch else 0
        room = self.batcher.rows("generation", max(longest, queue[0].total), free=free)
        if batch is not None and (room - active) * _JOIN < min(room, len(queue) * _JOIN):
            return []
        count = 0
        while count < len(queue):
            longest = max(longest, queue[count].total)
            if active + count + 1 > self.batcher.rows("generation", longest, free=free):
                break
            count += 1
        return list(queue[: max(count, 0 if batch else 1)])

    def _join(
        self,
        batch: _Batch | None,
        joining: Sequence[Running],
        options: GenerationOptions,
        steer_from: SteerFrom,
    ) -> _Batch | None:
        fresh = self._prefill(joining, options, steer_from)
        if batch is not None:
            batch = self._leave(batch, at_least=0)
        if batch is None:
            return fresh
        kv_cache.join(batch.cache, fresh.cache)
        columns = max(batch.mask.shape[1], fresh.mask.shape[1])
        mask = torch.cat([_pad_columns(batch.mask, columns), _pad_columns(fresh.mask, columns)])
        seen = None
        if batch.seen is not None and fresh.seen is not None:
            seen = torch.cat([batch.seen, fresh.seen])
        running = [*batch.running, *fresh.running]
        return _Batch(
            running=running,
            cache=batch.cache,
            mask=mask,
            tokens=torch.cat([batch.tokens, fresh.tokens]),
            positions=torch.cat([batch.positions, fresh.positions]),
            seen=seen,
            plan=self._plan(running),
            padded=not bool(mask.all()),
        )

    def _plan(self, running: Sequence[Running]) -> SteeringPlan:
        return SteeringPlan(self.anatomy, [entry.row.interventions for entry in running])

    def _prefill(
        self, joining: Sequence[Running], options: GenerationOptions, steer_from: SteerFrom
    ) -> _Batch:
        """Compute each distinct prompt but for its last token, then give every row its copy."""
        index: dict[Hashable, int] = {}
        distinct: list[GenerationRow] = []
        for entry in joining:
            key = _prefix_key(entry.row, steer_from)
            if key not in index:
                index[key] = len(distinct)
                distinct.append(entry.row)
        cache: Any = None
        mask: torch.Tensor | None = None
        at = 0
        while at < len(distinct):
            part = kv_cache.new_cache(self.anatomy.decoder.config)
            longest = max(len(row.prompt_ids) for row in distinct)
            size = self.batcher.rows("extraction", longest) if kv_cache.joinable(part) else len(distinct)
            part_mask = self._prefix_pass(distinct[at : at + size], part, steer_from)
            at += size
            if mask is None:
                cache, mask = part, part_mask
                continue
            kv_cache.join(cache, part)
            columns = max(mask.shape[1], part_mask.shape[1])
            mask = torch.cat([_pad_columns(mask, columns), _pad_columns(part_mask, columns)])
        assert mask is not None
        order = [index[_prefix_key(entry.row, steer_from)] for entry in joining]
        if order != list(range(len(distinct))):
            rows = torch.tensor(order, device=self.device)
            kv_cache.select(cache, rows)
            mask = mask[rows]
        running = list(joining)
        prompts = [entry.row.prompt_ids for entry in running]
        seen = None
        if options.repetition_penalty != 1.0:
            seen = torch.zeros((len(running), self._vocabulary()), dtype=torch.bool, device=self.device)
            for position, prompt in enumerate(prompts):
                seen[position, torch.tensor(prompt, device=self.device)] = True
        return _Batch(
            running=running,
            cache=cache,
            mask=mask,
            tokens=torch.tensor([[prompt[-1]] for prompt in prompts], device=self.device),
            positions=torch.tensor([[len(prompt) - 1] for prompt in prompts], device=self.device),
            seen=seen,
            plan=self._plan(running),
            padded=not bool(mask.all()),
        )

    def _prefix_pass(self, rows: Sequence[GenerationRow], cache: Any, steer_from: SteerFrom) -> torch.Tensor:
        """Fill `cache` with the prompts but for their last tokens, padded on the left; gives the [rows,
        columns] mask.

        A prompt of one token has nothing to compute: it gets a column of padding, so that all rows have a
        cache.
        """
        columns = max(1, *(len(row.prompt_ids) - 1 for row in rows))
        ids = torch.zeros((len(rows), columns), dtype=torch.long)
        mask = torch.zeros((len(rows), columns), dtype=torch.bool)
        for position, row in enumerate(rows):
            length = len(row.prompt_ids) - 1
            if length:
                ids[position, columns - length :] = torch.tensor(row.prompt_ids[:-1])
                mask[position, columns - length :] = True
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        ids, mask, positions = ids.to(self.device), mask.to(self.device), positions.to(self.device)
        steering: Any = nullcontext()
        if steer_from == "all":
            plan = SteeringPlan(self.anatomy, [row.interventions for row in rows], token_mask=mask)
            steering = plan.active()
        with steering:
            self.anatomy.decoder(
                input_ids=ids,
                attention_mask=None if bool(mask.all()) else mask.long(),
                position_ids=positions,
                use_cache=True,
                **{self._decoder_cache_argument: cache},
            )
        return mask

    def _step(self, batch: _Batch, options: GenerationOptions, observe: Observer | None) -> list[Running]:
        """One token for every row; gives the rows that it finished."""
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones((len(batch.running), 1))], dim=1)
        with batch.plan.active():
            output = self.forward(
                input_ids=batch.tokens,
                attention_mask=batch.mask.long() if batch.padded else None,
                position_ids=batch.positions,
                use_cache=True,
                **{self._cache_argument: batch.cache},
            )
        logits = output.logits[:, -1].float()
        if observe is not None:
            observe(
                [entry.row.key for entry in batch.running],
                [len(entry.ids) for entry in batch.running],
                logits,
            )
        chosen = self._choose(logits, batch, options).to(self.device)
        if batch.seen is not None:
            batch.seen.scatter_(1, chosen[:, None], True)
        batch.tokens = chosen[:, None]
        batch.positions = batch.positions + 1
        finished: list[Running] = []
        for entry, token in zip(batch.running, chosen.tolist(), strict=True):
            if entry.finish is not None:
                continue
            if token in self.stops:
                entry.finish = "stop"
            else:
                entry.ids.append(token)
                if len(entry.ids) >= entry.limit:
                    entry.finish = "length"
            if entry.finish is not None:
                finished.append(entry)
        return finished

    def _choose(self, logits: torch.Tensor, batch: _Batch, options: GenerationOptions) -> torch.Tensor:
        """Next token of each row: [rows]."""
        if batch.seen is not None:
            seen = batch.seen.to(logits.device)
            penalised = torch.where(
                logits < 0, logits * options.repetition_penalty, logits / options.repetition_penalty
            )
            logits = torch.where(seen, penalised, logits)
        if options.temperature <= 0:
            return logits.argmax(dim=-1)
        uniform = [0.0 if entry.uniform is None else entry.uniform.random() for entry in batch.running]
        return sample(logits, uniform, options)

    def _leave(self, batch: _Batch | None, *, at_least: int) -> _Batch | None:
        """The batch without its finished rows, once they are 1/`at_least` of it (0: any); None where none is
        left.
        """
        if batch is None:
            return None
        kept = [position for position, entry in enumerate(batch.running) if entry.finish is None]
        if not kept:
            return None
        gone = len(batch.running) - len(kept)
        if gone == 0 or (at_least and gone * at_least < len(batch.running)):
            return batch
        rows = torch.tensor(kept, device=self.device)
        kv_cache.select(batch.cache, rows)
        running = [batch.running[position] for position in kept]
        mask = batch.mask[rows]
        if kv_cache.joinable(batch.cache):
            empty = int((mask.any(dim=0)).long().argmax())
            if empty >= _TRIM:
                kv_cache.trim(batch.cache, empty)
                mask = mask[:, empty:]
        return _Batch(
            running=running,
            cache=batch.cache,
            mask=mask,
            tokens=batch.tokens[rows],
            positions=batch.positions[rows],
            seen=None if batch.seen is None else batch.seen[rows],
            plan=self._plan(running),
            padded=not bool(mask.all()),
        )

    def _vocabulary(self) -> int:
        embedding: Any = self.forward.get_output_embeddings()
        if embedding is not None and hasattr(embedding, "weight"):
            return int(embedding.weight.shape[0])
        return self.batcher.shape.vocabulary


def sample(logits: torch.Tensor, uniform: Sequence[float], options: GenerationOptions) -> torch.Tensor:
    """Tokens by inverting the cumulative distribution at each row's own uniform number: [rows].

    Temperature, then the `top_k` likeliest (0: all), then the smallest set of likeliest tokens whose
    probability reaches `top_p`.
    """
    scores = logits.float() / options.temperature
    if 0 < options.top_k < scores.shape[-1]:
        threshold = scores.topk(options.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    if options.top_p < 1.0:
        ordered, index = scores.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability
        beyond = (before >= options.top_p).scatter(1, index, before >= options.top_p)
        scores = scores.masked_fill(beyond, -torch.inf)
    precision = torch.float32 if scores.device.type == "mps" else torch.float64
    cumulative = scores.softmax(dim=-1).to(precision).cumsum(dim=-1)
    # 24 bits: strictly below one in either precision, so the last token with weight is the last that can be
    # drawn
    cut = torch.tensor(
        [int(value * 2**24) / 2**24 for value in uniform], dtype=precision, device=scores.device
    )
    return torch.searchsorted(cumulative, cut[:, None] * cumulative[:, -1:], right=True)[:, 0]


def _prefix_key(row: GenerationRow, steer_from: SteerFrom) -> Hashable:
    """Rows with the same key have the same cache before their last prompt token."""
    if steer_from == "response" or not row.interventions:
        return row.prompt_ids
    return row.prompt_ids, tuple(
        (item.layer, item.component, item.operation, item.coefficient, np.asarray(item.vector).tobytes())
        for item in row.interventions
    )


def _pad_columns(mask: torch.Tensor, columns: int) -> torch.Tensor:
    missing = columns - mask.shape[1]
    return mask if missing == 0 else torch.cat([mask.new_zeros((mask.shape[0], missing)), mask], dim=1)
