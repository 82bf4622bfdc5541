"""Two worlds for automation: a project whose stages do no work, so that the graph, its automation and its bookkeeping are
left; and a real `dagster dev` over an experiment that is cheap to compute."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.scheduler.instigation import InstigatorTick

from storage.errors import UserError
from trait_assets.checks import CHECKS
from trait_assets.definitions import build_defs
from trait_assets.partitions import register
from trait_assets.paths import REPOSITORY
from trait_assets.pipeline import Check, Outcome, Plan, StageContext, stages_of
from trait_assets.stages import all_stages

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@dataclass
class Project:
    """`broken`: (stage, trait) pairs that fail; `worked`: the pairs that were computed, in order."""

    root: Path
    broken: set[tuple[str, str]] = field(default_factory=set)
    worked: list[tuple[str, str]] = field(default_factory=list)

    def folder(self, trait: str, text: str = "I love this") -> None:
        folder = self.root / "datasets" / trait
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "positive.txt").write_text("".join(f"{text} {i}\n" for i in range(12)))
        (folder / "negative.txt").write_text("".join(f"It is fine {i}\n" for i in range(12)))
        (folder / "definition.txt").write_text("HIGH (70-100): joy\nMID (30-70): some\nLOW (0-30): none\n")
        (folder / "steering.json").write_text(json.dumps({"questions": ["How are you?", "What is new?"]}))

    def experiment(self, name: str, **options: Any) -> None:
        folder = self.root / "experiments" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"extraction_model": "org/model", **options}))

    def defs(self) -> dg.Definitions:
        return build_defs()

    def run(self, defs: dg.Definitions, instance: dg.DagsterInstance, request: dg.RunRequest) -> bool:
        """A run request carried out as the scheduler does, in this process."""
        assert request.asset_selection
        tags = {k: v for k, v in request.tags.items() if k != "dagster/partition"}
        result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            asset_selection=list(request.asset_selection),
            partition_key=request.partition_key,
            tags=tags,
            raise_on_error=False,
            run_config=QUIET,
        )
        return result.success


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    made = Project(tmp_path)
    (tmp_path / "datasets").mkdir()
    monkeypatch.setenv("TRAITS_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setenv("TRAITS_EXPERIMENTS", str(tmp_path / "experiments"))
    monkeypatch.setenv("TRAITS_STATE", str(tmp_path / "state"))
    # no test here asks the index, and keeping it is most of what an idle stage costs
    monkeypatch.setenv("TRAITS_INDEX", "off")
    monkeypatch.delenv("TRAITS_STORE", raising=False)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)

    def plan(self: Any, ctx: StageContext, trait: str | None) -> Plan:
        order = stages_of(ctx.experiment)
        above = order[order.index(self.name) - 1] if self.name in order else None
        inputs = {}
        if above is not None and trait is not None:
            inputs[above] = ctx.upstream(above, trait, shared=above == "scenarios").fingerprint
        return Plan(trait, inputs=inputs, options={"max_new_tokens": ctx.experiment.max_new_tokens})

    def execute(self: Any, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]:
        for one in plans:
            made.worked.append((self.name, str(one.trait)))
            if (self.name, one.trait) in made.broken:
                yield Outcome(one.trait, error=UserError("it cannot be done", remedy="mend it"))
            else:
                checks = [Check(name, True, text) for name, text in CHECKS[self.name].items()]
                yield Outcome(one.trait, summary={"n": 12}, checks=checks)

    for stage in all_stages().values():
        if stage.name != "scenarios":
            monkeypatch.setattr(type(stage), "plan", plan)
            monkeypatch.setattr(type(stage), "execute", execute)
    return made


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def registered(project: Project, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Six traits with folders and partitions, runs of four of them, one experiment of the smallest graph."""
    monkeypatch.setattr("trait_assets.stage.TRAITS_PER_RUN", 4)
    traits = [f"t/{i}" for i in range(6)]
    for trait in traits:
        project.folder(trait)
    project.experiment("demo", prefill_only=True, steering=False)
    register(instance, traits)
    return traits


CHEAP = {
    "extraction_model": "embedded:smollm2-135m-instruct",
    "prefill_only": True,
    "steering": False,
    "layers": "10",
    "methods": ["mean_diff"],
    "scenario_limit": 12,
    "n_random": 20,
    "n_permutations": 0,
    "bootstrap": 100,
}


@dataclass
class Dev:
    """A running `dagster dev` with the experiment `cheap`, and its instance."""

    root: Path
    instance: dg.DagsterInstance
    env: dict[str, str]
    url: str

    def drop(self, *traits: str) -> None:
        """Copy shipped trait folders in, each complete at once, as a file manager moves them."""
        for trait in traits:
            target = self.root / "datasets" / trait
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(REPOSITORY / "datasets" / "traits" / trait, self.root / "incoming" / trait)
            (self.root / "incoming" / trait).rename(target)

    def edit(self, trait: str) -> None:
        """Another first scenario."""
        path = self.root / "datasets" / trait / "positive.txt"
        lines = path.read_text().split("\n")
        lines[0] = lines[1].replace("the", f"that {time.time_ns()}", 1)
        path.write_text("\n".join(lines))

    def traits(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`traits …` beside it, as a user types it."""
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "trait_assets.cli", *arguments],
            cwd=REPOSITORY,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def materialized(self, asset: str) -> set[str]:
        return self.instance.get_materialized_partitions(dg.AssetKey(["cheap", asset]))

    def ticks(self, name: str) -> list[InstigatorTick]:
        """The latest ticks of a sensor or schedule."""
        return [
            tick
            for state in self.instance.all_instigator_state()
            if state.instigator_name == name
            for tick in self.instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=5)
        ]

    def runs(self, **tags: str) -> list[dg.DagsterRun]:
        return list(
            self.instance.get_runs(dg.RunsFilter(tags={k.replace("__", "/"): v for k, v in tags.items()}))
        )

    def wait(self, until: Callable[[], Any], seconds: int) -> float:
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if until():
                return time.monotonic() - started
            time.sleep(1)
        raise AssertionError(f"not within {seconds} s; runs: {[r.status for r in self.instance.get_runs()]}")


@contextlib.contextmanager
def _dagster_dev(dev: ModuleType, root: Path, more: dict[str, str]) -> Iterator[Dev]:
    (root / "datasets").mkdir()
    (root / "experiments" / "cheap").mkdir(parents=True)
    (root / "experiments" / "cheap" / "config.yaml").write_text(yaml.safe_dump(CHEAP))
    env = dev.environment(root, **more)
    code = (
        "from trait_assets.launch import instance_folder, open_instance\n"
        "with open_instance(): print(instance_folder('ui'))"
    )
    home = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    with dev.serving(root, env, home) as url, dg.DagsterInstance.from_config(home) as instance:
        yield Dev(root, instance, env, url)


@pytest.fixture(scope="module")
def dagster_dev(
    tmp_path_factory: pytest.TempPathFactory, load_helper: Callable[[Path], ModuleType]
) -> Callable[..., contextlib.AbstractContextManager[Dev]]:
    """dagster_dev(TRAITS_SWEEP="…"): a `dagster dev` of its own with these variables, ended with the block."""
    dev = load_helper(REPOSITORY / "tests" / "dagster_dev.py")
    return lambda **more: _dagster_dev(dev, tmp_path_factory.mktemp("dev"), more)
