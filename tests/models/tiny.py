"""Tiny random models of many architectures, and a byte-level tokenizer to go with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from resources.models.language_model import LanguageModel
from resources.models.rows import ModelIdentity

SPECIALS = ("<pad>", "<bos>", "<eos>", "<turn>", "<end>")
VOCABULARY = 300
HIDDEN = 32
LAYERS = 4

CHAT = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None, *, adds_bos: bool = False, pad: str = "<pad>") -> Any:
    """One token per byte; specials first, so that id 0 is a special token."""
    vocabulary = {token: index for index, token in enumerate(SPECIALS)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token=pad,
        additional_special_tokens=["<turn>", "<end>"],
    )
    fast.chat_template = chat_template
    return fast


def _base(**more: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return common | more


def _gemma(**more: Any) -> dict[str, Any]:
    return _base(head_dim=8, sliding_window=8, query_pre_attn_scalar=8, **more)


def _gemma3_multimodal() -> Any:
    text = tf.Gemma3TextConfig(**_gemma())
    vision = tf.SiglipVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    config = tf.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4, image_token_id=299
    )
    return tf.Gemma3ForConditionalGeneration(config)


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_base())),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_base())),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_base(head_dim=8))),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_base(sliding_window=8))),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**_base(num_local_experts=4, num_experts_per_tok=2))
    ),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **_base(
                moe_intermediate_size=24,
                shared_expert_intermediate_size=24,
                num_experts=4,
                num_experts_per_tok=2,
            )
        )
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**_base(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=8))
    ),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_gemma())),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_gemma())),
    "gemma3_multimodal": _gemma3_multimodal,
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**_base())),
    "glm4": lambda: tf.Glm4ForCausalLM(tf.Glm4Config(**_base(head_dim=8))),
    "granite": lambda: tf.GraniteForCausalLM(
        tf.GraniteConfig(
            **_base(
                residual_multiplier=0.22,
                attention_multiplier=0.3,
                embedding_multiplier=3.0,
                logits_scaling=2.0,
            )
        )
    ),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_base(num_key_value_heads=4))),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_base())),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=4,
            n_positions=256,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(**_base(rotary_pct=0.5, num_key_value_heads=4))
    ),
}


def network(architecture: str, seed: int = 0) -> Any:
    """A random model in float32, norms and biases random too, so that no part is a neutral element."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture]().float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    # nothing may end a response by itself: tests decide lengths
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def identity(name: str) -> ModelIdentity:
    return ModelIdentity(model=f"tiny/{name}", revision="0" * 40, dtype="float32")


def language_model(architecture: str, seed: int = 0, **tokenizer: Any) -> LanguageModel:
    model = LanguageModel(network(architecture, seed), byte_tokenizer(**tokenizer), identity(architecture))
    model.set_stops(frozenset())
    return model
