"""The Dagster shell over the model pool: what assets are handed. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import dagster as dg
from pydantic import Field

from resources.models import identity as identities
from resources.models.rows import ModelIdentity, ModelSpec

if TYPE_CHECKING:
    from resources.models.language_model import LanguageModel
    from resources.models.loading import ModelPool
    from resources.models.server import GenerationServer, ServedModel


class ModelResource(dg.ConfigurableResource):
    """Language models, loaded on first use and kept for the life of the process."""

    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1 or mps.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU, float32 on the CPU."
    )
    device_map: str | None = Field(
        default=None,
        description="Several devices: auto, balanced, sequential, or JSON of module names to devices.",
    )
    quantization: Literal["none", "4bit", "8bit"] = Field(
        default="none", description="Quantise the weights with bitsandbytes."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run code that a model repository brings along. Off unless you trust it."
    )
    max_batch_rows: int | None = Field(
        default=None, ge=1, description="Upper limit of rows per batch; automatic where left out."
    )

    def spec(self, model: str, revision: str | None = None, adapter: str | None = None) -> ModelSpec:
        """The spec of a model under this resource's settings."""
        return ModelSpec(
            model=model,
            revision=revision,
            dtype=self.dtype,
            device=self.device,
            device_map=self.device_map,
            quantization=None if self.quantization == "none" else self.quantization,
            adapter=adapter,
            trust_remote_code=self.trust_remote_code,
        )

    def identify(self, spec: ModelSpec) -> ModelIdentity:
        """Which model this is, without loading it; UserError where there is none."""
        return identities.identify(spec)

    def has_chat_template(self, spec: ModelSpec) -> bool | None:
        """Whether the model is instruction-tuned by its tokenizer's files; None where that needs a
        download.
        """
        return identities.has_chat_template(spec)

    def get(self, spec: ModelSpec, max_batch_rows: int | None = None) -> LanguageModel:
        """The loaded model, from the pool of this process. `max_batch_rows` goes before the resource's own."""
        return self.pool().get(spec, max_batch_rows=max_batch_rows or self.max_batch_rows)

    def served(self, spec: ModelSpec, settings: GenerationServer) -> ServedModel:
        """A model that generates on a server; nothing is asked of it yet. UserError for settings that cannot
        work and for a tokenizer that cannot be loaded."""
        from resources.models.frontend import load_frontend
        from resources.models.server import ServedModel

        settings.check()
        settings.api_key()
        return ServedModel(load_frontend(spec, self.identify(spec)), settings)

    def pool(self) -> ModelPool:
        from resources.models.loading import POOL

        return POOL
