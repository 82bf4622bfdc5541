"""Stage 1: the extraction model continues each scenario.

Rows of all traits of a batch are generated together. Each row is kept in the row cache under the hash of everything that
decides its text, so it is generated once, whatever happens to the run and whichever experiment asks next.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resources.models.rows import GeneratedRow, GenerationOptions, GenerationRow
from resources.models.server import FailedRow, ServedModel
from storage import keys
from storage.errors import UserError
from storage.manifest import fingerprint
from trait_assets.judging import Spending
from trait_assets.metering import Meter
from trait_assets.pipeline import Check, Outcome, Plan, StageContext
from trait_assets.scenarios.selection import ChosenScenario, kept_scenarios

# rows are put into the cache in groups: a kill loses at most this many rows or seconds of work
FLUSH_ROWS = 16
FLUSH_SECONDS = 3.0


@dataclass(frozen=True)
class _Row:
    scenario: ChosenScenario
    key: str


class ResponsesStage:
    """`responses/pos.json`, `neg.json`: question, answer, full_text, token ids and counts, finish reason, row key."""

    name = "responses"
    code_version = "1"
    shared = False

    def plan(self, ctx: StageContext, trait: str) -> Plan:
        experiment = ctx.experiment
        if experiment.prefill_only:
            return Plan(trait, {}, {}, skipped="prefill-only: scenarios go straight to activations")
        inputs = {
            "scenarios": ctx.upstream("scenarios", trait, shared=True).fingerprint,
            "vetted_scenarios": ctx.upstream("vetted_scenarios", trait).fingerprint,
        }
        options = self.row_options(ctx)
        scenarios = kept_scenarios(ctx, trait)
        for polarity in ("positive", "negative"):
            if not any(row.polarity == polarity for row in scenarios):
                raise UserError(
                    f"no {polarity} scenario is left",
                    where=trait,
                    remedy="see vetted_scenarios: lower the thresholds, mend the scenarios, or use --no-vet-scenarios",
                )
        rows = [
            _Row(s, fingerprint({**options, "prompt": s.prompt, "system": s.system_prompt}))
            for s in scenarios
        ]
        return Plan(trait, inputs, {**options, "scenario_limit": experiment.scenario_limit}, payload=rows)

    def row_options(self, ctx: StageContext) -> dict[str, Any]:
        """Everything that decides a response, apart from the scenario."""
        e = ctx.experiment
        options: dict[str, Any] = {
            "row": "response/1",
            "model": ctx.models.identify(ctx.extraction_spec()).record(),
            "base_model": e.base_model,
            "max_new_tokens": e.max_new_tokens,
            "temperature": e.temperature,
            "top_p": e.top_p,
            "seed": e.seed,
        }
        if e.generation.backend != "local":
            # another engine rounds otherwise; where it stands decides nothing
            options["backend"] = {
                "kind": e.generation.backend,
                "served_model": e.generation.served_model or e.extraction_model,
            }
        return options

    def execute(self, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]:
        caches = {plan.owner: ctx.workspace.row_cache("generations", plan.owner) for plan in plans}
        fresh: dict[str, set[str]] = {}
        waiting: dict[str, list[Plan]] = defaultdict(list)
        requests: dict[str, ChosenScenario] = {}
        open_keys: dict[str, set[str]] = {}
        for plan in plans:
            missing = {row.key for row in plan.payload if ctx.force or row.key not in caches[plan.owner]}
            fresh[plan.owner] = set(missing)
            open_keys[plan.owner] = missing
            for row in plan.payload:
                if row.key in missing and plan not in waiting[row.key]:
                    waiting[row.key].append(plan)
                    requests.setdefault(row.key, row.scenario)
        for plan in plans:
            if not open_keys[plan.owner]:
                yield self._outcome(ctx, plan, caches[plan.owner], fresh[plan.owner])
        if not requests:
            return

        meter = Meter()
        failed: dict[str, list[FailedRow]] = defaultdict(list)
        buffer: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        flushed = time.monotonic()

        def keep(made: Mapping[str, dict[str, Any]]) -> None:
            """May be called by another thread."""
            of_trait: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
            for key, row in made.items():
                for plan in waiting[key]:
                    of_trait[plan.owner][key] = row
            for trait, rows in of_trait.items():
                caches[trait].put_many(rows)

        for key, row in self._generate(ctx, requests, keep, meter):
            for plan in waiting[key]:
                if isinstance(row, FailedRow):
                    failed[plan.owner].append(row)
                else:
                    buffer[plan.owner][key] = row
                open_keys[plan.owner].discard(key)
            if not isinstance(row, FailedRow):
                # a row of several traits was generated once
                first = waiting[key][0].owner
                meter.add(first, rows=1, tokens=len(row["ids"]), prompt_tokens=len(row["prompt_ids"]))
            finished = [plan for plan in waiting[key] if not open_keys[plan.owner]]
            full = sum(map(len, buffer.values())) >= FLUSH_ROWS or time.monotonic() - flushed > FLUSH_SECONDS
            if finished or full:
                for trait, rows in buffer.items():
                    caches[trait].put_many(rows)
                buffer.clear()
                flushed = time.monotonic()
            for plan in finished:
                if failed[plan.owner]:
                    yield Outcome(plan.trait, error=_unanswered(plan, failed[plan.owner]))
                else:
                    outcome = self._outcome(ctx, plan, caches[plan.owner], fresh[plan.owner])
                    outcome.work = meter.settle(plan.owner)
                    yield outcome

    def _generate(
        self,
        ctx: StageContext,
        requests: dict[str, ChosenScenario],
        keep: Callable[[Mapping[str, dict[str, Any]]], None],
        meter: Meter,
    ) -> Iterator[tuple[str, dict[str, Any] | FailedRow]]:
        """Rows in the order in which they finish. A server's rows are kept before its next request goes out."""
        e = ctx.experiment
        model = meter.load(ctx.generating_model)
        base = uses_completion(e.base_model, model.has_chat_template, e.extraction_model)
        options = GenerationOptions(
            max_new_tokens=e.response_length(base=base), temperature=e.temperature, top_p=e.top_p, seed=e.seed
        )
        encoded = {key: model.encode(s.prompt, s.system_prompt, chat=not base) for key, s in requests.items()}
        rows = [GenerationRow(key, prompt.ids) for key, prompt in encoded.items()]
        served = model if isinstance(model, ServedModel) else None
        server = None if served is None else served.check().record()
        if server is not None:
            meter.device = f"{server['engine']} server"

        def record(row: GeneratedRow) -> dict[str, Any]:
            content = {
                "prompt": requests[row.key].prompt,
                "system_prompt": requests[row.key].system_prompt,
                "prompt_ids": list(row.prompt_ids),
                "ids": list(row.ids),
                "text": row.text,
                "finish_reason": row.finish_reason,
                "chat": encoded[row.key].chat,
                "system_folded": encoded[row.key].system_folded,
                "generation": options.record(),
            }
            return content if server is None else {**content, "server": server}

        where = "responses" if server is None else f"responses · {server['engine']} server"
        with ctx.progress.task(f"{where} · {len(rows)} prompts", len(rows)) as task:
            spending = Spending(task)

            def keep_served(made: Mapping[str, GeneratedRow]) -> None:
                keep({key: record(row) for key, row in made.items()})

            results: Iterator[GeneratedRow | FailedRow] = (
                model.generate(rows, options, keep=keep_served)
                if isinstance(model, ServedModel)
                else model.generate(rows, options)
            )
            for row in meter.each("model", results):
                if isinstance(row, FailedRow):
                    task.advance(1)
                    yield row.key, row
                    continue
                task.advance(1, tokens=len(row.ids))
                if served is not None:
                    spending.show(served.usage())
                yield row.key, record(row)

    def _outcome(self, ctx: StageContext, plan: Plan, cache: Any, fresh: set[str]) -> Outcome:
        experiment, trait = ctx.experiment.name, plan.owner
        sides: dict[str, list[dict[str, Any]]] = {"positive": [], "negative": []}
        for row in plan.payload:
            stored = cache.get(row.key)
            sides[row.scenario.polarity].append(response_record(row.scenario, row.key, stored))
        everything = sides["positive"] + sides["negative"]
        first = cache.get(plan.payload[0].key)
        truncated = sum(r["finish_reason"] == "length" for r in everything) / len(everything)
        empty = sum(not r["answer"].strip() for r in everything)
        tokens = [r["response_token_count"] for r in everything]
        summary = {
            "n_positive": len(sides["positive"]),
            "n_negative": len(sides["negative"]),
            "generated_now": len(fresh),
            "from_cache": len({row.key for row in plan.payload}) - len(fresh),
            "mean_response_tokens": sum(tokens) / len(tokens),
            "truncated_share": truncated,
            "empty_responses": empty,
            "mode": "chat" if first["chat"] else "completion",
            "max_new_tokens": first["generation"]["max_new_tokens"],
            "system_prompts_folded": sum(bool(r["system_folded"]) for r in everything),
            "model": plan.options["model"]["model"],
        }
        server = first.get("server")
        if server is not None:
            summary["generated_by"] = f"{server['engine']} {server['engine_version'] or ''}".strip()
            summary["served_revision"] = server["revision"]
            summary["server_notes"] = "; ".join(server["notes"]) or None
        metadata = {
            **{k: v for k, v in summary.items() if k not in ("generated_now", "from_cache")},
            "generation": first["generation"],
            "model": plan.options["model"],
            "server": server,
            "trait": trait,
            "experiment": experiment,
        }
        samples = [
            {"polarity": polarity, "scenario": r["question"][-120:], "response": r["answer"][:200]}
            for polarity, rows in sides.items()
            for r in rows[:3]
        ]
        return Outcome(
            trait,
            files={
                keys.extraction(experiment, trait, "responses", "pos.json"): sides["positive"],
                keys.extraction(experiment, trait, "responses", "neg.json"): sides["negative"],
                keys.extraction(experiment, trait, "responses", "metadata.json"): metadata,
            },
            summary=summary,
            metrics=[
                {"name": name, "value": float(summary[name])}
                for name in ("n_positive", "n_negative", "mean_response_tokens", "truncated_share")
            ],
            tables={"samples": samples},
            checks=[
                Check(
                    "responses_not_empty",
                    empty == 0,
                    f"{empty} of {len(everything)} responses hold no text",
                    values={"empty": empty},
                ),
                Check(
                    "truncation_share",
                    ctx.experiment.prefill_only or truncated < 1 or summary["mode"] == "completion",
                    f"{truncated:.0%} of the responses were cut at {summary['max_new_tokens']} tokens",
                    values={"truncated_share": truncated},
                ),
            ],
        )


def _unanswered(plan: Plan, failed: Sequence[FailedRow]) -> UserError:
    """A prompt without an answer fails its trait: nothing is left out in silence."""
    reasons = Counter(row.reason for row in failed)
    said = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    last = f" (last: {failed[-1].detail})" if failed[-1].detail else ""
    return UserError(
        f"{len(failed)} of {len({row.key for row in plan.payload})} prompts got no answer: {said}{last}",
        where=f"{plan.owner}, generation server",
        remedy="see whether the server is well and run again: only these prompts are asked",
    )


def response_record(scenario: ChosenScenario, key: str, row: dict[str, Any]) -> dict[str, Any]:
    """One row of pos.json/neg.json. `full_text` is for readers; the token ids are what was generated."""
    answer = row["text"]
    joint = "" if not answer or answer[0].isspace() or not row["chat"] else " "
    return {
        "question": scenario.prompt,
        "answer": answer,
        "full_text": f"{scenario.prompt}{joint}{answer}",
        "system_prompt": scenario.system_prompt,
        "prompt_token_ids": row["prompt_ids"],
        "response_token_ids": row["ids"],
        "prompt_token_count": len(row["prompt_ids"]),
        "response_token_count": len(row["ids"]),
        "finish_reason": row["finish_reason"],
        "chat": row["chat"],
        "system_folded": row["system_folded"],
        "row_key": key,
        "scenario_index": scenario.index,
        "line": scenario.line,
        "pair": scenario.pair,
    }


def uses_completion(base_model: bool | None, has_chat_template: bool, model: str) -> bool:
    """Text completion or chat: as told, else by the tokenizer.

    Asking for chat of a tokenizer without a template is refused: an invented template would be another model.
    """
    if base_model is None:
        return not has_chat_template
    if not base_model and not has_chat_template:
        raise UserError(
            f"{model} has no chat template",
            where="base_model: false",
            remedy="use --base-model (text completion), or a model with a chat template",
        )
    return base_model
