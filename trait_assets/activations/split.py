"""Which rows are held out: by group of near-duplicate scenarios, stratified by polarity, seeded.

Here belong the grouping of scenarios, the train / held-out split and the group-aware folds that
cross-validation uses. Capturing activations does not, and neither does any statistic. Needs no model:
near-duplicates are found by shingles.

Why groups: authors write scenarios by theme, in pairs and in variations ("20 questions × 5 system prompts").
A row whose sibling was trained on is not held out, so a group is never divided. Why hashes instead of a
shuffled list: the place of a group in the seeded order depends on its own text alone, so adding a line moves
few of the others.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from storage.errors import UserError

SIMILARITY = 0.6
# A looser threshold chains templated scenarios into one group; these are tried in turn until that stops.
_STRICTER = (0.7, 0.8, 0.9, 0.97)
_LARGEST_SHARE = 0.25
_SHINGLE = 4
# Fewest rows per side that can be trained on, and that a held-out effect size needs.
MIN_TRAIN = 2
MIN_VAL = 2


@dataclass(frozen=True)
class RowInfo:
    """One row to be split. `polarity`: positive or negative; `index`: scenario index; `pair`: rows of one
    pair share it.
    """

    key: str
    polarity: str
    index: int
    text: str
    pair: int | None
    system: str | None = None


@dataclass(frozen=True)
class Split:
    """`train` and `val` are row keys, positives first, in the order given; `excluded` maps a key to its
    reason.
    """

    train: list[str]
    val: list[str]
    groups: dict[str, int]
    excluded: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def split_rows(rows: Sequence[RowInfo], *, val_split: float, seed: int) -> Split:
    """Hold out about `val_split` of each side, by whole groups.

    A scenario (text and system prompt) that stands on both sides carries no label and is excluded from both.
    Errors: UserError if a side is empty or too small to train on, or if val_split leaves too little to train
    on. A held-out set that cannot be formed (too few rows or groups) is left empty and `notes` says why.
    """
    if not 0 <= val_split < 1:
        raise UserError(
            f"val_split is {val_split}",
            where="option `val_split`",
            remedy="use a share from 0 up to, not including, 1",
        )
    _check_rows(rows)
    excluded = _on_both_sides(rows)
    kept = [row for row in rows if row.key not in excluded]
    notes: list[str] = []
    if excluded:
        notes.append(f"{len(excluded)} rows excluded: their scenario stands on both sides")
    _check_sides(kept)
    group_of, threshold = group_rows(kept)
    if threshold > SIMILARITY:
        notes.append(
            f"scenarios are much alike: near-duplicates were grouped at similarity {threshold:g} "
            f"instead of {SIMILARITY:g}"
        )
    kept = sorted(kept, key=lambda row: row.polarity != "positive")
    val = _choose_val(kept, group_of, val_split, seed, notes)
    return Split(
        train=[row.key for row in kept if row.key not in val],
        val=[row.key for row in kept if row.key in val],
        groups={row.key: group_of[row.key] for row in kept},
        excluded=excluded,
        notes=notes,
    )


def group_rows(rows: Sequence[RowInfo]) -> tuple[dict[str, int], float]:
    """Group id per row key, and the similarity threshold that was used.

    Rows share a group when they share a pair, a text, or texts whose idf-weighted Jaccard similarity over
    character 4-shingles reaches the threshold (transitively). The idf weights keep a common opening ("My
    friend asked me …") from making all scenarios alike. When one cluster would hold more than a quarter of
    the rows, the threshold is raised.
    """
    texts = [normalise(row.text) for row in rows]
    unique = sorted(set(texts))
    place = {text: i for i, text in enumerate(unique)}
    rows_of = np.bincount([place[text] for text in texts], minlength=len(unique))
    similar = _similar_pairs(unique)
    parent: list[int] = []
    threshold = SIMILARITY
    for threshold in (SIMILARITY, *_STRICTER):
        parent = list(range(len(unique)))
        for i, j, similarity in similar:
            if similarity >= threshold:
                _union(parent, i, j)
        sizes: dict[int, int] = defaultdict(int)
        for i, count in enumerate(rows_of):
            sizes[_find(parent, i)] += int(count)
        # few rows: a pair of duplicates may well be more than a quarter of them
        if max(sizes.values()) <= max(_LARGEST_SHARE * len(rows), 4, int(rows_of.max())):
            break
    first_of_pair: dict[int, int] = {}
    for row, text in zip(rows, texts, strict=True):
        if row.pair is not None:
            _union(parent, first_of_pair.setdefault(row.pair, place[text]), place[text])
    number: dict[int, int] = {}
    return {
        row.key: number.setdefault(_find(parent, place[text]), len(number))
        for row, text in zip(rows, texts, strict=True)
    }, threshold


def group_folds(groups: np.ndarray, y: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Fold id per row, [n] int: no group in two folds, both sides spread evenly.

    `groups` [n] int, `y` [n] bool. The number of folds falls below k when there are fewer groups on a side;
    with fewer than two groups on either side no cross-validation is possible and every row gets fold -1.
    """
    ids, inverse = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(ids), 2))
    np.add.at(counts, (inverse, y.astype(int)), 1)
    k = int(min(k, *(counts > 0).sum(axis=0)))
    if k < 2:
        return np.full(len(y), -1)
    rng = np.random.default_rng([seed, 7919])
    order = rng.permutation(len(ids))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    share = counts / counts.sum(axis=0)
    load = np.zeros((k, 2))
    fold_of = np.empty(len(ids), dtype=int)
    for group in order:
        # the fold that stays most even on both sides
        cost = ((load + share[group]) ** 2 - load**2).sum(axis=1)
        fold_of[group] = int(np.argmin(np.round(cost, 12)))
        load[fold_of[group]] += share[group]
    return fold_of[inverse]


def normalise(text: str) -> str:
    """Case, width, punctuation and spacing removed: what two near-duplicates have in common."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def _strict(text: str | None) -> str:
    # punctuation and case may be the trait itself, so only spacing and composition are levelled here
    return " ".join(unicodedata.normalize("NFC", text or "").split())


def _check_rows(rows: Sequence[RowInfo]) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.polarity not in ("positive", "negative"):
            raise ValueError(f"row {row.key} has polarity {row.polarity!r}")
        if row.key in seen:
            raise ValueError(f"row key {row.key} occurs twice")
        seen.add(row.key)


def _on_both_sides(rows: Sequence[RowInfo]) -> dict[str, str]:
    sides: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        sides[_strict(row.text), _strict(row.system)].add(row.polarity)
    return {
        row.key: f"{row.polarity} scenario {row.index + 1} also stands on the other side"
        for row in rows
        if len(sides[_strict(row.text), _strict(row.system)]) == 2
    }


def _check_sides(rows: Sequence[RowInfo]) -> None:
    n_pos = sum(row.polarity == "positive" for row in rows)
    n_neg = len(rows) - n_pos
    if min(n_pos, n_neg) < MIN_TRAIN:
        raise UserError(
            f"{n_pos} positive and {n_neg} negative rows are left; a direction needs {MIN_TRAIN} of each",
            where="activations",
            remedy="add scenarios, lower the vetting thresholds, or switch the vetting filter off",
        )


def _choose_val(
    rows: Sequence[RowInfo], group_of: dict[str, int], val_split: float, seed: int, notes: list[str]
) -> set[str]:
    if val_split == 0:
        notes.append("val_split is 0: no held-out rows")
        return set()
    members: dict[int, list[RowInfo]] = defaultdict(list)
    for row in rows:
        members[group_of[row.key]].append(row)
    total = _count(rows)
    wanted = np.round(total * val_split).astype(int)
    wanted = np.where((wanted < MIN_VAL) & (total >= 3 * MIN_VAL), MIN_VAL, wanted)
    if (total - wanted < MIN_TRAIN).any():
        raise UserError(
            f"holding out {val_split:g} of {total[0]} positive and {total[1]} negative rows leaves "
            f"fewer than {MIN_TRAIN} per side to train on",
            where="option `val_split`",
            remedy="lower val_split, or add scenarios",
        )
    if (wanted < MIN_VAL).any():
        notes.append(
            f"{total[0]} positive and {total[1]} negative rows are too few to hold any out: "
            "no held-out numbers"
        )
        return set()
    order = sorted(members, key=lambda group: _seeded_rank(members[group], seed))
    chosen: set[int] = set()
    have = np.zeros(2, dtype=int)
    for group in order:
        size = _count(members[group])
        if (have + size <= wanted).all():
            chosen.add(group)
            have = have + size
    for group in order:
        # what is still missing is taken from the group that overshoots least, if that brings the counts
        # nearer
        size = _count(members[group])
        nearer = np.abs(wanted - have - size).sum() < np.abs(wanted - have).sum()
        leaves_enough = (total - have - size >= MIN_TRAIN).all()
        if group not in chosen and nearer and leaves_enough:
            chosen.add(group)
            have = have + size
    if (have < MIN_VAL).any():
        notes.append(
            f"the {len(members)} groups of near-duplicate scenarios cannot be divided so that both sides "
            "have held-out rows: no held-out numbers"
        )
        return set()
    if have.min() < 10:
        notes.append(f"only {have[0]} positive and {have[1]} negative rows are held out: intervals are wide")
    return {row.key for group in chosen for row in members[group]}


def _count(rows: Iterable[RowInfo]) -> np.ndarray:
    n_pos = n_neg = 0
    for row in rows:
        if row.polarity == "positive":
            n_pos += 1
        else:
            n_neg += 1
    return np.array([n_pos, n_neg])


def _seeded_rank(rows: Sequence[RowInfo], seed: int) -> bytes:
    text = min(normalise(row.text) for row in rows)
    return hashlib.sha256(f"{seed}\0{text}".encode()).digest()


def _similar_pairs(texts: Sequence[str]) -> list[tuple[int, int, float]]:
    from scipy import sparse

    index: dict[str, int] = {}
    columns: list[int] = []
    offsets = [0]
    for text in texts:
        padded = f" {text} "
        shingles = {padded[i : i + _SHINGLE] for i in range(max(1, len(padded) - _SHINGLE + 1))}
        columns.extend(index.setdefault(shingle, len(index)) for shingle in sorted(shingles))
        offsets.append(len(columns))
    matrix = sparse.csr_matrix((np.ones(len(columns)), columns, offsets), shape=(len(texts), len(index)))
    frequency = np.asarray(matrix.sum(axis=0)).ravel()
    weight = np.log((1 + len(texts)) / frequency)
    weighted = matrix.multiply(weight).tocsr()
    own = np.asarray(weighted.sum(axis=1)).ravel()
    shared = sparse.triu(weighted @ matrix.T, k=1).tocoo()
    union = own[shared.row] + own[shared.col] - shared.data
    similarity = shared.data / np.maximum(union, 1e-12)
    near = similarity >= SIMILARITY
    return [
        (int(i), int(j), float(s))
        for i, j, s in zip(shared.row[near], shared.col[near], similarity[near], strict=True)
    ]


def _find(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


def _union(parent: list[int], i: int, j: int) -> None:
    i, j = _find(parent, i), _find(parent, j)
    if i != j:
        parent[max(i, j)] = min(i, j)
