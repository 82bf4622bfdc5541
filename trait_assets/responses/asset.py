"""The assets `responses` and `vetted_responses`."""

import dagster as dg

from resources.judges.resource import JudgeResource
from resources.models.resource import ModelResource
from resources.store import StoreResource
from trait_assets.experiments import Experiment
from trait_assets.judging import VettedResponsesStage
from trait_assets.responses.generation import ResponsesStage
from trait_assets.stage import OverridesResource, make_context, run_stage, trait_asset_options

RESPONSES = ResponsesStage()
VETTED_RESPONSES = VettedResponsesStage()


def responses_asset(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **trait_asset_options(
            experiment,
            RESPONSES,
            deps=["vetted_scenarios"],
            shared_deps=["scenarios"],
            description="Stage 1. What the extraction model says to each scenario, with the token ids it generated.",
            kinds={"huggingface", "json"},
            pool="gpu",
        )
    )
    def responses(
        context: dg.AssetExecutionContext,
        models: ModelResource,
        judges: JudgeResource,
        store: StoreResource,
        overrides: OverridesResource,
    ) -> dg.MaterializeResult:
        return run_stage(
            context, RESPONSES, make_context(context, experiment, models, judges, store, overrides)
        )

    return responses


def vetted_responses_asset(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **trait_asset_options(
            experiment,
            VETTED_RESPONSES,
            deps=["responses"],
            description="Stage 1.5. A judge's 0–100 score for each response: did the model show the trait?",
            kinds={"openai", "json"},
            pool="judge",
        )
    )
    def vetted_responses(
        context: dg.AssetExecutionContext,
        models: ModelResource,
        judges: JudgeResource,
        store: StoreResource,
        overrides: OverridesResource,
    ) -> dg.MaterializeResult:
        return run_stage(
            context, VETTED_RESPONSES, make_context(context, experiment, models, judges, store, overrides)
        )

    return vetted_responses
