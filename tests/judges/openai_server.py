"""A real HTTP server on the loopback that speaks the OpenAI chat-completions protocol, with scripted faults.

Part of the tests, not of the product. By default it reads the marked sections of a judge's question and
answers a score by a word rule, so that the whole pipeline can run against it:

    server.base_url                       http://127.0.0.1:PORT/v1
    server.teach(trait, positives, negatives)   words that tell the sides apart; untaught traits use their
    rubric's words server.faults = Faults(rate_limited=0.6, retry_after=0.05, …)      shares of requests,
    drawn by prompt and attempt server.script = lambda request: Reply(…) or None                   None: as
    usual server.tokeniser = "whole" | "digits" | "space" | "few" | "none"   how numbers stand among the
    log-probabilities server.reject = {"max_tokens", "logprobs", "temperature", "system"}
    server.requests, server.asked[key], server.answered[key], server.outcome[key], server.replied[outcome]
        what happened
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

WORD = re.compile(r"[^\W\d_]{2,}")
SECTION = re.compile(r"<<<BEGIN (\w+) (\w+)>>>\n(.*?)\n<<<END \1 \2>>>", re.DOTALL)


@dataclass(frozen=True)
class Faults:
    """Shares of requests; the rest is answered. `hang_s`: how long a hanging request is left without an
    answer."""

    rate_limited: float = 0.0
    retry_after: float = 0.05
    server_error: float = 0.0
    reset: float = 0.0
    hang: float = 0.0
    hang_s: float = 5.0
    garbage: float = 0.0
    content_filter: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    attempt: int
    at: float

    @property
    def prompt(self) -> str:
        return "\n\n".join(message["content"] for message in self.body["messages"])

    @property
    def key(self) -> str:
        return hashlib.sha256(self.prompt.encode("utf-8", "replace")).hexdigest()[:16]

    @property
    def sections(self) -> dict[str, str]:
        return {name: text for name, _, text in SECTION.findall(self.prompt)}

    @property
    def trait(self) -> str | None:
        match = re.search(r"^Trait: (\S+)$", self.prompt, re.MULTILINE)
        return match[1] if match else None


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: dict[str, Any] | str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    reset: bool = False
    outcome: str = "scripted"


def error_body(
    message: str, code: str | None = None, param: str | None = None, kind: str | None = None
) -> dict:
    return {
        "error": {"message": message, "type": kind or "invalid_request_error", "code": code, "param": param}
    }


def completion(
    text: str | None,
    top: Sequence[tuple[str, float]] | None = None,
    *,
    finish: str = "stop",
    refusal: str | None = None,
    model: str = "loopback-1",
    prompt_tokens: int = 100,
    completion_tokens: int = 2,
) -> dict[str, Any]:
    """A chat-completions body; `top`: (token, probability) of the first token."""
    logprobs = None
    if top is not None:
        entries = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in top]
        logprobs = {"content": [{**entries[0], "top_logprobs": entries}]}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": refusal},
                "logprobs": logprobs,
                "finish_reason": finish,
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


GARBAGE = "It depends on 7 things, said the 2 of them."


class OpenAIServer:
    def __init__(self, port: int = 0) -> None:
        self.faults = Faults()
        self.script: Callable[[Request], Reply | None] | None = None
        self.rule: Callable[[Request], float] = self.word_rule
        self.tokeniser = "whole"
        self.reject: set[str] = set()
        self.latency_s = 0.0
        # the server's own rate limit, requests per second; 0: none
        self.capacity = 0.0
        self.requests: list[Request] = []
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.outcome: dict[str, str] = {}
        self.replied: Counter[str] = Counter()
        self.in_flight = 0
        self.most_in_flight = 0
        self._words: dict[str, dict[str, float]] = {}
        self._port = port
        self._tokens = 0.0
        self._refilled = time.monotonic()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="openai-server", daemon=True)

    # life

    def start(self) -> OpenAIServer:
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError("the server did not start")
        return self

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(10)

    def __enter__(self) -> OpenAIServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def reset(self) -> None:
        """Forget what was asked so far; behaviour stays."""
        self.requests.clear()
        for table in (self.asked, self.answered, self.outcome, self.replied):
            table.clear()
        self.most_in_flight = 0

    # what it answers

    def teach(self, trait: str, positives: Sequence[str], negatives: Sequence[str]) -> None:
        self._words[trait] = log_odds(positives, negatives)

    def word_rule(self, request: Request) -> float:
        """0–100. Coherence: 90 times the share of distinct 3-grams; on topic: 90; a trait: by its words."""
        sections = request.sections
        text = list(sections.values())[-1] if sections else ""
        words = WORD.findall(text.lower())
        if "TEXT" in sections:
            grams = list(zip(words, words[1:], words[2:], strict=False))
            return 90.0 if "PROMPT" in sections or not grams else 90.0 * len(set(grams)) / len(grams)
        trait = request.trait or ""
        if trait not in self._words:
            prompt = request.prompt
            high = re.search(r"HIGH.*?(?=\n\s*(?:MID|LOW)\b|\Z)", prompt, re.DOTALL)
            low = re.search(r"LOW.*?(?=\n\n|\Z)", prompt, re.DOTALL)
            self.teach(trait, [high[0] if high else ""], [low[0] if low else ""])
        table = self._words[trait]
        if not words:
            return 50.0
        evidence = sum(table.get(word, 0.0) for word in words) / math.sqrt(len(words))
        return 100.0 / (1.0 + math.exp(-1.5 * evidence))

    def _answer(self, request: Request) -> Reply:
        if self.script is not None:
            reply = self.script(request)
            if reply is not None:
                return reply
        refused = self._refused(request)
        if refused is not None:
            return refused
        if self.capacity and not self._take():
            return Reply(
                429,
                error_body("Rate limit reached", "rate_limit_exceeded"),
                {"retry-after": str(self.faults.retry_after)},
                outcome="rate_limited",
            )
        fault = self._fault(request)
        if fault is not None:
            return fault
        value = round(max(0.0, min(100.0, self.rule(request))))
        return Reply(200, self.scored(value, request), outcome="score")

    def _refused(self, request: Request) -> Reply | None:
        for param in ("max_tokens", "temperature", "logprobs", "top_logprobs", "max_completion_tokens"):
            if param in self.reject and param in request.body:
                return Reply(
                    400,
                    error_body(
                        f"Unsupported parameter: '{param}' is not supported with this model.",
                        "unsupported_parameter",
                        param,
                    ),
                    outcome="refused",
                )
        if "system" in self.reject and request.body["messages"][0]["role"] == "system":
            return Reply(400, error_body("System role not supported"), outcome="refused")
        return None

    def _take(self) -> bool:
        now = time.monotonic()
        self._tokens = min(self.capacity, self._tokens + (now - self._refilled) * self.capacity)
        self._refilled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _fault(self, request: Request) -> Reply | None:
        f = self.faults
        draw = random.Random(f"{f.seed} {request.key} {request.attempt}").random()
        name = None
        for kind, share in (
            ("rate_limited", f.rate_limited),
            ("server_error", f.server_error),
            ("reset", f.reset),
            ("hang", f.hang),
            ("garbage", f.garbage),
            ("content_filter", f.content_filter),
        ):
            if name is None and draw < share:
                name = kind
            draw -= share
        if name is None:
            return None
        if name == "rate_limited":
            headers = {"retry-after": f"{f.retry_after:g}"}
            return Reply(429, error_body("Rate limit reached", "rate_limit_exceeded"), headers, outcome=name)
        if name == "server_error":
            return Reply(500, error_body("The server had an error", kind="server_error"), outcome=name)
        if name == "reset":
            return Reply(reset=True, outcome=name)
        if name == "hang":
            return Reply(200, completion("50"), delay_s=f.hang_s, outcome=name)
        if name == "garbage":
            top = [("It", 0.8), ("The", 0.1), ("Well", 0.05)] if request.body.get("logprobs") else None
            return Reply(200, completion(GARBAGE, top, completion_tokens=8), outcome=name)
        return Reply(
            400,
            error_body("The response was filtered", "content_filter"),
            outcome="content_filter",
        )

    def scored(self, value: int, request: Request) -> dict[str, Any]:
        """A completion that says `value`, with log-probabilities in the manner of the tokeniser if they were
        asked."""
        text = str(value)
        if not request.body.get("logprobs") or self.tokeniser == "none":
            return completion(text)
        wanted = int(request.body.get("top_logprobs", 1))
        near = [n for n in (value, value - 5, value + 5, value - 10, value + 10) if 0 <= n <= 100]
        # a spread as models show it: mass near the value, crumbs on round numbers
        others = [n for n in (0, 10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 100) if n not in near]
        if self.tokeniser == "digits":
            first = int(text[0])
            tokens = [(str(d), 0.9 if d == first else 0.01) for d in range(10)]
            tokens.sort(key=lambda entry: -entry[1])
            return completion(text, tokens[:wanted], completion_tokens=len(text))
        tokens = [(str(n), p) for n, p in zip(near, (0.8, 0.06, 0.06, 0.02, 0.02), strict=False)]
        tokens += [(str(n), 0.001) for n in others]
        if self.tokeniser == "space":
            tokens = [(f" {token}", p * 0.7) for token, p in tokens] + [
                (token, p * 0.3) for token, p in tokens
            ]
        if self.tokeniser == "few":
            tokens = [(text, 0.3), (str(min(100, value + 5)), 0.1), ("The", 0.4)]
        tokens.sort(key=lambda entry: -entry[1])
        return completion(text, tokens[:wanted], completion_tokens=1)

    # HTTP

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self._port, backlog=512)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {
                    name.strip().lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in head[1:] if line)
                }
                raw = await reader.readexactly(int(headers.get("content-length", "0")))
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    reply = self._handle(head[0].split()[1], headers, raw)
                    if reply.delay_s or self.latency_s:
                        await asyncio.sleep(reply.delay_s or self.latency_s)
                finally:
                    self.in_flight -= 1
                if reply.reset:
                    # linger 0: the peer sees a reset, not an orderly end
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                    return
                body = reply.body if isinstance(reply.body, str) else json.dumps(reply.body or {})
                data = body.encode()
                fields = {
                    "content-type": "application/json",
                    "content-length": str(len(data)),
                    **reply.headers,
                }
                lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
                writer.write(f"HTTP/1.1 {reply.status} X\r\n{lines}\r\n".encode() + data)
                await writer.drain()
        writer.close()

    def _handle(self, path: str, headers: dict[str, str], raw: bytes) -> Reply:
        if not path.endswith("/chat/completions"):
            return Reply(404, error_body("no such path"))
        request = Request(path, headers, json.loads(raw), 0, time.monotonic())
        key = request.key
        request = Request(path, headers, request.body, self.asked[key], request.at)
        self.asked[key] += 1
        self.requests.append(request)
        reply = self._answer(request)
        self.replied[reply.outcome] += 1
        if reply.outcome in ("score", "garbage", "content_filter") or (
            reply.outcome == "scripted" and reply.status == 200 and not reply.reset
        ):
            self.answered[key] += 1
            self.outcome[key] = reply.outcome
        return reply


def log_odds(positives: Sequence[str], negatives: Sequence[str]) -> dict[str, float]:
    """Smoothed log-odds per word, by the number of texts that hold it."""
    sides = [
        Counter(w for t in texts for w in set(WORD.findall(t.lower()))) for texts in (positives, negatives)
    ]
    n_pos, n_neg = len(positives), len(negatives)
    return {
        word: math.log((sides[0][word] + 0.5) / (n_pos + 1)) - math.log((sides[1][word] + 0.5) / (n_neg + 1))
        for word in {*sides[0], *sides[1]}
    }


def teach_shipped(server: OpenAIServer, root: Any) -> None:
    """Teach every trait folder under `root` (…/datasets/traits)."""
    for folder in sorted(root.glob("*/*")):
        sides = [folder / "positive.txt", folder / "negative.txt"]
        if all(side.is_file() for side in sides):
            texts = [side.read_text(encoding="utf-8").splitlines() for side in sides]
            server.teach(f"{folder.parent.name}/{folder.name}", *texts)
