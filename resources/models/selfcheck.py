"""The checks that a model passes before anything is measured with it.

Each states a fact that every downstream number relies on, on a few tokens of the model at hand: zero steering
changes nothing, padding changes nothing, capture reads the blocks' outputs, decoding with a cache sees the
states that a plain forward pass sees, and steering acts on the very first generated token. Verdicts are kept
under the cache folder by model, revision, placement and library versions, so that only a first load pays for
them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from resources.models.anatomy import first_tensor, hooks, input_device
from resources.models.embedded import cache_root
from resources.models.identity import write_json
from resources.models.language_model import LanguageModel
from resources.models.rows import CaptureRow, GenerationOptions, GenerationRow, Intervention
from storage.errors import UserError

# raise when a check below changes: kept verdicts then no longer count
_VERSION = 2
_TEXT = "The weather in the mountains changes quickly, so we packed warm clothes and left early."
_LENGTHS = (12, 7, 4)
_NEW_TOKENS = 3


class SelfCheckError(UserError):
    """The model fails `check`; nothing may be measured with it."""

    def __init__(self, check: str, what: str, *, where: str) -> None:
        self.check = check
        super().__init__(
            f"self-check {check!r} failed: {what}",
            where=where,
            remedy="Load it in float32, or with another transformers version, or use another model.",
        )


def ensure_checked(model: LanguageModel) -> None:
    """Run the checks unless a kept verdict covers this model; SelfCheckError names the one that fails."""
    folder = cache_root() / "selfcheck"
    folder.mkdir(parents=True, exist_ok=True)
    subject = {
        **model.identity.record(),
        "computes_in": str(model.dtype),
        "devices": sorted({device.type for device in model.devices}),
        "attention": getattr(model.model.config, "_attn_implementation", None),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "checks": _VERSION,
    }
    name = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:32]
    record = folder / f"{name}.json"
    try:
        verdict = json.loads(record.read_text())
        model.batcher.solo = bool(verdict["solo"])
        return
    except (OSError, ValueError, KeyError):
        pass  # none kept, or one that a killed process left unreadable: check again
    measured = run_checks(model)
    write_json(record, {"subject": subject, "solo": model.batcher.solo, "measured": measured})


def run_checks(model: LanguageModel) -> dict[str, float]:
    """Run every check; gives what each measured (relative differences, and the planted rise in logits).

    A model whose padded batches differ from solo rows is not refused: it goes on in batches of one, with a
    warning.
    """
    return _Check(model).run()


class _Check:
    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.where = f"model {model.identity.model!r}"
        self.tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
        self.prompts = [self._tokens(length) for length in _LENGTHS]

    def run(self) -> dict[str, float]:
        measured: dict[str, float] = {}
        checks: list[tuple[str, Callable[[], float]]] = [
            ("device", self.device),
            ("zero steering", self.zero_steering),
            ("capture", self.capture),
            ("cached decoding", self.cached_decoding),
            ("planted vector", self.planted_vector),
        ]
        measured["padding"] = self.padding()
        if not measured["padding"] <= self.tolerance:
            self.model.batcher.solo = True
            warnings.warn(
                f"{self.where}: rows in a padded batch differ from rows alone (relative difference"
                f" {measured['padding']:.1e}); going on with one row at a time",
                stacklevel=3,
            )
        for name, check in checks:
            measured[name] = check()
        return measured

    def padding(self) -> float:
        """Largest relative difference between a row's logits or states in a padded batch and alone."""
        together = self._first_logits(self.prompts)
        rows = [CaptureRow(str(index), prompt) for index, prompt in enumerate(self.prompts)]
        states = {row.key: row.pooled["all[-1]", "residual"] for row in self.model.capture(rows, ["all[-1]"])}
        worst = 0.0
        for index, prompt in enumerate(self.prompts):
            alone = self._first_logits([prompt])[0]
            worst = max(worst, _difference(together[index], alone))
            state = next(self.model.capture([rows[index]], ["all[-1]"])).pooled["all[-1]", "residual"]
            worst = max(worst, _difference(states[str(index)], state))
        return worst

    def device(self) -> float:
        """The operations that a decoder is made of give on this device what they give on the CPU in float32."""
        device = input_device(self.model.anatomy.decoder)
        generator = torch.Generator().manual_seed(0)
        a, b, c = (torch.randn((1, 2, 24, 32), generator=generator) for _ in range(3))

        def results(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> list[torch.Tensor]:
            attention = torch.nn.functional.scaled_dot_product_attention
            return [x @ y.transpose(-1, -2), attention(x, y, z, is_causal=True), x.softmax(-1), x.cumsum(-2)]

        here = results(*(tensor.to(device, self.model.dtype) for tensor in (a, b, c)))
        worst = max(
            _difference(mine.float().cpu().numpy(), reference.numpy())
            for mine, reference in zip(here, results(a, b, c), strict=True)
        )
        if not worst <= self.tolerance:
            raise self._failure("device", f"{device} differs from the CPU by {worst:.1e}")
        return worst

    def zero_steering(self) -> float:
        """Hooks at every layer with coefficient 0 leave the logits as they are."""
        vector = self._direction()
        zero = tuple(Intervention(layer, vector, 0.0) for layer in range(self.model.n_layers))
        prompts = self.prompts[:1]
        plain = self._first_logits(prompts)[0]
        difference = _difference(self._first_logits(prompts, zero)[0], plain)
        if not difference <= 1e-6:
            raise self._failure("zero steering", f"coefficient 0 changes logits by {difference:.1e}")
        return difference

    def capture(self) -> float:
        """What capture gives is the block's output, and before the last layer transformers' hidden state."""
        prompt = self.prompts[0]
        captured = next(self.model.capture([CaptureRow("a", prompt)], ["all[-1]"])).pooled[
            "all[-1]", "residual"
        ]
        outputs: dict[int, np.ndarray] = {}

        def recorder(layer: int) -> Callable[..., None]:
            def record(module: Any, args: Any, output: Any) -> None:
                outputs[layer] = first_tensor(output)[0, -1].float().cpu().numpy()

            return record

        anatomy = self.model.anatomy
        pairs = [(module, recorder(layer)) for layer, module in enumerate(anatomy.layers)]
        with hooks(pairs), torch.inference_mode():
            result = anatomy.decoder(**self._inputs(prompt), output_hidden_states=True, use_cache=False)
        worst = max(_difference(captured[layer], outputs[layer]) for layer in outputs)
        if not worst <= self.tolerance:
            raise self._failure("capture", f"capture differs from the blocks' outputs by {worst:.1e}")
        hidden = getattr(result, "hidden_states", None)
        if hidden is not None and len(hidden) == self.model.n_layers + 1:
            for layer in range(self.model.n_layers - 1):
                difference = _difference(captured[layer], hidden[layer + 1][0, -1].float().cpu().numpy())
                if not difference <= self.tolerance:
                    raise self._failure(
                        "capture",
                        f"layer {layer} differs from hidden_states[{layer + 1}] by {difference:.1e}",
                    )
                worst = max(worst, difference)
        return worst

    def cached_decoding(self) -> float:
        """States and logits of decoding with a cache are those of one forward pass over the whole text."""
        prompt = self.prompts[0]
        layer = self.model.n_layers // 2
        seen: list[np.ndarray] = []
        logits: list[np.ndarray] = []

        def record(module: Any, args: Any, output: Any) -> None:
            state = first_tensor(output)
            if state.shape[1] == 1:
                seen.append(state[0, -1].float().cpu().numpy())

        module = self.model.anatomy.layers[layer]
        options = GenerationOptions(max_new_tokens=_NEW_TOKENS)
        with hooks([(module, record)]):
            row = next(
                self.model.generate(
                    [GenerationRow("a", prompt)],
                    options,
                    observe=lambda keys, counts, scores: logits.append(scores[0].float().cpu().numpy()),
                )
            )
        text = (*prompt, *row.ids)[: len(prompt) + len(logits) - 1]
        positions = [f"all[{len(prompt) - 1 + step}]" for step in range(len(logits))]
        forced = next(self.model.capture([CaptureRow("a", text)], positions, layers=[layer])).pooled
        with torch.inference_mode():
            plain = self.model.causal(**self._inputs(text), use_cache=False).logits[0].float().cpu().numpy()
        worst = 0.0
        for step, position in enumerate(positions):
            worst = max(worst, _difference(seen[step], forced[position, "residual"][0]))
            worst = max(worst, _difference(logits[step], plain[len(prompt) - 1 + step]))
        if not worst <= self.tolerance:
            raise self._failure(
                "cached decoding", f"decoding differs from a plain forward pass by {worst:.1e} (relative)"
            )
        return worst

    def planted_vector(self) -> float:
        """An unembedding row, added at the last layer, raises its token at the first generated token.

        Gives the smallest rise of the token's logit above the mean logit, over three tokens; NaN for a model
        whose head is not a matrix over the hidden size.
        """
        head: Any = self.model.causal.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if weight is None or weight.dim() != 2 or weight.shape[1] != self.model.hidden_size:
            return float("nan")
        prompt = self.prompts[0]
        last = self.model.n_layers - 1
        plain = self._first_logits([prompt])[0]
        norm = float(np.linalg.norm(self._last_state(prompt)))
        rises: list[float] = []
        for token in np.argsort(-plain)[1:4]:
            row = weight[int(token)].detach().float().cpu().numpy()
            if not np.isfinite(row).all() or not np.linalg.norm(row) > 0:
                return float("nan")
            steered = self._first_logits([prompt], (Intervention(last, row / np.linalg.norm(row), norm),))[0]
            rises.append(float((steered[token] - steered.mean()) - (plain[token] - plain.mean())))
        if not min(rises) > 0:
            raise self._failure(
                "planted vector", f"the planted token's logit moved by {min(rises):.2g} at the first token"
            )
        return min(rises)

    def _last_state(self, prompt: tuple[int, ...]) -> np.ndarray:
        captured = next(
            self.model.capture([CaptureRow("a", prompt)], ["all[-1]"], layers=[self.model.n_layers - 1])
        )
        return captured.pooled["all[-1]", "residual"][0]

    def _first_logits(
        self, prompts: Sequence[tuple[int, ...]], interventions: tuple[Intervention, ...] = ()
    ) -> list[np.ndarray]:
        """Logits of the first generated token of each prompt, from the very loop that generates."""
        found: dict[str, np.ndarray] = {}

        def observe(keys: list[str], counts: list[int], logits: torch.Tensor) -> None:
            found.update(zip(keys, logits.float().cpu().numpy(), strict=True))

        rows = [GenerationRow(str(index), prompt, interventions) for index, prompt in enumerate(prompts)]
        list(self.model.generate(rows, GenerationOptions(max_new_tokens=1), observe=observe))
        return [found[str(index)] for index in range(len(prompts))]

    def _tokens(self, length: int) -> tuple[int, ...]:
        ids = list(self.model.prompts.encode(_TEXT, chat=False).ids)
        return tuple((ids * (length // len(ids) + 1))[:length])

    def _inputs(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        device = input_device(self.model.anatomy.decoder)
        steps = torch.arange(len(ids), device=device)[None]
        return {"input_ids": torch.tensor([list(ids)], device=device), "position_ids": steps}

    def _direction(self) -> np.ndarray:
        vector = np.random.default_rng(0).standard_normal(self.model.hidden_size).astype(np.float32)
        return vector / np.linalg.norm(vector)

    def _failure(self, check: str, what: str) -> SelfCheckError:
        return SelfCheckError(check, what, where=self.where)


def _difference(value: np.ndarray, reference: np.ndarray) -> float:
    """‖value − reference‖ / ‖reference‖, over all layers at once for stacked states."""
    if not (np.isfinite(value).all() and np.isfinite(reference).all()):
        return float("inf")
    return float(np.linalg.norm(value - reference) / max(float(np.linalg.norm(reference)), 1e-12))
