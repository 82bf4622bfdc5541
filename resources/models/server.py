"""Generation on a vLLM or SGLang server: prompts go out as token ids, responses come back as token ids.

Both speak the OpenAI completions protocol with the same additions: `prompt` may be a list of ids,
`stop_token_ids`, `return_token_ids` (vLLM from 0.10.2, SGLang from its merge of July 2026), and a choice then
carries `token_ids` and `prompt_token_ids`. A server's text is never looked at. Before the first prompt the
server must show that it serves this model (`/v1/models`) and cuts text into the same tokens (`/tokenize`);
what it cannot show is recorded, not assumed. Retries, rates and budgets are those of
`resources/api_client.py`; capture and steering need hooks and stay on loaded models.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from resources.api_client import (
    Again,
    ApiClient,
    GaveUp,
    GroupWriter,
    Ledger,
    ServerSettings,
    Who,
    check_address,
    work_through,
)
from resources.models.frontend import Frontend
from resources.models.rows import (
    EncodedPrompt,
    FinishReason,
    GeneratedRow,
    GenerationOptions,
    GenerationRow,
    ModelIdentity,
)
from storage.errors import UserError

# rows under way at once, as a multiple of the requests in flight: those beyond wait for a retry
WINDOW = 4
_COMMIT = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHE_FOLDER = re.compile(r"models--([^/]+?)--([^/]+)")

# Texts on which tokenizers differ: digits, runs of blanks, accents, scripts, emoji, code, control tokens.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " 1234567890 3.14159 2026-11-25",
    "  two  blanks\tand a tab\n\nand lines\r\n",
    "naïve café Ångström œuvre ﬁ",
    "Übergrößenträger, Straßenbahnhaltestelle",
    "日本語のテキスト 中文字符 한국어",
    "Привет, как дела? שלום عليكم",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}",
    "on the mat, unbelievableness, antidisestablishmentarianism",
    "<|im_end|><|im_start|>user\n</s><s>[INST]<bos><eos>",
)


@dataclass(frozen=True)
class GenerationServer(ServerSettings):
    """A server as the experiment describes it. `model`: the name under which it lists the model; `base_url`
    ends in /v1; `api_key_env`: the variable that holds its key."""

    base_url: str | None = None
    max_concurrency: int = 64
    timeout_s: float = 600.0
    api_key_env: str | None = None

    @property
    def where(self) -> str:
        return f"generation server {self.base_url}"

    def api_key(self) -> str | None:
        """UserError where a variable is named and not set."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise UserError(
                f"the variable {self.api_key_env} is not set",
                where="option `generation.api_key_env`",
                remedy=f"export {self.api_key_env}=…, or leave the option out for a server without a key",
            )
        return key

    def check(self) -> None:
        if not self.base_url:
            raise UserError(
                "no server is named",
                where="option `generation.server_url`",
                remedy="give e.g. http://localhost:8000/v1",
            )
        check_address(
            self.base_url,
            where="option `generation.server_url`",
            key="a variable named by generation.api_key_env",
        )


@dataclass(frozen=True)
class FailedRow:
    """A row that got no answer. `reason`: a slug such as timeout, rejected, too_long, bad_token_ids."""

    key: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class _Served:
    """Ids as the server gave them, the stop token taken off."""

    ids: tuple[int, ...]
    finish: FinishReason
    prompt_tokens: int
    completion_tokens: int


@dataclass
class _Knowledge:
    settled: bool = False
    version: int = 0


_ledgers: dict[tuple[str | None, str], Ledger] = {}


def _who(settings: GenerationServer) -> Who:
    return Who(
        server="the generation server",
        where=settings.where,
        key=settings.api_key_env or "generation.api_key_env",
        options="the options generation.server_url and generation.served_model",
        kept="rows that were answered are kept",
    )


def sampling_seed(row: GenerationRow, options: GenerationOptions) -> int:
    """31 bits from the seed and the row's key alone, as for rows generated here."""
    name = f"{options.seed}\0{row.key if row.seed_key is None else row.seed_key}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def completion_request(
    settings: GenerationServer,
    row: GenerationRow,
    options: GenerationOptions,
    stops: Sequence[int],
    limit: int,
) -> dict[str, Any]:
    """Every parameter that decides the text is said: a server takes what is left out from the model's own
    generation_config."""
    request: dict[str, Any] = {
        "model": settings.model,
        "prompt": list(row.prompt_ids),
        "max_tokens": limit,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1,
        "extra_body": {
            "top_k": options.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": options.repetition_penalty,
            "stop_token_ids": sorted(stops),
            "return_token_ids": True,
        },
    }
    if options.temperature > 0:
        request["seed"] = sampling_seed(row, options)
    return request


def read_completion(body: Any, request: Mapping[str, Any], *, stops: frozenset[int], vocabulary: int) -> Any:
    """The `_Served` ids of a completions body; raises `Again` for one that cannot be right (it is asked for
    again), GaveUp for a filter's; None where the body is no completion at all.

    Right is: ids of the vocabulary, as many as the server says it made, no more than were asked for, exactly
    as many where it stopped for length, ended by a token that ends a response where it stopped by itself,
    after the very prompt that was sent.
    """
    try:
        (choice,) = body["choices"]
        usage = body.get("usage") or {}
        finish = choice.get("finish_reason")
        ids, prompt = choice.get("token_ids"), choice.get("prompt_token_ids")
        reason = choice.get("stop_reason", choice.get("matched_stop"))
        made = int(usage.get("completion_tokens") or 0)
        read = int(usage.get("prompt_tokens") or 0)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if finish == "content_filter":
        raise GaveUp("content_filter")
    if ids is None:
        raise Again("fault", "no_token_ids", detail="the answer carries no token_ids")
    if finish not in ("stop", "length"):
        raise Again("fault", "bad_response", detail=f"it ended with finish_reason {finish!r}")

    def wrong(what: str) -> Again:
        return Again("fault", "bad_token_ids", detail=what)

    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise wrong("token_ids are no list of integers")
    outside = [i for i in ids if not 0 <= i < vocabulary]
    if outside:
        raise wrong(f"token id {outside[0]} lies outside the vocabulary of {vocabulary}")
    sent = request["prompt"]
    if prompt is not None and list(prompt) != sent:
        raise wrong("the prompt that it answered is not the one that was sent")
    if prompt is None and read and read != len(sent):
        raise wrong(f"it read {read} prompt tokens, {len(sent)} were sent")
    limit = int(request["max_tokens"])
    if len(ids) > limit:
        raise wrong(f"{len(ids)} tokens came, {limit} were asked for")
    ended = bool(ids) and ids[-1] in stops
    # a server may leave the token out that ended the response
    if made > len(ids) + (finish == "stop" and not ended):
        raise wrong(f"{len(ids)} token ids came, the server counts {made}")
    if finish == "length" and len(ids) < limit and not ended:
        raise wrong(f"it stopped for length after {len(ids)} of {limit} tokens")
    if finish == "stop" and not ended and reason not in stops and made != len(ids) + 1:
        at = f"token {ids[-1]}" if ids else "nothing"
        raise wrong(f"it stopped at {at}, which ends no response of this model")
    first = next((i for i, token in enumerate(ids) if token in stops), None)
    kept = tuple(ids if first is None else ids[:first])
    stopped = first is not None or finish == "stop"
    return _Served(kept, "stop" if stopped else "length", read or len(sent), made or len(ids))


class _Completions(ApiClient[_Served]):
    def __init__(self, settings: GenerationServer, frontend: Frontend, learnt: _Knowledge, spent: Ledger):
        ledger = _ledgers.setdefault((settings.base_url, settings.model), Ledger())
        super().__init__(settings, _who(settings), learnt, ledger, settings.api_key(), spent)
        self._frontend = frontend

    async def _post(self, client: Any, request: dict[str, Any]) -> Any:
        return await client.completions.with_raw_response.create(**request)

    def _parse(self, body: Any, request: dict[str, Any]) -> _Served | None:
        try:
            served: _Served | None = read_completion(
                body, request, stops=self._frontend.stops, vocabulary=self._frontend.vocabulary
            )
        except Again as again:
            if again.reason == "no_token_ids" and not self.learnt.settled:
                self._stop(
                    "it gives no token ids back, and text is never tokenised again",
                    "use vLLM 0.10.2 or newer, or an SGLang with return_token_ids",
                )
            raise
        return served

    def _usage(self, answer: _Served) -> tuple[int, int]:
        return answer.prompt_tokens, answer.completion_tokens

    def _estimate(self, request: dict[str, Any]) -> int:
        return len(request["prompt"])

    def _limit(self, request: dict[str, Any]) -> int:
        return int(request["max_tokens"])


class _Questions(ApiClient[dict[str, Any]]):
    """What a server says about itself. `optional` requests answer {} where there is no such path."""

    def __init__(self, settings: GenerationServer, learnt: _Knowledge):
        # budgets and rates are about generating
        free = replace(settings, max_calls=0, max_tokens=0, requests_per_minute=0)
        super().__init__(free, _who(settings), learnt, Ledger(), settings.api_key())

    async def say(
        self, path: str, body: dict[str, Any] | None = None, *, optional: bool = False, root: bool = False
    ) -> dict[str, Any]:
        async def keep(answer: dict[str, Any]) -> None:
            return

        url = _root_of(str(self.settings.base_url)) if root else str(self.settings.base_url).rstrip("/")
        return await self.ask_for(lambda: {"url": url + path, "body": body, "optional": optional}, keep)

    async def _post(self, client: Any, request: dict[str, Any]) -> Any:
        # what `with_raw_response` sets; for paths that the client has no method for
        options = {"headers": {"X-Stainless-Raw-Response": "raw"}}
        if request["body"] is None:
            return await client.get(request["url"], cast_to=object, options=options)
        return await client.post(request["url"], cast_to=object, body=request["body"], options=options)

    def _status(self, error: Any, request: dict[str, Any], version: int) -> dict[str, Any]:
        if request["optional"] and error.status_code in (400, 404, 405, 422, 501):
            return {}
        return super()._status(error, request, version)

    def _parse(self, body: Any, request: dict[str, Any]) -> dict[str, Any] | None:
        return body if isinstance(body, dict) else None

    def _usage(self, answer: dict[str, Any]) -> tuple[int, int]:
        return 0, 0

    def _estimate(self, request: dict[str, Any]) -> int:
        return 0


def _root_of(base_url: str) -> str:
    """The address without /v1: where vLLM and SGLang keep what OpenAI does not have."""
    parts = urlsplit(base_url.rstrip("/"))
    return urlunsplit((parts.scheme, parts.netloc, parts.path.removesuffix("/v1"), "", ""))


@dataclass(frozen=True)
class ServerFacts:
    """What a server showed of itself. `revision`: the commit it named, None where it named none;
    `tokenizer`: how its tokenizer was compared."""

    engine: str
    version: str | None
    served_model: str
    root: str | None
    revision: str | None
    max_model_len: int | None
    tokenizer: str
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "engine_version": self.version,
            "served_model": self.served_model,
            "root": self.root,
            "revision": self.revision or "not shown by the server",
            "max_model_len": self.max_model_len,
            "tokenizer": self.tokenizer,
            "notes": list(self.notes),
        }


async def look_at(
    settings: GenerationServer, frontend: Frontend, probes: Sequence[str] = PROBES
) -> ServerFacts:
    """Ask a server what it is. UserError where it serves another model, another revision, or a tokenizer that
    cuts a probe into other tokens."""
    learnt = _Knowledge()
    questions = _Questions(settings, learnt)
    try:
        card = _card(settings, await questions.say("/models"))
        info = await questions.say("/version", optional=True, root=True)
        about = await questions.say("/model_info", optional=True, root=True)
        root = card.get("root") or about.get("model_path")
        revision, notes = compare_model(settings, frontend.identity, str(card["id"]), root)
        tokenizer = await _compare_tokenizers(settings, frontend, questions, probes)
    except GaveUp as error:
        raise UserError(
            f"it does not answer what it serves ({error.reason} {error.detail})".replace(" )", ")"),
            where=settings.where,
            remedy="see whether the server is well, and whether the address ends in /v1",
        ) from error
    finally:
        await questions.close()
    if about.get("weight_version") not in (None, "", "default"):
        notes.append(f"weight_version {about['weight_version']}")
    engine = str(card.get("owned_by") or "unknown")
    length = card.get("max_model_len")
    return ServerFacts(
        engine=engine,
        version=str(info["version"]) if info.get("version") else None,
        served_model=str(card["id"]),
        root=None if root is None else str(root),
        revision=revision,
        max_model_len=length if isinstance(length, int) else None,
        tokenizer=tokenizer,
        notes=tuple(notes),
    )


def _card(settings: GenerationServer, listed: dict[str, Any]) -> dict[str, Any]:
    cards = [card for card in listed.get("data") or [] if isinstance(card, dict) and card.get("id")]
    for card in cards:
        if card["id"] == settings.model:
            return card
    serves = ", ".join(f"`{card['id']}`" for card in cards) or "no model"
    raise UserError(
        f"it serves {serves}, not `{settings.model}`",
        where=settings.where,
        remedy="start it with this model, or set generation.served_model to the name under which it serves it",
    )


def compare_model(
    settings: GenerationServer, identity: ModelIdentity, served: str, root: str | None
) -> tuple[str | None, list[str]]:
    """(revision that the server named, what could not be compared). UserError where it names another model or
    commit than the experiment's."""
    notes: list[str] = []
    ours = identity.model
    if identity.adapter is not None:
        if served == ours:
            raise UserError(
                f"`{served}` is the model without the adapter {identity.adapter}",
                where=settings.where,
                remedy="serve the adapter too (--enable-lora) and set generation.served_model to its name",
            )
        notes.append(f"whether `{served}` carries the adapter {identity.adapter} cannot be told")
    expected = identity.revision if _COMMIT.fullmatch(identity.revision) else None
    commits = _COMMIT.findall(f"{served} {root or ''}")
    cached = _CACHE_FOLDER.search(root or "")
    named = f"{cached[1]}/{cached[2]}" if cached else root
    same_folder = bool(root) and _same_folder(str(root), ours)
    if identity.adapter is None and named and not same_folder and _HUB_ID.fullmatch(named):
        if _HUB_ID.fullmatch(ours) and named.lower() != ours.lower():
            raise UserError(
                f"`{served}` is {named} there, the experiment's model is {ours}",
                where=settings.where,
                remedy=f"serve {ours}, or set extraction_model to what is served",
            )
        if not _HUB_ID.fullmatch(ours):
            notes.append(f"whether {named} is {ours} cannot be told")
    elif not same_folder:
        notes.append(f"the server names its model {root!r}; whether that is {ours} cannot be told")
    if commits and expected and expected not in commits:
        raise UserError(
            f"it serves revision {commits[0][:12]}, the experiment's is {expected[:12]}",
            where=settings.where,
            remedy=f"serve {ours} at {expected}, or set extraction_revision",
        )
    if commits and expected:
        return expected, notes
    if not same_folder:
        notes.append("the server shows no revision")
    return None, notes


def _same_folder(root: str, ours: str) -> bool:
    """The server runs on files of this machine, and they are the experiment's."""
    from resources.models.embedded import PREFIX, converted_folder

    if not Path(root).exists():
        return False
    mine = converted_folder(ours) if ours.startswith(PREFIX) else Path(ours).expanduser()
    return mine.exists() and mine.resolve() == Path(root).resolve()


async def _compare_tokenizers(
    settings: GenerationServer, frontend: Frontend, questions: _Questions, probes: Sequence[str]
) -> str:
    how = "tokenize"
    for probe in probes:
        ours = [int(i) for i in frontend.tokenizer(probe, add_special_tokens=False)["input_ids"]]
        body = {"model": settings.model, "prompt": probe, "add_special_tokens": False}
        theirs: Any = None
        if how == "tokenize":
            theirs = (await questions.say("/tokenize", body, optional=True, root=True)).get("tokens")
        if theirs is None:
            # a server without /tokenize: the ids that it reads a text as are in its answer
            how = "completions"
            asked = {**body, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
            answer = await questions.say("/completions", asked)
            try:
                theirs = answer["choices"][0]["prompt_token_ids"]
            except (KeyError, IndexError, TypeError):
                theirs = None
            bos = frontend.prompts.bos
            if theirs and bos is not None and theirs[0] == bos and ours[:1] != [bos]:
                theirs = theirs[1:]
        if theirs is None:
            raise UserError(
                "it shows neither how it tokenises (/tokenize) nor the ids of a prompt (return_token_ids)",
                where=settings.where,
                remedy="use vLLM 0.10.2 or newer, or an SGLang with return_token_ids",
            )
        if list(theirs) != ours:
            at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None)
            where = f"token {at}" if at is not None else f"length {len(theirs)} against {len(ours)}"
            raise UserError(
                f"its tokenizer cuts {probe[:40]!r} into other tokens than that of {frontend.identity.model} "
                f"({where})",
                where=settings.where,
                remedy="serve the very model and revision of the experiment, with its own tokenizer",
            )
    return f"{len(probes)} probes agree ({how})"


class ServedModel:
    """A model that generates on a server: encodes and decodes as a loaded one, and never loads weights.

    `usage()`: requests, retries and tokens so far. `facts`: what the server showed, once asked.
    """

    def __init__(self, frontend: Frontend, settings: GenerationServer) -> None:
        settings.check()
        settings.api_key()
        self.frontend = frontend
        self.settings = settings
        self.identity = frontend.identity
        self.facts: ServerFacts | None = None
        self._spent = Ledger()

    @property
    def has_chat_template(self) -> bool:
        return self.frontend.has_chat_template

    def encode(self, prompt: str, system: str | None = None, *, chat: bool) -> EncodedPrompt:
        return self.frontend.encode(prompt, system, chat=chat)

    def decode(self, ids: Sequence[int]) -> str:
        return self.frontend.decode(ids)

    def usage(self) -> dict[str, float]:
        return {
            "requests": float(self._spent.requests),
            "calls": float(self._spent.calls),
            "retries": float(self._spent.retries),
            "prompt_tokens": float(self._spent.prompt_tokens),
            "completion_tokens": float(self._spent.completion_tokens),
        }

    def check(self) -> ServerFacts:
        """Look at the server unless that was done; see `look_at`."""
        if self.facts is None:
            # in a thread of its own: a notebook has an event loop running already
            with ThreadPoolExecutor(1, "generation server") as pool:
                self.facts = pool.submit(lambda: asyncio.run(look_at(self.settings, self.frontend))).result()
        return self.facts

    def generate(
        self,
        rows: Sequence[GenerationRow],
        options: GenerationOptions,
        *,
        keep: Callable[[Mapping[str, GeneratedRow]], None] | None = None,
    ) -> Iterator[GeneratedRow | FailedRow]:
        """Continue every row; results come in the order in which rows finish.

        `keep` stores rows, several at once; a request counts as in flight until its row is stored, so that a
        kill loses at most `max_concurrency` answers. UserError, before anything is asked, for rows with
        interventions and rows that do not fit the server's context.
        """
        for row in rows:
            if row.interventions:
                raise UserError(
                    "a server cannot steer: that needs hooks in the model",
                    where=f"row {row.key!r}",
                    remedy="steering runs on a loaded model whatever generation.backend says",
                )
        facts = self.check()
        limits = {row.key: self._limit(row, options, facts) for row in rows}
        return work_through(
            "generation server",
            list(rows),
            lambda: _Session(self, options, limits, keep),
            at_once=WINDOW * self.settings.max_concurrency,
        )

    def _limit(self, row: GenerationRow, options: GenerationOptions, facts: ServerFacts) -> int:
        """As for a loaded model: the wanted length, or what its context leaves."""
        length = len(row.prompt_ids)
        limit = min(options.max_new_tokens, self.frontend.context_length - length)
        if limit < 1:
            raise UserError(
                f"{length} prompt tokens and 1 more do not fit the context of {self.frontend.context_length}",
                where=f"row {row.key!r}",
                remedy="Shorten the prompt.",
            )
        if facts.max_model_len is not None and length + limit > facts.max_model_len:
            raise UserError(
                f"{length} prompt tokens and {limit} more do not fit the server's context of "
                f"{facts.max_model_len}",
                where=self.settings.where,
                remedy="start it with a larger --max-model-len (vLLM) or --context-length (SGLang), or lower "
                "max_new_tokens",
            )
        return limit


class _Sink:
    """`keep` as something that rows are put into."""

    def __init__(self, keep: Callable[[Mapping[str, GeneratedRow]], None]) -> None:
        self._keep = keep

    def put_many(self, rows: Mapping[str, GeneratedRow]) -> None:
        self._keep(rows)


class _Session:
    """Asks row by row, inside the worker's event loop."""

    def __init__(
        self,
        model: ServedModel,
        options: GenerationOptions,
        limits: Mapping[str, int],
        keep: Callable[[Mapping[str, GeneratedRow]], None] | None,
    ) -> None:
        self._model = model
        self._options = options
        self._limits = limits
        self._sink = None if keep is None else _Sink(keep)
        self._writer = GroupWriter()
        self._client = _Completions(model.settings, model.frontend, _Knowledge(), model._spent)

    async def close(self) -> None:
        await self._client.close()

    async def one(self, row: GenerationRow) -> GeneratedRow | FailedRow:
        request = completion_request(
            self._model.settings,
            row,
            self._options,
            sorted(self._model.frontend.stops),
            self._limits[row.key],
        )
        made: GeneratedRow | None = None

        async def keep(served: _Served) -> None:
            nonlocal made
            made = GeneratedRow(
                row.key, row.prompt_ids, served.ids, self._model.decode(served.ids), served.finish
            )
            if self._sink is not None:
                await self._writer.put(self._sink, row.key, made)  # type: ignore[arg-type]

        try:
            await self._client.ask_for(lambda: dict(request), keep)
        except GaveUp as error:
            return FailedRow(row.key, error.reason, error.detail[:300])
        assert made is not None
        return made
