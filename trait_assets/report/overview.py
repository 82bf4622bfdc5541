"""What the command line shows: an experiment's traits in one table, a run's report, the state of every stage.

Reads manifests; computes nothing. Each number stands in a stored artifact, and the judge that gave a score is named beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage import keys
from storage.errors import ArtifactError
from storage.manifest import Manifest

if TYPE_CHECKING:
    from rich.console import Console

    from storage.workspace import Workspace
    from trait_assets.experiments import Experiment
    from trait_assets.launch import LaunchReport

STATE_MARK = {
    "current": "✓",
    "done": "✓",
    "skipped": "–",
    "failed": "✗",
    "missing": "·",
    "damaged": "!",
    "stale": "≠",
}


def _summary(workspace: Workspace, experiment: str | None, stage: str, trait: str | None) -> dict[str, Any]:
    manifest = workspace.manifests.read(experiment, stage, trait)
    return dict(manifest.summary) if manifest is not None and manifest.status == "done" else {}


def trait_row(workspace: Workspace, experiment: Experiment, trait: str) -> dict[str, Any]:
    """One trait's results, flat, None where there is nothing."""
    name = experiment.name
    scenarios = _summary(workspace, name, "vetted_scenarios", trait)
    responses = _summary(workspace, name, "vetted_responses", trait)
    activations = _summary(workspace, name, "activations", trait)
    evaluation = _summary(workspace, name, "vector_evaluation", trait)
    steering = _summary(workspace, name, "steering_results", trait)
    row: dict[str, Any] = {
        "trait": trait,
        "scenarios_kept": scenarios.get("n_kept"),
        "scenarios": scenarios.get("n"),
        "responses_kept": responses.get("n_kept"),
        "responses": responses.get("n"),
        "contrast": responses.get("contrast"),
        "train_rows": _plus(activations.get("train_positive"), activations.get("train_negative")),
        "val_rows": _plus(activations.get("val_positive"), activations.get("val_negative")),
        "vetting_judge": responses.get("judge") or scenarios.get("judge"),
        "judge_is_stand_in": responses.get("judge_is_stand_in", scenarios.get("judge_is_stand_in")),
    }
    for field in (
        "best_method",
        "best_layer",
        "best_position",
        "best_component",
        "val_accuracy",
        "val_accuracy_low",
        "val_accuracy_high",
        "val_auc",
        "effect_size_d",
        "permutation_p",
        "raw_norm",
        "raw_norm_over_median_norm",
        "val_note",
    ):
        row[field] = evaluation.get(field)
    for field in (
        "validated",
        "reason",
        "best_method",
        "best_layer",
        "best_dose",
        "baseline_trait",
        "steered_trait",
        "change",
        "change_low",
        "change_high",
        "coherence",
        "distinct_3",
        "wrong_way_fraction",
        "random_change",
        "random_change_high",
        "prompting_change",
        "n_report",
        "judge",
    ):
        row[f"steering_{field}"] = steering.get(field)
    return row


def _plus(a: Any, b: Any) -> int | None:
    return None if a is None or b is None else int(a) + int(b)


def _number(value: Any, form: str = ".0f", missing: str = "–") -> str:
    return missing if value is None else format(value, form)


def print_results(
    console: Console, workspace: Workspace, experiment: Experiment, rows: Sequence[dict[str, Any]]
) -> None:
    from rich.table import Table

    table = Table(title=f"Experiment {experiment.name}: vectors", title_justify="left")
    for column in (
        "trait",
        "rows kept",
        "contrast",
        "best vector",
        "held-out accuracy",
        "AUC",
        "d",
        "‖v‖/‖h‖",
    ):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row["trait"],
            _kept(row),
            _number(row["contrast"], "+.0f"),
            "–" if row["best_method"] is None else f"{row['best_method']}, layer {row['best_layer']}",
            row["val_note"]
            if row["val_accuracy"] is None
            else f"{row['val_accuracy']:.0%} {_interval(row['val_accuracy_low'], row['val_accuracy_high'], '.0%')} of {row['val_rows']}",
            _number(row["val_auc"], ".2f"),
            _number(row["effect_size_d"], ".1f"),
            _number(row["raw_norm_over_median_norm"], ".2f"),
        )
    console.print(table)
    if experiment.steering:
        steering = Table(
            title=f"Experiment {experiment.name}: steering of {experiment.steered_model}",
            title_justify="left",
        )
        for column in (
            "trait",
            "vector and dose",
            "trait score",
            "change [95 %]",
            "random vectors",
            "a prompt",
            "coherence",
            "distinct 3-grams",
            "validated",
        ):
            steering.add_column(column, overflow="fold")
        for row in rows:
            steering.add_row(
                row["trait"],
                "–"
                if row["steering_best_layer"] is None
                else f"{row['steering_best_method']}, layer {row['steering_best_layer']}, dose {_number(row['steering_best_dose'], '.2f')}",
                f"{_number(row['steering_baseline_trait'])} → {_number(row['steering_steered_trait'])}",
                f"{_number(row['steering_change'], '+.1f')} {_interval(row['steering_change_low'], row['steering_change_high'], '+.1f')}",
                _number(row["steering_random_change"], "+.1f"),
                _number(row["steering_prompting_change"], "+.1f"),
                _number(row["steering_coherence"]),
                _number(row["steering_distinct_3"], ".2f"),
                "–" if row["steering_validated"] is None else "yes" if row["steering_validated"] else "no",
            )
        console.print(steering)
        for row in rows:
            if row["steering_reason"]:
                console.print(f"{row['trait']}: {row['steering_reason']}", soft_wrap=True, highlight=False)
    judges = sorted({str(j) for row in rows for j in (row["vetting_judge"], row["steering_judge"]) if j})
    if judges:
        console.print(f"Judge: {', '.join(judges)}.")
    if any(row["judge_is_stand_in"] for row in rows):
        console.print(
            "[yellow]The local judge is a stand-in: it is fitted on each trait's own scenarios. "
            "Set OPENAI_API_KEY (or OPENAI_BASE_URL) and run again before you claim anything.[/yellow]"
        )


def console() -> Console:
    """Wide enough for the tables where the output is a file or a pipe."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=132)


def _kept(row: dict[str, Any]) -> str:
    if row["responses"] is not None:
        return f"{row['responses_kept']} of {row['responses']} responses"
    return f"{row['train_rows']} train rows" if row["train_rows"] is not None else "–"


def _interval(low: Any, high: Any, form: str) -> str:
    return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


def print_report(
    console: Console,
    workspace: Workspace,
    experiment: Experiment,
    traits: Sequence[str],
    report: LaunchReport,
    *,
    verbose: bool,
) -> None:
    """What a run did, then what the experiment now holds, then where it is."""
    if report.up_to_date:
        console.print(
            "[green]Everything is up to date: no token generated, no judge called, no model loaded.[/green]"
        )
    else:
        for stage in report.stages.values():
            counts: dict[str, int] = {}
            for state in stage.states.values():
                counts[state] = counts.get(state, 0) + 1
            words = {"done": "computed", "current": "up to date", "skipped": "skipped", "failed": "failed"}
            line = ", ".join(f"{n} {words[state]}" for state, n in sorted(counts.items()))
            work = _work(stage)
            console.print(f"  {stage.stage:<22} {line}{f' ({work})' if work else ''}")
    for trait, stages in report.failures.items():
        for stage_name, reason in stages.items():
            console.print(f"[red]✗ {trait}, {stage_name}:[/red] {reason}", soft_wrap=True)
    if verbose:
        for stage in report.stages.values():
            for trait, detail in stage.details.items():
                console.print(f"[dim]{trait}, {stage.stage}\n{detail}[/dim]", highlight=False)
    if any(stage.index_behind for stage in report.stages.values()):
        console.print(
            "[yellow]The metrics index was locked and is behind; `traits rebuild-index` catches up.[/yellow]"
        )
    rows = [trait_row(workspace, experiment, trait) for trait in traits]
    print_results(console, workspace, experiment, rows)
    console.print(f"Files:  {workspace.store.describe(experiment.name)}", soft_wrap=True)
    if (path := report_path(workspace, experiment)) is not None:
        console.print(f"Report: {path}  (open it in a browser)", soft_wrap=True)
    console.print("UI:     make ui  →  http://127.0.0.1:3000  (assets of the group, a trait is a partition)")


def _work(stage: Any) -> str:
    """How much of the work was new, where the stage counts it."""
    words = {
        "generated_now": "generated",
        "captured_now": "captured",
        "judged_now": "judged",
    }
    parts = []
    for name, word in words.items():
        found = [
            summary[name]
            for trait, summary in stage.summaries.items()
            if name in summary and stage.states.get(trait) == "done"
        ]
        if found:
            parts.append(f"{sum(found)} {word}")
    return ", ".join(parts)


def report_json(
    workspace: Workspace, experiment: Experiment, traits: Sequence[str], report: LaunchReport
) -> dict[str, Any]:
    return {
        "experiment": experiment.name,
        "up_to_date": report.up_to_date,
        "runs": report.runs,
        "stages": {
            name: {
                "states": stage.states,
                "work": {
                    trait: {k: v for k, v in summary.items() if k.endswith("_now")}
                    for trait, summary in stage.summaries.items()
                    if stage.states.get(trait) == "done"
                },
            }
            for name, stage in report.stages.items()
        },
        "failures": report.failures,
        "results": [trait_row(workspace, experiment, trait) for trait in traits],
        "store": workspace.store.describe(experiment.name),
        "report": report_path(workspace, experiment),
    }


def report_path(workspace: Workspace, experiment: Experiment) -> str | None:
    """Where the experiment's HTML report is, None while there is none."""
    manifest = workspace.manifests.read(experiment.name, "report", None)
    if manifest is None or manifest.status != "done":
        return None
    return workspace.store.describe(next(key for key in manifest.files if key.endswith(".html")))


def status_rows(
    workspace: Workspace,
    experiment: Experiment,
    dataset_root: Path,
    wanted: Sequence[str] | None,
    stages: Sequence[str],
    *,
    verify_files: bool = True,
) -> list[dict[str, Any]]:
    """trait × stage with state and reason. A stage is stale when an input's fingerprint or its own code has moved on since.

    `verify_files` False: the files themselves are not hashed, so damage inside one is not seen.
    """
    from trait_assets.scenarios.dataset import discover, trait_hash
    from trait_assets.stages import code_versions

    found = discover(dataset_root)
    versions = code_versions()
    rows = []
    for trait in [*found.traits, *found.problems]:
        if not experiment.covers(trait) or (wanted and trait not in wanted):
            continue
        row: dict[str, Any] = {"trait": trait, "stages": {}}
        # each manifest is looked at as a result and as others' input
        read = cache(workspace.manifests.read)
        if trait in found.problems:
            row["problem"] = found.problems[trait]
        for stage in stages:
            shared = stage == "scenarios"
            scope = None if shared else experiment.name
            state, reason = _state(workspace, read, scope, stage, trait, verify_files, versions[stage])
            if state == "current" and shared and trait in found.traits:
                manifest = read(None, stage, trait)
                assert manifest is not None
                if manifest.inputs.get("files") != trait_hash(dataset_root, trait):
                    state, reason = "stale", "the trait folder has changed since"
            row["stages"][stage] = {"state": state, "reason": reason}
        rows.append(row)
    return rows


_Read = Callable[[str | None, str, str | None], Manifest | None]


def _state(
    workspace: Workspace,
    read: _Read,
    experiment: str | None,
    stage: str,
    trait: str,
    verify_files: bool,
    code_version: str,
) -> tuple[str, str | None]:
    try:
        manifest = read(experiment, stage, trait)
    except ArtifactError as error:
        return "damaged", str(error)
    if manifest is None:
        failed = workspace.store
        for file in ("failed_scenario_scores.json", "failed_response_scores.json"):
            if experiment and stage.startswith("vetted"):
                key = keys.extraction(experiment, trait, "vetting", file)
                if failed.exists(key) and stage.removeprefix("vetted_")[:-1] in file:
                    return "failed", "; ".join(failed.read_json(key)["problems"])
        return "missing", None
    if manifest.status == "skipped":
        return "skipped", str(manifest.summary.get("skipped"))
    problems = workspace.manifests.verify(manifest) if verify_files else []
    if problems:
        return "damaged", "; ".join(problems[:3])
    if manifest.code_version != code_version:
        return (
            "stale",
            f"made by version {manifest.code_version} of this stage, which is at {code_version} now",
        )
    return _staleness(read, manifest)


def _staleness(read: _Read, manifest: Manifest) -> tuple[str, str | None]:
    for name, fingerprint in manifest.inputs.items():
        if name == "files" or not _is_fingerprint(fingerprint):
            continue
        try:
            upstream = read(None if name == "scenarios" else manifest.experiment, name, manifest.trait)
        except ArtifactError:
            return "stale", f"the manifest of {name} is damaged"
        if upstream is None:
            return "stale", f"{name} is gone"
        if upstream.fingerprint != fingerprint:
            return "stale", f"{name} has changed since"
    return "current", None


def _is_fingerprint(text: str) -> bool:
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)


def print_status(
    console: Console, experiment: Experiment, rows: Sequence[dict[str, Any]], stages: Sequence[str]
) -> None:
    from rich.table import Table

    table = Table(title=f"Experiment {experiment.name}", title_justify="left")
    table.add_column("trait")
    for stage in stages:
        table.add_column(stage.replace("_", " "), justify="center")
    for row in rows:
        table.add_row(row["trait"], *(STATE_MARK[row["stages"][stage]["state"]] for stage in stages))
    console.print(table)
    console.print("✓ current   ≠ out of date   – skipped   · missing   ✗ failed   ! damaged")
    for row in rows:
        if row.get("problem"):
            console.print(f"[red]{row['trait']}:[/red] {row['problem']}", soft_wrap=True)
        for stage, entry in row["stages"].items():
            if entry["reason"] and entry["state"] not in ("current", "skipped"):
                console.print(f"{row['trait']}, {stage}: {entry['reason']}", soft_wrap=True)
