"""What a language model is asked, and what it answers: plain rows, no torch, no Dagster.

Every row carries a `key` chosen by the caller; results come back with the same key, in any order. Token ids
are the truth everywhere: text is never tokenised a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

# what may be captured or steered in a block; which of them a model has is found by `anatomy`
COMPONENTS = (
    "residual",
    "attn_out",
    "mlp_out",
    "attn_contribution",
    "mlp_contribution",
    "k_proj",
    "v_proj",
)

Operation = Literal["add", "add_norm_preserving", "ablate", "clamp"]
SteerFrom = Literal["response", "all"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class ModelSpec:
    """Which model to load, and how. Everything here is part of the model's identity.

    `model`: hub id (`google/gemma-2-2b-it`), local folder, path to a `.gguf` file, or `embedded:<name>`.
    """

    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    device_map: str | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    adapter: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model will see it.

    `ids`: token ids with exactly one BOS where the tokenizer has one; `chat`: the chat template was applied;
    `system_folded`: the template refuses a system role, so the system prompt was put at the head of the user
    turn.
    """

    ids: tuple[int, ...]
    chat: bool
    system_folded: bool = False


@dataclass(frozen=True, eq=False)
class Intervention:
    """One steering operation at one layer's hook site, for one row.

    `vector`: [hidden] float32 unit direction; `coefficient`: for add, the length added (units of ‖h‖); for
    clamp, the projection to hold; ignored by ablate. `layer` counts blocks from 0; the site is the output of
    that block for component `residual`.
    """

    layer: int
    vector: np.ndarray
    coefficient: float
    operation: Operation = "add"
    component: str = "residual"


@dataclass(frozen=True)
class GenerationOptions:
    """Every parameter that decides a row's text; a model's own generation_config never leaks in.

    `temperature` 0 is greedy. End-of-turn tokens of the model always stop.
    """

    max_new_tokens: int = 150
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def record(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }


@dataclass(frozen=True, eq=False)
class GenerationRow:
    """One prompt to continue, with its own steering (none: unsteered).

    The sampling seed of the row is derived from `options.seed` and `key` (or `seed_key`, where two rows, such
    as a steered one and its baseline, must draw the same noise), so text never depends on neighbours or
    order.
    """

    key: str
    prompt_ids: tuple[int, ...]
    interventions: tuple[Intervention, ...] = ()
    seed_key: str | None = None


@dataclass(frozen=True)
class GeneratedRow:
    """`ids`: the generated token ids without the stop token; `text`: their decoding, special tokens skipped,
    otherwise untouched (a leading space stays)."""

    key: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True)
class CaptureRow:
    """One prompt with the response that followed (empty for prefill-only)."""

    key: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class CapturedRow:
    """Pooled hidden states of one row.

    `pooled[position, component]`: [n_layers, width] float32, the mean over the tokens that the position
    selects (fp32 accumulation); `empty`: the positions that select no token of this row (absent from
    `pooled`); `norms`: [n_layers] float32, median over the row's tokens, token 0 left out, of the residual
    ‖h‖ at each block output (NaN where the row has a single token).
    """

    key: str
    pooled: dict[tuple[str, str], np.ndarray]
    norms: np.ndarray
    empty: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelIdentity:
    """What makes two loads the same model; computed without loading weights or importing torch.

    `revision`: commit of a hub model, or a content hash for local files and embedded packages.
    """

    model: str
    revision: str
    dtype: str
    quantization: str | None = None
    adapter: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "revision": self.revision,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "adapter": self.adapter,
            **self.extra,
        }
