"""Measures and tests on wording: words, shingles, near-duplicates, differences between two sides.

Belongs here: pure functions of texts and counts, standard library only. Does not: thresholds and messages
(`lint.py`).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

# Scripts written without spaces: each character counts as a word there.
_UNSPACED = "\u0e00-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(
    rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:['’][^\W_{_UNSPACED}]+)*",
)
_UNSPACED_RE = re.compile(f"[{_UNSPACED}]")

# The commonest words of some languages, to tell which one a side is written in. Words shared by many are
# left out.
_COMMON_WORDS = {
    "English": """
        the and of to is was that it for with as his her they this have from or had by but not what
        all were we when your can said there use an each which she how their if will i you my he
    """,
    "Spanish": """
        el los las y que es por con para del se lo su más pero como muy sin sobre este ya entre
        cuando todo esta ser son también fue había está hay nos porque yo
    """,
    "French": """
        le les et est que dans pour qui sur pas plus par je avec il elle mais nous vous ce cette
        sont au aux des du une être ont été fait comme tout leur
    """,
    "German": """
        der die und das den von zu mit sich des auf für ist im dem nicht ein eine als auch es an
        werden aus er hat dass sie nach wird bei einer um noch wie ich
    """,
    "Italian": """
        il di che è e la per un non sono con una si da come anche le dei nel alla ma più gli della
        questo ho ha io mi perché
    """,
    "Portuguese": """
        o que e do da em um para com não uma os no se na por mais as dos como mas ao ele das à seu
        sua ou quando muito nos já eu também
    """,
    "Dutch": """
        de het een van en in is dat op te zijn met voor niet die hij maar ik ook als om aan bij dan
        nog wel naar wat deze
    """,
}
_LANGUAGES: dict[str, list[str]] = {}
for _language, _listed in _COMMON_WORDS.items():
    for _word in _listed.split():
        _LANGUAGES.setdefault(_word, []).append(_language)


@lru_cache(maxsize=20_000)
def words(text: str) -> tuple[str, ...]:
    """Lower-cased words, apostrophes inside kept (`don't` is one); a character each in scripts without
    spaces."""
    return tuple(w.casefold().replace("’", "'") for w in _WORD.findall(unicodedata.normalize("NFKC", text)))


def unspaced_share(texts: Iterable[str]) -> float:
    """Share of words that are single characters of a script written without spaces."""
    total = alone = 0
    for text in texts:
        for word in _WORD.findall(text):
            total += 1
            alone += _UNSPACED_RE.match(word) is not None
    return alone / total if total else 0.0


def bigrams(text: str) -> frozenset[tuple[str, str]]:
    """Neighbouring pairs of words, with both ends marked, so that a one-word text has some too."""
    marked = ["\x02", *words(text), "\x03"]
    return frozenset(pairwise(marked))


def jaccard(a: frozenset[object] | set[object], b: frozenset[object] | set[object]) -> float:
    union = len(a | b)
    return len(a & b) / union if union else 0.0


def similar_pairs(
    left: Sequence[frozenset[object]], right: Sequence[frozenset[object]] | None, threshold: float
) -> list[tuple[int, int, float]]:
    """(i, j, similarity) of all pairs with Jaccard ≥ `threshold`; within `left` (i < j) when `right` is None.

    Exact, by prefix filtering (Chaudhuri, Ganti, Kaushik 2006): two sets that similar must share one of the
    rarest (1 − t)·|set| + 1 elements, so only those are indexed; thousands of lines take no quadratic time.
    """
    sets = list(left) + (list(right) if right is not None else [])
    frequency: Counter[object] = Counter(element for s in sets for element in s)
    ranked = sorted(frequency.items(), key=lambda f: (f[1], repr(f[0])))
    order = {element: rank for rank, (element, _) in enumerate(ranked)}
    prefixes = []
    for s in sets:
        keep = len(s) - math.ceil(threshold * len(s)) + 1
        prefixes.append(sorted(s, key=order.__getitem__)[:keep])
    index: dict[object, list[int]] = defaultdict(list)
    found = []
    for number, prefix in enumerate(prefixes):
        candidates = {other for element in prefix for other in index[element]}
        for other in candidates:
            similarity = jaccard(sets[other], sets[number])
            if similarity >= threshold:
                found.append((other, number, similarity))
        if right is None or number < len(left):
            for element in prefix:
                index[element].append(number)
    if right is None:
        return sorted(found)
    return sorted((i, j - len(left), similarity) for i, j, similarity in found if j >= len(left) > i)


def document_frequencies(texts: Iterable[str]) -> Counter[str]:
    """In how many texts each word stands."""
    return Counter(word for text in texts for word in set(words(text)))


def language_shares(texts: Sequence[str]) -> dict[str, float]:
    """Share of the words that are among the commonest of each language, and the share of each non-Latin
    script."""
    counts: Counter[str] = Counter()
    total = 0
    for text in texts:
        for word in words(text):
            total += 1
            for language in _LANGUAGES.get(word, ()):
                counts[language] += 1
            if word[0] >= "\u0370" and (script := _script(word[0])) is not None:
                counts[script] += 1
    return {name: count / total for name, count in counts.items()} if total else {}


def _script(character: str) -> str | None:
    if not character.isalpha():
        return None
    name = unicodedata.name(character, "").split(" ")[0]
    return None if name == "LATIN" else name.capitalize()


def fisher(a: int, n: int, b: int, m: int) -> float:
    """Two-sided p of Fisher's exact test: `a` of `n` against `b` of `m`."""
    hits = a + b
    low, high = max(0, hits - m), min(n, hits)

    def log_p(k: int) -> float:
        return _log_choose(n, k) + _log_choose(m, hits - k) - _log_choose(n + m, hits)

    observed = log_p(a)
    total = sum(math.exp(log_p(k)) for k in range(low, high + 1) if log_p(k) <= observed + 1e-9)
    return min(1.0, total)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """(P(a > b) with ties halved, two-sided p by the normal approximation with tie correction)."""
    n, m = len(a), len(b)
    if not n or not m:
        return 0.5, 1.0
    merged = sorted([(value, 0) for value in a] + [(value, 1) for value in b])
    rank_sum = ties = 0.0
    at = 0
    while at < len(merged):
        end = at
        while end < len(merged) and merged[end][0] == merged[at][0]:
            end += 1
        rank = (at + 1 + end) / 2
        rank_sum += rank * sum(1 for i in range(at, end) if merged[i][1] == 0)
        ties += (end - at) ** 3 - (end - at)
        at = end
    u = rank_sum - n * (n + 1) / 2
    total = n + m
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance <= 0:
        return u / (n * m), 1.0
    z = (abs(u - n * m / 2) - 0.5) / math.sqrt(variance)
    return u / (n * m), math.erfc(max(z, 0.0) / math.sqrt(2))


def without_quotes(text: str) -> str:
    """The text with everything in double quotes left out, an unclosed last quote included: the narrator
    alone."""
    text = re.sub(r"“[^”]*(”|$)|«[^»]*(»|$)|「[^」]*(」|$)|„[^“”]*([“”]|$)", " … ", text)
    return re.sub(r'"[^"]*("|$)', " … ", text)
