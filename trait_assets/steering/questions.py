"""The questions of a steering evaluation: reading them, and splitting them into a search half and a report
half.

Here: what `steering.json` may look like, and the seeded split. Not here: prompts as token ids, scores, doses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from storage.errors import UserError

Direction = Literal["positive", "negative"]
Half = Literal["search", "report"]

# from this many questions on, choosing and reporting use different questions
SPLIT_FROM = 8
# paired intervals mean nothing below this
LEAST_QUESTIONS = 2
REMEDY = 'write {"questions": ["…", …]} with 8 or more everyday questions, or run with --no-steering'


@dataclass(frozen=True)
class Questions:
    """Questions with the half each one belongs to.

    `search` and `report` hold indices into `texts`. They are disjoint when `split`; below `SPLIT_FROM`
    questions both hold all of them, a result is then exploratory and never validated. `flags`: what a reader
    must know.
    """

    texts: tuple[str, ...]
    search: tuple[int, ...]
    report: tuple[int, ...]
    direction: Direction
    eval_prompt: str | None
    flags: tuple[str, ...] = ()

    @property
    def split(self) -> bool:
        return not set(self.search) & set(self.report)

    def of(self, half: Half) -> tuple[int, ...]:
        return self.search if half == "search" else self.report


def read_questions(
    steering: Mapping[str, Any] | None,
    *,
    trait: str,
    where: str,
    limit: int | None = None,
    search_share: float = 0.4,
    seed: int = 0,
) -> Questions:
    """Questions of one trait from the `steering` part of its scenario set.

    A question is a string, or an object whose `question` (or `prompt`) is one. Blank and repeated questions
    are dropped and flagged. `limit` keeps the first N. `search_share`: share of questions that choose layer,
    method and dose; the rest report.

    Raises `UserError`, naming `where`, without steering.json, without questions, or with something that is no
    question.
    """
    if not steering:
        raise UserError(
            f"{trait} has no steering.json",
            where=where,
            remedy=REMEDY,
        )
    given = steering.get("questions")
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise UserError(
            "steering.json has no list `questions`",
            where=where,
            remedy=REMEDY,
        )
    flags = []
    texts: list[str] = []
    repeated = blank = 0
    for number, item in enumerate(given, 1):
        text = _question(item)
        if text is None:
            raise UserError(
                f"question {number} of steering.json is neither a text nor an object with a text `question`",
                where=where,
                remedy="write each question as a string",
            )
        if not text:
            blank += 1
        elif _folded(text) in {_folded(t) for t in texts}:
            repeated += 1
        else:
            texts.append(text)
    if repeated:
        flags.append(f"{repeated} repeated question{'s were' if repeated > 1 else ' was'} left out")
    if blank:
        flags.append(f"{blank} blank question{'s were' if blank > 1 else ' was'} left out")
    if limit is not None:
        texts = texts[:limit]
    if len(texts) < LEAST_QUESTIONS:
        raise UserError(
            f"{len(texts)} different question{'' if len(texts) == 1 else 's'} left for {trait}",
            where=where,
            remedy=f"give at least {LEAST_QUESTIONS}, and {SPLIT_FROM} for a validated result",
        )
    direction = _direction(steering.get("direction"), where)
    eval_prompt = steering.get("eval_prompt")
    if eval_prompt is not None and not isinstance(eval_prompt, str):
        raise UserError(
            "`eval_prompt` of steering.json is not a text", where=where, remedy="write it as one string"
        )
    if len(texts) < SPLIT_FROM:
        everything = tuple(range(len(texts)))
        flags.append(
            f"only {len(texts)} questions: layer, method and dose are chosen on those that are reported, so "
            f"the result is exploratory and cannot be called validated (needs {SPLIT_FROM})"
        )
        return Questions(tuple(texts), everything, everything, direction, eval_prompt, tuple(flags))
    search, report = split(texts, search_share=search_share, seed=seed)
    return Questions(tuple(texts), search, report, direction, eval_prompt, tuple(flags))


def split(texts: Sequence[str], *, search_share: float, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Disjoint (search, report) indices; at least 4 questions each from 8 on.

    A question's place depends on its text and the seed alone, in the order of a hash: adding a question to
    the file moves few others.
    """
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(f"{seed}\n{texts[i]}".encode()).digest())
    least = min(4, len(texts) // 2)
    n_search = min(max(round(search_share * len(texts)), least), len(texts) - least)
    return tuple(sorted(order[:n_search])), tuple(sorted(order[n_search:]))


def _question(item: Any) -> str | None:
    if isinstance(item, Mapping):
        item = next((item[k] for k in ("question", "prompt") if isinstance(item.get(k), str)), None)
    return item.strip() if isinstance(item, str) else None


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _direction(value: Any, where: str) -> Direction:
    if value in (None, "positive"):
        return "positive"
    if value == "negative":
        return "negative"
    raise UserError(
        f"`direction` of steering.json is {value!r}",
        where=where,
        remedy="write positive or negative, or leave it out",
    )
