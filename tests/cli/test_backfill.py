"""`traits backfill`: which runs it makes, and what it says when it cannot. Launching for real is tested with the daemon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from trait_assets.backfill import plan
from trait_assets.cli import app
from trait_assets.partitions import contiguous_ranges

KNOWN = [f"t/{name}" for name in "abcdefghij"]
MODEL = "embedded:smollm2-135m-instruct"


def runs_of_the_server(wanted: list[str], known: list[str], limit: int) -> list[list[str]]:
    """How a backfill with `multi_run(limit)` cuts its partitions: ranges of neighbours, each cut from its start."""
    return contiguous_ranges(known, wanted, limit)


@given(
    wanted=st.sets(st.sampled_from(KNOWN), min_size=1),
    limit=st.integers(1, 6),
    chunk=st.integers(1, 6),
)
def test_the_server_makes_exactly_the_runs_that_were_planned(wanted, limit, chunk):
    runs = contiguous_ranges(KNOWN, wanted, min(chunk, limit))
    backfills = plan("demo", ["vectors"], runs, KNOWN, limit)
    made = [run for one in backfills for run in runs_of_the_server(one.traits, KNOWN, limit)]
    assert sorted(made) == sorted(runs)
    assert len(backfills) <= 2
    if chunk >= limit:
        assert len(backfills) == 1


def test_a_title_says_what_and_how_much():
    (one,) = plan("demo", ["vectors", "vector_evaluation"], [["t/a"], ["t/c", "t/d"]], KNOWN, 16)
    assert one.title == "demo: vectors, vector_evaluation of 3 traits"
    assert one.asset_keys == [["demo", "vectors"], ["demo", "vector_evaluation"]]
    first, second = plan("demo", ["scenarios", "responses", "vectors"], [["t/a"], ["t/b"]], KNOWN, 16)
    assert first.title == "demo: scenarios … vectors of 2 traits (part 1 of 2)"
    assert second.runs == [["t/b"]]
    assert first.asset_keys[0] == ["scenarios"]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    for name in ("a", "b", "c", "d"):
        folder = tmp_path / "datasets" / "t" / name
        folder.mkdir(parents=True)
        (folder / "positive.txt").write_text("".join(f"I love walk {i} of {name}\n" for i in range(12)))
        (folder / "negative.txt").write_text("".join(f"It was walk {i} of {name}\n" for i in range(12)))
        (folder / "definition.txt").write_text("HIGH (70-100): joy\nMID (30-70): some\nLOW (0-30): none\n")
        (folder / "steering.json").write_text(json.dumps({"questions": ["How are you?", "What is new?"]}))
    for name, options in {"all": {}, "some": {"traits": ["t/a", "t/c"], "steering": False}}.items():
        folder = tmp_path / "experiments" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"extraction_model": MODEL, **options}))
    monkeypatch.setenv("TRAITS_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setenv("TRAITS_EXPERIMENTS", str(tmp_path / "experiments"))
    monkeypatch.setenv("TRAITS_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    return tmp_path


def backfill(*arguments: str):
    return CliRunner().invoke(app, ["backfill", *arguments])


def test_a_dry_run_lists_the_runs_of_every_experiment_and_needs_no_server(project):
    result = backfill("--dry-run", "--json")
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)
    assert planned["launched"] is False
    by_name = {one["experiment"]: one for one in planned["backfills"]}
    assert by_name["all"]["runs"] == [["t/a", "t/b", "t/c", "t/d"]]
    assert by_name["some"]["runs"] == [["t/a"], ["t/c"]]
    assert "steering_results" not in by_name["some"]["stages"]


def test_options_narrow_a_backfill(project):
    result = backfill(
        "--dry-run", "--json", "-e", "all", "-t", "t/[abc]", "--chunk", "2", "--stage", "vectors"
    )
    planned = json.loads(result.stdout)["backfills"]
    assert [(one["runs"], one["stages"]) for one in planned] == [
        ([["t/a", "t/b"]], ["vectors"]),
        ([["t/c"]], ["vectors"]),
    ]
    said = backfill("--dry-run", "-e", "all", "-t", "t/a")
    assert "would launch" in said.stdout
    assert "1 trait: t/a" in said.stdout


def test_a_broken_folder_is_refused_by_name_and_the_others_are_planned(project):
    (project / "datasets" / "t" / "b" / "negative.txt").unlink()
    result = backfill("--dry-run", "--json", "-e", "all")
    assert result.exit_code == 1
    assert "negative.txt" in json.loads(result.stdout)["refused"]["t/b"]
    assert json.loads(result.stdout)["backfills"][0]["runs"] == [["t/a", "t/c", "t/d"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--url", "http://127.0.0.1:9"), ["no Dagster webserver answers", "make ui", "--dry-run"]),
        (("--url", "localhost:3000"), ["not an http address"]),
        (("--chunk", "17"), ["--chunk 17", "16"]),
        (("-e", "nosuch"), ["there is no experiment `nosuch`"]),
        (("-e", "some", "-t", "t/b"), ["no experiment covers t/b"]),
        (("-e", "all", "-t", "t/bb"), ["there is no trait `t/bb`"]),
        (("-e", "some", "--stage", "steering_results"), ["no stage `steering_results`", "vectors"]),
        (("-e", "all", "--stage", "extraction_evaluation"), ["a table over all traits"]),
    ],
)
def test_what_cannot_be_launched_is_said_in_one_line(project, arguments, words):
    result = backfill(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error:")
    for word in words:
        assert word in result.stderr
