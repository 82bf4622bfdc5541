"""The assets `scenarios` (shared by all experiments) and `vetted_scenarios`."""

import dagster as dg

from resources.judges.resource import JudgeResource
from resources.models.resource import ModelResource
from resources.store import StoreResource
from trait_assets.experiments import Experiment
from trait_assets.judging import VettedScenariosStage
from trait_assets.scenarios.reading import ScenariosStage
from trait_assets.stage import OverridesResource, make_context, run_stage, trait_asset_options

SCENARIOS = ScenariosStage()
VETTED_SCENARIOS = VettedScenariosStage()


def scenarios_asset() -> dg.AssetsDefinition:
    @dg.asset(
        **trait_asset_options(
            None,
            SCENARIOS,
            deps=[],
            description="Stage 0. The trait folder, read and validated: scenarios of both polarities, definition, steering questions.",
            kinds={"file"},
        )
    )
    def scenarios(
        context: dg.AssetExecutionContext, store: StoreResource, overrides: OverridesResource
    ) -> dg.MaterializeResult:
        return run_stage(context, SCENARIOS, make_context(context, None, None, None, store, overrides))

    return scenarios


def vetted_scenarios_asset(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **trait_asset_options(
            experiment,
            VETTED_SCENARIOS,
            deps=[],
            shared_deps=["scenarios"],
            description="Stage 0.5. A judge's 0–100 score for each scenario: will its likely completion show the trait?",
            kinds={"openai", "json"},
            pool="judge",
        )
    )
    def vetted_scenarios(
        context: dg.AssetExecutionContext,
        models: ModelResource,
        judges: JudgeResource,
        store: StoreResource,
        overrides: OverridesResource,
    ) -> dg.MaterializeResult:
        return run_stage(
            context, VETTED_SCENARIOS, make_context(context, experiment, models, judges, store, overrides)
        )

    return vetted_scenarios
