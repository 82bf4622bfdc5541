"""The worked example of docs/planning.md: 400 traits on an 8B and a 70B model, by formula.

The same code as `traits plan`, with facts that stand here in place of folders.
"""

from __future__ import annotations

from trait_assets.experiments import Experiment
from trait_assets.planning.arithmetic import DEVICES, SHAPES, Options, Price, Trait, default_rates
from trait_assets.planning.estimate import Estimate, Todo, estimate, say_bytes, say_count, say_seconds

TRAITS = 400
DEVICE = "h100"
# a trait like those that are shipped: 110 + 110 scenarios, 20 questions of which 8 choose and 12 report
FACTS = Trait(
    scenarios=220,
    judged_texts=220,
    prompt_tokens=70.0,
    questions_search=8,
    questions_report=12,
    question_tokens=45.0,
)
# stands for whatever the reader's judge costs: the arithmetic is linear in it
EXAMPLE_PRICE = Price(prompt=1.0, completion=4.0)


def worked(size: str) -> Estimate:
    """The default options, every stage, an LLM judge at 20 calls at once."""
    shape = SHAPES[size]
    experiment = Experiment(name="example", extraction_model=size)
    options = Options.of(experiment, base=False, layers=shape.layers, all_layers=shape.layers, llm_judge=True)
    rates = default_rates(shape, shape, DEVICES[DEVICE], options, FACTS)
    return estimate(options, shape, shape, [Todo(FACTS, TRAITS)], rates, price=EXAMPLE_PRICE, on_gpu=True)


def table(made: Estimate) -> str:
    """The estimate as a Markdown table."""
    lines = [
        "| stage | rows | tokens | judge calls | judge tokens | time | GPU hours | storage |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [(s.stage, s.need, s.seconds, s.gpu_hours) for s in made.stages]
    rows.append(("**in all**", made.need, made.seconds, made.gpu_hours))
    for name, need, seconds, gpu_hours in rows:
        tokens = need.judge_prompt_tokens + need.judge_completion_tokens
        cells = [
            name,
            say_count(need.rows),
            say_count(need.tokens),
            say_count(need.judge_calls),
            say_count(tokens),
            say_seconds(seconds),
            f"{gpu_hours:.1f}",
            say_bytes(need.storage_bytes),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section(size: str) -> str:
    """What docs/planning.md says about one model: the table and the rates behind it."""
    made = worked(size)
    rates, shape = made.rates, SHAPES[size]
    said = [
        f"{shape.params / 1e9:.3g} G weights in bfloat16 are {shape.weight_bytes / 1e9:.0f} GB: "
        f"{rates.gpus} GPU{'s' if rates.gpus > 1 else ''} of {DEVICES[DEVICE].memory / 1e9:.0f} GB per run.",
        f"Responses {rates.generate:,.0f} tokens/s, activations {rates.capture:,.0f} tokens/s, steering "
        f"{rates.steer:,.0f} tokens/s, judge {rates.judge:.0f} answers/s.",
        f"{made.runs} runs of 16 traits; {say_seconds(made.overhead_seconds)} of the time is starting and loading.",
        f"At {EXAMPLE_PRICE.prompt:g} and {EXAMPLE_PRICE.completion:g} USD per million tokens the judge costs "
        f"{made.judge_usd:,.0f} USD.",
    ]
    return table(made) + "\n\n" + "\n".join(said)
