"""The one place where the graph is put together.

`build_defs()` makes the definitions; the module-level `defs` is what Dagster loads. Nothing else happens at import: no file
is written, no partition added, no model library loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

# asset backfill policies are beta and partitioned asset checks are preview in this version of Dagster; both are used on purpose
warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)

from resources.judges.resource import JudgeResource  # noqa: E402
from resources.models.resource import ModelResource  # noqa: E402
from resources.store import StoreResource  # noqa: E402
from storage.errors import UserError  # noqa: E402
from trait_assets import paths  # noqa: E402
from trait_assets.activations.asset import activations_asset  # noqa: E402
from trait_assets.automation import build_sweep, sensors  # noqa: E402
from trait_assets.checks import CHECKS, stage_checks, table_checks  # noqa: E402
from trait_assets.evaluation.asset import extraction_evaluation_asset, vector_evaluation_asset  # noqa: E402
from trait_assets.experiments import Experiment, list_experiments, load_experiment  # noqa: E402
from trait_assets.pipeline import TABLES, stages_of  # noqa: E402
from trait_assets.report.asset import report_asset  # noqa: E402
from trait_assets.responses.asset import responses_asset, vetted_responses_asset  # noqa: E402
from trait_assets.scenarios.asset import scenarios_asset, vetted_scenarios_asset  # noqa: E402
from trait_assets.stage import OverridesResource  # noqa: E402
from trait_assets.steering.asset import steering_results_asset, steering_summary_asset  # noqa: E402
from trait_assets.vectors.asset import vectors_asset  # noqa: E402


def experiment_assets(experiment: Experiment) -> list[dg.AssetsDefinition]:
    """The assets of one experiment; its options shape them.

    Prefill-only has no vetting and no responses; without steering there are no steering assets.
    """
    assets = []
    if not experiment.prefill_only:
        assets += [
            vetted_scenarios_asset(experiment),
            responses_asset(experiment),
            vetted_responses_asset(experiment),
        ]
    assets += [
        activations_asset(experiment),
        vectors_asset(experiment),
        vector_evaluation_asset(experiment),
        extraction_evaluation_asset(experiment),
    ]
    if experiment.steering:
        assets += [steering_results_asset(experiment), steering_summary_asset(experiment)]
    assets.append(report_asset(experiment))
    return assets


def experiment_checks(experiment: Experiment) -> list[dg.AssetChecksDefinition]:
    """The checks of the assets that this experiment has."""
    stages = [stage for stage in stages_of(experiment) if stage != "scenarios"]
    return [
        *(stage_checks(experiment, stage) for stage in stages if CHECKS[stage]),
        *(table_checks(experiment, table) for table, below in TABLES.items() if below in stages),
    ]


def load_experiments(root: Path) -> tuple[list[Experiment], dict[str, str]]:
    """Every experiment that can be read, and the reason for each that cannot.

    A broken config must not take the others' graph away.
    """
    good, problems = [], {}
    for name in list_experiments(root):
        try:
            good.append(load_experiment(root, name))
        except UserError as error:
            problems[name] = str(error)
    return good, problems


def default_resources() -> dict[str, Any]:
    return {
        "models": ModelResource(device_map=paths.device_map()),
        "judges": JudgeResource(),
        "store": StoreResource(
            root=paths.results_root(),
            duckdb_path=str(paths.lineage_path()),
            keep_index=paths.keeps_index(),
        ),
        "overrides": OverridesResource(),
    }


def build_defs(
    *, experiments: Sequence[Experiment] | None = None, resources: Mapping[str, Any] | None = None
) -> dg.Definitions:
    """The whole graph. Tests hand in experiments and replace single resources."""
    problems: dict[str, str] = {}
    if experiments is None:
        experiments, problems = load_experiments(paths.experiments_root())
    for name, reason in problems.items():
        warnings.warn(f"experiment {name} is left out: {reason}", stacklevel=2)
    assets: list[dg.AssetsDefinition] = [scenarios_asset()]
    checks = [stage_checks(None, "scenarios")]
    for experiment in experiments:
        assets += experiment_assets(experiment)
        checks += experiment_checks(experiment)
    return dg.Definitions(
        assets=dg.with_source_code_references(assets),
        asset_checks=checks,
        resources={**default_resources(), **(resources or {})},
        sensors=list(sensors()),
        schedules=[build_sweep(experiments)],
        # one process per run: the model that one stage loaded is there for the next
        executor=dg.in_process_executor,
    )


defs = build_defs()
