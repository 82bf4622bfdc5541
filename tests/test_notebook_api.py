"""What a notebook uses: vectors with provenance, steering of a plain model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from storage import keys
from storage.errors import ArtifactError, UserError
from storage.workspace import Workspace
from trait_assets.api import load_vector, steered

TRAIT = "tonal/dry"


def _stored() -> Any:
    from importlib import util

    path = Path(__file__).parent / "vectors" / "stored_experiment.py"
    spec = util.spec_from_file_location("stored_experiment", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stored = _stored()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    w = Workspace(tmp_path / "experiments", tmp_path / "lineage.duckdb")
    stored.store_vectors(w, stored.vector_file(), stored.vector_file(method="probe", seed=1))
    return w


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return tf.LlamaForCausalLM(config).eval()


def _evaluate(w: Workspace) -> None:
    key = keys.extraction("demo", TRAIT, "evaluation", "evaluation.json")
    best = {"layer": 2, "method": "probe", "position": "response[:]", "component": "residual", "cv_auc": 0.9}
    stored.commit(w, "vector_evaluation", TRAIT, {key: {"best": best, "rows": [best]}})


def test_a_named_vector(workspace: Workspace) -> None:
    vector = load_vector(
        "demo",
        TRAIT,
        layer=3,
        method="probe",
        position="response[:]",
        component="residual",
        where=workspace,
    )
    np.testing.assert_array_equal(vector.direction, stored.vector_file(method="probe", seed=1).directions[3])
    assert (vector.layer, vector.chosen_by) == (3, "you")
    assert vector.current
    text = str(vector)
    assert "probe, layer 3" in text
    assert "vectors of tonal/dry in demo" in text


def test_what_is_not_named_is_chosen_by_evaluation_then_by_steering(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="nothing has chosen"):
        load_vector("demo", TRAIT, where=workspace)
    _evaluate(workspace)
    vector = load_vector("demo", TRAIT, where=workspace)
    assert (vector.vector.method, vector.layer, vector.chosen_by) == ("probe", 2, "cross-validation")
    assert vector.published["cv_auc"] == 0.9
    summary = {
        "validated": True,
        "best_layer": 4,
        "best_method": "mean_diff",
        "best_position": "response[:]",
        "best_component": "residual",
        "best_dose": 0.15,
        "change": 20.0,
    }
    stored.commit(workspace, "steering_results", TRAIT, {}, summary=summary)
    vector = load_vector("demo", TRAIT, where=workspace)
    assert (vector.vector.method, vector.layer, vector.chosen_by) == ("mean_diff", 4, "steering (validated)")
    assert (vector.published["dose"], vector.published["change"]) == (0.15, 20.0)
    named = load_vector("demo", TRAIT, layer=1, where=workspace)
    assert (named.layer, named.published) == (1, {})
    assert "but for what you named" in named.chosen_by


def test_a_damaged_or_absent_vector_is_refused(workspace: Workspace) -> None:
    place: dict[str, Any] = {"position": "response[:]", "component": "residual", "where": workspace}
    with pytest.raises(UserError, match="layer 9"):
        load_vector("demo", TRAIT, layer=9, method="probe", **place)
    with pytest.raises(UserError, match="no pca vectors"):
        load_vector("demo", TRAIT, layer=1, method="pca", **place)
    manifest = workspace.manifests.read("demo", "vectors", TRAIT)
    assert manifest is not None
    key = next(key for key in manifest.files if key.endswith("probe/vectors.safetensors"))
    data = workspace.store.read_bytes(key)
    workspace.store.write_bytes(key, data[:-9] + bytes([data[-9] ^ 255]) + data[-8:])
    with pytest.raises(ArtifactError, match="altered"):
        load_vector("demo", TRAIT, layer=1, method="probe", **place)


def _block_output(model: Any, layer: int, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    seen = []
    handle = model.model.layers[layer].register_forward_hook(
        lambda module, args, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.no_grad():
        model(ids, **more)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("positions", ["response", "all"])
def test_the_dose_is_added_where_it_is_said_to_be(model: Any, positions: Any) -> None:
    vector = stored.vector_file().vector(2)
    ids = torch.randint(1, 100, (2, 7))
    plain = _block_output(model, 2, ids)
    with steered(model, vector, 0.5, positions=positions):
        changed = _block_output(model, 2, ids)
    added = (changed - plain).numpy()
    expected = 0.5 * vector.median_norm * vector.direction
    first = 6 if positions == "response" else 0
    for token in range(7):
        np.testing.assert_allclose(
            added[:, token], np.tile(expected if token >= first else 0 * expected, (2, 1)), atol=1e-5
        )
    assert np.linalg.norm(added[0, -1]) == pytest.approx(0.5 * vector.median_norm, rel=1e-4)


def test_every_generated_token_is_steered_and_nothing_stays_behind(model: Any) -> None:
    vector = stored.vector_file().vector(3)
    ids = torch.randint(1, 100, (1, 5))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []

    def observe(into: list[torch.Tensor]) -> Any:
        return model.model.layers[3].register_forward_hook(
            lambda module, args, output: into.append(
                (output if isinstance(output, torch.Tensor) else output[0])[:, -1].clone()
            )
        )

    first = observe(before)
    with steered(model, vector, 5.0):
        second = observe(after)
        loud = model.generate(ids, **options)
        second.remove()
    first.remove()
    assert len(before) == len(after) == 8
    for raw, changed in zip(before, after, strict=True):
        np.testing.assert_allclose(
            (changed - raw)[0].numpy(), 5.0 * vector.median_norm * vector.direction, atol=1e-4
        )
    assert not torch.equal(plain, loud)
    assert torch.equal(model.generate(ids, **options), plain)
    with pytest.raises(RuntimeError, match="inside"), steered(model, vector, 5.0):
        raise RuntimeError("inside")
    assert torch.equal(model.generate(ids, **options), plain)
    with steered(model, vector, 0.0):
        assert torch.equal(model.generate(ids, **options), plain)
    with steered(model, vector, 0.3), steered(model, vector, -0.3):
        torch.testing.assert_close(_block_output(model, 3, ids), _before(model, 3, ids), atol=1e-5, rtol=1e-5)


def _before(model: Any, layer: int, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    return hidden[layer + 1]


def test_a_planted_direction_raises_its_token(model: Any) -> None:
    unembedding = model.lm_head.weight[42].detach().numpy()
    direction = (unembedding / np.linalg.norm(unembedding)).astype(np.float32)
    vector = replace(stored.vector_file().vector(4), direction=direction, median_norm=10.0)
    ids = torch.randint(1, 100, (1, 5))
    with torch.no_grad():
        plain = model(ids).logits[0, -1]
        with steered(model, vector, 2.0):
            up = model(ids).logits[0, -1]
        with steered(model, vector, -2.0):
            down = model(ids).logits[0, -1]
    assert up[42] > plain[42] > down[42]
    assert int(up.argmax()) == 42


def test_what_does_not_fit_is_refused(model: Any) -> None:
    vector = stored.vector_file().vector(2)
    bad = {
        "width 16": replace(vector, direction=vector.direction[:16]),
        "layer 77": replace(vector, layer=77),
        "no_such_site": replace(vector, component="no_such_site"),
        "median norm": replace(vector, median_norm=float("nan")),
    }
    for message, wrong in bad.items():
        with pytest.raises(UserError, match=message), steered(model, wrong, 0.1):
            pass
    with pytest.raises(UserError, match="dose"), steered(model, vector, float("nan")):
        pass
