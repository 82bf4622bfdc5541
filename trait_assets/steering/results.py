"""What a finished search looks like on disk, in tables, in metrics and in the UI.

Here: plain records made from a `SearchResult`. Not here: searching, scoring, storing, drawing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trait_assets.pipeline import Check
from trait_assets.steering.dose_search import Run, SearchResult, random_bar
from trait_assets.steering.scoring import Half, allowed_abstentions

SAMPLES = 4
SAMPLE_CHARACTERS = 400


def all_runs(result: SearchResult) -> list[Run]:
    """Every measured setting, the unsteered ones first."""
    halves: tuple[Half, ...] = ("search", "report")
    return [result.baseline[half] for half in halves if half in result.baseline] + result.runs


def results_record(result: SearchResult, position: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """results.json of one position. `source`: what was steered with what (models, judge, options, norms).

    `runs` are those of this position; runs of no position (unsteered, prompting) are in every file. `best`
    names the chosen setting with its report-half numbers, also when it lies at another position.
    """
    task = result.task
    return {
        **source,
        "trait": task.trait,
        "position": position,
        "direction": task.questions.direction,
        "questions": {
            "search": [task.questions.texts[i] for i in task.questions.search],
            "report": [task.questions.texts[i] for i in task.questions.report],
            "split": task.questions.split,
        },
        "baseline": {half: run.measured.record() for half, run in result.baseline.items()},
        "runs": [
            {
                "kind": run.setting.kind,
                "name": run.setting.name,
                "half": run.half,
                "config": run.setting.record(),
                "result": run.measured.record(),
            }
            for run in result.runs
            if run.setting.position in (None, position)
        ],
        "best": _best(result),
        "candidates_dropped": result.dropped,
        "validated": result.verdict.validated,
        "reason": result.verdict.reason,
        "flags": list(result.flags),
    }


def _best(result: SearchResult) -> dict[str, Any] | None:
    if result.best is None:
        return None
    setting = result.best.setting
    return {
        "layer": setting.layers[0],
        "method": setting.methods[0],
        "position": setting.position,
        "component": setting.component,
        "dose": setting.doses[0],
        "coefficient": setting.coefficients[0],
        "chosen_on": result.best.measured.record(),
        "reported": result.report.measured.record() if result.report else None,
        "random": [run.measured.record() for run in result.controls],
        "prompting": result.prompting.measured.record() if result.prompting else None,
    }


def generation_rows(result: SearchResult, position: str | None = None) -> list[dict[str, Any]]:
    """One row per answer, for people: question, text, scores, and the reason where a score is missing."""
    rows = []
    for run in all_runs(result):
        if position is not None and run.setting.position not in (None, position):
            continue
        setting = run.setting
        for answer in run.answers:
            reasons = [r for r in (answer.trait_reason, answer.coherence_reason) if r]
            rows.append(
                {
                    "kind": setting.kind,
                    "name": setting.name,
                    "half": run.half,
                    "position": setting.position,
                    "component": setting.component,
                    "method": "+".join(setting.methods) or None,
                    "layer": setting.layers[0] if len(setting.layers) == 1 else None,
                    "layers": list(setting.layers),
                    "dose": setting.doses[0] if len(setting.doses) == 1 else None,
                    "coefficient": setting.coefficients[0] if len(setting.coefficients) == 1 else None,
                    "question_index": answer.question,
                    "question": result.task.questions.texts[answer.question],
                    "response": answer.text,
                    "trait_score": answer.trait,
                    "coherence_score": answer.coherence,
                    "distinct_3": answer.distinct_3,
                    "abstained": "; ".join(dict.fromkeys(reasons)) or None,
                    "finish_reason": answer.finish_reason,
                    "tokens": len(answer.ids),
                    "judged": dict(answer.detail),
                }
            )
    return rows


def metric_rows(result: SearchResult) -> list[dict[str, Any]]:
    """Rows of the index: one per setting and half, one per answer."""
    rows: list[dict[str, Any]] = []
    for run in all_runs(result):
        setting, numbers = run.setting, run.measured
        single = len(setting.layers) == 1
        rows.append(
            {
                "table": "steering_runs",
                "kind": setting.kind,
                "name": setting.name,
                "half": run.half,
                "position": setting.position,
                "component": setting.component,
                "method": "+".join(setting.methods) or None,
                "layer": setting.layers[0] if single else None,
                "dose": setting.doses[0] if single else None,
                "coefficient": setting.coefficients[0] if single else None,
                "n": numbers.n,
                "trait_mean": numbers.trait_mean,
                "coherence_mean": numbers.coherence_mean,
                "change": numbers.change.mean,
                "change_low": numbers.change.low,
                "change_high": numbers.change.high,
                "wrong_way": numbers.change.wrong_way,
                "best": run is result.report,
                "validated": result.verdict.validated if run is result.report else None,
                "distinct_3": numbers.distinct_3,
                "success_rate": numbers.success_rate,
                "abstentions": numbers.abstentions,
            }
        )
    for row in generation_rows(result):
        kept = {k: v for k, v in row.items() if k not in ("layers", "judged")}
        rows.append({"table": "generations", **kept})
    return rows


def summary(result: SearchResult, *, judge: str, stand_in: bool) -> dict[str, Any]:
    """The numbers that stand first, all of the report half; None where nothing was coherent."""
    best, report = result.best, result.report
    numbers = report.measured if report else None
    change = numbers.change if numbers else None
    sign = result.task.sign
    random = [c.measured.change for c in result.controls]
    means = [c.mean for c in random if c.mean is not None]
    far = [(c.high if sign > 0 else c.low) for c in random]
    ends = [e for e in far if e is not None]
    prompting = result.prompting.measured if result.prompting else None
    combination = result.combination.measured if result.combination else None
    found: dict[str, Any] = {
        "validated": result.verdict.validated,
        "reason": result.verdict.reason,
        "direction": result.task.questions.direction,
        "best_method": best.setting.methods[0] if best else None,
        "best_layer": best.setting.layers[0] if best else None,
        "best_position": best.setting.position if best else None,
        "best_component": best.setting.component if best else None,
        "best_dose": best.setting.doses[0] if best else None,
        "best_coefficient": best.setting.coefficients[0] if best else None,
        "baseline_trait": result.baseline["report"].measured.trait_mean,
        "steered_trait": numbers.trait_mean if numbers else None,
        "change": change.mean if change else None,
        "change_low": change.low if change else None,
        "change_high": change.high if change else None,
        "search_change": best.measured.change.mean if best else None,
        "coherence": numbers.coherence_mean if numbers else None,
        "baseline_coherence": result.baseline["report"].measured.coherence_mean,
        "distinct_3": numbers.distinct_3 if numbers else None,
        "success_rate": numbers.success_rate if numbers else None,
        "wrong_way_fraction": change.wrong_way if change else None,
        "random_change": sum(means) / len(means) if means else None,
        "random_change_high": (max(ends) if sign > 0 else min(ends)) if ends else None,
        "random_bar": random_bar([m * sign for m in means]) * sign if means else None,
        "over_random": result.over_random,
        "prompting_change": prompting.change.mean if prompting else None,
        "prompting_coherence": prompting.coherence_mean if prompting else None,
        "n_search": len(result.task.questions.search),
        "n_report": len(result.task.questions.report),
        "abstentions": sum(run.measured.abstentions for run in all_runs(result)),
        "judge": judge,
        "judge_is_stand_in": stand_in,
    }
    if combination is not None:
        found["combination_change"] = combination.change.mean
        found["combination_coherence"] = combination.coherence_mean
    if result.flags:
        found["flags"] = "; ".join(result.flags)
    return found


def checks(result: SearchResult, threshold: float) -> list[Check]:
    report = result.report
    coherence = report.measured.coherence_mean if report else None
    n = sum(run.measured.n for run in all_runs(result))
    missed = sum(run.measured.abstentions for run in all_runs(result))
    random = [c.measured.change.mean for c in result.controls if c.measured.change.mean is not None]
    return [
        Check("validated", result.verdict.validated, result.verdict.reason),
        Check(
            "coherent",
            coherence is not None and coherence >= threshold,
            "no dose was coherent"
            if coherence is None
            else f"steered answers have coherence {coherence:.0f} on the report half, needed {threshold:g}",
            values={"coherence": coherence},
        ),
        Check(
            "more_than_random",
            bool(random) and result.over_random is not None and result.over_random > 0,
            "no random direction was measured"
            if not random
            else f"{result.over_random or 0.0:+.1f} points beyond {len(random)} random directions",
            values={"over_random": result.over_random},
        ),
        Check(
            "abstention_rate",
            missed <= allowed_abstentions(n),
            f"the judge abstained on {missed} of {n} answers",
            values={"abstentions": missed, "answers": n},
        ),
        Check(
            "questions_split",
            result.task.questions.split,
            "search and report use different questions"
            if result.task.questions.split
            else "too few questions: search and report share them",
        ),
    ]


def run_table(result: SearchResult) -> list[dict[str, Any]]:
    """Settings of the report half, and the best dose of each candidate on the search half."""
    shown = [result.baseline["report"], *[r for r in result.runs if r.half == "report"]]
    best: dict[str, Run] = {}
    for run in result.runs:
        if run.half == "search" and run.candidate is not None and run.setting.kind == "vector":
            known = best.get(run.candidate.name)
            key = (run.measured.coherent(0), run.effect(result.task.sign) or 0.0)
            if known is None or key > (known.measured.coherent(0), known.effect(result.task.sign) or 0.0):
                best[run.candidate.name] = run
    return [_table_row(run) for run in [*shown, *best.values()]]


def _table_row(run: Run) -> dict[str, Any]:
    setting, numbers = run.setting, run.measured
    return {
        "half": run.half,
        "what": setting.kind,
        "method": "+".join(setting.methods),
        "layer": "+".join(map(str, setting.layers)),
        "dose": "+".join(f"{d:g}" for d in setting.doses),
        "trait": _rounded(numbers.trait_mean),
        "change": _rounded(numbers.change.mean),
        "low": _rounded(numbers.change.low),
        "high": _rounded(numbers.change.high),
        "coherence": _rounded(numbers.coherence_mean),
        "distinct 3-grams": _rounded(numbers.distinct_3, 2),
        "wrong way": _rounded(numbers.change.wrong_way, 2),
        "n": numbers.n,
    }


def samples(result: SearchResult, n: int = SAMPLES) -> list[dict[str, Any]]:
    """Unsteered and steered answers side by side: the questions of the report half, in order."""
    if result.report is None:
        return []
    before = {a.question: a for a in result.baseline["report"].answers}
    rows = []
    for answer in result.report.answers[:n]:
        plain = before[answer.question]
        rows.append(
            {
                "question": result.task.questions.texts[answer.question],
                "unsteered": plain.text.strip()[:SAMPLE_CHARACTERS],
                "steered": answer.text.strip()[:SAMPLE_CHARACTERS],
                "trait before": _rounded(plain.trait, 0),
                "trait after": _rounded(answer.trait, 0),
                "coherence after": _rounded(answer.coherence, 0),
            }
        )
    return rows


def dose_points(result: SearchResult) -> list[dict[str, Any]]:
    """Numbers of the dose–response picture: every measured setting of one layer, with its interval."""
    return [
        {
            "half": run.half,
            "kind": run.setting.kind,
            "name": run.candidate.name if run.candidate else run.setting.kind,
            "method": run.setting.methods[0],
            "layer": run.setting.layers[0],
            "dose": abs(run.setting.doses[0]),
            "trait": run.measured.trait_mean,
            "change": run.measured.change.mean,
            "low": run.measured.change.low,
            "high": run.measured.change.high,
            "coherence": run.measured.coherence_mean,
        }
        for run in result.runs
        if len(run.setting.layers) == 1
    ]


def _rounded(value: float | None, digits: int = 1) -> float | None:
    return None if value is None else round(float(value), digits)


def positions_of(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(r.setting.position for r in runs if r.setting.position is not None))
