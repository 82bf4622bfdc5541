"""What the Dagster page of an asset shows of one manifest, and in which order: a sentence, numbers with what they mean,
tables narrow enough for the page, failed checks.

Names are those of the JSON files and of the lineage database, so that what is seen here can be looked up there. Pure: Dagster's
own types, pictures and links do not belong here (`stage.py`), nor does what a stage computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]
Kind = Literal["count", "share", "points", "change", "plain", "text"]

# keeps a number and its percent sign, and an interval, on one line of a narrow column
NO_BREAK = "\u00a0"
PERCENT = f"{NO_BREAK}%"


@dataclass(frozen=True)
class Number:
    """One entry of a stage's summary: what it means, how it is written, and which two entries are its 95 % interval."""

    name: str
    meaning: str
    kind: Kind = "plain"
    interval: tuple[str, str] | None = None
    # the few that are entries of their own, which Dagster plots over partitions and over time
    plotted: bool = False

    def value(self, summary: Row) -> str | None:
        shown = written(summary.get(self.name), self.kind)
        if shown is None or self.interval is None:
            return shown
        low, high = (written(summary.get(name), self.kind) for name in self.interval)
        if low is None or high is None:
            return shown
        return f"{shown} [{low.removesuffix(PERCENT)},{NO_BREAK}{high.removesuffix(PERCENT)}]"


def written(value: Any, kind: Kind) -> str | None:
    """A number as people read it, None where there is none."""
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return None
    if kind == "share":
        return f"{100 * value:.3g}{PERCENT}"
    if kind == "points":
        return f"{value:.1f}"
    if kind == "change":
        # a hyphen would let the line break after it
        return f"{value:+.1f}".replace("-", "−")
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _vetting(what: str, question: str) -> tuple[Number, ...]:
    return (
        Number("n_kept", f"{what} kept", "count", plotted=True),
        Number("n", f"{what} judged", "count"),
        Number(
            "contrast",
            "mean score of positives minus that of negatives, in points of 100; good above 40",
            "points",
            plotted=True,
        ),
        Number("contrast_kept", f"the same over the {what} that were kept", "points"),
        Number("positive_mean", f"mean score of positives; {question}", "points"),
        Number("negative_mean", "mean score of negatives", "points"),
        Number(
            "positive_pass_rate", "share of positives on their side of the threshold", "share", plotted=True
        ),
        Number(
            "negative_pass_rate", "share of negatives on their side of the threshold", "share", plotted=True
        ),
        Number("positive_kept", "positives kept", "count"),
        Number("negative_kept", "negatives kept", "count"),
        Number("n_failed", "on the wrong side of the threshold, left out", "count"),
        Number("positive_failed", "positives among them", "count"),
        Number("negative_failed", "negatives among them", "count"),
        Number("n_excluded_by_pair", "left out because their partner failed", "count"),
        Number("n_scored", "with a score", "count"),
        Number("n_abstained", "the judge gave no score", "count"),
        Number("positive_abstained", "positives among them", "count"),
        Number("negative_abstained", "negatives among them", "count"),
        Number("abstention_rate", "share without a score", "share", plotted=True),
        Number("judge", "who scored", "text"),
        Number(
            "judge_is_stand_in", "a judge fitted on this trait's own scenarios: no claim rests on it", "text"
        ),
        Number("judged_now", "calls in this run; the rest was known", "count"),
    )


# what `metering.summary` adds to every stage that ran something; rows that were known took nothing and are not counted
_WORK = (
    Number("tokens_per_second", "tokens through the model per second in this run", plotted=True),
    Number("rows_per_second", "rows through the model per second"),
    Number("gpu_peak_gib", "most GPU memory held, GiB", plotted=True),
    Number("judge_tokens", "tokens sent to the judge and received in this run", "count"),
    Number("judge_cost_usd", "US dollars paid to the judge in this run"),
)

_ACCURACY = "of held-out rows on the right side of the threshold fitted on train [95 %]; good from 90 %"

# stage → its numbers, in reading order. A test keeps this equal to what the stages record.
NUMBERS: dict[str, tuple[Number, ...]] = {
    "scenarios": (
        Number("positives", "scenarios that show the trait", "count", plotted=True),
        Number("negatives", "scenarios that do not", "count", plotted=True),
        Number("paired", "line n of both files belongs together", "text"),
        Number("system_prompts", "scenarios with a system prompt", "count"),
        Number("steering_questions", "questions for the steering stage", "count", plotted=True),
        Number("lint_errors", "findings that make the set unusable", "count"),
        Number("lint_warnings", "findings to look at", "count", plotted=True),
        Number("lint_infos", "remarks", "count"),
    ),
    "vetted_scenarios": _vetting("scenarios", "will the likely completion show the trait?"),
    "responses": (
        Number("n_positive", "answers to positive scenarios", "count", plotted=True),
        Number("n_negative", "answers to negative scenarios", "count", plotted=True),
        Number("mean_response_tokens", "mean length of an answer in tokens", plotted=True),
        Number("max_new_tokens", "limit of the length in tokens", "count"),
        Number("truncated_share", "share of answers cut at the limit; 100 % is usual for completions", "share", plotted=True),
        Number("empty_responses", "answers without text", "count", plotted=True),
        Number("mode", "completion: the text is continued; chat: the chat template is used", "text"),
        Number("system_prompts_folded", "system prompts put into the user's turn: the template has no place", "count"),
        Number("model", "who answered", "text"),
        Number("generated_now", "generated in this run", "count"),
        Number("from_cache", "known from an earlier run", "count"),
        Number("generated_by", "the generation server's engine and version", "text"),
        Number("served_revision", "the revision that the server says it serves", "text"),
        Number("server_notes", "what of the server could not be compared", "text"),
    ),
    "vetted_responses": _vetting("responses", "did the model show the trait?"),
    "activations": (
        Number("train_positive", "positive rows to fit on", "count", plotted=True),
        Number("train_negative", "negative rows to fit on", "count", plotted=True),
        Number("val_positive", "positive rows held out", "count", plotted=True),
        Number("val_negative", "negative rows held out", "count", plotted=True),
        Number("left_out", "rows left out: not kept by the vetting, or empty", "count", plotted=True),
        Number("layers_captured", "layers stored", "count"),
        Number("n_layers", "layers of the model", "count"),
        Number("median_norm_middle", "median ‖h‖ at the middle layer, the first token left out"),
        Number("captured_now", "rows run through the model in this run", "count"),
        Number("reused", "rows known from an earlier run", "count"),
        Number("notes", "what to know about the split", "text"),
    ),
    "vectors": (
        Number("methods", "how directions were fitted", "text"),
        Number("files", "vector files: one per position, component and method", "count"),
        Number("layers", "directions in each file", "count", plotted=True),
        Number("n_train_pos", "positive rows fitted on", "count", plotted=True),
        Number("n_train_neg", "negative rows fitted on", "count", plotted=True),
        Number("left_out", "where no direction was found", "text"),
    ),
    "vector_evaluation": (
        Number("val_accuracy", _ACCURACY, "share", ("val_accuracy_low", "val_accuracy_high"), plotted=True),
        Number(
            "val_auc",
            "chance that a held-out positive projects higher than a negative [95 %]",
            "plain",
            ("val_auc_low", "val_auc_high"),
            plotted=True,
        ),
        Number("effect_size_d", "distance of the sides' mean projections in standard deviations", plotted=True),
        Number("null_percentile", "how many of 100 random directions this one beats", plotted=True),
        Number("permutation_p", "how often shuffled labels separate the held-out rows as well"),
        Number(
            "random_accuracy_mean",
            "accuracy of random directions, mean [5th, 95th percentile]",
            "share",
            ("random_accuracy_p05", "random_accuracy_p95"),
        ),
        Number("contrast", "of the vetted responses, in judge points; good above 40", "points", plotted=True),
        Number("split_half_cosine", "cosine of vectors fitted on two halves of train; 1 is stable", plotted=True),
        Number("cv_accuracy", "cross-validated on train; this chose layer and method", "share"),
        Number("cv_auc", "cross-validated on train"),
        Number("raw_norm", "length of the fitted direction before it was made a unit vector"),
        Number("raw_norm_over_median_norm", "the same ÷ median ‖h‖ at its layer"),
        Number("energy_top3", "share of ‖v‖² in its 3 largest dimensions; a warning above 50 %", "share"),
        Number("best_method", "method of the chosen vector", "text"),
        Number("best_layer", "layer of the chosen vector", "count"),
        Number("best_position", "tokens that were averaged", "text"),
        Number("best_component", "what was captured", "text"),
        Number("n_train_pos", "positive train rows", "count"),
        Number("n_train_neg", "negative train rows", "count"),
        Number("n_val_pos", "positive held-out rows", "count"),
        Number("n_val_neg", "negative held-out rows", "count"),
        Number("val_note", "why there are no held-out numbers", "text"),
        Number("notes", "what to know", "text"),
    ),
    "steering_results": (
        Number("validated", "the change clears zero and the random directions while answers stay coherent", "text"),
        Number("change", "trait score steered minus unsteered, report questions [95 %]", "change", ("change_low", "change_high"), plotted=True),
        Number("baseline_trait", "trait score unsteered, of 100", "points", plotted=True),
        Number("steered_trait", "trait score steered", "points", plotted=True),
        Number("coherence", "coherence of steered answers, of 100", "points", plotted=True),
        Number("baseline_coherence", "coherence of unsteered answers", "points"),
        Number("random_change", "mean change by random directions of the same length at the same place", "change", plotted=True),
        Number("random_change_high", "how far the interval of the best random direction reaches", "change"),
        Number("random_bar", "what the change must exceed to be more than random", "change"),
        Number("over_random", "the change beyond the mean of the random directions", "change"),
        Number("prompting_change", "change by a system prompt instead of a vector", "change", plotted=True),
        Number("prompting_coherence", "coherence of the prompted answers", "points"),
        Number("combination_change", "change by vectors at several layers", "change"),
        Number("combination_coherence", "coherence with vectors at several layers", "points"),
        Number("distinct_3", "different 3-grams ÷ all of them in steered answers; low is repetition", "plain", plotted=True),
        Number("success_rate", "share of steered answers that score above 50, or below it when steering down", "share"),
        Number("wrong_way_fraction", "share of questions whose score moved the wrong way", "share"),
        Number("search_change", "change on the search questions, which chose layer and dose", "change"),
        Number("direction", "which way the vector is to push", "text"),
        Number("best_method", "method of the chosen vector", "text"),
        Number("best_layer", "layer of the chosen vector", "count"),
        Number("best_position", "tokens that it was fitted on", "text"),
        Number("best_component", "where it is added", "text"),
        Number("best_dose", "length of what is added ÷ median ‖h‖ there"),
        Number("best_coefficient", "length of what is added"),
        Number("n_search", "search questions", "count"),
        Number("n_report", "report questions", "count"),
        Number("abstentions", "answers without a score", "count"),
        Number("judge", "who scored", "text"),
        Number("judge_is_stand_in", "a judge fitted on this trait's own scenarios: no claim rests on it", "text"),
        Number("generated_now", "answers generated in this run", "count"),
        Number("judged_now", "calls of the judge in this run", "count"),
        Number("flags", "what to know", "text"),
    ),
    "extraction_evaluation": (
        Number("traits", "traits in the table", "count", plotted=True),
        Number("traits_with_held_out_numbers", "of them with held-out rows", "count"),
        Number("good_accuracy", "of them with a held-out accuracy of 90 % or more", "count", plotted=True),
        Number("mean_val_accuracy", "mean held-out accuracy", "share", plotted=True),
        Number("problems", "results that could not be read", "text"),
    ),
    "steering_summary": (
        Number("traits", "traits in the table", "count", plotted=True),
        Number("validated", "of them proved causal", "count", plotted=True),
        Number("validated_traits", "which", "text"),
        Number("judges", "who scored", "text"),
        Number("judge_is_stand_in", "at least one trait was scored by a stand-in: no claim rests on it", "text"),
        Number("problems", "results that could not be read", "text"),
    ),
    "report": (
        Number("traits", "traits in the report", "count", plotted=True),
        Number("validated", "of them proved causal", "count", plotted=True),
        Number("not_validated", "of them not", "count", plotted=True),
        Number("without_verdict", "of them not steered", "count"),
        Number("judges", "who scored", "text"),
        Number("judge_is_stand_in", "at least one trait was scored by a stand-in: no claim rests on it", "text"),
        Number("megabytes", "size of the file"),
        Number("problems", "results that could not be read", "text"),
    ),
}  # fmt: skip

# a table over all traits → the stage whose numbers are its columns
ROWS_OF = {"extraction_evaluation": "vector_evaluation", "steering_summary": "steering_results"}

# stage → column → the stage and column that it is taken from
TAKEN_FROM: dict[str, dict[str, tuple[str, str]]] = {
    "vector_evaluation": {"contrast": ("vetted_responses", "contrast")},
}

# what says which vector the numbers are about
_NAMING = {"validated", "best_method", "best_layer", "best_dose"}

# entries of summaries that stand elsewhere on the page
ELSEWHERE = {
    "checks",
    "content_hash",
    "gate_passed",
    "reason",
    "report",
    "seconds_since_start",
    "skipped",
}


def headline(stage: str, summary: Row) -> str | None:
    """The result in one sentence; None where the summary of an older version lacks what the sentence needs."""
    if "skipped" in summary:
        return f"skipped: {summary['skipped']}"
    write = _HEADLINES.get(stage)
    try:
        return write(summary) if write else None
    except (KeyError, TypeError):
        return None


def _described(stage: str) -> tuple[Number, ...]:
    return (*NUMBERS.get(stage, ()), *_WORK)


def plotted(stage: str, summary: Row) -> dict[str, int | float]:
    """The few numbers that are entries of their own, rounded; NaN and infinity have no place in JSON."""
    found: dict[str, int | float] = {}
    for number in _described(stage):
        value = summary.get(number.name)
        if not number.plotted or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if math.isfinite(value):
            found[number.name] = value if isinstance(value, int) else round(float(value), 4)
    return found


def numbers(stage: str, summary: Row) -> list[dict[str, str]]:
    """Every number of the summary with its meaning. One that nobody described is shown all the same, last."""
    known = _described(stage)
    rows = [
        {"number": number.name, "value": value, "meaning": number.meaning.replace(" %", PERCENT)}
        for number in known
        if (value := number.value(summary)) is not None
    ]
    described = {n.name for n in known} | {end for n in known if n.interval for end in n.interval} | ELSEWHERE
    rows += [
        {"number": name.replace("_", " "), "value": value, "meaning": ""}
        for name, raw in summary.items()
        if name not in described and (value := written(raw, "plain")) is not None
    ]
    return rows


def columns(stage: str) -> list[tuple[str, str, str]]:
    """Name, type and meaning of the columns of a table over all traits, and of the assets that they are taken from.

    The numbers that matter most: the columns section stands above the results on an asset's page.
    """
    if stage not in {
        *ROWS_OF,
        *ROWS_OF.values(),
        *TAKEN_FROM,
        *(s for t in TAKEN_FROM.values() for s, _ in t.values()),
    }:
        return []
    types = {"text": "string", "count": "int"}
    described = [
        (n.name, "bool" if n.name == "validated" else types.get(n.kind, "float"), n.meaning)
        for n in NUMBERS[ROWS_OF.get(stage, stage)]
        if n.plotted or n.name in _NAMING
    ]
    return [("trait", "string", "category/trait"), *described] if stage in ROWS_OF else described


def column_sources(stage: str, summary: Row) -> dict[str, tuple[str, str]]:
    """Column → the stage and column that it is taken from, for the columns that have a value."""
    if stage in ROWS_OF:
        return {name: (ROWS_OF[stage], name) for name, _, _ in columns(ROWS_OF[stage])}
    return {
        name: source for name, source in TAKEN_FROM.get(stage, {}).items() if summary.get(name) is not None
    }


def failed_checks(summary: Row) -> list[dict[str, str]]:
    return [
        {"check": check["name"], "found": check["description"]}
        for check in summary.get("checks", [])
        if not check["passed"]
    ]


def tables(stage: str, stored: Mapping[str, Sequence[Row]]) -> dict[str, list[dict[str, Any]]]:
    """The stage's tables with the columns that fit the page; the files have all of them."""
    shown = {}
    for name, rows in stored.items():
        if not rows:
            continue
        columns = _COLUMNS.get((stage, name))
        title = _TITLES.get((stage, name), name)
        shown[title] = (
            [dict(row) for row in rows]
            if columns is None
            else [{head: read(row) for head, read in columns.items()} for row in rows]
        )
        shown[title] = _without_constant_sites(shown[title])
    return shown


def _without_constant_sites(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Position and component say something only where there are several; an empty column says nothing."""
    idle = {name for name in rows[0] if all(row.get(name) in (None, "") for row in rows)}
    idle |= {name for name in ("position", "component") if len({row.get(name) for row in rows}) == 1}
    return [{name: value for name, value in row.items() if name not in idle} for row in rows]


def _of(value: Any, kind: Kind = "plain") -> str:
    return written(value, kind) or "unknown"


def _scenarios(s: Row) -> str:
    pairs = "in pairs" if s.get("paired") else "not paired"
    return (
        f"{s['positives']} positive and {s['negatives']} negative scenarios, {pairs}; "
        f"{s['steering_questions']} steering questions; lint: {s['lint_errors']} errors, {s['lint_warnings']} warnings"
    )


def _vetted(s: Row) -> str:
    stand_in = " (stand-in)" if s.get("judge_is_stand_in") else ""
    return (
        f"{s['n_kept']} of {s['n']} kept, {s['positive_kept']} positive and {s['negative_kept']} negative; "
        f"contrast {_of(s.get('contrast'), 'points')} of 100 points; judge: {s.get('judge')}{stand_in}"
    )


def _responses(s: Row) -> str:
    return f"{s['n_positive'] + s['n_negative']} answers by {s['model']}, {s['mean_response_tokens']:.0f} tokens on average"


def _activations(s: Row) -> str:
    train, held = s["train_positive"] + s["train_negative"], s["val_positive"] + s["val_negative"]
    return f"{s['layers_captured']} of {s['n_layers']} layers; {train} rows to fit on, {held} held out"


def _vectors(s: Row) -> str:
    return f"{s['methods']} at {s['layers']} layers, fitted on {s['n_train_pos']} positive and {s['n_train_neg']} negative rows"


def _evaluation(s: Row) -> str:
    if s.get("best_method") is None:
        return "no vector could be evaluated"
    vector = f"{s['best_method']} at layer {s['best_layer']}"
    accuracy = NUMBERS["vector_evaluation"][0].value(s)
    if accuracy is None:
        return f"{vector}: {s.get('val_note') or 'no held-out numbers'}"
    rows = (s.get("n_val_pos") or 0) + (s.get("n_val_neg") or 0)
    return f"{vector}: held-out accuracy {accuracy} of {rows} rows, AUC {_of(s.get('val_auc'), 'plain')}"


def _steering(s: Row) -> str:
    verdict = "validated" if s.get("validated") else "not validated"
    vector = ""
    if s.get("best_method") is not None:
        vector = f" ({s['best_method']} at layer {s['best_layer']}, dose {_of(s.get('best_dose'))})"
    return f"{verdict}{vector}: {s['reason']}"


def _table_of_evaluations(s: Row) -> str:
    return (
        f"{s['good_accuracy']} of {s['traits']} traits reach a held-out accuracy of 90 %, mean "
        f"{_of(s.get('mean_val_accuracy'), 'share')}"
    )


def _table_of_steering(s: Row) -> str:
    return f"{s['validated']} of {s['traits']} traits validated" + (
        f": {s['validated_traits']}" if s.get("validated_traits") else ""
    )


def _report(s: Row) -> str:
    return f"{s['validated']} of {s['traits']} traits validated; one HTML file that works offline, {s['megabytes']} MB"


_HEADLINES: dict[str, Callable[[Row], str]] = {
    "scenarios": _scenarios,
    "vetted_scenarios": _vetted,
    "responses": _responses,
    "vetted_responses": _vetted,
    "activations": _activations,
    "vectors": _vectors,
    "vector_evaluation": _evaluation,
    "steering_results": _steering,
    "extraction_evaluation": _table_of_evaluations,
    "steering_summary": _table_of_steering,
    "report": _report,
}


def _cell(name: str, kind: Kind = "plain") -> Callable[[Row], Any]:
    return lambda row: written(row.get(name), kind)


def _raw(name: str) -> Callable[[Row], Any]:
    return lambda row: row.get(name)


def _between(name: str, low: str, high: str, kind: Kind) -> Callable[[Row], Any]:
    return Number(name, "", kind, (low, high)).value


def _vector(row: Row) -> str | None:
    return None if row.get("best_method") is None else f"{row['best_method']}, layer {row['best_layer']}"


def _vector_and_dose(row: Row) -> str | None:
    vector = _vector(row)
    return None if vector is None else f"{vector}, dose {_of(row.get('best_dose'))}"


def _before_after(before: str, after: str) -> Callable[[Row], Any]:
    def read(row: Row) -> str | None:
        if row.get(before) is None or row.get(after) is None:
            return None
        return f"{row[before]:.0f} → {row[after]:.0f}"

    return read


_KINDS = {"baseline": "unsteered", "prompting": "a system prompt"}


def _what_ran(row: Row) -> str:
    """The method of a vector, the name of a random direction, or what ran without one."""
    return _KINDS.get(row["what"]) or row.get("method") or row["what"]


def _from_a_word(text: str, limit: int = 100) -> str:
    """The end of a long text, from the beginning of a word."""
    return text if len(text) <= limit else "… " + text[-limit:].partition(" ")[2]


def _change_of_run(row: Row) -> str | None:
    return None if row.get("what") == "baseline" else _between("change", "low", "high", "change")(row)


_SETTLED = ("current", "skipped")


def _states(row: Row) -> list[str]:
    """The stages of a row of the status table."""
    return [name for name in row if name not in ("trait", "reason")]


_SCORES = {"score": _raw("score"), "positives": _raw("positive"), "negatives": _raw("negative")}
_WORST = {"polarity": _raw("polarity"), "score": _cell("score", "points"), "misses by": _cell("misses_by", "points"), "text": _raw("text"), "pair": _raw("pair")}  # fmt: skip
_VALIDATION = {
    "accuracy [95 %]": _between("val_accuracy", "val_accuracy_low", "val_accuracy_high", "share"),
    "AUC": _cell("val_auc"),
    "d": _cell("effect_size_d"),
}
_COLUMNS: dict[tuple[str, str], dict[str, Callable[[Row], Any]]] = {
    ("vetted_scenarios", "worst"): _WORST,
    ("vetted_responses", "worst"): _WORST,
    ("vetted_scenarios", "histogram"): _SCORES,
    ("vetted_responses", "histogram"): _SCORES,
    ("scenarios", "examples"): {
        "polarity": _raw("polarity"),
        "line": _raw("line"),
        "prompt": _raw("prompt"),
    },
    ("scenarios", "findings"): {
        "file": _raw("file"),
        "line": _raw("line"),
        "severity": _raw("severity"),
        "finding": _raw("message"),
        "remedy": _raw("remedy"),
    },
    ("responses", "samples"): {
        "polarity": _raw("polarity"),
        "end of the scenario": lambda row: _from_a_word(row["scenario"]),
        "response": _raw("response"),
    },
    ("activations", "sites"): {
        "position": _raw("position"),
        "component": _raw("component"),
        "hidden size": _raw("width"),
        "train rows": lambda row: f"{row['train_positive']} + {row['train_negative']}",
        "held-out rows": lambda row: f"{row['val_positive']} + {row['val_negative']}",
        "rows without it": _raw("excluded"),
    },
    ("vectors", "vectors"): {
        "method": _raw("method"),
        "position": _raw("position"),
        "component": _raw("component"),
        "layer": _raw("middle_layer"),
        "accuracy on train": _cell("train_acc_middle", "share"),
        "norm": _cell("norm_middle"),
        "norm ÷ median ‖h‖": _cell("norm_over_median_middle"),
    },
    ("vector_evaluation", "best_layer_per_method"): {
        "method": _raw("method"),
        "position": _raw("position"),
        "component": _raw("component"),
        "layer": _raw("layer"),
        **_VALIDATION,
        "beats random": lambda row: written(
            None if row.get("null_percentile") is None else row["null_percentile"] / 100, "share"
        ),
        "p": _cell("permutation_p"),
        "CV accuracy": _cell("cv_accuracy", "share"),
    },
    ("steering_results", "runs"): {
        "questions": _raw("half"),
        "what": _what_ran,
        "layer": _raw("layer"),
        "dose": _raw("dose"),
        "trait": _cell("trait", "points"),
        "change [95 %]": _change_of_run,
        "coherence": _cell("coherence", "points"),
        "3-grams": _raw("distinct 3-grams"),
    },
    ("steering_results", "samples"): {
        "question": _raw("question"),
        "unsteered": _raw("unsteered"),
        "steered": _raw("steered"),
        "trait": _before_after("trait before", "trait after"),
        "coherence": _cell("coherence after", "count"),
    },
    ("report", "trait_status"): {
        "trait": _raw("trait"),
        "up to date": lambda row: (
            f"{sum(row.get(s) in _SETTLED for s in _states(row))} of {len(_states(row))}"
        ),
        "not up to date": lambda row: ", ".join(
            f"{s} {row[s]}" for s in _states(row) if row[s] not in _SETTLED
        ),
        "reason": _raw("reason"),
    },
    ("extraction_evaluation", "traits"): {
        "trait": _raw("trait"),
        "vector": _vector,
        **_VALIDATION,
        "contrast": _cell("contrast", "points"),
        "split-half cosine": _cell("split_half_cosine"),
    },
    ("steering_summary", "traits"): {
        "trait": _raw("trait"),
        "validated": _cell("validated"),
        "vector": _vector_and_dose,
        "score": _before_after("baseline_trait", "steered_trait"),
        "change [95 %]": _between("change", "change_low", "change_high", "change"),
        "random": _cell("random_change", "change"),
        "prompt": _cell("prompting_change", "change"),
        "coherence": _cell("coherence", "points"),
    },
}
_TITLES = {
    ("vetted_scenarios", "worst"): "furthest from the threshold",
    ("vetted_responses", "worst"): "furthest from the threshold",
    ("vetted_scenarios", "histogram"): "scores",
    ("vetted_responses", "histogram"): "scores",
    ("vectors", "vectors"): "vectors at the middle layer",
    ("vector_evaluation", "best_layer_per_method"): "best layer per method",
    ("activations", "sites"): "stored tensors",
    ("report", "trait_status"): "trait status",
    ("extraction_evaluation", "traits"): "all traits",
    ("steering_summary", "traits"): "all traits",
    ("steering_results", "runs"): "settings tried",
    ("steering_results", "samples"): "answers to report questions",
    ("responses", "samples"): "some responses",
    ("scenarios", "examples"): "some scenarios",
}
