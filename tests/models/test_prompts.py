"""Prompts to ids: templates of every temper, one BOS, system prompts, think blocks, ends of turns."""

from __future__ import annotations

from typing import Any

import pytest

from resources.models.prompts import PromptEncoder
from resources.models.rows import GenerationOptions, GenerationRow
from storage.errors import UserError

BOS, EOS, TURN, END = 1, 2, 3, 4
USER = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + USER
REFUSES_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + USER
)  # fmt: skip
DROPS_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# as Qwen3's: an empty think block when thinking is off, and think blocks of earlier answers dropped
QWEN3 = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENS_THINK = USER.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.fixture
def encoder(tiny: Any) -> Any:
    def build(template: str | None = None, **options: Any) -> PromptEncoder:
        return PromptEncoder(tiny.byte_tokenizer(template, **options))

    return build


def text(encoder: PromptEncoder, ids: tuple[int, ...]) -> str:
    return str(encoder.tokenizer.decode(ids))


@pytest.mark.parametrize("template", [USER, WITH_BOS, REFUSES_SYSTEM, QWEN3])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_one_bos_in_every_path(encoder: Any, template: str, adds_bos: bool) -> None:
    made = encoder(template, adds_bos=adds_bos)
    expected = 1 if adds_bos or "bos_token" in template else 0
    assert made.encode("Hi", chat=True).ids.count(BOS) == expected
    assert made.encode("Hi", "Be kind.", chat=True).ids.count(BOS) == expected
    assert made.encode("Hi", chat=False).ids.count(BOS) == int(adds_bos)


def test_a_text_that_brings_its_own_bos_gets_no_second(encoder: Any) -> None:
    assert encoder(adds_bos=True).encode("<bos>Hi", chat=False).ids.count(BOS) == 1
    assert encoder(adds_bos=True).encode("<bos>Hi", chat=False).ids[0] == BOS


def test_chat_is_the_rendered_template(encoder: Any) -> None:
    made = encoder(WITH_BOS)
    encoded = made.encode("Hi", "Be kind.", chat=True)
    assert (
        text(made, encoded.ids) == "<bos><turn>system\nBe kind.<end>\n<turn>user\nHi<end>\n<turn>assistant\n"
    )
    assert encoded.chat
    assert not encoded.system_folded


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_a_refused_or_dropped_system_prompt_moves_into_the_user_turn(encoder: Any, template: str) -> None:
    """Positive and negative prompts that differ in the system prompt alone must stay different."""
    made = encoder(template)
    positive, negative = (made.encode("Hi", system, chat=True) for system in ("Be rude.", "Be kind."))
    assert positive.system_folded
    assert positive.ids != negative.ids
    assert "<turn>user\nBe rude.\n\nHi<end>" in text(made, positive.ids)
    plain = made.encode("Hi", chat=True)
    assert not plain.system_folded


def test_a_template_that_fails_on_any_message_is_reported(encoder: Any) -> None:
    broken = encoder("{{ raise_exception('always') }}")
    with pytest.raises(UserError, match="fails on a plain user message"):
        broken.encode("Hi", "Be kind.", chat=True)


def test_thinking_is_off(encoder: Any) -> None:
    made = encoder(QWEN3)
    assert text(made, made.encode("Hi", chat=True).ids).endswith("<turn>assistant\n<think>\n\n</think>\n\n")


def test_an_open_think_block_is_closed(encoder: Any) -> None:
    made = encoder(OPENS_THINK)
    assert text(made, made.encode("Hi", chat=True).ids).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("version", ["4", "5"])
def test_what_a_template_returns_in_either_version(
    encoder: Any, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Tokenised, transformers 4 gives a list where 5 gives a BatchEncoding: the prompt's ids are a tuple of
    integers in both."""
    made = encoder(WITH_BOS)
    wanted = made.encode("Hi", chat=True).ids
    original = made.tokenizer.apply_chat_template

    def stub(messages: Any, *, tokenize: bool = True, **more: Any) -> Any:
        rendered = original(messages, tokenize=False, **more)
        if not tokenize:
            return rendered
        encoding = made.tokenizer(rendered, add_special_tokens=False)
        return encoding if version == "5" else encoding["input_ids"]

    monkeypatch.setattr(made.tokenizer, "apply_chat_template", stub)
    assert made.encode("Hi", chat=True).ids == wanted
    assert all(isinstance(token, int) for token in wanted)


def test_base_prompts_are_plain_text(encoder: Any) -> None:
    made = encoder(WITH_BOS, adds_bos=True)
    assert text(made, made.encode("Once upon", chat=False).ids) == "<bos>Once upon"
    assert text(made, made.encode("Once upon", "A tale.", chat=False).ids) == "<bos>A tale.\n\nOnce upon"


def test_no_template_and_empty_prompts_are_errors(encoder: Any) -> None:
    with pytest.raises(UserError, match=r"no chat template.*--base-model"):
        encoder().encode("Hi", chat=True)
    with pytest.raises(UserError, match="prompt is empty"):
        encoder().encode("", chat=False)


def test_ends_of_turns(encoder: Any) -> None:
    """The tokenizer's EOS, what the model's configuration names, and what the template puts after an answer."""
    assert encoder(USER).end_of_turn([7]) == {7, EOS, END}
    assert encoder().end_of_turn([]) == {EOS}
    assert encoder(REFUSES_SYSTEM).end_of_turn([]) == {EOS, END}


def test_a_leading_space_stays(encoder: Any) -> None:
    made = encoder()
    ids = made.tokenizer(" refused", add_special_tokens=False)["input_ids"]
    assert made.decode(ids) == " refused"
    assert made.decode([*ids, END, EOS]) == " refused"
    assert made.decode([]) == ""


def test_sentencepiece_decoders_keep_it_too(tiny: Any) -> None:
    """Llama's decoder strips the space of the first token of whatever it decodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "▁so", "▁I", "▁refused", "a", "▁", "▁a"]
    tokenizer = Tokenizer(
        models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    made = PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert made.tokenizer.decode([3]) == "refused"
    assert made.decode([3]) == " refused"


def test_the_boundary_comes_from_ids(tiny: Any) -> None:
    """A Qwen3-style template: prompt + answer rendered again does not begin with the prompt that was
    generated from, so a boundary found in text would be wrong; rows carry ids.
    """
    model = tiny.language_model("llama", chat_template=QWEN3)
    prompt = model.encode("Hi", chat=True).ids
    row = next(model.generate([GenerationRow("a", prompt)], GenerationOptions(max_new_tokens=5)))
    again = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": row.text}],
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    assert tuple(again[: len(prompt)]) != prompt
    assert row.prompt_ids == prompt
    assert len(row.ids) == 5


def test_merging_boundaries_are_left_alone(smollm2: Any) -> None:
    """ "…on the" and " mat" tokenise otherwise as a whole: the ids that were generated are the truth."""
    prompt = smollm2.encode("The cat sat on the ", chat=False).ids
    response = smollm2.tokenizer("mat", add_special_tokens=False)["input_ids"]
    whole = smollm2.tokenizer("The cat sat on the mat", add_special_tokens=False)["input_ids"]
    assert [*prompt, *response] != whole


def test_batch_encoding_and_special_ids_of_a_real_model(smollm2: Any) -> None:
    """SmolLM2's pad token is its end of turn: it stops a response, and is counted where it is a real token."""
    encoded = smollm2.encode("What is the capital of France?", chat=True)
    assert all(isinstance(token, int) for token in encoded.ids)
    rendered = smollm2.tokenizer.decode(encoded.ids)
    assert rendered.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    end = smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert smollm2.tokenizer.pad_token_id == end
    assert smollm2.stops == {end}
