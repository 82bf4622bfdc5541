"""The arithmetic of a plan: how many rows, tokens, judge calls and bytes a trait needs, and how fast a device
can be expected to work where nobody has measured it. Pure: no files, no torch, no experiment on disk.

Every assumption is a named constant or a field with a default, and docs/planning.md explains it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trait_assets.pipeline import stages_of

if TYPE_CHECKING:
    from trait_assets.experiments import Experiment

GIB = float(1 << 30)

# English text in the tokenizers in use: about four characters a token (OpenAI, "What are tokens", 2023)
CHARS_PER_TOKEN = 4.0
# a judge answers with one number; two tokens with its end
JUDGE_ANSWER_TOKENS = 2.0
# the share of the ladder and the refinements that is run: hopeless and incoherent candidates are dropped on the
# way; and how often a chosen dose is stepped down on the report half (twice at most). The demo's two traits took
# 816 answers, this says 784, and the upper bound is 976
SEARCH_SHARE = 0.9
STEPS_DOWN = 1.0
# bytes of a stored row beside its numbers: keys, indices, JSON
ROW_BYTES = 600.0
# bytes of a token id and its text in a JSON row, and rows are stored twice: in the row cache and in the result
TOKEN_BYTES = 2 * 12.0
# a judgement with its key and detail
JUDGEMENT_BYTES = 500.0


@dataclass(frozen=True)
class ModelShape:
    """`params`: weights; `kv_bytes`: KV cache per token in bfloat16, 2 (K and V) · layers · KV heads · head size
    · 2 bytes; `guessed`: how the numbers were come by, where that was not the model's own config."""

    name: str
    params: float
    layers: int
    hidden: int
    kv_bytes: float
    bytes_per_weight: float = 2.0
    guessed: str | None = None

    @property
    def weight_bytes(self) -> float:
        return self.params * self.bytes_per_weight


def llama_like(name: str, params: float, layers: int, hidden: int, kv_heads: int, head: int) -> ModelShape:
    return ModelShape(name, params, layers, hidden, 2.0 * layers * kv_heads * head * 2)


# Llama 3.1: Grattafiori et al., "The Llama 3 Herd of Models", 2024, table 3
SHAPES = {
    "8b": llama_like("8b (Llama 3.1)", 8.03e9, 32, 4096, 8, 128),
    "70b": llama_like("70b (Llama 3.1)", 70.6e9, 80, 8192, 8, 128),
}


@dataclass(frozen=True)
class Device:
    """`flops`: dense bfloat16 per second; `bandwidth`: bytes per second; `memory`: bytes; of one GPU.

    `prefill_share`, `decode_share`, `bandwidth_share`: what of it is reached; `layer_overhead_s`: launching one layer's kernels
    from Python, per step; `max_rows`: rows that are generated together."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    source: str
    prefill_share: float = 0.4
    decode_share: float = 0.4
    bandwidth_share: float = 0.6
    layer_overhead_s: float = 0.5e-3
    max_rows: int = 512

    def gpus_for(self, model: ModelShape) -> int:
        """GPUs that hold the weights and a fifth more for cache and activations."""
        return max(1, math.ceil(model.weight_bytes * 1.2 / self.memory))


DEVICES = {
    "h100": Device("h100", 989e12, 3.35e12, 80e9, "NVIDIA H100 SXM5 datasheet, 2023"),
    "a100": Device("a100", 312e12, 2.04e12, 80e9, "NVIDIA A100 80GB SXM datasheet, 2021"),
    "l40s": Device("l40s", 362e12, 0.864e12, 48e9, "NVIDIA L40S datasheet, 2023"),
    # measured on a cloud machine, in float32
    "cpu": Device(
        "cpu",
        245e9,
        20e9,
        16e9,
        "two cores, SmolLM2-135M in float32: 912 tokens/s captured, about 200 steered",
        prefill_share=1.0,
        decode_share=0.25,
        bandwidth_share=0.5,
        layer_overhead_s=1e-3,
        max_rows=64,
    ),
}


def forward_flops_per_token(model: ModelShape) -> float:
    """2 · parameters: a multiply and an add for each weight (Kaplan et al., "Scaling Laws for Neural Language
    Models", 2020, section 2.1; attention over short texts is left out)."""
    return 2.0 * model.params


def prefill_tokens_per_second(model: ModelShape, device: Device, gpus: int = 1) -> float:
    """Tokens that a forward pass takes in: compute-bound."""
    return device.flops * gpus * device.prefill_share / forward_flops_per_token(model)


def decode_step_seconds(
    model: ModelShape, device: Device, rows: float, context: float, gpus: int = 1, *, server: bool = False
) -> float:
    """One token for each of `rows`: the weights and the KV cache are read once (memory-bound), or the arithmetic
    takes longer (Pope et al., "Efficiently Scaling Transformer Inference", 2022, section 2); on top the time to
    launch a step's kernels, which a server hides behind CUDA graphs."""
    read = (model.weight_bytes + rows * context * model.kv_bytes) / (
        device.bandwidth * gpus * device.bandwidth_share
    )
    compute = rows * forward_flops_per_token(model) / (device.flops * gpus * device.decode_share)
    return max(read, compute) + (0.0 if server else model.layers * device.layer_overhead_s)


def rows_at_once(model: ModelShape, device: Device, tokens_per_row: float, gpus: int = 1) -> int:
    """As many rows as the memory beside the weights has KV cache for (half of it, as `batching` does)."""
    free = device.memory * gpus * 0.9 - model.weight_bytes
    fit = int(free / (2 * tokens_per_row * model.kv_bytes)) if free > 0 else 1
    return max(1, min(device.max_rows, fit))


@dataclass(frozen=True)
class Trait:
    """What is known of one trait before it runs. Counts are of both sides together; tokens are means."""

    scenarios: int
    prompt_tokens: float
    # texts that the local judge is fitted on, whatever subset is used
    judged_texts: int = 0
    questions_search: int = 0
    questions_report: int = 0
    question_tokens: float = 40.0
    # tokens of a rendered judge question
    judge_scenario_tokens: float = 500.0
    judge_response_tokens: float = 550.0
    judge_steering_tokens: float = 450.0
    judge_coherence_tokens: float = 300.0
    # what vetting keeps
    scenarios_kept: float = 0.9
    responses_kept: float = 0.85
    # mean length of a response, as a share of the most it may have
    response_share: float = 1.0


@dataclass(frozen=True)
class Need:
    """What one stage needs for one trait (or, summed, for many). `tokens`: generated, or captured."""

    rows: float = 0.0
    prompt_tokens: float = 0.0
    tokens: float = 0.0
    judge_calls: float = 0.0
    judge_prompt_tokens: float = 0.0
    judge_completion_tokens: float = 0.0
    # tokens that the unsteered model reads so that the local judge knows how fluent an answer is
    reference_tokens: float = 0.0
    # texts that the local judge embeds before its first judgement
    judge_setup: float = 0.0
    # fits: sites (layer × position × component) × train rows
    fits: float = 0.0
    storage_bytes: float = 0.0

    def __add__(self, other: Need) -> Need:
        return Need(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, share: float) -> Need:
        return Need(*(value * share for value in vars(self).values()))


@dataclass(frozen=True)
class Options:
    """The options of an experiment that decide how much there is to do, resolved for one model."""

    stages: tuple[str, ...]
    base: bool
    response_tokens: int
    layers: int
    sites: int
    scenario_vetting: bool
    response_vetting: bool
    val_split: float
    methods: int
    candidates: int
    doses: int
    refine: int
    controls: int
    prompting: bool
    multi_layer: bool
    steer_tokens: int
    llm_judge: bool

    @classmethod
    def of(
        cls, experiment: Experiment, *, base: bool, layers: int, all_layers: int, llm_judge: bool
    ) -> Options:
        """`layers`: captured; `all_layers`: of the model."""
        e, steer = experiment, experiment.steer
        sites = len(e.positions) * len(e.component)
        wanted = [m for m in steer.methods or e.methods if m != "random"]
        window = round((steer.depth_window[1] - steer.depth_window[0]) * all_layers) or 1
        most = len(steer.candidates) if steer.candidates is not None else len(wanted) * window * sites
        return cls(
            stages=tuple(stages_of(e)),
            base=base,
            response_tokens=e.response_length(base=base),
            layers=layers,
            sites=sites,
            scenario_vetting=e.scenario_vetting,
            response_vetting=e.response_vetting,
            val_split=e.val_split,
            methods=len(e.methods),
            candidates=min(steer.max_candidates, most),
            doses=len(steer.doses),
            refine=steer.refine_steps * steer.refine_top,
            controls=steer.controls,
            prompting=steer.prompting_baseline,
            multi_layer=steer.multi_layer,
            steer_tokens=steer.max_new_tokens,
            llm_judge=llm_judge,
        )


def steering_answers(options: Options, trait: Trait) -> tuple[float, float]:
    """(expected, most) answers of one trait's search: unsteered on both halves; every candidate at every dose of
    the ladder and every refinement on the search half; on the report half the chosen setting, random controls,
    prompting, several layers at once."""
    search, report = trait.questions_search, trait.questions_report
    ladder = (options.candidates * options.doses + options.refine + 3 * options.multi_layer) * search
    fixed = search + report
    last = (1 + options.controls + options.prompting + options.multi_layer) * report
    step_down = (1 + options.controls) * report
    expected = fixed + SEARCH_SHARE * ladder + last + STEPS_DOWN * step_down
    return expected, fixed + ladder + last + 2 * step_down


def needs_of(options: Options, model: ModelShape, steered: ModelShape, trait: Trait) -> dict[str, Need]:
    """What each stage needs for one trait of which nothing is there yet."""
    scenarios = float(trait.scenarios)
    kept = scenarios * (trait.scenarios_kept if options.scenario_vetting else 1.0)
    used = kept * (trait.responses_kept if options.response_vetting else 1.0)
    answer = options.response_tokens * trait.response_share
    prefill = "responses" not in options.stages
    if prefill:
        answer, kept, used = 0.0, scenarios, scenarios
    llm = 1.0 if options.llm_judge else 0.0
    answers, _ = steering_answers(options, trait)
    vetted = {
        "vetted_scenarios": (scenarios if options.scenario_vetting else 0.0, trait.judge_scenario_tokens),
        "vetted_responses": (kept if options.response_vetting else 0.0, trait.judge_response_tokens + answer),
    }
    floats = used * options.layers * model.hidden * options.sites * 4.0
    first_judged = next((s for s in options.stages if s in (*vetted, "steering_results")), None)
    if first_judged in vetted and not vetted[first_judged][0]:
        first_judged = "steering_results"
    all_needs = {
        "scenarios": Need(rows=scenarios, storage_bytes=scenarios * (ROW_BYTES + trait.prompt_tokens * 5)),
        **{
            stage: Need(
                rows=calls,
                judge_calls=calls,
                judge_prompt_tokens=calls * tokens * llm,
                judge_completion_tokens=calls * JUDGE_ANSWER_TOKENS * llm,
                storage_bytes=calls * JUDGEMENT_BYTES,
            )
            for stage, (calls, tokens) in vetted.items()
        },
        "responses": Need(
            rows=kept,
            prompt_tokens=kept * trait.prompt_tokens,
            tokens=kept * answer,
            storage_bytes=kept * (ROW_BYTES + (trait.prompt_tokens + answer) * TOKEN_BYTES),
        ),
        "activations": Need(
            rows=used,
            prompt_tokens=used * trait.prompt_tokens,
            tokens=used * (trait.prompt_tokens + answer),
            storage_bytes=floats + used * options.layers * 4,
        ),
        "vectors": Need(
            rows=used,
            fits=options.layers * options.sites * used * options.methods,
            storage_bytes=options.methods * options.layers * options.sites * model.hidden * 4.0,
        ),
        "vector_evaluation": Need(rows=used, fits=options.layers * options.sites * used * options.methods),
        "steering_results": Need(
            rows=answers,
            prompt_tokens=answers * trait.question_tokens,
            tokens=answers * options.steer_tokens,
            # trait and coherence; coherent answers are asked about the topic as well
            judge_calls=answers * (3.0 if options.llm_judge else 2.0),
            judge_prompt_tokens=llm
            * answers
            * (trait.judge_steering_tokens + 2 * trait.judge_coherence_tokens + 3 * options.steer_tokens),
            judge_completion_tokens=llm * answers * 3 * JUDGE_ANSWER_TOKENS,
            reference_tokens=(1.0 - llm) * answers * (trait.question_tokens + options.steer_tokens),
            storage_bytes=answers * (2 * JUDGEMENT_BYTES + ROW_BYTES + options.steer_tokens * TOKEN_BYTES),
        ),
    }
    if first_judged is not None and not options.llm_judge:
        setup = float(trait.judged_texts or trait.scenarios)
        all_needs[first_judged] = replace(all_needs[first_judged], judge_setup=setup)
    return {stage: all_needs[stage] for stage in options.stages}


@dataclass(frozen=True)
class Rates:
    """How fast things go here. `sources`: field → where the number comes from."""

    generate: float  # tokens generated per second, responses
    capture: float  # tokens captured per second
    steer: float  # tokens generated per second under steering
    judge: float  # judgements per second
    fit: float  # seconds per 1,000 fits of vectors
    evaluate: float  # seconds per 1,000 fits of the evaluation
    load: float  # seconds to load a model
    start: float  # seconds until a run's first stage works
    per_result: float  # seconds of bookkeeping per trait and stage
    gpus: int = 1
    sources: dict[str, str] = field(default_factory=dict)


# What no formula gives, measured on two CPU cores (the demo of docs/performance.md)
START_S = 6.0
PER_RESULT_S = 0.1
# processor seconds of one core, 44 and 150 rows, 30 layers of 576 and 32 of 4096: 0.10 to 0.15 and 0.39 to 0.61
# (the width hardly counts, because fits happen in the space of the rows)
FIT_S_PER_1000 = 0.12
EVALUATE_S_PER_1000 = 0.5
LOCAL_JUDGEMENTS_PER_S = 60.0
# an LLM judge: one answer takes about a second, so many are in flight at once
JUDGE_LATENCY_S = 1.0
READ_BYTES_PER_S = 1e9


def default_rates(
    model: ModelShape,
    steered: ModelShape,
    device: Device,
    options: Options,
    trait: Trait,
    *,
    gpus: int | None = None,
    server: bool = False,
    judge_per_second: float | None = None,
) -> Rates:
    """Rates by formula, for a device nobody has measured."""
    n = gpus or max(device.gpus_for(model), device.gpus_for(steered))
    context = trait.prompt_tokens + options.response_tokens
    steer_context = trait.question_tokens + options.steer_tokens
    rows = rows_at_once(model, device, context, n)
    steer_rows = rows_at_once(steered, device, steer_context, n)
    generate = rows / (
        decode_step_seconds(model, device, rows, context, n, server=server)
        # the prompt is read once per row
        + rows
        * trait.prompt_tokens
        / max(1.0, options.response_tokens)
        / prefill_tokens_per_second(model, device, n)
    )
    steer = steer_rows / decode_step_seconds(steered, device, steer_rows, steer_context, n)
    said = f"formula for {device.name}" + (f" x{n}" if n > 1 else "")
    default = "default of two CPU cores"
    judge = judge_per_second or (20 / JUDGE_LATENCY_S if options.llm_judge else LOCAL_JUDGEMENTS_PER_S)
    return Rates(
        generate=generate,
        capture=prefill_tokens_per_second(model, device, n),
        steer=steer,
        judge=judge,
        fit=FIT_S_PER_1000,
        evaluate=EVALUATE_S_PER_1000,
        load=max(model.weight_bytes, steered.weight_bytes) / READ_BYTES_PER_S,
        start=START_S,
        per_result=PER_RESULT_S,
        gpus=n,
        sources={
            **dict.fromkeys(("generate", "capture", "steer"), said),
            **dict.fromkeys(("fit", "evaluate", "start", "per_result"), default),
            "judge": f"{JUDGE_LATENCY_S:g} s per answer, 20 at once" if options.llm_judge else default,
            "load": f"{READ_BYTES_PER_S / 1e9:g} GB/s",
        },
    )


def seconds_of(stage: str, need: Need, rates: Rates, *, results: float) -> float:
    """Seconds of one stage for `results` traits that need `need` together."""
    seconds = (need.judge_calls + need.judge_setup) / rates.judge + results * rates.per_result
    if stage == "responses":
        seconds += need.tokens / rates.generate
    elif stage == "activations":
        seconds += need.tokens / rates.capture
    elif stage == "vectors":
        seconds += need.fits / 1000 * rates.fit
    elif stage == "vector_evaluation":
        seconds += need.fits / 1000 * rates.evaluate
    elif stage == "steering_results":
        seconds += need.tokens / rates.steer + need.reference_tokens / rates.capture
    return seconds


# stages that hold a GPU while they run
ON_GPU = ("responses", "activations", "steering_results")


@dataclass(frozen=True)
class Price:
    """USD per million tokens of the judge, as the user gives it."""

    prompt: float
    completion: float

    def of(self, need: Need) -> float:
        return (need.judge_prompt_tokens * self.prompt + need.judge_completion_tokens * self.completion) / 1e6
