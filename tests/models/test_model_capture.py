"""Capture: pooled states and log-probabilities, the same alone and in any batch."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from resources.models.rows import CaptureRow, GenerationOptions, GenerationRow
from storage.errors import UserError
from storage.tensors import pack, unpack

POSITIONS = (
    "prompt[0]", "prompt[-1]", "prompt[:]", "response[0]", "response[-1]", "response[:]", "response[:3]",
    "response[-2:]", "all[:]", "all[2:-1]",
)  # fmt: skip


def ids(length: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(20, 240, length).tolist())


def rows(count: int = 9) -> list[CaptureRow]:
    """Mixed lengths; one without a response, one whose response ends in the padding token itself."""
    made = [CaptureRow(str(index), ids(3 + index * 5 % 17, index), ids(1 + index * 3 % 8, 50 + index))
            for index in range(count)]  # fmt: skip
    made.append(CaptureRow("no response", ids(6, 90)))
    made.append(CaptureRow("ends in padding", ids(6, 91), (30, 31, 0)))
    return made


@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "mixtral", "gemma2", "gemma3", "glm4", "gpt2", "gpt_neox"]
)
def test_pooled_states_are_means_of_the_plain_states(tiny: Any, plainly: Any, architecture: str) -> None:
    """Every position on rows of mixed lengths, in one batch, against one plain forward pass per row."""
    model = tiny.language_model(architecture)
    given = rows()
    found = {row.key: row for row in model.capture(given, POSITIONS)}
    assert set(found) == {row.key for row in given}
    for row in given:
        text = (*row.prompt_ids, *row.response_ids)
        stream = torch.stack(plainly.states(model, text))[1:].double().numpy()
        frames = {
            "prompt": stream[:, : len(row.prompt_ids)],
            "response": stream[:, len(row.prompt_ids) :],
            "all": stream,
        }
        for position in POSITIONS:
            frame, _, inside = position.partition("[")
            window = (
                eval(f"states[:, {inside}", {"states": frames[frame]}) if frames[frame].shape[1] else None
            )
            if window is None or window.size == 0:
                assert position in found[row.key].empty
                assert (position, "residual") not in found[row.key].pooled
                continue
            expected = window if window.ndim == 2 else window.mean(axis=1)
            got = found[row.key].pooled[position, "residual"]
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        norms = np.median(np.linalg.norm(stream[:, 1:], axis=-1), axis=1)
        np.testing.assert_allclose(found[row.key].norms, norms, rtol=1e-5)


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_batches_change_nothing(tiny: Any, limit: int) -> None:
    model = tiny.language_model("qwen3")
    given = rows()
    components = model.components
    whole = {row.key: row for row in model.capture(given, ["all[:]", "prompt[-1]"], components)}
    model.batcher.max_rows = limit
    for row in model.capture(given, ["all[:]", "prompt[-1]"], components):
        for name, value in row.pooled.items():
            np.testing.assert_allclose(value, whole[row.key].pooled[name], rtol=1e-5, atol=1e-5)


def test_a_row_of_one_token_has_no_norm(tiny: Any) -> None:
    row = next(tiny.language_model("llama").capture([CaptureRow("a", (30,))], ["prompt[:]", "response[:]"]))
    assert np.isnan(row.norms).all()
    assert row.empty == ("response[:]",)
    assert row.pooled["prompt[:]", "residual"].shape == (4, 32)


def test_chosen_layers_in_the_order_given(tiny: Any) -> None:
    """The blocks above the last wanted one do not run."""
    model = tiny.language_model("llama")
    whole = next(model.capture(rows(1), ["all[:]"], ("residual", "mlp_out")))
    model.anatomy.layers[3].forward = lambda *args, **kwargs: pytest.fail("the last block ran")
    some = next(model.capture(rows(1), ["all[:]"], ("residual", "mlp_out"), layers=[2, 0]))
    for component in ("residual", "mlp_out"):
        expected = whole.pooled["all[:]", component][[2, 0]]
        np.testing.assert_allclose(some.pooled["all[:]", component], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(some.norms, whole.norms[[2, 0]], rtol=1e-6)


def test_short_names_are_given_back_as_written(tiny: Any) -> None:
    row = next(tiny.language_model("llama").capture(rows(1), ["last", "prompt[-1]"]))
    np.testing.assert_array_equal(row.pooled["last", "residual"], row.pooled["prompt[-1]", "residual"])


def test_widths_of_projections(tiny: Any) -> None:
    model = tiny.language_model("llama")
    row = next(model.capture(rows(1), ["all[:]"], ("k_proj", "v_proj", "residual")))
    assert row.pooled["all[:]", "k_proj"].shape == (4, 16)
    assert row.pooled["all[:]", "v_proj"].shape == (4, 16)
    assert row.pooled["all[:]", "residual"].shape == (4, 32)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_states_while_generating_are_states_of_the_text(tiny: Any, architecture: str) -> None:
    """`response[i]` of the generated ids, against the states that the decode loop had."""
    model = tiny.language_model(architecture)
    seen: list[torch.Tensor] = []
    layer = model.anatomy.layers[2]
    handle = layer.register_forward_hook(
        lambda module, args, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    prompt = ids(11, 1)
    row = next(model.generate([GenerationRow("a", prompt)], GenerationOptions(max_new_tokens=9)))
    handle.remove()
    steps = [state[0, 0].numpy() for state in seen if state.shape[1] == 1]
    positions = ["prompt[-1]", *(f"response[{index}]" for index in range(8))]
    forced = next(model.capture([CaptureRow("a", prompt, row.ids)], positions, layers=[2])).pooled
    for step, position in zip(steps, positions, strict=True):
        np.testing.assert_allclose(step, forced[position, "residual"][0], rtol=1e-4, atol=1e-4)
    sliced = next(model.capture([CaptureRow("a", prompt, row.ids)], ["response[0:3]"], layers=[2])).pooled
    mean = np.mean(steps[1:4], axis=0)
    np.testing.assert_allclose(sliced["response[0:3]", "residual"][0], mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_left_right_and_no_padding_agree(tiny: Any, architecture: str) -> None:
    """Both ends of both frames on mixed lengths, against batches padded by hand on either side."""
    model = tiny.language_model(architecture)
    given = [CaptureRow(str(length), ids(length, length), ids(3, 60 + length)) for length in (4, 13, 20)]
    positions = {"prompt[0]": 0, "prompt[-1]": -4, "response[0]": -3, "response[-1]": -1}
    whole = {row.key: row.pooled for row in model.capture(given, list(positions), layers=[2])}
    for left in (True, False):
        tokens = torch.zeros((3, 23), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for index, row in enumerate(given):
            text = torch.tensor([*row.prompt_ids, *row.response_ids])
            start = 23 - len(text) if left else 0
            tokens[index, start : start + len(text)] = text
            mask[index, start : start + len(text)] = 1
        states: list[torch.Tensor] = []
        handle = model.anatomy.layers[2].register_forward_hook(
            lambda module, args, output, states=states: states.append(
                output if isinstance(output, torch.Tensor) else output[0]
            )
        )
        with torch.no_grad():
            steps = (mask.cumsum(1) - 1).clamp_min(0)
            model.anatomy.decoder(input_ids=tokens, attention_mask=mask, position_ids=steps, use_cache=False)
        handle.remove()
        for index, row in enumerate(given):
            real = states[0][index][mask[index].bool()].numpy()
            alone = next(model.capture([row], list(positions), layers=[2])).pooled
            for position, at in positions.items():
                for value in (whole[row.key], alone):
                    np.testing.assert_allclose(value[position, "residual"][0], real[at], rtol=1e-5, atol=1e-5)


def test_a_component_that_did_not_run_is_named(tiny: Any) -> None:
    """A class that skips a sub-layer gives an error with its name, not an empty vector."""
    model = tiny.language_model("llama")
    mlp = model.anatomy.layers[1].mlp
    model.anatomy.layers[1].mlp.__class__ = type(
        "Skipped", (type(mlp),), {"__call__": lambda self, *args, **kwargs: self.forward(*args, **kwargs)}
    )
    with pytest.raises(UserError, match="LlamaForCausalLM gave no mlp_out of layer 1"):
        list(model.capture(rows(2), ["all[:]"], ("mlp_out",)))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "gpt2"])
def test_logprobs_are_those_of_the_whole_model(tiny: Any, plainly: Any, architecture: str) -> None:
    """Soft-capped and scaled logits included, on mixed lengths in one batch."""
    model = tiny.language_model(architecture)
    given = [row for row in rows() if row.response_ids]
    found = dict(model.logprobs(given))
    for row in given:
        text = (*row.prompt_ids, *row.response_ids)
        logprob = torch.log_softmax(plainly.forward(model, text), dim=-1)
        start = len(row.prompt_ids)
        values = [float(logprob[start - 1 + index, token]) for index, token in enumerate(row.response_ids)]
        assert found[row.key] == pytest.approx(np.mean(values), abs=1e-4)


def test_overflow_names_the_layer_and_stops(tiny: Any) -> None:
    """float16 holds up to 65,504: a block that puts out more is found, with its number."""
    model = tiny.language_model("llama")
    block = model.anatomy.layers[2]
    original = block.forward
    block.forward = lambda *args, **kwargs: (original(*args, **kwargs) * 1e6).to(torch.float16).float()
    with pytest.raises(UserError, match="residual of layer 2 is not finite for row") as caught:
        list(model.capture(rows(3), ["response[:]"]))
    assert "bfloat16" in str(caught.value)


def test_an_infinite_padding_token_is_not_a_rows_fault(tiny: Any) -> None:
    """Only what a position selects counts; weight 0 times infinity must not become NaN."""
    model = tiny.language_model("llama")
    given = [CaptureRow("long", ids(9, 1), ids(4, 2)), CaptureRow("short", ids(4, 3), ids(2, 4))]
    expected = {
        row.key: row.pooled["response[:]", "residual"] for row in model.capture(given, ["response[:]"])
    }
    block = model.anatomy.layers[3]
    original = block.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = original(hidden_states, *args, **kwargs)
        if len(out) == 2:
            out[1, 6:] = torch.inf
        return out

    block.forward = forward
    for row in model.capture(given, ["response[:]"]):
        np.testing.assert_allclose(
            row.pooled["response[:]", "residual"], expected[row.key], rtol=1e-5, atol=1e-5
        )


def test_out_of_memory_halves_and_shorter_rows_grow_back(
    tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The budget is in bytes of the mode that failed: rows of a quarter of the length go four at a time again."""
    model = tiny.language_model("llama")
    given = [CaptureRow(str(index), ids(80, index)) for index in range(8)]
    expected = {row.key: row.pooled["all[:]", "residual"] for row in model.capture(given, ["all[:]"])}
    block = model.anatomy.layers[1]
    original = block.forward
    sizes: list[int] = []

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(hidden_states))
        if hidden_states.shape[0] * hidden_states.shape[1] > 400:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return original(hidden_states, *args, **kwargs)

    block.forward = forward
    found = {row.key: row.pooled["all[:]", "residual"] for row in model.capture(given, ["all[:]"])}
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5)
    assert sizes == [8, 4, 4]
    assert "Out of memory with 8 rows (mode=extraction); going on with 4" in capsys.readouterr().err
    assert set(model.batcher.budgets) == {"extraction"}
    sizes.clear()
    list(model.capture([CaptureRow(str(index), ids(20, index)) for index in range(12)], ["all[:]"]))
    assert max(sizes) > 4


def test_what_capture_holds_does_not_depend_on_the_text_length(tiny: Any) -> None:
    """O(batch × layers × hidden): ten times the tokens leave the held results the same."""
    model = tiny.language_model("llama")
    sizes = []
    for length in (20, 200):
        row = next(model.capture([CaptureRow("a", ids(length, 1))], ["all[:]"], model.components))
        sizes.append(sum(value.nbytes for value in row.pooled.values()))
        assert all(value.base is None or value.base.nbytes == value.nbytes for value in row.pooled.values())
    assert sizes[0] == sizes[1]


def test_capture_streams_and_memory_stays_level(tiny: Any) -> None:
    """Fifty batches: what Python holds after the last is what it held after the tenth."""
    model = tiny.language_model("llama")
    model.batcher.max_rows = 2
    given = [CaptureRow(str(index), ids(12, index)) for index in range(100)]
    done: list[tuple[int, int]] = []
    levels: list[int] = []
    tracemalloc.start()
    for index, _ in enumerate(
        model.capture(given, ["all[:]"], on_progress=lambda rows, tokens: done.append((rows, tokens)))
    ):
        if index % 20 == 19:
            levels.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert done[0] == (2, 24)
    assert done[-1] == (100, 1200)
    assert levels[-1] < levels[0] + 300_000


def test_lower_precision_comes_out_as_float32(tiny: Any) -> None:
    from resources.models.language_model import LanguageModel

    network = tiny.network("llama").to(torch.bfloat16)
    model = LanguageModel(network, tiny.byte_tokenizer(), tiny.identity("llama"))
    exact = tiny.language_model("llama")
    for low, high in zip(model.capture(rows(), ["all[:]"]), exact.capture(rows(), ["all[:]"]), strict=True):
        value, reference = low.pooled["all[:]", "residual"], high.pooled["all[:]", "residual"]
        assert value.dtype == np.float32
        assert np.linalg.norm(value - reference) / np.linalg.norm(reference) < 0.05
        packed = pack({"all": value}, {"dtype": "bfloat16"})
        np.testing.assert_array_equal(unpack(packed)[0]["all"], value)


@pytest.mark.slow
def test_a_million_tokens_stream_to_disk(tiny: Any, tmp_path: Path) -> None:
    """Five thousand rows of 200 tokens: what the process holds grows by less than what goes to disk."""
    model = tiny.language_model("llama")
    given = [CaptureRow(str(index), ids(150, index), ids(50, index + 1)) for index in range(5000)]
    process = psutil.Process()
    tokens = [0]
    levels: list[int] = []
    with (tmp_path / "states").open("wb") as target:
        for index, row in enumerate(
            model.capture(
                given,
                ["response[:]", "prompt[-1]"],
                model.components,
                on_progress=lambda done, seen: tokens.append(seen),
            )
        ):
            for value in row.pooled.values():
                target.write(value.tobytes())
            if index % 500 == 499:
                levels.append(process.memory_info().rss)
    assert tokens[-1] == 1_000_000
    written = (tmp_path / "states").stat().st_size
    assert written > 15_000_000
    assert max(levels) - levels[0] < written / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": []}, "no position was given"),
        ({"positions": ["response[:"]}, "closing bracket"),
        ({"components": ("heart",)}, "unknown component"),
        ({"components": ()}, "no layer or no component"),
        ({"layers": [4]}, "n_layers = 4"),
        ({"layers": []}, "no layer or no component"),
        ({"rows": [CaptureRow("a", ())]}, "row 'a': the prompt has no tokens"),
        ({"rows": [CaptureRow("a", (1,) * 200, (1,) * 57)]}, "do not fit the context of 256"),
        ({"rows": [CaptureRow("a", (1,)), CaptureRow("a", (2,))]}, "occurs twice"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    tiny: Any, change: dict[str, Any], message: str
) -> None:
    model = tiny.language_model("llama")
    model.anatomy.layers[0].forward = lambda *args, **kwargs: pytest.fail("a forward pass ran")
    request = {
        "rows": rows(2),
        "positions": ["all[:]"],
        "components": ("residual",),
        "layers": None,
        **change,
    }
    with pytest.raises(UserError, match=message):
        model.capture(request["rows"], request["positions"], request["components"], request["layers"])


def test_a_response_to_score_must_exist(tiny: Any) -> None:
    with pytest.raises(UserError, match="row 'a': there is no response"):
        tiny.language_model("llama").logprobs([CaptureRow("a", (5,))])


def test_preview_shows_real_tokens(tiny: Any) -> None:
    model = tiny.language_model("llama")
    encode = lambda text: model.encode(text, chat=False).ids  # noqa: E731
    row = CaptureRow("a", encode("count: 1"), encode("2 apples"))
    assert model.preview(row, "response[:3]") == ["2", " ", "a"]
    assert model.preview(row, "last") == ["1"]
