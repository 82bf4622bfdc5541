"""The command line `traits`: thin. Options in, a Dagster run or a stored result out, a table at the end.

Everything that computes goes through Dagster on the same instance as the UI, so what is done by hand is in the history too.
Errors are one line with a remedy; `--verbose` adds the trace. Exit codes: 0 all done, 1 some trait failed, 2 bad input.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from storage.errors import UserError
from trait_assets import paths
from trait_assets.experiments import Experiment, load_experiment
from trait_assets.pipeline import stages_of

warnings.filterwarnings("ignore", module="dagster")

app = typer.Typer(
    name="traits",
    help="Trait vectors from natural scenarios to causal proof, on Dagster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ExperimentOption = Annotated[
    str, typer.Option("--experiment", "-e", help="Name of a folder under experiments/.")
]
TraitsOption = Annotated[
    str | None,
    typer.Option("--traits", "--trait", "-t", help="category/trait names or patterns, comma-separated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the trace of an error.")]


@contextmanager
def one_line_errors(verbose: bool) -> Iterator[None]:
    """A UserError is a line on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        for note in getattr(error, "__notes__", []):
            typer.secho(f"  {note}", err=True)
        if verbose:
            traceback.print_exc()
        raise typer.Exit(2) from error


def _stage_command(stages: Sequence[str] | None, summary: str) -> Callable[..., None]:
    """A command that materialises some stages (None: all that the experiment has). All share these options."""

    def command(
        experiment: ExperimentOption,
        traits: TraitsOption = None,
        extraction_model: Annotated[str | None, typer.Option("--extraction-model", "--model")] = None,
        application_model: Annotated[str | None, typer.Option("--application-model")] = None,
        steering: Annotated[bool | None, typer.Option("--steering/--no-steering", help="Stage 5.")] = None,
        vet_scenarios: Annotated[
            bool | None, typer.Option("--vet-scenarios/--no-vet-scenarios", help="Stage 0.5.")
        ] = None,
        vet: Annotated[bool | None, typer.Option("--vet/--no-vet", help="Both vetting stages.")] = None,
        pos_threshold: Annotated[float | None, typer.Option("--pos-threshold")] = None,
        neg_threshold: Annotated[float | None, typer.Option("--neg-threshold")] = None,
        max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens")] = None,
        temperature: Annotated[float | None, typer.Option("--temperature")] = None,
        base_model: Annotated[
            bool | None,
            typer.Option("--base-model/--it-model", help="Text completion / chat; default by the tokenizer."),
        ] = None,
        vetting_filter: Annotated[
            bool | None,
            typer.Option("--vetting-filter/--no-vetting-filter", help="Leave failed responses out."),
        ] = None,
        val_split: Annotated[float | None, typer.Option("--val-split")] = None,
        position: Annotated[
            str | None, typer.Option("--position", help="<frame>[<slice>], comma-separated.")
        ] = None,
        component: Annotated[
            str | None, typer.Option("--component", help="Hook sites, comma-separated.")
        ] = None,
        methods: Annotated[str | None, typer.Option("--methods", help="Comma-separated.")] = None,
        layers: Annotated[str | None, typer.Option("--layers", help="16 | 5,10 | 5-20 | 30%-60%")] = None,
        prefill_only: Annotated[bool | None, typer.Option("--prefill-only/--no-prefill-only")] = None,
        token_position: Annotated[
            str | None, typer.Option("--token-position", help="last, first or mean.")
        ] = None,
        scenario_limit: Annotated[
            int | None, typer.Option("--scenario-limit", help="Scenarios per side.")
        ] = None,
        batch_size: Annotated[int | None, typer.Option("--batch-size", help="Default automatic.")] = None,
        seed: Annotated[int | None, typer.Option("--seed")] = None,
        generation: Annotated[
            str | None, typer.Option("--generation", help="Where responses are generated: local or server.")
        ] = None,
        generation_url: Annotated[
            str | None,
            typer.Option("--generation-url", help="A vLLM or SGLang server, e.g. http://gpu:8000/v1."),
        ] = None,
        judge: Annotated[str | None, typer.Option("--judge", help="auto, openai or local.")] = None,
        judge_model: Annotated[str | None, typer.Option("--judge-model")] = None,
        set_: Annotated[
            list[str] | None,
            typer.Option(
                "--set",
                help="Any other option, e.g. --set min_kept=5, --set steer.questions=8 or --set judge.max_cost_usd=2.",
            ),
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Recompute what is up to date.")] = False,
        as_json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        given = {
            "extraction_model": extraction_model,
            "application_model": application_model,
            "steering": steering,
            "vet_scenarios": vet_scenarios,
            "vet": vet,
            "pos_threshold": pos_threshold,
            "neg_threshold": neg_threshold,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "base_model": base_model,
            "vetting_filter": vetting_filter,
            "val_split": val_split,
            "position": position,
            "component": component,
            "methods": methods,
            "layers": layers,
            "prefill_only": prefill_only,
            "token_position": token_position,
            "scenario_limit": scenario_limit,
            "batch_size": batch_size,
            "seed": seed,
        }
        server = {"backend": generation, "server_url": generation_url}
        server = {name: value for name, value in server.items() if value is not None}
        with one_line_errors(verbose):
            overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
            if server:
                overrides["generation"] = dict(server)
            overrides = merge_settings(overrides, set_ or [])
            judges = judge_options(overrides.pop("judge", {}), judge, judge_model)
            failed = materialise(
                experiment,
                _split(traits),
                stages,
                overrides,
                judges=judges,
                force=force,
                as_json=as_json,
                verbose=verbose,
            )
        if failed:
            raise typer.Exit(1)

    command.__doc__ = summary
    return command


STAGE_COMMANDS: dict[str, tuple[tuple[str, ...] | None, str]] = {
    "run": (None, "Bring everything of an experiment up to date: all stages and tables."),
    "vet-scenarios": (("scenarios", "vetted_scenarios"), "Stage 0.5: a judge scores the scenarios."),
    "generate": (("responses",), "Stage 1: the extraction model continues the scenarios."),
    "vet-responses": (("vetted_responses",), "Stage 1.5: a judge scores the responses."),
    "activations": (("activations",), "Stage 2: hidden states at every layer."),
    "vectors": (("vectors",), "Stage 3: a direction per layer and method."),
    "evaluate": (("vector_evaluation",), "Stage 4: quality on held-out rows, and the table over all traits."),
    "steering": (
        ("steering_results",),
        "Stage 5: steered generation, judged, and the summary over all traits.",
    ),
}
for _name, (_stages, _summary) in STAGE_COMMANDS.items():
    app.command(_name, help=_summary)(_stage_command(_stages, _summary))


def _split(value: str | None) -> list[str] | None:
    return [part.strip() for part in value.split(",") if part.strip()] if value else None


def merge_settings(overrides: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """`--set key=value`, dotted for nested options; the value is read as YAML."""
    merged = dict(overrides)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise UserError(
                f"`--set {setting}` is not key=value", remedy="write e.g. --set steer.questions=8"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"`--set {setting}`: the value cannot be read", remedy="quote it as YAML"
            ) from error
        target = merged
        *parents, last = name.strip().split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UserError(
                    f"`--set {setting}`: {parent} has no options of its own", remedy="drop the dot"
                )
        target[last] = value
    return merged


def judge_options(given: Any, backend: str | None, model: str | None) -> dict[str, Any]:
    """The configuration of the judge from `--set judge.…`, `--judge` and `--judge-model`; UserError naming
    the option that does not exist or cannot have that value. A key is refused: run configurations are stored."""
    from pydantic import ValidationError

    from resources.judges.resource import JudgeResource

    named = {name: value for name, value in {"backend": backend, "model": model}.items() if value is not None}
    known = sorted(set(JudgeResource.model_fields) - {"api_key"})
    if not isinstance(given, dict):
        raise UserError(
            "a judge is no single value", where="--set judge", remedy="write --set judge.max_calls=500"
        )
    for name in given:
        if name == "api_key":
            raise UserError(
                "a key on the command line would be stored with the run",
                where="--set judge.api_key",
                remedy="set the variable OPENAI_API_KEY",
            )
        if name not in known:
            raise UserError(
                "the judge has no such option",
                where=f"--set judge.{name}",
                remedy=f"use one of {', '.join(known)}",
            )
    options = {**given, **named}
    try:
        JudgeResource(**options)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise UserError(
            first["msg"],
            where=f"judge option `{'.'.join(str(part) for part in first['loc'])}`",
            remedy="correct it",
        ) from error
    return options


def materialise(
    experiment_name: str,
    wanted: list[str] | None,
    stages: Sequence[str] | None,
    overrides: dict[str, Any],
    *,
    judges: dict[str, Any],
    force: bool,
    as_json: bool,
    verbose: bool,
) -> bool:
    """Check everything that can be checked cheaply, launch, report. Returns whether any trait failed."""
    experiment = load_experiment(paths.experiments_root(), experiment_name)
    effective = experiment.with_overrides(overrides)

    from trait_assets import launch

    launch.check_methods(effective)
    launch.check_models(effective, {})
    selection = launch.select_traits(paths.dataset_root(), effective, wanted)
    if wanted and effective.traits is not None:
        # naming a trait on the command line is reason enough to run it
        overrides = {**overrides, "traits": sorted({*effective.traits, *selection.traits})}
    for trait, reason in selection.refused.items():
        typer.secho(f"refused {trait}: {reason}", fg=typer.colors.RED, err=True)
    if not selection.traits:
        return True
    available = stages_of(effective)
    chosen = list(stages) if stages is not None else available
    missing = [stage for stage in chosen if stage not in available]
    if missing:
        raise UserError(
            f"experiment {effective.name} has no stage {', '.join(missing)} with these options",
            remedy="drop --prefill-only or --no-steering, or run another stage",
        )
    with launch.open_instance() as instance:
        launcher = launch.Launcher(
            instance,
            experiment,
            overrides,
            judges=judges,
            force=force,
            bars=sys.stderr.isatty() and not as_json,
            report=launch.LaunchReport(refused=dict(selection.refused)),
        )
        report = launcher.launch(selection.traits, chosen)
    from trait_assets.report import overview

    if as_json:
        document = overview.report_json(open_workspace(), effective, selection.traits, report)
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        overview.print_report(
            overview.console(), open_workspace(), effective, selection.traits, report, verbose=verbose
        )
    return bool(report.failures)


def open_workspace() -> Any:
    from storage.workspace import Workspace

    return Workspace(paths.results_root(), paths.lineage_path())


def _experiment(name: str) -> Experiment:
    return load_experiment(paths.experiments_root(), name)


@app.command()
def show(
    experiment: ExperimentOption,
    traits: TraitsOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show an experiment's results: per trait the rows kept, best vector, held-out accuracy, steering."""
    with one_line_errors(verbose):
        from trait_assets.launch import select_traits
        from trait_assets.report import overview

        config = _experiment(experiment)
        selection = select_traits(paths.dataset_root(), config, _split(traits))
        workspace = open_workspace()
        rows = [overview.trait_row(workspace, config, trait) for trait in selection.traits]
        if as_json:
            typer.echo(json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False))
        else:
            overview.print_results(overview.console(), workspace, config, rows)


@app.command()
def status(
    experiment: ExperimentOption,
    traits: TraitsOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show the state of every trait in every stage: current, out of date, skipped, missing, and why."""
    with one_line_errors(verbose):
        from trait_assets.report import overview

        config = _experiment(experiment)
        rows = overview.status_rows(
            open_workspace(), config, paths.dataset_root(), _split(traits), stages_of(config)
        )
        if as_json:
            typer.echo(json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False))
        else:
            overview.print_status(overview.console(), config, rows, stages_of(config))


def _register() -> None:
    from trait_assets import backfill_commands, results_commands
    from trait_assets.evaluation import commands as evaluation_commands
    from trait_assets.planning import commands as planning_commands
    from trait_assets.scenarios import commands as scenario_commands

    planning_commands.register(app, one_line_errors)
    scenario_commands.register(app, one_line_errors)
    evaluation_commands.register(app, one_line_errors)
    results_commands.register(app, one_line_errors)
    backfill_commands.register(app, one_line_errors)


@app.command("new-experiment")
def new_experiment(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits, - and _.")],
    extraction_model: Annotated[str, typer.Option("--extraction-model")],
    application_model: Annotated[str | None, typer.Option("--application-model")] = None,
    traits: TraitsOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Write experiments/<name>/config.yaml with the models given and every default as a comment."""
    with one_line_errors(verbose):
        from trait_assets.scaffold_experiment import write_experiment

        path = write_experiment(
            paths.experiments_root(), name, extraction_model, application_model, _split(traits)
        )
        typer.echo(f"wrote {path}; a running `dagster dev` shows it after Reload definitions")


@app.command()
def ui(
    port: Annotated[int, typer.Option("--port", "-p")] = 3000,
    host: Annotated[str, typer.Option("--host", help="Loopback unless you say otherwise.")] = "127.0.0.1",
) -> None:
    """Open the Dagster UI with the sensors running (`dagster dev` on workspace.yaml)."""
    from trait_assets.launch import instance_folder, open_instance

    with open_instance():
        # the pools' limits are set before the first run
        pass
    dagster = shutil.which(
        "dagster", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if dagster is None:
        typer.secho(
            "error: the command `dagster` is not installed — run make install", fg=typer.colors.RED, err=True
        )
        raise typer.Exit(2)
    command = [dagster, "dev", "-w", "workspace.yaml", "-h", host, "-p", str(port)]
    # a notice for authors of Dagster projects, not for those who open this one
    quiet = "ignore:Function `dev_command` is superseded"
    environment = {"DAGSTER_HOME": str(instance_folder("ui")), "PYTHONWARNINGS": quiet, **os.environ}
    typer.echo(f"The UI opens on http://{host}:{port} in a few seconds; Ctrl-C ends it.", err=True)
    raise typer.Exit(subprocess.call(command, cwd=paths.REPOSITORY, env=environment))


_register()


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a text that the terminal's encoding does not have is shown as an escape, which inside JSON is one, too
            stream.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
