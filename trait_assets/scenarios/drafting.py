"""`traits draft`: a language model writes pairs of scenarios, the lint and a judge throw out what is no good.

Belongs here: what the drafting model is asked, how its answers are read, what is kept, and the mark on the
result. Does not: connecting to a model beyond `openai_complete`, the rules (`lint.py`), the judging
(resources/judges). The drafting model is a callable, so that anything that answers messages can be used, and
a test can stand in.

A draft is a draft: `drafted.json` beside the files says which model wrote them and how many were thrown out
for what, and the lint warns until somebody has read them and deletes it.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resources.judges.protocol import Abstention, Judge, JudgeItem, TraitContext
from storage.errors import UserError
from storage.keys import check_trait
from storage.text import well_formed
from trait_assets.scenarios.dataset import DEFINITION_FILES, PLACEHOLDER, SIDE_FILES, STEERING_FILE
from trait_assets.scenarios.findings import Finding
from trait_assets.scenarios.lint import DRAFT_MARK, NEAR_DUPLICATE, fast_findings, line_faults
from trait_assets.scenarios.scaffold import NEUTRAL_QUESTIONS, refuse_existing, steering_json
from trait_assets.scenarios.wording import bigrams, jaccard, words

# [{"role": "system" | "user", "content": …}] → the model's answer as text
Complete = Callable[[list[dict[str, str]]], str]

BATCH = 10
MIN_WORDS, MAX_WORDS = 8, 80
PAIR_LENGTH = (0.7, 1.43)
# rounds that bring nothing new before drafting gives up
DRY_ROUNDS = 4

_TOPICS = """
food and cooking; a journey; the workplace; a family dinner; repairs at home; school; a visit to the doctor
sport; money; the garden; a pet; the weather; a computer or phone; a film or a book; neighbours; shopping
moving house; a wedding or a funeral; public transport; a letter or an email; a meeting; childhood; music; a
hobby; the news a holiday; a restaurant; a car; old friends; a deadline
"""
TOPICS = tuple(topic.strip() for topic in re.split(r"[;\n]", _TOPICS) if topic.strip())

SYSTEM = """You write texts for an experiment on language models. A text is a natural prefix that a model will
continue: one short sentence that sets a concrete everyday situation, then the beginning of what somebody
says or writes, broken off in the middle of a sentence. The texts are never instructions, never address a
model, and never name what they are about."""

ASK = """The trait: {definition}

Write {n} pairs. In each pair the "positive" text is in a voice that shows the trait, and the "negative" text
is in the same situation, of the same length and with the same punctuation, in a voice that lacks it. 22 to
45 words each, broken off in the middle of a sentence so that the next words will show the trait or not. Half
of the pairs with speech after an opening quotation mark (on both sides of the pair), half without any
quotation marks. Spread the vocabulary: no word shall recur in most texts of one side. Do not name the trait.

Topics for this round: {topics}.
{avoid}
Answer with JSON only: {{"pairs": [{{"positive": "…", "negative": "…"}}]}}"""

RUBRIC = """{definition}

HIGH (70-100): The completion shows this clearly and throughout.

MID (30-70): The completion shows some of it, or shows it once beside text that does not.

LOW (0-30): The completion shows none of it.

Key: What counts is the completion alone, not the scenario before it, its topic, its grammar or its length.
"""


@dataclass(frozen=True)
class DraftPair:
    """One pair that passed. Scores are the judge's (0–100), None when nobody judged."""

    positive: str
    negative: str
    positive_score: float | None = None
    negative_score: float | None = None


@dataclass
class Draft:
    """What came of it. `rejected`: reason → count; `findings`: the lint of the files as written."""

    pairs: list[DraftPair]
    rejected: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    findings: tuple[Finding, ...] = ()
    files: list[Path] = field(default_factory=list)
    gave_up: str | None = None


def draft_trait(
    root: Path,
    trait: str,
    *,
    definition: str | None,
    n: int,
    complete: Complete,
    model: str,
    judge: Judge | None = None,
    pos_threshold: float = 60.0,
    neg_threshold: float = 40.0,
    seed: int = 0,
    on_round: Callable[[int, int, Counter[str]], None] | None = None,
) -> Draft:
    """Draft `n` pairs for `trait`, keep what passes lint and judge, and write the trait's files with the
    draft's mark.

    `definition`: one sentence or a whole rubric; None takes the folder's definition.txt. `complete`: the
    drafting model; `model`: its name, for the mark; `judge`: scores scenarios (None: not vetted, and the
    mark says so); `on_round(round, kept, rejected)`. An existing definition.txt and steering.json stay;
    existing scenario files are refused before anything is asked. Raises `UserError` also when the model gave
    no usable pair at all.
    """
    check_trait(trait)
    if n < 2:
        raise UserError(f"-n {n} is too few", remedy="draft at least 2 pairs, better 100")
    folder = Path(root) / trait
    refuse_existing(folder, (*SIDE_FILES["positive"], *SIDE_FILES["negative"]))
    rubric, own_rubric = _rubric(folder, definition)
    draft = _draft(
        trait, rubric, n, complete, judge, pos_threshold, neg_threshold, random.Random(seed), on_round
    )
    if not draft.pairs:
        reasons = (
            ", ".join(f"{count} {reason}" for reason, count in draft.rejected.most_common(4)) or "no answers"
        )
        raise UserError(
            f"{model} gave no usable pair in {draft.rounds} rounds ({reasons})",
            where=trait,
            remedy="say the definition in more words, or use a larger model",
        )
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "positive.txt": "".join(pair.positive + "\n" for pair in draft.pairs),
        "negative.txt": "".join(pair.negative + "\n" for pair in draft.pairs),
    }
    if not own_rubric:
        contents["definition.txt"] = rubric.rstrip() + "\n"
    if not (folder / STEERING_FILE).exists():
        contents[STEERING_FILE] = steering_json(NEUTRAL_QUESTIONS)
    contents[DRAFT_MARK] = _mark(draft, model, judge, pos_threshold, neg_threshold)
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        draft.files.append(folder / name)
    draft.findings = tuple(fast_findings(folder, trait))
    return draft


def _rubric(folder: Path, definition: str | None) -> tuple[str, bool]:
    """(the rubric, whether it is the folder's own file)."""
    for name in DEFINITION_FILES:
        path = folder / name
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            if not PLACEHOLDER.search(text) and text.strip():
                if definition:
                    raise UserError(
                        "there is a definition already",
                        where=str(path),
                        remedy="leave --definition out, or delete the file",
                    )
                return text.strip(), True
    if not definition or not definition.strip():
        raise UserError("nothing says what the trait is", where=str(folder), remedy='give --definition "…"')
    if re.search(r"^\W*HIGH\b", definition, re.MULTILINE) and re.search(
        r"^\W*LOW\b", definition, re.MULTILINE
    ):
        return definition.strip(), False
    return RUBRIC.format(definition=definition.strip()).strip(), False


def _draft(
    trait: str,
    rubric: str,
    n: int,
    complete: Complete,
    judge: Judge | None,
    pos_threshold: float,
    neg_threshold: float,
    draw: random.Random,
    on_round: Callable[[int, int, Counter[str]], None] | None,
) -> Draft:
    draft = Draft([])
    limit = 3 * -(-n // BATCH) + DRY_ROUNDS
    dry = 0
    while len(draft.pairs) < n and draft.rounds < limit:
        draft.rounds += 1
        before = len(draft.pairs)
        answer = complete(_messages(rubric, min(BATCH, n - before + 2), draft.pairs, draw))
        pairs, unreadable = parse_pairs(answer)
        draft.rejected["unreadable"] += unreadable
        for positive, negative in pairs:
            reason = screen(positive, negative, draft.pairs, trait)
            if reason is not None:
                draft.rejected[reason] += 1
            elif len(draft.pairs) < n:
                draft.pairs.append(DraftPair(positive, negative))
        if judge is not None and (len(draft.pairs) >= n or draft.rounds == limit or not judge.stand_in):
            draft.pairs = _vet(trait, rubric, draft, judge, pos_threshold, neg_threshold)
        if on_round is not None:
            on_round(draft.rounds, len(draft.pairs), draft.rejected)
        dry = dry + 1 if len(draft.pairs) <= before else 0
        if dry >= DRY_ROUNDS:
            draft.gave_up = f"{DRY_ROUNDS} rounds in a row brought no new pair"
            break
    if len(draft.pairs) < n and draft.gave_up is None:
        draft.gave_up = f"{draft.rounds} rounds were asked"
    if judge is not None and any(pair.positive_score is None for pair in draft.pairs):
        draft.pairs = _vet(trait, rubric, draft, judge, pos_threshold, neg_threshold)
    draft.rejected = +draft.rejected
    return draft


def _messages(rubric: str, n: int, kept: Sequence[DraftPair], draw: random.Random) -> list[dict[str, str]]:
    topics = "; ".join(draw.sample(TOPICS, 6))
    openings = [" ".join(pair.positive.split()[:6]) for pair in kept[-12:]]
    avoid = f"Do not begin like these: {' | '.join(openings)}.\n" if openings else ""
    ask = ASK.format(definition=rubric, n=n, topics=topics, avoid=avoid)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ask}]


def parse_pairs(answer: str) -> tuple[list[tuple[str, str]], int]:
    """(pairs, number of pieces that could not be read) of an answer: a JSON object or list, in a code fence
    or in prose, or one object per line. An answer in which nothing can be read counts as one."""
    for candidate in _json_pieces(answer):
        try:
            content = json.loads(candidate)
        except (json.JSONDecodeError, RecursionError):
            continue
        rows = content.get("pairs") if isinstance(content, dict) else content
        if isinstance(rows, list) and rows:
            return _rows(rows)
    rows = []
    for line in answer.split("\n"):
        try:
            rows.append(json.loads(line.strip().rstrip(",")))
        except (json.JSONDecodeError, RecursionError):
            continue
    rows = [row for row in rows if isinstance(row, dict)]
    return _rows(rows) if rows else ([], 1)


def _json_pieces(answer: str) -> list[str]:
    pieces = [match.group(1) for match in re.finditer(r"```(?:json)?\s*(.*?)```", answer, re.DOTALL)]
    pieces.append(answer)
    for opening, closing in (("{", "}"), ("[", "]")):
        start, end = answer.find(opening), answer.rfind(closing)
        if 0 <= start < end:
            pieces.append(answer[start : end + 1])
    return [piece.strip() for piece in pieces]


def _rows(rows: list[Any]) -> tuple[list[tuple[str, str]], int]:
    pairs = []
    for row in rows:
        positive, negative = (
            (row.get("positive"), row.get("negative")) if isinstance(row, dict) else (None, None)
        )
        if isinstance(positive, str) and isinstance(negative, str) and positive.strip() and negative.strip():
            pairs.append((_one_line(positive), _one_line(negative)))
    return pairs, len(rows) - len(pairs)


def _one_line(text: str) -> str:
    """White space collapsed, half surrogate pairs mended, and the dots by which a model shows that it breaks off taken away."""
    return re.sub(r"\s*(?:…|\.\.\.)\s*[\"”]?$", "", " ".join(well_formed(text).split()))


def screen(positive: str, negative: str, kept: Sequence[DraftPair], label: str) -> str | None:
    """Why a pair is thrown out, or None: the lint's rules on single lines, the pair's balance, and likeness
    to kept ones."""
    for text in (positive, negative):
        if faults := line_faults(text, label):
            return faults[0]
        if not MIN_WORDS <= len(words(text)) <= MAX_WORDS:
            return "length"
    if words(positive) == words(negative):
        return "both-sides"
    if not PAIR_LENGTH[0] <= len(words(positive)) / len(words(negative)) <= PAIR_LENGTH[1]:
        return "pair-length"
    if ('"' in positive) != ('"' in negative):
        return "quotes-differ"
    if positive[-1] in ".!?" or negative[-1] in ".!?":
        return "complete-sentence"
    for text, side in ((positive, "positive"), (negative, "negative")):
        mine = bigrams(text)
        for pair in kept:
            if jaccard(mine, bigrams(getattr(pair, side))) >= NEAR_DUPLICATE:
                return "near-duplicate"
    return None


def _vet(
    trait: str, rubric: str, draft: Draft, judge: Judge, pos_threshold: float, neg_threshold: float
) -> list[DraftPair]:
    """The pairs whose two sides the judge scores on the right side of the thresholds; the others are
    counted."""
    context = TraitContext(
        trait, rubric, tuple(p.positive for p in draft.pairs), tuple(p.negative for p in draft.pairs)
    )
    items = []
    for index, pair in enumerate(draft.pairs):
        items.append(
            JudgeItem(f"p{index}", "scenario", context, pair.positive, polarity="positive", index=index)
        )
        items.append(
            JudgeItem(f"n{index}", "scenario", context, pair.negative, polarity="negative", index=index)
        )
    judged = {judgement.key: judgement for judgement in judge.score(items)}
    kept = []
    for index, pair in enumerate(draft.pairs):
        positive, negative = judged[f"p{index}"], judged[f"n{index}"]
        if isinstance(positive, Abstention) or isinstance(negative, Abstention):
            draft.rejected["judge abstained"] += 1
        elif positive.value < pos_threshold:
            draft.rejected["positive scores too low"] += 1
        elif negative.value > neg_threshold:
            draft.rejected["negative scores too high"] += 1
        else:
            kept.append(DraftPair(pair.positive, pair.negative, positive.value, negative.value))
    return kept


def _mark(draft: Draft, model: str, judge: Judge | None, pos_threshold: float, neg_threshold: float) -> str:
    content = {
        "note": "Written by a language model. Read every line, mend what is off, then delete this file.",
        "model": model,
        "pairs": len(draft.pairs),
        "rounds": draft.rounds,
        "rejected": dict(draft.rejected.most_common()),
        "judge": judge.identity if judge is not None else None,
        "thresholds": {"positive": pos_threshold, "negative": neg_threshold} if judge is not None else None,
        "scores": [[p.positive_score, p.negative_score] for p in draft.pairs] if judge is not None else None,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"


def openai_complete(
    model: str, *, base_url: str | None = None, api_key: str | None = None, timeout_s: float = 120.0
) -> Complete:
    """The drafting model behind an OpenAI-compatible endpoint; key and address from OPENAI_API_KEY and
    OPENAI_BASE_URL when not given. No sampling parameters are sent: some models refuse them. Raises
    `UserError` for what the endpoint refuses."""
    import os

    if not (api_key or os.environ.get("OPENAI_API_KEY") or base_url or os.environ.get("OPENAI_BASE_URL")):
        raise UserError(
            "no model to draft with",
            where="OPENAI_API_KEY",
            remedy="set it, or OPENAI_BASE_URL for a server of your own",
        )
    import openai

    from resources.api_client import check_address, check_key, redact

    key = check_key(api_key or os.environ.get("OPENAI_API_KEY"), "OPENAI_API_KEY")
    address = base_url or os.environ.get("OPENAI_BASE_URL")
    if address:
        check_address(address, where="option `--base-url`", key="OPENAI_API_KEY")
    # a server of one's own wants no key, but the client does
    client = openai.OpenAI(api_key=key or "none", base_url=address, timeout=timeout_s, max_retries=5)

    def complete(messages: list[dict[str, str]]) -> str:
        said: str | None = None
        try:
            answer = client.chat.completions.create(model=model, messages=messages)  # type: ignore[arg-type]
        except openai.OpenAIError as error:
            said = redact(f"{type(error).__name__}: {error}", key)
        if said is not None:
            # raised outside the handler: a trace shows what it was raised from, and that may hold the key
            raise UserError(
                f"the drafting model cannot be used: {said}",
                where=str(client.base_url),
                remedy="check the address, the key and the model's name",
            )
        return well_formed(answer.choices[0].message.content or "") if answer.choices else ""

    return complete
