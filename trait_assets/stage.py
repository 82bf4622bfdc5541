"""The Dagster shell around `pipeline.run`: one helper that every trait asset uses.

Here partitions become traits, results become materialisations with metadata, failures become one `dg.Failure` that names
each bad trait, and the run's overrides become the effective experiment. What a stage computes does not belong here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import dagster as dg
from pydantic import Field

from storage.manifest import fingerprint
from trait_assets import pipeline
from trait_assets.automation import keep_fresh, refresh_table
from trait_assets.experiments import Experiment, load_experiment
from trait_assets.partitions import traits_partitions
from trait_assets.paths import dataset_root, experiments_root
from trait_assets.progress import LinesProgress, LogProgress, Progress, RichProgress
from trait_assets.report import asset_page

if TYPE_CHECKING:
    from resources.judges.resource import JudgeResource
    from resources.models.resource import ModelResource
    from resources.store import StoreResource
    from storage.manifest import Manifest
    from storage.workspace import Workspace

# One batch of traits is one process and one model load. Larger batches share the load among more traits but lose more
# bookkeeping when they fail, and Dagster writes its events one by one (about 20 ms per trait and asset on SQLite).
TRAITS_PER_RUN = 16
BATCH = dg.BackfillPolicy.multi_run(max_partitions_per_run=TRAITS_PER_RUN)
OWNERS = ["team:trait-assets"]
MAX_PICTURE_BYTES = 100_000


class OverridesResource(dg.ConfigurableResource):
    """Options that replace those of the experiment's config for one run.

    Set in the launchpad under `resources: overrides: config: options:`, for example
    `{max_new_tokens: 32, position: ["response[-1]"], steer: {questions: 8}}`. Unknown options are refused with the
    nearest name. An override is part of the fingerprint of everything it touches.
    """

    options: dict[str, Any] = Field(default_factory=dict, description="option → value, as in config.yaml")
    force: bool = Field(default=False, description="Recompute also what is up to date.")
    progress: Literal["bars", "lines", "log"] = Field(
        default="log", description="bars or lines on a terminal, else the run's log."
    )


def make_context(
    context: dg.AssetExecutionContext,
    experiment: Experiment | None,
    models: ModelResource | None,
    judges: JudgeResource | None,
    store: StoreResource,
    overrides: OverridesResource,
) -> pipeline.StageContext:
    """The effective experiment of this run and what its stages are handed."""
    if experiment is None:
        # shared stages read no option; the context still wants an experiment
        effective = Experiment(name="shared", extraction_model="none")
    else:
        effective = load_experiment(experiments_root(), experiment.name).with_overrides(overrides.options)
    progress: Progress
    if overrides.progress == "bars":
        progress = RichProgress()
    elif overrides.progress == "lines":
        progress = LinesProgress()
    else:
        progress = LogProgress(context.log)
    return pipeline.StageContext(
        experiment=effective,
        workspace=store.open(),
        models=models,  # type: ignore[arg-type]
        judges=judges,  # type: ignore[arg-type]
        dataset_root=dataset_root(),
        run_id=context.run.run_id,
        progress=progress,
        log=context.log,
        force=overrides.force,
    )


def run_stage(
    context: dg.AssetExecutionContext, stage: pipeline.Stage, ctx: pipeline.StageContext
) -> dg.MaterializeResult:
    """Bring one stage up to date for the run's partitions.

    Every trait is finished and recorded before a failure is raised. In a run where some traits fail, Dagster would record
    none of the batch, so the good ones are logged one by one, with their own metadata, and the failure names the rest.
    """
    traits = list(context.partition_keys)
    results = _observed(stage, ctx, list(pipeline.run(stage, ctx, traits)))
    bad = [result for result in results if result.state == "failed"]
    good = [result for result in results if result.state != "failed"]
    metadata = {result.trait: result_metadata(ctx.workspace, result) for result in good}
    if bad:
        for result in good:
            assert result.manifest is not None
            context.log_event(
                dg.AssetMaterialization(
                    asset_key=context.asset_key,
                    partition=result.trait,
                    metadata=metadata[result.trait],
                    tags={"dagster/data_version": result.manifest.fingerprint},
                )
            )
        raise partial_failure(stage.name, bad, len(traits))
    for result in good:
        context.add_asset_metadata(metadata[result.trait], partition_key=result.trait)
    return dg.MaterializeResult(data_version=dg.DataVersion(batch_version(good)))


def batch_version(results: Sequence[pipeline.TraitResult]) -> str:
    """One data version for a run's traits, of which Dagster keeps only one: a change in any of them is a change.

    For a single trait the fingerprint itself. Dagster's own guess is the same for every batch without inputs, so that
    another experiment would never hear of scenarios that a batch has read anew.
    """
    fingerprints = {r.trait: r.manifest.fingerprint for r in results if r.manifest is not None}
    if len(fingerprints) == 1:
        return next(iter(fingerprints.values()))
    return fingerprint({str(trait): value for trait, value in sorted(fingerprints.items(), key=str)})


def run_table(
    context: dg.AssetExecutionContext, stage: pipeline.Stage, ctx: pipeline.StageContext
) -> dg.MaterializeResult:
    """Bring a table over all traits up to date."""
    (result,) = _observed(stage, ctx, list(pipeline.run(stage, ctx, [None])))
    if result.state == "failed":
        raise dg.Failure(description=result.reason, allow_retries=False)
    assert result.manifest is not None
    return dg.MaterializeResult(
        metadata=result_metadata(ctx.workspace, result),
        data_version=dg.DataVersion(result.manifest.fingerprint),
    )


Observer = Callable[[pipeline.Stage, list[pipeline.TraitResult]], None]
_observers: list[Observer] = []


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Hear of every stage that finishes in this process; the command line reports from it."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _observed(
    stage: pipeline.Stage, ctx: pipeline.StageContext, results: list[pipeline.TraitResult]
) -> list[pipeline.TraitResult]:
    for observer in _observers:
        observer(stage, results)
    return results


def partial_failure(stage: str, bad: Sequence[pipeline.TraitResult], asked: int) -> dg.Failure:
    lines = [f"{stage}: {len(bad)} of {asked} traits failed; the others are stored."]
    lines += [f"- {result.trait}: {result.reason}" for result in bad]
    metadata: dict[str, Any] = {"failed_traits": dg.MetadataValue.json([result.trait for result in bad])}
    for result in bad:
        if result.detail:
            metadata[f"trace_{len(metadata)}"] = dg.MetadataValue.text(f"{result.trait}\n{result.detail}")
        metadata.update(
            {f"{result.trait}: {name}": table_value(rows) for name, rows in result.tables.items() if rows}
        )
    # a permanent fault must not be retried; what can be retried was retried where it happened
    return dg.Failure(description="\n".join(lines), metadata=metadata, allow_retries=False)


def result_metadata(workspace: Workspace, result: pipeline.TraitResult) -> dict[str, Any]:
    """A manifest as Dagster metadata, in the order of the page: the result in a sentence, the numbers that Dagster plots,
    failed checks, tables, pictures one click away, all numbers with their meaning, and where all of it comes from.
    """
    manifest = result.manifest
    if manifest is None:
        return {}
    stage, summary = manifest.stage, manifest.summary
    metadata: dict[str, Any] = {}
    if headline := asset_page.headline(stage, summary):
        metadata["result"] = headline
    metadata.update(asset_page.plotted(stage, summary))
    shown = {
        "failed checks": asset_page.failed_checks(summary),
        **asset_page.tables(stage, manifest.tables),
    }
    metadata.update({name: table_value(rows) for name, rows in shown.items() if rows})
    metadata.update(picture_values(workspace, manifest))
    if numbers := asset_page.numbers(stage, summary):
        metadata["all numbers"] = table_value(numbers)
    if lineage := column_lineage(manifest):
        metadata["dagster/column_lineage"] = lineage
    metadata["state"] = result.state
    if result.state == "current":
        metadata["computed_in_run"] = manifest.run_id
    if result.index_behind:
        metadata["metrics_index"] = "behind; the next writer or `traits rebuild-index` catches up"
    seconds = summary.get("seconds_since_start")
    if isinstance(seconds, (int, float)):
        metadata["seconds_since_start"] = float(seconds)
    metadata["fingerprint"] = manifest.fingerprint
    if manifest.files:
        folder = next(iter(sorted(manifest.files))).rsplit("/", 1)[0]
        metadata["files"] = dg.MetadataValue.path(workspace.store.describe(folder))
    return metadata


def column_schema(stage: str) -> dict[str, dg.TableSchema]:
    """An asset's numbers with their meaning, as the columns section of its page."""
    columns = [
        dg.TableColumn(name=name, type=kind, description=meaning)
        for name, kind, meaning in asset_page.columns(stage)
    ]
    return {"dagster/column_schema": dg.TableSchema(columns=columns)} if columns else {}


def column_lineage(manifest: Manifest) -> dg.TableColumnLineage | None:
    """Which numbers were taken from which asset."""
    experiment = manifest.experiment
    sources = asset_page.column_sources(manifest.stage, manifest.summary)
    if experiment is None or not sources:
        return None
    return dg.TableColumnLineage(
        {
            name: [dg.TableColumnDep(asset_key=dg.AssetKey([experiment, stage]), column_name=column)]
            for name, (stage, column) in sources.items()
        }
    )


def table_value(rows: Iterable[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Rows with whatever columns occur; a column holds numbers or texts."""
    rows = list(rows)
    columns: list[str] = []
    for row in rows:
        columns.extend(name for name in row if name not in columns)

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, (int, float)):
            return (round(value, 4) if isinstance(value, float) else value) if math.isfinite(value) else None
        return str(value)

    def kind(name: str) -> str:
        values = [row.get(name) for row in rows if row.get(name) is not None]
        if values and all(isinstance(v, bool) for v in values):
            return "bool"
        if values and all(isinstance(v, int) for v in values):
            return "int"
        return "float" if values and all(isinstance(v, (int, float)) for v in values) else "string"

    kinds = {name: kind(name) for name in columns}
    records = [
        dg.TableRecord(
            {
                n: (str(row[n]) if kinds[n] == "string" and row.get(n) is not None else plain(row.get(n)))
                for n in columns
            }
        )
        for row in rows
    ]
    schema = dg.TableSchema(columns=[dg.TableColumn(name=n, type=kinds[n]) for n in columns])
    return dg.MetadataValue.table(records=records, schema=schema)


def picture_values(workspace: Workspace, manifest: Manifest) -> dict[str, Any]:
    import base64

    values = {}
    for key in sorted(manifest.files):
        if not key.endswith(".png"):
            continue
        name = key.rsplit("/", 1)[-1].removesuffix(".png").rsplit("--", 1)[-1].replace("_", " ")
        data = workspace.store.read_bytes(key)
        if len(data) <= MAX_PICTURE_BYTES:
            encoded = base64.b64encode(data).decode()
            values[f"picture: {name}"] = dg.MetadataValue.md(f"![{name}](data:image/png;base64,{encoded})")
    return values


def trait_asset_options(
    experiment: Experiment | None,
    stage: pipeline.Stage,
    *,
    deps: Sequence[str],
    description: str,
    kinds: set[str],
    pool: str | None = None,
    shared_deps: Sequence[str] = (),
) -> dict[str, Any]:
    """What every trait asset declares; the same everywhere, so that a batch of traits stays one run."""
    return {
        "key": asset_key(experiment, stage.name),
        "deps": [
            *(asset_key(None, dep) for dep in shared_deps),
            *(asset_key(experiment, dep) for dep in deps),
        ],
        "partitions_def": traits_partitions,
        "backfill_policy": BATCH,
        "group_name": experiment.name.replace("-", "_") if experiment else "scenarios",
        "description": description,
        "kinds": kinds,
        "owners": OWNERS,
        "code_version": stage.code_version,
        "pool": pool,
        "automation_condition": keep_fresh() if experiment else None,
        "metadata": column_schema(stage.name),
    }


def table_asset_options(
    experiment: Experiment, stage: pipeline.Stage, *, deps: Sequence[str], description: str, kinds: set[str]
) -> dict[str, Any]:
    """What a table over all traits declares: no partitions, rebuilt after a wave of updates."""
    return {
        "key": asset_key(experiment, stage.name),
        "deps": [asset_key(experiment, dep) for dep in deps],
        "group_name": experiment.name.replace("-", "_"),
        "description": description,
        "kinds": kinds,
        "owners": OWNERS,
        "code_version": stage.code_version,
        "automation_condition": refresh_table(),
        "metadata": column_schema(stage.name),
    }


def asset_key(experiment: Experiment | None, stage: str) -> dg.AssetKey:
    return dg.AssetKey([experiment.name, stage] if experiment else [stage])


__all__ = [
    "BATCH",
    "TRAITS_PER_RUN",
    "OverridesResource",
    "asset_key",
    "make_context",
    "run_stage",
    "run_table",
    "table_asset_options",
    "trait_asset_options",
]
