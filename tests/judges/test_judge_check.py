"""`traits judge-check` as it is typed: any judge, its options, hand-labelled texts and the traits' own scenarios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from resources.judges.agreement import check_sides
from resources.judges.openai_judge import OpenAIJudge, OpenAISettings
from resources.judges.protocol import TraitContext
from trait_assets.cli import app

SHIPPED = Path(__file__).parents[2] / "datasets" / "traits"
TRAITS = ("register/bureaucratic", "language/spanish")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shipped traits with twenty pairs each, and results of their own."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "TRAITS_STORE"):
        monkeypatch.delenv(name, raising=False)
    for trait in TRAITS:
        folder = tmp_path / "datasets" / trait
        folder.mkdir(parents=True)
        for side in ("positive", "negative"):
            lines = (SHIPPED / trait / f"{side}.txt").read_text(encoding="utf-8").splitlines()[:20]
            (folder / f"{side}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "definition.txt").write_bytes((SHIPPED / trait / "definition.txt").read_bytes())
    monkeypatch.setenv("TRAITS_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setenv("TRAITS_EXPERIMENTS", str(tmp_path / "experiments"))
    monkeypatch.setenv("TRAITS_STATE", str(tmp_path / "state"))
    return tmp_path


def check(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["judge-check", *words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_local_judge_with_scenarios_out_of_fold() -> None:
    document = json.loads(check("--judge", "local", "--scenarios", "--json").stdout)
    assert document["stand_in"] is True
    assert [row["trait"] for row in document["traits"]] == sorted(TRAITS)
    assert (document["overall"]["n"], document["overall"]["n_scored"]) == (30, 30)
    assert document["overall"]["auc"] >= 0.95
    *rows, mean = document["scenarios"]
    assert [row["trait"] for row in rows] == sorted(TRAITS)
    assert mean["trait"] == "mean over traits"
    assert all(row["n"] == row["n_scored"] == 40 for row in rows)
    assert mean["accuracy"] == pytest.approx(sum(row["accuracy"] for row in rows) / 2, abs=1e-3)
    assert mean["accuracy"] > 0.85
    table = check("--judge", "local", "--scenarios").stdout
    assert "Judge local (stand-in)" in table
    assert "right side of 50" in table


def test_an_llm_judge_with_its_options_and_texts_of_ones_own(
    openai_server: Any, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", openai_server.base_url)
    mine = project / "mine.jsonl"
    rows = [
        {"trait": TRAITS[0], "prompt": "How?", "text": f"text {i} shall be submitted", "label": 90 - 10 * i}
        for i in range(6)
    ]
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--labelled", str(mine), "--judge-model", "loopback-1", "--set", "judge.scoring=text", "--json"]
    document = json.loads(check(*words).stdout)
    assert (document["judge"]["model"], document["judge"]["scoring"].split("/")[0]) == ("loopback-1", "text")
    assert document["overall"]["n_scored"] == 6
    assert len(openai_server.requests) == 6
    assert not any("logprobs" in request.body for request in openai_server.requests)
    # a second look costs nothing
    assert json.loads(check(*words).stdout)["overall"] == document["overall"]
    assert len(openai_server.requests) == 6
    done = check(*words, "--scenarios", "--set", "judge.max_calls=10", code=2)
    assert "max_calls 10" in done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--set", "min_kept=5"], "judge.NAME"),
        (["--set", "judge.max_cots=5"], "max_cost_usd"),
        (["--set", "judge.api_key=sk-12345678"], "OPENAI_API_KEY"),
        (["--labelled", "/no/such.jsonl"], "no such file"),
        (["--judge", "openai"], "OPENAI_BASE_URL"),
    ],
)
def test_what_cannot_work_is_said(words: list[str], says: str) -> None:
    done = check(*words, code=2)
    assert says in done.output
    assert "sk-12345678" not in done.output


def test_the_numbers_of_the_sides_by_hand(openai_server: Any) -> None:
    said = {"a": 90, "b": 55, "c": 30, "d": 10, "e": 45, "f": 70}

    def rule(request: Any) -> float:
        return said[request.sections["BEGINNING"][0]]

    openai_server.rule = rule
    context = TraitContext(
        "mood/loud", "HIGH: loud", ("a text", "b text", "c text"), ("d text", "e text", "f text")
    )
    settings = OpenAISettings(model="loopback-1", base_url=openai_server.base_url, scoring="text")

    class NoCache:
        def get(self, key: str) -> None:
            return None

        def put_many(self, rows: Any) -> None: ...

    judge = OpenAIJudge(settings, lambda trait: NoCache(), api_key="k")
    row, mean = check_sides(judge, {"mood/loud": context}, pos_threshold=60, neg_threshold=40)
    # above 50: 90, 55 of three; below 50: 10, 45 of three; pairs in order: 3 + 2 + 1 of nine
    assert row.accuracy == pytest.approx(2 / 3)
    assert row.auc == pytest.approx((3 + 2 + 1) / 9)
    assert (row.kept_positive, row.kept_negative) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert mean.auc == row.auc
