"""Runs the steering stage on the embedded model until it is done or killed: python killed_run.py ROOT TESTS
ROWS [MEMORY].

ROWS: most rows per batch. MEMORY: with more rows than this the model's forward runs out of memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

WIDTH, LAYERS = 576, 30
OPTIONS: dict[str, Any] = {
    "extraction_model": "embedded:smollm2-135m-instruct",
    "steer": {
        "questions": 8,
        "max_new_tokens": 10,
        "temperature": 0.0,
        "doses": [0.15, 0.3],
        "refine_steps": 1,
        "refine_top": 2,
        "layers": "10,17",
        "max_candidates": 3,
        "controls": 2,
        "coherence_threshold": 40,
        "bootstrap": 200,
    },
}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"killed_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def prepared(root: Path, tests: Path, max_batch_rows: int) -> Any:
    """A context with stored inputs, made once per root."""
    from resources.models.resource import ModelResource

    steered = load(tests / "steering" / "steered_experiment.py")
    stored = load(tests / "vectors" / "stored_experiment.py")
    resource = ModelResource(max_batch_rows=max_batch_rows)
    model = resource.get(resource.spec(OPTIONS["extraction_model"]))
    ctx, models, _ = steered.context(root, model, **OPTIONS)
    if ctx.workspace.manifests.read(steered.EXPERIMENT, "vectors", steered.TRAIT) is None:
        u = np.random.default_rng(1).standard_normal(WIDTH)
        u = (u / np.linalg.norm(u)).astype(np.float32)
        steered.store_inputs(ctx.workspace, stored.commit, u, n_layers=LAYERS, model=model.identity.record())
    return ctx, models, steered.TRAIT


def short_of_memory(network: Any, rows: int) -> list[int]:
    """Lets forward fail above so many rows; returns the list of the sizes that failed."""
    import torch

    real, failed = network.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("input_ids", args[0] if args else None)
        if given is not None and len(given) > rows:
            failed.append(len(given))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(*args, **kwargs)

    network.forward = forward
    return failed


def main() -> None:
    from trait_assets import pipeline
    from trait_assets.steering.evaluation import SteeringStage

    root, tests, rows = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    ctx, models, trait = prepared(root, tests, rows)
    failed = short_of_memory(models.model.model, int(sys.argv[4])) if len(sys.argv) > 4 else []
    (result,) = pipeline.run(SteeringStage(), ctx, [trait])
    print(result.state, result.reason or "", len(failed), sum(models.rows), flush=True)


if __name__ == "__main__":
    main()
