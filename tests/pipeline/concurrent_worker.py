"""One worker of a backfill: a Dagster run of its own per partition, on the shared instance and store.

Arguments: experiment, traits (comma-separated). Prints "ready", waits for a line, then prints a JSON report.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from trait_assets import launch, paths
    from trait_assets.experiments import load_experiment

    name, traits = sys.argv[1:]
    experiment = load_experiment(paths.experiments_root(), name)
    with launch.open_instance() as instance:
        launcher = launch.Launcher(instance, experiment)
        print("ready", flush=True)
        sys.stdin.readline()
        for trait in traits.split(","):
            launcher.launch([trait], ["scenarios"])
    report = launcher.report
    states = {t: s for stage in report.stages.values() for t, s in stage.states.items()}
    print(
        json.dumps(
            {
                "runs": report.runs,
                "states": states,
                "failures": report.failures,
                "behind": any(stage.index_behind for stage in report.stages.values()),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
