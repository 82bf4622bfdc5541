"""What a stage's result adds to the index beside its own metrics: one row per scenario, response, score,
vector …

Belongs here: reading the content of a finished result, before it is written, into rows of the tables in
`storage/schema/tables.sql`. Does not: computing anything, reading files, SQL. A stage without an entry
adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from storage.manifest import fingerprint

Row = dict[str, Any]
# storage key → content, as in `Outcome.files`
Files = Mapping[str, Any]


def detail_rows(stage: str, options: Mapping[str, Any], files: Files) -> list[Row]:
    """Rows of the result of `stage`, each naming its `table`; `options` are those of its manifest."""
    reader = _READERS.get(stage)
    return list(reader(options, files)) if reader is not None else []


def _named(files: Files, name: str) -> Iterator[Any]:
    """Contents of the files whose last part is `name`."""
    return (content for key, content in sorted(files.items()) if key.rsplit("/", 1)[-1] == name)


def _scenarios(options: Mapping[str, Any], files: Files) -> Iterator[Row]:
    for content in _named(files, "scenario_set.json"):
        for polarity, side in (("positive", "positives"), ("negative", "negatives")):
            for index, scenario in enumerate(content[side]):
                yield {
                    "table": "scenarios",
                    "polarity": polarity,
                    "scenario_index": index,
                    "line": scenario["line"],
                    "prompt": scenario["prompt"],
                    "system_prompt": scenario["system_prompt"],
                }


def _judge_scores(options: Mapping[str, Any], files: Files) -> Iterator[Row]:
    for content in (*_named(files, "scenario_scores.json"), *_named(files, "response_scores.json")):
        judge = content.get("judge") or {}
        for row in content["results"]:
            yield {
                "table": "judge_scores",
                "subject": content["subject"],
                "polarity": row["polarity"],
                "scenario_index": int(row["key"].rsplit(":", 1)[-1]),
                "row_key": row["key"],
                "score": row.get("score"),
                "mass": row.get("mass"),
                "abstained": row.get("abstained"),
                "verdict": row["verdict"],
                "judge": str(judge.get("model") or judge.get("name") or judge.get("kind") or "unknown"),
                "judge_fingerprint": fingerprint(judge),
                "stand_in": content.get("stand_in"),
            }


def _responses(options: Mapping[str, Any], files: Files) -> Iterator[Row]:
    for polarity, name in (("positive", "pos.json"), ("negative", "neg.json")):
        for content in _named(files, name):
            for row in content:
                yield {
                    "table": "responses",
                    "polarity": polarity,
                    "scenario_index": row["scenario_index"],
                    "line": row["line"],
                    "pair": row["pair"],
                    "row_key": row["row_key"],
                    "question": row["question"],
                    "system_prompt": row["system_prompt"],
                    "answer": row["answer"],
                    "prompt_tokens": row["prompt_token_count"],
                    "response_tokens": row["response_token_count"],
                    "finish_reason": row["finish_reason"],
                }


def _activations(options: Mapping[str, Any], files: Files) -> Iterator[Row]:
    for content in _named(files, "metadata.json"):
        yield {
            "table": "activations",
            "position": content["position"],
            "component": content["component"],
            "n_layers": len(content["layers"]),
            "width": content["hidden_dim"],
            "train_positive": content["n_examples_pos"],
            "train_negative": content["n_examples_neg"],
            "val_positive": content["n_val_pos"],
            "val_negative": content["n_val_neg"],
            "excluded": len(content["excluded"]),
        }


_VECTOR_COLUMNS = (
    "norm",
    "median_norm",
    "norm_over_median_norm",
    "baseline",
    "train_acc",
    "sign",
    "mean_positive",
    "mean_negative",
)


def _vectors(options: Mapping[str, Any], files: Files) -> Iterator[Row]:
    for content in _named(files, "metadata.json"):
        for layer, facts in content["layers"].items():
            yield {
                "table": "vectors",
                "position": content["position"],
                "component": content["component"],
                "method": content["method"],
                "layer": int(layer),
                **{name: facts[name] for name in _VECTOR_COLUMNS if name in facts},
            }


def _evaluations(options: Mapping[str, Any], files: Files) -> Iterator[Row]:
    for content in _named(files, "evaluation.json"):
        best = content.get("best")
        for row in content["rows"]:
            yield {"table": "evaluations", "chosen": row == best, **row}


_READERS: dict[str, Callable[[Mapping[str, Any], Files], Iterator[Row]]] = {
    "scenarios": _scenarios,
    "vetted_scenarios": _judge_scores,
    "responses": _responses,
    "vetted_responses": _judge_scores,
    "activations": _activations,
    "vectors": _vectors,
    "vector_evaluation": _evaluations,
}
