"""The assets `steering_results` (per trait) and `steering_summary` (the table over all traits)."""

import dagster as dg

from resources.judges.resource import JudgeResource
from resources.models.resource import ModelResource
from resources.store import StoreResource
from trait_assets.experiments import Experiment
from trait_assets.stage import (
    OverridesResource,
    make_context,
    run_stage,
    run_table,
    table_asset_options,
    trait_asset_options,
)
from trait_assets.steering.evaluation import SteeringStage, SteeringSummaryStage

STEERING = SteeringStage()
STEERING_SUMMARY = SteeringSummaryStage()


def steering_results_asset(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **trait_asset_options(
            experiment,
            STEERING,
            deps=["vectors", "vector_evaluation"],
            shared_deps=["scenarios"],
            description="Stage 5. Does adding the vector change what the application model says, coherently, and more than chance?",
            kinds={"huggingface", "openai"},
            pool="gpu",
        )
    )
    def steering_results(
        context: dg.AssetExecutionContext,
        models: ModelResource,
        judges: JudgeResource,
        store: StoreResource,
        overrides: OverridesResource,
    ) -> dg.MaterializeResult:
        return run_stage(
            context, STEERING, make_context(context, experiment, models, judges, store, overrides)
        )

    return steering_results


def steering_summary_asset(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **table_asset_options(
            experiment,
            STEERING_SUMMARY,
            deps=["steering_results"],
            description="All traits side by side: which vectors are validated, at which dose, against which controls.",
            kinds={"json", "duckdb"},
        )
    )
    def steering_summary(
        context: dg.AssetExecutionContext,
        models: ModelResource,
        judges: JudgeResource,
        store: StoreResource,
        overrides: OverridesResource,
    ) -> dg.MaterializeResult:
        return run_table(
            context, STEERING_SUMMARY, make_context(context, experiment, models, judges, store, overrides)
        )

    return steering_summary
