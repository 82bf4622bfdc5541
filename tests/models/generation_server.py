"""A loopback server that speaks the completions protocol with token ids, as vLLM and SGLang do, with faults.

Part of the tests. It stands on tests/judges/openai_server.py (connections, faults) and answers other paths:

    server.continues(prompt_ids, max_tokens) -> (ids, finish)   what it generates; default: ids of its own
    server.tokenizer                      what /tokenize cuts with; None: there is no such path
    server.card                           the entry of /v1/models
    server.spoil = lambda choice, request: …   changes a finished answer in place
    server.faults, server.latency_s, server.asked, server.answered   as there; keys are prompts as tuples
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


def _base() -> ModuleType:
    import importlib.util

    name = "tests_openai_server"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "judges" / "openai_server.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


base = _base()
Faults, Reply = base.Faults, base.Reply
STOP = 2


@dataclass(frozen=True)
class Asked:
    """One request for a completion. `key`: the prompt, by which attempts are counted."""

    body: dict[str, Any]
    headers: dict[str, str]
    attempt: int
    at: float

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.body["prompt"]).encode()).hexdigest()[:16]


def invented(prompt: list[int], max_tokens: int) -> tuple[list[int], str]:
    """Ids that follow from the prompt; every third response ends by itself half way."""
    seed = int(hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:8], 16)
    ids = [100 + (seed + 37 * i) % 900 for i in range(max_tokens)]
    if seed % 3 == 0:
        return [*ids[: max_tokens // 2], STOP], "stop"
    return ids, "length"


class GenerationServer(base.OpenAIServer):  # type: ignore[misc, name-defined]
    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.continues: Callable[[list[int], int], tuple[list[int], str]] = invented
        self.tokenizer: Any = None
        self.card: dict[str, Any] = {"id": "served", "owned_by": "vllm", "max_model_len": 2048}
        self.spoil: Callable[[dict[str, Any], Asked], None] | None = None
        self.refuse: Callable[[Asked], Any] | None = None
        self.completions: list[Asked] = []
        self.paths: list[str] = []

    def _handle(self, path: str, headers: dict[str, str], raw: bytes) -> Any:
        self.paths.append(path)
        if path == "/v1/models":
            return Reply(200, {"object": "list", "data": [self.card]})
        if path == "/version" and self.card.get("owned_by") == "vllm":
            return Reply(200, {"version": "0.0-loopback"})
        if path == "/tokenize" and self.tokenizer is not None:
            body = json.loads(raw)
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return Reply(200, {"tokens": list(ids), "count": len(ids), "max_model_len": 2048})
        if path != "/v1/completions":
            return Reply(404, base.error_body("no such path"))
        body = json.loads(raw)
        if body["model"] != self.card["id"]:
            return Reply(404, base.error_body(f"The model `{body['model']}` does not exist."))
        if isinstance(body["prompt"], str):
            # only how it reads a text is asked here
            return Reply(200, self._text(body))
        asked = Asked(body, headers, 0, time.monotonic())
        asked = Asked(body, headers, self.asked[asked.key], asked.at)
        self.asked[asked.key] += 1
        self.completions.append(asked)
        if self.refuse is not None:
            refused = self.refuse(asked)
            if refused is not None:
                return refused
        if self.capacity and not self._take():
            retry = {"retry-after": str(self.faults.retry_after)}
            return Reply(429, base.error_body("Rate limit reached", "rate_limit_exceeded"), retry)
        fault = self._fault(asked)
        if fault is not None and fault.outcome in ("rate_limited", "server_error", "reset"):
            return fault
        answer = self._answer_ids(asked)
        if fault is not None and fault.outcome == "garbage":
            answer = {"choices": [{"text": "…", "finish_reason": "stop", "token_ids": ["a", None]}]}
        if fault is not None and fault.outcome == "hang":
            return Reply(200, answer, delay_s=self.faults.hang_s)
        self.answered[asked.key] += 1
        return Reply(200, answer)

    def _text(self, body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length", "token_ids": [5]}
        if self.shows_prompts:
            choice["prompt_token_ids"] = list(
                self.text_tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            )
        return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}

    shows_prompts = True
    text_tokenizer: Any = None

    def _answer_ids(self, asked: Asked) -> dict[str, Any]:
        ids, finish = self.continues(asked.body["prompt"], asked.body["max_tokens"])
        choice: dict[str, Any] = {
            "index": 0,
            "text": "never to be read",
            "finish_reason": finish,
            "stop_reason": None,
        }
        if asked.body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": asked.body["prompt"]}
        body = {
            "id": "cmpl-1",
            "object": "text_completion",
            "model": self.card["id"],
            "choices": [choice],
            "usage": {"prompt_tokens": len(asked.body["prompt"]), "completion_tokens": len(ids)},
        }
        if self.spoil is not None:
            self.spoil(choice, asked)
        return body
