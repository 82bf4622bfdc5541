"""Three hundred short ticks of what the daemon evaluates, in one process; prints resident memory on the way.

Run by test_long_life.py. Every tenth tick has something to do: a folder is edited, read, reported and requested.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import dagster as dg
import psutil

from trait_assets import paths
from trait_assets.automation import build_folder_sensor, evaluate_sweep
from trait_assets.definitions import build_defs, default_resources, load_experiments
from trait_assets.launch import open_instance

TICKS = 300


def main() -> None:
    logging.disable(logging.CRITICAL)
    defs = build_defs()
    experiments = load_experiments(paths.experiments_root())[0]
    folder = Path(os.environ["TRAITS_DATASETS"]) / "t" / "a"
    seen: list[float] = []
    requested = 0
    with open_instance() as instance:
        sensor = build_folder_sensor()
        cursor, conditions = None, None
        for tick in range(TICKS):
            if tick % 10 == 0:
                (folder / "positive.txt").write_text("".join(f"I love {tick} {i}\n" for i in range(12)))
            context = dg.build_sensor_context(
                instance=instance, cursor=cursor, resources={"store": default_resources()["store"]}
            )
            result = sensor.evaluate_tick(context)
            cursor = result.cursor or cursor
            for request in result.dynamic_partitions_requests or []:
                instance.add_dynamic_partitions("traits", list(request.partition_keys))
            for event in result.asset_events:
                instance.report_runless_asset_event(event)
            evaluated = dg.evaluate_automation_conditions(defs, instance, cursor=conditions)
            conditions = evaluated.cursor
            requested += evaluated.total_requested
            if tick % 10 == 5:
                store = default_resources()["store"].open()
                evaluate_sweep(instance, store, experiments, logging.getLogger("sweep"))
            seen.append(psutil.Process().memory_info().rss / 1e6)
            if tick % 20 == 0:
                print(f"tick {tick}: {seen[-1]:.0f} MB", file=sys.stderr, flush=True)
    print(json.dumps({"megabytes": seen, "requested": requested}))


if __name__ == "__main__":
    main()
