"""What a sweep brings up to date: for each experiment the traits that lack something, and the runs that mend it.

Levels, where the conditions in `automation.py` are edges: whatever is missing, failed, damaged or out of date now is found
here, however it came about. Reads manifests and is handed what Dagster knows; launches nothing and knows nothing of Dagster.
Results that were made with overrides on the command line count as they are: what they were made from decides, not whether
config.yaml would say the same today.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trait_assets.backfill import Backfill, plan
from trait_assets.partitions import contiguous_ranges
from trait_assets.pipeline import stages_of
from trait_assets.report.overview import status_rows

if TYPE_CHECKING:
    from storage.workspace import Workspace
    from trait_assets.experiments import Experiment

SETTLED = ("current", "skipped")


@dataclass(frozen=True)
class Need:
    """The first stage that a trait of an experiment lacks, and what is the matter with it."""

    trait: str
    stage: str
    state: str
    reason: str | None = None


def needs(
    workspace: Workspace,
    experiment: Experiment,
    dataset_root: Path,
    materialized: Mapping[str, Collection[str]],
) -> list[Need]:
    """The traits of the experiment that are not up to date, each with its first such stage.

    `materialized`: stage → traits that Dagster has a materialisation of. A result that Dagster has not heard of (its
    history is new) counts as missing: the run finds it current and reports it. Files are not hashed: a manifest whose
    file is altered counts as current here, and is found out by whoever reads it. A folder that cannot be used is left
    to the folder sensor, which names it.
    """
    stages = stages_of(experiment)
    found = []
    for row in status_rows(workspace, experiment, dataset_root, None, stages, verify_files=False):
        if row.get("problem"):
            continue
        trait = row["trait"]
        for stage in stages:
            entry = row["stages"][stage]
            if entry["state"] not in SETTLED:
                found.append(Need(trait, stage, entry["state"], entry["reason"]))
                break
            if trait not in materialized.get(stage, ()):
                found.append(Need(trait, stage, "missing", "Dagster has no record of it"))
                break
    return found


def backfills(
    experiment: Experiment, lacking: Iterable[Need], known: Sequence[str], per_run: int
) -> list[Backfill]:
    """Runs of neighbours, each from the stage that its traits lack to the last; a trait is in one of them.

    Traits that lack different stages are kept apart: one that fails again at an early stage would take the later stages
    of the others down with it, night after night.
    """
    stages = stages_of(experiment)
    by_stage: dict[str, list[str]] = {}
    for need in lacking:
        by_stage.setdefault(need.stage, []).append(need.trait)
    made: list[Backfill] = []
    for index, stage in enumerate(stages):
        runs = contiguous_ranges(known, by_stage.get(stage, ()), per_run)
        if runs:
            made += plan(experiment.name, stages[index:], runs, known, per_run)
    return made


def in_words(lacking: Sequence[Need]) -> str:
    """`3 traits: responses missing (2), vectors stale (1)`."""
    counts = Counter(f"{need.stage} {need.state}" for need in lacking)
    what = ", ".join(f"{text} ({n})" for text, n in sorted(counts.items()))
    return f"{len(lacking)} trait{'s' if len(lacking) != 1 else ''}: {what}"
