"""Which scenarios an experiment goes on with: the seeded subset, and of it what vetting kept.

Read by every stage after vetting, so that the choice is made in one place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from storage import keys
from trait_assets.scenarios.dataset import ScenarioSet

if TYPE_CHECKING:
    from trait_assets.pipeline import StageContext

Polarity = Literal["positive", "negative"]
POLARITIES: tuple[Polarity, Polarity] = ("positive", "negative")


@dataclass(frozen=True)
class ChosenScenario:
    """One scenario with its place: `index` counts rows of its side in the scenario set (0-based), `line` is the
    line of the source file, `pair` is the index it shares with its counterpart when the sides are paired."""

    polarity: Polarity
    index: int
    line: int
    prompt: str
    system_prompt: str | None
    pair: int | None

    @property
    def key(self) -> str:
        """Names the row within its trait, in every file: `positive:17`."""
        return f"{self.polarity}:{self.index}"


def read_scenario_set(ctx: StageContext, trait: str) -> ScenarioSet:
    return ScenarioSet.from_json(ctx.workspace.store.read_json(keys.scenario_set(trait)))


def subset(scenarios: ScenarioSet, limit: int | None, seed: int) -> list[ChosenScenario]:
    """The experiment's rows, positives first, in file order. With a limit, paired sides keep the same indices."""
    chosen: list[ChosenScenario] = []
    reduced = scenarios.subset(limit, seed) if limit is not None else scenarios
    for polarity in POLARITIES:
        place = {scenario.line: index for index, scenario in enumerate(scenarios.side(polarity))}
        for scenario in reduced.side(polarity):
            index = place[scenario.line]
            chosen.append(
                ChosenScenario(
                    polarity=polarity,
                    index=index,
                    line=scenario.line,
                    prompt=scenario.prompt,
                    system_prompt=scenario.system_prompt,
                    pair=index if scenarios.paired else None,
                )
            )
    return chosen


def kept_scenarios(ctx: StageContext, trait: str) -> list[ChosenScenario]:
    """The subset, less what scenario vetting failed or abstained on (nothing where that stage is skipped)."""
    rows = subset(read_scenario_set(ctx, trait), ctx.experiment.scenario_limit, ctx.experiment.seed)
    manifest = ctx.workspace.manifests.read(ctx.experiment.name, "vetted_scenarios", trait)
    if manifest is None or manifest.status == "skipped" or ctx.experiment.prefill_only:
        return rows
    scores = ctx.workspace.store.read_json(
        keys.extraction(ctx.experiment.name, trait, "vetting", "scenario_scores.json")
    )
    kept = set(scores["kept"])
    return [row for row in rows if row.key in kept]
