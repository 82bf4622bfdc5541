"""Commands about what is stored: lineage, sql, diff, rebuild-index, publish-index, forget, export, import, judge-check, try-out.

Options in, a table out; nothing here computes. `register` hangs the commands into the program.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from storage.errors import UserError
from trait_assets import paths

if TYPE_CHECKING:
    from storage.workspace import Workspace
    from trait_assets.pipeline import StageContext

OneLineErrors = Callable[[bool], AbstractContextManager[None]]
ExperimentOption = Annotated[
    str, typer.Option("--experiment", "-e", help="Name of a folder under experiments/.")
]
TraitOption = Annotated[str, typer.Option("--trait", "-t", help="category/trait")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the trace of an error.")]
FormatOption = Annotated[str | None, typer.Option("--format", help="pt, safetensors, gguf or persona.")]


def workspace() -> Workspace:
    from storage.workspace import Workspace

    return Workspace(paths.results_root(), paths.lineage_path())


def hand_context(experiment: str) -> StageContext:
    """What a stage would be handed, for commands that look at one thing outside a run."""
    from trait_assets.definitions import default_resources
    from trait_assets.experiments import load_experiment
    from trait_assets.pipeline import StageContext
    from trait_assets.progress import LinesProgress

    resources = default_resources()
    return StageContext(
        experiment=load_experiment(paths.experiments_root(), experiment),
        workspace=workspace(),
        models=resources["models"],
        judges=resources["judges"],
        dataset_root=paths.dataset_root(),
        run_id="by-hand",
        progress=LinesProgress(),
    )


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False, default=str))


def _print(thing: Any) -> None:
    from trait_assets.report.overview import console

    console().print(thing)


def register(app: typer.Typer, one_line_errors: OneLineErrors) -> None:
    """Add the commands to `app`; `one_line_errors(verbose)` turns a UserError into a line and exit code 2."""

    @app.command()
    def lineage(
        what: Annotated[
            str, typer.Argument(help="experiment/category/trait, a file of a result, or a fingerprint.")
        ],
        stage: Annotated[
            str | None, typer.Option("--stage", help="Default the last stage that the trait has.")
        ] = None,
        layer: Annotated[int | None, typer.Option("--layer")] = None,
        method: Annotated[str | None, typer.Option("--method")] = None,
        name: Annotated[
            str | None, typer.Option("--name", help="A single number, such as val_accuracy.")
        ] = None,
        lines: Annotated[
            int, typer.Option("--lines", help="Scenario lines shown per side; -1 shows all.")
        ] = 3,
        as_json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        """Show everything a result was made from, down to the scenario lines, and whether each is still current."""
        with one_line_errors(verbose):
            from storage.lineage import Now, find
            from storage.lineage import lineage as trace
            from storage.show import tree
            from trait_assets.stages import code_versions

            store = workspace()
            target = find(store, what, stage=stage, layer=layer, method=method, name=name)
            now = Now(source_hash=_source_hash, code_versions=code_versions())
            node = trace(store, target, now=now, lines=None if lines < 0 else lines)
            if as_json:
                _print_json(node.record())
            else:
                _print(tree(node))

    @app.command()
    def sql(
        query: Annotated[str, typer.Argument(help="Read-only SQL; start with SHOW TABLES.")],
        as_json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        """Query the lineage database, read-only, on a snapshot."""
        with one_line_errors(verbose):
            from storage.show import table

            result = workspace().index.sql(query)
            if as_json:
                _print_json([dict(zip(result.columns, row, strict=True)) for row in result.rows])
            else:
                _print(table(result))

    @app.command("rebuild-index")
    def rebuild_index(verbose: VerboseOption = False) -> None:
        """Make the lineage database anew from the stored files."""
        with one_line_errors(verbose):
            store = workspace()
            typer.echo(f"{store.index.rebuild()} files indexed in {store.index.path}")

    @app.command("publish-index")
    def publish_index(verbose: VerboseOption = False) -> None:
        """Put a snapshot of the lineage database into the store, for other machines and for any DuckDB."""
        with one_line_errors(verbose):
            where, size = workspace().index.publish()
            typer.echo(f"published {where} ({size / 1e6:.1f} MB)")

    @app.command()
    def diff(
        experiment_a: Annotated[str, typer.Argument()],
        experiment_b: Annotated[str, typer.Argument()],
        traits: Annotated[str | None, typer.Option("--traits", "-t")] = None,
        as_json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        """Compare two experiments: inputs, options and numbers that differ, and cosines between their vectors."""
        with one_line_errors(verbose):
            from trait_assets.compare import compare_experiments, show

            wanted = [t.strip() for t in traits.split(",")] if traits else None
            comparison = compare_experiments(workspace(), experiment_a, experiment_b, wanted)
            if as_json:
                _print_json(comparison.record())
            else:
                _print(show(comparison))

    @app.command()
    def forget(
        trait: Annotated[str, typer.Argument(help="category/trait")],
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
        yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
        verbose: VerboseOption = False,
    ) -> None:
        """Remove a trait's results everywhere: artifacts, caches, rows and its partition. Its folder stays."""
        with one_line_errors(verbose):
            from storage.forget import forget as forget_trait
            from storage.keys import check_trait
            from trait_assets.launch import open_instance
            from trait_assets.partitions import TRAITS

            store = workspace()
            check_trait(trait)
            with open_instance() as instance:
                # a kill after the files went leaves the partition: a second call removes it
                partition = instance.has_dynamic_partition(TRAITS, trait)
                try:
                    found = forget_trait(store, trait, dry_run=True).keys
                except UserError:
                    if not partition:
                        raise
                    found = ()
                for key in found if dry_run else ():
                    typer.echo(key)
                typer.echo(f"{len(found)} files of {trait}")
                if dry_run:
                    return
                if not yes and not typer.confirm("Remove them?"):
                    raise typer.Exit(1)
                try:
                    rows = forget_trait(store, trait).rows if found else 0
                finally:
                    if partition:
                        instance.delete_dynamic_partition(TRAITS, trait)
                typer.echo(f"removed {len(found)} files and {rows} rows")

    @app.command("export")
    def export_command(
        experiment: ExperimentOption,
        trait: TraitOption,
        out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")],
        format: Annotated[
            str, typer.Option("--format", help="pt, safetensors, gguf or persona.")
        ] = "safetensors",
        methods: Annotated[str | None, typer.Option("--methods")] = None,
        layers: Annotated[str | None, typer.Option("--layers", help="Comma-separated layer numbers.")] = None,
        architecture: Annotated[
            str | None, typer.Option("--architecture", help="llama.cpp's name of the architecture, for gguf.")
        ] = None,
        activations: Annotated[
            bool, typer.Option("--activations", help="With pt: the activations too.")
        ] = False,
        verbose: VerboseOption = False,
    ) -> None:
        """Write a trait's vectors for other programs."""
        with one_line_errors(verbose):
            from trait_assets.vectors.exchange import export_activations, export_vectors

            try:
                chosen = [int(part) for part in layers.split(",")] if layers else None
            except ValueError as error:
                raise UserError(
                    f"`--layers {layers}` is no list of numbers", remedy="write e.g. 10,17"
                ) from error
            written = export_vectors(
                workspace(),
                experiment,
                trait,
                out,
                format=format,  # type: ignore[arg-type]
                methods=methods.split(",") if methods else None,
                layers=chosen,
                architecture=architecture,
            )
            if activations:
                written += export_activations(workspace(), experiment, trait, out)
            for file in written:
                typer.echo(f"wrote {file.path}" + (f" ({file.note})" if file.note else ""))

    @app.command("import")
    def import_command(
        path: Annotated[Path, typer.Argument(help="File, or folder of layerN.pt files.")],
        experiment: ExperimentOption,
        trait: TraitOption,
        component: Annotated[str, typer.Option("--component")] = "residual",
        position: Annotated[str | None, typer.Option("--position")] = None,
        format: FormatOption = None,
        any_model: Annotated[
            bool, typer.Option("--any-model", help="Accept vectors of another model of the same shape.")
        ] = False,
        verbose: VerboseOption = False,
    ) -> None:
        """Keep vectors made elsewhere in an experiment; refused where hook site, width or model do not fit."""
        with one_line_errors(verbose):
            from trait_assets.vectors.exchange import Fit, import_vectors, save_imported

            ctx = hand_context(experiment)
            model = ctx.application_model()
            fit = Fit(
                width=model.hidden_size if component == "residual" else None,
                n_layers=model.n_layers,
                model=model.identity.model,
                component=component,
            )
            file = import_vectors(
                path,
                trait=trait,
                fit=fit,
                format=format,  # type: ignore[arg-type]
                position=position,
                any_model=any_model,
            )
            key = save_imported(ctx.workspace, experiment, file, run_id="by-hand")
            typer.echo(f"wrote {ctx.workspace.store.describe(key)}")

    @app.command("judge-check")
    def judge_check(
        labelled: Annotated[
            Path | None,
            typer.Option(
                "--labelled", help="JSONL of trait, prompt, text, label; default the shipped texts."
            ),
        ] = None,
        judge: Annotated[str, typer.Option("--judge", help="auto, openai or local.")] = "auto",
        judge_model: Annotated[str | None, typer.Option("--judge-model")] = None,
        scenarios: Annotated[
            bool,
            typer.Option(
                "--scenarios",
                help="Also score the traits' own scenarios; a fitted judge does it out of fold. An LLM judge is asked "
                "some 200 questions per trait.",
            ),
        ] = False,
        setting: Annotated[
            list[str] | None,
            typer.Option("--set", help="An option of the judge, e.g. --set judge.scoring=text."),
        ] = None,
        as_json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        """Score hand-labelled texts with a judge: rank correlation, AUC, error and abstentions per trait."""
        with one_line_errors(verbose):
            from resources.judges.agreement import SHIPPED, check_agreement, check_sides, load_labelled
            from resources.judges.resource import JudgeResource
            from trait_assets.cli import judge_options, merge_settings
            from trait_assets.judging import Spending, trait_context
            from trait_assets.progress import LinesProgress
            from trait_assets.scenarios.dataset import discover, load_trait
            from trait_assets.scenarios.vetting import NEG_THRESHOLD, POS_THRESHOLD

            rows = load_labelled(labelled or SHIPPED)
            known = set(discover(paths.dataset_root()).traits)
            contexts = {
                trait: trait_context(load_trait(paths.dataset_root(), trait, require_steering=False))
                for trait in sorted({row.trait for row in rows} & known)
            }
            given = merge_settings({}, setting or [])
            options = judge_options(given.pop("judge", {}), judge, judge_model)
            if given:
                raise UserError(
                    f"`{next(iter(given))}` is no option of a judge",
                    where="--set",
                    remedy="write --set judge.NAME=VALUE",
                )
            store = workspace()
            with LinesProgress().task("judge-check", None) as task:
                spending = Spending(task)
                scorer = JudgeResource(**options).judge(
                    lambda trait: store.row_cache("judgements", trait), on_progress=spending.show
                )

                def count(_: Any) -> None:
                    task.advance(1)

                report = check_agreement(scorer, rows, contexts, on_judged=count)
                sides = (
                    check_sides(
                        scorer,
                        contexts,
                        pos_threshold=POS_THRESHOLD,
                        neg_threshold=NEG_THRESHOLD,
                        on_judged=count,
                    )
                    if scenarios
                    else ()
                )
                spending.show(scorer.usage(), last=True)
            document = report.to_json()
            if sides:
                document["scenarios"] = [row.record() for row in sides]
            if as_json:
                _print_json(document)
            else:
                _print(agreement_table(document))
                if sides:
                    _print(sides_table(document["scenarios"]))

    @app.command()
    def steer(
        prompt: Annotated[str, typer.Argument(help="What the model is asked.")],
        experiment: ExperimentOption,
        trait: TraitOption,
        dose: Annotated[
            list[float] | None,
            typer.Option("--dose", help="Relative dose; may be given more than once, may be negative."),
        ] = None,
        layer: Annotated[int | None, typer.Option("--layer")] = None,
        method: Annotated[str | None, typer.Option("--method")] = None,
        max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 64,
        temperature: Annotated[float, typer.Option("--temperature")] = 0.0,
        verbose: VerboseOption = False,
    ) -> None:
        """Try a vector by hand: unsteered and steered text side by side. `steering` runs stage 5."""
        with one_line_errors(verbose):
            from trait_assets.steering.by_hand import steer_by_hand

            result = steer_by_hand(
                hand_context(experiment),
                trait,
                prompt,
                doses=dose,
                layer=layer,
                method=method,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )
            _print(result.table())
            for note in result.notes:
                typer.echo(note)


def _source_hash(trait: str) -> str | None:
    from trait_assets.scenarios.dataset import trait_hash

    try:
        return trait_hash(paths.dataset_root(), trait)
    except UserError:
        return None


def agreement_table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    judge = report["judge"]
    stand_in = " (stand-in)" if report["stand_in"] else ""
    table = Table(title=f"Judge {judge.get('model') or judge.get('kind')}{stand_in}", title_justify="left")
    for column in ("trait", "texts", "scored", "Spearman", "AUC", "mean |error|", "abstained"):
        table.add_column(column)

    def number(value: Any) -> str:
        return "–" if value is None else f"{value:.2f}"

    for row in [*report["traits"], report["overall"]]:
        table.add_row(
            row["trait"],
            str(row["n"]),
            str(row["n_scored"]),
            number(row["spearman"]),
            number(row["auc"]),
            number(row["mae"]),
            ", ".join(f"{reason} {count}" for reason, count in row["abstained"].items()) or "–",
        )
    return table


def sides_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="Its scores of the traits' own scenarios", title_justify="left")
    for column in ("trait", "scenarios", "scored", "right side of 50", "AUC", "kept at 60 / 40", "abstained"):
        table.add_column(column)

    def number(row: dict[str, Any], name: str, form: str) -> str:
        return format(row[name], form) if name in row else "–"

    for row in rows:
        table.add_row(
            row["trait"],
            str(row["n"]),
            str(row["n_scored"]),
            number(row, "accuracy", ".1%"),
            number(row, "auc", ".3f"),
            f"{number(row, 'kept_positive', '.0%')} / {number(row, 'kept_negative', '.0%')}",
            ", ".join(f"{reason} {count}" for reason, count in row["abstained"].items()) or "–",
        )
    return table
