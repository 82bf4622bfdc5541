"""The `scenarios` stage: trait folders on disk become stored, validated scenario sets that every experiment
shares.

Belongs here: reading at the time of a run, the light part of the lint as findings and checks. Does not: the
reading itself (`dataset.py`), the rules (`lint.py`), asking a judge (`vetting.py`). Needs no model and no
judge.

steering.json is optional here, because whether it is needed is an experiment's business; one that is there
must be valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.keys import scenario_set
from trait_assets.pipeline import Check, Outcome, Plan
from trait_assets.scenarios.dataset import POLARITIES, ScenarioSet, load_trait, trait_hash
from trait_assets.scenarios.findings import Finding, counts, in_order
from trait_assets.scenarios.lint import LINT_VERSION, fast_findings

if TYPE_CHECKING:
    from trait_assets.pipeline import StageContext

# rules about how the two sides compare; a fault there becomes part of every vector
BALANCE_CODES = frozenset({"count-imbalance", "length-imbalance", "structure-imbalance", "telling-word"})
DUPLICATE_CODES = frozenset({"duplicate", "near-duplicate"})
LABEL_CODES = frozenset({"both-sides", "near-both-sides"})
MAX_TABLE_ROWS = 50


class ScenariosStage:
    """Stage 0. One artifact per trait: `storage.keys.scenario_set(trait)`, readable by
    `ScenarioSet.from_json`."""

    name = "scenarios"
    code_version = f"1.{LINT_VERSION}"
    shared = True

    def plan(self, ctx: StageContext, trait: str) -> Plan:
        return Plan(trait, inputs={"files": trait_hash(ctx.dataset_root, trait)}, options={})

    def execute(self, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]:
        for plan in plans:
            assert plan.trait is not None
            try:
                yield self._outcome(ctx.dataset_root, plan.trait)
            except Exception as error:
                # one trait's bad file is that trait's failure
                yield Outcome(plan.trait, error=error)

    def _outcome(self, root: Path, trait: str) -> Outcome:
        scenarios, findings = load_with_findings(root, trait)
        totals = counts(findings)
        summary: dict[str, Any] = {
            "positives": len(scenarios.positives),
            "negatives": len(scenarios.negatives),
            "paired": scenarios.paired,
            "steering_questions": len(scenarios.steering.questions) if scenarios.steering else 0,
            "system_prompts": sum(s.system_prompt is not None for p in POLARITIES for s in scenarios.side(p)),
            "content_hash": scenarios.content_hash,
            "lint_errors": totals["error"],
            "lint_warnings": totals["warning"],
            "lint_infos": totals["info"],
        }
        metrics = [
            {"name": name, "value": float(summary[name])}
            for name in ("positives", "negatives", "steering_questions", "lint_errors", "lint_warnings")
        ]
        tables = {
            "examples": [
                {"polarity": polarity, "line": s.line, "prompt": s.prompt}
                for polarity in POLARITIES
                for s in scenarios.side(polarity)[:3]
            ]
        }
        if findings:
            tables["findings"] = [f.record() for f in findings[:MAX_TABLE_ROWS]]
        return Outcome(
            trait,
            files={scenario_set(trait): scenarios.to_json()},
            summary=summary,
            metrics=metrics,
            tables=tables,
            checks=checks(findings),
        )


def load_with_findings(root: Path, trait: str) -> tuple[ScenarioSet, tuple[Finding, ...]]:
    """The scenario set with the light lint's findings inside it, and the findings themselves, sorted."""
    scenarios = load_trait(root, trait, require_steering=False)
    findings = in_order(fast_findings(Path(root) / trait, trait))
    return replace(scenarios, findings=tuple(f.record() for f in findings)), findings


def checks(findings: Sequence[Finding]) -> list[Check]:
    """Four named facts about a scenario set, from its findings."""

    def check(name: str, codes: frozenset[str], good: str, severity: Any = "warn") -> Check:
        hits = [f for f in findings if f.code in codes and f.severity != "info"]
        shown = "; ".join(f"{f.where}: {f.message}" for f in hits[:3])
        return Check(name, not hits, shown or good, severity, {"findings": len(hits)})

    rest = frozenset(f.code for f in findings) - BALANCE_CODES - DUPLICATE_CODES - LABEL_CODES
    return [
        check("no_line_on_both_sides", LABEL_CODES, "no scenario carries both labels"),
        check("no_duplicates", DUPLICATE_CODES, "no scenario is there twice"),
        check(
            "sides_balanced",
            BALANCE_CODES,
            "counts, lengths, punctuation and single words do not tell the sides apart",
        ),
        check("lint", rest, "no other warning"),
    ]
