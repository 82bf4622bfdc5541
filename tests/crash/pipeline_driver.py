"""Runs the whole pipeline of one experiment in a child process that may be killed at any moment.

Started once, it imports what is slow to import; each line on stdin, `{"root": …, "log": …}`, forks a
child that runs all stages on the workspace under `root`. The child's process id and then its exit code
are printed. Every row that is put into a cache or journal is written to `log` first, so that a row put
twice can be seen.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

STAGES_OVER_TRAITS = (
    "scenarios",
    "vetted_scenarios",
    "responses",
    "vetted_responses",
    "activations",
    "vectors",
    "vector_evaluation",
    "steering_results",
)
TABLES = ("extraction_evaluation", "steering_summary")


def watch(path: str) -> None:
    """Log what is put, by storage prefix and key, before it is put."""
    from storage.rows import RowCache, TensorJournal

    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(prefix: str, rows: Mapping[str, Any]) -> None:
        os.write(descriptor, (json.dumps([prefix, sorted(rows)]) + "\n").encode())

    for kind in (RowCache, TensorJournal):
        original = kind.put_many

        def put_many(self: Any, rows: Mapping[str, Any], original: Any = original) -> None:
            if rows:
                say(self._segments.prefix, rows)
            original(self, rows)

        kind.put_many = put_many  # type: ignore[method-assign]


def run(root: str, log: str) -> None:
    os.environ["TRAITS_EXPERIMENTS"] = f"{root}/experiments"
    os.environ["TRAITS_STATE"] = f"{root}/state"
    from storage.workspace import Workspace
    from trait_assets import paths, pipeline
    from trait_assets.definitions import default_resources
    from trait_assets.experiments import load_experiment
    from trait_assets.progress import LogProgress
    from trait_assets.stages import all_stages

    watch(log)
    resources = default_resources()
    quiet = logging.getLogger("quiet")
    ctx = pipeline.StageContext(
        experiment=load_experiment(paths.experiments_root(), "small"),
        workspace=Workspace(paths.results_root(), paths.lineage_path()),
        models=resources["models"],
        judges=resources["judges"],
        dataset_root=paths.dataset_root(),
        run_id="run",
        progress=LogProgress(quiet),
    )
    traits: list[Any] = list(ctx.experiment.traits or [])
    stages = all_stages()
    for name in (*STAGES_OVER_TRAITS, *TABLES):
        for result in pipeline.run(stages[name], ctx, [None] if name in TABLES else traits):
            if result.state == "failed":
                raise RuntimeError(f"{name} of {result.trait}: {result.reason}\n{result.detail}")


def main() -> None:
    # imported once, before any thread exists, so that a fork is safe and cheap
    import duckdb  # noqa: F401
    import gguf  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    import trait_assets.definitions  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(order["root"], order["log"])
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
