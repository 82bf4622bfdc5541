"""The whole graph with an LLM judge over the OpenAI protocol: what it is asked, once, and where its key goes (nowhere)."""

from __future__ import annotations

import json

import pytest

TRAIT = "register/bureaucratic"
SECRET = "sk-test-7f3a9c-never-written"


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


def test_an_llm_judge_is_asked_once_and_its_key_is_never_written(project, openai_server):
    env = {"OPENAI_BASE_URL": openai_server.base_url, "OPENAI_API_KEY": SECRET}
    first = project.run("run", "-e", "judged", env=env)
    row = first["results"][0]
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
    lines[kept[0]["line"] - 1] = edited
    path.write_text("\n".join(lines))
    openai_server.reset()
    third = project.run("run", "-e", "judged", env=env)
    assert third["stages"]["vetted_scenarios"]["work"][TRAIT]["judged_now"] == 1
    about_edit = [r for r in openai_server.requests if edited in r.prompt]
    assert about_edit
    assert max(openai_server.asked.values()) == 1

    for file in project.root.rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
