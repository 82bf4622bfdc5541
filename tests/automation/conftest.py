"""A project with trait folders whose stages do no work: what is left is the graph, its automation and its bookkeeping."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from storage.errors import UserError
from trait_assets.checks import CHECKS
from trait_assets.definitions import build_defs
from trait_assets.partitions import register
from trait_assets.pipeline import Check, Outcome, Plan, StageContext, stages_of
from trait_assets.stages import all_stages

# the numbers that real stages record
SUMMARY: dict[str, Any] = {
    "n_kept": 10,
    "n": 12,
    "positive_kept": 5,
    "negative_kept": 5,
    "contrast": 55.0,
    "n_positive": 12,
    "n_negative": 12,
    "mean_response_tokens": 20.0,
    "train_positive": 5,
    "train_negative": 5,
    "val_positive": 1,
    "val_negative": 1,
    "layers_captured": 30,
    "n_layers": 30,
    "layers": 30,
    "n_train_pos": 5,
    "n_train_neg": 5,
    "good_accuracy": 1,
    "traits": 1,
    "megabytes": 0.1,
    "model": "org/model",
    "methods": "mean_diff",
    "validated": True,
    "reason": "by the test",
}
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
                yield Outcome(one.trait, summary=dict(SUMMARY), checks=checks)

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
