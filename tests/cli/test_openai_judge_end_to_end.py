"""The whole graph with an LLM judge over the OpenAI protocol: what it is asked, once, and where its key goes (nowhere)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

TRAIT = "register/bureaucratic"
SECRET = "sk-test-7f3a9c-never-written"
WRITTEN = Path(__file__).parents[1] / "judges" / "written.py"


def tree(project):
    """What the published steering result was made from, as `traits lineage` tells it."""
    asked = ("lineage", f"judged/{TRAIT}", "--stage", "steering_results", "--lines", "-1", "--json")
    said = project.traits(*asked)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def walk(node, kind):
    own = [node] if node["kind"] == kind else []
    return own + [found for child in node["children"] for found in walk(child, kind)]


def assert_complete(node, lines):
    """Down to the scenario lines: models with revisions, judge with rubric versions, options, code, run, states."""
    assert node["state"] == "current"
    results = {}
    for result in walk(node, "result"):
        assert result["state"] == "current", result["why"]
        results[result["title"].split(" of ")[0]] = result["facts"]
    stages = "scenarios vetted_scenarios responses vetted_responses activations vectors vector_evaluation"
    assert set(results) == {*stages.split(), "steering_results"}
    for stage, facts in results.items():
        assert facts["run"], stage
        assert facts["code version"], stage
        assert facts["created"].startswith("20"), stage
        assert "torch" in facts["libraries"], stage
        assert len(facts["fingerprint"]) == 32, stage
    judges = walk(node, "judge")
    assert len(judges) >= 3  # scenarios, responses, steered answers
    for judge in judges:
        assert judge["facts"]["model"] == "gpt-4.1-mini"
        assert {"scenario", "response", "steering", "coherence"} <= set(judge["facts"]["rubrics"])
    models = walk(node, "model")
    assert {model["title"].split()[0] for model in models} >= {"model", "application_model"}
    assert all(model["facts"]["revision"] and model["facts"]["dtype"] for model in models)
    options = {name: value for found in walk(node, "options") for name, value in found["facts"].items()}
    assert {"seed", "max_new_tokens", "pos_threshold", "positions", "methods", "val_split"} <= set(options)
    # each line of the file, and which of them were answered
    shown = [found["title"] for found in walk(node, "scenario") if found["title"].startswith("positive")]
    assert shown == [f"positive, line {i + 1}: {text}" for i, text in enumerate(lines) if text]
    assert "positive lines used" in results["responses"]
    assert [source["state"] for source in walk(node, "source")] == ["current"]


@pytest.fixture
def project(make_project, small_options):
    project = make_project(TRAIT)
    steer = {
        **small_options["steer"],
        "max_candidates": 1,
        "doses": [0.15],
        "controls": 1,
        "max_new_tokens": 6,
    }
    project.experiment("judged", **{**small_options, "methods": ["mean_diff"], "min_kept": 3, "steer": steer})
    return project


def test_an_llm_judge_is_asked_once_and_its_key_is_never_written(project, openai_server, load_helper):
    env = {"OPENAI_BASE_URL": openai_server.base_url, "OPENAI_API_KEY": SECRET}
    done = project.traits("run", "-e", "judged", "--json", env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout)["results"][0]
    # what is spent is said while it is spent, where scenarios and responses are vetted and where answers are scored
    spending = [
        line for line in done.stderr.splitlines() if re.search(r"\d calls, \d+ retries, [\d,]+ tokens", line)
    ]
    for stage in ("vetted_scenarios", "vetted_responses", "steering"):
        assert any(stage in line for line in spending), done.stderr
    assert row["judge_is_stand_in"] is False
    assert row["vetting_judge"] == "gpt-4.1-mini"
    asked = len(openai_server.requests)
    assert asked > 2 * 12 + 2 * 12
    assert max(openai_server.asked.values()) == 1
    assert openai_server.requests[0].headers["authorization"] == f"Bearer {SECRET}"

    second = project.run("run", "-e", "judged", env=env)
    assert second["up_to_date"] is True
    assert len(openai_server.requests) == asked

    base = project.experiments / "judged" / "extraction" / TRAIT
    scores = json.loads((base / "vetting" / "scenario_scores.json").read_text())
    assert len(scores["results"]) == 24
    kept = json.loads((base / "responses" / "pos.json").read_text())
    path = project.datasets / TRAIT / "positive.txt"
    lines = path.read_text().split("\n")
    edited = "The clerk set the receipt aside and remarked that, pending verification of the enclosed forms, the office would"
    before = tree(project)
    assert_complete(before, lines)
    lines[kept[0]["line"] - 1] = edited
    path.write_text("\n".join(lines))
    after = tree(project)
    assert (after["state"], walk(after, "source")[0]["state"]) == ("outdated", "outdated")
    assert {node["state"] for node in walk(after, "result")} == {"outdated"}
    openai_server.reset()
    third = project.run("run", "-e", "judged", env=env)
    assert third["stages"]["vetted_scenarios"]["work"][TRAIT]["judged_now"] == 1
    about_edit = [r for r in openai_server.requests if edited in r.prompt]
    assert about_edit
    assert max(openai_server.asked.values()) == 1

    assert load_helper(WRITTEN).holders(project.root, SECRET) == []


def test_a_key_that_the_server_repeats_is_written_nowhere(project, openai_server, load_helper):
    """Refused at the start, and in the middle of a run."""
    module = sys.modules[type(openai_server).__module__]
    env = {"OPENAI_BASE_URL": openai_server.base_url, "OPENAI_API_KEY": SECRET}
    refusal = module.error_body(f"Incorrect API key provided: {SECRET}", "invalid_api_key")
    judge = ["--set", "judge.variant=refused", "--set", "judge.max_concurrency=2"]
    for after, output in ((0, "--verbose"), (10, "--json")):
        openai_server.reset()
        openai_server.script = lambda request, after=after: (
            module.Reply(401, refusal) if len(openai_server.requests) > after else None
        )
        done = project.traits("vet-scenarios", "-e", "judged", *judge, output, env=env)
        said = done.stdout + done.stderr
        assert done.returncode == 1, said
        assert "Incorrect API key provided: ***" in said
        assert "what was scored is kept" in said
        assert SECRET not in said
    written = load_helper(WRITTEN)
    assert written.holders(project.root, SECRET) == []
    # the search has seen Dagster's history and the index
    assert any(".db" in place for place in written.holders(project.root, "Incorrect API key provided: ***"))
    places = [place for place, _ in written.everything_written(project.root)]
    assert any("lineage.duckdb" in place for place in places)
    # what was answered before the refusal is there
    openai_server.script = None
    openai_server.reset()
    done = project.run("vet-scenarios", "-e", "judged", *judge, env=env)
    assert len(openai_server.requests) == 24 - 10
