"""What is there to do: the traits of an experiment, how long their texts are, what is already done.

Reads trait folders, manifests and row caches; writes nothing, loads no model and asks no judge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.judges.protocol import JudgeItem, TraitContext
from resources.models.rows import ModelSpec
from storage.errors import ArtifactError, UserError
from storage.manifest import fingerprint
from trait_assets.pipeline import StageContext, stage_fingerprint
from trait_assets.planning.arithmetic import CHARS_PER_TOKEN, SHAPES, ModelShape, Trait
from trait_assets.scenarios.dataset import load_trait
from trait_assets.scenarios.selection import ChosenScenario, subset
from trait_assets.stages import all_stages
from trait_assets.steering.questions import read_questions

if TYPE_CHECKING:
    from storage.manifest import Manifest

# a question is wrapped into a chat template of about so many tokens
TEMPLATE_TOKENS = 30.0


@dataclass(frozen=True)
class Surveyed:
    """One trait: its facts, and per stage the share that is still to be done (0: up to date)."""

    name: str
    facts: Trait
    left: dict[str, float]


def survey(ctx: StageContext, names: Sequence[str], stages: Sequence[str], *, base: bool) -> list[Surveyed]:
    """Every trait of `names`, which must be readable."""
    from trait_assets.report.overview import status_rows

    states = {
        row["trait"]: row["stages"]
        for row in status_rows(
            ctx.workspace, ctx.experiment, ctx.dataset_root, list(names), stages, verify_files=False
        )
    }
    shares = _past_shares(ctx, names)
    return [_trait(ctx, name, states.get(name, {}), stages, shares, base=base) for name in names]


def _trait(
    ctx: StageContext,
    name: str,
    states: Mapping[str, Mapping[str, Any]],
    stages: Sequence[str],
    shares: Mapping[str, float],
    *,
    base: bool,
) -> Surveyed:
    e = ctx.experiment
    scenarios = load_trait(ctx.dataset_root, name, require_steering=e.steering)
    rows = subset(scenarios, e.scenario_limit, e.seed)
    context = TraitContext(name, scenarios.definition)
    search = report = 0
    question_tokens = 0.0
    steering = scenarios.steering
    if e.steering and steering is not None:
        questions = read_questions(
            {"questions": list(steering.questions), "direction": steering.direction},
            trait=name,
            where=str(ctx.dataset_root / name / "steering.json"),
            limit=e.steer.questions,
            search_share=e.steer.search_share,
            seed=e.seed,
        )
        search, report = len(questions.search), len(questions.report)
        question_tokens = _mean(len(text) for text in questions.texts) / CHARS_PER_TOKEN + TEMPLATE_TOKENS
    template = 0.0 if base else TEMPLATE_TOKENS
    facts = Trait(
        scenarios=len(rows),
        judged_texts=len(scenarios.positives) + len(scenarios.negatives),
        prompt_tokens=_mean(len(r.prompt) + len(r.system_prompt or "") for r in rows) / CHARS_PER_TOKEN
        + template,
        questions_search=search,
        questions_report=report,
        question_tokens=question_tokens,
        **_judge_tokens(context, rows),
        **shares,
    )
    left = {}
    above = 0.0
    for stage in stages:
        state = str(states.get(stage, {}).get("state", "missing"))
        share = 0.0 if state in ("current", "skipped") and (above or _same(ctx, stage, name)) else 1.0
        if above:
            # what lies above is made anew: this will be out of date then, whatever it is now
            share = 1.0
        if share and stage == "responses":
            share = _missing_responses(ctx, name, rows)
        left[stage] = share
        above = max(above, share)
        if stage == "responses" and share == 0.0 and state not in ("current", "skipped"):
            above = max(above, 1e-9)
    return Surveyed(name, facts, left)


def _same(ctx: StageContext, stage: str, name: str) -> bool:
    """Whether the stored result is what these options would give. What cannot be planned has to be done again."""
    found = all_stages()[stage]
    try:
        manifest = ctx.workspace.manifests.read(None if found.shared else ctx.experiment.name, stage, name)
        return (
            manifest is not None and stage_fingerprint(found, found.plan(ctx, name)) == manifest.fingerprint
        )
    except (UserError, ArtifactError):
        return False


def _judge_tokens(context: TraitContext, rows: Sequence[ChosenScenario]) -> dict[str, float]:
    """Tokens of the questions to an LLM judge, by rendering them."""
    from resources.judges.rubric import render

    def tokens(rubric: Any, prompt: str, text: str) -> float:
        shown = render(JudgeItem("x", rubric, context, prompt=prompt, text=text))
        return (len(shown.system) + len(shown.user)) / CHARS_PER_TOKEN

    sample = rows[:: max(1, len(rows) // 8)][:8]
    return {
        "judge_scenario_tokens": _mean(tokens("scenario", r.prompt, "") for r in sample),
        "judge_response_tokens": _mean(tokens("response", r.prompt, "") for r in sample),
        "judge_steering_tokens": tokens("steering", "What would you do on a free day?", ""),
        "judge_coherence_tokens": tokens("coherence", "What would you do on a free day?", ""),
    }


def _missing_responses(ctx: StageContext, name: str, rows: Sequence[ChosenScenario]) -> float:
    """The share of the scenarios whose response is in no row cache yet: what is there is not paid for again."""
    from trait_assets.responses.generation import ResponsesStage

    if ctx.force or not rows:
        return 1.0
    options = ResponsesStage().row_options(ctx)
    cache = ctx.workspace.row_cache("generations", name)
    wanted = [fingerprint({**options, "prompt": r.prompt, "system": r.system_prompt}) for r in rows]
    return sum(key not in cache for key in wanted) / len(wanted)


def _past_shares(ctx: StageContext, names: Sequence[str]) -> dict[str, float]:
    """What vetting kept and how long responses were, from the traits of this experiment that are done."""
    kept: dict[str, list[float]] = {"scenarios_kept": [], "responses_kept": [], "response_share": []}
    for name in names:
        for stage, share in (("vetted_scenarios", "scenarios_kept"), ("vetted_responses", "responses_kept")):
            manifest = _manifest(ctx, stage, name)
            summary = manifest.summary if manifest is not None and manifest.status == "done" else {}
            if summary.get("n"):
                kept[share].append(float(summary["n_kept"]) / float(summary["n"]))
        manifest = _manifest(ctx, "responses", name)
        if manifest is not None and manifest.status == "done":
            most = manifest.summary.get("max_new_tokens")
            mean = manifest.summary.get("mean_response_tokens")
            if most and mean:
                kept["response_share"].append(float(mean) / float(most))
    return {share: _mean(values) for share, values in kept.items() if values}


def _manifest(ctx: StageContext, stage: str, name: str) -> Manifest | None:
    try:
        return ctx.workspace.manifests.read(ctx.experiment.name, stage, name)
    except ArtifactError:
        return None


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else 0.0


_SIZE = re.compile(r"(?<![0-9.a-z])([0-9]+(?:\.[0-9]+)?)([bm])(?![a-z0-9])", re.IGNORECASE)


def shape_of(spec: ModelSpec) -> ModelShape:
    """Size and depth of a model: from its config where that is on this machine, else guessed from its name.

    UserError where neither tells.
    """
    config, stored = _config(spec)
    if config:
        text = config.get("text_config") or config
        layers, hidden = text.get("num_hidden_layers"), text.get("hidden_size")
        if isinstance(layers, int) and isinstance(hidden, int):
            heads = int(text.get("num_attention_heads") or 1)
            kv = int(text.get("num_key_value_heads") or heads)
            head = int(text.get("head_dim") or hidden // heads)
            params = stored or _count(text, layers, hidden, heads, kv, head)
            return ModelShape(spec.model, params, layers, hidden, 2.0 * layers * kv * head * 2)
    found = _SIZE.search(spec.model.rsplit("/", 1)[-1].replace("_", "-"))
    if found is None:
        raise UserError(
            "how large it is cannot be told: its config is not on this machine, and its name does not say",
            where=f"model {spec.model!r}",
            remedy="give --model-shape 8b or 70b, or --params 3e9",
        )
    params = float(found[1]) * (1e9 if found[2].lower() == "b" else 1e6)
    return guessed_shape(spec.model, params, f"from the name: {found[0]}")


def guessed_shape(name: str, params: float, how: str) -> ModelShape:
    """A transformer of so many weights in the proportions of the nearest known one: params ≈ 12 · layers · hidden²
    (Kaplan et al. 2020, section 2.1), so both grow with the cube root of the size."""
    near = min(SHAPES.values(), key=lambda shape: abs(params / shape.params - 1))
    scale = (params / near.params) ** (1 / 3)
    layers = max(1, round(near.layers * scale))
    hidden = max(64, round(near.hidden * scale / 64) * 64)
    return replace(
        near,
        name=name,
        params=params,
        layers=layers,
        hidden=hidden,
        kv_bytes=near.kv_bytes * layers / near.layers,
        guessed=how,
    )


def _config(spec: ModelSpec) -> tuple[dict[str, Any] | None, float | None]:
    """(config.json, number of weights from the stored files) without loading or downloading."""
    from resources.models.embedded import PREFIX, converted_folder
    from resources.models.identity import local_path

    if spec.model.startswith(PREFIX):
        folder: Path | None = converted_folder(spec.model)
    else:
        folder = local_path(spec.model) or _snapshot(spec)
    if folder is None or folder.is_file():
        return None, None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, None
    return config, _stored_weights(folder)


def _snapshot(spec: ModelSpec) -> Path | None:
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / f"models--{spec.model.replace('/', '--')}"
    name = spec.revision or "main"
    try:
        commit = (root / "refs" / name).read_text().strip()
    except OSError:
        commit = name
    folder = root / "snapshots" / commit
    return folder if folder.is_dir() else None


def _stored_weights(folder: Path) -> float | None:
    """Weights counted in the headers of the safetensors files, None where they are not all here."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0.0
    for path in files:
        try:
            with path.open("rb") as handle:
                header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        except (OSError, ValueError):
            return None
        for name, entry in header.items():
            if name != "__metadata__":
                count = 1.0
                for size in entry["shape"]:
                    count *= size
                total += count
    return total or None


def _count(text: Mapping[str, Any], layers: int, hidden: int, heads: int, kv: int, head: int) -> float:
    """Weights of a decoder with gated MLPs, from its config."""
    inner = int(text.get("intermediate_size") or 4 * hidden)
    vocabulary = int(text.get("vocab_size") or 32_000)
    attention = hidden * head * (2 * heads + 2 * kv)
    tables = vocabulary * hidden * (1 if text.get("tie_word_embeddings", True) else 2)
    return float(layers * (attention + 3 * hidden * inner) + tables)
