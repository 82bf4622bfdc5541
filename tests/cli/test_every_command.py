"""Every flag of every command does what it says, on a finished small experiment; a flag without a test fails here."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from trait_assets import cli
from trait_assets.experiments import Experiment, load_experiment
from trait_assets.paths import REPOSITORY

TRAIT, OTHER = "register/bureaucratic", "emotion/enthusiasm"
EXERCISED: dict[str, set[str]] = {}
# how tests may write a flag
SHORT = {
    "--traits": "-t",
    "--trait": "-t",
    "--experiment": "-e",
    "--stage": "-s",
    "--out": "-o",
    "--yes": "-y",
}
SHORT |= {"--definition": "-d", "--count": "-n", "--port": "-p"}


def exercises(command: str, *flags: str) -> Callable[[Any], Any]:
    """Marks a test as the one that gives these flags to the command."""
    EXERCISED.setdefault(command, set()).update(flags)
    return lambda test: test


def flags_of(command: str) -> set[str]:
    found = typer.main.get_command(cli.app).commands[command]  # type: ignore[attr-defined]
    return {
        next(o for o in p.opts if o.startswith("--")) for p in found.params if p.param_type_name == "option"
    }


@pytest.fixture
def traits(finished, monkeypatch, tmp_path) -> Callable[..., Result]:
    """`traits …` in this process, over a copy of the finished project that the test may change."""
    root = tmp_path / "project"
    shutil.copytree(finished.copy.root, root)
    for name, value in finished.copy.env.items():
        monkeypatch.setenv(name, value.replace(str(finished.copy.root), str(root)))
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "DAGSTER_HOME", "TRAITS_STORE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str | Path, code: int = 0) -> Result:
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return run


def test_no_flag_is_without_a_test():
    """Given by a test here, which says so with @exercises, or by a test of another room that types command and flag."""
    tests = {
        path: path.read_text(encoding="utf-8")
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        if path != Path(__file__) and path.parent.name != "docs"
    }
    group = typer.main.get_command(cli.app)
    for command in group.commands:  # type: ignore[attr-defined]
        if command in cli.STAGE_COMMANDS:
            # one set of options for all of them: test_every_option.py
            continue
        assert EXERCISED.get(command, set()) <= flags_of(command)
        rooms = [text for text in tests.values() if f'"{command}"' in text]
        for flag in flags_of(command) - {"--verbose"} - EXERCISED.get(command, set()):
            written = {flag, SHORT.get(flag, flag), flag.replace("--", "--no-", 1)}
            assert any(f'"{word}"' in text for text in rooms for word in written), (
                f"no test gives {flag} to `traits {command}`: write one, and mark it with @exercises if it is here"
            )


def test_every_flag_of_the_stage_commands_is_an_option_with_a_test():
    stage_flags = flags_of("run")
    assert all(flags_of(command) == stage_flags for command in cli.STAGE_COMMANDS)
    own = {"--experiment", "--traits", "--set", "--force", "--json", "--verbose", "--judge", "--judge-model"}
    options = {flag.removeprefix("--").replace("-", "_") for flag in stage_flags - own}
    # short for options of a group
    options -= {"generation", "generation_url"}
    assert options <= set(Experiment.model_fields)
    source = Path(__file__).with_name("test_every_option.py").read_text(encoding="utf-8")
    for flag in stage_flags - {"--json", "--verbose", "--experiment", "--base-model"}:
        negated = flag.replace("--", "--no-", 1)
        assert f'"{flag}"' in source or f'"{negated}"' in source, flag


BAD_INPUT = {
    "backfill": ["-e", "nosuch"],
    "diff": ["nowhere", "small"],
    "draft": ["mood/dusk", "-d", "a mood"],
    "export": ["-e", "nosuch", "-t", TRAIT, "-o", "out"],
    "forget": ["../up", "--yes"],
    "import": ["nosuch.pt", "-e", "small", "-t", TRAIT],
    "judge-check": ["--labelled", "nosuch.jsonl"],
    "lineage": ["small/no/such"],
    "lint": ["no/such"],
    "new": ["NotAllowed"],
    "new-experiment": ["small", "--extraction-model", "m"],
    "plan": ["-e", "nosuch"],
    "preview": ["no/such"],
    "show": ["-e", "nosuch"],
    "sql": ["DROP TABLE metrics"],
    "status": ["-e", "nosuch"],
    "steer": ["Hello", "-e", "nosuch", "-t", TRAIT],
    "transfer": ["-e", "small", "-t", TRAIT, "--on", "no/such"],
    **{command: ["-e", "nosuch"] for command in cli.STAGE_COMMANDS},
}
# nothing is given to them that could be wrong
NO_BAD_INPUT = {"rebuild-index", "publish-index"}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_line_and_verbose_adds_the_trace(command, traits):
    plain = traits(command, *BAD_INPUT[command], code=2)
    assert plain.stderr.startswith("error: ")
    assert "Traceback" not in plain.stderr
    verbose = traits(command, *BAD_INPUT[command], "--verbose", code=2)
    assert verbose.stderr.startswith(plain.stderr.split("\n")[0])
    assert "Traceback (most recent call last)" in verbose.stderr


def test_every_command_that_can_be_verbose_is_in_the_test_above():
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {c for c in commands if "--verbose" in flags_of(c)} == {*BAD_INPUT, *NO_BAD_INPUT}


@exercises("show", "--experiment", "--traits", "--json")
def test_show(traits):
    assert [row["trait"] for row in json.loads(traits("show", "-e", "small", "--json").stdout)] == [
        OTHER,
        TRAIT,
    ]
    one = json.loads(traits("show", "--experiment", "small", "--traits", TRAIT, "--json").stdout)
    assert [row["trait"] for row in one] == [TRAIT]
    assert OTHER not in traits("show", "-e", "small", "-t", TRAIT).stdout


@exercises("status", "--experiment", "--traits", "--json")
def test_status(traits):
    rows = json.loads(traits("status", "--experiment", "small", "--traits", TRAIT, "--json").stdout)
    assert [row["trait"] for row in rows] == [TRAIT]
    assert {entry["state"] for entry in rows[0]["stages"].values()} == {"current"}
    text = traits("status", "-e", "small").stdout
    assert "Experiment small" in text
    assert text.count("✓") >= 2 * len(rows[0]["stages"])


@exercises("lineage", "--stage", "--layer", "--method", "--name", "--lines", "--json")
def test_lineage(traits):
    what = f"small/{TRAIT}"

    def tree(*more: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(traits("lineage", what, *more, "--json").stdout)
        return found

    assert tree()["title"] != tree("--stage", "responses")["title"]
    assert "responses" in tree("--stage", "responses")["title"]
    vector = json.dumps(tree("--stage", "vectors", "--layer", "17", "--method", "probe"))
    assert "probe" in vector
    assert "17" in vector
    number = tree(
        "--stage", "vector_evaluation", "--layer", "17", "--method", "probe", "--name", "val_accuracy"
    )
    assert "val_accuracy" in json.dumps(number)
    few, all_of_them = (json.dumps(tree("--lines", n)) for n in ("1", "-1"))
    assert len(all_of_them) > len(few)


@exercises("sql", "--json")
def test_sql(traits):
    query = "SELECT count(*) AS n FROM current_manifests WHERE experiment = 'small' AND stage = 'vectors'"
    assert json.loads(traits("sql", query, "--json").stdout) == [{"n": 2}]
    assert "2" in traits("sql", query).stdout


@exercises("rebuild-index")
def test_rebuild_index(traits, monkeypatch):
    import os

    index = Path(os.environ["TRAITS_STATE"]) / "lineage.duckdb"
    index.unlink()
    said = traits("rebuild-index").stdout
    assert re.search(r"[1-9]\d* files indexed", said)
    assert index.is_file()


@exercises("diff", "--traits", "--json")
def test_diff(traits):
    found = json.loads(traits("diff", "small", "small", "--traits", TRAIT, "--json").stdout)
    assert all(abs(row["cosine"] - 1) < 1e-6 for row in found["cosines"])
    assert {row["trait"] for row in found["cosines"]} == {TRAIT}
    both = json.loads(traits("diff", "small", "small", "--json").stdout)
    assert {row["trait"] for row in both["cosines"]} == {TRAIT, OTHER}


@exercises("export", "--methods", "--layers")
@exercises("import", "--experiment", "--trait", "--component", "--position", "--format", "--any-model")
def test_what_is_exported_can_be_imported(traits, tmp_path):
    out = tmp_path / "out"
    said = traits(
        "export",
        "-e",
        "small",
        "-t",
        TRAIT,
        "-o",
        out,
        "--methods",
        "probe",
        "--layers",
        "17",
        "--format",
        "pt",
    ).stdout
    files = sorted(path for path in out.rglob("*") if path.suffix == ".pt")
    assert [path.name for path in files] == ["layer17.pt"]
    assert "probe" in str(files[0])
    assert "mean_diff" not in said
    where = [
        "--experiment",
        "small",
        "--trait",
        TRAIT,
        "--position",
        "response[:]",
        "--component",
        "residual",
    ]
    written = traits("import", files[0].parent, *where, "--format", "pt", "--any-model").stdout
    assert "wrote" in written
    assert "response" in written
    refused = traits("import", files[0].parent, *where, "--format", "gguf", code=2)
    assert refused.stderr.startswith("error: ")
    elsewhere = traits("import", files[0].parent, *where, "--format", "pt", "--component", "mlp_out", code=2)
    assert "mlp_out" in elsewhere.stderr


@exercises("transfer", "--experiment", "--trait", "--on", "--on-experiment", "--method", "--layer", "--json")
def test_transfer(traits):
    arguments = ["--experiment", "small", "--trait", TRAIT, "--on", f"{TRAIT},{OTHER}"]
    rows = json.loads(traits("transfer", *arguments, "--json").stdout)
    assert [row["on_trait"] for row in rows] == [TRAIT, OTHER]
    chosen = json.loads(
        traits(
            "transfer",
            *arguments,
            "--on-experiment",
            "small",
            "--method",
            "mean_diff",
            "--layer",
            "10",
            "--json",
        ).stdout
    )
    assert {(row["method"], row["layer"]) for row in chosen} == {("mean_diff", 10)}
    assert (
        "mean_diff at layer 10"
        in traits("transfer", *arguments, "--method", "mean_diff", "--layer", "10").stdout
    )
    assert "nosuch" in traits("transfer", *arguments, "--on-experiment", "nosuch", code=2).stderr


@exercises("judge-check", "--labelled", "--judge", "--judge-model", "--json")
def test_judge_check(traits, tmp_path, openai_server, monkeypatch):
    rows = [
        {
            "trait": TRAIT,
            "prompt": "The clerk said",
            "text": "pursuant to section four, the form",
            "label": 90,
        },
        {"trait": TRAIT, "prompt": "The clerk said", "text": "hey, no worries at all", "label": 5},
        {"trait": TRAIT, "prompt": "The office", "text": "hereby acknowledges receipt", "label": 95},
        {"trait": TRAIT, "prompt": "The office", "text": "is great fun today", "label": 10},
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("OPENAI_BASE_URL", openai_server.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    found = json.loads(
        traits(
            "judge-check", "--labelled", path, "--judge", "openai", "--judge-model", "loopback-9", "--json"
        ).stdout
    )
    assert found["overall"]["n"] == 4
    assert found["judge"]["model"] == "loopback-9"


@exercises(
    "steer", "--experiment", "--trait", "--dose", "--layer", "--method", "--max-new-tokens", "--temperature"
)
def test_steer(traits, smollm2):
    said = traits(
        "steer", "Describe your day.", "--experiment", "small", "--trait", TRAIT, "--dose", "0.2", "--dose", "-0.2",
        "--layer", "10", "--method", "mean_diff", "--max-new-tokens", "4", "--temperature", "0.5",
    ).stdout  # fmt: skip
    assert "mean_diff" in said
    assert "layer 10" in said
    for dose in ("0.2", "-0.2"):
        assert dose in said.replace("−", "-")
    short = traits("steer", "Describe your day.", "-e", "small", "-t", TRAIT, "--max-new-tokens", "2").stdout
    assert len(short) < len(said)


@exercises(
    "preview", "--model", "--experiment", "--position", "--count", "--base-model", "--max-new-tokens", "--seed",
    "--root", "--json",
)  # fmt: skip
def test_preview(traits, smollm2, tmp_path):
    shutil.copytree(REPOSITORY / "datasets" / "traits" / TRAIT, tmp_path / "mine" / TRAIT)
    at = ["--root", tmp_path / "mine", "--count", "1", "--json"]

    def preview(*more: str | Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(traits("preview", TRAIT, *at, *more).stdout)
        return found

    plain = preview("--base-model", "--max-new-tokens", "3", "--position", "response[:2]")
    assert not plain["chat"]
    assert plain["position"] == "response[:2]"
    assert len(plain["rows"]) == 2
    assert all(len(row["tokens"]) - row["prompt_tokens"] <= 3 for row in plain["rows"])
    model = "embedded:smollm2-135m-instruct"
    assert preview("--model", model, "--max-new-tokens", "0", "--position", "prompt[-1]")["chat"]
    # the experiment says that its model is a base model
    assert not preview("--experiment", "small", "--max-new-tokens", "0", "--position", "prompt[-1]")["chat"]
    lines = {
        tuple(
            row["line"]
            for row in preview("--seed", n, "--max-new-tokens", "0", "--position", "prompt[-1]")["rows"]
        )
        for n in ("1", "2", "3")
    }
    assert len(lines) > 1


# flag and value → what of the estimate it changes
PLANNED: dict[str, tuple[list[str], Callable[[dict[str, Any], dict[str, Any]], bool]]] = {
    "--traits": (["emotion/*"], lambda b, g: g["stages"][0]["traits"] == 1),
    "--traits-count": (["100"], lambda b, g: g["stages"][0]["rows"] == 50 * b["stages"][0]["rows"]),
    "--device-profile": (["h100"], lambda b, g: g["rates"]["capture"]["source"] == "formula for h100"),
    "--gpus": (["2"], lambda b, g: g["rates"]["capture"]["value"] > b["rates"]["capture"]["value"]),
    "--model-shape": (["8b"], lambda b, g: g["rates"]["load"]["value"] > 10 * b["rates"]["load"]["value"]),
    "--params": (["3e9"], lambda b, g: g["rates"]["generate"]["value"] < b["rates"]["generate"]["value"]),
    "--generate-rate": (["1000"], lambda b, g: g["rates"]["generate"]["value"] == 1000),
    "--capture-rate": (["1000"], lambda b, g: g["rates"]["capture"]["value"] == 1000),
    "--steer-rate": (["1000"], lambda b, g: g["rates"]["steer"]["value"] == 1000),
    "--judge-rate": (["50"], lambda b, g: g["rates"]["judge"]["value"] == 50),
    "--judge": (["openai"], lambda b, g: g["total"]["judge_tokens"] > b["total"]["judge_tokens"] == 0),
    "--judge-price": (["1,2", "--judge", "openai"], lambda b, g: g["total"]["judge_usd"] > 0),
    "--judge-model": (["gpt-4.1-mini", "--judge", "openai"], lambda b, g: g["total"]["judge_tokens"] > 0),
    "--chunk": (["1"], lambda b, g: (b["total"]["runs"], g["total"]["runs"]) == (1, 2)),
    "--set": (["max_new_tokens=40"], lambda b, g: g["stages"][2]["tokens"] > 3 * b["stages"][2]["tokens"]),
}


@exercises("plan", "--experiment", "--force", "--json", *PLANNED)
def test_plan(traits):
    def estimate(*more: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(traits("plan", "--experiment", "small", "--json", *more).stdout)
        return found

    assert estimate()["total"]["tokens"] == 0
    # by formula: what past runs measured goes before it
    formula = ("--force", "--device-profile", "cpu")
    base = estimate(*formula)
    assert base["total"]["tokens"] > 0
    for flag, (words, holds) in PLANNED.items():
        assert holds(base, estimate(*formula, flag, *words)), flag


@pytest.mark.slow
@exercises("plan", "--calibrate")
def test_plan_measures_first(traits):
    found = json.loads(traits("plan", "-e", "small", "--force", "--calibrate", "--json").stdout)
    assert "formula" not in found["rates"]["capture"]["source"]


@exercises("lint", "--quiet")
def test_lint_quietly(traits, tmp_path):
    # a folder of twelve lines is told of as an information
    folder = tmp_path / "t" / "small"
    shutil.copytree(REPOSITORY / "datasets" / "traits" / TRAIT, folder)
    for side in ("positive", "negative"):
        lines = (folder / f"{side}.txt").read_text().splitlines(keepends=True)[:12]
        (folder / f"{side}.txt").write_text("".join(lines))
    loud = traits("lint", "--fast", "--root", tmp_path)
    quiet = traits("lint", "--fast", "--root", tmp_path, "--quiet")
    assert ": info [" in loud.stdout
    assert ": info [" not in quiet.stdout
    assert quiet.stdout.splitlines()[-1] == loud.stdout.splitlines()[-1]


@exercises("new-experiment", "--extraction-model", "--application-model", "--traits")
def test_new_experiment_writes_what_was_given_and_every_default(traits):
    import os

    said = traits(
        "new-experiment", "mine", "--extraction-model", "org/base", "--application-model", "org/chat", "--traits", "a/*,b/c"
    ).stdout  # fmt: skip
    assert "mine" in said
    root = Path(os.environ["TRAITS_EXPERIMENTS"])
    made = load_experiment(root, "mine")
    assert (made.extraction_model, made.application_model, made.traits) == (
        "org/base",
        "org/chat",
        ["a/*", "b/c"],
    )
    path = root / "mine" / "config.yaml"
    # with every comment taken for real, it is the same experiment: the defaults are the true ones
    lines = [
        line.removeprefix("# ") for line in path.read_text().splitlines() if "Options and their" not in line
    ]
    path.write_text("\n".join(lines))
    assert load_experiment(root, "mine") == made
    values = yaml.safe_load(path.read_text())
    assert set(values) == set(Experiment.model_fields) - {"name"}
    assert set(values["steer"]) == set(type(made.steer).model_fields)


@exercises("ui", "--port", "--host")
def test_ui_starts_dagster_on_loopback_with_the_project_s_history(traits, monkeypatch):
    import subprocess

    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(subprocess, "call", lambda command, cwd, env: started.append((command, env)) or 0)
    traits("ui")
    traits("ui", "--port", "4321", "--host", "0.0.0.0")
    (first, env), (second, _) = started
    assert first[1:] == ["dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", "3000"]
    assert second[-4:] == ["-h", "0.0.0.0", "-p", "4321"]
    assert (Path(env["DAGSTER_HOME"]) / "dagster.yaml").is_file()
