"""One loaded language model: encode, generate, capture, score. The face of this package.

Checks what it is asked before anything runs, and leaves the work to `prompts`, `generation`, `capture` and
`steering`. How a model gets here is `loading`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from resources.models.anatomy import Anatomy, bare_model, dissect, text_config
from resources.models.batching import Batcher, Shape
from resources.models.capture import Capturer
from resources.models.generation import DecodeLoop, Observer
from resources.models.positions import parse_position, preview
from resources.models.prompts import PromptEncoder
from resources.models.rows import (
    CapturedRow,
    CaptureRow,
    EncodedPrompt,
    GeneratedRow,
    GenerationOptions,
    GenerationRow,
    ModelIdentity,
    SteerFrom,
)
from resources.models.steering import check
from storage.errors import UserError

Progress = Callable[[int, int], None]


class LanguageModel:
    """A causal language model with its tokenizer.

    `identity.dtype` is the dtype it was asked for; `dtype` and `devices` say what it runs in. `model` is what
    transformers or PEFT loaded, `causal` the transformers model inside; nothing here changes its weights.
    """

    def __init__(
        self, model: Any, tokenizer: Any, identity: ModelIdentity, *, max_batch_rows: int | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.identity = identity
        self.model.eval()
        bare = bare_model(model)
        self.causal = bare
        config = text_config(bare)
        self.prompts = PromptEncoder(tokenizer)
        self.anatomy: Anatomy = dissect(model)
        self.n_layers = len(self.anatomy.layers)
        self.hidden_size = self.anatomy.hidden_size
        self.context_length = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
        self.dtype: torch.dtype = bare.dtype
        self.devices = _devices(bare)
        self.batcher = Batcher(Shape.of(config, self.dtype), self.devices, max_rows=max_batch_rows)
        self._decoding = DecodeLoop(
            bare,
            self.anatomy,
            self.batcher,
            stops=self.prompts.end_of_turn(_configured_stops(bare, config)),
            context_length=self.context_length,
        )
        self._capturing = Capturer(bare, self.anatomy, self.batcher)

    @property
    def has_chat_template(self) -> bool:
        return self.prompts.has_chat_template

    @property
    def stops(self) -> frozenset[int]:
        """Token ids that end a response."""
        return self._decoding.stops

    def set_stops(self, stops: frozenset[int]) -> None:
        """Exchange the token ids that end a response (none: every response runs to its limit)."""
        self._decoding.stops = stops

    @property
    def components(self) -> tuple[str, ...]:
        """The components that this architecture has, in the order of `anatomy.COMPONENTS`."""
        return self.anatomy.components

    def encode(self, prompt: str, system: str | None = None, *, chat: bool) -> EncodedPrompt:
        """A prompt as token ids; see `PromptEncoder.encode`."""
        return self.prompts.encode(prompt, system, chat=chat)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens skipped, otherwise untouched."""
        return self.prompts.decode(ids)

    def preview(self, row: CaptureRow, position: str) -> list[str]:
        """The strings of the tokens that a position selects of this row."""
        ids = preview(parse_position(position), row.prompt_ids, row.response_ids)
        return self.prompts.token_strings(ids)

    def generate(
        self,
        rows: Sequence[GenerationRow],
        options: GenerationOptions,
        *,
        steer_from: SteerFrom = "response",
        on_progress: Progress | None = None,
        observe: Observer | None = None,
    ) -> Iterator[GeneratedRow]:
        """Continue every row; results come in the order in which rows finish.

        Rows are steered each by its own interventions from the last prompt token on (`response`) or at every
        prompt token too (`all`). `on_progress(rows_done, tokens)` is called after every step; `observe` sees
        each step's logits. Bad rows or options are a UserError before the first forward pass.
        """
        _check_options(options)
        _check_keys([row.key for row in rows])
        if steer_from not in ("response", "all"):
            raise UserError(
                f"unknown value {steer_from!r}", where="steer_from", remedy="Use response or all."
            )
        for row in rows:
            self._check_length(row.key, len(row.prompt_ids), room=1)
            check(row.interventions, self.anatomy, row=row.key)
        return self._generate(rows, options, steer_from, on_progress, observe)

    def _generate(
        self,
        rows: Sequence[GenerationRow],
        options: GenerationOptions,
        steer_from: SteerFrom,
        on_progress: Progress | None,
        observe: Observer | None,
    ) -> Iterator[GeneratedRow]:
        done = tokens = 0

        def on_step(given: int) -> None:
            nonlocal tokens
            tokens += given
            if on_progress is not None:
                on_progress(done, tokens)

        for entry in self._decoding.run(
            rows, options, steer_from=steer_from, observe=observe, on_step=on_step
        ):
            done += 1
            if on_progress is not None:
                on_progress(done, tokens)
            assert entry.finish is not None
            yield GeneratedRow(
                key=entry.row.key,
                prompt_ids=entry.row.prompt_ids,
                ids=tuple(entry.ids),
                text=self.decode(entry.ids),
                finish_reason=entry.finish,
            )

    def capture(
        self,
        rows: Sequence[CaptureRow],
        positions: Sequence[str],
        components: Sequence[str] = ("residual",),
        layers: Sequence[int] | None = None,
        *,
        on_progress: Progress | None = None,
    ) -> Iterator[CapturedRow]:
        """Pooled hidden states of every row, batch by batch.

        Arrays have one line per layer of `layers` (default: all), in that order; `pooled` has the positions
        as they were written here. Positions, components and layers are
        checked before the first forward pass; a non-finite hidden state is a UserError naming its layer.
        """
        _check_keys([row.key for row in rows])
        if not positions:
            raise UserError(
                "no position was given", where="position", remedy="Give one, such as response[:]."
            )
        parsed = {position: parse_position(position) for position in positions}
        for component in components:
            self.anatomy.require(component)
        wanted = list(range(self.n_layers)) if layers is None else list(layers)
        if not wanted or not components:
            raise UserError("no layer or no component was given", where="capture")
        for layer in wanted:
            self.anatomy.site("residual", layer)
        for row in rows:
            self._check_length(row.key, len(row.prompt_ids), room=len(row.response_ids))
        return self._capturing.capture(rows, parsed, components, wanted, on_rows=_adding(on_progress))

    def logprobs(
        self, rows: Sequence[CaptureRow], *, on_progress: Progress | None = None
    ) -> Iterator[tuple[str, float]]:
        """(key, mean log-probability in nats of the row's response tokens given its prompt), unsteered."""
        _check_keys([row.key for row in rows])
        for row in rows:
            self._check_length(row.key, len(row.prompt_ids), room=len(row.response_ids))
            if not row.response_ids:
                raise UserError("there is no response to score", where=f"row {row.key!r}")
        return self._capturing.logprobs(rows, on_rows=_adding(on_progress))

    def _check_length(self, key: str, prompt: int, *, room: int) -> None:
        if prompt == 0:
            raise UserError("the prompt has no tokens", where=f"row {key!r}")
        if prompt + room > self.context_length:
            raise UserError(
                f"{prompt} prompt tokens and {room} more do not fit the context of {self.context_length}",
                where=f"row {key!r}",
                remedy="Shorten the prompt.",
            )


def _adding(on_progress: Progress | None) -> Progress | None:
    if on_progress is None:
        return None
    total = [0, 0]

    def add(rows: int, tokens: int) -> None:
        total[0] += rows
        total[1] += tokens
        on_progress(total[0], total[1])

    return add


def _devices(model: Any) -> list[torch.device]:
    """The devices that compute, in a stable order; what accelerate keeps on meta lives elsewhere."""
    found = {parameter.device for parameter in model.parameters() if parameter.device.type != "meta"}
    return sorted(found, key=str) or [torch.device("cpu")]


def _configured_stops(model: Any, config: Any) -> Iterable[int]:
    sources = [getattr(model, "generation_config", None), getattr(model, "config", None), config]
    for source in sources:
        named = getattr(source, "eos_token_id", None)
        if named is not None:
            yield from (named if isinstance(named, list | tuple) else [named])


def _check_options(options: GenerationOptions) -> None:
    problems = {
        "max_new_tokens": options.max_new_tokens >= 1,
        "temperature": options.temperature >= 0,
        "top_p": 0 < options.top_p <= 1,
        "top_k": options.top_k >= 0,
        "repetition_penalty": options.repetition_penalty > 0,
    }
    for name, fine in problems.items():
        if not fine:
            raise UserError(
                f"{getattr(options, name)} is out of range",
                where=name,
                remedy="Allowed: max_new_tokens ≥ 1, temperature ≥ 0, 0 < top_p ≤ 1, top_k ≥ 0, penalty > 0.",
            )


def _check_keys(keys: Sequence[str]) -> None:
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"the key {twice!r} occurs twice", where="rows", remedy="Give every row its own key.")
