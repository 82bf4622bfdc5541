"""An LLM judge over the OpenAI chat-completions protocol: OpenAI itself, vLLM, Ollama, llama.cpp and their
like.

Turns items into questions (rubric.py), gets them answered (client.py) in a thread of its own, keeps every
answer under (model, rubric version, rendered prompt), and reads scores from the kept answers (scoring.py).
What is kept is the raw answer: another limit of mass re-reads, and never asks again. No HTTP here, no
wording, no Dagster.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from resources.api_client import GaveUp, GroupWriter, Ledger, check_key, work_through
from resources.judges.client import Answer, ChatClient, ClientSettings, Mode, ledger_of, server_mark
from resources.judges.protocol import Abstention, CacheFor, JudgeItem, Judgement, RowCacheLike, Score
from resources.judges.rubric import OFF_TOPIC_CAP, ON_TOPIC, VERSIONS, Rendered, render, render_on_topic
from resources.judges.scoring import MIN_MASS, SCORING_VERSION, Reading, read_logprobs, read_text
from storage.manifest import fingerprint

log = logging.getLogger(__name__)

# items under way at once, as a multiple of the requests in flight: those beyond wait for a retry
WINDOW = 8
PROGRESS_EVERY_S = 0.5
# a prompt of fewer words is within every server's context; servers that count cached tokens apart would look
# as if they had cut it
COUNTED_FROM_WORDS = 1000
# a reading that is not final: the same question has to be asked for a text
ASK_TEXT = "ask_text"


@dataclass(frozen=True)
class OpenAISettings(ClientSettings):
    """The client's settings and how answers are read. Everything that decides a score is in
    `openai_identity`.

    `variant`: what the model's name does not say, such as weights or quantisation.
    """

    variant: str = ""
    scoring: Literal["auto", "logprobs", "text"] = "auto"
    min_mass: float = MIN_MASS
    show_prompt: bool = True
    max_text_chars: int = 24_000
    retry_abstentions: bool = False


def openai_identity(settings: OpenAISettings) -> dict[str, Any]:
    """What decides a score apart from the item. The address is left out: the same model elsewhere is the same
    judge; `variant` tells two models of one name apart."""
    host = urlsplit(settings.base_url).hostname if settings.base_url else None
    return {
        "kind": "openai",
        "api": "openai" if host in (None, "api.openai.com") else "compatible",
        "model": settings.model,
        **({"variant": settings.variant} if settings.variant else {}),
        "rubrics": dict(VERSIONS),
        "scoring": f"{settings.scoring}/{SCORING_VERSION}",
        "min_mass": settings.min_mass,
        "show_prompt": settings.show_prompt,
        "max_text_chars": settings.max_text_chars,
    }


@dataclass(frozen=True)
class _Ask:
    rendered: Rendered
    trait: str
    mode: Mode
    key: str


# A judgement in steps: yields a question, is sent its answer, returns the judgement. The same steps run over
# the cache alone and over the network.
_Steps = Generator[_Ask, Answer, Judgement]


class OpenAIJudge:
    """See the module. Answers are put into `cache_for(trait)` as they come."""

    stand_in = False

    def __init__(
        self,
        settings: OpenAISettings,
        cache_for: CacheFor,
        on_progress: Callable[[Mapping[str, float]], None] | None = None,
        *,
        api_key: str | None = None,
    ) -> None:
        settings.check()
        self.settings = settings
        self._cache_for = cache_for
        self._on_progress = on_progress
        self._api_key = check_key(api_key, "OPENAI_API_KEY")
        self._caches: dict[str, RowCacheLike] = {}
        self._counts: Counter[str] = Counter()
        self._of_trait: dict[str, Counter[str]] = {}
        self._elsewhere = 0
        self._spent = Ledger()
        self._text_only = settings.scoring == "text"
        self._told = 0.0

    def __repr__(self) -> str:
        return f"OpenAIJudge({self.settings.model!r})"

    @property
    def identity(self) -> dict[str, Any]:
        return openai_identity(self.settings)

    def usage(self, trait: str | None = None) -> dict[str, float]:
        """Besides what the protocol names: requests and retries, whether the cost is known (`priced` 1 or 0),
        and for each budget what this process has spent of it: budget_calls, budget_calls_spent …, also of
        tokens and usd."""
        price = self.settings.price()
        if trait is not None:
            counts = self._of_trait.get(trait, Counter())
            spent = Ledger(
                calls=counts["calls"],
                prompt_tokens=counts["prompt_tokens"],
                completion_tokens=counts["completion_tokens"],
            )
        else:
            counts, spent = self._counts, self._spent
        usage = {
            "calls": float(spent.calls),
            "cache_hits": float(counts["cache_hits"]),
            "prompt_tokens": float(spent.prompt_tokens),
            "completion_tokens": float(spent.completion_tokens),
            "cost_usd": spent.cost(price),
            "abstentions": float(counts["abstentions"]),
            "priced": 0.0 if price is None else 1.0,
        }
        if trait is None:
            usage |= {"requests": float(spent.requests), "retries": float(spent.retries)} | self._budget()
        return usage

    def _budget(self) -> dict[str, float]:
        s, ledger = self.settings, ledger_of(self.settings)
        limits = {
            "calls": (s.max_calls, ledger.calls),
            "tokens": (s.max_tokens, ledger.prompt_tokens + ledger.completion_tokens),
            "usd": (s.max_cost_usd, ledger.cost(s.price())),
        }
        named: dict[str, float] = {}
        for name, (limit, spent) in limits.items():
            if limit:
                named |= {f"budget_{name}": float(limit), f"budget_{name}_spent": float(spent)}
        return named

    def _count(self, trait: str, **amounts: int) -> None:
        of_trait = self._of_trait.setdefault(trait, Counter())
        of_trait.update(amounts)
        self._counts.update(amounts)

    def score(
        self, items: Sequence[JudgeItem], *, on_judged: Callable[[Judgement], None] | None = None
    ) -> Iterator[Judgement]:
        """Judgements in the order of `items`; `on_judged` sees each one as soon as it exists, out of order.

        UserError (key, quota, model, budget, unreachable server) ends the run; all answers until then are
        kept.
        """
        done: dict[int, Judgement] = {}
        following = 0
        for i, judgement in self._judged(items):
            if isinstance(judgement, Abstention):
                self._count(items[i].context.trait, abstentions=1)
            if on_judged is not None:
                on_judged(judgement)
            done[i] = judgement
            while following in done:
                yield done.pop(following)
                following += 1
        if self._elsewhere:
            _say_elsewhere(self.settings.model, self._elsewhere)

    # what an item needs, step by step

    def _steps(self, item: JudgeItem) -> _Steps:
        text = item.prompt if item.rubric == "scenario" else item.text
        if not text.strip():
            return Abstention(item.key, "empty")
        if len(item.prompt) + len(item.text) > self.settings.max_text_chars:
            return Abstention(item.key, "too_long", {"chars": len(item.prompt) + len(item.text)})
        rendered = render(item, show_prompt=self.settings.show_prompt)
        reading, answer = yield from self._reading(item, rendered)
        detail = _detail(reading, answer, rendered)
        if reading.value is None:
            return Abstention(item.key, reading.reason or "unparseable", detail)
        value = reading.value
        if item.rubric == "coherence" and value > OFF_TOPIC_CAP and item.prompt.strip():
            topic, _ = yield from self._reading(item, render_on_topic(item))
            if topic.value is None:
                return Abstention(item.key, topic.reason or "unparseable", {**detail, "question": "on_topic"})
            detail |= {"language": value, "on_topic": topic.value}
            if topic.value < ON_TOPIC:
                value = OFF_TOPIC_CAP
        return Score(item.key, value, reading.mass, detail)

    def _reading(
        self, item: JudgeItem, rendered: Rendered
    ) -> Generator[_Ask, Answer, tuple[Reading, Answer]]:
        """Ask, and ask again for a text where the first token of the answer could not be read as a number."""
        trait = item.context.trait
        mode: Mode = "text" if self._text_only else "logprobs"
        answer = yield _Ask(rendered, trait, mode, self._key(rendered, mode))
        reading = self._read(rendered, answer)
        if reading.reason == ASK_TEXT:
            answer = yield _Ask(rendered, trait, "text", self._key(rendered, "text"))
            reading = self._read(rendered, answer)
        return reading, answer

    def _read(self, rendered: Rendered, answer: Answer) -> Reading:
        cut = cut_by_the_server(rendered, answer)
        if cut is not None:
            return cut
        return read_answer(answer, min_mass=self.settings.min_mass, texts=self.settings.scoring != "logprobs")

    def _key(self, rendered: Rendered, mode: Mode) -> str:
        """Where an answer is kept: judge model, rubric version, rendered prompt, and how it was asked."""
        api = openai_identity(self.settings)["api"]
        parts = [api, self.settings.model, rendered.rubric, rendered.system, rendered.user, mode]
        return fingerprint([*parts, self.settings.variant] if self.settings.variant else parts)

    def _cache(self, trait: str) -> RowCacheLike:
        if trait not in self._caches:
            self._caches[trait] = self._cache_for(trait)
        return self._caches[trait]

    def _kept(self, ask: _Ask) -> Answer | None:
        row = self._cache(ask.trait).get(ask.key)
        if row is None:
            return None
        answer = Answer.from_record(row)
        if answer.server not in (None, server_mark(self.settings.base_url)):
            self._elsewhere += 1
        if self.settings.retry_abstentions:
            reading = self._read(ask.rendered, answer)
            if reading.value is None and reading.reason != ASK_TEXT:
                return None
        return answer

    def _from_cache(self, item: JudgeItem) -> Judgement | None:
        """The judgement if every question it needs was answered before."""
        steps = self._steps(item)
        hits = 0
        try:
            ask = next(steps)
            while True:
                answer = self._kept(ask)
                if answer is None:
                    return None
                hits += 1
                ask = steps.send(answer)
        except StopIteration as end:
            self._count(item.context.trait, cache_hits=hits)
            judgement: Judgement = end.value
            return judgement

    # the thread that asks

    def _judged(self, items: Sequence[JudgeItem]) -> Iterator[tuple[int, Judgement]]:
        open_items: list[int] = []
        for i, item in enumerate(items):
            judgement = self._from_cache(item)
            if judgement is None:
                open_items.append(i)
            else:
                yield i, judgement
        if not open_items:
            return
        left = len(open_items)

        def tell() -> None:
            self._progress(len(items), left)

        try:
            for result in work_through(
                "judge",
                open_items,
                lambda: _Session(self, items),
                at_once=WINDOW * self.settings.max_concurrency,
                every_s=PROGRESS_EVERY_S,
                on_turn=tell,
            ):
                left -= 1
                yield result
        finally:
            self._progress(len(items), left, last=True)

    def _progress(self, total: int, left: int, *, last: bool = False) -> None:
        if self._on_progress is None:
            return
        now = time.monotonic()
        if last or now - self._told >= PROGRESS_EVERY_S:
            self._told = now
            self._on_progress({**self.usage(), "items": float(total), "items_left": float(left)})


def read_answer(answer: Answer, *, min_mass: float, texts: bool = True) -> Reading:
    """The score in an answer or the reason for its absence; ASK_TEXT when only a longer answer can tell.

    `texts` False: log-probabilities or nothing.
    """
    if answer.filtered:
        return Reading(None, "content_filter")
    if answer.refusal:
        return Reading(None, "refusal")
    cut = answer.mode == "logprobs" and answer.finish == "length"
    if answer.mode == "logprobs" and answer.top:
        reading = read_logprobs(answer.top, min_mass=min_mass)
        if reading.value is not None and _continues(answer):
            reading = Reading(None, "split_digits", mass=reading.mass, split_digits=True)
        if reading.split_digits and texts:
            whole = Reading(None, ASK_TEXT) if cut else read_text(answer.text)
            if whole.value is None:
                return Reading(None, ASK_TEXT)
            return Reading(whole.value, mass=reading.mass, split_digits=True, detail=reading.detail)
        if reading.reason == "low_mass" and read_text(answer.text).reason == "refusal":
            return Reading(None, "refusal", mass=reading.mass, detail=reading.detail)
        return reading
    if not texts:
        return Reading(None, "no_logprobs")
    reading = read_text(answer.text)
    if reading.value is None and cut:
        return Reading(None, ASK_TEXT)
    if reading.reason in ("empty", "unparseable") and answer.finish == "length":
        return Reading(None, "unfinished")
    return reading


def _continues(answer: Answer) -> bool:
    """The answer's first number is longer than its first token ("10" of "100", "8" of "85"): then that token
    is a piece of a score, even where its alternatives look like whole numbers."""
    token = max(answer.top or (("", 0.0),), key=lambda entry: entry[1])[0].strip()
    number = re.match(r"\s*([0-9]+)", answer.text)
    return bool(number and token.isdigit() and number[1] != token and number[1].startswith(token))


def cut_by_the_server(rendered: Rendered, answer: Answer) -> Reading | None:
    """An abstention where the server read less of the question than it was sent: some shorten what exceeds
    their context without a word. Every word is a token at least, so fewer tokens than words tell it."""
    words = len(rendered.system.split()) + len(rendered.user.split())
    if words < COUNTED_FROM_WORDS or not 0 < answer.prompt_tokens < words:
        return None
    return Reading(None, "truncated", detail={"words": words, "prompt_tokens": answer.prompt_tokens})


_said: set[str] = set()


def _say_elsewhere(model: str, count: int) -> None:
    """Once per process and model: a name that means another model at another address must not go unnoticed."""
    if model in _said:
        return
    _said.add(model)
    log.warning(
        "%d kept answers of %r came from a server at another address; where that was another model of the "
        "same name, set the judge's option `variant`",
        count,
        model,
    )


def _detail(reading: Reading, answer: Answer, rendered: Rendered) -> dict[str, Any]:
    by_text = reading.split_digits or answer.mode == "text" or not answer.top
    detail: dict[str, Any] = {
        "rubric": rendered.rubric,
        "read": "text" if by_text else "logprobs",
        **reading.detail,
    }
    if answer.model:
        detail["model"] = answer.model
    if rendered.neutralised:
        detail["neutralised"] = rendered.neutralised
    if reading.value is None:
        detail["said"] = (answer.refusal or answer.text)[:200]
        if reading.mass is not None:
            detail["mass"] = reading.mass
    return detail


class _Session:
    """Asks what the cache does not hold, inside the worker's event loop."""

    def __init__(self, judge: OpenAIJudge, items: Sequence[JudgeItem]) -> None:
        self._judge = judge
        self._items = items
        self._client = ChatClient(judge.settings, judge._api_key, judge._spent)
        self._writer = GroupWriter()
        self._flights: dict[str, asyncio.Future[Answer]] = {}

    async def close(self) -> None:
        await self._client.close()

    async def one(self, i: int) -> tuple[int, Judgement]:
        item = self._items[i]
        steps = self._judge._steps(item)
        try:
            ask = next(steps)
            while True:
                ask = steps.send(await self._answer(ask))
        except StopIteration as end:
            return i, end.value
        except GaveUp as given_up:
            return i, Abstention(item.key, given_up.reason, {"last": given_up.detail[:200]})

    async def _answer(self, ask: _Ask) -> Answer:
        """From the cache, from a twin that is being asked right now, or from the server."""
        kept = self._judge._kept(ask)
        if kept is not None:
            self._judge._count(ask.trait, cache_hits=1)
            return kept

        async def keep(answer: Answer) -> None:
            await self._writer.put(self._judge._cache(ask.trait), ask.key, answer.record())

        async def pay_and_keep(answer: Answer) -> None:
            self._judge._count(
                ask.trait,
                calls=1,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
            )
            await keep(answer)

        flight = self._flights.get(ask.key)
        if flight is not None:
            answer = await asyncio.shield(flight)
            # coherence is asked without the trait: the twin may be another trait's, which keeps its own
            await keep(answer)
            return answer
        flight = asyncio.get_running_loop().create_future()
        self._flights[ask.key] = flight
        try:
            answer = await self._client.ask(
                lambda system_role: ask.rendered.messages(system_role=system_role), ask.mode, pay_and_keep
            )
        except BaseException as error:
            flight.set_exception(error)
            # a flight that nobody shared must not warn of an exception never looked at
            flight.exception()
            raise
        finally:
            del self._flights[ask.key]
        flight.set_result(answer)
        return answer
