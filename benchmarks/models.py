"""Ratios of capture, generation and steering against the obvious ways to do them, in one run on one machine.

    python benchmarks/models.py [--model embedded:smollm2-135m-instruct] [--repeat 3] [--only capture,sweep]

Both sides of a ratio run on the same rows, one after the other, several times; the median of the ratios is
printed, since absolute times on a shared machine mean little. `--clock cpu` counts processor time instead of wall
time: with OMP_NUM_THREADS=1 it gives ratios that other people's load hardly moves.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resources.models.anatomy import input_device
from resources.models.embedded import DEFAULT_MODEL
from resources.models.language_model import LanguageModel
from resources.models.loading import load
from resources.models.rows import (
    CaptureRow,
    GenerationOptions,
    GenerationRow,
    Intervention,
    ModelSpec,
)

QUESTIONS = (
    "How do I ask my landlord to repair the heating?",
    "What should I cook tonight?",
    "Explain why the sky is blue.",
    "My colleague keeps interrupting me in meetings. What can I do?",
    "Write a short note to a neighbour about the noise.",
    "What makes a good holiday?",
    "How does a bicycle stay upright?",
    "Tell me about the town where you grew up.",
)
BATCH = 32


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
clock = "wall"


def timed(work: Callable[[], Any]) -> float:
    start = CLOCKS[clock]()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCKS[clock]() - start


def ratios(ours: Callable[[], Any], other: Callable[[], Any], repeat: int) -> tuple[float, float, float]:
    """(median of other / ours, seconds of ours, seconds of other): above 1 we are faster."""
    pairs = [(timed(ours), timed(other)) for _ in range(repeat)]
    return (
        statistics.median(theirs / mine for mine, theirs in pairs),
        min(mine for mine, _ in pairs),
        min(theirs for _, theirs in pairs),
    )


def padded(model: LanguageModel, rows: Sequence[Sequence[int]], *, left: bool) -> dict[str, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        at = width - len(row) if left else 0
        ids[index, at : at + len(row)] = torch.tensor(list(row))
        mask[index, at : at + len(row)] = 1
    device = input_device(model.anatomy.decoder)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def capture_benchmark(model: LanguageModel, repeat: int) -> dict[str, Any]:
    """Pooled states of all layers over response[:] and prompt[-1]: 32 texts of 60 to 130 tokens."""
    generator = random.Random(0)

    def response() -> tuple[int, ...]:
        return tuple(generator.randrange(1000, 40000) for _ in range(generator.randrange(20, 90)))

    prompt = model.encode(QUESTIONS[0], chat=True).ids
    texts = [CaptureRow(str(index), prompt, response()) for index in range(BATCH)]
    tokens = sum(len(row.prompt_ids) + len(row.response_ids) for row in texts)
    # what a plain forward pass is given is what capture gives it: the same rows, sorted and batched in the same way
    ordered = sorted(texts, key=lambda row: -len(row.response_ids))
    sequences = [(*row.prompt_ids, *row.response_ids) for row in ordered]
    size = model.batcher.rows("extraction", len(sequences[0]))

    def ours() -> None:
        list(model.capture(texts, ["response[:]", "prompt[-1]"]))

    def plain() -> None:
        with torch.inference_mode():
            for at in range(0, len(sequences), size):
                batch = padded(model, sequences[at : at + size], left=False)
                model.anatomy.decoder(input_ids=batch["input_ids"], use_cache=False)

    def hidden(batch_size: int) -> None:
        with torch.inference_mode():
            for at in range(0, len(texts), batch_size):
                part = texts[at : at + batch_size]
                batch = padded(model, [(*row.prompt_ids, *row.response_ids) for row in part], left=True)
                positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
                states = model.causal(
                    **batch, position_ids=positions, output_hidden_states=True, use_cache=False
                ).hidden_states
                stacked = torch.stack(states[1:])
                for index, row in enumerate(part):
                    stacked[:, index, -len(row.response_ids) :].mean(dim=1)
                    stacked[:, index, -len(row.response_ids) - 1].clone()

    against_plain, seconds, _ = ratios(ours, plain, repeat)
    against_batches, _, _ = ratios(ours, lambda: hidden(BATCH), repeat)
    against_single, _, _ = ratios(ours, lambda: hidden(1), max(1, repeat // 2))
    return {
        "tokens_per_second": tokens / seconds,
        "speed_against_plain_forward_without_head": against_plain,
        "times_faster_than_output_hidden_states_in_batches": against_batches,
        "times_faster_than_output_hidden_states_one_by_one": against_single,
    }


def generation_benchmark(model: LanguageModel, repeat: int, lengths: Sequence[int]) -> dict[str, Any]:
    """Rows that end at given lengths, in file order, against `generate` in static batches of 32.

    Both sides are told the same ends: ours by each row's own limit, transformers by a stopping criterion.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    # every prompt its own: what sharing a prompt's cache brings is measured by the sweep, not here
    prompts = [
        model.encode(f"{QUESTIONS[index % len(QUESTIONS)]} This is letter {index}.", chat=True).ids
        for index in range(len(lengths))
    ]
    wanted = dict(zip(map(str, range(len(lengths))), lengths, strict=True))
    rows = [GenerationRow(str(index), prompt) for index, prompt in enumerate(prompts)]
    longest = max(lengths)
    loop = model._decoding
    begin = loop._start

    def with_own_limit(row: GenerationRow, options: GenerationOptions) -> Any:
        entry = begin(row, options)
        entry.limit = min(entry.limit, wanted[row.key])
        return entry

    class Ends(StoppingCriteria):
        def __init__(self, limits: Sequence[int], start: int) -> None:
            self.limits, self.start = torch.tensor(limits), start

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return (input_ids.shape[1] - self.start >= self.limits).to(input_ids.device)

    stops = model.stops

    def ours() -> None:
        model.set_stops(frozenset())
        loop._start = with_own_limit  # type: ignore[method-assign]
        try:
            produced = list(model.generate(rows, GenerationOptions(max_new_tokens=longest)))
        finally:
            loop._start = begin  # type: ignore[method-assign]
            model.set_stops(stops)
        assert sum(len(row.ids) for row in produced) == sum(lengths)

    def static() -> None:
        for at in range(0, len(rows), BATCH):
            batch = padded(model, prompts[at : at + BATCH], left=True)
            ends = Ends(lengths[at : at + BATCH], batch["input_ids"].shape[1])
            model.causal.generate(
                **batch,
                do_sample=False,
                max_new_tokens=longest,
                pad_token_id=0,
                eos_token_id=None,
                stopping_criteria=StoppingCriteriaList([ends]),
            )

    ratio, seconds, _ = ratios(ours, static, repeat)
    return {"tokens_per_second": sum(lengths) / seconds, "times_faster_than_static_batches": ratio}


def sweep_benchmark(model: LanguageModel, repeat: int, new_tokens: int = 24) -> dict[str, Any]:
    """6 layers × 5 doses × 8 questions, against one steered `generate` per (layer, dose)."""
    vector = np.random.default_rng(0).standard_normal(model.hidden_size).astype(np.float32)
    vector /= np.linalg.norm(vector)
    layers = [round(model.n_layers * share) for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)]
    doses = [5.0, 10.0, 15.0, 20.0, 30.0]
    prompts = [model.encode(question, chat=True).ids for question in QUESTIONS]
    rows = [
        GenerationRow(f"{layer} {dose} {index}", prompt, (Intervention(layer, vector, dose),))
        for layer in layers
        for dose in doses
        for index, prompt in enumerate(prompts)
    ]

    stops = model.stops

    def ours() -> None:
        # every row runs to its full length on both sides, so that both do the same work
        model.set_stops(frozenset())
        try:
            list(model.generate(rows, GenerationOptions(max_new_tokens=new_tokens)))
        finally:
            model.set_stops(stops)

    def one_by_one() -> None:
        batch = padded(model, prompts, left=True)
        added = torch.from_numpy(vector)
        for layer in layers:
            for dose in doses:

                def hook(module: Any, args: Any, output: Any, dose: float = dose) -> Any:
                    value = output if isinstance(output, torch.Tensor) else output[0]
                    value[:, -1] += dose * added.to(value)
                    return output

                handle = model.anatomy.layers[layer].register_forward_hook(hook)
                model.causal.generate(
                    **batch, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, eos_token_id=None
                )
                handle.remove()

    ratio, seconds, _ = ratios(ours, one_by_one, max(1, repeat // 2))
    return {
        "rows": len(rows),
        "tokens_per_second": len(rows) * new_tokens / seconds,
        "times_faster_than_one_generate_per_configuration": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", type=int, default=96, help="rows of the generation benchmarks")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--only", default="capture,mixed,equal,sweep")
    arguments = parser.parse_args()
    global clock
    clock = arguments.clock
    model = load(ModelSpec(arguments.model))
    generator = random.Random(1)
    mixed = [generator.randint(10, 150) for _ in range(arguments.rows)]
    benchmarks: dict[str, Callable[[], dict[str, Any]]] = {
        "capture": lambda: capture_benchmark(model, arguments.repeat),
        "mixed": lambda: generation_benchmark(model, arguments.repeat, mixed),
        "equal": lambda: generation_benchmark(model, arguments.repeat, [40] * arguments.rows),
        "sweep": lambda: sweep_benchmark(model, arguments.repeat),
    }
    for name in arguments.only.split(","):
        result = benchmarks[name]()
        rounded = {key: round(value, 2) for key, value in result.items()}
        print(
            json.dumps({"benchmark": name, "clock": clock, "threads": torch.get_num_threads(), **rounded}),
            flush=True,
        )


if __name__ == "__main__":
    main()
