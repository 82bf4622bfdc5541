"""How every stage runs: plan each trait, skip what is current, compute the rest together, commit each trait by itself.

This is the one loop that the Dagster assets (`stage.py`) and the tests share. It knows nothing of Dagster and nothing of
what a stage computes. A stage is an object with two methods:

- `plan(ctx, trait)` reads the manifests and inputs of one trait, checks them, and returns a `Plan`. It is cheap and
  never touches a model or a judge. What it raises is that trait's failure and nobody else's.
- `execute(ctx, plans)` computes all given plans together, so that rows of many traits share one GPU batch, and yields
  one `Outcome` per trait as soon as that trait is complete.

The fingerprint of (stage, trait) is the hash of stage name, code version, input fingerprints and options. When the stored
manifest carries the same fingerprint and its files are intact, the trait is current and nothing runs.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata as importlib_metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from storage.errors import ArtifactError, UserError
from storage.manifest import SCHEMA_VERSION, Manifest, fingerprint
from storage.text import well_formed, well_formed_tree
from trait_assets import metering
from trait_assets.index_rows import detail_rows
from trait_assets.metering import Work

if TYPE_CHECKING:
    from resources.judges.protocol import CacheFor, Judge, OnProgress, ReferenceLogprob
    from resources.models.language_model import LanguageModel
    from resources.models.rows import ModelIdentity, ModelSpec
    from resources.models.server import GenerationServer, ServedModel
    from storage.workspace import Workspace
    from trait_assets.experiments import Experiment
    from trait_assets.progress import Progress

log = logging.getLogger("trait_assets")

# per-trait stages in the order of the pipeline
PIPELINE = (
    "scenarios",
    "vetted_scenarios",
    "responses",
    "vetted_responses",
    "activations",
    "vectors",
    "vector_evaluation",
    "steering_results",
)
# table over all traits → the stage that it lies over
TABLES = {
    "extraction_evaluation": "vector_evaluation",
    "steering_summary": "steering_results",
    # shows whatever there is, so it comes last
    "report": "vector_evaluation",
}

RECORDED_LIBRARIES = ("torch", "transformers", "scikit-learn", "numpy", "dagster")


class Models(Protocol):
    """What stages need of the injected model resource."""

    def spec(self, model: str, revision: str | None = None, adapter: str | None = None) -> ModelSpec: ...

    def get(self, spec: ModelSpec, max_batch_rows: int | None = None) -> LanguageModel: ...

    def identify(self, spec: ModelSpec) -> ModelIdentity: ...

    def served(self, spec: ModelSpec, settings: GenerationServer) -> ServedModel: ...


class Judges(Protocol):
    """What stages need of the injected judge resource."""

    def identity(self) -> dict[str, Any]: ...

    def judge(
        self,
        cache_for: CacheFor,
        reference: ReferenceLogprob | None = None,
        on_progress: OnProgress | None = None,
    ) -> Judge: ...


def stages_of(experiment: Experiment) -> list[str]:
    """The per-trait stages that an experiment's graph has, in order."""
    left_out = set()
    if experiment.prefill_only:
        left_out |= {"vetted_scenarios", "responses", "vetted_responses"}
    if not experiment.steering:
        left_out.add("steering_results")
    return [stage for stage in PIPELINE if stage not in left_out]


@dataclass(frozen=True)
class StageContext:
    """Everything a stage is handed. `experiment` is the effective one, overrides applied."""

    experiment: Experiment
    workspace: Workspace
    models: Models
    judges: Judges
    dataset_root: Path
    run_id: str
    progress: Progress
    log: logging.Logger = log
    # set to True to recompute what is current (a user's --force)
    force: bool = False

    def extraction_spec(self) -> ModelSpec:
        e = self.experiment
        return self.models.spec(e.extraction_model, e.extraction_revision, e.extraction_adapter)

    def application_spec(self) -> ModelSpec:
        e = self.experiment
        return self.models.spec(e.steered_model, e.steered_revision, e.steered_adapter)

    def extraction_model(self) -> LanguageModel:
        """The model that responds and is captured, loaded; with the experiment's batch size."""
        return self.models.get(self.extraction_spec(), max_batch_rows=self.experiment.batch_size)

    def generating_model(self) -> LanguageModel | ServedModel:
        """The model that responds: loaded here, or on the server that `generation` names."""
        g = self.experiment.generation
        if g.backend == "local":
            return self.extraction_model()
        from resources.models.server import GenerationServer

        return self.models.served(
            self.extraction_spec(),
            GenerationServer(
                model=g.served_model or self.experiment.extraction_model,
                base_url=g.server_url or os.environ.get("TRAITS_GENERATION_URL") or None,
                api_key_env=g.api_key_env,
                max_concurrency=g.max_concurrency,
                requests_per_minute=g.requests_per_minute,
                timeout_s=g.timeout_s,
                max_attempts=g.max_attempts,
                max_wait_s=g.max_wait_s,
                max_calls=g.max_calls,
                max_tokens=g.max_tokens,
            ),
        )

    def application_model(self) -> LanguageModel:
        """The model that is steered, loaded; with the experiment's batch size."""
        return self.models.get(self.application_spec(), max_batch_rows=self.experiment.batch_size)

    def upstream(self, stage: str, trait: str | None, *, shared: bool = False) -> Manifest:
        """The manifest of an input, or a UserError that says which stage to materialise first.

        `scenarios` is read from the trait folder on demand: the folder sensor reports that a folder is new or has
        changed without reading it, so its first reader does.
        """
        if shared and stage == "scenarios" and trait is not None:
            self._read_scenarios(trait)
        manifest = self.workspace.manifests.read(None if shared else self.experiment.name, stage, trait)
        if manifest is None:
            raise UserError(
                f"{trait or self.experiment.name} has no `{stage}` yet",
                where=stage,
                remedy=f"materialise `{stage}` first (or see why it failed)",
            )
        problems = self.workspace.manifests.verify(manifest)
        if problems:
            raise ArtifactError(
                f"`{stage}` of {trait} is damaged: {'; '.join(problems[:3])}",
                remedy=f"materialise `{stage}` again: it rebuilds what is missing or altered",
            )
        return manifest

    def finished(self, stage: str) -> tuple[dict[str, Manifest], list[str]]:
        """Trait → manifest of every trait of the experiment that `stage` is done for, and what cannot be read.

        What a table over all traits is made from: a damaged artifact is named there instead of spoiling the table.
        """
        found, problems = {}, []
        for key in self.workspace.manifests.keys(self.experiment.name):
            if f"/manifests/{stage}/" not in key:
                continue
            try:
                manifest = self.workspace.manifests.read_key(key)
                if manifest is None or manifest.trait is None or manifest.status != "done":
                    continue
                if not self.experiment.covers(manifest.trait):
                    continue
                damage = self.workspace.manifests.verify(manifest)
            except ArtifactError as error:
                problems.append(str(error))
                continue
            if damage:
                problems.append(f"{manifest.trait}: {damage[0]}")
            else:
                found[manifest.trait] = manifest
        return found, problems

    def _read_scenarios(self, trait: str) -> None:
        """Bring the stored scenario set up to date with its folder; raises what is wrong with the folder."""
        from trait_assets.scenarios.reading import ScenariosStage

        if not (self.dataset_root / trait).is_dir():
            # gone since: what is stored still says what its results were made from
            return
        (result,) = run(ScenariosStage(), replace(self, force=False), [trait])
        if result.state == "failed":
            raise UserError(result.reason or "the trait folder cannot be read", where="scenarios")


@dataclass(frozen=True)
class Plan:
    """What one trait needs in one stage. `payload` is the stage's own business."""

    trait: str | None
    inputs: dict[str, str]
    options: dict[str, Any]
    payload: Any = None
    skipped: str | None = None
    fingerprint: str = ""

    @property
    def owner(self) -> str:
        """The trait of a per-trait plan; a table's plan has none."""
        if self.trait is None:
            raise ValueError("a table over all traits has no trait of its own")
        return self.trait


@dataclass
class Outcome:
    """What a stage made for one trait.

    `files`: key in the store → bytes, or a JSON-able object; `summary`: plain numbers and short texts, first in the UI;
    `metrics`: rows for the metrics index (`name`, `value`, and whatever identifies them: layer, method …);
    `tables`: small tables for the UI; `pictures`: name → PNG bytes (< 100 kB each), stored beside the artifact;
    `checks`: named facts that become asset checks.
    """

    trait: str | None
    files: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    error: BaseException | None = None
    # what went through a model or a judge; a stage without either is timed as a whole
    work: Work = field(default_factory=Work)
    after_commit: Callable[[], None] | None = None


@dataclass(frozen=True)
class Check:
    """A fact about one trait's artifact. `severity` error: a later stage is meaningless without it."""

    name: str
    passed: bool
    description: str
    severity: Literal["warn", "error"] = "warn"
    values: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "description": self.description,
            "severity": self.severity,
            "values": self.values,
        }


class Stage(Protocol):
    """`shared` stages belong to no experiment (scenarios). Tables over all traits are planned with trait None."""

    name: str
    code_version: str
    shared: bool

    def plan(self, ctx: StageContext, trait: Any) -> Plan: ...

    def execute(self, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]: ...


State = Literal["done", "current", "skipped", "failed"]


@dataclass(frozen=True)
class TraitResult:
    """How one trait fared. `manifest` is None for a failure; `reason` says why, and `tables` show it."""

    trait: str | None
    state: State
    manifest: Manifest | None = None
    reason: str | None = None
    detail: str | None = None
    index_behind: bool = False
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def stage_fingerprint(stage: Stage, plan: Plan) -> str:
    return fingerprint(
        {
            "stage": stage.name,
            "code_version": stage.code_version,
            "trait": plan.trait,
            "inputs": plan.inputs,
            "options": plan.options,
            "skipped": plan.skipped is not None,
        }
    )


def libraries() -> dict[str, str]:
    """Versions that can move a number; recorded with every artifact, not part of the fingerprint."""
    found = {}
    for name in RECORDED_LIBRARIES:
        try:
            found[name] = importlib_metadata.version(name)
        except importlib_metadata.PackageNotFoundError:
            continue
    return found


def run(stage: Stage, ctx: StageContext, traits: Iterable[str | None]) -> Iterator[TraitResult]:
    """Bring `stage` up to date for `traits`; yields one result per trait, each after its commit.

    A trait that fails never stops another. The order of results is the order of completion.
    """
    pending: list[Plan] = []
    for trait in traits:
        try:
            plan = _plan(stage, ctx, trait)
        except Exception as error:
            yield _failed(ctx, stage, trait, error)
            continue
        plan = replace(plan, fingerprint=stage_fingerprint(stage, plan))
        current = None if ctx.force else _current(stage, ctx, plan)
        if current is not None:
            yield TraitResult(trait, "skipped" if current.status == "skipped" else "current", current)
        elif plan.skipped is not None:
            yield _commit(stage, ctx, plan, Outcome(trait, summary={"skipped": plan.skipped}))
        else:
            pending.append(plan)
    yield from _execute(stage, ctx, pending)


def _plan(stage: Stage, ctx: StageContext, trait: str | None) -> Plan:
    experiment = ctx.experiment
    if not stage.shared and trait is not None and not experiment.covers(trait):
        # every trait is a partition of every experiment; one that the experiment leaves out is skipped, not missing
        return Plan(trait, {}, {}, skipped=f"not among the traits of experiment {experiment.name}")
    return stage.plan(ctx, trait)


def _execute(stage: Stage, ctx: StageContext, pending: list[Plan]) -> Iterator[TraitResult]:
    open_plans = {plan.trait: plan for plan in pending}
    if not open_plans:
        return
    started = since = time.monotonic()
    metering.reset_peaks()
    try:
        for outcome in stage.execute(ctx, pending):
            plan = open_plans.pop(outcome.trait)
            if outcome.error is not None:
                failure = _failed(ctx, stage, plan.trait, outcome.error)
                yield replace(failure, tables=outcome.tables)
                continue
            outcome.summary.setdefault("seconds_since_start", round(time.monotonic() - started, 2))
            now = time.monotonic()
            done = metering.record(
                outcome.work,
                seconds=now - since,
                gpu_peak_bytes=metering.gpu_peak_bytes(),
                host_peak_bytes=metering.host_peak_bytes(),
            )
            since = now
            outcome.summary = {**metering.summary(done), **outcome.summary}
            outcome.metrics.append(done)
            try:
                result = _commit(stage, ctx, plan, outcome)
            except Exception as error:
                result = _failed(ctx, stage, plan.trait, error)
            yield result
    except Exception as error:
        # what was committed stays; everything still open shares the reason
        for trait in list(open_plans):
            open_plans.pop(trait)
            yield _failed(ctx, stage, trait, error)
    for trait in open_plans:
        yield _failed(ctx, stage, trait, RuntimeError(f"stage {stage.name} returned nothing for {trait}"))


def _current(stage: Stage, ctx: StageContext, plan: Plan) -> Manifest | None:
    try:
        manifest = ctx.workspace.manifests.read(_experiment(stage, ctx), stage.name, plan.trait)
    except ArtifactError as error:
        ctx.log.warning("%s: %s; it is rebuilt", stage.name, error)
        return None
    if manifest is None or manifest.fingerprint != plan.fingerprint:
        return None
    problems = ctx.workspace.manifests.verify(manifest)
    if problems:
        ctx.log.warning("%s of %s is rebuilt: %s", stage.name, plan.trait, "; ".join(problems[:3]))
        return None
    return manifest


def _experiment(stage: Stage, ctx: StageContext) -> str | None:
    return None if stage.shared else ctx.experiment.name


def _commit(stage: Stage, ctx: StageContext, plan: Plan, outcome: Outcome) -> TraitResult:
    store = ctx.workspace.store
    experiment = _experiment(stage, ctx)
    records = {}
    for key, content in outcome.files.items():
        if isinstance(content, bytes):
            records[key] = store.write_bytes(key, content)
        else:
            records[key] = store.write_json(key, content)
    for name, picture in outcome.pictures.items():
        key = ctx.workspace.picture_key(experiment, stage.name, plan.trait, name)
        records[key] = store.write_bytes(key, picture)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        stage=stage.name,
        experiment=experiment,
        trait=plan.trait,
        fingerprint=plan.fingerprint,
        status="skipped" if plan.skipped is not None else "done",
        code_version=stage.code_version,
        inputs=plan.inputs,
        options=plan.options,
        files=records,
        # the UI sends these as UTF-8
        summary=well_formed_tree({**outcome.summary, "checks": [check.record() for check in outcome.checks]}),
        tables=well_formed_tree(outcome.tables),
        run_id=ctx.run_id,
        created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        libraries=libraries(),
    )
    rows = [*outcome.metrics, *detail_rows(stage.name, plan.options, outcome.files)]
    indexed = ctx.workspace.commit(manifest, rows)
    if outcome.after_commit is not None:
        outcome.after_commit()
    return TraitResult(
        plan.trait,
        "skipped" if plan.skipped is not None else "done",
        manifest,
        index_behind=indexed == "index_behind",
    )


def _failed(ctx: StageContext, stage: Stage, trait: str | None, error: BaseException) -> TraitResult:
    """A UserError is said in one line; anything else keeps its trace, because it is a defect of ours."""
    if isinstance(error, UserError):
        reason, detail = str(error), None
    else:
        reason = f"{type(error).__name__}: {error}"
        detail = well_formed("".join(traceback.format_exception(error)))
    reason = well_formed(reason)
    ctx.log.error("%s failed for %s: %s", stage.name, trait or ctx.experiment.name, reason)
    return TraitResult(trait, "failed", None, reason, detail)
