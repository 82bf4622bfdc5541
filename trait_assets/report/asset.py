"""The asset `report` of an experiment."""

from pathlib import Path

import dagster as dg
from dagster._core.launcher import DefaultRunLauncher
from dagster._core.launcher.sync_in_memory_run_launcher import SyncInMemoryRunLauncher
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.noop_compute_log_manager import NoOpComputeLogManager

from resources.judges.resource import JudgeResource
from resources.models.resource import ModelResource
from resources.store import StoreResource
from storage.workspace import Workspace
from trait_assets import paths
from trait_assets.experiments import Experiment
from trait_assets.report.report import ReportStage, report_key
from trait_assets.stage import OverridesResource, make_context, run_table, table_asset_options

REPORT = ReportStage()


def report_asset(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **table_asset_options(
            experiment,
            REPORT,
            deps=["extraction_evaluation", *(["steering_summary"] if experiment.steering else [])],
            description="One self-contained HTML file for people: every trait with its verdict, charts, sample texts and lineage.",
            kinds={"html"},
        )
    )
    def report(
        context: dg.AssetExecutionContext,
        models: ModelResource,
        judges: JudgeResource,
        store: StoreResource,
        overrides: OverridesResource,
    ) -> dg.MaterializeResult:
        ctx = make_context(context, experiment, models, judges, store, overrides)
        result = run_table(context, REPORT, ctx)
        links = report_links(context.instance, ctx.workspace, experiment.name)
        return dg.MaterializeResult(
            metadata={**links, **(result.metadata or {})}, data_version=result.data_version
        )

    return report


def report_links(
    instance: dg.DagsterInstance, workspace: Workspace, experiment: str
) -> dict[str, dg.MetadataValue]:
    """The report as a link of the UI, and its path.

    A browser opens no file of the disk from a web page, and the web server hands out no files but those of its log folder:
    so a copy of the newest report lies there, and the link downloads it, whichever machine or port the UI is on.
    """
    key = report_key(experiment)
    links: dict[str, dg.MetadataValue] = {}
    logs = log_folder(instance)
    if logs is not None:
        target = logs / "report" / f"{experiment}.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}")
        unfinished.write_bytes(workspace.store.read_bytes(key))
        unfinished.replace(target)
        links["open report"] = dg.MetadataValue.url(f"/logs/report/{experiment}/html")
    links["report file"] = dg.MetadataValue.path(workspace.store.describe(key))
    return links


def log_folder(instance: dg.DagsterInstance) -> Path | None:
    """Where the web server of this instance finds logs; None where they are not kept on this disk, as where runs are
    launched onto other machines."""
    if not isinstance(instance.run_launcher, DefaultRunLauncher | SyncInMemoryRunLauncher):
        return None
    manager = instance.compute_log_manager
    if isinstance(manager, LocalComputeLogManager):
        return Path(manager.get_captured_local_path(["any"], "out")).parent
    # the command line keeps no logs of its own, and shares the history of the UI that does
    return paths.compute_logs_root() if isinstance(manager, NoOpComputeLogManager) else None
