"""Generation and steering: every row as if it were alone, whatever batch it is in."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from resources.models import kv_cache
from resources.models.batching import OutOfMemory
from resources.models.generation import sample
from resources.models.rows import CaptureRow, GenerationOptions, GenerationRow, Intervention
from storage.errors import UserError

STEPS = 12
GREEDY = GenerationOptions(max_new_tokens=STEPS)
ARCHITECTURES = [
    "llama", "qwen3", "mistral", "mixtral", "gemma2", "gemma3", "gemma3_multimodal", "olmo2", "glm4",
    "granite", "phi", "phi3", "gpt2", "gpt_neox",
]  # fmt: skip


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return (1, *np.random.default_rng(seed).integers(20, 240, length - 1).tolist())


def rows_of_all_kinds(unit: Callable[[int, int], np.ndarray]) -> list[GenerationRow]:
    """Two prompts shared by several rows, other lengths (one token included), and every operation."""
    add = Intervention
    long, short = prompt(17, seed=1), prompt(5, seed=2)
    return [
        GenerationRow("plain long", long),
        GenerationRow("add", long, (Intervention(1, unit(1, 32), 4.0),)),
        GenerationRow("two layers", long, (add(0, unit(2, 32), 2.0), add(2, unit(3, 32), -3.0))),
        GenerationRow("same layer twice", short, (add(1, unit(4, 32), 2.0), add(1, unit(5, 32), 1.0))),
        GenerationRow("ablate", short, (Intervention(2, unit(1, 32), 0.0, "ablate"),)),
        GenerationRow("clamp", prompt(9, seed=3), (Intervention(1, unit(6, 32), 3.0, "clamp"),)),
        GenerationRow("norm kept", prompt(9, seed=4), (add(3, unit(7, 32), 5.0, "add_norm_preserving"),)),
        GenerationRow("mixed order", short, (add(1, unit(1, 32), 2.0), add(1, unit(1, 32), 0, "ablate"))),
        GenerationRow("one token", (1,), (Intervention(0, unit(8, 32), 1.0),)),
        GenerationRow("mlp", prompt(12, seed=5), (Intervention(2, unit(9, 32), 2.0, component="mlp_out"),)),
    ]  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("steer_from", ["response", "all"])
def test_steered_batch_is_each_row_alone(tiny: Any, plainly: Any, architecture: str, steer_from: Any) -> None:
    """Against a loop without cache, batch or padding; sequences are longer than the sliding windows of 8."""
    model = tiny.language_model(architecture)
    rows = rows_of_all_kinds(plainly.unit)
    seen = plainly.Logits()
    model.batcher.max_rows = 6
    done = {row.key: row for row in model.generate(rows, GREEDY, steer_from=steer_from, observe=seen)}
    assert set(done) == {row.key for row in rows}
    for row in rows:
        ids, logits = plainly.steered_logits(model, row, STEPS, steer_from=steer_from)
        assert done[row.key].ids == tuple(ids)
        torch.testing.assert_close(seen.of(row.key, STEPS), torch.stack(logits), rtol=1e-4, atol=1e-4)


def test_every_split_gives_the_same(tiny: Any, plainly: Any) -> None:
    model = tiny.language_model("gemma3")
    rows = rows_of_all_kinds(plainly.unit)
    whole = plainly.Logits()
    list(model.generate(rows, GREEDY, observe=whole))
    for cut in range(1, len(rows)):
        parts = plainly.Logits()
        list(model.generate(rows[:cut], GREEDY, observe=parts))
        list(model.generate(rows[cut:], GREEDY, observe=parts))
        for row in rows:
            torch.testing.assert_close(
                parts.of(row.key, STEPS), whole.of(row.key, STEPS), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_rows_that_join_and_leave_change_nothing(
    tiny: Any, plainly: Any, architecture: str, limit: int
) -> None:
    """Rows end at different times (a stop token that some say early), so that others take their places."""
    model = tiny.language_model(architecture)
    rows = [GenerationRow(str(index), prompt(3 + index * 2 % 23, seed=index)) for index in range(14)]
    expected = {row.key: plainly.steered_logits(model, row, 20)[0] for row in rows}
    counts = np.bincount([token for ids in expected.values() for token in ids], minlength=tiny.VOCABULARY)
    stop = int(counts.argmax())
    model.set_stops(frozenset({stop}))
    model.batcher.max_rows = limit
    ends = set()
    for row in model.generate(rows, GenerationOptions(max_new_tokens=20)):
        wanted = expected[row.key]
        if stop in wanted:
            assert row.finish_reason == "stop"
            assert row.ids == tuple(wanted[: wanted.index(stop)])
        else:
            assert row.finish_reason == "length"
            assert row.ids == tuple(wanted)
        ends.add(len(row.ids))
    assert len(ends) > 2


def test_first_generated_token_is_steered(tiny: Any, plainly: Any) -> None:
    """A vector that stands for token B at the last layer makes B the very first token."""
    model = tiny.language_model("llama")
    target = 77
    row = model.causal.get_output_embeddings().weight[target].detach().numpy()
    scale = model.anatomy.decoder.norm.weight.detach().numpy()
    vector = row * scale / np.linalg.norm(row * scale)
    steered = GenerationRow("b", prompt(6), (Intervention(3, vector, 1000.0),))
    plain = GenerationRow("a", prompt(6))
    found = {
        entry.key: entry for entry in model.generate([plain, steered], GenerationOptions(max_new_tokens=3))
    }
    scores = plainly.Logits()
    list(model.generate([steered], GenerationOptions(max_new_tokens=1), observe=scores))
    assert int(scores.of("b", 1)[0].argmax()) == found["b"].ids[0] == target
    assert found["a"].ids[0] != target
    before = plainly.Logits()
    list(model.generate([plain], GenerationOptions(max_new_tokens=1), observe=before))
    rise = scores.of("b", 1)[0][target] - before.of("a", 1)[0][target]
    assert float(rise) > 5


def test_the_vector_is_added_once(tiny: Any, plainly: Any) -> None:
    """The steered block's output moves by exactly the coefficient times the vector, in the first step."""
    model = tiny.language_model("llama")
    vector = plainly.unit(1, 32)
    outputs: dict[str, list[torch.Tensor]] = {"plain": [], "steered": []}
    for name, interventions in (("plain", ()), ("steered", (Intervention(3, vector, 2.5),))):
        handle = model.anatomy.decoder.norm.register_forward_pre_hook(
            lambda module, args, name=name: outputs[name].append(args[0][:, -1].clone())
        )
        list(
            model.generate(
                [GenerationRow("a", prompt(5), interventions)], GenerationOptions(max_new_tokens=1)
            )
        )
        handle.remove()
    moved = outputs["steered"][-1][0] - outputs["plain"][-1][0]
    np.testing.assert_allclose(moved.numpy(), 2.5 * vector, atol=1e-5)


def test_a_block_of_zeros_moves_by_the_vector_alone(tiny: Any, plainly: Any) -> None:
    """Out − in of a block that adds nothing is the coefficient times the vector: from the last prompt token
    on, at every cached step, and no more than once after an exception in the middle of another run."""
    model = tiny.language_model("llama")
    block = model.anatomy.layers[2]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    vector = plainly.unit(1, 32)
    rows = [GenerationRow("a", prompt(6), (Intervention(2, vector, 2.5),)), GenerationRow("b", prompt(6))]
    moved: list[np.ndarray] = []

    def entering(module: Any, args: Any, kwargs: Any) -> None:
        moved.append(-(args[0] if args else kwargs["hidden_states"]).numpy())

    def leaving(module: Any, args: Any, kwargs: Any) -> None:
        moved[-1] = moved[-1] + (args[0] if args else kwargs["hidden_states"]).numpy()

    above = model.anatomy.layers[3]
    original = above.forward
    above.forward = lambda *args, **kwargs: (_ for _ in ()).throw(ArithmeticError("in the middle"))
    with pytest.raises(ArithmeticError):
        list(model.generate(rows, GREEDY, steer_from="all"))
    above.forward = original
    handles = [
        block.register_forward_pre_hook(entering, with_kwargs=True),
        above.register_forward_pre_hook(leaving, with_kwargs=True),
    ]
    list(model.generate(rows, GREEDY))
    for handle in handles:
        handle.remove()
    prefix, *steps = moved
    np.testing.assert_array_equal(prefix, 0)
    assert len(steps) == STEPS
    for step in steps:
        np.testing.assert_allclose(step[0, 0], 2.5 * vector, atol=1e-5)
        np.testing.assert_array_equal(step[1], 0)


def hook_count(model: Any) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.causal.modules()
    )


def test_no_hook_is_left_behind(tiny: Any, plainly: Any) -> None:
    """After a normal end, an abandoned generator, and an exception in the middle of a forward pass."""
    model = tiny.language_model("llama")
    before = hook_count(model)
    rows = rows_of_all_kinds(plainly.unit)
    list(model.generate(rows, GREEDY))
    assert hook_count(model) == before
    stream = model.generate(rows, GREEDY)
    next(stream)
    assert hook_count(model) == before
    stream.close()
    assert hook_count(model) == before
    original = model.anatomy.layers[3].forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ArithmeticError("in the middle")

    model.anatomy.layers[3].forward = fail
    with pytest.raises(ArithmeticError):
        list(model.generate(rows, GREEDY))
    with pytest.raises(ArithmeticError):
        list(model.capture([CaptureRow("a", prompt(5))], ["prompt[:]"]))
    assert hook_count(model) == before
    model.anatomy.layers[3].forward = original
    plain = plainly.Logits()
    list(model.generate([GenerationRow("a", prompt(5))], GREEDY, observe=plain))
    wanted = plainly.forward(model, prompt(5))[-1]
    torch.testing.assert_close(plain.of("a", 1)[0], wanted, rtol=1e-4, atol=1e-4)


def test_coefficient_zero_leaves_logits_bit_equal(tiny: Any, plainly: Any) -> None:
    model = tiny.language_model("qwen3")
    zero = tuple(Intervention(layer, plainly.unit(layer, 32), 0.0) for layer in range(4))
    seen = {}
    for name, interventions in (("plain", ()), ("zero", zero)):
        seen[name] = plainly.Logits()
        list(model.generate([GenerationRow("a", prompt(7), interventions)], GREEDY, observe=seen[name]))
    assert torch.equal(seen["plain"].of("a", STEPS), seen["zero"].of("a", STEPS))


def test_generation_config_cannot_leak_in(tiny: Any) -> None:
    """A model whose own configuration asks for sampling, penalties and short answers answers the same."""
    model = tiny.language_model("llama")
    rows = [GenerationRow("a", prompt(8))]
    expected = [row.ids for row in model.generate(rows, GREEDY)]
    config = model.causal.generation_config
    config.repetition_penalty, config.do_sample, config.temperature = 1.9, True, 3.0
    config.max_length, config.suppress_tokens, config.min_new_tokens = 9, list(range(3, 200)), 40
    assert [row.ids for row in model.generate(rows, GREEDY)] == expected


def test_repetition_penalty_is_that_of_transformers(tiny: Any) -> None:
    model = tiny.language_model("llama")
    rows = [GenerationRow(str(index), prompt(4 + 3 * index, seed=index)) for index in range(3)]
    options = GenerationOptions(max_new_tokens=15, repetition_penalty=1.7)
    ours = {row.key: row.ids for row in model.generate(rows, options)}
    for row in rows:
        ids = torch.tensor([row.prompt_ids])
        theirs = model.causal.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=15,
            repetition_penalty=1.7,
        )
        assert ours[row.key] == tuple(theirs[0, ids.shape[1] :].tolist())


SAMPLED = GenerationOptions(max_new_tokens=15, temperature=1.0, seed=3)


def test_sampled_text_depends_on_the_row_alone(tiny: Any) -> None:
    """Whatever the neighbours, their order or the batch size, a row draws its own noise."""
    model = tiny.language_model("llama")
    rows = [GenerationRow(str(index), prompt(4 + index % 5, seed=index)) for index in range(9)]
    together = {row.key: row.ids for row in model.generate(rows, SAMPLED)}
    backwards = {row.key: row.ids for row in model.generate(rows[::-1], SAMPLED)}
    model.batcher.max_rows = 2
    in_twos = {row.key: row.ids for row in model.generate(rows, SAMPLED)}
    alone = {row.key: next(model.generate([row], SAMPLED)).ids for row in rows}
    assert together == backwards == in_twos == alone
    other = {row.key: row.ids for row in model.generate(rows, GenerationOptions(15, 1.0, seed=4))}
    assert all(together[key] != other[key] for key in together)


def test_seed_key_shares_the_noise(tiny: Any, plainly: Any) -> None:
    model = tiny.language_model("llama")
    zero = (Intervention(1, plainly.unit(1, 32), 0.0),)
    rows = [
        GenerationRow("base", prompt(6), seed_key="question 1"),
        GenerationRow("steered", prompt(6), zero, seed_key="question 1"),
        GenerationRow("other", prompt(6), seed_key="question 2"),
    ]
    ids = {row.key: row.ids for row in model.generate(rows, SAMPLED)}
    assert ids["base"] == ids["steered"] != ids["other"]


def test_sampling_follows_the_distribution() -> None:
    """Frequencies over an even grid of uniform numbers are the softmax, cut as asked and renormalised."""
    probability = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    grid = (np.arange(20_000) + 0.5) / 20_000
    logits = probability.log().expand(len(grid), -1)

    def frequencies(**options: Any) -> list[float]:
        tokens = sample(logits, grid.tolist(), GenerationOptions(**{"temperature": 1.0, **options}))
        return (torch.bincount(tokens, minlength=5) / len(grid)).tolist()

    np.testing.assert_allclose(frequencies(), probability, atol=1e-3)
    np.testing.assert_allclose(frequencies(top_k=2), [4 / 7, 3 / 7, 0, 0, 0], atol=1e-3)
    np.testing.assert_allclose(frequencies(top_p=0.85), [4 / 9, 3 / 9, 2 / 9, 0, 0], atol=1e-3)
    np.testing.assert_allclose(frequencies(top_p=0.1), [1, 0, 0, 0, 0])
    sharp = probability**2 / (probability**2).sum()
    np.testing.assert_allclose(frequencies(temperature=0.5), sharp, atol=1e-3)


def test_a_uniform_number_just_below_one_draws_a_token_with_weight() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    token = sample(logits, [np.nextafter(1.0, 0.0)], GenerationOptions(temperature=1.0))
    assert token.tolist() == [1]


def fails_above(model: Any, limit: int) -> list[int]:
    """Make a block run out of memory for more than `limit` rows at once; gives the sizes that were tried."""
    tried: list[int] = []
    block = model.anatomy.layers[2]
    original = block.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tried.append(len(hidden_states))
        if len(hidden_states) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return original(hidden_states, *args, **kwargs)

    block.forward = forward
    return tried


def test_out_of_memory_halves_and_goes_on(
    tiny: Any, plainly: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The failing block is not the first: some layers have grown by then, and no token may count twice."""
    model = tiny.language_model("llama")
    rows = rows_of_all_kinds(plainly.unit)
    expected = {row.key: row.ids for row in model.generate(rows, GREEDY)}
    tried = fails_above(model, 3)
    found = {row.key: row.ids for row in model.generate(rows, GREEDY)}
    assert found == expected
    assert max(tried) == 6  # the distinct prompts of the ten rows
    assert "Out of memory with 10 rows (mode=generation); going on with 5" in capsys.readouterr().err
    assert model.batcher.budgets.keys() == {"generation"}
    tried.clear()
    assert {row.key: row.ids for row in model.generate(rows, GREEDY)} == expected
    assert max(tried) <= 3


def test_sampled_rows_survive_out_of_memory(tiny: Any) -> None:
    model = tiny.language_model("llama")
    rows = [GenerationRow(str(index), prompt(4 + index % 5, seed=index)) for index in range(9)]
    expected = {row.key: row.ids for row in model.generate(rows, SAMPLED)}
    fails_above(model, 2)
    assert {row.key: row.ids for row in model.generate(rows, SAMPLED)} == expected


def test_a_single_row_that_does_not_fit_is_named(tiny: Any) -> None:
    model = tiny.language_model("llama")
    fails_above(model, 0)
    with pytest.raises(OutOfMemory, match="single row of 17 tokens \\(row 'a'\\)"):
        list(model.generate([GenerationRow("a", prompt(5))], GREEDY))


def test_other_errors_are_not_taken_for_memory(tiny: Any) -> None:
    model = tiny.language_model("llama")
    model.anatomy.layers[0].forward = lambda *args, **kwargs: (_ for _ in ()).throw(
        RuntimeError("shape mismatch")
    )
    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(model.generate([GenerationRow("a", prompt(5))], GREEDY))


def test_rows_stream_out_before_the_last_is_done(tiny: Any) -> None:
    model = tiny.language_model("llama")
    model.batcher.max_rows = 2
    rows = [GenerationRow(str(index), prompt(5, seed=index)) for index in range(6)]
    progress: list[tuple[int, int]] = []
    stream = model.generate(rows, GREEDY, on_progress=lambda done, tokens: progress.append((done, tokens)))
    next(stream)
    assert progress[-1] == (1, 2 * STEPS)
    assert len(list(stream)) == 5
    assert progress[-1] == (6, 6 * STEPS)


def test_prompt_is_computed_once_for_all_its_rows(tiny: Any, plainly: Any) -> None:
    model = tiny.language_model("llama")
    vector = plainly.unit(1, 32)
    passes: list[tuple[int, ...]] = []
    handle = model.anatomy.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rows = [
        GenerationRow(f"{question} {dose}", prompt(11, seed=question), (Intervention(1, vector, dose),))
        for question in range(2)
        for dose in (0.5, 1.0, 2.0)
    ]  # fmt: skip
    list(model.generate(rows, GenerationOptions(max_new_tokens=3)))
    handle.remove()
    assert passes == [(2, 10), (6, 1), (6, 1), (6, 1)]


def test_memory_does_not_grow_with_the_number_of_batches(tiny: Any) -> None:
    model = tiny.language_model("llama")
    model.batcher.max_rows = 2
    rows = [GenerationRow(str(index), prompt(6, seed=index)) for index in range(40)]
    held: list[int] = []
    for index, _ in enumerate(model.generate(rows, GenerationOptions(max_new_tokens=4))):
        if index % 10 == 9:
            gc.collect()
            held.append(sum(entry.numel() for entry in gc.get_objects() if type(entry) is torch.Tensor))
    assert max(held[1:3]) <= held[0] * 1.05


@pytest.mark.parametrize(
    ("interventions", "message"),
    [
        ((Intervention(4, np.ones(32) / np.sqrt(32), 1.0),), "n_layers = 4"),
        ((Intervention(0, np.ones(31) / np.sqrt(31), 1.0),), "width 32"),
        ((Intervention(0, np.ones(32), 1.0),), "norm 5.657"),
        ((Intervention(0, np.zeros(32), 1.0),), "norm 0"),
        ((Intervention(0, np.full(32, np.nan), 1.0),), "norm nan"),
        ((Intervention(0, np.ones(32) / np.sqrt(32), np.inf),), "coefficient is inf"),
        ((Intervention(0, np.ones(32) / np.sqrt(32), 1.0, "boost"),), "unknown operation 'boost'"),  # type: ignore[arg-type]
        ((Intervention(0, np.ones(32) / np.sqrt(32), 1.0, component="heart"),), "unknown component 'heart'"),
    ],
)
def test_bad_interventions_are_refused_before_anything_runs(
    tiny: Any, interventions: tuple[Intervention, ...], message: str
) -> None:
    model = tiny.language_model("llama")
    model.anatomy.layers[0].forward = lambda *args, **kwargs: pytest.fail("a forward pass ran")
    with pytest.raises(UserError, match=message):
        model.generate([GenerationRow("a", prompt(4), interventions)], GREEDY)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([GenerationRow("a", ())], GREEDY, "row 'a': the prompt has no tokens"),
        ([GenerationRow("a", (1,)), GenerationRow("a", (2,))], GREEDY, "key 'a' occurs twice"),
        ([GenerationRow("a", (1,) * 256)], GREEDY, "do not fit the context of 256"),
        (
            [GenerationRow("a", (1,))],
            GenerationOptions(max_new_tokens=0),
            "max_new_tokens: 0 is out of range",
        ),
        ([GenerationRow("a", (1,))], GenerationOptions(temperature=-1), "temperature: -1"),
        ([GenerationRow("a", (1,))], GenerationOptions(top_p=0), "top_p: 0"),
    ],
)
def test_bad_rows_and_options_are_refused(
    tiny: Any, rows: Sequence[GenerationRow], options: GenerationOptions, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tiny.language_model("llama").generate(rows, options)


def test_a_response_ends_where_the_context_ends(tiny: Any) -> None:
    row = next(tiny.language_model("llama").generate([GenerationRow("a", (1,) * 250)], GREEDY))
    assert (len(row.ids), row.finish_reason) == (6, "length")


def test_trimmed_cache_is_the_cache_of_the_shorter_rows(tiny: Any, plainly: Any) -> None:
    """A long row leaves, and the columns that only it needed go with it, in sliding layers too."""
    for architecture in ("llama", "gemma3"):
        model = tiny.language_model(architecture)
        widths: list[int] = []
        original = kv_cache.trim

        def counted(cache: Any, columns: int, widths: list[int] = widths, original: Any = original) -> None:
            original(cache, columns)
            widths.append(columns)

        rows = [
            GenerationRow("long", prompt(60)),
            *(GenerationRow(str(i), prompt(6 + i, seed=i)) for i in range(3)),
        ]
        expected = {row.key: plainly.steered_logits(model, row, 24)[0] for row in rows}
        first = expected["long"]
        stop = next(token for token in first if all(token not in expected[str(i)] for i in range(3)))
        model.set_stops(frozenset({stop}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kv_cache, "trim", counted)
            found = {row.key: row.ids for row in model.generate(rows, GenerationOptions(max_new_tokens=24))}
        assert widths[0] > 40
        for index in range(3):
            assert found[str(index)] == tuple(expected[str(index)])
