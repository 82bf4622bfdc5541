"""`traits preview`: what a model sees of a trait, which tokens a position selects, and how it goes on.

Belongs here: picking the rows and gathering the data. Does not: showing them (`commands.py`), tokenising or
generating (resources/models). Nothing is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resources.models.positions import Position
from resources.models.rows import CaptureRow, GeneratedRow, GenerationOptions, GenerationRow
from storage.errors import UserError
from trait_assets.scenarios.dataset import POLARITIES, Polarity, ScenarioSet

if TYPE_CHECKING:
    from resources.models.language_model import LanguageModel


@dataclass(frozen=True)
class PreviewRow:
    """One scenario as the model sees it.

    `tokens`: the strings of all tokens, prompt then response; the first `prompt_tokens` are the prompt's;
    `selected`: the half-open range of tokens that the position selects, None where it selects nothing;
    `completion`: the response's text.
    """

    polarity: Polarity
    line: int
    prompt: str
    system_prompt: str | None
    system_folded: bool
    tokens: tuple[str, ...]
    prompt_tokens: int
    selected: tuple[int, int] | None
    completion: str
    finish_reason: str | None


@dataclass(frozen=True)
class Preview:
    """`chat`: whether the chat template was applied; `notes`: what is worth a look in these rows."""

    trait: str
    model: str
    position: str
    chat: bool
    rows: tuple[PreviewRow, ...]
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)


def preview_trait(
    model: LanguageModel,
    scenarios: ScenarioSet,
    position: str = "response[:]",
    *,
    n: int = 3,
    chat: bool | None = None,
    max_new_tokens: int = 40,
    seed: int = 0,
) -> Preview:
    """`n` scenarios of each side (the same lines on both when paired), tokenised, continued greedily, and
    the tokens that `position` selects. `chat`: None asks the tokenizer; `max_new_tokens` 0 generates
    nothing. Bad positions and scenarios beyond the context are a `UserError` before the first forward pass.
    """
    if n < 1:
        raise UserError(f"-n {n} shows nothing", remedy="use 1 or more")
    where = Position.parse(position)
    use_chat = model.has_chat_template if chat is None else chat
    if use_chat and not model.has_chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            where=model.identity.model,
            remedy="preview it as a base model",
        )
    chosen = scenarios.subset(n, seed)
    picked = [(polarity, s) for polarity in POLARITIES for s in chosen.side(polarity)]
    encoded = [model.encode(s.prompt, s.system_prompt, chat=use_chat) for _, s in picked]
    generated: dict[str, GeneratedRow] = {}
    if max_new_tokens > 0:
        rows = [GenerationRow(str(i), e.ids) for i, e in enumerate(encoded)]
        options = GenerationOptions(max_new_tokens=max_new_tokens)
        generated = {row.key: row for row in model.generate(rows, options)}
    shown = []
    for i, ((polarity, s), e) in enumerate(zip(picked, encoded, strict=True)):
        answer = generated.get(str(i))
        response = answer.ids if answer is not None else ()
        strings = model.preview(CaptureRow(str(i), e.ids, response), "all[:]")
        shown.append(
            PreviewRow(
                polarity=polarity,
                line=s.line,
                prompt=s.prompt,
                system_prompt=s.system_prompt,
                system_folded=e.system_folded,
                tokens=tuple(strings),
                prompt_tokens=len(e.ids),
                selected=where.select(len(e.ids), len(response)),
                completion=answer.text if answer is not None else "",
                finish_reason=answer.finish_reason if answer is not None else None,
            )
        )
    return Preview(
        scenarios.trait,
        model.identity.model,
        str(where),
        use_chat,
        tuple(shown),
        tuple(_notes(shown, use_chat, position)),
    )


def _notes(rows: Sequence[PreviewRow], chat: bool, position: str) -> list[str]:
    notes = []
    empty = [row.line for row in rows if row.selected is None]
    if empty:
        notes.append(f"{position} selects no token of {len(empty)} of {len(rows)} rows")
    if any(row.selected is not None and row.selected[0] == 0 for row in rows):
        notes.append(
            f"{position} includes token 0, which carries a huge norm in many models and says nothing "
            f"about the text"
        )
    if any(row.system_folded for row in rows):
        notes.append(
            "the chat template has no system role: the system prompt stands at the head of the user's turn"
        )
    if not chat and any(row.system_prompt for row in rows):
        notes.append("without a chat template the system prompt is put before the prompt as plain text")
    if any(row.finish_reason == "stop" and not row.completion.strip() for row in rows):
        notes.append("some responses are empty: the model ends its turn at once")
    return notes
