"""Stage 5: proof that a vector is causal, and the table over all traits.

Here: planning, gathering inputs, running the searches of all traits of a batch in one model, laying out
results. The search is in `dose_search`, scores and statistics in `scoring`, records in `results`. Nothing
heavy is imported before `execute`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resources.models.layers import parse_layers
from resources.models.positions import Position
from resources.models.rows import CaptureRow, GenerationOptions, GenerationRow
from storage import keys
from storage.errors import UserError
from storage.manifest import Manifest, fingerprint
from trait_assets.judging import Spending, judge_name, trait_context
from trait_assets.metering import Meter
from trait_assets.pipeline import Check, Outcome, Plan, StageContext
from trait_assets.scenarios.dataset import ScenarioSet
from trait_assets.scenarios.selection import read_scenario_set
from trait_assets.steering.candidates import Directions, Scored, read_scored, shortlist, window_layers
from trait_assets.steering.prompting import trait_system_prompt
from trait_assets.steering.questions import Questions, read_questions

if TYPE_CHECKING:
    from resources.models.language_model import LanguageModel
    from trait_assets.steering.dose_search import Candidate, SearchOptions, SearchResult
    from trait_assets.steering.scoring import Answer, Half, Scorer, Task

# median ‖h‖ is kept to this many digits, so that float noise between batch sizes makes no new row
NORM_DIGITS = 4


@dataclass(frozen=True)
class _Payload:
    """What `execute` needs of one trait."""

    scenarios: ScenarioSet
    questions: Questions
    chosen: tuple[Scored, ...]
    # identity record of the model that the vectors come from, and its depth
    source_model: Mapping[str, Any]
    source_layers: int
    flags: tuple[str, ...]


class SteeringStage:
    """`steering/{category}/{trait}/{position}/results.json` and `generations.json`."""

    name = "steering_results"
    code_version = "1"
    shared = False

    def plan(self, ctx: StageContext, trait: str) -> Plan:
        e, steer = ctx.experiment, ctx.experiment.steer
        if not e.steering:
            return Plan(trait, {}, {}, skipped="steering is switched off")
        scenarios_manifest = ctx.upstream("scenarios", trait, shared=True)
        vectors = ctx.upstream("vectors", trait)
        evaluation = ctx.upstream("vector_evaluation", trait)
        if evaluation.inputs.get("vectors") != vectors.fingerprint:
            raise UserError(
                f"the vectors of {trait} were evaluated before they were last fitted",
                where=self.name,
                remedy="materialise `vector_evaluation` again first",
            )
        scenarios = read_scenario_set(ctx, trait)
        questions = read_questions(
            _steering_record(scenarios),
            trait=trait,
            where=str(ctx.dataset_root / trait / "steering.json"),
            limit=steer.questions,
            search_share=steer.search_share,
            seed=e.seed,
        )
        chosen, source_model, source_layers, flags = _choose(ctx, trait, vectors)
        application = ctx.models.identify(ctx.application_spec())
        options = {
            "steer": json.loads(steer.model_dump_json()),
            "seed": e.seed,
            "application_model": application.record(),
            "judge": ctx.judges.identity(),
            # in the order of their rank; the same candidates are the same search, whatever their last digits
            "candidates": [s.place() for s in chosen],
        }
        inputs = {
            "scenarios": scenarios_manifest.fingerprint,
            "vectors": vectors.fingerprint,
            "vector_evaluation": evaluation.fingerprint,
        }
        if application.record() != dict(source_model):
            source = source_model.get("model")
            flags.append(f"the steered model {application.model} is not that of the vectors, {source}")
        payload = _Payload(scenarios, questions, tuple(chosen), source_model, source_layers, tuple(flags))
        return Plan(trait, inputs, options, payload)

    def execute(self, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]:
        from trait_assets.steering.dose_search import run_together, search
        from trait_assets.steering.scoring import BASELINE, Request

        meter = Meter()
        model = meter.load(ctx.application_model)
        options = search_options(ctx)
        bench = Bench(ctx, model, meter)
        prepared: dict[str, _Prepared] = {}
        for plan in plans:
            try:
                prepared[str(plan.trait)] = _prepare(ctx, plan, model)
            except Exception as error:
                yield Outcome(plan.trait, error=error)
        if not prepared:
            return
        halves: tuple[Half, ...] = ("search", "report")
        unsteered = bench.answers(
            {t: (p.task, [Request(BASELINE, half) for half in halves]) for t, p in prepared.items()}
        )
        searches = {}
        for trait, p in prepared.items():
            baseline = {half: unsteered[trait]["baseline", half] for half in halves}
            p.norms = bench.norms(trait, p.task, [a for half in halves for a in baseline[half]])
            searches[trait] = (p.task, search(p.task, p.candidates, baseline, p.norms.__getitem__, options))
        for finished in run_together(searches, bench.answers):
            p = prepared[finished.trait]
            work = bench.meter.settle(finished.trait, bench.judge.usage)
            if finished.result is None:
                yield Outcome(finished.trait, error=finished.error)
                continue
            try:
                outcome = _outcome(ctx, p, finished.result, bench)
                outcome.work = work
                yield outcome
            except Exception as error:
                yield Outcome(finished.trait, error=error)


@dataclass
class _Prepared:
    plan: Plan
    task: Task
    candidates: list[Candidate]
    flags: list[str]
    norms: list[float]


def _steering_record(scenarios: ScenarioSet) -> dict[str, Any] | None:
    steering = scenarios.steering
    if steering is None:
        return None
    return {
        "questions": list(steering.questions),
        "direction": steering.direction,
        "eval_prompt": steering.eval_prompt,
    }


def _choose(
    ctx: StageContext, trait: str, vectors: Manifest
) -> tuple[list[Scored], dict[str, Any], int, list[str]]:
    """The shortlist, and from a vector file's record which model it belongs to. No tensor is read."""
    e, steer = ctx.experiment, ctx.experiment.steer
    report = ctx.workspace.store.read_json(keys.extraction(e.name, trait, "evaluation", "evaluation.json"))
    scored = read_scored(report["rows"])
    record_key = next((k for k in sorted(vectors.files) if k.endswith("/metadata.json")), None)
    if record_key is None or not scored:
        raise UserError(
            f"{trait} has no vectors to steer with", where="vectors", remedy="materialise `vectors` again"
        )
    record = ctx.workspace.store.read_json(record_key)
    n_layers = int(record.get("n_layers") or max(s.layer for s in scored) + 1)
    flags = []
    layers: list[int] | None
    if steer.layers is not None:
        try:
            layers = parse_layers(steer.layers, n_layers)
        except UserError as error:
            raise UserError(error.what, where="steer.layers", remedy=error.remedy) from error
    else:
        layers = window_layers(n_layers, steer.depth_window)
        if not any(s.layer in layers for s in scored):
            flags.append("no vector lies in the depth window: the layers that were extracted are steered")
            layers = None
    chosen = shortlist(
        scored,
        trait=trait,
        layers=layers,
        methods=steer.methods,
        explicit=steer.candidates,
        limit=steer.max_candidates,
        cosine=Directions(ctx.workspace, e.name, trait).cosine,
    )
    return chosen, dict(record.get("model") or {}), n_layers, flags


def search_options(ctx: StageContext) -> SearchOptions:
    from trait_assets.steering.dose_search import SearchOptions

    steer = ctx.experiment.steer
    return SearchOptions(
        doses=tuple(steer.doses),
        refine_steps=steer.refine_steps,
        refine_top=steer.refine_top,
        coherence_threshold=steer.coherence_threshold,
        controls=steer.controls,
        prompting=steer.prompting_baseline,
        multi_layer=steer.multi_layer,
        operation=steer.operation,
        bootstrap=steer.bootstrap,
        seed=ctx.experiment.seed,
    )


def _prepare(ctx: StageContext, plan: Plan, model: LanguageModel) -> _Prepared:
    """Prompts as token ids, directions checked against the model."""
    from trait_assets.steering.scoring import Task

    payload: _Payload = plan.payload
    trait = str(plan.trait)
    candidates = Directions(ctx.workspace, ctx.experiment.name, trait).candidates(payload.chosen)
    flags = list(payload.flags)
    steer = ctx.experiment.steer
    if steer.layers is None and steer.candidates is None:
        # nobody asked for these layers: what the steered model lacks is left out, and said
        there = [c for c in candidates if c.layer < model.n_layers]
        if there and len(there) < len(candidates):
            flags.append(
                f"{len(candidates) - len(there)} candidates lie at layers that the steered model does not have"
            )
            candidates = there
    check_fit(candidates, model, trait)
    if payload.source_layers != model.n_layers:
        flags.append(
            f"the vectors come from {payload.source_layers} layers, the steered model has {model.n_layers}: "
            "equal layer numbers are not the same depth"
        )
    if flags and dict(payload.source_model) != plan.options["application_model"]:
        flags += compare_tokenizers(ctx, trait, model)
    chat = uses_chat(steer.chat, model)
    texts = payload.questions.texts
    prompts = tuple(model.encode(text, chat=chat).ids for text in texts)
    prompted: tuple[tuple[int, ...], ...] = ()
    if steer.prompting_baseline:
        system = trait_system_prompt(payload.scenarios.definition, payload.questions.direction)
        prompted = tuple(model.encode(text, system, chat=chat).ids for text in texts)
    task = Task(trait, payload.questions, trait_context(payload.scenarios), prompts, prompted)
    return _Prepared(plan, task, candidates, flags, [])


def uses_chat(wanted: bool | None, model: LanguageModel) -> bool:
    if wanted and not model.has_chat_template:
        raise UserError(
            f"{model.identity.model} has no chat template",
            where="steer.chat: true",
            remedy="leave steer.chat out, or steer a model with a chat template",
        )
    return model.has_chat_template if wanted is None else wanted


def check_fit(candidates: Sequence[Candidate], model: LanguageModel, trait: str) -> None:
    """UserError naming both sides when a direction cannot be added to this model."""
    for c in candidates:
        if c.layer >= model.n_layers:
            raise UserError(
                f"the vector is of layer {c.layer}, but {model.identity.model} has {model.n_layers} layers",
                where=trait,
                remedy=f"limit steer.layers to 0-{model.n_layers - 1}, or steer the model of the vectors",
            )
        width = model.anatomy.site(c.component, c.layer).width
        if len(c.direction) != width:
            raise UserError(
                f"the vector has width {len(c.direction)}, but {c.component} of {model.identity.model} has "
                f"width {width}",
                where=trait,
                remedy="steer the model of the vectors (application_model), or extract vectors from this one",
            )


def compare_tokenizers(ctx: StageContext, trait: str, model: LanguageModel) -> list[str]:
    """Whether the steered model cuts text into the same tokens as the model of the vectors: stored responses
    tell.
    """
    key = keys.extraction(ctx.experiment.name, trait, "responses", "pos.json")
    if not ctx.workspace.store.exists(key):
        return ["whether the two models share a tokenizer is unknown: there are no stored responses"]
    for row in ctx.workspace.store.read_json(key)[:5]:
        try:
            again = model.decode(row["response_token_ids"])
        except (IndexError, OverflowError, TypeError, ValueError):
            again = None
        if again != row["answer"]:
            return ["the steered model has another tokenizer than the model of the vectors"]
    return []


class Reference:
    """The steered model, unsteered, as the judge's measure of fluency. `identity` lets judges cache what
    hangs on it.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.identity = model_record(model)

    def __call__(self, rows: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> dict[str, float]:
        return dict(self._model.logprobs([CaptureRow(*row) for row in rows if row[2]]))


def model_record(model: LanguageModel) -> dict[str, Any]:
    """Identity with the dtype the model really runs in: `auto` differs between devices."""
    return {**model.identity.record(), "runs_in": str(model.dtype)}


class Bench:
    """The model, the judge and their caches, for the traits of one batch."""

    def __init__(self, ctx: StageContext, model: LanguageModel, meter: Meter) -> None:
        from trait_assets.steering.scoring import Scorer

        e = ctx.experiment
        self._ctx = ctx
        self._model = model
        self._rows: dict[str, Any] = {}
        self._judgements: dict[str, Any] = {}
        self.judge = ctx.judges.judge(self._judgement_cache, Reference(model), on_progress=self._spent)
        self.options = GenerationOptions(
            max_new_tokens=e.steer.max_new_tokens, temperature=e.steer.temperature, seed=e.seed
        )
        self._task: Any = None
        self._spending: Spending | None = None
        self.meter = meter
        meter.judge = judge_name(self.judge.identity)
        self.scorer: Scorer = Scorer(
            self._generate,
            self.judge.score,
            options=self.options,
            identity=model_record(model),
            steer_from=e.steer.steer_from,
            cache_for=self.row_cache,
            on_rows=self._advance,
            meter=self.meter,
        )

    def row_cache(self, trait: str) -> Any:
        if trait not in self._rows:
            cache = self._ctx.workspace.row_cache("steered", trait)
            self._rows[trait] = _Fresh(cache) if self._ctx.force else cache
        return self._rows[trait]

    def _judgement_cache(self, trait: str) -> Any:
        if trait not in self._judgements:
            self._judgements[trait] = _Counted(self._ctx.workspace.row_cache("judgements", trait))
        return self._judgements[trait]

    def _generate(self, rows: Sequence[GenerationRow]) -> Iterator[Any]:
        return self._model.generate(rows, self.options, steer_from=self._ctx.experiment.steer.steer_from)

    def _advance(self, rows: int, tokens: int) -> None:
        if self._task is not None:
            self._task.advance(rows, tokens=tokens)

    def _spent(self, usage: Mapping[str, float]) -> None:
        if self._spending is not None:
            self._spending.show(usage)

    def answers(self, asked: Mapping[str, tuple[Task, Sequence[Any]]]) -> dict[str, Any]:
        settings = sum(len(requests) for _, requests in asked.values())
        rows = sum(len(task.questions.of(r.half)) for task, requests in asked.values() for r in requests)
        with self._ctx.progress.task(f"steering · {settings} settings, {rows} answers", rows) as task:
            self._task, self._spending = task, Spending(task)
            try:
                return self.scorer.answers(asked)
            finally:
                self._spending.show(self.judge.usage(), last=True)
                self._task = self._spending = None

    def norms(self, trait: str, task: Task, answers: Sequence[Answer]) -> list[float]:
        """[n_layers] median ‖h‖ of the steered model over its own unsteered answers, token 0 left out.

        The median over rows of each row's median over tokens. Kept in the row cache: a coefficient is this
        times a dose, and must be the same in a resumed run.
        """
        import numpy as np

        rows = [CaptureRow(str(i), task.prompts[a.question], a.ids) for i, a in enumerate(answers) if a.ids]
        if not rows:
            raise UserError(
                f"the unsteered model gives no answer to any question of {trait}",
                where=SteeringStage.name,
                remedy="look at the questions of steering.json, or use a model with a chat template",
            )
        key = fingerprint(
            {
                "norms": 1,
                "model": model_record(self._model),
                "rows": [[list(r.prompt_ids), list(r.response_ids)] for r in rows],
            }
        )
        cache = self.row_cache(trait)
        known = cache.get(key)
        if known is not None:
            return [float(v) for v in known["median_norm"]]
        per_row = np.stack([r.norms for r in self._model.capture(rows, ["all[:]"])])
        norms = [float(f"{v:.{NORM_DIGITS}g}") for v in np.nanmedian(per_row, axis=0)]
        cache.put_many({key: {"median_norm": norms}})
        return norms

    def judged(self, trait: str) -> int:
        """Answers of the judge about this trait that were not known before."""
        cache = self._judgements.get(trait)
        return 0 if cache is None else int(cache.put)


class _Counted:
    """A row cache that counts what is put into it."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.put = 0

    def get(self, key: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._cache.get(key)
        return found

    def put_many(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        self._cache.put_many(rows)
        self.put += len(rows)


class _Fresh:
    """A row cache that answers only with what this process has put in: a forced run generates again, once."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._seen: set[str] = set()

    def get(self, key: str) -> dict[str, Any] | None:
        return self._cache.get(key) if key in self._seen else None

    def put_many(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        self._seen.update(rows)
        self._cache.put_many(rows)


def _outcome(ctx: StageContext, prepared: _Prepared, result: SearchResult, bench: Bench) -> Outcome:
    from dataclasses import replace

    from trait_assets.report import pictures
    from trait_assets.steering import results

    e, plan = ctx.experiment, prepared.plan
    trait = result.task.trait
    result = replace(result, flags=(*prepared.flags, *result.flags))
    source = {
        "experiment": e.name,
        "application_model": plan.options["application_model"],
        "vector_source": {
            "model": dict(plan.payload.source_model),
            "experiment": e.name,
            "trait": trait,
            "fingerprint": plan.inputs["vectors"],
        },
        "judge": plan.options["judge"],
        "judge_is_stand_in": bench.judge.stand_in,
        "generation": bench.options.record(),
        "steer_from": e.steer.steer_from,
        "options": plan.options["steer"],
        "median_norm": prepared.norms,
        "candidates": [scored.record() for scored in plan.payload.chosen],
    }
    outcome = Outcome(trait)
    for position in results.positions_of(result.runs):
        folder = Position.parse(position).folder
        outcome.files[keys.steering(e.name, trait, folder, "results.json")] = results.results_record(
            result, position, source
        )
        outcome.files[keys.steering(e.name, trait, folder, "generations.json")] = results.generation_rows(
            result, position
        )
    outcome.summary = results.summary(
        result, judge=judge_name(plan.options["judge"]), stand_in=bench.judge.stand_in
    )
    outcome.summary["generated_now"] = bench.scorer.generated.get(trait, 0)
    outcome.summary["judged_now"] = bench.judged(trait)
    outcome.metrics = results.metric_rows(result)
    outcome.tables = {"runs": results.run_table(result), "samples": results.samples(result)}
    outcome.checks = results.checks(result, e.steer.coherence_threshold)
    points = results.dose_points(result)
    outcome.pictures = {
        "dose_response": pictures.dose_response(
            points, outcome.summary, threshold=e.steer.coherence_threshold, title=trait
        ),
        "layer_by_dose": pictures.layer_dose_heatmap(
            points, outcome.summary, threshold=e.steer.coherence_threshold, title=trait
        ),
    }
    return outcome


class SteeringSummaryStage:
    """`steering/steering_summary.json`: every steered trait of the experiment in one table. Its `plan` takes
    trait None.
    """

    name = "steering_summary"
    code_version = "1"
    shared = False

    def plan(self, ctx: StageContext, trait: str | None) -> Plan:
        found, problems = ctx.finished(SteeringStage.name)
        if not found:
            if not ctx.experiment.steering:
                return Plan(None, {}, {}, skipped="steering is switched off")
            raise UserError(
                f"no trait of {ctx.experiment.name} is steered yet"
                + (f" ({problems[0]})" if problems else ""),
                where=self.name,
                remedy="materialise `steering_results` first",
            )
        inputs = {name: manifest.fingerprint for name, manifest in sorted(found.items())}
        return Plan(None, inputs, {"problems": problems}, payload=[found[name] for name in sorted(found)])

    def execute(self, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]:
        for plan in plans:
            try:
                yield self._gather(ctx, plan)
            except Exception as error:
                yield Outcome(plan.trait, error=error)

    def _gather(self, ctx: StageContext, plan: Plan) -> Outcome:
        from trait_assets.report import pictures

        rows = []
        for manifest in plan.payload:
            row = {"trait": manifest.trait, **{name: manifest.summary.get(name) for name in SUMMARY_COLUMNS}}
            rows.append(row)
        validated = [row["trait"] for row in rows if row["validated"]]
        problems = plan.options["problems"]
        outcome = Outcome(None)
        outcome.files[keys.steering(ctx.experiment.name, None, None, "steering_summary.json")] = {
            "experiment": ctx.experiment.name,
            "application_model": ctx.experiment.steered_model,
            "traits": rows,
            "problems": problems,
        }
        outcome.tables = {"traits": [{k: _short(v) for k, v in row.items()} for row in rows]}
        outcome.summary = {
            "traits": len(rows),
            "validated": len(validated),
            "validated_traits": ", ".join(validated) or None,
            "judges": ", ".join(sorted({str(row["judge"]) for row in rows if row["judge"]})),
            "judge_is_stand_in": any(bool(row["judge_is_stand_in"]) for row in rows),
            "problems": "; ".join(problems) or None,
        }
        outcome.metrics = [
            {"name": name, "value": float(row[name]), "of_trait": row["trait"]}
            for row in rows
            for name in ("validated", "change", "coherence", "random_change", "prompting_change")
            if row[name] is not None
        ]
        outcome.checks = [
            Check(
                "all_results_intact",
                not problems,
                "; ".join(problems) or "every steering result could be read",
            )
        ]
        outcome.pictures = {"changes": pictures.steering_changes(rows, title=ctx.experiment.name)}
        return outcome


SUMMARY_COLUMNS = (
    "validated",
    "reason",
    "direction",
    "best_method",
    "best_layer",
    "best_position",
    "best_component",
    "best_dose",
    "best_coefficient",
    "baseline_trait",
    "steered_trait",
    "change",
    "change_low",
    "change_high",
    "coherence",
    "distinct_3",
    "success_rate",
    "wrong_way_fraction",
    "random_change",
    "random_change_high",
    "random_bar",
    "over_random",
    "prompting_change",
    "prompting_coherence",
    "combination_change",
    "combination_coherence",
    "n_search",
    "n_report",
    "abstentions",
    "judge",
    "judge_is_stand_in",
    "flags",
)


def _short(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value
