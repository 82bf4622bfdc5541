"""`keep_fresh` and `refresh_table` by simulated ticks: what they ask for, and what they never ask for."""

import datetime as dt

import dagster as dg
import pytest

from trait_assets.automation import keep_fresh, refresh_table

traits = dg.DynamicPartitionsDefinition(name="traits")


class World:
    """A small graph of the platform's shape (source → two trait stages → table) and a clock."""

    def __init__(self) -> None:
        self.instance = dg.DagsterInstance.ephemeral()
        self.broken: set[str] = set()
        self.cursor = None
        self.now = dt.datetime(2026, 1, 1, 0, 5, tzinfo=dt.UTC)
        self.versions: dict[str, int] = {}
        broken = self.broken

        @dg.asset(partitions_def=traits)
        def scenarios(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            return dg.MaterializeResult()

        @dg.asset(partitions_def=traits, deps=[scenarios], automation_condition=keep_fresh())
        def responses(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            if context.partition_key in broken:
                raise dg.Failure("broken")
            return dg.MaterializeResult()

        @dg.asset(partitions_def=traits, deps=[responses], automation_condition=keep_fresh())
        def vectors(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            return dg.MaterializeResult()

        @dg.asset(deps=[vectors], automation_condition=refresh_table())
        def table(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            return dg.MaterializeResult()

        self.defs = dg.Definitions([scenarios, responses, vectors, table], executor=dg.in_process_executor)
        self.job = self.defs.resolve_implicit_global_asset_job_def()

    def folder(self, trait: str, version: int) -> None:
        """What the folder sensor does for a new or changed trait."""
        self.instance.add_dynamic_partitions("traits", [trait])
        self.instance.report_runless_asset_event(
            dg.AssetMaterialization("scenarios", partition=trait, tags={"dagster/data_version": str(version)})
        )

    def tick(self, minutes: int = 1) -> dict[str, set[str | None]]:
        """One evaluation, and the runs it asks for. Returns asset → requested traits."""
        self.now += dt.timedelta(minutes=minutes)
        result = dg.evaluate_automation_conditions(
            self.defs, self.instance, cursor=self.cursor, evaluation_time=self.now
        )
        self.cursor = result.cursor
        asked: dict[str, set[str | None]] = {}
        for name in ("responses", "vectors", "table"):
            keys = result.get_requested_partitions(dg.AssetKey(name))
            if keys:
                asked[name] = set(keys)
        wanted = sorted({k for keys in asked.values() for k in keys if k is not None})
        for trait in wanted:
            self.job.execute_in_process(
                instance=self.instance,
                partition_key=trait,
                asset_selection=[
                    dg.AssetKey(name) for name in ("responses", "vectors") if trait in asked.get(name, set())
                ],
                raise_on_error=False,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
        if "table" in asked:
            self.job.execute_in_process(
                instance=self.instance,
                asset_selection=[dg.AssetKey("table")],
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
        return asked


@pytest.fixture
def world() -> World:
    world = World()
    world.tick()
    return world


def test_a_new_trait_is_asked_for_once_with_all_its_stages(world):
    world.folder("t/a", 1)
    assert world.tick() == {"responses": {"t/a"}, "vectors": {"t/a"}}
    later = [world.tick() for _ in range(5)]
    assert {"table": {None}} in later
    assert sum(bool(asked) for asked in later) == 1


def test_the_same_content_reported_again_asks_for_nothing(world):
    world.folder("t/a", 1)
    for _ in range(4):
        world.tick()
    world.folder("t/a", 1)
    assert [world.tick() for _ in range(4)] == [{}] * 4


def test_an_edit_asks_for_that_trait_alone(world):
    for trait in ("t/a", "t/b", "t/c"):
        world.folder(trait, 1)
    for _ in range(4):
        world.tick()
    world.folder("t/b", 2)
    asked = world.tick()
    assert asked["responses"] == {"t/b"}
    assert asked.get("vectors", {"t/b"}) == {"t/b"}


def test_a_permanent_failure_is_asked_for_once_over_120_ticks(world):
    """What is left of it is the nightly sweep's."""
    world.folder("t/good", 1)
    world.folder("t/bad", 1)
    world.broken.add("t/bad")
    tries = sum("t/bad" in world.tick(minutes=15).get("responses", set()) for _ in range(120))
    assert tries == 1
    assert world.instance.get_materialized_partitions(dg.AssetKey("vectors")) == {"t/good"}


def test_an_edit_of_a_trait_that_failed_asks_for_it_again(world):
    world.folder("t/a", 1)
    world.broken.add("t/a")
    world.tick()
    world.broken.clear()
    assert [world.tick() for _ in range(3)] == [{}] * 3
    world.folder("t/a", 2)
    asked = [world.tick() for _ in range(4)]
    assert sum("t/a" in a.get("responses", set()) for a in asked) == 1
    assert world.instance.get_materialized_partitions(dg.AssetKey("vectors")) == {"t/a"}
