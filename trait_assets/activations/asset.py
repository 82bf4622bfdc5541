"""The asset `activations`."""

import dagster as dg

from resources.judges.resource import JudgeResource
from resources.models.resource import ModelResource
from resources.store import StoreResource
from trait_assets.activations.extraction import ActivationsStage
from trait_assets.experiments import Experiment
from trait_assets.stage import OverridesResource, make_context, run_stage, trait_asset_options

ACTIVATIONS = ActivationsStage()


def activations_asset(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **trait_asset_options(
            experiment,
            ACTIVATIONS,
            deps=[] if experiment.prefill_only else ["responses", "vetted_responses"],
            shared_deps=["scenarios"] if experiment.prefill_only else [],
            description="Stage 2. Hidden states of each kept row at every layer, pooled over the position, split by group.",
            kinds={"huggingface", "safetensors"},
            pool="gpu",
        )
    )
    def activations(
        context: dg.AssetExecutionContext,
        models: ModelResource,
        judges: JudgeResource,
        store: StoreResource,
        overrides: OverridesResource,
    ) -> dg.MaterializeResult:
        return run_stage(
            context, ACTIVATIONS, make_context(context, experiment, models, judges, store, overrides)
        )

    return activations
