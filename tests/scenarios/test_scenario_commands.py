"""`traits new`, `lint`, `draft` and `preview` as they are typed, and what a preview shows."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from storage.errors import UserError
from trait_assets.cli import app
from trait_assets.scenarios.dataset import load_trait
from trait_assets.scenarios.preview import preview_trait


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a judge answers is kept with results; those of a test are its own."""
    monkeypatch.delenv("TRAITS_STORE", raising=False)
    monkeypatch.setenv("TRAITS_EXPERIMENTS", str(tmp_path / "results"))
    monkeypatch.setenv("TRAITS_STATE", str(tmp_path / "state"))


def traits(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def test_new_then_lint_says_what_is_left_to_write(tmp_path: Path) -> None:
    made = traits("new", "humour/dry", "--root", tmp_path)
    assert made.exit_code == 0
    assert "traits lint humour/dry" in made.output
    again = traits("new", "humour/dry", "--root", tmp_path)
    assert again.exit_code == 2
    assert "already holds" in again.output
    linted = traits("lint", "humour/dry", "--fast", "--root", tmp_path)
    assert linted.exit_code == 1
    assert "humour/dry/positive.txt:1: error [scaffold]" in linted.output


def test_the_exit_status_tells_errors_from_warnings(tmp_path: Path, corpus: ModuleType) -> None:
    folder = corpus.clean_trait(tmp_path, "made/good", 1)
    assert traits("lint", "--fast", "--strict", "--root", tmp_path).exit_code == 0
    (folder / "notes.csv").write_text("x", encoding="utf-8")
    assert traits("lint", "--fast", "--root", tmp_path).exit_code == 0
    assert traits("lint", "--fast", "--strict", "--root", tmp_path).exit_code == 1
    assert traits("lint", "made/goood", "--fast", "--root", tmp_path).exit_code == 2


def test_lint_as_json_is_one_document(tmp_path: Path, corpus: ModuleType) -> None:
    folder = corpus.clean_trait(tmp_path, "made/good", 1)
    (folder / "steering.json").unlink()
    done = traits("lint", "--fast", "--json", "--root", tmp_path)
    report = json.loads(done.output)
    assert report["counts"] == {"error": 0, "warning": 1, "info": 0}
    assert report["findings"][0]["code"] == "missing-steering"


def test_draft_over_the_protocol_is_vetted_and_marked(
    tmp_path: Path, corpus: ModuleType, openai_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real client against a real server: the same address answers as drafting model and as judge."""
    server_module = sys.modules[type(openai_server).__module__]
    pairs = corpus.clean_pairs(60, 7)
    asked = []
    openai_server.teach("mood/dusk", [p for p, _ in pairs], [q for _, q in pairs])

    def script(request: Any) -> Any:
        if "Write " not in request.prompt or '"pairs"' not in request.prompt:
            return None
        asked.append(request)
        if len(asked) == 1:
            return server_module.Reply(429, server_module.error_body("slow down"), {"retry-after": "0.01"})
        batch = [pairs.pop(0) for _ in range(10)]
        rows = [{"positive": p, "negative": q} for p, q in batch]
        return server_module.Reply(200, server_module.completion(json.dumps({"pairs": rows})))

    openai_server.script = script
    monkeypatch.setenv("OPENAI_BASE_URL", openai_server.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-1234")
    done = traits(
        "draft", "mood/dusk", "-d", "a dark mood", "-n", "12", "--model", "loopback-1", "--root", tmp_path
    )
    assert done.exit_code == 0, done.output
    assert len(asked) >= 3
    loaded = load_trait(tmp_path, "mood/dusk", require_steering=True)
    assert len(loaded.positives) == len(loaded.negatives) == 12
    text = (tmp_path / "mood" / "dusk" / "drafted.json").read_text(encoding="utf-8")
    mark = json.loads(text)
    assert mark["judge"]["kind"] == "openai"
    assert all(p >= 60 and n <= 40 for p, n in mark["scores"])
    assert "sk-test-1234" not in text + done.output


def test_a_draft_takes_server_seed_and_thresholds_from_its_options(
    tmp_path: Path, corpus: ModuleType, openai_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_module = sys.modules[type(openai_server).__module__]
    asked: list[str] = []
    pairs = corpus.clean_pairs(120, 7)

    def script(request: Any) -> Any:
        if '"pairs"' not in request.prompt:
            return None
        asked.append(request.prompt)
        rows = [{"positive": p, "negative": q} for p, q in (pairs.pop(0) for _ in range(10))]
        return server_module.Reply(200, server_module.completion(json.dumps({"pairs": rows})))

    openai_server.script = script
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-1234")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    at = [
        "-d",
        "a dark mood",
        "-n",
        "10",
        "--base-url",
        openai_server.base_url,
        "--model",
        "m",
        "--root",
        tmp_path,
    ]
    assert traits("draft", "mood/dusk", *at, "--no-vet", "--seed", "3").exit_code == 0
    # nothing but drafts was asked for, and nothing is said to be vetted
    assert len(openai_server.requests) == len(asked)
    assert not json.loads((tmp_path / "mood" / "dusk" / "drafted.json").read_text()).get("judge")
    first = asked[0]
    asked.clear()
    assert traits("draft", "mood/dawn", *at, "--no-vet", "--seed", "4").exit_code == 0
    assert asked[0] != first
    # the judge is the server of OPENAI_BASE_URL
    monkeypatch.setenv("OPENAI_BASE_URL", openai_server.base_url)
    openai_server.teach("mood/noon", [p for p, _ in pairs], [q for _, q in pairs])
    done = traits("draft", "mood/noon", *at, "--vet", "--pos-threshold", "55", "--neg-threshold", "45")
    assert done.exit_code == 0, done.output
    mark = json.loads((tmp_path / "mood" / "noon" / "drafted.json").read_text())
    assert mark["thresholds"] == {"positive": 55.0, "negative": 45.0}
    assert all(p >= 55 and n <= 45 for p, n in mark["scores"])
    # vetting finds the judge's answers about what was drafted
    asked_now = len(openai_server.requests)
    experiment = tmp_path / "results" / "e" / "config.yaml"
    experiment.parent.mkdir()
    experiment.write_text("extraction_model: embedded:smollm2-135m-instruct\nsteering: false\n")
    monkeypatch.setenv("TRAITS_DATASETS", str(tmp_path))
    vetted = traits(
        "vet-scenarios", "-e", "e", "-t", "mood/noon", "--pos-threshold", "55", "--neg-threshold", "45"
    )
    assert vetted.exit_code == 0, vetted.output
    assert len(openai_server.requests) == asked_now
    impossible = traits("draft", "mood/eve", *at, "--pos-threshold", "100", "--neg-threshold", "0")
    assert impossible.exit_code == 2
    assert "no usable pair" in impossible.output


def test_a_key_that_the_drafting_server_repeats_is_not_shown(
    tmp_path: Path, openai_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-test-0451-never-shown"
    module = sys.modules[type(openai_server).__module__]
    openai_server.script = lambda request: module.Reply(
        401, module.error_body(f"Incorrect API key provided: {secret}")
    )
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    monkeypatch.setenv("OPENAI_BASE_URL", openai_server.base_url)
    at = ["draft", "mood/dusk", "-d", "a dark mood", "--no-vet", "--root", tmp_path, "--verbose"]
    done = traits(*at)
    assert done.exit_code != 0
    assert "Incorrect API key provided: ***" in done.output + str(done.exception)
    assert secret not in done.output + "".join(traceback.format_exception(done.exception))
    for spoilt in (f"{secret}\nx", f"{secret}…"):
        monkeypatch.setenv("OPENAI_API_KEY", spoilt)
        done = traits(*at)
        assert done.exit_code != 0
        assert "OPENAI_API_KEY" in done.output + str(done.exception)
        assert secret not in done.output + "".join(traceback.format_exception(done.exception))
    done = traits(*at, "--base-url", "http://me:hunter2@host/v1")
    assert "hunter2" not in done.output + "".join(traceback.format_exception(done.exception))


def test_draft_without_a_model_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    done = traits("draft", "mood/dusk", "-d", "a dark mood", "--root", tmp_path)
    assert done.exit_code == 2
    assert "OPENAI_BASE_URL" in done.output


def test_a_bad_preview_is_refused_before_a_model_loads(
    tmp_path: Path, corpus: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.clean_trait(tmp_path, "made/good", 1)

    def never(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("resources.models.loading.load", never)
    for words, expected in (
        (["made/good", "--position", "response[::2]"], "position"),
        (["made/none"], "there is no trait"),
        (["made/good", "--model", "./no/such/folder"], "no/such/folder"),
    ):
        done = traits("preview", *words, "--root", tmp_path)
        assert done.exit_code == 2, done.output
        assert expected in done.output.replace("\n", "")


def joined(tokens: Sequence[str]) -> str:
    return "".join(tokens)


def test_a_preview_shows_the_tokens_that_are_measured(
    tmp_path: Path, corpus: ModuleType, smollm2: Any
) -> None:
    corpus.clean_trait(tmp_path, "made/good", 1)
    loaded = load_trait(tmp_path, "made/good", require_steering=True)
    shown = preview_trait(smollm2, loaded, "response[:3]", n=2, chat=False, max_new_tokens=6)
    assert [row.polarity for row in shown.rows] == ["positive", "positive", "negative", "negative"]
    assert [row.line for row in shown.rows[:2]] == [row.line for row in shown.rows[2:]]
    for row in shown.rows:
        assert joined(row.tokens[: row.prompt_tokens]) == row.prompt
        assert joined(row.tokens[row.prompt_tokens :]).strip() == row.completion.strip()
        assert row.selected == (row.prompt_tokens, row.prompt_tokens + 3)
    chat = preview_trait(smollm2, loaded, "all[:]", n=1, max_new_tokens=0)
    assert chat.chat
    assert chat.rows[0].prompt in joined(chat.rows[0].tokens)
    assert chat.rows[0].prompt_tokens == len(chat.rows[0].tokens)
    assert any("token 0" in note for note in chat.notes)
    nothing = preview_trait(smollm2, loaded, "response[:]", n=1, max_new_tokens=0)
    assert nothing.rows[0].selected is None
    assert any("selects no token" in note for note in nothing.notes)
    json.dumps(shown.record())
    with pytest.raises(UserError, match="shows nothing"):
        preview_trait(smollm2, loaded, n=0)
