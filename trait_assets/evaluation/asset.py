"""The assets `vector_evaluation` (per trait) and `extraction_evaluation` (the table over all traits)."""

import dagster as dg

from resources.judges.resource import JudgeResource
from resources.models.resource import ModelResource
from resources.store import StoreResource
from trait_assets.evaluation.evaluation import ExtractionEvaluationStage, VectorEvaluationStage
from trait_assets.experiments import Experiment
from trait_assets.stage import (
    OverridesResource,
    make_context,
    run_stage,
    run_table,
    table_asset_options,
    trait_asset_options,
)

VECTOR_EVALUATION = VectorEvaluationStage()
EXTRACTION_EVALUATION = ExtractionEvaluationStage()


def vector_evaluation_asset(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **trait_asset_options(
            experiment,
            VECTOR_EVALUATION,
            deps=["vectors", "activations"],
            description="Stage 4. What each vector separates on held-out rows, with intervals and against null distributions.",
            kinds={"scikitlearn", "json"},
        )
    )
    def vector_evaluation(
        context: dg.AssetExecutionContext,
        models: ModelResource,
        judges: JudgeResource,
        store: StoreResource,
        overrides: OverridesResource,
    ) -> dg.MaterializeResult:
        return run_stage(
            context, VECTOR_EVALUATION, make_context(context, experiment, models, judges, store, overrides)
        )

    return vector_evaluation


def extraction_evaluation_asset(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **table_asset_options(
            experiment,
            EXTRACTION_EVALUATION,
            deps=["vector_evaluation"],
            description="All traits side by side: held-out quality of the chosen vectors, cosines, cross-trait AUC.",
            kinds={"json", "duckdb"},
        )
    )
    def extraction_evaluation(
        context: dg.AssetExecutionContext,
        models: ModelResource,
        judges: JudgeResource,
        store: StoreResource,
        overrides: OverridesResource,
    ) -> dg.MaterializeResult:
        return run_table(
            context,
            EXTRACTION_EVALUATION,
            make_context(context, experiment, models, judges, store, overrides),
        )

    return extraction_evaluation
