"""Stages 0.5 and 1.5: a judge scores rows, thresholds decide which are kept.

The two stages differ in what is judged; asking, caching, committing per trait and the files are the same, so they share
this module. The rules of keeping are in `scenarios/vetting.py`, the judges in `resources/judges`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from resources.judges.protocol import Judge, JudgeItem, TraitContext
from storage import keys
from storage.artifacts import ArtifactStore
from storage.errors import UserError
from trait_assets.metering import Meter
from trait_assets.pipeline import Check, Outcome, Plan, StageContext
from trait_assets.progress import Task
from trait_assets.scenarios.dataset import ScenarioSet
from trait_assets.scenarios.selection import read_scenario_set, subset
from trait_assets.scenarios.vetting import Candidate, Vetting, apply_thresholds, judged_text


@dataclass(frozen=True)
class _Judged:
    """One row to judge, and how it is shown and named in tables."""

    item: JudgeItem
    name: str
    polarity: str
    pair: int | None
    text: str


def trait_context(scenarios: ScenarioSet) -> TraitContext:
    """What a judge may know of a trait. The local judge is fitted on all its scenarios, whatever subset a run uses."""
    return TraitContext(
        trait=scenarios.trait,
        definition=scenarios.definition,
        positives=tuple(judged_text(s.prompt, s.system_prompt) for s in scenarios.positives),
        negatives=tuple(judged_text(s.prompt, s.system_prompt) for s in scenarios.negatives),
    )


class Spending:
    """Notes on a progress task what a judge has spent so far, and of which budget: at most every `interval` seconds, and
    at the end. A judge that sends no requests is not spoken of."""

    def __init__(self, task: Task, interval: float = 5.0) -> None:
        self._task = task
        self._interval = interval
        self._said = time.monotonic()

    def show(self, usage: Mapping[str, float], *, last: bool = False) -> None:
        """`usage`: what `Judge.usage` says."""
        now = time.monotonic()
        if now - self._said < self._interval and not last:
            return
        self._said = now
        if not usage.get("requests"):
            return
        tokens = usage["prompt_tokens"] + usage["completion_tokens"]
        cost = f", {usage['cost_usd']:.4f} USD" if usage.get("priced") else ""
        budget = [
            f"{usage[f'budget_{name}_spent']:{form}} of {usage[f'budget_{name}']:{form}} {unit}"
            for name, form, unit in (
                ("calls", ",.0f", "calls"),
                ("tokens", ",.0f", "tokens"),
                ("usd", ".4f", "USD"),
            )
            if f"budget_{name}" in usage
        ]
        self._task.note(
            f"{usage['calls']:,.0f} calls, {usage.get('retries', 0):,.0f} retries, {tokens:,.0f} tokens{cost}"
            + (f"; budget: {', '.join(budget)}" if budget else "")
        )


class _VettingStage:
    """What both vetting stages do; a subclass says what is judged."""

    name: str
    code_version = "1"
    shared = False
    subject: str
    file: str

    def rows(self, ctx: StageContext, trait: str) -> list[_Judged]:
        raise TypeError(f"{type(self).__name__} must say what is judged")

    def _options(self, ctx: StageContext) -> dict[str, Any]:
        e = ctx.experiment
        return {
            "judge": ctx.judges.identity(),
            "pos_threshold": e.pos_threshold,
            "neg_threshold": e.neg_threshold,
            "min_kept": e.min_kept,
            "max_abstention_rate": e.max_abstention_rate,
            "pair_filter": e.pair_filter,
        }

    def execute(self, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]:
        items: list[JudgeItem] = []
        owners: list[Plan] = []
        for plan in plans:
            for row in plan.payload:
                items.append(row.item)
                owners.append(plan)
        judgements: list[Any] = []
        with ctx.progress.task(f"{self.name} · {len(items)} texts", len(items)) as task:
            spending = Spending(task)
            judge = ctx.judges.judge(
                lambda trait: ctx.workspace.row_cache("judgements", trait), on_progress=spending.show
            )
            meter = Meter(judge=judge_name(judge.identity))
            for plan in plans:
                # a judge works ahead: its calls for later traits are under way when the first is done
                meter.add(plan.owner)
            for owner, judgement in zip(owners, meter.each("judge", judge.score(items)), strict=True):
                task.advance(1)
                judgements.append(judgement)
                if len(judgements) == len(owner.payload):
                    outcome = self._outcome(ctx, owner, judgements, judge)
                    outcome.work = meter.settle(owner.owner, judge.usage)
                    yield outcome
                    judgements = []
            spending.show(judge.usage(), last=True)

    def _outcome(self, ctx: StageContext, plan: Plan, judgements: list[Any], judge: Judge) -> Outcome:
        e, trait = ctx.experiment, plan.owner
        work = judge.usage(trait)
        if not work.pop("priced", 0.0):
            # nobody said a price: that is no price of nothing
            work.pop("cost_usd", None)
        vetting = apply_thresholds(
            [
                Candidate(row.name, row.polarity, judgement, row.text, row.pair)
                for row, judgement in zip(plan.payload, judgements, strict=True)
            ],
            pos_threshold=e.pos_threshold,
            neg_threshold=e.neg_threshold,
            min_per_side=e.min_kept,
            max_abstention_rate=e.max_abstention_rate,
            pair_aware=e.pair_filter,
            subject=self.subject,
        )
        store, failed = ctx.workspace.store, keys.extraction(e.name, trait, "vetting", f"failed_{self.file}")
        tables = {"worst": list(vetting.worst), "histogram": _histogram(vetting)}
        try:
            vetting.raise_if_failed(trait)
        except UserError as error:
            # the scores stay: they explain the failure, and the judge's answers are in its cache
            store.write_json(failed, {**vetting.to_json(), "judge": plan.options["judge"]})
            remedy = f"all scores are in {store.describe(failed)}"
            return Outcome(
                trait, error=UserError(error.what, where=error.where, remedy=remedy), tables=tables
            )
        return Outcome(
            trait,
            files={
                keys.extraction(e.name, trait, "vetting", self.file): {
                    **vetting.to_json(),
                    "trait": trait,
                    "experiment": e.name,
                    "judge": plan.options["judge"],
                    "stand_in": judge.stand_in,
                }
            },
            summary={
                **vetting.summary(),
                "judge": judge_name(plan.options["judge"]),
                "judge_is_stand_in": judge.stand_in,
                "judged_now": int(work.get("calls", 0)),
                **({"judge_cost_usd": round(work["cost_usd"], 6)} if "cost_usd" in work else {}),
            },
            metrics=[{"name": f"judge_{name}", "value": float(value)} for name, value in work.items()]
            + [
                {"name": name, "value": float(value)}
                for name, value in vetting.summary().items()
                if isinstance(value, (int, float)) and not isinstance(value, bool)
            ],
            tables=tables,
            checks=[
                Check(
                    "abstention_rate",
                    vetting.abstention_rate <= e.max_abstention_rate,
                    f"the judge abstained on {vetting.abstention_rate:.1%} of the rows",
                    values={"abstention_rate": vetting.abstention_rate},
                ),
                Check(
                    "contrast",
                    vetting.contrast is not None and vetting.contrast > 40,
                    "the mean score of positives is "
                    + (f"{vetting.contrast:.0f}" if vetting.contrast is not None else "not known to be")
                    + " points above that of negatives (good: above 40)",
                    values={"contrast": vetting.contrast},
                ),
            ],
            # what is kept now is no failure any more
            after_commit=partial(_forget, store, failed),
        )


class VettedScenariosStage(_VettingStage):
    """`vetting/scenario_scores.json`: will the likely completion of each scenario show the trait."""

    name = "vetted_scenarios"
    subject = "scenarios"
    file = "scenario_scores.json"

    def plan(self, ctx: StageContext, trait: str) -> Plan:
        e = ctx.experiment
        inputs = {"scenarios": ctx.upstream("scenarios", trait, shared=True).fingerprint}
        if e.steering and read_scenario_set(ctx, trait).steering is None:
            # the first stage of an experiment says it, before anything is paid for
            raise UserError(
                "steering is on and there is no steering.json",
                where=str(ctx.dataset_root / trait / "steering.json"),
                remedy='write {"questions": [...]}, or use --no-steering',
            )
        if not e.scenario_vetting:
            reason = "prefill-only" if e.prefill_only else "vetting of scenarios is switched off"
            return Plan(trait, inputs, {"scenario_limit": e.scenario_limit, "seed": e.seed}, skipped=reason)
        options = {**self._options(ctx), "scenario_limit": e.scenario_limit, "seed": e.seed}
        return Plan(trait, inputs, options, self.rows(ctx, trait))

    def rows(self, ctx: StageContext, trait: str) -> list[_Judged]:
        scenarios = read_scenario_set(ctx, trait)
        context = trait_context(scenarios)
        rows = []
        for s in subset(scenarios, ctx.experiment.scenario_limit, ctx.experiment.seed):
            text = judged_text(s.prompt, s.system_prompt)
            item = JudgeItem(
                key=f"{trait}:{s.key}",
                rubric="scenario",
                context=context,
                prompt=text,
                polarity=s.polarity,
                index=s.index,
            )
            rows.append(_Judged(item, s.key, s.polarity, s.pair, text))
        return rows


class VettedResponsesStage(_VettingStage):
    """`vetting/response_scores.json`: does each response show the trait."""

    name = "vetted_responses"
    subject = "responses"
    file = "response_scores.json"

    def plan(self, ctx: StageContext, trait: str) -> Plan:
        e = ctx.experiment
        if not e.response_vetting:
            reason = "prefill-only" if e.prefill_only else "vetting is switched off"
            inputs = {} if e.prefill_only else {"responses": ctx.upstream("responses", trait).fingerprint}
            return Plan(trait, inputs, {}, skipped=reason)
        inputs = {
            "scenarios": ctx.upstream("scenarios", trait, shared=True).fingerprint,
            "responses": ctx.upstream("responses", trait).fingerprint,
        }
        return Plan(trait, inputs, self._options(ctx), self.rows(ctx, trait))

    def rows(self, ctx: StageContext, trait: str) -> list[_Judged]:
        context = trait_context(read_scenario_set(ctx, trait))
        rows = []
        for polarity, file in (("positive", "pos.json"), ("negative", "neg.json")):
            for record in ctx.workspace.store.read_json(
                keys.extraction(ctx.experiment.name, trait, "responses", file)
            ):
                name = f"{polarity}:{record['scenario_index']}"
                item = JudgeItem(
                    key=f"{trait}:{name}",
                    rubric="response",
                    context=context,
                    prompt=judged_text(record["question"], record["system_prompt"]),
                    text=record["answer"],
                    polarity=polarity,  # type: ignore[arg-type]
                    index=record["scenario_index"],
                    prompt_ids=tuple(record["prompt_token_ids"]),
                    text_ids=tuple(record["response_token_ids"]),
                )
                rows.append(_Judged(item, name, polarity, record["pair"], record["answer"]))
        return rows


def judge_name(identity: dict[str, Any]) -> str:
    """How a judge is called wherever one of its scores is shown."""
    return str(identity.get("model") or identity.get("name") or identity.get("kind") or "unknown")


def _forget(store: ArtifactStore, key: str) -> None:
    store.delete(key)


def _histogram(vetting: Vetting) -> list[dict[str, Any]]:
    return [
        {"score": f"{10 * i}–{10 * i + 10}", "positive": p, "negative": n}
        for i, (p, n) in enumerate(zip(vetting.positive.histogram, vetting.negative.histogram, strict=True))
    ]
