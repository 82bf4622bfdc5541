"""The judge as Dagster injects it: options in, a `Judge` out. The only module of this room that knows
Dagster.

What a judge asks (rubric.py), how it reads answers (scoring.py) and how it works (openai_judge.py,
local_judge.py) live beside this file and are imported when a judge is first made, never when definitions
load.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from resources.judges.protocol import CacheFor, Judge, OnProgress, ReferenceLogprob
from storage.errors import UserError


class JudgeResource(dg.ConfigurableResource):
    """Which judge scores scenarios, responses and steered answers.

    `auto` takes an LLM judge over the OpenAI protocol when OPENAI_API_KEY or OPENAI_BASE_URL is set (or
    `api_key` or
    `base_url` here), otherwise the local stand-in. Limits of 0 mean no limit.
    """

    backend: Literal["auto", "openai", "local"] = Field(default="auto", description="auto, openai or local.")
    model: str = Field(default="gpt-4.1-mini", description="Judge model, as the server names it.")
    variant: str = Field(
        default="",
        description="What the model's name does not say (weights, quantisation): another variant is another judge.",
    )
    base_url: str | None = Field(
        default=None,
        description="OpenAI-compatible server (vLLM, Ollama, llama.cpp); default OPENAI_BASE_URL.",
    )
    api_key: str | None = Field(
        default=None, repr=False, description="Give it as an EnvVar; default the variable OPENAI_API_KEY."
    )
    scoring: Literal["auto", "logprobs", "text"] = Field(
        default="auto", description="Read scores from log-probabilities, from the text, or find out (auto)."
    )
    min_mass: float = Field(
        default=0.25, ge=0, le=1, description="Least probability mass on the numbers 0–100."
    )
    show_prompt: bool = Field(
        default=True, description="Show the scenario as context when a response is judged."
    )
    max_text_chars: int = Field(
        default=24_000, ge=100, description="A longer text is an abstention (too_long); nothing is cut off."
    )
    retry_abstentions: bool = Field(
        default=False, description="Ask again where a stored answer was an abstention."
    )
    max_concurrency: int = Field(default=20, ge=1, description="Requests in flight at once.")
    requests_per_minute: int = Field(default=0, ge=0, description="Client-side rate limit.")
    timeout_s: float = Field(default=60.0, gt=0, description="Time limit of one request.")
    max_attempts: int = Field(
        default=8, ge=1, description="Tries per question for server faults and timeouts."
    )
    max_wait_s: float = Field(
        default=900.0, gt=0, description="Longest time one question may wait on rate limits."
    )
    max_calls: int = Field(default=0, ge=0, description="Budget of answered calls per process.")
    max_tokens: int = Field(default=0, ge=0, description="Budget of prompt + completion tokens per process.")
    max_cost_usd: float = Field(default=0.0, ge=0, description="Budget of cost per process.")
    prompt_usd_per_million: float | None = Field(
        default=None, ge=0, description="Price; known for OpenAI models."
    )
    completion_usd_per_million: float | None = Field(
        default=None, ge=0, description="Price; known for OpenAI models."
    )

    def resolved_backend(self) -> Literal["openai", "local"]:
        if self.backend != "auto":
            return self.backend
        return "openai" if self._key() or self._base_url() else "local"

    def identity(self) -> dict[str, Any]:
        """What decides a score apart from the item; needs no network, no model and no key."""
        if self.resolved_backend() == "local":
            from resources.judges.local_judge import local_identity

            return local_identity()
        from resources.judges.openai_judge import openai_identity

        return openai_identity(self._settings())

    def judge(
        self,
        cache_for: CacheFor,
        reference: ReferenceLogprob | None = None,
        on_progress: OnProgress | None = None,
    ) -> Judge:
        """A judge that keeps its answers in `cache_for(trait)`.

        `reference` serves the local judge's coherence. `on_progress` is called now and then with `usage()`.
        Raises UserError when an LLM judge is asked for without key and server.
        """
        if self.resolved_backend() == "local":
            from resources.judges.local_judge import LocalJudge

            return LocalJudge(cache_for, reference, on_progress)
        if not self._key() and not self._base_url():
            raise UserError(
                "an LLM judge needs a key or a server, and neither is set",
                where="judge",
                remedy="set OPENAI_API_KEY, or OPENAI_BASE_URL for your own server, or use backend `local`",
            )
        from resources.judges.openai_judge import OpenAIJudge

        return OpenAIJudge(self._settings(), cache_for, on_progress, api_key=self._key())

    def _key(self) -> str | None:
        return self.api_key or os.environ.get("OPENAI_API_KEY") or None

    def _base_url(self) -> str | None:
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or None

    def _settings(self) -> Any:
        from resources.judges.openai_judge import OpenAISettings

        return OpenAISettings(
            model=self.model,
            base_url=self._base_url(),
            variant=self.variant,
            scoring=self.scoring,
            min_mass=self.min_mass,
            show_prompt=self.show_prompt,
            max_text_chars=self.max_text_chars,
            retry_abstentions=self.retry_abstentions,
            max_concurrency=self.max_concurrency,
            requests_per_minute=self.requests_per_minute,
            timeout_s=self.timeout_s,
            max_attempts=self.max_attempts,
            max_wait_s=self.max_wait_s,
            max_calls=self.max_calls,
            max_tokens=self.max_tokens,
            max_cost_usd=self.max_cost_usd,
            prompt_usd_per_million=self.prompt_usd_per_million,
            completion_usd_per_million=self.completion_usd_per_million,
        )
