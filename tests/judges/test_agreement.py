"""Agreement with hand-labelled texts: the numbers by hand, the shipped texts, and what the local judge makes
of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from resources.judges.agreement import Labelled, agreement, check_agreement, load_labelled
from resources.judges.local_judge import LocalJudge, fit_for
from resources.judges.openai_judge import OpenAIJudge, OpenAISettings
from resources.judges.protocol import Abstention, Score, TraitContext
from storage.errors import UserError

TRAITS = Path(__file__).parents[2] / "datasets" / "traits"


class NoCache:
    def get(self, key: str) -> None:
        return None

    def put_many(self, rows: Any) -> None:
        pass


def contexts(pairs: int | None = None) -> dict[str, TraitContext]:
    found = {}
    for trait in sorted({row.trait for row in load_labelled()}):
        folder = TRAITS / trait
        sides = [
            tuple((folder / f"{side}.txt").read_text(encoding="utf-8").splitlines()[:pairs])
            for side in ("positive", "negative")
        ]
        found[trait] = TraitContext(trait, (folder / "definition.txt").read_text(encoding="utf-8"), *sides)
    return found


def test_the_numbers_by_hand_and_against_scipy_and_sklearn() -> None:
    labels = [90.0, 80.0, 70.0, 50.0, 30.0, 20.0, 10.0, 10.0]
    scores = [95.0, 40.0, 75.0, 60.0, 40.0, 20.0, 30.0, 5.0]
    pairs: list[Any] = [
        (Labelled(str(i), "t", "", "x", label), Score(str(i), score))
        for i, (label, score) in enumerate(zip(labels, scores, strict=True))
    ]
    pairs.append((Labelled("z", "t", "", "x", 90.0), Abstention("z", "refusal")))
    row = agreement("t", pairs)
    assert (row.n, row.n_scored, row.abstained) == (9, 8, {"refusal": 1})
    assert row.mae == pytest.approx(sum(abs(a - b) for a, b in zip(labels, scores, strict=True)) / 8)
    assert row.spearman == pytest.approx(spearmanr(labels, scores)[0])
    sides = [(label >= 60, score) for label, score in zip(labels, scores, strict=True) if not 40 < label < 60]
    assert row.auc == pytest.approx(roc_auc_score([a for a, _ in sides], [b for _, b in sides]))
    # by hand: 3 high × 4 low pairs; 40 ties with 40
    assert row.auc == pytest.approx((4 + 3.5 + 4) / 12)


def test_numbers_that_cannot_be_had_are_none() -> None:
    row = agreement("t", [(Labelled("a", "t", "", "x", 90), Score("a", 80.0))])
    assert (row.spearman, row.auc, row.mae) == (None, None, 10.0)
    assert agreement("t", [(Labelled("a", "t", "", "x", 90), Abstention("a", "empty"))]).mae is None
    assert "mae" not in agreement("t", []).record()


def test_the_shipped_texts_cover_enough() -> None:
    rows = load_labelled()
    per_trait = Counter(row.trait for row in rows)
    assert len(rows) >= 60
    assert len(per_trait) >= 4
    assert len({row.id for row in rows}) == len(rows)
    assert len({row.text for row in rows}) == len(rows)
    for trait in per_trait:
        assert (TRAITS / trait / "definition.txt").is_file(), trait
        labels = [row.label for row in rows if row.trait == trait]
        assert sum(label >= 60 for label in labels) >= 4
        assert sum(label <= 40 for label in labels) >= 3
    # nothing that a judge could have been fitted on
    scenarios = {
        line
        for path in TRAITS.glob("*/*/*itive.txt")
        for line in path.read_text(encoding="utf-8").splitlines()
    }
    assert not scenarios & {row.text for row in rows}


def test_the_local_judge_tells_the_sides_apart() -> None:
    report = check_agreement(LocalJudge(lambda trait: NoCache()), load_labelled(), contexts(pairs=25))
    assert report.stand_in
    assert report.overall.n == report.overall.n_scored == len(load_labelled())
    assert report.overall.auc is not None
    assert report.overall.auc >= 0.95
    assert report.overall.spearman is not None
    assert report.overall.spearman >= 0.75


@pytest.mark.slow
def test_the_local_judge_on_all_scenarios() -> None:
    known = contexts()
    report = check_agreement(LocalJudge(lambda trait: NoCache()), load_labelled(), known)
    for row in (*report.traits, report.overall):
        print(row.record())
    assert report.overall.auc is not None
    assert report.overall.auc >= 0.95
    accuracies = []
    for trait, context in known.items():
        fit = fit_for(context)
        assert fit is not None
        assert fit.out_of_fold is not None
        n = len(context.positives)
        accuracy = ((fit.out_of_fold[:n] > 0.5).mean() + (fit.out_of_fold[n:] < 0.5).mean()) / 2
        print(
            trait,
            f"out-of-fold accuracy {accuracy:.3f}",
            f"kept {(fit.out_of_fold[:n] >= 0.6).mean():.2f} / {(fit.out_of_fold[n:] <= 0.4).mean():.2f}",
        )
        accuracies.append(accuracy)
    assert sum(accuracies) / len(accuracies) >= 0.9


def test_any_judge_can_be_checked(openai_server: Any) -> None:
    settings = OpenAISettings(model="loopback-1", base_url=openai_server.base_url)
    known = {
        trait: ctx
        for trait, ctx in contexts(5).items()
        if trait in ("register/bureaucratic", "language/spanish")
    }
    report = check_agreement(
        OpenAIJudge(settings, lambda trait: NoCache(), api_key="k"), load_labelled(), known
    )
    assert [row.trait for row in report.traits] == ["language/spanish", "register/bureaucratic"]
    assert report.overall.auc is not None
    assert report.overall.auc > 0.9
    assert report.to_json()["judge"]["model"] == "loopback-1"
    assert len(report.rows) == sum(row.trait in known for row in load_labelled()) == 30


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", ":2"),
        ('{"trait": "a/b", "label": 5}', "text"),
        ('{"trait": "a/b", "text": "x", "label": "high"}', "label"),
        ('{"trait": "a/b", "text": "x", "label": 101}', "outside"),
        ("[1]", ":2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"trait": "a/b", "text": "x", "label": 5}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_labelled(path)
    assert f"{path}:2" in str(error.value)
    assert says in str(error.value)


def test_unknown_traits_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_labelled(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="none of the labelled traits"):
        check_agreement(LocalJudge(lambda trait: NoCache()), load_labelled(), {})
