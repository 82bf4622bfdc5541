"""The command `traits backfill`: options in, the runs of a backfill or its place in the UI out.

`register` hangs it into the program. What a backfill consists of is planned in `backfill.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from storage.errors import UserError
from trait_assets import paths
from trait_assets.backfill import DEFAULT_URL, Backfill, Server, plan

if TYPE_CHECKING:
    from trait_assets.experiments import Experiment
    from trait_assets.launch import Selection

OneLineErrors = Callable[[bool], AbstractContextManager[None]]


def register(app: typer.Typer, one_line_errors: OneLineErrors) -> None:
    """Add the command to `app`; `one_line_errors(verbose)` turns a UserError into a line and exit code 2."""

    @app.command()
    def backfill(
        traits: Annotated[
            str | None,
            typer.Option(
                "--traits", "--trait", "-t", help="Names or patterns, comma-separated; default all."
            ),
        ] = None,
        experiment: Annotated[
            list[str] | None,
            typer.Option("--experiment", "-e", help="May be given several times; default every experiment."),
        ] = None,
        stage: Annotated[
            list[str] | None,
            typer.Option("--stage", "-s", help="Stages, comma-separated or repeated; default all per trait."),
        ] = None,
        chunk: Annotated[
            int | None, typer.Option("--chunk", min=1, help="Traits per run; default and most: 16.")
        ] = None,
        url: Annotated[str, typer.Option("--url", help="The running webserver.")] = DEFAULT_URL,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Print the runs and launch nothing; needs no webserver.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
        verbose: Annotated[bool, typer.Option("--verbose", help="Show the trace of an error.")] = False,
    ) -> None:
        """Launch batched backfills on the running UI, where their progress shows on the Backfills page.

        What is up to date is not computed again. Tables over all traits follow by themselves.
        """
        with one_line_errors(verbose):
            names = _split(experiment)
            selected, left_out = select(names, _split(traits and [traits]))
            stages = _split(stage)
            for config, selection in selected:
                # whatever is wrong with the options is said before a server is asked
                backfills_of(config, selection.traits, stages, selection.traits, chunk)
            server = None
            if dry_run:
                known = _local_traits()
            else:
                server = Server(url)
                server.connect()
                known = server.known
            wanted = {trait for _, selection in selected for trait in selection.traits}
            new = sorted(wanted - set(known))
            if server is not None and new:
                from trait_assets.partitions import TRAITS

                server.register(new, TRAITS)
                known = server.known
            elif new:
                known = [*known, *new]
            backfills = [
                one
                for config, selection in selected
                for one in backfills_of(config, selection.traits, stages, known, chunk)
            ]
            ids = [server.launch(one) for one in backfills] if server is not None else []
        refused = {t: reason for _, selection in selected for t, reason in selection.refused.items()}
        for name in left_out:
            typer.echo(f"experiment {name} covers none of these traits", err=True)
        for trait, reason in refused.items():
            typer.secho(f"refused {trait}: {reason}", fg=typer.colors.RED, err=True)
        links = [server.link(one) for one in ids] if server is not None else []
        if as_json:
            typer.echo(json.dumps(document(backfills, ids, links, refused), indent=2, ensure_ascii=False))
        else:
            _print(backfills, ids, links)
            if server is not None and not server.daemon_healthy:
                typer.secho(
                    "no daemon is running: the backfill waits until `make ui` (or dagster-daemon run) starts one",
                    fg=typer.colors.YELLOW,
                    err=True,
                )
        if refused:
            raise typer.Exit(1)


def select(
    names: Sequence[str] | None, wanted: list[str] | None
) -> tuple[list[tuple[Experiment, Selection]], list[str]]:
    """Each experiment with the traits to do, and the experiments that cover none of those wanted.

    Raises UserError where a name or pattern matches nothing at all, or no experiment covers it.
    """
    from trait_assets.definitions import load_experiments
    from trait_assets.experiments import load_experiment
    from trait_assets.launch import Selection, select_traits

    root = paths.experiments_root()
    configs = [load_experiment(root, name) for name in names] if names else load_experiments(root)[0]
    if not configs:
        raise UserError("there is no experiment", where=str(root), remedy="run `traits new-experiment NAME`")
    selected, left_out = [], []
    for config in configs:
        found = select_traits(paths.dataset_root(), config, wanted)
        # a run takes its traits from the config: what the experiment leaves out would only be skipped
        good = [trait for trait in found.traits if config.covers(trait)]
        refused = {trait: why for trait, why in found.refused.items() if config.covers(trait)}
        if good or refused:
            selected.append((config, Selection(good, refused)))
        else:
            left_out.append(config.name)
    if not selected:
        raise UserError(
            f"no experiment covers {', '.join(wanted or [])}",
            remedy="add it to `traits` in the experiment's config.yaml, or use `traits run --traits`",
        )
    return selected, left_out


def backfills_of(
    config: Experiment,
    traits: Sequence[str],
    stages: Sequence[str] | None,
    known: Sequence[str],
    chunk: int | None,
) -> list[Backfill]:
    """The backfills of one experiment. UserError for a stage that it lacks and for a chunk above the policy."""
    from trait_assets.partitions import contiguous_ranges
    from trait_assets.pipeline import TABLES, stages_of
    from trait_assets.stage import TRAITS_PER_RUN

    chunk = chunk or TRAITS_PER_RUN
    if chunk > TRAITS_PER_RUN:
        raise UserError(
            f"--chunk {chunk} is more than the {TRAITS_PER_RUN} traits that one run takes",
            remedy=f"give at most {TRAITS_PER_RUN}",
        )
    available = stages_of(config)
    for stage in stages or []:
        if stage in TABLES:
            raise UserError(
                f"{stage} is a table over all traits and has no backfill",
                remedy=f"backfill {TABLES[stage]}: the table follows by itself",
            )
        if stage not in available:
            raise UserError(
                f"experiment {config.name} has no stage `{stage}`",
                remedy=f"its stages are {', '.join(available)}",
            )
    chosen = [stage for stage in available if not stages or stage in stages]
    runs = contiguous_ranges(known, traits, chunk)
    return plan(config.name, chosen, runs, known, TRAITS_PER_RUN)


def document(
    backfills: Sequence[Backfill], ids: Sequence[str], links: Sequence[str], refused: dict[str, str]
) -> dict[str, Any]:
    return {
        "launched": bool(ids),
        "backfills": [
            {
                "experiment": one.experiment,
                "title": one.title,
                "stages": one.stages,
                "runs": one.runs,
                "id": ids[index] if ids else None,
                "url": links[index] if links else None,
            }
            for index, one in enumerate(backfills)
        ],
        "refused": refused,
    }


def _print(backfills: Sequence[Backfill], ids: Sequence[str], links: Sequence[str]) -> None:
    for index, one in enumerate(backfills):
        head = f"launched {ids[index]}  {links[index]}" if ids else "would launch"
        typer.echo(f"{head}\n  {one.title}")
        for number, run in enumerate(one.runs, start=1):
            typer.echo(f"  run {number}: {len(run)} trait{'s' if len(run) != 1 else ''}: {', '.join(run)}")


def _split(values: Sequence[str | None] | None) -> list[str] | None:
    """Comma-separated and repeated values as one list; None where nothing was given."""
    parts = [part.strip() for value in values or [] for part in (value or "").split(",")]
    return [part for part in parts if part] or None


def _local_traits() -> list[str]:
    from trait_assets.launch import open_instance
    from trait_assets.partitions import known_traits

    with open_instance() as instance:
        return known_traits(instance)
