"""The stage `report`: one HTML file per experiment, made from the manifests that are there.

Planning and committing. What the page says is in `contents`, how it looks in `page`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from storage import keys
from storage.artifacts import ArtifactStore
from storage.errors import ArtifactError, UserError
from storage.manifest import fingerprint
from trait_assets.pipeline import PIPELINE, Check, Outcome, Plan, StageContext, stages_of
from trait_assets.report import overview
from trait_assets.report.contents import Material, document, status_table

STATUS_ROWS = 500
TABLE_STAGES = ("extraction_evaluation", "steering_summary")


def report_key(experiment: str) -> str:
    """Where the report of an experiment lies."""
    return ArtifactStore.check_key(f"{keys.check_experiment(experiment)}/report/report.html")


class ReportStage:
    """`report/report.html`. Its `plan` takes trait None.

    It is made anew whenever a result of any trait, or the state of any stage, has changed. A trait that failed or was never
    run is shown as such; only an experiment without a single result has no report.
    """

    name = "report"
    code_version = "1"
    shared = False

    def plan(self, ctx: StageContext, trait: str | None) -> Plan:
        material = gather(ctx)
        if not material.traits:
            raise UserError(
                f"no trait of {ctx.experiment.name} has a result yet"
                + (f" ({material.problems[0]})" if material.problems else ""),
                where=self.name,
                remedy="run the experiment first: `traits run`",
            )
        inputs = {
            f"{stage}/{name}": manifest.fingerprint
            for name, stages in sorted(material.traits.items())
            for stage, manifest in stages.items()
        }
        inputs |= {stage: manifest.fingerprint for stage, manifest in material.tables.items()}
        options = {
            "description": ctx.experiment.description,
            "steering": ctx.experiment.steering,
            "prefill_only": ctx.experiment.prefill_only,
            # states depend on the trait folders too, which have no manifest
            "status": fingerprint(status_table(material.status)),
            "problems": material.problems,
        }
        return Plan(None, inputs, options, payload=material)

    def execute(self, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]:
        for plan in plans:
            try:
                yield self._write(ctx, plan)
            except Exception as error:
                yield Outcome(plan.trait, error=error)

    def _write(self, ctx: StageContext, plan: Plan) -> Outcome:
        from trait_assets.report.page import render

        content = document(
            ctx.workspace, ctx.experiment, plan.payload, datetime.now(UTC).isoformat(timespec="seconds")
        )
        html = render(content)
        key = report_key(ctx.experiment.name)
        problems = content["problems"]
        outcome = Outcome(None, files={key: html})
        outcome.summary = {
            "report": ctx.workspace.store.describe(key),
            "traits": content["counts"]["traits"],
            "validated": content["counts"]["validated"],
            "not_validated": content["counts"]["not validated"],
            "without_verdict": content["counts"]["open"],
            "judges": ", ".join(judge["name"] for judge in content["judges"]) or None,
            "judge_is_stand_in": content["stand_in"],
            "megabytes": round(len(html) / 1e6, 2),
            "problems": "; ".join(problems) or None,
        }
        outcome.tables = {"trait_status": _most_urgent(content["status"])}
        outcome.checks = [
            Check(
                "every_result_readable",
                not problems,
                "; ".join(problems) or "every result that the report shows could be read",
            )
        ]
        return outcome


def _most_urgent(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most STATUS_ROWS rows for the UI, whatever is not current first."""

    def settled(row: dict[str, Any]) -> bool:
        return all(v in ("current", "skipped") for k, v in row.items() if k not in ("trait", "reason"))

    return sorted(rows, key=settled)[:STATUS_ROWS] if len(rows) > STATUS_ROWS else rows


def gather(ctx: StageContext) -> Material:
    """All manifests of the experiment's traits, of its tables, and the state of every stage."""
    name, manifests = ctx.experiment.name, ctx.workspace.manifests
    problems: list[str] = []
    stages = stages_of(ctx.experiment)
    status = overview.status_rows(
        ctx.workspace, ctx.experiment, ctx.dataset_root, None, stages, verify_files=False
    )
    covered = {row["trait"] for row in status}
    for key in manifests.keys(name):
        parts = key.split("/")
        # {experiment}/manifests/{stage}/{category}/{trait}.json
        if len(parts) == 5 and ctx.experiment.covers(trait := f"{parts[3]}/{parts[4].removesuffix('.json')}"):
            covered.add(trait)
    found = {}
    for trait in sorted(covered):
        here = {}
        for stage in (s for s in PIPELINE if s in stages):
            try:
                manifest = manifests.read(None if stage == "scenarios" else name, stage, trait)
            except ArtifactError as error:
                problems.append(f"{stage} of {trait}: {error}")
                continue
            if manifest is not None:
                here[stage] = manifest
        if any(stage != "scenarios" for stage in here):
            found[trait] = here
    tables = {}
    for stage in TABLE_STAGES:
        try:
            manifest = manifests.read(name, stage, None)
        except ArtifactError as error:
            problems.append(f"{stage}: {error}")
            continue
        if manifest is not None and (stage != "steering_summary" or ctx.experiment.steering):
            tables[stage] = manifest
    return Material(found, tables, status, problems)
