"""A batch in which one trait fails: the others get their later stages at the next tick, the bad one waits for the sweep."""

import datetime as dt

import dagster as dg

from trait_assets.automation import keep_fresh

traits = dg.DynamicPartitionsDefinition(name="traits")
BATCH = dg.BackfillPolicy.multi_run(16)
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
bad = {"t/bad"}


@dg.asset(partitions_def=traits, backfill_policy=BATCH)
def scenarios(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    return dg.MaterializeResult()


@dg.asset(partitions_def=traits, backfill_policy=BATCH, deps=[scenarios], automation_condition=keep_fresh())
def responses(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    # what run_stage does when some traits of a batch fail
    keys = list(context.partition_keys)
    if bad & set(keys):
        for key in set(keys) - bad:
            context.log_event(
                dg.AssetMaterialization(context.asset_key, partition=key, tags={"dagster/data_version": "1"})
            )
        raise dg.Failure("t/bad failed", allow_retries=False)
    return dg.MaterializeResult()


@dg.asset(partitions_def=traits, backfill_policy=BATCH, deps=[responses], automation_condition=keep_fresh())
def vectors(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    return dg.MaterializeResult()


def test_the_survivors_of_a_batch_go_on_at_the_next_tick():
    defs = dg.Definitions([scenarios, responses, vectors], executor=dg.in_process_executor)
    job = defs.resolve_implicit_global_asset_job_def()
    instance = dg.DagsterInstance.ephemeral()
    now = dt.datetime(2026, 1, 1, 0, 5, tzinfo=dt.UTC)
    cursor = dg.evaluate_automation_conditions(defs, instance, evaluation_time=now).cursor
    names = ["t/a", "t/bad", "t/c"]
    instance.add_dynamic_partitions("traits", names)
    for name in names:
        instance.report_runless_asset_event(
            dg.AssetMaterialization("scenarios", partition=name, tags={"dagster/data_version": "1"})
        )

    def tick() -> dict[str, set[str | None]]:
        nonlocal cursor, now
        now += dt.timedelta(minutes=1)
        result = dg.evaluate_automation_conditions(defs, instance, cursor=cursor, evaluation_time=now)
        cursor = result.cursor
        return {
            name: set(result.get_requested_partitions(dg.AssetKey(name))) for name in ("responses", "vectors")
        }

    assert tick() == {"responses": set(names), "vectors": set(names)}
    # the run takes longer than a tick
    assert tick() == {"responses": set(), "vectors": set()}
    run = job.execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey("responses"), dg.AssetKey("vectors")],
        tags={"dagster/asset_partition_range_start": "t/a", "dagster/asset_partition_range_end": "t/c"},
        raise_on_error=False,
        run_config=QUIET,
    )
    assert not run.success
    assert instance.get_materialized_partitions(dg.AssetKey("responses")) == {"t/a", "t/c"}
    assert instance.get_materialized_partitions(dg.AssetKey("vectors")) == set()

    assert tick() == {"responses": set(), "vectors": {"t/a", "t/c"}}
    for name in ("t/a", "t/c"):
        job.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey("vectors")], partition_key=name, run_config=QUIET
        )
    assert [tick() for _ in range(5)] == [{"responses": set(), "vectors": set()}] * 5
