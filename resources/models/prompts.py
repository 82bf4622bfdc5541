"""Prompts to token ids: chat templates, system prompts, BOS, think blocks, end-of-turn tokens.

Works on a transformers tokenizer and on strings; knows no model. What a response's tokens are is never
decided here: they are what the model generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from resources.models.rows import EncodedPrompt
from storage.errors import UserError
from storage.text import well_formed

# a string that no template contains, to see where a message ends up
_SENTINEL = "XqZv7sentinel7vZqX"
_OPEN_THINK = "<think>"
_CLOSE_THINK = "</think>"


class PromptEncoder:
    """Encodes prompts for one tokenizer, and finds out once how its chat template behaves.

    - one BOS wherever plain encoding adds one, also when the template writes it or leaves it out;
    - a system prompt that the template refuses or drops goes to the head of the user turn (`system_folded`);
    - thinking is switched off where the template knows the switch; a think block that the generation prompt
      leaves open is closed, so that what is generated is the answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        plain = list(tokenizer("a", add_special_tokens=True)["input_ids"])
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self.adds_bos = self.bos is not None and plain[:1] == [self.bos] and bare[:1] != [self.bos]
        self._takes_system: bool | None = None
        self._strings: dict[int, str] = {}
        self._anchor = [int(token) for token in bare]
        self._anchor_text = self._decode(self._anchor)

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, prompt: str, system: str | None = None, *, chat: bool) -> EncodedPrompt:
        """Token ids of one prompt. With `chat` through the template, otherwise as text to complete, in which
        case a system prompt precedes it after an empty line."""
        if not chat:
            text = f"{system}\n\n{prompt}" if system else prompt
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            ids = self._one_bos(ids)
            if not ids:
                raise UserError("the prompt is empty", where="prompt", remedy="Give at least one character.")
            return EncodedPrompt(ids=tuple(ids), chat=False)
        if not self.has_chat_template:
            raise UserError(
                "the tokenizer has no chat template",
                where=f"model {getattr(self.tokenizer, 'name_or_path', '')!r}",
                remedy="Use it as a base model (--base-model), or name an instruction-tuned model.",
            )
        folded = False
        messages: list[dict[str, str]] = []
        if system:
            if self.takes_system():
                messages.append({"role": "system", "content": system})
            else:
                prompt, folded = f"{system}\n\n{prompt}", True
        messages.append({"role": "user", "content": prompt})
        rendered = self._render(messages)
        ids = self._one_bos(list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"]))
        return EncodedPrompt(ids=tuple(ids), chat=True, system_folded=folded)

    def takes_system(self) -> bool:
        """Whether a system message reaches the rendered prompt; a template that drops it counts as refusing
        it.
        """
        if self._takes_system is None:
            messages = [{"role": "system", "content": _SENTINEL}, {"role": "user", "content": "a"}]
            try:
                self._takes_system = _SENTINEL in self._render(messages)
            except Exception as error:
                # templates refuse with jinja2's TemplateError; a template that cannot even render a lone user
                # message is broken and must be reported as such
                self._takes_system = False
                self._check_renders(error)
        return self._takes_system

    def end_of_turn(self, configured: Iterable[int]) -> frozenset[int]:
        """Ids that end a response: those the model's configuration names, the tokenizer's EOS, and the
        special token that the chat template puts after an assistant's text."""
        stops = {int(token) for token in configured}
        if self.tokenizer.eos_token_id is not None:
            stops.add(int(self.tokenizer.eos_token_id))
        if self.has_chat_template:
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SENTINEL}]
            try:
                rendered = self._render(messages, generate=False)
            except Exception as error:
                self._check_renders(error)
                rendered = ""
            tail = rendered.rpartition(_SENTINEL)[2]
            special = set(self.tokenizer.all_special_ids)
            for token in self.tokenizer(tail, add_special_tokens=False)["input_ids"][:2]:
                if int(token) in special and int(token) != self.bos:
                    stops.add(int(token))
                    break
        return frozenset(stops)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids: special tokens skipped, half surrogate pairs mended, nothing else touched.

        They are decoded behind an ordinary token, because sentencepiece decoders drop the space of a first
        token.
        """
        text = self._decode([*self._anchor, *ids])
        return (
            text[len(self._anchor_text) :] if text.startswith(self._anchor_text) else self._decode(list(ids))
        )

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return well_formed(str(text))

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        for token in ids:
            if token not in self._strings:
                text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
                self._strings[token] = well_formed(str(text))
        return [self._strings[token] for token in ids]

    def _render(self, messages: list[dict[str, str]], *, generate: bool = True) -> str:
        rendered = str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate, enable_thinking=False
            )
        )
        if generate and rendered.rstrip().endswith(_OPEN_THINK):
            rendered = f"{rendered.rstrip()}\n\n{_CLOSE_THINK}\n\n"
        return rendered

    def _check_renders(self, error: Exception) -> None:
        try:
            self._render([{"role": "user", "content": "a"}])
        except Exception:
            raise UserError(
                f"the chat template fails on a plain user message: {error}", where="chat template"
            ) from error

    def _one_bos(self, ids: list[int]) -> list[int]:
        if self.bos is None:
            return ids
        start = 0
        while start < len(ids) and ids[start] == self.bos:
            start += 1
        if self.adds_bos:
            return [self.bos, *ids[start:]]
        # a tokenizer that adds none keeps the one that a template or a text wrote itself
        return ids[start - 1 :] if start > 1 else ids
