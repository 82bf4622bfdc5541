"""Every architecture: which sites are found, and that their values are what their names say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resources.models.anatomy import COMPONENTS, dissect, first_tensor, hooks, with_first_tensor
from resources.models.rows import CaptureRow
from storage.errors import UserError

PROMPT = (1, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58)
ALL = [
    "llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3",
    "gemma3_multimodal", "olmo2", "glm4", "granite", "phi", "phi3", "gpt2", "gpt_neox",
]  # fmt: skip


@pytest.fixture(params=ALL)
def model(request: pytest.FixtureRequest, tiny: Any) -> Any:
    return tiny.language_model(request.param)


def per_token(model: Any, component: str) -> np.ndarray:
    """[n_layers, tokens, width] by capturing every token for itself."""
    positions = [f"all[{index}]" for index in range(len(PROMPT))]
    row = next(model.capture([CaptureRow("a", PROMPT)], positions, (component,)))
    return np.stack([row.pooled[position, component] for position in positions], axis=1)


def test_every_architecture_is_tried(tiny: Any) -> None:
    assert set(ALL) == set(tiny.ARCHITECTURES)


def test_residual_is_hidden_states(model: Any) -> None:
    """Entry k + 1 of hidden_states is block k's output; the last entry is after the final norm and is not."""
    captured = per_token(model, "residual")
    with torch.no_grad():
        hidden = model.causal(input_ids=torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
    assert len(hidden) == model.n_layers + 1
    for layer in range(model.n_layers - 1):
        np.testing.assert_allclose(captured[layer], hidden[layer + 1][0].numpy(), rtol=1e-5, atol=1e-5)
    normed = hidden[-1][0].numpy()
    assert np.abs(captured[-1] - normed).max() > 0.1


def test_last_layer_is_what_the_final_norm_receives(model: Any) -> None:
    received: list[torch.Tensor] = []
    decoder = model.anatomy.decoder
    norms = [module for name, module in decoder.named_children() if "norm" in name or name == "ln_f"]
    assert len(norms) == 1
    handle = norms[0].register_forward_pre_hook(lambda module, args: received.append(args[0][0]))
    with torch.no_grad():
        model.causal(input_ids=torch.tensor([PROMPT]))
    handle.remove()
    np.testing.assert_allclose(per_token(model, "residual")[-1], received[0].numpy(), rtol=1e-5, atol=1e-5)


def test_contributions_add_up(model: Any, plainly: Any) -> None:
    """Residual out − residual in = attn_contribution + mlp_contribution, for every layer and token."""
    stream = torch.stack(plainly.states(model, PROMPT)).numpy()
    step = stream[1:] - stream[:-1]
    total = per_token(model, "attn_contribution") + per_token(model, "mlp_contribution")
    np.testing.assert_allclose(total, step, rtol=1e-4, atol=1e-4)


def test_post_norms_and_multipliers_are_in_the_contribution(model: Any, tiny: Any) -> None:
    name = model.identity.model.removeprefix("tiny/")
    for part in ("attn", "mlp"):
        raw, added = per_token(model, f"{part}_out"), per_token(model, f"{part}_contribution")
        if name in ("gemma2", "gemma3", "gemma3_multimodal", "olmo2", "glm4"):
            assert np.abs(raw - added).max() > 0.05
        elif name == "granite":
            np.testing.assert_allclose(added, 0.22 * raw, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(raw, added)


def test_values_are_what_the_cache_holds(model: Any) -> None:
    """v_proj is compared with the cache for all tokens, also where it is a part of a fused projection."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model.anatomy.decoder(input_ids=torch.tensor([PROMPT]), cache=cache, use_cache=True)
    captured = per_token(model, "v_proj")
    for layer in range(model.n_layers):
        values = cache.layers[layer].values[0].transpose(0, 1).reshape(len(PROMPT), -1)
        np.testing.assert_allclose(captured[layer], values.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_keys_of_fused_projections(tiny: Any, name: str) -> None:
    """Columns as the architectures document them: query, key, value one after the other."""
    model = tiny.language_model(name)
    query, width = 32, {"gpt2": 32, "phi3": 16}[name]
    site = model.anatomy.site("k_proj", 1)
    assert site.columns.tolist() == list(range(query, query + width))
    assert model.anatomy.site("v_proj", 1).columns.tolist() == list(range(query + width, query + 2 * width))


def test_neox_keys_are_interleaved_by_head(tiny: Any) -> None:
    columns = tiny.language_model("gpt_neox").anatomy.site("k_proj", 0).columns.tolist()
    assert columns == [head * 24 + 8 + place for head in range(4) for place in range(8)]


def test_multimodal_wrapper_gives_its_text_decoder(tiny: Any) -> None:
    """The vision tower has as many blocks of the same width; they are not the decoder's."""
    model = tiny.language_model("gemma3_multimodal")
    assert all("Gemma3DecoderLayer" in type(layer).__name__ for layer in model.anatomy.layers)
    assert model.hidden_size == tiny.HIDDEN


class Block(nn.Module):
    """Adds a constant, and returns its output in the container it is told to use."""

    def __init__(self, constant: float, container: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(constant))
        self.container = container

    def forward(self, hidden_states: torch.Tensor) -> Any:
        out = hidden_states + self.weight
        if self.container == "tensor":
            return out
        if self.container == "tuple":
            return (out,)
        if self.container == "tuple with cache":
            return (out, "cache")
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=out)


@pytest.mark.parametrize("container", ["tensor", "tuple", "tuple with cache", "model output"])
def test_block_outputs_of_every_kind_are_read_and_written(container: str) -> None:
    block = Block(1.0, container)
    given = torch.zeros(1, 2, 3)
    output = block(given)
    assert torch.equal(first_tensor(output), given + 1)
    changed = with_first_tensor(output, given + 5)
    assert type(changed) is type(output)
    assert torch.equal(first_tensor(changed), given + 5)
    if container == "tuple with cache":
        assert changed[1] == "cache"
    with hooks([(block, lambda module, args, output: with_first_tensor(output, given + 7))]):
        assert torch.equal(first_tensor(block(given)), given + 7)
    assert torch.equal(first_tensor(block(given)), given + 1)


def test_layer_k_is_block_k(tiny: Any) -> None:
    """Blocks that add k + 1 give cumulative sums: layer 0 is the first block, not the embedding."""
    model = tiny.language_model("llama")
    for index, layer in enumerate(model.anatomy.layers):
        layer.forward = lambda hidden_states, *args, index=index, **kwargs: hidden_states + (index + 1)
    embedded = model.anatomy.decoder.embed_tokens(torch.tensor(PROMPT)).detach().numpy()
    captured = per_token(model, "residual")
    for layer, total in enumerate((1, 3, 6, 10)):
        np.testing.assert_allclose(captured[layer], embedded + total, rtol=1e-5, atol=1e-5)


def test_missing_component_is_named(tiny: Any) -> None:
    model = tiny.network("llama")
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    anatomy = dissect(model)
    assert "mlp_out" not in anatomy.components
    with pytest.raises(UserError, match="LlamaForCausalLM has no mlp_out: layer 0"):
        anatomy.require("mlp_out")
    with pytest.raises(UserError, match="no attn_contribution"):
        anatomy.require("attn_contribution")


def test_unknown_component_and_layer_are_errors(tiny: Any) -> None:
    anatomy = tiny.language_model("llama").anatomy
    with pytest.raises(UserError, match="unknown component 'resid'"):
        anatomy.require("resid")
    with pytest.raises(UserError, match="n_layers = 4"):
        anatomy.site("residual", 4)


def test_a_broken_residual_stream_offers_no_contribution(tiny: Any) -> None:
    """A block that scales its input is caught by the numbers, not by its name."""
    model = tiny.network("llama")
    layer = model.model.layers[2]
    original = layer.forward
    layer.forward = lambda hidden_states, *args, **kwargs: original(hidden_states, *args, **kwargs) * 1.5
    anatomy = dissect(model)
    assert "attn_contribution" not in anatomy.components
    assert "layer 2" in anatomy.absent["attn_contribution"]
    assert "residual" in anatomy.components


def test_sites_survive_lower_precision(tiny: Any) -> None:
    for name in ("gemma2", "granite", "llama"):
        anatomy = dissect(tiny.network(name).to(torch.bfloat16))
        assert anatomy.components == COMPONENTS


def test_write_is_the_inverse_of_read(tiny: Any) -> None:
    for name, component in (("granite", "mlp_contribution"), ("gpt2", "v_proj"), ("llama", "residual")):
        site = tiny.language_model(name).anatomy.site(component, 1)
        width = site.width if site.columns is None else 96
        output = torch.randn(2, 3, width)
        wanted = torch.randn(2, 3, site.width)
        torch.testing.assert_close(site.read(site.write(output, wanted)), wanted)


def test_layers_outside_a_plain_decoder_are_refused(tiny: Any) -> None:
    model = tiny.network("llama")
    model.config.num_hidden_layers = 3
    with pytest.raises(UserError, match="cannot tell the 3 decoder blocks"):
        dissect(model)
