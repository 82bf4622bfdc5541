"""The asset `vectors`."""

import dagster as dg

from resources.judges.resource import JudgeResource
from resources.models.resource import ModelResource
from resources.store import StoreResource
from trait_assets.experiments import Experiment
from trait_assets.stage import OverridesResource, make_context, run_stage, trait_asset_options
from trait_assets.vectors.extraction import VectorsStage

VECTORS = VectorsStage()


def vectors_asset(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **trait_asset_options(
            experiment,
            VECTORS,
            deps=["activations"],
            description="Stage 3. One unit direction per layer and method, fitted on the train rows, self-describing.",
            kinds={"scikitlearn", "safetensors"},
        )
    )
    def vectors(
        context: dg.AssetExecutionContext,
        models: ModelResource,
        judges: JudgeResource,
        store: StoreResource,
        overrides: OverridesResource,
    ) -> dg.MaterializeResult:
        return run_stage(
            context, VECTORS, make_context(context, experiment, models, judges, store, overrides)
        )

    return vectors
