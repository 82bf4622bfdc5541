"""The queries of docs/lineage.md run, on an index that has rows for each of them."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from storage.manifest import fingerprint
from storage.workspace import Workspace

DOCUMENT = Path(__file__).parents[2] / "docs" / "lineage.md"
BLOCKS = re.findall(
    r"### (\d+)\. [^\n]*\n\n```sql\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL
)
TRAIT = "register/bureaucratic"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    from storage.manifest import Manifest

    folder = tmp_path_factory.mktemp("queries")
    w = Workspace(folder / "experiments", folder / "lineage.duckdb")

    def commit(
        stage: str, inputs: dict, rows: list, *, salt: str = "", shared: bool = False, **options
    ) -> str:
        mark = fingerprint([stage, salt])
        manifest = Manifest(
            stage=stage,
            experiment=None if shared else "small",
            trait=TRAIT,
            fingerprint=mark,
            status="done",
            code_version="1",
            run_id=f"run{salt}",
            created_at=datetime.now(UTC).isoformat(),
            inputs=inputs,
            options=options,
        )
        w.commit(manifest, rows)
        return mark

    place = {"position": "response[:]", "component": "residual", "method": "probe", "layer": 3}
    row = {"polarity": "positive", "scenario_index": 0}
    scenarios = commit(
        "scenarios", {}, [{"table": "scenarios", **row, "line": 1, "prompt": "A customer asked"}], shared=True
    )
    responses = commit(
        "responses",
        {"scenarios": scenarios},
        [
            {"table": "responses", **row, "response_tokens": 12},
            {
                "table": "work",
                "rows": 1,
                "tokens": 12,
                "model_seconds": 0.5,
                "seconds": 0.6,
                "judge_calls": 0,
            },
        ],
        model={"model": "m", "revision": "r", "dtype": "float32"},
    )
    for salt, score in (("", 20.0), ("again", 30.0)):
        judged = {"table": "judge_scores", "subject": "responses", **row, "row_key": "positive:0"}
        commit(
            "vetted_responses",
            {"responses": responses},
            [
                {
                    **judged,
                    "score": score,
                    "verdict": "failed",
                    "judge": salt or "a",
                    "judge_fingerprint": salt,
                },
                {"name": "contrast", "value": 50.0},
            ],
            salt=salt,
        )
    activations = commit("activations", {"responses": responses}, [])
    vectors = commit("vectors", {"activations": activations}, [{"table": "vectors", **place, "norm": 1.0}])
    commit(
        "vector_evaluation",
        {"vectors": vectors},
        [{"table": "evaluations", **place, "chosen": True, "val_auc": 0.9, "cv_auc": 0.8}],
    )
    steered = {"kind": "vector", "half": "report", **place, "dose": 0.1}
    commit(
        "steering_results",
        {"vectors": vectors},
        [
            {"table": "steering_runs", **steered, "best": True, "validated": True, "change": 20.0},
            {"table": "generations", **steered, "question_index": 0, "response": "Pursuant to", "tokens": 8},
        ],
    )
    # what the activations were made from is replaced
    commit("responses", {"scenarios": scenarios}, [], salt="newer")
    return w


def test_there_are_at_least_ten() -> None:
    assert len(BLOCKS) >= 10


@pytest.mark.parametrize(("number", "query"), BLOCKS, ids=[number for number, _ in BLOCKS])
def test_every_query_of_the_guide_runs_and_finds_something(
    filled: Workspace, number: str, query: str
) -> None:
    result = filled.index.sql(query)
    assert result.columns
    assert result.rows, query
