"""One question at a time to a server that speaks the OpenAI chat-completions protocol, until there is an
answer.

Bounded concurrency, a rate limit, Retry-After, exponential backoff with full jitter, time limits, a budget,
and adaptation to servers that refuse a parameter. Knows nothing of traits, rubrics or scores; never writes
the key anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import heapq
import itertools
import json
import logging
import math
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from storage.errors import UserError

log = logging.getLogger(__name__)

Mode = Literal["logprobs", "text"]

# A first answer token needs one token; a few more let the text be read where the tokeniser splits digits.
LOGPROB_TOKENS = 8
TEXT_TOKENS = 256
# models that think before they answer spend tokens on it
THINKING_TOKENS = 4096
BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 30.0
UNREACHABLE_AFTER = 5
DEAD_AFTER = 20

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
class ClientSettings:
    """How to reach a server and how hard to try. 0 means no limit for rates and budgets."""

    model: str
    base_url: str | None = None
    max_concurrency: int = 20
    requests_per_minute: int = 0
    timeout_s: float = 60.0
    max_attempts: int = 8
    max_wait_s: float = 900.0
    max_calls: int = 0
    max_tokens: int = 0
    max_cost_usd: float = 0.0
    prompt_usd_per_million: float | None = None
    completion_usd_per_million: float | None = None

    def check(self) -> None:
        """Refuse what cannot work, before anything is sent."""
        if self.base_url is not None:
            parts = urlsplit(self.base_url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise UserError(
                    f"{parts.hostname or self.base_url!r} is no http(s) address",
                    where="judge option `base_url`",
                    remedy="give e.g. http://localhost:8000/v1",
                )
            if parts.username or parts.password or parts.query:
                raise UserError(
                    "it carries a user name, a password or a query",
                    where="judge option `base_url`",
                    remedy="give the address alone, and the key as OPENAI_API_KEY",
                )
        if self.max_cost_usd and self.price() is None:
            raise UserError(
                f"the price of {self.model!r} is not known, so max_cost_usd cannot be kept",
                where="judge option `max_cost_usd`",
                remedy="set prompt_usd_per_million and completion_usd_per_million, or limit max_tokens",
            )

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
        )


class GaveUp(Exception):
    """This one question got no answer: `reason` is a slug, `detail` says what was last seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(reason)


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
class Ledger:
    """What was spent in this process on one model of one server."""

    requests: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    in_flight: int = 0
    reserved_tokens: int = 0

    def cost(self, price: tuple[float, float] | None) -> float:
        if price is None:
            return 0.0
        return (self.prompt_tokens * price[0] + self.completion_tokens * price[1]) / 1e6


@dataclass
class _Process:
    abilities: dict[tuple[str | None, str], Abilities] = field(default_factory=dict)
    ledgers: dict[tuple[str | None, str], Ledger] = field(default_factory=dict)


_process = _Process()


@dataclass(frozen=True)
class Verdict:
    """What an error response means. kind: rate, fault, adapt, content_filter, too_long, fatal, rejected."""

    kind: str
    message: str = ""
    param: str = ""
    remedy: str = ""


_PARAMS = ("max_completion_tokens", "max_tokens", "top_logprobs", "logprobs", "temperature")
_UNSUPPORTED = re.compile(
    r"unsupported|not support|does not support|unrecognized|unexpected|unknown|not permitted|not allowed|"
    r"extra inputs|invalid|only the default|must be|less than or equal|exceed|greater than",
    re.IGNORECASE,
)


def classify(status: int, body: Any) -> Verdict:
    """Read an error response. `body`: the parsed JSON, its `error` object, or text."""
    error = body
    if isinstance(body, Mapping):
        error = body.get("error", body)
    if not isinstance(error, Mapping):
        error = {"message": str(error or "")}
    message = str(error.get("message") or error.get("detail") or "")[:500]
    code = f"{error.get('code') or ''} {error.get('type') or ''}".lower()
    param = str(error.get("param") or "")
    lowered = f"{code} {message}".lower()
    if status == 429:
        if "insufficient_quota" in code or "billing" in code or "exceeded your current quota" in lowered:
            return Verdict("fatal", message, remedy="check the plan and billing of the judge's account")
        return Verdict("rate", message)
    if status in (401, 403):
        return Verdict("fatal", message or f"HTTP {status}", remedy="check OPENAI_API_KEY")
    if status == 402:
        return Verdict("fatal", message, remedy="check the balance of the judge's account")
    if status in (408, 409, 425) or status >= 500:
        return Verdict("fault", message)
    if any(
        word in lowered
        for word in ("content_filter", "content_policy", "responsibleaipolicy", "content policy")
    ):
        return Verdict("content_filter", message)
    if "invalid_prompt" in code:
        return Verdict("content_filter", message)
    if (
        "context_length" in lowered
        or "maximum context" in lowered
        or "context window" in lowered
        or status == 413
    ):
        return Verdict("too_long", message)
    if status == 404:
        return Verdict("fatal", message or "not found", remedy="check the judge's model name and base_url")
    if status in (400, 422):
        named = [name for name in _PARAMS if name == param] or [
            name for name in _PARAMS if re.search(rf"\b{name}\b", message)
        ]
        if named and (_UNSUPPORTED.search(f"{code} {message}")):
            return Verdict("adapt", message, param=named[0])
        if re.search(r"system role|role ['\"`]?system|roles must alternate", message, re.IGNORECASE):
            return Verdict("adapt", message, param="system")
    return Verdict("rejected", message or f"HTTP {status}")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: retry-after-ms, or Retry-After as seconds or as an HTTP date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (TypeError, ValueError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def parse_completion(body: Any, mode: Mode) -> Answer | None:
    """The answer in a chat-completions body, None when it is none."""
    try:
        choice = body["choices"][0]
        message = choice.get("message") or {}
        content = message.get("content")
        usage = body.get("usage") or {}
        text = content if isinstance(content, str) else _joined(content)
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
    entries = (logprobs or {}).get("content") or []
    for entry in entries:
        if str(entry["token"]).strip():
            top = entry.get("top_logprobs") or [entry]
            return tuple((str(other["token"]), float(other["logprob"])) for other in top)
    return None


class _Pace:
    """A token bucket: `per_minute` requests, evenly spaced while there is work; a second's worth that was not
    used may be made up for. A pause holds everybody back."""

    BURST_S = 1.0

    def __init__(self, per_minute: int) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next: float | None = None
        self._pause_until = 0.0

    def pause(self, seconds: float) -> None:
        self._pause_until = max(self._pause_until, time.monotonic() + seconds)

    async def turn(self) -> None:
        now = time.monotonic()
        # the bucket starts empty: a first second at double rate would be above the limit
        due = now if self._next is None else max(self._next, now - self.BURST_S)
        at = max(now, due, self._pause_until)
        self._next = max(due, self._pause_until) + self._gap
        while now < max(at, self._pause_until):
            await asyncio.sleep(max(at, self._pause_until) - now)
            now = time.monotonic()


class _Gate:
    """One at a time; whoever asked first goes first, on every try. A question that was turned away ten times
    must not queue behind all the others ten times: the unlucky ones would make a long end."""

    def __init__(self) -> None:
        self._open = True
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    @contextlib.asynccontextmanager
    async def hold(self, ticket: int) -> AsyncIterator[None]:
        if self._open:
            self._open = False
        else:
            called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (ticket, next(self._arrivals), called))
            try:
                await called
            except asyncio.CancelledError:
                if called.done() and not called.cancelled():
                    self._leave()
                raise
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        while self._waiting:
            *_, called = heapq.heappop(self._waiting)
            if not called.done():
                called.set_result(None)
                return
        self._open = True


class ChatClient:
    """Lives inside one event loop. `ask` either returns an answer, raises GaveUp for this question, or raises
    UserError for all (key, quota, model, budget, unreachable server); after that every further `ask` raises
    it too."""

    def __init__(self, settings: ClientSettings, api_key: str | None, spent: Ledger | None = None) -> None:
        settings.check()
        self.settings = settings
        self._key = api_key
        place = (settings.base_url, settings.model)
        self.abilities = _process.abilities.setdefault(place, Abilities.expected(settings.model))
        # budgets hold for the process, `spent` is what this client's owner wants to know
        self.ledger = _process.ledgers.setdefault(place, Ledger())
        self._books = (self.ledger, spent if spent is not None else Ledger())
        self._gate = _Gate()
        self._slots = asyncio.Semaphore(settings.max_concurrency)
        self._tickets = itertools.count()
        self._returned = asyncio.Condition()
        self._pace = _Pace(settings.requests_per_minute)
        self._fatal: UserError | None = None
        self._stopped = asyncio.Event()
        self._unreachable = 0
        self._gave_up_in_a_row = 0
        self._limited_in_a_row = 0
        self._client: Any = None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def ask(
        self,
        messages: Callable[[bool], list[dict[str, str]]],
        mode: Mode,
        keep: Callable[[Answer], Awaitable[None]],
    ) -> Answer:
        """`messages(system_role)` gives the chat messages; `keep` stores the answer and is awaited while the
        request still counts as in flight, so that a kill loses at most `max_concurrency` answers."""
        started = time.monotonic()
        ticket = next(self._tickets)
        faults = 0
        waits = 0
        last = ""
        while True:
            try:
                return await self._once(ticket, messages, mode, keep)
            except _Again as again:
                last = again.reason
                if again.kind == "adapted":
                    continue
                if again.kind == "rate":
                    waits += 1
                else:
                    faults += 1
                delay = _delay(again.after, waits if again.kind == "rate" else faults)
                too_late = time.monotonic() - started + delay > self.settings.max_wait_s
                if faults >= self.settings.max_attempts or too_late:
                    self._count_gave_up(last, again.detail)
                    raise GaveUp("rate_limited" if again.kind == "rate" else last, again.detail) from None
                for book in self._books:
                    book.retries += 1
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), delay)
                self._raise_if_fatal()

    async def _once(
        self,
        ticket: int,
        messages: Callable[[bool], list[dict[str, str]]],
        mode: Mode,
        keep: Callable[[Answer], Awaitable[None]],
    ) -> Answer:
        async with contextlib.AsyncExitStack() as held:
            async with self._gate.hold(ticket):
                await held.enter_async_context(self._slots)
                request = self._request(messages(self.abilities.system_role), mode)
                version = self.abilities.version
                estimate = sum(len(m["content"]) for m in request["messages"]) // 3 + LOGPROB_TOKENS
                await held.enter_async_context(self._reserved(estimate))
                self._openai()  # loading it takes a second, which must not count as unused rate
                await self._pace.turn()
                self._raise_if_fatal()
                if not self.abilities.settled:
                    # the first request goes alone: a refused parameter or a wrong key is met once, not twenty
                    # times
                    return await self._exchange(request, version, keep)
            return await self._exchange(request, version, keep)

    async def _exchange(
        self, request: dict[str, Any], version: int, keep: Callable[[Answer], Awaitable[None]]
    ) -> Answer:
        for book in self._books:
            book.requests += 1
        answer = await self._send(request, version)
        for book in self._books:
            book.calls += 1
            book.prompt_tokens += answer.prompt_tokens
            book.completion_tokens += answer.completion_tokens
        if answer.text.lstrip().startswith("<think") and self.abilities.think():
            # its first token is no score, and eight tokens are no answer
            raise _Again("adapted", "thinking")
        self.abilities.settled = True
        self._unreachable = self._gave_up_in_a_row = self._limited_in_a_row = 0
        await keep(answer)
        return answer

    def _request(self, messages: list[dict[str, str]], mode: Mode) -> dict[str, Any]:
        abilities = self.abilities
        request: dict[str, Any] = {"model": self.settings.model, "messages": messages}
        if mode == "logprobs" and abilities.logprobs:
            request |= {"logprobs": True, "top_logprobs": abilities.top_logprobs}
            limit = LOGPROB_TOKENS
        else:
            limit = THINKING_TOKENS if abilities.thinking else TEXT_TOKENS
        if abilities.token_param:
            request[abilities.token_param] = limit
        if abilities.temperature:
            request["temperature"] = 0
        return request

    async def _send(self, request: dict[str, Any], version: int) -> Answer:
        import openai

        asked: Mode = "logprobs" if request.get("logprobs") else "text"
        try:
            # the client's own time limit is per read; this one is for the whole answer
            async with asyncio.timeout(self.settings.timeout_s):
                raw = await self._openai().chat.completions.with_raw_response.create(**request)
        except TimeoutError as error:
            raise _Again("fault", "timeout") from error
        except openai.APIStatusError as error:
            self._unreachable = 0
            return self._status(error, asked, version)
        except openai.APITimeoutError as error:
            raise _Again("fault", "timeout") from error
        except openai.APIConnectionError as error:
            self._unreachable += 1
            cause = self._redact(str(error.__cause__ or error))
            if not self.abilities.settled and self._unreachable >= UNREACHABLE_AFTER:
                self._stop(f"the judge's server cannot be reached: {cause}", "check base_url and the network")
            raise _Again("fault", "connection", detail=cause) from error
        try:
            body = json.loads(raw.http_response.content)
        except ValueError:
            body = None
        answer = parse_completion(body, asked)
        if answer is None:
            raise _Again("fault", "bad_response")
        return answer

    def _status(self, error: Any, mode: Mode, version: int) -> Answer:
        """What an error status means for this question: an answer (a filter's), another try, or the end of
        all."""
        verdict = classify(error.status_code, error.body if error.body is not None else error.response.text)
        message = self._redact(verdict.message)
        after = retry_after(error.response.headers)
        if verdict.kind == "rate":
            self._limited_in_a_row += 1
            if self._limited_in_a_row >= max(8, self.settings.max_concurrency):
                # nobody gets through: that is a limit of the account, not of this request
                self._pace.pause(after if after is not None else 1.0)
                self._limited_in_a_row = 0
            raise _Again("rate", "rate_limited", after, message)
        if verdict.kind == "fault":
            raise _Again("fault", "server_error", after, message)
        if verdict.kind == "content_filter":
            return Answer("", None, "content_filter", None, True, mode)
        if verdict.kind == "too_long":
            raise GaveUp("too_long", message)
        # another request may have adapted meanwhile: then this one merely tries again
        if verdict.kind == "adapt" and (
            self.abilities.version != version or self.abilities.refuse(verdict.param)
        ):
            raise _Again("adapted", verdict.param)
        if verdict.kind == "fatal" or not self.abilities.settled:
            self._stop(
                f"the judge's server refuses: {message}", verdict.remedy or "check the judge's options"
            )
        self._count_gave_up("rejected", message)
        raise GaveUp("rejected", message)

    def _openai(self) -> Any:
        if self._client is None:
            import openai

            for name in ("httpx", "httpx2"):
                # one line per request, with the address, is noise in every run's log
                logging.getLogger(name).setLevel(logging.WARNING)
            self._client = openai.AsyncOpenAI(
                # servers of one's own take any key, the client insists on one
                api_key=self._key or "none",
                base_url=self.settings.base_url or "https://api.openai.com/v1",
                max_retries=0,
                timeout=self.settings.timeout_s,
            )
        return self._client

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _raise_if_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    def _stop(self, what: str, remedy: str) -> None:
        if self._fatal is None:
            self._fatal = UserError(
                what, where=f"judge {self.settings.model}", remedy=f"{remedy}; what was scored is kept"
            )
            self._stopped.set()
        raise self._fatal

    def _count_gave_up(self, reason: str, detail: str) -> None:
        self._gave_up_in_a_row += 1
        if self._gave_up_in_a_row >= DEAD_AFTER:
            self._stop(
                f"{DEAD_AFTER} questions in a row got no answer (last: {reason} {detail})".replace(" )", ")"),
                "see whether the server is well",
            )

    @contextlib.asynccontextmanager
    async def _reserved(self, tokens: int) -> AsyncIterator[None]:
        await self._reserve(tokens)
        try:
            yield
        finally:
            await self._release(tokens)

    async def _reserve(self, tokens: int) -> None:
        """Enter the budget, or wait for requests in flight whose true size may still leave room."""
        s, ledger, price = self.settings, self.ledger, self.settings.price()
        async with self._returned:
            while True:
                self._raise_if_fatal()
                spent = ledger.prompt_tokens + ledger.completion_tokens
                over: str | None = None
                if s.max_calls and ledger.calls + ledger.in_flight + 1 > s.max_calls:
                    over = f"max_calls {s.max_calls}"
                elif s.max_tokens and spent + ledger.reserved_tokens + tokens > s.max_tokens:
                    over = f"max_tokens {s.max_tokens}"
                elif s.max_cost_usd and price is not None:
                    planned = (ledger.reserved_tokens + tokens) * price[0] / 1e6
                    if ledger.cost(price) + planned > s.max_cost_usd:
                        over = f"max_cost_usd {s.max_cost_usd:g}"
                if over is None:
                    break
                if ledger.in_flight == 0:
                    self._stop(
                        f"the budget {over} is used up after {ledger.calls} calls, {spent} tokens",
                        f"raise {over.split()[0]}",
                    )
                # another client of this process may hold the room: it does not notify us
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._returned.wait(), 0.5)
            ledger.in_flight += 1
            ledger.reserved_tokens += tokens

    async def _release(self, tokens: int) -> None:
        self.ledger.in_flight -= 1
        self.ledger.reserved_tokens -= tokens
        async with self._returned:
            self._returned.notify_all()


class _Again(Exception):
    """Try this question again. kind: adapted, rate, fault; `after`: seconds the server asked for."""

    def __init__(self, kind: str, reason: str, after: float | None = None, detail: str = "") -> None:
        self.kind = kind
        self.reason = reason
        self.after = after
        self.detail = detail
        super().__init__(reason)


def _delay(after: float | None, attempt: int) -> float:
    """Seconds to wait before try number `attempt` + 1: what the server asked for plus a tenth of jitter, or
    full jitter over an exponentially growing window (Brooker, "Exponential Backoff and Jitter", AWS 2015)."""
    if after is not None:
        return after + random.uniform(0, 0.1 * after + 0.05)
    return random.uniform(0, min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** max(0, attempt - 1)))
