"""`traits draft` with a scripted model: what is asked, what is read, what is thrown out, and the mark on the
result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from resources.judges.protocol import Abstention, JudgeItem, Judgement, Score
from storage.errors import UserError
from trait_assets.scenarios.dataset import load_trait
from trait_assets.scenarios.drafting import draft_trait, openai_complete, parse_pairs, screen
from trait_assets.scenarios.lint import lint

GOOD = (
    "Anna opened the letter at breakfast. It was the end of everything she had hoped for, and from now "
    "on nothing",
    "Anna opened the letter at breakfast. It was the bill for the new window glass, and from next week "
    "on she",
)


class ScriptedModel:
    """Answers from a list, then from a corpus of good pairs, ten a round."""

    def __init__(self, answers: list[str], pairs: list[tuple[str, str]]) -> None:
        self.answers = answers
        self.pairs = pairs
        self.asked: list[list[dict[str, str]]] = []

    def __call__(self, messages: list[dict[str, str]]) -> str:
        self.asked.append(messages)
        if self.answers:
            return self.answers.pop(0)
        batch, self.pairs = self.pairs[:10], self.pairs[10:]
        return json.dumps({"pairs": [{"positive": f"{p} …", "negative": q} for p, q in batch]})


class KeywordJudge:
    """Scores by a word, abstains on another."""

    identity: dict[str, Any] = {"kind": "keyword"}  # noqa: RUF012
    stand_in = False

    def __init__(self) -> None:
        self.items: list[JudgeItem] = []

    def score(self, items: Sequence[JudgeItem], *, on_judged: Any = None) -> Iterator[Judgement]:
        self.items += items
        for item in items:
            if item.prompt.startswith(("Tina", "Sven", "Rosa")):
                yield Abstention(item.key, "refusal")
            elif item.polarity == "positive":
                yield Score(item.key, 40.0 if item.prompt.startswith(("Paul", "Olga")) else 90.0)
            else:
                yield Score(item.key, 10.0)

    def usage(self) -> dict[str, float]:
        return {}


def test_drafts_are_kept_when_they_pass_and_marked_as_drafts(tmp_path: Path, corpus: ModuleType) -> None:
    bad = json.dumps(
        {
            "pairs": [
                {"positive": "You are a gloomy poet. " + GOOD[0], "negative": GOOD[1]},
                {"positive": GOOD[0], "negative": GOOD[0]},
                {
                    "positive": GOOD[0],
                    "negative": GOOD[1] + " and a great many more words than the other side",
                },
                {"positive": GOOD[0] + ' "and', "negative": GOOD[1]},
                {"positive": GOOD[0] + " [NAME]", "negative": GOOD[1]},
                {"positive": "Too short.", "negative": GOOD[1]},
                {"positive": 3},
            ]
        }
    )
    model = ScriptedModel([bad, "I would rather not."], corpus.clean_pairs(60, 3))
    made = draft_trait(
        tmp_path, "mood/dusk", definition="a bleak outlook", n=24, complete=model, model="scripted"
    )
    assert len(made.pairs) == 24
    assert made.gave_up is None
    assert dict(made.rejected) == {
        "instruction": 1,
        "both-sides": 1,
        "pair-length": 1,
        "quotes-differ": 1,
        "unknown-placeholder": 1,
        "too-short": 1,
        "unreadable": 2,
    }
    loaded = load_trait(tmp_path, "mood/dusk", require_steering=True)
    assert len(loaded.positives) == len(loaded.negatives) == 24
    assert not loaded.positives[0].prompt.endswith("…")
    assert "a bleak outlook" in loaded.definition
    mark = json.loads((tmp_path / "mood/dusk/drafted.json").read_text(encoding="utf-8"))
    assert (mark["model"], mark["pairs"], mark["judge"]) == ("scripted", 24, None)
    warned = [f for f in lint(tmp_path, ["mood/dusk"], full=False).findings if f.severity != "info"]
    assert [(f.code, f.file) for f in warned] == [("draft", "mood/dusk/drafted.json")]
    assert "a bleak outlook" in model.asked[0][1]["content"]
    assert "Do not begin like these" in model.asked[-1][1]["content"]


def test_the_judge_throws_out_and_more_is_asked_for(tmp_path: Path, corpus: ModuleType) -> None:
    judge = KeywordJudge()
    model = ScriptedModel([], corpus.clean_pairs(120, 4))
    made = draft_trait(
        tmp_path, "mood/dusk", definition="bleak", n=40, complete=model, model="scripted", judge=judge
    )
    assert len(made.pairs) == 40
    assert made.rejected["judge abstained"] > 0
    assert made.rejected["positive scores too low"] > 0
    assert all(pair.positive_score == 90.0 and pair.negative_score == 10.0 for pair in made.pairs)
    assert not any(p.positive.startswith(("Paul", "Olga", "Tina")) for p in made.pairs)
    assert json.loads((tmp_path / "mood/dusk/drafted.json").read_text(encoding="utf-8"))["judge"] == {
        "kind": "keyword"
    }


def test_a_model_that_repeats_itself_is_given_up_on(tmp_path: Path, corpus: ModuleType) -> None:
    pairs = corpus.clean_pairs(3, 5)
    answer = json.dumps({"pairs": [{"positive": p, "negative": q} for p, q in pairs]})
    model = ScriptedModel([answer] * 30, [])
    made = draft_trait(tmp_path, "mood/dusk", definition="bleak", n=50, complete=model, model="scripted")
    assert len(made.pairs) == 3
    assert made.gave_up == "4 rounds in a row brought no new pair"
    assert made.rejected["near-duplicate"] == 12


def test_a_model_without_a_usable_pair_leaves_nothing_behind(tmp_path: Path) -> None:
    model = ScriptedModel(["no"] * 30, [])
    with pytest.raises(UserError, match="gave no usable pair in 4 rounds"):
        draft_trait(tmp_path, "mood/dusk", definition="bleak", n=10, complete=model, model="scripted")
    assert not (tmp_path / "mood").exists()


def test_existing_texts_stay_and_are_used(tmp_path: Path, corpus: ModuleType) -> None:
    folder = tmp_path / "mood" / "dusk"
    folder.mkdir(parents=True)
    (folder / "definition.txt").write_text(corpus.DEFINITION, encoding="utf-8")
    (folder / "steering.json").write_text('{"questions": ["Mine?"]}', encoding="utf-8")
    model = ScriptedModel([], corpus.clean_pairs(30, 6))
    with pytest.raises(UserError, match="definition already"):
        draft_trait(tmp_path, "mood/dusk", definition="other", n=5, complete=model, model="scripted")
    draft_trait(tmp_path, "mood/dusk", definition=None, n=5, complete=model, model="scripted")
    loaded = load_trait(tmp_path, "mood/dusk", require_steering=True)
    assert loaded.definition == corpus.DEFINITION.strip()
    assert loaded.steering is not None
    assert loaded.steering.questions == ("Mine?",)
    assert len(model.asked) == 1
    with pytest.raises(UserError, match=r"already holds positive\.txt, negative\.txt"):
        draft_trait(tmp_path, "mood/dusk", definition=None, n=5, complete=model, model="scripted")
    assert len(model.asked) == 1
    with pytest.raises(UserError, match="nothing says what the trait is"):
        draft_trait(tmp_path, "mood/new", definition=" ", n=5, complete=model, model="scripted")


def test_answers_are_read_in_the_shapes_that_models_give() -> None:
    pair = {"positive": "a  b\nc", "negative": "d e f..."}
    expected = ([("a b c", "d e f")], 0)
    assert parse_pairs(json.dumps({"pairs": [pair]})) == expected
    assert parse_pairs(f"Here you are:\n```json\n{json.dumps([pair])}\n```\nAnything else?") == expected
    assert parse_pairs(f"Sure! {json.dumps({'pairs': [pair]})} Done.") == expected
    assert parse_pairs(f"{json.dumps(pair)},\n{json.dumps(pair)}") == (expected[0] * 2, 0)
    broken = r'{"positive": "he left \ud83d and", "negative": "\ude00 so"}'
    assert parse_pairs(broken) == ([("he left \ufffd and", "\ufffd so")], 0)
    assert parse_pairs("") == ([], 1)
    assert parse_pairs('{"pairs": ') == ([], 1)
    assert parse_pairs("[" * 100_000) == ([], 1)


def test_a_good_pair_passes_the_screen_and_its_likeness_does_not() -> None:
    assert screen(*GOOD, [], "mood/dusk") is None
    assert screen(GOOD[0] + ".", GOOD[1], [], "mood/dusk") == "complete-sentence"
    assert screen(GOOD[0].replace("nothing", "evening"), GOOD[1], [], "mood/evening") == "names-trait"


def test_without_an_endpoint_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="OPENAI_BASE_URL"):
        openai_complete("gpt-4.1-mini")
