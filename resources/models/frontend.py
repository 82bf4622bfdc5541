"""What of a model needs no weights: its tokenizer, its chat template, which tokens end a response, how long a
context is.

For work that happens elsewhere: prompts that a server is sent as token ids. A loaded model has the same
things and weights beside them (`language_model`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from resources.models.identity import identify
from resources.models.prompts import PromptEncoder
from resources.models.rows import EncodedPrompt, ModelIdentity, ModelSpec
from storage.errors import UserError


class Frontend:
    """Encodes and decodes as `LanguageModel` does. `stops`: ids that end a response; `context_length` in
    tokens; `vocabulary`: ids lie below it."""

    def __init__(
        self,
        tokenizer: Any,
        identity: ModelIdentity,
        *,
        stops: Iterable[int],
        context_length: int,
        vocabulary: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.identity = identity
        self.prompts = PromptEncoder(tokenizer)
        self.stops = self.prompts.end_of_turn(stops)
        self.context_length = context_length
        # embedding tables are padded beyond the tokenizer's last id, tokenizers grow beyond the config's number
        self.vocabulary = max(vocabulary, len(tokenizer))

    @property
    def has_chat_template(self) -> bool:
        return self.prompts.has_chat_template

    def encode(self, prompt: str, system: str | None = None, *, chat: bool) -> EncodedPrompt:
        """A prompt as token ids; see `PromptEncoder.encode`."""
        return self.prompts.encode(prompt, system, chat=chat)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens skipped, otherwise untouched."""
        return self.prompts.decode(ids)


def load_frontend(spec: ModelSpec, identity: ModelIdentity | None = None) -> Frontend:
    """Tokenizer and configuration of a model, at the very revision its identity names. UserError where they
    cannot be read."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from resources.models.loading import model_source

    identity = identity or identify(spec)
    source, extra = model_source(spec, identity)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=spec.trust_remote_code, **extra)
        whole = AutoConfig.from_pretrained(source, trust_remote_code=spec.trust_remote_code, **extra)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(
            f"its tokenizer cannot be loaded: {str(error).strip().splitlines()[0]}",
            where=f"model {spec.model!r}",
            remedy="Check that it is a causal language model that this transformers version knows.",
        ) from error
    config = whole.get_text_config(decoder=True) if hasattr(whole, "get_text_config") else whole
    sources: list[Any] = [whole, config]
    with contextlib.suppress(OSError, TypeError):
        # a model without generation_config.json says everything in its config
        sources.append(GenerationConfig.from_pretrained(source, **extra))
    stops: list[int] = []
    for one in sources:
        named = getattr(one, "eos_token_id", None)
        if named is not None:
            stops += named if isinstance(named, list | tuple) else [named]
    context = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
    vocabulary = int(getattr(config, "vocab_size", None) or 0)
    return Frontend(tokenizer, identity, stops=stops, context_length=context, vocabulary=vocabulary)
