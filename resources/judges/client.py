"""One question at a time to a judge model over the OpenAI chat-completions protocol.

What a chat request is, what an answer is, adaptation to servers that refuse a parameter, and prices. How a
request is sent until there is an answer is in `resources/api_client.py`. Knows nothing of traits, rubrics or
scores.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from resources import api_client
from resources.api_client import (
    Again,
    ApiClient,
    Ledger,
    ServerSettings,
    Verdict,
    Who,
    check_address,
)
from storage.errors import UserError

log = logging.getLogger(__name__)

Mode = Literal["logprobs", "text"]

# A first answer token needs one token; a few more let the text be read where the tokeniser splits digits.
LOGPROB_TOKENS = 8
TEXT_TOKENS = 256
# models that think before they answer spend tokens on it
THINKING_TOKENS = 4096
# USD per million tokens (prompt, completion) at api.openai.com; a longer name with a date belongs to its
# family
PRICES: dict[str, tuple[float, float]] = {
    "gpt-4.1": (2.0, 8.0),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4.1-nano": (0.1, 0.4),
    "gpt-4o": (2.5, 10.0),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-5": (1.25, 10.0),
    "gpt-5-mini": (0.25, 2.0),
    "gpt-5-nano": (0.05, 0.4),
}


@dataclass(frozen=True)
class ClientSettings(ServerSettings):
    """How to reach a judge's server, how hard to try, and what it may cost."""

    max_cost_usd: float = 0.0
    prompt_usd_per_million: float | None = None
    completion_usd_per_million: float | None = None

    def check(self) -> None:
        """Refuse what cannot work, before anything is sent."""
        if self.base_url is not None:
            check_address(self.base_url, where="judge option `base_url`", key="OPENAI_API_KEY")
        if self.max_cost_usd and self.price() is None:
            raise UserError(
                f"the price of {self.model!r} is not known, so max_cost_usd cannot be kept",
                where="judge option `max_cost_usd`",
                remedy="set prompt_usd_per_million and completion_usd_per_million, or limit max_tokens",
            )

    def cost_limit(self) -> float:
        return self.max_cost_usd

    def price(self) -> tuple[float, float] | None:
        """USD per million (prompt, completion) tokens, None when nobody said it."""
        if self.prompt_usd_per_million is not None and self.completion_usd_per_million is not None:
            return self.prompt_usd_per_million, self.completion_usd_per_million
        if self.base_url is not None and urlsplit(self.base_url).hostname != "api.openai.com":
            return None
        family = re.sub(r"-\d{4}-\d{2}-\d{2}$", "", self.model)
        return PRICES.get(family)


@dataclass(frozen=True)
class Answer:
    """What the server said, as it is kept.

    `top`: alternatives (token, logprob) of the first answer token that is not blank, None when none were
    given.
    `filtered`: a content filter stopped the answer or the question.
    `server`: a mark of the address that answered; None for what was kept before there was one.
    """

    text: str
    top: tuple[tuple[str, float], ...] | None
    finish: str | None
    refusal: str | None
    filtered: bool
    mode: Mode
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    server: str | None = None

    def record(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "top": None if self.top is None else [list(entry) for entry in self.top],
            "finish": self.finish,
            "refusal": self.refusal,
            "filtered": self.filtered,
            "mode": self.mode,
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "server": self.server,
        }

    @classmethod
    def from_record(cls, row: Mapping[str, Any]) -> Answer:
        top = row["top"]
        return cls(
            text=row["text"],
            top=None if top is None else tuple((token, float(logprob)) for token, logprob in top),
            finish=row["finish"],
            refusal=row["refusal"],
            filtered=row["filtered"],
            mode=row["mode"],
            model=row["model"],
            prompt_tokens=row["prompt_tokens"],
            completion_tokens=row["completion_tokens"],
            server=row.get("server"),
        )


@dataclass
class Abilities:
    """What a model's server accepts; learnt once, remembered for the process."""

    token_param: str = "max_tokens"
    temperature: bool = True
    logprobs: bool = True
    top_logprobs: int = 20
    system_role: bool = True
    thinking: bool = False
    settled: bool = False
    version: int = 0
    token_refused: frozenset[str] = frozenset()

    def think(self) -> bool:
        """The model thinks aloud first: give it room and read its text. False when that was known."""
        if self.thinking:
            return False
        self.thinking, self.logprobs = True, False
        self.version += 1
        return True

    @classmethod
    def expected(cls, model: str) -> Abilities:
        """What is known by name: the reasoning families refuse max_tokens, temperature and logprobs."""
        if re.match(r"(?:.*/)?(?:gpt-5|o[1-9])(?:$|[-.])", model) and "chat" not in model:
            return cls("max_completion_tokens", temperature=False, logprobs=False, thinking=True)
        return cls()

    def refuse(self, param: str) -> bool:
        """Do without `param` from now on. False when there is nothing left to change about it."""
        before = (self.token_param, self.temperature, self.logprobs, self.top_logprobs, self.system_role)
        if param in ("max_tokens", "max_completion_tokens"):
            self.token_refused |= {param}
            names = ("max_tokens", "max_completion_tokens")
            # a server that takes neither is asked without a limit
            self.token_param = next((name for name in names if name not in self.token_refused), "")
        elif param == "temperature":
            self.temperature = False
        elif param == "top_logprobs" and self.logprobs and self.top_logprobs > 5:
            self.top_logprobs = 5
        elif param in ("logprobs", "top_logprobs"):
            self.logprobs = False
        elif param == "system":
            self.system_role = False
        after = (self.token_param, self.temperature, self.logprobs, self.top_logprobs, self.system_role)
        if before == after:
            return False
        self.version += 1
        log.info("the judge's server refuses %s; going on without it", param)
        return True


@dataclass
class _Process:
    abilities: dict[tuple[str | None, str], Abilities] = field(default_factory=dict)
    ledgers: dict[tuple[str | None, str], Ledger] = field(default_factory=dict)


_process = _Process()


def ledger_of(settings: ClientSettings) -> Ledger:
    """What this process has spent on the model of `settings`, over all judges."""
    return _process.ledgers.setdefault((settings.base_url, settings.model), Ledger())


_PARAMS = ("max_completion_tokens", "max_tokens", "top_logprobs", "logprobs", "temperature")


def server_mark(base_url: str | None) -> str:
    """Tells addresses apart without naming them."""
    return hashlib.sha256((base_url or "api.openai.com").rstrip("/").encode()).hexdigest()[:12]


def judge_server(model: str) -> Who:
    """How a judge's server is spoken of."""
    return Who(
        server="the judge's server",
        where=f"judge {model}",
        key="OPENAI_API_KEY",
        options="the judge's options (model name, base_url)",
        kept="what was scored is kept",
    )


def classify(status: int, body: Any) -> Verdict:
    """Read a judge server's error response; see `resources.api_client.classify`."""
    return api_client.classify(status, body, judge_server("judge"), _PARAMS)


def parse_completion(body: Any, mode: Mode) -> Answer | None:
    """The answer in a chat-completions body, None when it is none."""
    try:
        choice = body["choices"][0]
        message = choice.get("message") or {}
        content = message.get("content")
        usage = body.get("usage") or {}
        text = content if isinstance(content, str) else _joined(content)
        thought = message.get("reasoning_content") or message.get("reasoning")
        if not text.strip() and isinstance(thought, str):
            # a server that takes the thinking out: the answer is still to come, or was cut off before it came
            text = f"<think>{thought}"
        finish = choice.get("finish_reason")
        return Answer(
            text=text,
            top=_first_token(choice.get("logprobs")),
            finish=finish,
            refusal=message.get("refusal") or None,
            filtered=finish == "content_filter",
            mode=mode,
            model=body.get("model"),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        return None


def _joined(content: Any) -> str:
    """Some servers send the content as parts."""
    if not isinstance(content, list):
        return ""
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


def _first_token(logprobs: Any) -> tuple[tuple[str, float], ...] | None:
    """None also for shapes that are no log-probabilities: the text of the answer is still there."""
    try:
        for entry in (logprobs or {}).get("content") or []:
            if not str(entry["token"]).strip():
                continue
            top = [
                (str(other["token"]), float(other["logprob"]))
                for other in entry.get("top_logprobs") or [entry]
                if other["logprob"] is not None
            ]
            # probability zero carries nothing, and minus infinity has no JSON
            return tuple(pair for pair in top if math.isfinite(pair[1])) or None
    except (KeyError, TypeError, AttributeError, ValueError):
        return None
    return None


class ChatClient(ApiClient[Answer]):
    """`ask` either returns an answer, raises GaveUp for this question, or raises UserError for all; see
    `ApiClient`."""

    params = _PARAMS

    def __init__(self, settings: ClientSettings, api_key: str | None, spent: Ledger | None = None) -> None:
        settings.check()
        place = (settings.base_url, settings.model)
        self.abilities = _process.abilities.setdefault(place, Abilities.expected(settings.model))
        self._mark = server_mark(settings.base_url)
        who = judge_server(settings.model)
        super().__init__(settings, who, self.abilities, ledger_of(settings), api_key, spent)

    async def ask(
        self,
        messages: Callable[[bool], list[dict[str, str]]],
        mode: Mode,
        keep: Callable[[Answer], Awaitable[None]],
    ) -> Answer:
        """`messages(system_role)` gives the chat messages; `keep` as in `ApiClient.ask_for`."""
        return await self.ask_for(lambda: self._request(messages(self.abilities.system_role), mode), keep)

    def _request(self, messages: list[dict[str, str]], mode: Mode) -> dict[str, Any]:
        abilities = self.abilities
        request: dict[str, Any] = {"model": self.settings.model, "messages": messages}
        if mode == "logprobs" and abilities.logprobs:
            request |= {"logprobs": True, "top_logprobs": abilities.top_logprobs}
            limit = LOGPROB_TOKENS
        else:
            limit = self._text_tokens()
        if abilities.token_param:
            request[abilities.token_param] = limit
        if abilities.temperature:
            request["temperature"] = 0
        return request

    async def _post(self, client: Any, request: dict[str, Any]) -> Any:
        return await client.chat.completions.with_raw_response.create(**request)

    def _parse(self, body: Any, request: dict[str, Any]) -> Answer | None:
        answer = parse_completion(body, _mode(request))
        return None if answer is None else replace(answer, server=self._mark)

    def _usage(self, answer: Answer) -> tuple[int, int]:
        return answer.prompt_tokens, answer.completion_tokens

    def _estimate(self, request: dict[str, Any]) -> int:
        # a token for three bytes: more than English needs, about what other languages need
        return sum(len(m["content"].encode("utf-8", "replace")) for m in request["messages"]) // 3 + 1

    def _limit(self, request: dict[str, Any]) -> int:
        return int(request.get(self.abilities.token_param) or self._text_tokens())

    def _text_tokens(self) -> int:
        return THINKING_TOKENS if self.abilities.thinking else TEXT_TOKENS

    def _accept(self, answer: Answer) -> None:
        if answer.text.lstrip().startswith("<think") and self.abilities.think():
            # its first token is no score, and eight tokens are no answer
            raise Again("adapted", "thinking")

    def _adapt(self, param: str) -> bool:
        return self.abilities.refuse(param)

    def _filtered(self, request: dict[str, Any], message: str) -> Answer:
        return Answer("", None, "content_filter", None, True, _mode(request), server=self._mark)


def _mode(request: dict[str, Any]) -> Mode:
    return "logprobs" if request.get("logprobs") else "text"
