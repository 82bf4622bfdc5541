"""The vectors stage over a workspace: files, currency, and failures that stay with their trait."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from storage.errors import UserError
from trait_assets.pipeline import run
from trait_assets.vectors.extraction import VectorsStage
from trait_assets.vectors.vector import load_vectors

ALL = ["mean_diff", "probe", "gradient", "random", "lda", "pca_diff", "mean_diff_tamed"]


def test_files_for_every_site_and_method(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=ALL)
    data = synthetic.planted(12, 32, layers=3)
    other = synthetic.planted(10, 16, layers=3, seed=4)
    # the cross product of positions and components is what the activations stage captures
    lab.put(
        "a/one",
        data,
        None,
        more_sites={
            ("prompt[-1]", "attn_out"): (other, None),
            ("prompt[-1]", "residual"): (data, None),
            ("response[:]", "attn_out"): (other, None),
        },
    )
    (result,) = run(VectorsStage(), lab.context, ["a/one"])
    assert result.state == "done", result.reason
    vectors = [key for key in result.manifest.files if key.endswith("vectors.safetensors")]
    assert len(vectors) == 4 * len(ALL)
    assert all(key.startswith("lab/extraction/a/one/vectors/") for key in vectors)
    file = load_vectors(lab.workspace, "lab", "a/one", "prompt[-1]", "attn_out", "probe")
    assert file.directions.shape == (3, 16)
    assert file.metadata["model"]["revision"] == "1"
    assert file.metadata["data_fingerprint"] == result.manifest.inputs["activations"]
    assert result.manifest.summary["n_train_pos"] == 10
    folder = next(
        k for k in result.manifest.files if "/residual/mean_diff/metadata.json" in k and "response" in k
    )
    record = lab.workspace.store.read_json(folder)
    assert record["layers"]["2"]["norm"] > 0
    assert record["position"] == "response[:]"


def test_vectors_are_memory_mapped(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path)
    lab.put("a/one", synthetic.planted(8, 32, layers=2), None)
    list(run(VectorsStage(), lab.context, ["a/one"]))
    file = load_vectors(lab.workspace, "lab", "a/one", "response[:]", "residual", "probe")
    base = file.directions
    while isinstance(base, np.ndarray) and base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap) or not file.directions.flags.writeable


def test_current_vectors_are_not_made_again_and_changed_options_are(
    synthetic: ModuleType, tmp_path: Path
) -> None:
    lab = synthetic.lab(tmp_path)
    lab.put("a/one", synthetic.planted(8, 32), None)
    assert [r.state for r in run(VectorsStage(), lab.context, ["a/one"])] == ["done"]
    assert [r.state for r in run(VectorsStage(), lab.context, ["a/one"])] == ["current"]
    other = synthetic.lab(tmp_path, methods=["lda"])
    assert [r.state for r in run(VectorsStage(), other.context, ["a/one"])] == ["done"]
    lab.put("a/one", synthetic.planted(8, 32), None)
    assert [r.state for r in run(VectorsStage(), other.context, ["a/one"])] == ["done"]


def test_a_bad_trait_fails_alone(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path)
    broken = synthetic.planted(8, 32)
    broken.x[3, 0, 5] = np.nan
    lab.put("a/good", synthetic.planted(8, 32), None)
    lab.put("a/nan", broken, None)
    lab.put("a/fine", synthetic.planted(8, 32, seed=2), None)
    results = {
        r.trait: r for r in run(VectorsStage(), lab.context, ["a/good", "a/nan", "a/fine", "a/absent"])
    }
    assert [results[t].state for t in ("a/good", "a/fine", "a/nan", "a/absent")] == [
        "done",
        "done",
        "failed",
        "failed",
    ]
    assert "not finite" in results["a/nan"].reason
    assert "materialise `activations` first" in results["a/absent"].reason
    # said in one line: these are the user's to mend, not defects
    assert results["a/nan"].detail is None


def test_an_unknown_method_is_refused_before_anything_is_read(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path, methods=["prob"])
    lab.put("a/one", synthetic.planted(8, 32), None)
    (result,) = run(VectorsStage(), lab.context, ["a/one"])
    assert result.state == "failed"
    assert "did you mean `probe`" in result.reason


def test_missing_vectors_say_what_to_run(synthetic: ModuleType, tmp_path: Path) -> None:
    lab = synthetic.lab(tmp_path)
    with pytest.raises(UserError, match="materialise `vectors`"):
        load_vectors(lab.workspace, "lab", "a/one", "response[:]", "residual", "probe")
