"""The main job from the command line on the real embedded model, and what a second run costs."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import load_file

BUREAUCRATIC = "register/bureaucratic"
ENTHUSIASM = "emotion/enthusiasm"


@pytest.fixture(scope="module")
def project(finished):
    return finished.project


@pytest.fixture(scope="module")
def first(finished):
    return finished.report


def work(report, stage):
    return report["stages"][stage]["work"]


def test_every_stage_computes_every_trait(first):
    for stage in (
        "scenarios",
        "vetted_scenarios",
        "responses",
        "vetted_responses",
        "activations",
        "vectors",
        "vector_evaluation",
        "steering_results",
    ):
        assert first["stages"][stage]["states"] == {BUREAUCRATIC: "done", ENTHUSIASM: "done"}, stage
    for table in ("extraction_evaluation", "steering_summary", "report"):
        assert first["stages"][table]["states"] == {"all traits": "done"}
    assert not first["failures"]


def test_files_lie_where_the_specification_says(first, project):
    base = project.experiments / "small" / "extraction" / BUREAUCRATIC
    pos = json.loads((base / "responses" / "pos.json").read_text())
    for row in pos:
        assert {
            "question",
            "answer",
            "full_text",
            "prompt_token_ids",
            "response_token_ids",
            "finish_reason",
            "row_key",
        } <= set(row)
        assert len(row["response_token_ids"]) == row["response_token_count"] <= 12
        assert row["full_text"] == row["question"] + row["answer"]
    scores = json.loads((base / "vetting" / "response_scores.json").read_text())
    assert all(0 <= row["score"] <= 100 for row in scores["results"] if "score" in row)
    assert (base / "vetting" / "scenario_scores.json").is_file()

    (site,) = (base / "activations").glob("*/residual")
    metadata = json.loads((site / "metadata.json").read_text())
    train = load_file(site / "train_all_layers.safetensors")["activations"]
    assert train.shape == (metadata["n_examples_pos"] + metadata["n_examples_neg"], 2, 576)
    assert metadata["n_layers"] == 30
    assert metadata["layers"] == [10, 17]
    val = load_file(site / "val_all_layers.safetensors")["activations"]
    assert val.shape[0] == metadata["n_val_pos"] + metadata["n_val_neg"] > 0

    for method in ("mean_diff", "probe", "random"):
        folder = base / "vectors" / site.parent.name / "residual" / method
        vector_metadata = json.loads((folder / "metadata.json").read_text())
        assert set(vector_metadata["layers"]) == {"10", "17"}
        assert (folder / "vectors.safetensors").is_file()
    steering = project.experiments / "small" / "steering" / BUREAUCRATIC / site.parent.name / "results.json"
    results = json.loads(steering.read_text())
    assert results["baseline"]
    assert results["runs"]
    assert (project.experiments / "small" / "extraction" / "extraction_evaluation.json").is_file()
    report = project.experiments / "small" / "report" / "report.html"
    assert report.is_file()
    assert first["report"] == str(report)


def test_the_table_holds_numbers(first):
    rows = {row["trait"]: row for row in first["results"]}
    row = rows[BUREAUCRATIC]
    assert row["responses_kept"] >= 8
    assert 0 <= row["val_accuracy_low"] <= row["val_accuracy"] <= row["val_accuracy_high"] <= 1
    assert row["steering_validated"] in (True, False)
    assert row["judge_is_stand_in"] is True


def test_a_second_run_does_nothing_and_loads_no_model(first, project):
    code = (
        "import sys; sys.argv = ['traits', 'run', '-e', 'small', '--json']\n"
        "from trait_assets.cli import app\n"
        "try: app()\n"
        "finally: print('LOADED', [m for m in ('torch', 'transformers', 'openai') if m in sys.modules], file=sys.stderr)"
    )
    import subprocess
    import sys

    from trait_assets.paths import REPOSITORY

    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=project.env,
        timeout=300,
        check=True,
    )
    assert json.loads(result.stdout)["up_to_date"] is True
    assert "LOADED []" in result.stderr
    said = project.traits("run", "-e", "small")
    assert "Everything is up to date" in said.stdout


def test_an_edited_line_is_generated_and_captured_alone(first, project):
    base = project.experiments / "small" / "extraction" / BUREAUCRATIC
    pos = json.loads((base / "responses" / "pos.json").read_text())
    line = pos[0]["line"]
    path = project.datasets / BUREAUCRATIC / "positive.txt"
    lines = path.read_text().split("\n")
    assert lines[line - 1] == pos[0]["question"]
    lines[line - 1] = (
        "The clerk set the receipt aside and remarked that, pending verification of the enclosed documentation, the office would"
    )
    path.write_text("\n".join(lines))

    report = project.run("run", "-e", "small")
    assert work(report, "responses")[BUREAUCRATIC]["generated_now"] == 1
    assert work(report, "activations")[BUREAUCRATIC]["captured_now"] == 1
    for stage in ("responses", "activations", "vectors", "steering_results"):
        assert report["stages"][stage]["states"] == {BUREAUCRATIC: "done", ENTHUSIASM: "current"}
    after = json.loads((base / "responses" / "pos.json").read_text())
    assert [r["answer"] for r in after[1:]] == [r["answer"] for r in pos[1:]]


def test_status_and_show_read_what_is_stored(first, project):
    status = json.loads(project.traits("status", "-e", "small", "--json").stdout)
    assert {row["trait"] for row in status} == {BUREAUCRATIC, ENTHUSIASM}
    assert all(entry["state"] == "current" for row in status for entry in row["stages"].values())
    shown = json.loads(project.traits("show", "-e", "small", "--json").stdout)
    assert {row["trait"] for row in shown} == {BUREAUCRATIC, ENTHUSIASM}
    text = project.traits("show", "-e", "small").stdout
    assert "stand-in" in text


def test_a_missing_artifact_behind_a_finished_stage_is_seen_and_rebuilt(first, project):
    site = next(
        (project.experiments / "small" / "extraction" / ENTHUSIASM / "activations").glob("*/residual")
    )
    (site / "train_all_layers.safetensors").unlink()
    status = json.loads(project.traits("status", "-e", "small", "--json").stdout)
    states = {row["trait"]: row["stages"]["activations"]["state"] for row in status}
    assert states == {BUREAUCRATIC: "current", ENTHUSIASM: "damaged"}
    report = project.run("run", "-e", "small")
    assert report["stages"]["activations"]["states"][ENTHUSIASM] == "done"
    assert (site / "train_all_layers.safetensors").is_file()
