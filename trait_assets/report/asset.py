"""The asset `report` of an experiment."""

import dagster as dg

from resources.judges.resource import JudgeResource
from resources.models.resource import ModelResource
from resources.store import StoreResource
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
        path = ctx.workspace.store.describe(report_key(experiment.name))
        return dg.MaterializeResult(
            metadata={**(result.metadata or {}), "report": dg.MetadataValue.path(path)},
            data_version=result.data_version,
        )

    return report
