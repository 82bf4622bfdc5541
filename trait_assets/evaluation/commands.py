"""The command `traits transfer`: one trait's vector on other traits' scenarios.

Options in, a table out; the numbers come from `across`. `register` hangs the command into the program.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Any

import typer

OneLineErrors = Callable[[bool], AbstractContextManager[None]]
_COLUMNS = ("on_trait", "n_pos", "n_neg", "auc", "accuracy", "effect_size_d", "overlap", "permutation_p")


def register(app: typer.Typer, one_line_errors: OneLineErrors) -> None:
    """Add the command to `app`; `one_line_errors(verbose)` turns a UserError into a line and exit code 2."""

    @app.command("transfer")
    def transfer(
        experiment: Annotated[str, typer.Option("--experiment", "-e", help="Where the vector comes from.")],
        trait: Annotated[str, typer.Option("--trait", "-t", help="Whose vector: category/trait.")],
        on: Annotated[str, typer.Option("--on", help="On whose scenarios: category/trait, comma-separated.")],
        on_experiment: Annotated[
            str | None, typer.Option("--on-experiment", help="Take those from another experiment.")
        ] = None,
        method: Annotated[str | None, typer.Option("--method", help="Default: the chosen vector.")] = None,
        layer: Annotated[int | None, typer.Option("--layer", help="Default: the chosen vector.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
        verbose: Annotated[bool, typer.Option("--verbose", help="Show the trace of an error.")] = False,
    ) -> None:
        """Does a vector carry over? Its accuracy and AUC on the scenarios of other traits or experiments."""
        with one_line_errors(verbose):
            names = [name.strip() for name in on.split(",") if name.strip()]
            rows = transfer_rows(experiment, trait, names, on_experiment, method, layer)
            if as_json:
                typer.echo(json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False))
            else:
                from trait_assets.report.overview import console

                console().print(transfer_table(rows))


def transfer_rows(
    experiment: str,
    trait: str,
    on: list[str],
    on_experiment: str | None,
    method: str | None,
    layer: int | None,
) -> list[dict[str, Any]]:
    """One row of `across.evaluate_on` per name in `on`."""
    from storage.workspace import Workspace
    from trait_assets import paths
    from trait_assets.evaluation.across import best_vector, evaluate_on
    from trait_assets.vectors.vector import load_vectors

    workspace = Workspace(paths.results_root(), paths.lineage_path())
    vector = best_vector(workspace, experiment, trait)
    if method is not None or layer is not None:
        file = load_vectors(
            workspace, experiment, trait, vector.position, vector.component, method or vector.method
        )
        vector = file.vector(vector.layer if layer is None else layer)
    return [
        evaluate_on(workspace, experiment, trait, name, on_experiment=on_experiment, vector=vector)
        for name in on
    ]


def transfer_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    first = rows[0] if rows else {}
    title = (
        f"{first.get('trait')}: {first.get('method')} at layer {first.get('layer')}" if rows else "transfer"
    )
    table = Table(title=title)
    for column in _COLUMNS:
        table.add_column(column.replace("_", " "), justify="left" if column == "on_trait" else "right")
    for row in rows:
        cells = []
        for column in _COLUMNS:
            value = row[column]
            if column in ("auc", "accuracy"):
                cells.append(f"{value:.2f} [{row[f'{column}_low']:.2f}, {row[f'{column}_high']:.2f}]")
            elif isinstance(value, float):
                cells.append(f"{value:.3f}" if column == "permutation_p" else f"{value:.2f}")
            else:
                cells.append("–" if value is None else str(value))
        table.add_row(*cells)
    return table
