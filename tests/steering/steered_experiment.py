"""A stored experiment around a tiny real model in which one direction raises the digits, for tests of the
stage.

The model is a random Llama of four blocks with a byte tokenizer; its head is altered so that the rows of the
digit tokens point along one direction of the (norm-weighted) residual stream. The judge counts digits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resources.judges.protocol import Abstention, JudgeItem, Judgement, Score
from resources.models.rows import ModelIdentity, ModelSpec
from storage import keys
from storage.workspace import Workspace
from trait_assets.experiments import parse_experiment
from trait_assets.pipeline import StageContext
from trait_assets.progress import LogProgress

EXPERIMENT, TRAIT = "tiny", "toy/digits"
QUESTIONS = [
    f"Tell me about {w}."
    for w in ["rain", "bread", "trains", "music", "paper", "winter", "rivers", "chairs", "clocks", "birds"]
]
QUESTIONS += [f"What of {w}?" for w in ["salt", "ships", "lamps", "coats", "hills", "coins"]]
DEFINITION = "Digits in the text.\n\nHIGH (70-100): many digits.\n\nLOW (0-30): no digit at all."
OPTIONS: dict[str, Any] = {
    "extraction_model": "tiny/llama",
    "methods": ["mean_diff", "probe", "random"],
    "steer": {
        "max_new_tokens": 10,
        "temperature": 0.7,
        "doses": [0.2, 0.5, 1.0],
        "refine_steps": 1,
        "depth_window": [0.0, 1.0],
        "max_candidates": 6,
        "coherence_threshold": 50,
    },
}


class DigitJudge:
    """Trait: share of digits; coherence: 100 less a point per repeated 3-gram share. Counts what it is
    asked."""

    stand_in = True

    def __init__(self) -> None:
        self.identity = {"kind": "digits"}
        self.asked = 0

    def score(self, items: Sequence[JudgeItem], *, on_judged: Any = None) -> Iterator[Judgement]:
        for item in items:
            self.asked += 1
            ids = item.text_ids
            if not item.text:
                yield Abstention(item.key, "empty")
            elif item.rubric == "steering":
                yield Score(item.key, 100.0 * sum(c.isdigit() for c in item.text) / len(item.text))
            else:
                grams = list(zip(ids, ids[1:], ids[2:], strict=False))
                yield Score(item.key, 100.0 * len(set(grams)) / max(1, len(grams)))

    def usage(self, trait: str | None = None) -> dict[str, float]:
        return {}


class Judges:
    def __init__(self, judge: DigitJudge) -> None:
        self._judge = judge

    def identity(self) -> dict[str, Any]:
        return dict(self._judge.identity)

    def judge(self, cache_for: Any, reference: Any = None, on_progress: Any = None) -> DigitJudge:
        return self._judge


class Models:
    """One loaded model under its name; `rows` counts what was generated."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: list[int] = []
        self.fail_after: int | None = None
        real = model.generate

        def counted(rows: Sequence[Any], options: Any, **more: Any) -> Iterator[Any]:
            self.rows.append(len(rows))
            for made, row in enumerate(real(rows, options, **more)):
                if self.fail_after is not None and sum(self.rows[:-1]) + made >= self.fail_after:
                    raise RuntimeError("the plug was pulled")
                yield row

        model.generate = counted

    def spec(self, model: str, revision: str | None = None, adapter: str | None = None) -> ModelSpec:
        return ModelSpec(model, revision, adapter=adapter)

    def get(self, spec: ModelSpec, max_batch_rows: int | None = None) -> Any:
        return self.model

    def identify(self, spec: ModelSpec) -> ModelIdentity:
        return self.model.identity


def digit_model(tiny: Any, *, max_batch_rows: int | None = None, **tokenizer: Any) -> tuple[Any, np.ndarray]:
    """(LanguageModel, unit direction that raises digits at the last block's output)."""
    import torch

    from resources.models.language_model import LanguageModel

    network = tiny.network("llama", 3)
    tokenizer = tiny.byte_tokenizer(tiny.CHAT, adds_bos=True, **tokenizer)
    rng = np.random.default_rng(0)
    u = rng.standard_normal(tiny.HIDDEN)
    u /= np.linalg.norm(u)
    digits = [tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
    with torch.no_grad():
        # the blocks do little, so that what is added at one block arrives at the head
        for name, parameter in network.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(0.2)
        network.model.norm.weight.fill_(1.0)
        network.lm_head.weight.mul_(0.5)
        along = torch.tensor(u, dtype=torch.float32)
        network.lm_head.weight.sub_(torch.outer(network.lm_head.weight @ along, along))
        for d in digits:
            network.lm_head.weight[d] += 0.6 * along
    model = LanguageModel(network, tokenizer, tiny.identity("llama"), max_batch_rows=max_batch_rows)
    model.set_stops(frozenset())
    return model, u.astype(np.float32)


def store_inputs(
    workspace: Workspace,
    commit: Any,
    u: np.ndarray,
    *,
    trait: str = TRAIT,
    experiment: str = EXPERIMENT,
    steering: Any = "default",
    n_layers: int = 4,
    model: dict[str, Any] | None = None,
    cv_auc: float = 0.95,
) -> None:
    """Scenarios, vectors and evaluation as the earlier stages leave them. The planted direction is probe's at
    layer 2."""
    from trait_assets.vectors.vector import VectorFile, vector_folder

    if steering == "default":
        steering = {"questions": QUESTIONS, "direction": "positive", "eval_prompt": None}
    scenarios = {
        "trait": trait,
        "definition": DEFINITION,
        "positives": [{"prompt": f"count {i}", "system_prompt": None, "line": i} for i in range(1, 5)],
        "negatives": [{"prompt": f"say {i}", "system_prompt": None, "line": i} for i in range(1, 5)],
        "steering": steering,
        "content_hash": "c" * 32,
        "findings": [],
    }
    commit(workspace, "scenarios", trait, {keys.scenario_set(trait): scenarios}, experiment=None)
    rng = np.random.default_rng(7)
    files: dict[str, Any] = {}
    rows = []
    for method in ("mean_diff", "probe", "random"):
        directions = rng.standard_normal((n_layers, len(u)))
        directions -= np.outer(directions @ u, u)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        if method == "probe":
            directions[2] = u
        ones = np.ones(n_layers, np.float32)
        file = VectorFile(
            trait=trait,
            method=method,
            position="response[:]",
            component="residual",
            layers=list(range(n_layers)),
            directions=directions.astype(np.float32),
            raw_norm=ones,
            median_norm=5 * ones,
            threshold=0 * ones,
            sign=ones,
            mean_positive=ones,
            mean_negative=-ones,
            train_accuracy=ones,
            coefficient_norm=ones,
            metadata={
                "model": model
                or {"model": "tiny/llama", "revision": "0" * 40, "dtype": "float32"}
                | {"quantization": None, "adapter": None},
                "n_layers": n_layers,
            },
        )
        folder = vector_folder(experiment, trait, "response[:]", "residual", method)
        files[f"{folder}/vectors.safetensors"] = file.pack()
        files[f"{folder}/metadata.json"] = file.record()
        rows += [
            {
                "layer": layer,
                "method": method,
                "position": "response[:]",
                "component": "residual",
                "cv_auc": cv_auc,
                "cv_accuracy": 0.9,
                "split_half_cosine": 0.8,
            }
            for layer in range(n_layers)
        ]
    vectors = commit(workspace, "vectors", trait, files, experiment=experiment)
    evaluation = keys.extraction(experiment, trait, "evaluation", "evaluation.json")
    commit(
        workspace,
        "vector_evaluation",
        trait,
        {evaluation: {"trait": trait, "rows": rows}},
        experiment=experiment,
        inputs={"vectors": vectors.fingerprint},
        summary={"best_method": "mean_diff", "best_layer": 1},
    )


def context(
    root: Path, model: Any, judge: DigitJudge | None = None, **options: Any
) -> tuple[StageContext, Models, DigitJudge]:
    steer = {**OPTIONS["steer"], **options.pop("steer", {})}
    experiment = parse_experiment(EXPERIMENT, {**OPTIONS, **options, "steer": steer}, where="test")
    models, judge = Models(model), judge or DigitJudge()
    made = StageContext(
        experiment=experiment,
        workspace=Workspace(root / "experiments", root / "lineage.duckdb"),
        models=models,
        judges=Judges(judge),
        dataset_root=root / "traits",
        run_id="test",
        progress=LogProgress(logging.getLogger("quiet"), interval=1e9),
    )
    return made, models, judge
