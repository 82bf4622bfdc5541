"""One request at a time to a server that speaks the OpenAI protocol, until there is an answer.

Bounded concurrency, a rate limit, Retry-After, exponential backoff with full jitter, time limits, a budget;
and the thread-side of it: rows kept in groups before a request counts as answered. Which request is sent and
what its answer means belongs to the clients built on this: `judges/client.py` (chat completions) and
`models/server.py` (completions with token ids). Never writes a key anywhere.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import email.utils
import heapq
import itertools
import json
import logging
import math
import queue
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

from storage.errors import UserError

log = logging.getLogger(__name__)

BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 30.0
UNREACHABLE_AFTER = 5
# before anything was answered: so many requests refused for no known reason are a fault of the options
REFUSED_AFTER = 3
DEAD_AFTER = 20
# shorter "keys" ("none", "EMPTY") are no secret, and words of ordinary messages besides
SHORTEST_SECRET = 8

A = TypeVar("A")
I = TypeVar("I")  # noqa: E741 — an item
R = TypeVar("R")
ItemIn = TypeVar("ItemIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)


@dataclass(frozen=True)
class ServerSettings:
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

    def price(self) -> tuple[float, float] | None:
        """USD per million (prompt, completion) tokens, None where nobody said it."""
        return None

    def cost_limit(self) -> float:
        """USD; 0 for none."""
        return 0.0


@dataclass(frozen=True)
class Who:
    """How a server is spoken of in errors. `server`: "the judge's server"; `where`: what errors name;
    `key`: the variable that holds its key; `options`: where its address and model are set; `kept`: what
    happens to what was answered so far."""

    server: str
    where: str
    key: str
    options: str
    kept: str


def check_address(url: str, *, where: str, key: str) -> None:
    """UserError for what is no http(s) address, and for one that carries a secret."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        # an address without a scheme may still carry a password
        shown = url.rsplit("@", 1)[-1]
        raise UserError(
            f"{shown!r} is no http(s) address",
            where=where,
            remedy="give e.g. http://localhost:8000/v1",
        )
    if parts.username or parts.password or parts.query:
        raise UserError(
            "it carries a user name, a password or a query",
            where=where,
            remedy=f"give the address alone, and the key as {key}",
        )


def check_key(key: str | None, name: str) -> str | None:
    """The key without blanks around it, None for an empty one. `name`: the variable it comes from.

    UserError for characters that no HTTP header carries: the libraries below would show the whole key in
    their own message.
    """
    key = (key or "").strip()
    for position, character in enumerate(key, 1):
        if not "!" <= character <= "~":
            raise UserError(
                f"character {position} of {len(key)} belongs in no key",
                where=name,
                remedy="copy the key again, without line breaks, blanks or typographic characters",
            )
    return key or None


def redact(text: str, key: str | None) -> str:
    """The text without the key: some servers repeat it in their messages."""
    return text.replace(key, "***") if key and len(key) >= SHORTEST_SECRET else text


class GaveUp(Exception):
    """This one request got no answer: `reason` is a slug, `detail` says what was last seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(reason)


@dataclass
class Ledger:
    """What was spent in this process on one model of one server, and the pace at which it is asked: clients
    come and go, their budget and their rate stay. Threads share it."""

    requests: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    in_flight: int = 0
    reserved_prompt: int = 0
    reserved_completion: int = 0
    pace: _Pace = field(default_factory=lambda: _Pace(), repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def cost(self, price: tuple[float, float] | None) -> float:
        if price is None:
            return 0.0
        return (self.prompt_tokens * price[0] + self.completion_tokens * price[1]) / 1e6

    def add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def enter(self, settings: ServerSettings, prompt: int, completion: int) -> str | None:
        """Set tokens aside for one request; None, or the limit that has no room for it."""
        price, most_usd = settings.price(), settings.cost_limit()
        with self._lock:
            tokens = self.prompt_tokens + self.reserved_prompt + prompt
            tokens += self.completion_tokens + self.reserved_completion + completion
            if settings.max_calls and self.calls + self.in_flight + 1 > settings.max_calls:
                return f"max_calls {settings.max_calls}"
            if settings.max_tokens and tokens > settings.max_tokens:
                return f"max_tokens {settings.max_tokens}"
            if most_usd and price is not None:
                planned = (self.reserved_prompt + prompt) * price[0]
                planned += (self.reserved_completion + completion) * price[1]
                if self.cost(price) + planned / 1e6 > most_usd:
                    return f"max_cost_usd {most_usd:g}"
            self.in_flight += 1
            self.reserved_prompt += prompt
            self.reserved_completion += completion
            return None

    def leave(self, prompt: int, completion: int) -> None:
        """Give back what `enter` set aside."""
        self.add(in_flight=-1, reserved_prompt=-prompt, reserved_completion=-completion)


@dataclass(frozen=True)
class Verdict:
    """What an error response means. kind: rate, fault, adapt, content_filter, too_long, fatal, rejected."""

    kind: str
    message: str = ""
    param: str = ""
    remedy: str = ""


_UNSUPPORTED = re.compile(
    r"unsupported|not support|does not support|unrecognized|unexpected|unknown|not permitted|not allowed|"
    r"extra inputs|invalid|only the default|must be|less than or equal|exceed|greater than",
    re.IGNORECASE,
)


def classify(status: int, body: Any, who: Who, params: tuple[str, ...] = ()) -> Verdict:
    """Read an error response. `body`: the parsed JSON, its `error` object, or text; `params`: parameters that
    a request can do without."""
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
        if "retrydelay" in json.dumps(error.get("details"), default=str).lower():
            # Google says "you exceeded your current quota" of its limits per minute, too
            return Verdict("rate", message)
        if "insufficient_quota" in code or "billing" in code or "exceeded your current quota" in lowered:
            return Verdict(
                "fatal", message, remedy=f"check the plan and billing of the account at {who.server}"
            )
        return Verdict("rate", message)
    if status == 403 and re.search(r"moderation|flagged", lowered):
        return Verdict("content_filter", message)
    if status in (401, 403):
        return Verdict("fatal", message or f"HTTP {status}", remedy=f"check {who.key}")
    if status == 402:
        return Verdict("fatal", message, remedy=f"check the balance of the account at {who.server}")
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
        or re.search(r"context (?:window|size)|maximum model length|exceed_context", lowered)
        or status == 413
    ):
        return Verdict("too_long", message)
    if status == 404:
        return Verdict("fatal", message or "not found", remedy=f"check {who.options}")
    if status in (400, 422):
        named = [name for name in params if name == param] or [
            name for name in params if re.search(rf"\b{name}\b", message)
        ]
        if named and (_UNSUPPORTED.search(f"{code} {message}")):
            return Verdict("adapt", message, param=named[0])
        if re.search(r"system role|role ['\"`]?system|roles must alternate", message, re.IGNORECASE):
            return Verdict("adapt", message, param="system")
    return Verdict("rejected", message or f"HTTP {status}")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: retry-after-ms, or Retry-After as seconds or as an HTTP date;
    a date is read by the server's own clock where the response says what that shows."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / unit
        except ValueError:
            try:
                until = email.utils.parsedate_to_datetime(value).timestamp()
            except (TypeError, ValueError):
                continue
            seconds = until - _date(headers)
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def _date(headers: Mapping[str, str]) -> float:
    try:
        return email.utils.parsedate_to_datetime(headers.get("date", "")).timestamp()
    except (TypeError, ValueError):
        return time.time()


class _Pace:
    """A token bucket: requests evenly spaced while there is work; a second's worth that was not used may be
    made up for. A pause holds everybody back. Threads share it."""

    BURST_S = 1.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: float | None = None
        self._pause_until = 0.0

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._pause_until = max(self._pause_until, time.monotonic() + seconds)

    async def turn(self, per_minute: int) -> None:
        """Wait until one more request fits into `per_minute` (0: no limit)."""
        gap = 60.0 / per_minute if per_minute else 0.0
        with self._lock:
            now = time.monotonic()
            # the bucket starts empty: a first second at double rate would be above the limit
            due = now if self._next is None else max(self._next, now - self.BURST_S)
            at = max(now, due, self._pause_until)
            self._next = max(due, self._pause_until) + gap
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


class Again(Exception):
    """Try this request again. kind: adapted, rate, fault; `after`: seconds the server asked for."""

    def __init__(self, kind: str, reason: str, after: float | None = None, detail: str = "") -> None:
        self.kind = kind
        self.reason = reason
        self.after = after
        self.detail = detail
        super().__init__(reason)


def _delay(after: float | None, attempt: int) -> float:
    """Seconds to wait before try number `attempt` + 1: what the server asked for plus a tenth of jitter, or
    full jitter over an exponentially growing window (Brooker, "Exponential Backoff and Jitter", AWS 2015).
    The latter also for a server that asks for no wait at all: it must not be hammered."""
    if after:
        return after + random.uniform(0, 0.1 * after + 0.05)
    return random.uniform(0, min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** max(0, attempt - 1)))


class Learnt(Protocol):
    """What a client knows about its server. `settled`: a request has succeeded; `version` counts what was
    learnt."""

    settled: bool
    version: int


class ApiClient(abc.ABC, Generic[A]):
    """Lives inside one event loop. `ask_for` either returns an answer, raises GaveUp for this request, or
    raises UserError for all (key, quota, model, budget, unreachable server); after that, and after `abort`,
    every further one raises it too.

    A subclass says how a request is sent (`_post`), what an answer is (`_parse`, `_usage`) and what it can do
    about an error (`_adapt`, `_filtered`).
    """

    params: tuple[str, ...] = ()

    def __init__(
        self,
        settings: ServerSettings,
        who: Who,
        learnt: Learnt,
        ledger: Ledger,
        api_key: str | None,
        spent: Ledger | None = None,
    ) -> None:
        self.settings = settings
        self.who = who
        self.learnt = learnt
        self._key = check_key(api_key, who.key)
        # budgets hold for the process, `spent` is what this client's owner wants to know
        self.ledger = ledger
        self._books = (self.ledger, spent if spent is not None else Ledger())
        self._gate = _Gate()
        self._slots = asyncio.Semaphore(settings.max_concurrency)
        self._tickets = itertools.count()
        self._returned = asyncio.Condition()
        self._fatal: BaseException | None = None
        self._stopped = asyncio.Event()
        self._unreachable = 0
        self._refused = 0
        self._gave_up_in_a_row = 0
        self._limited_in_a_row = 0
        self._client: Any = None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    def abort(self, error: BaseException) -> None:
        """Ask nothing more: an answer that cannot be kept is money thrown away."""
        if self._fatal is None:
            self._fatal = error
            self._stopped.set()

    # what a subclass decides

    @abc.abstractmethod
    async def _post(self, client: Any, request: dict[str, Any]) -> Any:
        """Send one request; gives the raw response of the OpenAI client."""

    @abc.abstractmethod
    def _parse(self, body: Any, request: dict[str, Any]) -> A | None:
        """The answer in a body, None when it is none (then the request is sent again)."""

    @abc.abstractmethod
    def _usage(self, answer: A) -> tuple[int, int]:
        """(prompt, completion) tokens that the answer cost."""

    @abc.abstractmethod
    def _estimate(self, request: dict[str, Any]) -> int:
        """Tokens of the prompt, for the budget."""

    def _limit(self, request: dict[str, Any]) -> int:
        """The most tokens that the answer may take, for the budget."""
        return 0

    def _accept(self, answer: A) -> None:
        """Look at a paid answer before it counts; may raise `Again`."""

    def _adapt(self, param: str) -> bool:
        """Do without a parameter from now on; False where that changes nothing."""
        return False

    def _filtered(self, request: dict[str, Any], message: str) -> A:
        """The answer that stands for a content filter's refusal."""
        raise GaveUp("content_filter", message)

    # the work

    async def ask_for(self, prepare: Callable[[], dict[str, Any]], keep: Callable[[A], Awaitable[None]]) -> A:
        """`prepare` gives the request, anew for every try; `keep` stores the answer and is awaited while the
        request still counts as in flight, so that a kill loses at most `max_concurrency` answers."""
        turned_away: float | None = None
        ticket = next(self._tickets)
        faults = 0
        waits = 0
        last = ""
        while True:
            try:
                return await self._once(ticket, prepare, keep)
            except Again as again:
                last = again.reason
                if again.kind == "adapted":
                    continue
                if turned_away is None:
                    # the time that it waited in our own queue is none of the server's
                    turned_away = time.monotonic()
                if again.kind == "rate":
                    waits += 1
                else:
                    faults += 1
                delay = _delay(again.after, waits if again.kind == "rate" else faults)
                too_late = time.monotonic() - turned_away + delay > self.settings.max_wait_s
                if faults >= self.settings.max_attempts or too_late:
                    self._count_gave_up(last, again.detail)
                    raise GaveUp("rate_limited" if again.kind == "rate" else last, again.detail) from None
                for book in self._books:
                    book.add(retries=1)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), delay)
                self._raise_if_fatal()

    async def _once(
        self, ticket: int, prepare: Callable[[], dict[str, Any]], keep: Callable[[A], Awaitable[None]]
    ) -> A:
        async with contextlib.AsyncExitStack() as held:
            async with self._gate.hold(ticket):
                await held.enter_async_context(self._slots)
                request = prepare()
                version = self.learnt.version
                await held.enter_async_context(self._reserved(self._estimate(request), self._limit(request)))
                self._openai()  # loading it takes a second, which must not count as unused rate
                await self.ledger.pace.turn(self.settings.requests_per_minute)
                self._raise_if_fatal()
                if not self.learnt.settled:
                    # the first request goes alone: a refused parameter or a wrong key is met once, not twenty
                    # times
                    return await self._exchange(request, version, keep)
            return await self._exchange(request, version, keep)

    async def _exchange(
        self, request: dict[str, Any], version: int, keep: Callable[[A], Awaitable[None]]
    ) -> A:
        for book in self._books:
            book.add(requests=1)
        answer = await self._send(request, version)
        prompt_tokens, completion_tokens = self._usage(answer)
        for book in self._books:
            book.add(calls=1, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
        self._accept(answer)
        self.learnt.settled = True
        self._unreachable = self._gave_up_in_a_row = self._limited_in_a_row = 0
        try:
            await keep(answer)
        except Exception as error:
            self.abort(error)
            raise
        return answer

    async def _send(self, request: dict[str, Any], version: int) -> A:
        import openai

        # What the libraries raise may hold the key (a server that repeats it, a header that is refused), and a
        # chain of causes is printed and stored whole: so nothing is raised from within these handlers.
        failed: Again | None = None
        status: Any = None
        try:
            # the client's own time limit is per read; this one is for the whole answer
            async with asyncio.timeout(self.settings.timeout_s):
                raw = await self._post(self._openai(), request)
        except TimeoutError:
            failed = Again("fault", "timeout")
        except openai.APIStatusError as error:
            status = error
        except openai.APITimeoutError:
            failed = Again("fault", "timeout")
        except openai.APIConnectionError as error:
            failed = Again("fault", "connection", detail=self.redact(str(error.__cause__ or error)))
        if status is not None:
            self._unreachable = 0
            return self._status(status, request, version)
        if failed is not None:
            if failed.reason == "connection":
                self._unreachable += 1
                if not self.learnt.settled and self._unreachable >= UNREACHABLE_AFTER:
                    self._stop(
                        f"{self.who.server} cannot be reached: {failed.detail}",
                        f"check {self.who.options} and the network",
                    )
            raise failed
        try:
            body = json.loads(raw.http_response.content)
        except ValueError:
            body = None
        answer = self._parse(body, request)
        if answer is None:
            raise Again("fault", "bad_response")
        return answer

    def _status(self, error: Any, request: dict[str, Any], version: int) -> A:
        """What an error status means for this request: an answer (a filter's), another try, or the end of
        all."""
        body = error.body if error.body is not None else error.response.text
        verdict = classify(error.status_code, body, self.who, self.params)
        message = self.redact(verdict.message)
        after = retry_after(error.response.headers)
        if verdict.kind == "rate":
            self._limited_in_a_row += 1
            if self._limited_in_a_row >= max(8, self.settings.max_concurrency):
                # nobody gets through: that is a limit of the account, not of this request
                self.ledger.pace.pause(after if after is not None else 1.0)
                self._limited_in_a_row = 0
            raise Again("rate", "rate_limited", after, message)
        if verdict.kind == "fault":
            raise Again("fault", "server_error", after, message)
        if verdict.kind == "content_filter":
            return self._filtered(request, message)
        if verdict.kind == "too_long":
            raise GaveUp("too_long", message)
        # another request may have adapted meanwhile: then this one merely tries again
        if verdict.kind == "adapt" and (self.learnt.version != version or self._adapt(verdict.param)):
            raise Again("adapted", verdict.param)
        self._refused += 1
        if verdict.kind == "fatal" or (not self.learnt.settled and self._refused >= REFUSED_AFTER):
            self._stop(f"{self.who.server} refuses: {message}", verdict.remedy or f"check {self.who.options}")
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

    def redact(self, text: str) -> str:
        return redact(text, self._key)

    def _raise_if_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    def _stop(self, what: str, remedy: str) -> None:
        error = UserError(what, where=self.who.where, remedy=f"{remedy}; {self.who.kept}")
        self.abort(error)
        raise self._fatal or error

    def _count_gave_up(self, reason: str, detail: str) -> None:
        self._gave_up_in_a_row += 1
        if self._gave_up_in_a_row >= DEAD_AFTER:
            last = f"{reason} {detail}".strip()
            self._stop(
                f"{DEAD_AFTER} requests in a row got no answer from {self.who.server} (last: {last})",
                "see whether the server is well",
            )

    @contextlib.asynccontextmanager
    async def _reserved(self, prompt: int, completion: int) -> AsyncIterator[None]:
        await self._reserve(prompt, completion)
        try:
            yield
        finally:
            self.ledger.leave(prompt, completion)
            async with self._returned:
                self._returned.notify_all()

    async def _reserve(self, prompt: int, completion: int) -> None:
        """Enter the budget, or wait for requests in flight whose true size may still leave room."""
        ledger = self.ledger
        async with self._returned:
            while True:
                self._raise_if_fatal()
                over = ledger.enter(self.settings, prompt, completion)
                if over is None:
                    return
                if ledger.in_flight == 0:
                    spent = ledger.prompt_tokens + ledger.completion_tokens
                    self._stop(
                        f"the budget {over} is used up after {ledger.calls} calls, {spent} tokens",
                        f"raise {over.split()[0]}",
                    )
                # another client of this process may hold the room: it does not notify us
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._returned.wait(), 0.5)


class GroupWriter:
    """Group commit: whatever arrived while the last write was under way is written together.

    `cache.put_many(rows)` is called in a thread; `put` returns when the row survives a kill.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Any, str, dict[str, Any], asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def put(self, cache: Any, key: str, row: dict[str, Any]) -> None:
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((cache, key, row, written))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write())
        await written

    async def _write(self) -> None:
        while self._pending:
            batch, self._pending = self._pending, []
            caches = {id(cache): cache for cache, *_ in batch}
            for name, cache in caches.items():
                mine = [entry for entry in batch if id(entry[0]) == name]
                try:
                    await asyncio.to_thread(cache.put_many, {key: row for _, key, row, _ in mine})
                except Exception as error:
                    for *_, written in mine:
                        if not written.done():
                            written.set_exception(error)
                else:
                    for *_, written in mine:
                        if not written.done():
                            written.set_result(None)


class Session(Protocol[ItemIn, ResultOut]):
    """Made inside the worker's event loop: answers one item, closes what it opened."""

    async def one(self, item: ItemIn) -> ResultOut: ...

    async def close(self) -> None: ...


def work_through(
    name: str,
    items: Sequence[I],
    open_session: Callable[[], Session[I, R]],
    *,
    at_once: int,
    every_s: float = 0.5,
    on_turn: Callable[[], None] | None = None,
) -> Iterator[R]:
    """Results in the order in which they are ready, from an event loop in a thread of its own.

    `at_once`: items under way, those that wait for a retry included; `on_turn` is called about every
    `every_s` seconds and after each result. The first error ends it, once requests under way have brought
    their answers home. Leaving the iterator cancels what is under way, as a kill would.
    """
    results: queue.Queue[tuple[R] | BaseException | None] = queue.Queue()
    worker = _Worker(name, items, open_session, at_once, results)
    worker.start()
    try:
        while True:
            try:
                result = results.get(timeout=every_s)
            except queue.Empty:
                if not worker.is_alive() and results.empty():
                    raise RuntimeError(f"the thread {name!r} ended without a word") from None
                if on_turn is not None:
                    on_turn()
                continue
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            if on_turn is not None:
                on_turn()
            yield result[0]
    finally:
        worker.cancel()
        worker.join()


class _Worker(threading.Thread):
    def __init__(
        self,
        name: str,
        items: Sequence[Any],
        open_session: Callable[[], Session[Any, Any]],
        at_once: int,
        results: queue.Queue[Any],
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._items = items
        self._open_session = open_session
        self._at_once = at_once
        self._results = results
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._cancelled = threading.Event()

    def run(self) -> None:
        try:
            asyncio.run(self._main())
        except asyncio.CancelledError:
            self._results.put(None)
        except BaseException as error:
            # handed to the thread that reads the results, which raises it
            self._results.put(error)
        else:
            self._results.put(None)

    def cancel(self) -> None:
        """Stop at once; answers under way are lost, as in a kill."""
        self._cancelled.set()
        loop, task = self._loop, self._task
        if loop is not None and task is not None and self.is_alive():
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)

    async def _main(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        if self._cancelled.is_set():
            return
        session = self._open_session()
        failures: list[BaseException] = []
        room = asyncio.Semaphore(self._at_once)
        tasks: set[asyncio.Task[None]] = set()

        async def one(item: Any) -> None:
            self._results.put((await session.one(item),))

        def finished(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            room.release()
            if not task.cancelled() and (error := task.exception()) is not None:
                failures.append(error)

        try:
            for item in self._items:
                await room.acquire()
                if failures:
                    break
                task = asyncio.create_task(one(item))
                tasks.add(task)
                task.add_done_callback(finished)
            # after a failure requests under way still bring their answers home; those that wait stop by
            # themselves
            while tasks:
                await asyncio.wait(tasks)
                await asyncio.sleep(0)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await session.close()
        if failures:
            raise failures[0]
