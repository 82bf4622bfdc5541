"""Trying a vector by hand: one prompt, unsteered and steered at a few doses, side by side.

Here: what `traits steer` does. Not here: judging, searching, or claiming anything; nothing is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resources.models.positions import Position
from resources.models.rows import CaptureRow, GenerationOptions, GenerationRow
from storage import keys
from storage.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from resources.models.language_model import LanguageModel
    from trait_assets.pipeline import StageContext
    from trait_assets.steering.dose_search import Candidate

DEFAULT_DOSE = 0.15


@dataclass(frozen=True)
class HandRow:
    """One text. `dose`: ‖added‖ ÷ median ‖h‖, 0 unsteered, negative away from the trait; `coefficient`: the
    length added."""

    dose: float
    coefficient: float
    text: str
    distinct_3: float | None
    finish_reason: str


@dataclass(frozen=True)
class HandResult:
    """What was done, and the texts: unsteered first, then one per dose in the order given.

    `notes`: where defaults came from, for the reader.
    """

    trait: str
    prompt: str
    model: str
    method: str
    layer: int
    position: str
    component: str
    median_norm: float
    rows: tuple[HandRow, ...]
    notes: tuple[str, ...]

    def table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        title = f"{self.trait} on {self.model}: {self.method}, layer {self.layer}"
        table = Table(title=title, title_justify="left", show_lines=True)
        for column in ("dose", "text", "distinct 3-grams"):
            table.add_column(column, overflow="fold")
        for row in self.rows:
            dose = "unsteered" if row.dose == 0 else f"{row.dose:+g}"
            variety = "–" if row.distinct_3 is None else f"{row.distinct_3:.2f}"
            # a model's text may hold what looks like markup
            table.add_row(dose, Text(row.text.strip()), variety)
        return table


def steer_by_hand(
    ctx: StageContext,
    trait: str,
    prompt: str,
    *,
    doses: Sequence[float] | None = None,
    layer: int | None = None,
    method: str | None = None,
    position: str | None = None,
    component: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
) -> HandResult:
    """Generate `prompt` unsteered and at each dose, in one batch.

    What is left out comes from the trait's steering result (its best setting), else from stage 4's best
    vector, at dose 0.15. A dose is relative to the median ‖h‖ of the steering result, or else to that of the
    unsteered answer to this very prompt. Raises `UserError` for a trait without vectors, for doses that are
    not finite or beyond 5, and for a vector that does not fit the steered model.
    """
    from trait_assets.steering.evaluation import check_fit, model_record, uses_chat
    from trait_assets.steering.scoring import distinct_ngrams

    if not prompt.strip():
        raise UserError(
            "the prompt is empty", where="prompt", remedy='write e.g. traits steer … "How are you?"'
        )
    notes: list[str] = []
    known = _defaults(ctx, trait, notes)
    wanted = {
        "method": method or known.get("best_method"),
        "layer": layer if layer is not None else known.get("best_layer"),
        "position": position or known.get("best_position") or ctx.experiment.positions[0],
        "component": component or known.get("best_component") or ctx.experiment.component[0],
    }
    given = list(doses) if doses else [abs(known.get("best_dose") or DEFAULT_DOSE)]
    for dose in given:
        if not abs(dose) <= 5:
            raise UserError(
                f"dose {dose} is out of range", where="--dose", remedy="use a relative dose from -5 to 5"
            )
    candidate = _candidate(ctx, trait, wanted)
    model = ctx.application_model()
    check_fit([candidate], model, trait)
    options = GenerationOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, seed=ctx.experiment.seed
    )
    ids = model.encode(prompt, system, chat=uses_chat(ctx.experiment.steer.chat, model)).ids
    plain = next(iter(model.generate([GenerationRow("plain", ids, seed_key="hand")], options)))
    norm = _stored_norm(ctx, trait, candidate, model_record(model))
    if norm is None:
        norm = _norm(model, ids, plain.ids, candidate.layer)
        notes.append("the dose is relative to the median ‖h‖ of the unsteered answer to this prompt")
    rows = [HandRow(0.0, 0.0, plain.text, distinct_ngrams(plain.ids), plain.finish_reason)]
    steered = {}
    requests = []
    for number, dose in enumerate(given):
        coefficient = float(f"{dose * norm:.6g}")
        intervention = _intervention(candidate, coefficient, ctx.experiment.steer.operation)
        requests.append(GenerationRow(str(number), ids, (intervention,), seed_key="hand"))
        steered[str(number)] = (dose, coefficient)
    texts = {r.key: r for r in model.generate(requests, options, steer_from=ctx.experiment.steer.steer_from)}
    for key, (dose, coefficient) in steered.items():
        row = texts[key]
        rows.append(HandRow(dose, coefficient, row.text, distinct_ngrams(row.ids), row.finish_reason))
    return HandResult(
        trait=trait,
        prompt=prompt,
        model=model.identity.model,
        method=candidate.method,
        layer=candidate.layer,
        position=candidate.position,
        component=candidate.component,
        median_norm=norm,
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _defaults(ctx: StageContext, trait: str, notes: list[str]) -> dict[str, Any]:
    manifests = ctx.workspace.manifests
    steered = manifests.read(ctx.experiment.name, "steering_results", trait)
    if steered is not None and steered.status == "done" and steered.summary.get("best_layer") is not None:
        state = "validated" if steered.summary.get("validated") else "not validated"
        notes.append(f"method, layer and dose are those of the steering result ({state}) unless given")
        return dict(steered.summary)
    evaluated = manifests.read(ctx.experiment.name, "vector_evaluation", trait)
    if evaluated is not None and evaluated.summary.get("best_layer") is not None:
        notes.append("method and layer are those that separate best (never steered yet) unless given")
        return dict(evaluated.summary)
    return {}


def _candidate(ctx: StageContext, trait: str, wanted: dict[str, Any]) -> Candidate:
    from trait_assets.steering.candidates import Directions, Scored

    if wanted["method"] is None or wanted["layer"] is None:
        raise UserError(
            f"{trait} has neither a steering result nor an evaluation in {ctx.experiment.name}",
            where="traits steer",
            remedy="run the experiment first, or give --method and --layer",
        )
    Position.parse(wanted["position"])
    chosen = Scored(int(wanted["layer"]), wanted["method"], wanted["position"], wanted["component"])
    return Directions(ctx.workspace, ctx.experiment.name, trait).candidates([chosen])[0]


def _stored_norm(ctx: StageContext, trait: str, candidate: Candidate, record: dict[str, Any]) -> float | None:
    folder = Position.parse(candidate.position).folder
    key = keys.steering(ctx.experiment.name, trait, folder, "results.json")
    if not ctx.workspace.store.exists(key):
        return None
    stored = ctx.workspace.store.read_json(key)
    same = stored.get("application_model") == {k: v for k, v in record.items() if k != "runs_in"}
    norms = stored.get("median_norm") or []
    return float(norms[candidate.layer]) if same and candidate.layer < len(norms) else None


def _norm(model: LanguageModel, prompt_ids: tuple[int, ...], answer: tuple[int, ...], layer: int) -> float:
    """Median ‖h‖ of prompt and answer at one layer, token 0 left out."""
    captured = next(iter(model.capture([CaptureRow("hand", prompt_ids, answer)], ["all[:]"], layers=[layer])))
    norm = float(captured.norms[0])
    if not norm > 0:
        raise UserError(
            "the prompt is too short to measure ‖h‖", where="prompt", remedy="write a longer prompt"
        )
    return norm


def _intervention(candidate: Candidate, coefficient: float, operation: Any) -> Any:
    from resources.models.rows import Intervention

    return Intervention(candidate.layer, candidate.direction, coefficient, operation, candidate.component)
