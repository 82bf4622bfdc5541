"""`traits new`: what is written, that it is never overwritten and never runs before it is filled in."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import UserError
from trait_assets.scenarios.dataset import PLACEHOLDER, discover, load_trait
from trait_assets.scenarios.lint import lint
from trait_assets.scenarios.scaffold import NEUTRAL_QUESTIONS, new_trait


def test_a_scaffold_is_refused_until_it_is_filled_in(tmp_path: Path) -> None:
    files = new_trait(tmp_path, "humour/dry")
    assert {f.name for f in files} == {
        "positive.txt",
        "negative.txt",
        "definition.txt",
        "steering.json",
        "README.md",
    }
    with pytest.raises(UserError, match="scaffold"):
        load_trait(tmp_path, "humour/dry", require_steering=True)
    assert "scaffold" in discover(tmp_path).problems["humour/dry"]
    places = {(f.file, f.line) for f in lint(tmp_path, full=False).findings if f.code == "scaffold"}
    assert ("humour/dry/positive.txt", 1) in places
    assert ("humour/dry/definition.txt", 4) in places


def test_a_scaffold_that_is_filled_in_loads_without_a_word_about_it(tmp_path: Path) -> None:
    for path in new_trait(tmp_path, "humour/dry"):
        text = path.read_text(encoding="utf-8")
        path.write_text(PLACEHOLDER.sub("some words of my own here", text), encoding="utf-8")
    loaded = load_trait(tmp_path, "humour/dry", require_steering=True)
    assert loaded.paired
    assert loaded.steering is not None
    assert loaded.steering.questions == NEUTRAL_QUESTIONS
    assert not [
        f for f in lint(tmp_path, full=False).findings if f.code in ("scaffold", "foreign-file", "rubric")
    ]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "humour" / "dry"
    folder.mkdir(parents=True)
    (folder / "positive.txt").write_text("mine\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"already holds positive\.txt"):
        new_trait(tmp_path, "humour/dry")
    assert sorted(p.name for p in folder.iterdir()) == ["positive.txt"]
    with pytest.raises(UserError, match="not a trait name"):
        new_trait(tmp_path, "Humour/Dry")
