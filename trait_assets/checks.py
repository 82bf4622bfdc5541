"""Asset checks: the facts that each stage recorded about each trait, shown per partition in the UI.

A stage decides what it checks (`pipeline.Check`); the manifest keeps it; here it is only reported. A fact that would make a
later stage meaningless fails its trait in the stage itself: a blocking check would stop a whole batch for one bad trait.
"""

import math
from typing import Any

import dagster as dg

from resources.store import StoreResource
from trait_assets.experiments import Experiment
from trait_assets.partitions import traits_partitions
from trait_assets.stage import asset_key

# stage → check → what it says. A test keeps this equal to what the stages record.
CHECKS: dict[str, dict[str, str]] = {
    "scenarios": {
        "no_line_on_both_sides": "No scenario carries both labels.",
        "no_duplicates": "No scenario is there twice.",
        "sides_balanced": "Counts, lengths, punctuation and single words do not tell the sides apart.",
        "lint": "The fast lint has no other warning.",
    },
    "vetted_scenarios": {
        "abstention_rate": "The judge answered.",
        "contrast": "The judge scores positives more than 40 points above negatives.",
    },
    "responses": {
        "responses_not_empty": "Every response holds text.",
        "truncation_share": "Responses end by themselves.",
    },
    "vetted_responses": {
        "abstention_rate": "The judge answered.",
        "contrast": "The judge scores positives more than 40 points above negatives.",
    },
    "activations": {"activations_vary": "No captured layer is the same on every row."},
    "vectors": {
        "vectors_found_at_every_layer": "Each method gave a direction at each layer.",
        "optimisation_converged": "Each optimised method converged.",
    },
    "vector_evaluation": {
        "held_out_numbers_exist": "There are held-out rows of both polarities.",
        "contrast": "The vetted responses differ by more than 40 judge points.",
        "no_massive_dimension": "No few dimensions carry the vector.",
        "held_out_accuracy": "The chosen vector classifies held-out rows.",
        "polarity": "Positives project higher than negatives on held-out rows.",
        "better_than_random_directions": "The chosen vector stands above the band of random directions.",
        "better_than_shuffled_labels": "The chosen vector stands above vectors of shuffled labels.",
    },
    "steering_results": {
        "validated": "The vector is proved causal on the report half.",
        "coherent": "The steered answers stay coherent.",
        "more_than_random": "The change clears that of random directions.",
        "abstention_rate": "The judge answered.",
        "questions_split": "Layer and dose were chosen on other questions than those reported.",
    },
    "extraction_evaluation": {"all_evaluations_intact": "Every trait's evaluation could be read."},
    "steering_summary": {"all_results_intact": "Every trait's steering result could be read."},
    "report": {"every_result_readable": "Every result that the report shows could be read."},
}


def stage_checks(experiment: Experiment | None, stage: str) -> dg.AssetChecksDefinition:
    """The checks of one asset. Each trait's result is recorded under its partition, also in a batch."""
    key = asset_key(experiment, stage)
    names = CHECKS[stage]
    specs = [
        dg.AssetCheckSpec(name, asset=key, description=text, partitions_def=traits_partitions)
        for name, text in names.items()
    ]

    @dg.multi_asset_check(name="__".join([*key.path, "checks"]).replace("-", "_"), specs=specs)
    def checks(context: dg.AssetCheckExecutionContext, store: StoreResource):
        manifests = store.open().manifests
        op_context = context.op_execution_context
        traits = list(op_context.partition_keys)
        failed: dict[str, list[str]] = {name: [] for name in names}
        seen: dict[str, int] = dict.fromkeys(names, 0)
        for trait in traits:
            manifest = manifests.read(experiment.name if experiment else None, stage, trait)
            records: dict[str, dict[str, Any]] = {}
            for recorded in manifest.summary.get("checks", []) if manifest else []:
                # one that was recorded for several positions has not passed before all have
                if records.get(recorded["name"], recorded)["passed"]:
                    records[recorded["name"]] = recorded
            for name in names:
                record = records.get(name)
                if record is not None:
                    seen[name] += 1
                    if not record["passed"]:
                        failed[name].append(trait)
                if len(traits) > 1:
                    # also where there is nothing to check: one trait that stays planned hides all that passed
                    # the op context takes check evaluations; its annotation does not say so
                    log_event: Any = op_context.log_event
                    log_event(check_evaluation(key, trait, record or _nothing_to_check(name)))
                elif record is not None:
                    yield dg.AssetCheckResult(
                        asset_key=key,
                        check_name=name,
                        passed=record["passed"],
                        severity=_severity(record["severity"]),
                        description=record["description"],
                        metadata=_finite(record["values"]),
                    )
        for name in names:
            if len(traits) == 1 and seen[name]:
                continue
            yield dg.AssetCheckResult(
                asset_key=key,
                check_name=name,
                passed=not failed[name],
                severity=dg.AssetCheckSeverity.WARN,
                description=_batch_description(seen[name], failed[name]),
            )

    return checks


def check_evaluation(key: dg.AssetKey, trait: str, record: dict[str, Any]) -> dg.AssetCheckEvaluation:
    """One recorded fact about one trait, as an event of its partition."""
    return dg.AssetCheckEvaluation(
        asset_key=key,
        check_name=record["name"],
        passed=record["passed"],
        partition=trait,
        severity=_severity(record["severity"]),
        description=record["description"],
        metadata=_finite(record["values"]),
    )


def table_checks(experiment: Experiment, table: str) -> dg.AssetChecksDefinition:
    """The checks of a table over all traits: one result each, no partitions."""
    key = asset_key(experiment, table)
    names = CHECKS[table]
    specs = [dg.AssetCheckSpec(name, asset=key, description=text) for name, text in names.items()]

    @dg.multi_asset_check(name="__".join([*key.path, "checks"]).replace("-", "_"), specs=specs)
    def checks(context: dg.AssetCheckExecutionContext, store: StoreResource):
        manifest = store.open().manifests.read(experiment.name, table, None)
        records = {r["name"]: r for r in (manifest.summary.get("checks", []) if manifest else [])}
        for name in names:
            record = records.get(name)
            yield dg.AssetCheckResult(
                asset_key=key,
                check_name=name,
                passed=record is None or record["passed"],
                severity=dg.AssetCheckSeverity.WARN if record is None else _severity(record["severity"]),
                description=_batch_description(0, []) if record is None else record["description"],
                metadata={} if record is None else _finite(record["values"]),
            )

    return checks


def _nothing_to_check(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "passed": True,
        "severity": "warn",
        "description": _batch_description(0, []),
        "values": {},
    }


def _batch_description(seen: int, failed: list[str]) -> str:
    if not seen:
        return "The stage was skipped: there is nothing to check."
    return f"{seen - len(failed)} of {seen} traits pass" + (f"; not: {', '.join(failed)}" if failed else "")


def _severity(name: str) -> dg.AssetCheckSeverity:
    return dg.AssetCheckSeverity.ERROR if name == "error" else dg.AssetCheckSeverity.WARN


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
    }
