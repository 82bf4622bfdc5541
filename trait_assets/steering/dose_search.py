"""The search for layer, method and dose: which settings to try next, when to stop, what to report.

Here: the plan of one trait's search as a generator that asks for settings and is sent their answers, and the
driver that runs the searches of many traits side by side, so that the rows of all of them share one
generation. Not here: generating, judging (scoring.py), reading vectors (candidates.py), files
(evaluation.py).

The dose of a setting is relative: r = ‖added‖ ÷ median ‖h‖ of the steered model at that layer. The steps:

1. ladder: the coarse doses in rising order, all candidates of a rung in one batch. A candidate that fell
   below the coherence threshold is not driven higher; one whose effect, extrapolated in proportion to the
   largest dose, stays below what the leader has shown already is dropped;
2. refine: the most promising candidates are bisected between their largest coherent and smallest incoherent
   dose, or driven beyond the ladder while they stay coherent;
3. choose: the largest change among the coherent settings, by the search half alone;
4. report: the chosen setting, norm-matched random directions and the prompting baseline on the report half.
   Should fresh questions find the chosen dose incoherent after all, the next smaller dose is reported in its
   place, and a flag says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resources.models.rows import Intervention, Operation
from trait_assets.steering.scoring import (
    BASELINE,
    PROMPTING,
    Answer,
    Answers,
    Half,
    Kind,
    Measured,
    Request,
    Setting,
    Task,
    allowed_abstentions,
    measure,
)

# one-sided 95 %: how sure we want to be that a dropped candidate could not have won
DROP_Z = 1.64
# how far beyond the top of the ladder a still coherent candidate may be driven
BEYOND_LADDER = 2.0
STEP_UP = 1.4
# brackets narrower than this share of the dose are not worth a measurement
NARROW = 0.08
# how sure a chosen dose is to be coherent on fresh questions, one-sided, by a t bound on the mean over
# questions
COHERENCE_CONFIDENCE = 0.9
# on the report half: how often, and how far at least, to step down from a dose that proved incoherent
STEPS_DOWN = 2
DOWN_TO = 0.85


@dataclass(frozen=True, eq=False)
class Candidate:
    """A direction at a site. `direction`: [hidden] float32 unit vector pointing towards the trait; `rank`:
    place in the shortlist (0 first); `info`: the held-out numbers that put it there."""

    layer: int
    method: str
    position: str
    component: str
    direction: np.ndarray
    rank: int = 0
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method}|{self.layer}|{self.position}|{self.component}"


@dataclass(frozen=True)
class SearchOptions:
    """See `trait_assets.experiments.SteeringOptions`, whose fields these are."""

    doses: tuple[float, ...] = (0.06, 0.12, 0.18, 0.26)
    refine_steps: int = 2
    refine_top: int = 3
    coherence_threshold: float = 70.0
    controls: int = 5
    prompting: bool = True
    multi_layer: bool = False
    operation: Operation = "add"
    bootstrap: int = 2000
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Run:
    """One setting on one half: its numbers and the answers they were made from."""

    setting: Setting
    half: Half
    measured: Measured
    answers: tuple[Answer, ...]
    candidate: Candidate | None = None

    @property
    def dose(self) -> float:
        return self.setting.doses[0] if self.setting.doses else 0.0

    def effect(self, sign: int) -> float | None:
        mean = self.measured.change.mean
        return None if mean is None else mean * sign


@dataclass(frozen=True)
class Verdict:
    """Whether the vector is validated, and the one sentence that says why or why not."""

    validated: bool
    reason: str


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Everything that one trait's search found. `best` is the chosen setting on the search half, `report` the
    same setting on the report half; both are None when no dose of any candidate was coherent."""

    task: Task
    baseline: dict[Half, Run]
    runs: list[Run]
    best: Run | None
    report: Run | None
    controls: list[Run]
    prompting: Run | None
    combination: Run | None
    verdict: Verdict
    flags: tuple[str, ...]
    dropped: dict[str, str]

    @property
    def over_random(self) -> float | None:
        """Mean change of the vector less that of the random directions, towards the wanted side."""
        if self.report is None or self.report.measured.change.mean is None:
            return None
        random = [c.measured.change.mean for c in self.controls if c.measured.change.mean is not None]
        if not random:
            return None
        return (self.report.measured.change.mean - float(np.mean(random))) * self.task.sign


# (layer, component) → median ‖h‖ of the steered model at that layer
NormOf = Callable[[int], float]
Search = Generator[list[Request], Answers, SearchResult]


def search(
    task: Task,
    candidates: Sequence[Candidate],
    baseline: Mapping[Half, Sequence[Answer]],
    norm_of: NormOf,
    options: SearchOptions,
) -> Search:
    """One trait's search: yields requests, is sent their answers, returns the `SearchResult`.

    `baseline`: the unsteered answers of both halves; `norm_of(layer)`: median ‖h‖ there. Deterministic: the
    same answers lead to the same requests.
    """
    plan = _Plan(task, baseline, norm_of, options)
    ladder = yield from _ladder(plan, candidates)
    yield from _refine(plan, ladder)
    best = plan.choose(plan.vector_runs("search"))
    combination = None
    if options.multi_layer:
        combination = yield from _combine(plan)
    best, report, controls, prompting, combined = yield from _report(plan, best, combination)
    verdict = judge_result(plan, best, report, controls)
    return SearchResult(
        task=task,
        baseline=plan.baseline,
        runs=plan.runs,
        best=best,
        report=report,
        controls=controls,
        prompting=prompting,
        combination=combined,
        verdict=verdict,
        flags=tuple(plan.flags(report)),
        dropped=dict(plan.dropped),
    )


class _Plan:
    """What has been measured so far, and how settings are made."""

    def __init__(
        self, task: Task, baseline: Mapping[Half, Sequence[Answer]], norm_of: NormOf, options: SearchOptions
    ) -> None:
        self.task = task
        self.options = options
        self.norm_of = norm_of
        self.runs: list[Run] = []
        self.dropped: dict[str, str] = {}
        self.notes: list[str] = []
        self.baseline: dict[Half, Run] = {}
        for half, answers in baseline.items():
            self.baseline[half] = Run(BASELINE, half, self._measure(answers, answers), tuple(answers))

    def _measure(self, answers: Sequence[Answer], baseline: Sequence[Answer]) -> Measured:
        return measure(
            answers, baseline, sign=self.task.sign, draws=self.options.bootstrap, seed=self.options.seed
        )

    def setting(self, candidate: Candidate, dose: float) -> Setting:
        return make_setting(
            "vector",
            f"{candidate.name}|{dose:.4g}",
            [(candidate, dose)],
            sign=self.task.sign,
            norm_of=self.norm_of,
            operation=self.options.operation,
        )

    def ask(
        self, settings: Sequence[tuple[Setting, Candidate | None]], half: Half
    ) -> Generator[list[Request], Answers, list[Run]]:
        """Measures settings on a half and keeps the runs."""
        if not settings:
            return []
        answers = yield [Request(setting, half) for setting, _ in settings]
        made = []
        for setting, candidate in settings:
            given = answers[setting.name, half]
            measured = self._measure(given, self.baseline[half].answers)
            made.append(Run(setting, half, measured, tuple(given), candidate))
        self.runs.extend(made)
        return made

    def vector_runs(self, half: Half) -> list[Run]:
        return [r for r in self.runs if r.half == half and r.setting.kind == "vector"]

    def of(self, candidate: Candidate | None) -> list[Run]:
        """Runs of one candidate on the search half, by rising dose."""
        runs = [r for r in self.vector_runs("search") if r.candidate is candidate]
        return sorted(runs, key=lambda r: abs(r.dose))

    def coherent(self, run: Run, *, confidence: float | None = None) -> bool:
        return run.measured.coherent(self.options.coherence_threshold, confidence=confidence)

    def effect(self, run: Run) -> float:
        effect = run.effect(self.task.sign)
        return -np.inf if effect is None else effect

    def choose(self, runs: Sequence[Run]) -> Run | None:
        """Largest effect among the coherent runs; those that are surely coherent go first, if one of them has
        an effect. Ties go to the more coherent, then the smaller dose, then the better rank."""
        for confidence in (COHERENCE_CONFIDENCE, None):
            fit = [r for r in runs if self.coherent(r, confidence=confidence) and np.isfinite(self.effect(r))]
            if fit and (confidence is None or max(map(self.effect, fit)) > 0):
                return max(fit, key=self._worth)
        return None

    def _worth(self, run: Run) -> tuple[float, float, float, float]:
        rank = run.candidate.rank if run.candidate else 0
        return self.effect(run), run.measured.coherence_mean or 0.0, -abs(run.dose), -float(rank)

    def flags(self, report: Run | None) -> Iterator[str]:
        yield from self.task.questions.flags
        yield from self.notes
        for half, run in self.baseline.items():
            mean = run.measured.coherence_mean
            if mean is None or mean < self.options.coherence_threshold:
                shown = "no score" if mean is None else f"{mean:.0f}"
                said = f"unsteered answers ({half} half) have coherence {shown}"
                yield f"{said}: steering cannot meet the threshold"
            if run.measured.abstentions > allowed_abstentions(run.measured.n):
                missed = f"{run.measured.abstentions} of {run.measured.n}"
                yield f"the judge abstained on {missed} unsteered answers ({half} half)"
        if report is not None and report.measured.distinct_3 is not None and report.measured.distinct_3 < 0.6:
            yield f"steered answers repeat themselves: {report.measured.distinct_3:.2f} distinct 3-grams"


def make_setting(
    kind: Kind,
    name: str,
    parts: Sequence[tuple[Candidate, float]],
    *,
    sign: int,
    norm_of: NormOf,
    operation: Operation = "add",
) -> Setting:
    """A setting from candidates with their relative doses (positive numbers; `sign` decides the side).

    Coefficients are kept to 6 significant digits, so that the same dose on the same model is the same row.
    """
    interventions, doses, coefficients = [], [], []
    for candidate, dose in parts:
        signed = dose * sign
        coefficient = float(f"{signed * norm_of(candidate.layer):.6g}")
        interventions.append(
            Intervention(candidate.layer, candidate.direction, coefficient, operation, candidate.component)
        )
        doses.append(float(f"{signed:.6g}"))
        coefficients.append(coefficient)
    first = parts[0][0]
    return Setting(
        kind=kind,
        name=name,
        interventions=tuple(interventions),
        layers=tuple(c.layer for c, _ in parts),
        methods=tuple(c.method for c, _ in parts),
        doses=tuple(doses),
        coefficients=tuple(coefficients),
        position=first.position,
        component=first.component,
    )


# --- the steps ----------------------------------------------------------------------------------------------


def _ladder(
    plan: _Plan, candidates: Sequence[Candidate]
) -> Generator[list[Request], Answers, list[Candidate]]:
    """Coarse doses in rising order; returns the candidates that were not dropped as hopeless."""
    doses = sorted(plan.options.doses)
    alive = list(candidates)
    hopeless: set[str] = set()
    for dose in doses:
        if not alive:
            break
        yield from plan.ask([(plan.setting(c, dose), c) for c in alive], "search")
        climbing = []
        for candidate in alive:
            last = plan.of(candidate)[-1]
            if not plan.coherent(last):
                plan.dropped.setdefault(candidate.name, f"incoherent at dose {dose:g}")
                continue
            climbing.append(candidate)
        alive = climbing
        if dose != doses[-1]:
            for candidate in _hopeless(plan, alive, doses[-1]):
                plan.dropped[candidate.name] = f"effect too small by dose {dose:g} to reach the leader"
                hopeless.add(candidate.name)
            alive = [c for c in alive if c.name not in hopeless]
    return [c for c in candidates if c.name not in hopeless]


def _hopeless(plan: _Plan, alive: Sequence[Candidate], top: float) -> list[Candidate]:
    """Candidates whose upper bound, grown in proportion to the largest dose, stays below the leader's lower
    bound.

    Effects of addition grow about in proportion to the dose before they level off, so proportion is the kind
    assumption.
    """
    bounds = [
        (plan.effect(r), _spread(r))
        for r in plan.vector_runs("search")
        if plan.coherent(r) and _spread(r) is not None
    ]
    if not bounds:
        return []
    leader = max(effect - DROP_Z * (spread or 0.0) for effect, spread in bounds)
    if leader <= 0:
        return []
    out = []
    for candidate in alive:
        last = plan.of(candidate)[-1]
        spread = _spread(last)
        if spread is None:
            continue
        upper = (plan.effect(last) + DROP_Z * spread) * (top / abs(last.dose))
        if upper < leader:
            out.append(candidate)
    return out


def _spread(run: Run) -> float | None:
    """Standard error of the paired change; None below 3 pairs, where it says nothing."""
    differences = run.measured.change.differences
    if len(differences) < 3:
        return None
    return float(np.std(differences, ddof=1) / np.sqrt(len(differences)))


def _refine(plan: _Plan, candidates: Sequence[Candidate]) -> Generator[list[Request], Answers, None]:
    """Bisects the brackets of the most promising candidates, all of one step in one batch."""
    for _ in range(plan.options.refine_steps):
        promising = sorted(candidates, key=lambda c: _promise(plan, c), reverse=True)[
            : plan.options.refine_top
        ]
        settings: list[tuple[Setting, Candidate | None]] = []
        for candidate in promising:
            dose = next_dose(
                [(abs(r.dose), plan.coherent(r), plan.effect(r)) for r in plan.of(candidate)],
                plan.options.doses,
            )
            if dose is not None:
                settings.append((plan.setting(candidate, dose), candidate))
        if not settings:
            return
        yield from plan.ask(settings, "search")


def _promise(plan: _Plan, candidate: Candidate) -> tuple[int, float, float]:
    """Candidates with a coherent dose by their best effect; behind them those that were never coherent."""
    runs = plan.of(candidate)
    fit = [plan.effect(r) for r in runs if plan.coherent(r)]
    if fit:
        return 1, max(fit), -float(candidate.rank)
    return 0, max((plan.effect(r) for r in runs), default=-np.inf), -float(candidate.rank)


def next_dose(tried: Sequence[tuple[float, bool, float]], ladder: Sequence[float]) -> float | None:
    """Where to look next for one candidate: (dose, coherent, effect) tried so far, by rising dose.

    The middle of the bracket between the largest coherent and the smallest incoherent dose above it; a step
    up when everything was coherent; None when the bracket is narrow, the ceiling is reached, or the effect
    has passed its peak (then larger doses only cost coherence).
    """
    if not tried:
        return None
    fit = [(dose, effect) for dose, coherent, effect in tried if coherent]
    low = max((dose for dose, _ in fit), default=0.0)
    high = min((dose for dose, coherent, _ in tried if not coherent and dose > low), default=None)
    if len(fit) >= 2:
        best_dose, best_effect = max(fit, key=lambda pair: pair[1])
        at_low = next(effect for dose, effect in fit if dose == low)
        # half of the best is well past the peak, not noise
        if best_dose < low and at_low < 0.5 * best_effect:
            return None
    if high is None:
        dose = low * STEP_UP
        return round(dose, 4) if dose <= max(ladder) * BEYOND_LADDER else None
    if high - low < NARROW * high:
        return None
    return round((low + high) / 2, 4)


# several layers at once: shares of the summed single-layer doses
COMBINATION_SCALES = (0.5, 0.75, 1.0)
COMBINATION_LAYERS = 3


def _combine(plan: _Plan) -> Generator[list[Request], Answers, Run | None]:
    """Several layers at once, each weighted by its single-layer effect: dose_ℓ = scale · dose*_ℓ · Δ_ℓ ÷ ΣΔ ·
    n.

    dose*_ℓ is the layer's best coherent dose and Δ_ℓ its effect there, over the best candidate of each of the
    most effective layers; scale 1/n would split one layer's dose among them. Returns the best coherent run,
    if any.
    """
    per_layer: dict[int, Run] = {}
    for run in plan.vector_runs("search"):
        layer = run.setting.layers[0]
        if plan.coherent(run) and plan.effect(run) > 0:
            known = per_layer.get(layer)
            if known is None or plan.effect(run) > plan.effect(known):
                per_layer[layer] = run
    chosen = sorted(per_layer.values(), key=plan.effect, reverse=True)[:COMBINATION_LAYERS]
    if len(chosen) < 2:
        plan.dropped["combination"] = "fewer than two layers had a coherent effect"
        return None
    total = sum(plan.effect(r) for r in chosen)
    settings: list[tuple[Setting, Candidate | None]] = []
    for scale in COMBINATION_SCALES:
        parts = []
        for run in sorted(chosen, key=lambda r: r.setting.layers[0]):
            assert run.candidate is not None
            parts.append((run.candidate, scale * abs(run.dose) * plan.effect(run) / total))
        name = "combination|" + ",".join(str(c.layer) for c, _ in parts) + f"|{scale:g}"
        settings.append(
            (
                make_setting(
                    "combination",
                    name,
                    parts,
                    sign=plan.task.sign,
                    norm_of=plan.norm_of,
                    operation=plan.options.operation,
                ),
                None,
            )
        )
    runs = yield from plan.ask(settings, "search")
    return plan.choose(runs)


def _report(
    plan: _Plan, best: Run | None, combination: Run | None
) -> Generator[list[Request], Answers, tuple[Run | None, Run | None, list[Run], Run | None, Run | None]]:
    """The chosen setting, its controls, the prompting baseline and the combination on the report half, in one
    batch.

    Returns (chosen on search, same on report, controls, prompting, combination). The step down looks at
    coherence alone, never at the change, so the interval of what is reported keeps its meaning.
    """
    extra: list[tuple[Setting, Candidate | None]] = []
    if plan.options.prompting and plan.task.prompted:
        extra.append((PROMPTING, None))
    if combination is not None:
        extra.append((combination.setting, None))
    settings = [*_beside_controls(plan, best), *extra] if best is not None else extra
    runs = yield from plan.ask(settings, "report")
    prompting = next((r for r in runs if r.setting.kind == "prompting"), None)
    combined = next((r for r in runs if r.setting.kind == "combination"), None)
    for _ in range(STEPS_DOWN):
        report = next((r for r in runs if r.setting.kind == "vector"), None)
        if best is None or report is None or plan.coherent(report):
            break
        lower = plan.choose([r for r in plan.of(best.candidate) if abs(r.dose) <= DOWN_TO * abs(best.dose)])
        if lower is None:
            break
        plan.notes.append(
            f"dose {best.dose:g} was coherent on the search half and not on the report half: "
            f"{lower.dose:g} is reported"
        )
        best = lower
        runs = yield from plan.ask(_beside_controls(plan, best), "report")
    report = next((r for r in runs if r.setting.kind == "vector"), None)
    return best, report, [r for r in runs if r.setting.kind == "random"], prompting, combined


def _beside_controls(plan: _Plan, best: Run) -> list[tuple[Setting, Candidate | None]]:
    """The chosen setting and its norm-matched random directions."""
    assert best.candidate is not None
    settings: list[tuple[Setting, Candidate | None]] = [(best.setting, best.candidate)]
    for control in random_controls(best.candidate, plan.options.controls, plan.task.trait, plan.options.seed):
        made = make_setting(
            "random",
            f"random|{control.rank}|{best.setting.name}",
            [(control, abs(best.dose))],
            sign=plan.task.sign,
            norm_of=plan.norm_of,
            operation=plan.options.operation,
        )
        settings.append((made, control))
    return settings


def random_controls(candidate: Candidate, n: int, trait: str, seed: int) -> list[Candidate]:
    """`n` isotropic unit directions at the candidate's site, seeded by trait, layer and seed."""
    controls = []
    for index in range(n):
        digest = hashlib.sha256(f"random control|{trait}|{candidate.layer}|{seed}|{index}".encode()).digest()
        direction = np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal(
            len(candidate.direction)
        )
        direction = (direction / np.linalg.norm(direction)).astype(np.float32)
        controls.append(
            Candidate(
                candidate.layer, f"random_{index}", candidate.position, candidate.component, direction, index
            )
        )
    return controls


def judge_result(plan: _Plan, best: Run | None, report: Run | None, controls: Sequence[Run]) -> Verdict:
    """Validated: on questions that chose nothing, the 95 % interval of the change clears zero and the mean
    change of every random direction, at a mean coherence at or above the threshold, with few abstentions."""
    threshold = plan.options.coherence_threshold
    sign = plan.task.sign
    if best is None or report is None:
        return Verdict(False, f"no dose of any candidate kept coherence at {threshold:g}")
    change = report.measured.change
    if change.low is None or change.high is None or change.mean is None:
        return Verdict(False, "too few scored answers for an interval")
    near = change.low if sign > 0 else -change.high
    shown = f"change {change.mean:+.1f} [{change.low:+.1f}, {change.high:+.1f}]"
    if near <= 0:
        return Verdict(False, f"{shown} does not clear zero")
    random = [c.measured.change.mean * sign for c in controls if c.measured.change.mean is not None]
    if not random:
        return Verdict(False, f"{shown}, but no random direction was measured beside it")
    if near <= max(random):
        return Verdict(False, f"{shown} does not clear a random direction ({max(random) * sign:+.1f})")
    bar = random_bar(random)
    if change.mean * sign <= bar:
        return Verdict(False, f"{shown} is within what random directions may do (up to {bar * sign:+.1f})")
    coherence = report.measured.coherence_mean
    if report.measured.abstentions > allowed_abstentions(report.measured.n):
        missed = f"{report.measured.abstentions} of {report.measured.n}"
        return Verdict(False, f"{shown}, but the judge abstained on {missed} answers")
    if coherence is None or coherence < threshold:
        said = "unknown" if coherence is None else f"{coherence:.0f}"
        return Verdict(False, f"{shown}, but coherence on the report half is {said}, below {threshold:g}")
    if not plan.task.questions.split:
        return Verdict(False, f"{shown}, but too few questions to report on other ones than the search used")
    return Verdict(True, f"{shown} over {change.n} questions clears zero and {len(random)} random directions")


def random_bar(changes: Sequence[float]) -> float:
    """Upper end of the 95 % prediction interval for the measured change of a further random direction,
    mean + t(0.975, k−1)·s·√(1 + 1/k) over k of them, or the largest of them when that is more. `changes` are
    counted towards the wanted side.

    The bound matters because the vector is the best of many candidates, and the controls are few.
    """
    from scipy import stats

    k = len(changes)
    if k < 2:
        return max(changes)
    spread = float(np.std(changes, ddof=1))
    bound = float(np.mean(changes)) + float(stats.t.ppf(0.975, k - 1)) * spread * float(np.sqrt(1 + 1 / k))
    return max(max(changes), bound)


# --- many traits side by side -------------------------------------------------------------------------------

AnswerAll = Callable[[Mapping[str, tuple[Task, Sequence[Request]]]], Mapping[str, Answers]]


@dataclass(frozen=True)
class Finished:
    """One trait's end: a result, or the error that stopped this trait alone."""

    trait: str
    result: SearchResult | None
    error: BaseException | None = None


def run_together(
    searches: Mapping[str, tuple[Task, Search]],
    answer: AnswerAll,
    *,
    on_rung: Callable[[int, int], None] | None = None,
) -> Iterator[Finished]:
    """Runs searches in step: what all traits ask for next is answered in one call. Yields each trait when it
    ends.

    An error inside one search ends that trait; an error of `answer` (model or judge) is raised.
    `on_rung(settings, rows)` is told what is about to be asked.
    """
    waiting: dict[str, list[Request]] = {}
    for trait, (_, steps) in searches.items():
        ended = _advance(trait, steps, None, waiting)
        if ended is not None:
            yield ended
    while waiting:
        asked = {trait: (searches[trait][0], requests) for trait, requests in waiting.items()}
        if on_rung is not None:
            settings = sum(len(requests) for requests in waiting.values())
            rows = sum(len(task.questions.of(r.half)) for task, requests in asked.values() for r in requests)
            on_rung(settings, rows)
        answers = answer(asked)
        waiting = {}
        for trait in asked:
            ended = _advance(trait, searches[trait][1], answers[trait], waiting)
            if ended is not None:
                yield ended


def _advance(
    trait: str, steps: Search, answers: Answers | None, waiting: dict[str, list[Request]]
) -> Finished | None:
    try:
        waiting[trait] = next(steps) if answers is None else steps.send(answers)
    except StopIteration as stop:
        return Finished(trait, stop.value)
    except Exception as error:
        return Finished(trait, None, error)
    return None
