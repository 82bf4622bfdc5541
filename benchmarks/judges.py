"""The judges against the obvious ways to do their work, in one run on one machine.

    python benchmarks/judges.py [--items 400] [--only faults,rate,local]

`rate`: how long a run takes beside what its rate allows, once with our own rate limit against a server that
answers 60 % of requests with 429, 5 % with 500, resets 2 %, leaves 2 % hanging, sends garbage to 3 % and a
filter's refusal to 2 %; once with the server's limit, which answers 429 above a number of requests a second.
`faults`: a server that limits its rate and fails now and then; our judge against the common pattern (gather
over all items behind a semaphore, three tries half a second and a second apart, whatever is left is None):
answers lost, requests sent, seconds; then the same items a second time. `local`: MiniLM scores of steered
answers, batched by length and cached by text, against one encoder call per text. Ratios count, absolute times
on a shared machine mean little.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resources.judges.openai_judge import OpenAIJudge, OpenAISettings
from resources.judges.protocol import Abstention, JudgeItem, TraitContext
from resources.judges.rubric import render
from storage.artifacts import ArtifactStore
from storage.rows import RowCache

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = TraitContext("mood/loud", "HIGH (70-100): loud shouting.\n\nLOW (0-30): quiet whispering.")


def server_module() -> ModuleType:
    path = ROOT / "tests" / "judges" / "openai_server.py"
    spec = importlib.util.spec_from_file_location("openai_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["openai_server"] = module
    spec.loader.exec_module(module)
    return module


def items(n: int) -> list[JudgeItem]:
    return [JudgeItem(str(i), "steering", CONTEXT, f"question {i}", f"number {i} is loud") for i in range(n)]


async def common_pattern(
    base_url: str, asked: Sequence[JudgeItem], concurrency: int, timeout_s: float
) -> list[Any]:
    """Gather, semaphore, three tries, None for what is left."""
    import openai

    client = openai.AsyncOpenAI(api_key="none", base_url=base_url, max_retries=0, timeout=timeout_s)
    gate = asyncio.Semaphore(concurrency)

    async def one(item: JudgeItem) -> Any:
        async with gate:
            for attempt in range(3):
                try:
                    reply = await client.chat.completions.create(
                        model="loopback-1",
                        messages=render(item).messages(),  # type: ignore[arg-type]
                        max_tokens=1,
                        temperature=0,
                        logprobs=True,
                        top_logprobs=20,
                    )
                    return reply.choices[0].message.content
                except Exception:
                    if attempt < 2:
                        await asyncio.sleep(0.5 * 2**attempt)
            return None

    answers = await asyncio.gather(*(one(item) for item in asked))
    await client.close()
    return list(answers)


def bench_faults(n: int) -> None:
    module = server_module()
    asked = items(n)
    faults = module.Faults(
        rate_limited=0.4, retry_after=0.25, server_error=0.05, reset=0.02, hang=0.02, hang_s=8.0, seed=1
    )
    with module.OpenAIServer() as server:
        server.faults = faults
        start = time.perf_counter()
        answers = asyncio.run(common_pattern(server.base_url, asked, 24, 4.0))
        seconds = time.perf_counter() - start
        lost = sum(answer is None for answer in answers)
        print(f"common pattern  {n} items: {lost} lost, {len(server.requests)} requests, {seconds:.1f} s")
        server.reset()
        with tempfile.TemporaryDirectory() as folder:
            store = ArtifactStore(folder)
            cache = RowCache(store, "judgements")
            settings = OpenAISettings(
                model="loopback-1", base_url=server.base_url, max_concurrency=24, timeout_s=4.0
            )
            judge = OpenAIJudge(settings, lambda trait: cache, api_key="none")
            start = time.perf_counter()
            judged = list(judge.score(asked))
            ours = time.perf_counter() - start
            lost = sum(isinstance(j, Abstention) for j in judged)
            print(f"this judge      {n} items: {lost} lost, {len(server.requests)} requests, {ours:.1f} s")
            server.reset()
            again = OpenAIJudge(settings, lambda trait: RowCache(store, "judgements"), api_key="none")
            start = time.perf_counter()
            assert list(again.score(asked)) == judged
            print(
                f"a second run    {n} items: {len(server.requests)} requests, {time.perf_counter() - start:.2f} s"
            )


def bench_rate(n: int) -> None:
    module = server_module()
    asked = items(n)

    def run(server: Any, **options: Any) -> tuple[list[Any], float]:
        with tempfile.TemporaryDirectory() as folder:
            cache = RowCache(ArtifactStore(folder), "judgements")
            settings = OpenAISettings(
                model="loopback-1", base_url=server.base_url, max_concurrency=48, timeout_s=15.0, **options
            )
            judge = OpenAIJudge(settings, lambda trait: cache, api_key="none")
            list(judge.score(items(1)))
            server.reset()
            start = time.perf_counter()
            judged = list(judge.score([JudgeItem(f"r{i.key}", *_rest(i)) for i in asked]))
            return judged, time.perf_counter() - start

    with module.OpenAIServer() as server:
        server.faults = module.Faults(
            rate_limited=0.60,
            retry_after=0.25,
            server_error=0.05,
            reset=0.02,
            hang=0.02,
            hang_s=30.0,
            garbage=0.03,
            content_filter=0.02,
            seed=1,
        )
        per_second = 40
        judged, seconds = run(server, requests_per_minute=60 * per_second)
        sent = len(server.requests)
        bad = sum(outcome in ("garbage", "content_filter") for outcome in server.outcome.values())
        abstained = sum(isinstance(j, Abstention) for j in judged)
        print(
            f"our rate        {n} items, {abstained} abstained of {bad} without a score, {sent} requests at "
            f"{per_second}/s: {seconds:.1f} s, {seconds / (sent / per_second):.2f}x of what the rate allows"
        )
    with module.OpenAIServer() as server:
        server.faults = module.Faults(retry_after=0.25)
        server.capacity = 60.0
        judged, seconds = run(server)
        lost = sum(isinstance(j, Abstention) for j in judged)
        print(
            f"server's rate   {n} items, {lost} lost, {len(server.requests)} requests at a server that answers "
            f"60/s: {seconds:.1f} s, {seconds / (n / 60):.2f}x of what it allows"
        )


def _rest(item: JudgeItem) -> tuple[Any, ...]:
    return item.rubric, item.context, item.prompt, f"again: {item.text}"


def bench_local(n: int) -> None:
    from resources.judges import embedding

    lines = [
        line
        for path in sorted((ROOT / "datasets" / "traits").glob("*/*/*itive.txt"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ][:n]
    embedding.embed(["warm"])

    def clock(work: Callable[[], Any]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    single = clock(lambda: [embedding._encode([line]) for line in lines])
    batched = clock(lambda: embedding.embed(lines))
    cached = clock(lambda: embedding.embed(lines))
    print(
        f"embedding {len(lines)} scenarios, CPU time: one by one {single:.1f} s, batched by length {batched:.1f} s "
        f"({single / batched:.1f}x), again {cached * 1000:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--only", default="faults,rate,local")
    given = parser.parse_args()
    wanted = set(given.only.split(","))
    if "faults" in wanted:
        bench_faults(given.items)
    if "rate" in wanted:
        bench_rate(given.items)
    if "local" in wanted:
        bench_local(given.items)


if __name__ == "__main__":
    main()
