"""The command `traits plan`: the estimate of an experiment before anything is spent.

`register` hangs it into the program. Here options become facts, rates and a table; nothing is estimated.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from storage.errors import UserError
from trait_assets import paths

if TYPE_CHECKING:
    from trait_assets.experiments import Experiment
    from trait_assets.planning.arithmetic import Device, ModelShape, Price
    from trait_assets.planning.estimate import Estimate

OneLineErrors = Callable[[bool], AbstractContextManager[None]]


def register(app: typer.Typer, one_line_errors: OneLineErrors) -> None:
    """Add the command to `app`; `one_line_errors(verbose)` turns a UserError into a line and exit code 2."""

    @app.command()
    def plan(
        experiment: Annotated[
            str, typer.Option("--experiment", "-e", help="Name of a folder under experiments/.")
        ],
        traits: Annotated[
            str | None,
            typer.Option("--traits", "--trait", "-t", help="Names or patterns, comma-separated."),
        ] = None,
        traits_count: Annotated[
            int | None,
            typer.Option(
                "--traits-count", min=1, help="As if there were so many traits like these, all new."
            ),
        ] = None,
        calibrate: Annotated[
            bool,
            typer.Option(
                "--calibrate", help="Measure first: a short run in a temporary store, a minute or so."
            ),
        ] = False,
        device_profile: Annotated[
            str | None,
            typer.Option(
                "--device-profile", help="h100, a100, l40s or cpu: by formula, not as measured here."
            ),
        ] = None,
        gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs per run.")] = None,
        model_shape: Annotated[
            str | None, typer.Option("--model-shape", help="8b or 70b: in place of the experiment's models.")
        ] = None,
        params: Annotated[
            float | None, typer.Option("--params", help="Weights of the model, e.g. 3e9.")
        ] = None,
        generate_rate: Annotated[
            float | None, typer.Option("--generate-rate", min=1e-6, help="Tokens/s, responses.")
        ] = None,
        capture_rate: Annotated[
            float | None, typer.Option("--capture-rate", min=1e-6, help="Tokens/s, activations.")
        ] = None,
        steer_rate: Annotated[
            float | None, typer.Option("--steer-rate", min=1e-6, help="Tokens/s, steering.")
        ] = None,
        judge_rate: Annotated[
            float | None, typer.Option("--judge-rate", min=1e-6, help="Judgements per second.")
        ] = None,
        judge: Annotated[str | None, typer.Option("--judge", help="auto, openai or local.")] = None,
        judge_model: Annotated[str | None, typer.Option("--judge-model")] = None,
        judge_price: Annotated[
            str | None,
            typer.Option("--judge-price", help="USD per million tokens: prompt,completion, e.g. 0.4,1.6"),
        ] = None,
        chunk: Annotated[int, typer.Option("--chunk", min=1, help="Traits per run.")] = 16,
        set_: Annotated[
            list[str] | None, typer.Option("--set", help="Any option, as for `traits run`.")
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="As if nothing were there.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
        verbose: Annotated[bool, typer.Option("--verbose", help="Show the trace of an error.")] = False,
    ) -> None:
        """Estimate an experiment before it runs: rows, tokens, time, GPU hours, judge calls, storage.

        What is up to date counts nothing. Speeds are those of past runs on this model and machine, else of the
        last --calibrate, else by formula (docs/planning.md).
        """
        with one_line_errors(verbose):
            made = make(
                experiment,
                traits=traits,
                traits_count=traits_count,
                calibrate=calibrate,
                device_profile=device_profile,
                gpus=gpus,
                model_shape=model_shape,
                params=params,
                given_rates={
                    "generate": generate_rate,
                    "capture": capture_rate,
                    "steer": steer_rate,
                    "judge": judge_rate,
                },
                judge=judge,
                judge_model=judge_model,
                judge_price=judge_price,
                chunk=chunk,
                settings=set_ or [],
                force=force,
            )
            if as_json:
                typer.echo(json.dumps(made.record(), indent=2, ensure_ascii=False, allow_nan=False))
            else:
                _print(made, experiment)


def make(
    name: str,
    *,
    traits: str | None = None,
    traits_count: int | None = None,
    calibrate: bool = False,
    device_profile: str | None = None,
    gpus: int | None = None,
    model_shape: str | None = None,
    params: float | None = None,
    given_rates: dict[str, float | None] | None = None,
    judge: str | None = None,
    judge_model: str | None = None,
    judge_price: str | None = None,
    chunk: int = 16,
    settings: list[str] | None = None,
    force: bool = False,
) -> Estimate:
    """The estimate that `traits plan` prints. UserError for options and traits that cannot be planned."""
    from resources.judges.resource import JudgeResource
    from resources.models.layers import parse_layers
    from trait_assets.cli import judge_options, merge_settings
    from trait_assets.judging import judge_name
    from trait_assets.launch import select_traits
    from trait_assets.planning import measured as measuring
    from trait_assets.planning.arithmetic import Options, default_rates
    from trait_assets.planning.estimate import Todo, estimate
    from trait_assets.planning.survey import survey
    from trait_assets.results_commands import hand_context

    ctx = hand_context(name)
    overrides = merge_settings({}, settings or [])
    judges = JudgeResource(**judge_options(overrides.pop("judge", {}), judge, judge_model))
    e = ctx.experiment.with_overrides(overrides)
    ctx = replace(ctx, experiment=e, judges=judges, force=force)
    wanted = [part.strip() for part in traits.split(",") if part.strip()] if traits else None
    selection = select_traits(ctx.dataset_root, e, wanted)
    if not selection.traits:
        raise UserError(
            "no trait can be read: " + "; ".join(f"{t}: {r}" for t, r in selection.refused.items()),
            where=name,
            remedy="run `traits lint`",
        )
    notes = [f"left out {t}: {reason}" for t, reason in selection.refused.items()]
    model, steered = _shapes(e, model_shape, params, notes)
    base = _is_base(ctx, notes)
    llm = judges.resolved_backend() != "local"
    options = Options.of(
        e,
        base=base,
        layers=len(parse_layers(e.layers, model.layers)),
        all_layers=steered.layers,
        llm_judge=llm,
    )
    surveyed = survey(ctx, selection.traits, options.stages, base=base)
    if traits_count is not None:
        facts = _mean_trait([s.facts for s in surveyed])
        todo = [Todo(facts, traits_count)]
        notes.append(f"{traits_count} traits like the mean of {len(surveyed)} that are here, all new")
    else:
        todo = [Todo(s.facts, 1, None if force else s.left) for s in surveyed]
    facts = _mean_trait([s.facts for s in surveyed])
    device, here = _device(device_profile)
    rates = default_rates(
        model, steered, device, options, facts, gpus=gpus, server=e.generation.backend == "server"
    )
    foreign = device_profile is not None or model_shape is not None or params is not None
    if not foreign:
        key = f"{e.extraction_model} | {e.steered_model} | {here}"
        if calibrate:
            found = measuring.calibrate(
                ctx, selection.traits[0], say=lambda text: typer.secho(text, err=True, dim=True)
            )
            measuring.keep(paths.state_root(), key, found)
        else:
            found = measuring.kept(paths.state_root(), key) or measuring.Measured({}, {})
        if llm:
            # a calibration knows the local judge alone
            found.values.pop("judge", None)
            found.sources.pop("judge", None)
        rates = found.onto(rates)
        if not calibrate:
            served = e.generation.backend == "server"
            rates = measuring.from_index(
                ctx.workspace,
                model=e.extraction_model,
                steered=e.steered_model,
                device=here,
                judge=judge_name(judges.identity()),
                server=served,
            ).onto(rates)
        if not rates.sources["generate"].startswith(("past", "calib")):
            notes.append("nothing was measured on this model and machine: --calibrate takes a minute")
    elif calibrate:
        raise UserError(
            "what is not here cannot be measured",
            where="--calibrate",
            remedy="leave out --device-profile, --model-shape and --params",
        )
    for rate, value in (given_rates or {}).items():
        if value is not None:
            rates = replace(rates, **{rate: value}, sources={**rates.sources, rate: "given"})  # type: ignore[arg-type]
    on_gpu = device.name != "cpu"
    if not on_gpu:
        rates = replace(rates, gpus=1)
    price = _price(judge_price, judges, notes) if llm else None
    if not llm and "steering_results" in options.stages:
        notes.append(
            "the local judge is a stand-in and costs nothing; give --judge openai to plan for an LLM judge"
        )
    return estimate(
        options,
        model,
        steered,
        todo,
        rates,
        traits_per_run=chunk,
        price=price,
        on_gpu=on_gpu,
        notes=notes,
    )


def _shapes(
    e: Experiment, named: str | None, params: float | None, notes: list[str]
) -> tuple[ModelShape, ModelShape]:
    from resources.models.rows import ModelSpec
    from trait_assets.planning.arithmetic import SHAPES
    from trait_assets.planning.survey import guessed_shape, shape_of

    if named is not None:
        if named not in SHAPES:
            raise UserError(
                f"there is no model shape {named!r}",
                where="--model-shape",
                remedy=f"use {' or '.join(SHAPES)}, or --params",
            )
        return SHAPES[named], SHAPES[named]
    if params is not None:
        if not 1e5 <= params <= 1e13:
            raise UserError(f"{params:g} weights?", where="--params", remedy="give e.g. 3e9")
        shape = guessed_shape(f"{params:g} weights", params, "from --params")
        return shape, shape
    model = shape_of(ModelSpec(e.extraction_model, e.extraction_revision))
    steered = model
    if e.steered_model != e.extraction_model:
        steered = shape_of(ModelSpec(e.steered_model, e.steered_revision))
    for shape in {model.name: model, steered.name: steered}.values():
        if shape.guessed:
            notes.append(f"{shape.name}: {shape.params / 1e9:.3g} G weights, {shape.guessed}")
    return model, steered


def _is_base(ctx: Any, notes: list[str]) -> bool:
    e = ctx.experiment
    if e.base_model is not None:
        return bool(e.base_model)
    template = ctx.models.has_chat_template(ctx.extraction_spec())
    if template is None:
        notes.append(
            "whether the model is instruction-tuned cannot be told before it is downloaded: chat assumed"
        )
        return False
    return not template


def _device(profile: str | None) -> tuple[Device, str]:
    """The profile for formulas, and what measured runs call this machine."""
    from trait_assets.planning.arithmetic import DEVICES
    from trait_assets.planning.measured import device_here

    if profile is not None:
        if profile not in DEVICES:
            raise UserError(
                f"there is no device profile {profile!r}",
                where="--device-profile",
                remedy=f"use one of {', '.join(DEVICES)}",
            )
        return DEVICES[profile], profile
    here = device_here()
    known = next((d for name, d in DEVICES.items() if name in here.lower()), None)
    if known is None:
        known = DEVICES["cpu" if here.startswith(("cpu", "mps")) else "a100"]
    return known, here


def _price(given: str | None, judges: Any, notes: list[str]) -> Price | None:
    from trait_assets.planning.arithmetic import Price

    if given is not None:
        try:
            prompt, completion = (float(part) for part in given.split(","))
        except ValueError as error:
            raise UserError(
                f"{given!r} is no pair of prices",
                where="--judge-price",
                remedy="write prompt,completion: 0.4,1.6",
            ) from error
        return Price(prompt, completion)
    if judges.prompt_usd_per_million is not None and judges.completion_usd_per_million is not None:
        return Price(judges.prompt_usd_per_million, judges.completion_usd_per_million)
    notes.append(
        "no cost: give the judge's price with --judge-price prompt,completion (USD per million tokens)"
    )
    return None


def _mean_trait(facts: list[Any]) -> Any:
    """One trait with the mean of everything."""
    first = facts[0]
    means = {name: sum(getattr(one, name) for one in facts) / len(facts) for name in vars(first)}
    whole = ("scenarios", "judged_texts", "questions_search", "questions_report")
    return replace(first, **{n: round(v) if n in whole else v for n, v in means.items()})


def _print(made: Estimate, name: str) -> None:
    from rich.table import Table

    from trait_assets.planning.estimate import say_bytes, say_count, say_seconds
    from trait_assets.report.overview import console

    table = Table(title=f"Plan of experiment {name}", title_justify="left")
    table.add_column("stage")
    columns = ["to do", "rows", "tokens", "time"]
    columns += ["GPU hours"] if made.on_gpu else []
    columns += ["judge calls", "judge tokens"] + (["judge USD"] if made.judge_usd is not None else [])
    for column in [*columns, "storage"]:
        table.add_column(column, justify="right")

    def cells(need: Any, seconds: float, gpu_hours: float, usd: float | None) -> list[str]:
        shown = [say_count(need.rows), say_count(need.tokens), say_seconds(seconds)]
        shown += [f"{gpu_hours:.2f}"] if made.on_gpu else []
        shown += [
            say_count(need.judge_calls),
            say_count(need.judge_prompt_tokens + need.judge_completion_tokens),
        ]
        shown += [f"{usd or 0:.2f}"] if made.judge_usd is not None else []
        return [*shown, say_bytes(need.storage_bytes)]

    for stage in made.stages:
        todo = f"{stage.traits}" if not stage.current else f"{stage.traits} of {stage.traits + stage.current}"
        table.add_row(stage.stage, todo, *cells(stage.need, stage.seconds, stage.gpu_hours, stage.judge_usd))
    table.add_section()
    table.add_row(
        "in all",
        f"{made.runs} run{'' if made.runs == 1 else 's'}",
        *cells(made.need, made.seconds, made.gpu_hours, made.judge_usd),
    )
    out = console()
    out.print(table)
    out.print(f"The time includes {say_seconds(made.overhead_seconds)} for starting and loading.")
    rates = made.rates
    for label, value, source in (
        ("responses", f"{rates.generate:,.0f} tokens/s", rates.sources["generate"]),
        ("activations", f"{rates.capture:,.0f} tokens/s", rates.sources["capture"]),
        ("steering", f"{rates.steer:,.0f} tokens/s", rates.sources["steer"]),
        ("judge", f"{rates.judge:,.1f} judgements/s", rates.sources["judge"]),
    ):
        out.print(f"  {label}: {value} ({source})")
    for note in made.notes:
        out.print(f"  note: {note}")
