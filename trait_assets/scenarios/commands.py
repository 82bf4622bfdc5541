"""The commands `traits new`, `lint`, `draft` and `preview`: options in, a table out.

Belongs here: options and how results look on a terminal. Does not: anything that computes (`scaffold.py`,
`lint.py`, `drafting.py`, `preview.py`). The one place of this room that knows Typer; `register` hangs the
commands into the program.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from storage.errors import UserError
from trait_assets import paths

if TYPE_CHECKING:
    from trait_assets.scenarios.findings import Finding
    from trait_assets.scenarios.lint import LintReport
    from trait_assets.scenarios.preview import Preview, PreviewRow

COLOURS = {"error": "red", "warning": "yellow", "info": "dim"}
SHOWN_RULES = 200

OneLineErrors = Callable[[bool], AbstractContextManager[None]]
RootOption = Annotated[
    Path | None, typer.Option("--root", help="Folder of category/trait folders; default datasets/traits.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the trace of an error.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
TraitArgument = Annotated[str, typer.Argument(help="category/name", metavar="CATEGORY/NAME")]


def register(app: typer.Typer, one_line_errors: OneLineErrors) -> None:
    """Add the four commands to `app`; `one_line_errors(verbose)` turns a UserError into a line and exit code
    2."""

    @app.command("new")
    def new(trait: TraitArgument, root: RootOption = None, verbose: VerboseOption = False) -> None:
        """Write the files of a new trait, with what you have to fill in marked by << >>."""
        with one_line_errors(verbose):
            from trait_assets.scenarios.scaffold import new_trait

            for path in new_trait(root or paths.dataset_root(), trait):
                typer.echo(f"wrote {path}")
            typer.echo(f"next: replace what stands in << >>, then traits lint {trait}")

    @app.command("lint")
    def lint_command(
        traits: Annotated[
            list[str] | None, typer.Argument(help="category/name …; default all", metavar="[CATEGORY/NAME]…")
        ] = None,
        root: RootOption = None,
        fast: Annotated[
            bool, typer.Option("--fast", help="Leave out what needs a fit or an encoder.")
        ] = False,
        strict: Annotated[
            bool, typer.Option("--strict", help="Warnings, too, make the exit status 1.")
        ] = False,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no infos.")] = False,
        as_json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        """Read every trait folder and say what to mend, by file and line. Exit status 1 when there are
        errors."""
        with one_line_errors(verbose):
            from trait_assets.scenarios.lint import lint

            embed = None if fast else _encoder()
            report = lint(root or paths.dataset_root(), traits or None, full=not fast, embed=embed)
            if as_json:
                typer.echo(json.dumps(report.record(), indent=2, ensure_ascii=False))
            else:
                print_report(report, quiet=quiet)
            if not report.clean(strict=strict):
                raise typer.Exit(1)

    @app.command("draft")
    def draft(
        trait: TraitArgument,
        definition: Annotated[
            str | None,
            typer.Option(
                "--definition", "-d", help="What the trait is; default the folder's definition.txt."
            ),
        ] = None,
        n: Annotated[int, typer.Option("--count", "-n", min=2, help="Pairs to keep.")] = 100,
        model: Annotated[str, typer.Option("--model", help="Name of the drafting model.")] = "gpt-4.1-mini",
        base_url: Annotated[str | None, typer.Option("--base-url", help="Default OPENAI_BASE_URL.")] = None,
        vet: Annotated[
            bool, typer.Option("--vet/--no-vet", help="Let the judge throw out weak pairs.")
        ] = True,
        pos_threshold: Annotated[float, typer.Option("--pos-threshold", min=0, max=100)] = 60.0,
        neg_threshold: Annotated[float, typer.Option("--neg-threshold", min=0, max=100)] = 40.0,
        seed: Annotated[int, typer.Option("--seed", help="Chooses the topics of each round.")] = 0,
        root: RootOption = None,
        verbose: VerboseOption = False,
    ) -> None:
        """Let a language model draft paired scenarios; lint and judge keep what passes. The result is marked
        a draft."""
        with one_line_errors(verbose):
            from trait_assets.scenarios.drafting import draft_trait, openai_complete

            def say(rounds: int, kept: int, rejected: Counter[str]) -> None:
                typer.echo(
                    f"round {rounds}: {kept}/{n} pairs kept, {sum(rejected.values())} thrown out", err=True
                )

            made = draft_trait(
                root or paths.dataset_root(),
                trait,
                definition=definition,
                n=n,
                complete=openai_complete(model, base_url=base_url),
                model=model,
                judge=_judge() if vet else None,
                pos_threshold=pos_threshold,
                neg_threshold=neg_threshold,
                seed=seed,
                on_round=say,
            )
            for path in made.files:
                typer.echo(f"wrote {path}")
            for reason, count in made.rejected.most_common():
                typer.echo(f"thrown out: {count} × {reason}")
            if made.gave_up:
                typer.secho(f"only {len(made.pairs)} of {n} pairs: {made.gave_up}", fg=typer.colors.YELLOW)
            for finding in made.findings:
                if finding.severity != "info":
                    typer.echo(str(finding))
            typer.echo("read every line before you use it, then delete drafted.json")

    @app.command("preview")
    def preview(
        trait: TraitArgument,
        model: Annotated[
            str | None,
            typer.Option(
                "--model", help="Hub id, folder, .gguf or embedded:<name>; default the embedded one."
            ),
        ] = None,
        experiment: Annotated[
            str | None,
            typer.Option("--experiment", "-e", help="Take model and position from this experiment."),
        ] = None,
        position: Annotated[str | None, typer.Option("--position", help="<frame>[<slice>]")] = None,
        n: Annotated[int, typer.Option("--count", "-n", min=1, help="Scenarios per side.")] = 3,
        base_model: Annotated[
            bool | None,
            typer.Option(
                "--base-model/--chat", help="Without or with the chat template; default: if there is one."
            ),
        ] = None,
        max_new_tokens: Annotated[
            int, typer.Option("--max-new-tokens", min=0, help="0 generates nothing.")
        ] = 40,
        seed: Annotated[int, typer.Option("--seed", help="Chooses the scenarios.")] = 0,
        root: RootOption = None,
        as_json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        """Show a few scenarios as the model sees them: tokens, those that the position selects,
        completions."""
        with one_line_errors(verbose):
            from resources.models.positions import Position
            from trait_assets.scenarios.dataset import load_trait
            from trait_assets.scenarios.preview import preview_trait

            scenarios = load_trait(root or paths.dataset_root(), trait, require_steering=False)
            spec, where, chat = _preview_model(experiment, model, position, base_model)
            Position.parse(where)
            from resources.models.loading import load

            shown = preview_trait(
                load(spec), scenarios, where, n=n, chat=chat, max_new_tokens=max_new_tokens, seed=seed
            )
            if as_json:
                typer.echo(json.dumps(shown.record(), indent=2, ensure_ascii=False))
            else:
                print_preview(shown)


DEFAULT_MODEL = "embedded:smollm2-135m-instruct"


def _preview_model(
    experiment: str | None, model: str | None, position: str | None, base_model: bool | None
) -> tuple[Any, str, bool | None]:
    from resources.models.identity import identify
    from resources.models.rows import ModelSpec

    chat = None if base_model is None else not base_model
    spec = ModelSpec(model or DEFAULT_MODEL)
    if experiment is not None:
        from trait_assets.experiments import load_experiment

        config = load_experiment(paths.experiments_root(), experiment)
        if model is None:
            spec = ModelSpec(
                config.extraction_model, config.extraction_revision, adapter=config.extraction_adapter
            )
        position = position or config.positions[0]
        if chat is None and config.base_model is not None:
            chat = not config.base_model
    # a name that leads nowhere is said before anything loads
    identify(spec)
    return spec, position or "response[:]", chat


def _encoder() -> Any:
    """The sentence encoder where it is installed; without it the lint says less, and says that."""
    from trait_assets.scenarios.lint import default_embed

    try:
        from resources.models.embedded import minilm_path

        minilm_path()
    except UserError as error:
        typer.secho(f"contamination is not checked: {error}", fg=typer.colors.YELLOW, err=True)
        return None
    return default_embed()


def _judge() -> Any:
    from resources.judges.resource import JudgeResource
    from storage.workspace import Workspace

    # the answers are kept where vetting looks for them: what is drafted today is not paid for again tomorrow
    workspace = Workspace(paths.results_root(), paths.lineage_path())
    return JudgeResource().judge(lambda trait: workspace.row_cache("judgements", trait))


def print_report(report: LintReport, *, quiet: bool = False) -> None:
    """One block per trait folder: place, code, what was seen; the remedy under it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    shown = [f for f in report.findings if not (quiet and f.severity == "info")]
    for finding in shown:
        console.print(_line(finding))
        console.print(Text(f"    → {finding.remedy}", style="dim"))
    totals = report.counts
    console.print(
        f"{len(report.traits)} trait folder(s): {totals['error']} error(s), {totals['warning']} warning(s), "
        f"{totals['info']} info(s)"
    )


def _line(finding: Finding) -> Any:
    from rich.text import Text

    text = Text(f"{finding.where}: ")
    text.append(finding.severity, style=COLOURS[finding.severity])
    text.append(f" [{finding.code}] {finding.message}")
    return text


def print_preview(preview: Preview) -> None:
    """Each scenario's tokens with those selected in reverse video (between ⟦ and ⟧ where there are no
    colours)."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    mode = "chat template" if preview.chat else "plain text"
    console.print(
        f"{preview.trait} as {preview.model} sees it ({mode}); selected by {preview.position}: ⟦ … ⟧"
    )
    for row in preview.rows:
        selected = 0 if row.selected is None else row.selected[1] - row.selected[0]
        console.rule(
            f"{row.polarity}, line {row.line}: {row.prompt_tokens} prompt tokens, "
            f"{len(row.tokens) - row.prompt_tokens} response tokens, {selected} selected",
            align="left",
        )
        console.print(_tokens(row))
    for note in preview.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _tokens(row: PreviewRow) -> Any:
    from rich.text import Text

    text = Text()
    start, end = row.selected if row.selected is not None else (-1, -1)
    for i, token in enumerate(row.tokens):
        if i == row.prompt_tokens:
            text.append(" ▸ ", style="bold magenta")
        if i == start:
            text.append("⟦", style="bold")
        text.append(token, style="reverse" if start <= i < end else "")
        if i == end - 1:
            text.append("⟧", style="bold")
    return text
