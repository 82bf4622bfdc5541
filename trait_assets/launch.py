"""Launching the graph by hand: the command line's runs are ordinary Dagster runs on the same instance.

A run covers neighbouring traits. Where some traits of a run fail, Dagster skips the later stages for all of them; so the
survivors are launched again from the failed stage on, until every trait has either finished or failed by itself. What is
done is skipped by its fingerprint, and the models stay loaded in the process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import yaml

from storage.errors import UserError
from trait_assets import paths, pipeline
from trait_assets.definitions import build_defs, default_resources
from trait_assets.experiments import Experiment
from trait_assets.partitions import contiguous_ranges, known_traits, register
from trait_assets.pipeline import PIPELINE, TABLES, stages_of
from trait_assets.stage import TRAITS_PER_RUN, asset_key, observe

POOL_LIMITS = {"gpu": 1, "judge": 4}


@dataclass
class StageReport:
    """How the traits fared in one stage."""

    stage: str
    states: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    index_behind: bool = False


@dataclass
class LaunchReport:
    """What a command did: per stage and trait, and the Dagster runs it made."""

    stages: dict[str, StageReport] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)

    @property
    def failures(self) -> dict[str, dict[str, str]]:
        """trait → stage → reason."""
        failures: dict[str, dict[str, str]] = {
            trait: {"scenarios": reason} for trait, reason in self.refused.items()
        }
        for report in self.stages.values():
            for trait, reason in report.reasons.items():
                failures.setdefault(trait, {})[report.stage] = reason
        return failures

    @property
    def up_to_date(self) -> bool:
        return not self.refused and all(
            state in ("current", "skipped")
            for report in self.stages.values()
            for state in report.states.values()
        )

    def hear(self, stage: pipeline.Stage, results: list[pipeline.TraitResult]) -> None:
        report = self.stages.setdefault(stage.name, StageReport(stage.name))
        for result in results:
            trait = result.trait or "all traits"
            # a survivor that is launched again finds its earlier work current: that must not hide that it was done now
            if not (result.state == "current" and report.states.get(trait) == "done"):
                report.states[trait] = result.state
            report.reasons.pop(trait, None)
            if result.state == "failed":
                report.reasons[trait] = result.reason or "unknown"
                if result.detail:
                    report.details[trait] = result.detail
            if result.manifest is not None:
                report.summaries[trait] = result.manifest.summary
            report.index_behind |= result.index_behind


@contextlib.contextmanager
def open_instance() -> Iterator[dg.DagsterInstance]:
    """The instance that `dagster dev` from the repository uses, or that of DAGSTER_HOME."""
    folder = os.environ.get("DAGSTER_HOME") or str(instance_folder("cli"))
    with _one_at_a_time(Path(folder)):
        instance = dg.DagsterInstance.from_config(folder)
        set_pool_limits(instance)
    with instance:
        yield instance


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process after the other open the history of this folder.

    Two that open a new SQLite history at once both create its tables, and leave it with two schema versions, which no
    later process can open.
    """
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            handle = stack.enter_context(open(folder / ".opening", "ab"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass  # Windows, a read-only folder, a file system without locks: then it is up to luck
        yield


def instance_folder(use: str) -> Path:
    """A folder whose dagster.yaml is the repository's with absolute paths into the state folder.

    For `cli` without captured output: the terminal belongs to the progress bars, and the events are kept all the same.
    """
    state = paths.state_root().resolve()
    config = yaml.safe_load((paths.REPOSITORY / "dagster.yaml").read_text(encoding="utf-8"))
    history = str(state / "dagster")
    config["storage"]["sqlite"]["base_dir"] = history
    config["local_artifact_storage"]["config"]["base_dir"] = history
    config["compute_logs"]["config"]["base_dir"] = str(paths.compute_logs_root())
    if use == "cli":
        config["compute_logs"] = {
            "module": "dagster._core.storage.noop_compute_log_manager",
            "class": "NoOpComputeLogManager",
        }
    folder = state / "instance" / use
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "dagster.yaml"
    text = yaml.safe_dump(config, sort_keys=False)
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        temporary = folder / f"dagster.yaml.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    return folder


def set_pool_limits(instance: dg.DagsterInstance) -> None:
    """Set each pool's limit once, explicitly: the default of a fresh instance does not hold for the first runs."""
    known = instance.event_log_storage.get_pool_limits()
    have = {limit.name for limit in known}
    for pool, limit in POOL_LIMITS.items():
        if pool not in have:
            instance.event_log_storage.set_concurrency_slots(pool, limit)


@dataclass
class Launcher:
    """Runs stages of one experiment for some traits, in this process.

    `experiment` is the configured one, which shapes the graph; `overrides` are this run's options.
    """

    instance: dg.DagsterInstance
    experiment: Experiment
    overrides: dict[str, Any] = field(default_factory=dict)
    judges: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    force: bool = False
    bars: bool = False
    report: LaunchReport = field(default_factory=LaunchReport)

    def __post_init__(self) -> None:
        effective = self.experiment.with_overrides(self.overrides)
        # an override may add stages that the configured graph lacks, or take some away
        self._effective = effective
        self._defs = build_defs(experiments=[effective])
        self._job = self._defs.resolve_implicit_global_asset_job_def()

    @property
    def effective(self) -> Experiment:
        return self._effective

    def launch(self, traits: Sequence[str], stages: Sequence[str]) -> LaunchReport:
        """Run `stages` (in pipeline order) for `traits`, then the tables that lie over them."""
        register(self.instance, traits)
        with observe(self.report.hear):
            for batch in contiguous_ranges(known_traits(self.instance), traits, TRAITS_PER_RUN):
                self._launch_batch(batch, [s for s in PIPELINE if s in stages])
            for table, below in TABLES.items():
                # the report shows steering too, so it follows both
                over = {below, "steering_results"} if table == "report" else {below}
                if over & set(stages) and below in stages_of(self.effective):
                    self._execute([table], None)
        return self.report

    def _launch_batch(self, batch: list[str], stages: list[str]) -> None:
        todo = [(batch, stages)]
        while todo:
            traits, remaining = todo.pop(0)
            failed_stage = self._execute(remaining, traits)
            if failed_stage is None:
                continue
            bad = set(self.report.stages[failed_stage].reasons)
            survivors = [trait for trait in traits if trait not in bad]
            later = remaining[remaining.index(failed_stage) + 1 :]
            if later:
                known = known_traits(self.instance)
                todo += [(part, later) for part in contiguous_ranges(known, survivors, TRAITS_PER_RUN)]

    def _execute(self, stages: Sequence[str], traits: Sequence[str] | None) -> str | None:
        """One Dagster run. Returns the stage that failed, if one did by its traits; raises what else went wrong."""
        tags = {"trait_assets/launched_by": "cli"}
        if traits is not None and len(traits) > 1:
            tags["dagster/asset_partition_range_start"] = traits[0]
            tags["dagster/asset_partition_range_end"] = traits[-1]
        result = self._job.execute_in_process(
            instance=self.instance,
            asset_selection=[asset_key(None if s == "scenarios" else self.effective, s) for s in stages],
            partition_key=traits[0] if traits is not None and len(traits) == 1 else None,
            tags=tags,
            run_config=self._run_config(),
            raise_on_error=False,
        )
        self.report.runs.append(result.run_id)
        if result.success:
            return None
        for stage in stages:
            report = self.report.stages.get(stage)
            if report is not None and set(traits or ["all traits"]) & set(report.reasons):
                return stage
        failures = [
            event.step_failure_data.error.to_string()
            for event in result.all_events
            if event.is_step_failure and event.step_failure_data.error is not None
        ]
        raise RuntimeError(
            f"Dagster run {result.run_id} failed outside the stages:\n"
            + ("\n".join(failures) or "no step failure")
        )

    def _run_config(self) -> dict[str, Any]:
        resources: dict[str, Any] = {
            "overrides": {
                "config": {
                    "options": self.overrides,
                    "force": self.force,
                    "progress": "bars" if self.bars else "lines",
                }
            }
        }
        if self.judges:
            resources["judges"] = {"config": self.judges}
        if self.models:
            resources["models"] = {"config": self.models}
        return {"resources": resources, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@dataclass(frozen=True)
class Selection:
    """Traits that can be run, and the reason for each that cannot."""

    traits: list[str]
    refused: dict[str, str]


def select_traits(root: Path, experiment: Experiment, wanted: Sequence[str] | None) -> Selection:
    """The experiment's traits, narrowed to `wanted` (names or patterns). Every folder is read and checked.

    Raises UserError when nothing matches; a broken folder is refused by itself.
    """
    import difflib
    import fnmatch

    from trait_assets.scenarios.dataset import discover, load_trait

    found = discover(root)
    everything = [*found.traits, *found.problems]
    chosen = [t for t in everything if experiment.covers(t)]
    if wanted:
        chosen = []
        for pattern in wanted:
            matches = [t for t in everything if fnmatch.fnmatchcase(t, pattern)]
            if not matches:
                close = difflib.get_close_matches(pattern, everything, n=1, cutoff=0.4)
                raise UserError(
                    f"there is no trait `{pattern}`",
                    where=str(root),
                    remedy=(f"did you mean `{close[0]}`? " if close else "")
                    + "a trait is a folder category/trait with positive.txt, negative.txt, definition.txt",
                )
            chosen += [t for t in matches if t not in chosen]
    if not chosen:
        raise UserError(
            f"experiment {experiment.name} has no traits",
            where=str(root),
            remedy="add trait folders there, or widen `traits` in the config",
        )
    refused = {t: found.problems[t] for t in chosen if t in found.problems}
    good = []
    for trait in chosen:
        if trait in refused:
            continue
        try:
            load_trait(root, trait, require_steering=experiment.steering)
        except UserError as error:
            refused[trait] = str(error)
        else:
            good.append(trait)
    return Selection(good, refused)


def check_models(experiment: Experiment, models: dict[str, Any]) -> None:
    """Refuse an unknown model before anything runs. Needs no weights."""
    resource = type(default_resources()["models"])(**models)
    resource.identify(
        resource.spec(
            experiment.extraction_model, experiment.extraction_revision, experiment.extraction_adapter
        )
    )
    if experiment.steering:
        resource.identify(
            resource.spec(experiment.steered_model, experiment.steered_revision, experiment.steered_adapter)
        )


def check_methods(experiment: Experiment) -> None:
    """Refuse an unknown vector method before anything runs."""
    from trait_assets.vectors.methods import get_method

    for name in (*experiment.methods, *(experiment.steer.methods or [])):
        get_method(name)
