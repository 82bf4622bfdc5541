"""Held-out rows: groups stay whole, sides stay balanced, nothing stands on both sides of the split."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import UserError
from trait_assets.activations.split import RowInfo, Split, group_folds, group_rows, split_rows

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("TRAITS_SHARED", ROOT / ".." / "shared"))
WORDS = [
    "river",
    "copper",
    "lantern",
    "violin",
    "harbour",
    "mustard",
    "glacier",
    "tunnel",
    "orchid",
    "saddle",
    "compass",
    "walnut",
    "thunder",
    "velvet",
    "anchor",
    "meadow",
    "furnace",
    "pebble",
    "satchel",
    "canyon",
    "ribbon",
    "turbine",
    "willow",
    "cathedral",
    "biscuit",
    "falcon",
    "marble",
    "trumpet",
]


def sentence(seed: int, length: int = 9) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, length, replace=False))


def rows_of(texts: dict[str, list[str]], pairs: bool = False) -> list[RowInfo]:
    return [
        RowInfo(f"{polarity}:{i}", polarity, i, text, i if pairs else None)
        for polarity, lines in texts.items()
        for i, text in enumerate(lines)
    ]


def distinct(n_pos: int, n_neg: int | None = None, pairs: bool = False) -> list[RowInfo]:
    n_neg = n_pos if n_neg is None else n_neg
    return rows_of(
        {
            "positive": [sentence(i) for i in range(n_pos)],
            "negative": [sentence(1000 + i) for i in range(n_neg)],
        },
        pairs,
    )


def sides(keys: list[str]) -> tuple[int, int]:
    return sum(k.startswith("positive") for k in keys), sum(k.startswith("negative") for k in keys)


def divided(split: Split) -> set[int]:
    return {split.groups[k] for k in split.train} & {split.groups[k] for k in split.val}


def test_five_paraphrase_groups_stay_whole() -> None:
    families = [sentence(i, 12) for i in range(5)]
    lines = [f"{family}, {ending}" for family in families for ending in ("please", "thanks", "today", "now")]
    rows = rows_of({"positive": lines, "negative": [sentence(500 + i) for i in range(20)]})
    split = split_rows(rows, val_split=0.2, seed=0)
    assert not divided(split)
    by_family = [{split.groups[f"positive:{4 * f + i}"] for i in range(4)} for f in range(5)]
    assert all(len(ids) == 1 for ids in by_family)
    assert len(set.union(*by_family)) == 5
    assert sides(split.val) == (4, 4)


def test_pairs_are_never_divided() -> None:
    split = split_rows(distinct(40, pairs=True), val_split=0.2, seed=3)
    assert {k.split(":")[1] for k in split.val if k[0] == "p"} == {
        k.split(":")[1] for k in split.val if k[0] == "n"
    }
    assert sides(split.val) == (8, 8)


def test_the_split_is_not_the_tail_and_depends_on_the_seed_alone() -> None:
    rows = distinct(30)
    first, again, other = (split_rows(rows, val_split=0.2, seed=s) for s in (0, 0, 1))
    assert first == again
    assert set(first.val) != set(other.val)
    tail = {f"{p}:{i}" for p in ("positive", "negative") for i in range(24, 30)}
    assert set(first.val) != tail
    shuffled = list(reversed(rows))
    assert set(split_rows(shuffled, val_split=0.2, seed=0).val) == set(first.val)


def test_a_new_line_moves_few_of_the_others() -> None:
    before = split_rows(distinct(50), val_split=0.2, seed=0)
    after = split_rows(
        [*distinct(50), RowInfo("positive:99", "positive", 99, sentence(77_000), None)], val_split=0.2, seed=0
    )
    assert len(set(before.val) ^ (set(after.val) - {"positive:99"})) <= 2


def test_positives_come_first_and_keep_their_order() -> None:
    rows = list(reversed(distinct(12)))
    split = split_rows(rows, val_split=0.25, seed=0)
    for part in (split.train, split.val):
        polarity = [k.split(":")[0] for k in part]
        assert polarity == sorted(polarity, reverse=True)
    assert [k for k in split.train if k[0] == "p"] == [
        r.key for r in rows if r.key in split.train and r.key[0] == "p"
    ]


def test_a_line_on_both_sides_is_excluded_from_both() -> None:
    rows = [
        *distinct(10),
        RowInfo("positive:10", "positive", 10, "The  same line.", None),
        RowInfo("negative:10", "negative", 10, "The same line.", None),
    ]
    split = split_rows(rows, val_split=0.2, seed=0)
    assert set(split.excluded) == {"positive:10", "negative:10"}
    assert "other side" in split.excluded["positive:10"]
    assert not {"positive:10", "negative:10"} & {*split.train, *split.val, *split.groups}
    assert any("2 rows excluded" in note for note in split.notes)


def test_punctuation_and_case_may_be_the_trait_and_are_no_label_noise() -> None:
    rows = [
        *distinct(6),
        RowInfo("positive:6", "positive", 6, "hello there friend!", None),
        RowInfo("negative:6", "negative", 6, "Hello there, friend", None),
    ]
    split = split_rows(rows, val_split=0.2, seed=0)
    assert not split.excluded
    assert split.groups["positive:6"] == split.groups["negative:6"]


def test_the_same_prompt_under_two_system_prompts_is_one_group_and_not_excluded() -> None:
    rows = []
    for i in range(10):
        for j in range(3):
            for polarity in ("positive", "negative"):
                key = f"{polarity}:{3 * i + j}"
                rows.append(RowInfo(key, polarity, 3 * i + j, sentence(i), None, f"be {polarity} {j}"))
    split = split_rows(rows, val_split=0.2, seed=0)
    assert not split.excluded
    assert len(set(split.groups.values())) == 10
    assert not divided(split)
    assert sides(split.val) == (6, 6)


def test_a_common_opening_does_not_make_all_scenarios_alike() -> None:
    lines = [f"My friend asked me what I thought, and I said that {sentence(i, 5)}" for i in range(60)]
    split = split_rows(rows_of({"positive": lines[:30], "negative": lines[30:]}), val_split=0.2, seed=0)
    assert max(Counter(split.groups.values()).values()) <= 3
    assert sides(split.val) == (6, 6)


def test_unbalanced_sides_keep_their_shares() -> None:
    assert sides(split_rows(distinct(30, 70), val_split=0.2, seed=0).val) == (6, 14)


@pytest.mark.parametrize("val_split", [-0.1, 1.0, 1.5])
def test_a_share_outside_its_range_names_the_option(val_split: float) -> None:
    with pytest.raises(UserError, match="val_split"):
        split_rows(distinct(10), val_split=val_split, seed=0)


def test_val_split_zero_holds_nothing_out_and_says_so() -> None:
    split = split_rows(distinct(10), val_split=0, seed=0)
    assert split.val == []
    assert len(split.train) == 20
    assert any("val_split is 0" in note for note in split.notes)


def test_a_share_that_leaves_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(UserError, match="leaves fewer than 2 per side"):
        split_rows(distinct(20), val_split=0.99, seed=0)


@pytest.mark.parametrize(("n_pos", "n_neg"), [(5, 0), (0, 5), (1, 1), (1, 8)])
def test_a_missing_side_or_a_single_row_is_an_error(n_pos: int, n_neg: int) -> None:
    with pytest.raises(UserError, match=f"{n_pos} positive and {n_neg} negative rows are left"):
        split_rows(distinct(n_pos, n_neg), val_split=0.2, seed=0)


def test_too_few_rows_to_hold_out_are_kept_and_said() -> None:
    split = split_rows(distinct(4), val_split=0.2, seed=0)
    assert split.val == []
    assert len(split.train) == 8
    assert any("too few to hold any out" in note for note in split.notes)


def test_one_scenario_in_many_variations_cannot_be_divided_and_says_so() -> None:
    rows = [
        RowInfo(f"{p}:{i}", p, i, "Always the same prompt.", None, f"system {p} {i}")
        for p in ("positive", "negative")
        for i in range(20)
    ]
    split = split_rows(rows, val_split=0.2, seed=0)
    assert split.val == []
    assert any("cannot be divided" in note for note in split.notes)


def test_few_held_out_rows_are_pointed_out() -> None:
    assert any(
        "only 3 positive and 3 negative" in n for n in split_rows(distinct(16), val_split=0.2, seed=0).notes
    )


def test_texts_without_spaces_are_compared_too() -> None:
    texts = [
        "他今天很高兴地去了公园散步",
        "他今天很高兴地去了公园散步了",
        "天气预报说明天会下大雨",
        "请把这份文件交给经理",
    ]
    groups, _ = group_rows([RowInfo(str(i), "positive", i, t, None) for i, t in enumerate(texts)])
    assert groups["0"] == groups["1"]
    assert len(set(groups.values())) == 3


@settings(max_examples=60, deadline=None)
@given(
    n_pos=st.integers(2, 40),
    n_neg=st.integers(2, 40),
    copies=st.integers(1, 4),
    share=st.floats(0.0, 0.5),
    seed=st.integers(0, 100),
    pairs=st.booleans(),
)
def test_every_split_is_a_partition_by_group(
    n_pos: int, n_neg: int, copies: int, share: float, seed: int, pairs: bool
) -> None:
    rows = rows_of(
        {
            "positive": [sentence(i // copies) + f" {i % copies}" for i in range(n_pos)],
            "negative": [sentence(1000 + i // copies) + f" {i % copies}" for i in range(n_neg)],
        },
        pairs,
    )
    try:
        split = split_rows(rows, val_split=share, seed=seed)
    except UserError:
        return
    assert sorted(split.train + split.val + list(split.excluded)) == sorted(r.key for r in rows)
    assert not divided(split)
    assert min(sides(split.train)) >= 2
    if split.val:
        assert min(sides(split.val)) >= 2
        assert split == split_rows(rows, val_split=share, seed=seed)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(4, 60), st.integers(1, 5))
def test_folds_divide_no_group_and_spread_both_sides(seed: int, n: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, max(2, n // size), n)
    y = rng.random(n) < 0.5
    fold = group_folds(groups, y, 5, seed)
    if (fold == -1).all():
        return
    for group in np.unique(groups):
        assert len(set(fold[groups == group])) == 1
    assert set(fold) == set(range(fold.max() + 1))


def test_folds_of_single_rows_are_even() -> None:
    y = np.arange(50) < 20
    fold = group_folds(np.arange(50), y, 5, 0)
    assert [int((fold[y] == f).sum()) for f in range(5)] == [4] * 5
    assert [int((fold[~y] == f).sum()) for f in range(5)] == [6] * 5


def test_folds_are_refused_where_one_side_is_one_group() -> None:
    assert (group_folds(np.array([0, 0, 0, 1, 2]), np.array([True] * 3 + [False] * 2), 5, 0) == -1).all()


def _public_rows(trait: Path) -> list[RowInfo]:
    rows = []
    for polarity in ("positive", "negative"):
        if (trait / f"{polarity}.jsonl").exists():
            lines = (trait / f"{polarity}.jsonl").read_text(encoding="utf-8").splitlines()
            items = [(r["prompt"], r.get("system_prompt")) for r in map(json.loads, filter(str.strip, lines))]
        elif (trait / f"{polarity}.txt").exists():
            lines = (trait / f"{polarity}.txt").read_text(encoding="utf-8").splitlines()
            items = [(line.strip(), None) for line in lines if line.strip()]
        else:
            return []
        rows += [RowInfo(f"{polarity}:{i}", polarity, i, t, None, s) for i, (t, s) in enumerate(items)]
    return rows


def test_public_traits_split_by_group() -> None:
    folders = sorted((SHARED / "traits_public").glob("*/*/")) if SHARED.is_dir() else []
    if not folders:
        pytest.skip(f"no public trait folders under {SHARED} (set TRAITS_SHARED)")
    split_folders = 0
    for folder in folders:
        rows = _public_rows(folder)
        if not rows:
            continue
        split = split_rows(rows, val_split=0.2, seed=0)
        n_pos, n_neg = sides([r.key for r in rows if r.key not in split.excluded])
        assert not divided(split), folder
        assert abs(sides(split.val)[0] - 0.2 * n_pos) <= 0.1 * n_pos + 1, folder
        assert abs(sides(split.val)[1] - 0.2 * n_neg) <= 0.1 * n_neg + 1, folder
        if folder.name == "evil":
            # 20 questions × 5 system prompts per side
            assert len(set(split.groups.values())) == 20
        split_folders += 1
    assert split_folders >= 10
