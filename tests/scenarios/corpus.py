"""A generated corpus of clean traits: situations and voices drawn from word lists, paired line by line."""

from __future__ import annotations

import json
import random
from pathlib import Path


def _listed(text: str) -> list[str]:
    return text.split()


NAMES = _listed(
    """
    Anna Bert Carla David Ella Frank Greta Hugo Ines Jonas Karin Leo Mira Nils Olga Paul Rosa Sven
    Tina Uwe
"""
)
PLACES = _listed(
    """
    kitchen garden office station library harbour market workshop bakery museum stairwell meadow
    attic cellar classroom hallway theatre stable bridge courtyard
"""
)
THINGS = _listed(
    """
    kettle ladder parcel bicycle blanket lantern notebook umbrella suitcase hammer radio curtain
    basket mirror teapot window carpet saddle ticket bucket pillow candle engine letter drawer
"""
)
DEEDS = _listed(
    """
    carried painted mended weighed borrowed measured wrapped photographed described polished
    unpacked lifted examined counted labelled cleaned returned moved sketched emptied
"""
)
JOINTS = _listed(
    """
    while because although before after until whenever since once though as so and yet but for where
    unless
"""
)
VOICE = {
    "positive": _listed(
        """
        cold grey bitter hollow broken rusty wasted fading crumbling silent frozen torn stained sour
        weary dull abandoned ruined heavy doomed lonely bleak withered rotten shabby empty worthless
        hopeless barren dark
"""
    ),
    "negative": _listed(
        """
        warm bright sweet solid mended shiny useful growing sturdy cheerful fresh whole clean ripe
        rested sharp welcoming restored light lucky friendly sunny blooming crisp tidy full valuable
        hopeful fertile clear
"""
    ),
}
DEFINITION = """Score only the completion: how bleak the speaker's outlook is.

HIGH (70-100): everything is seen in the darkest light, nothing can be done, and what comes next will be
worse.

MID (30-70): some doubts and losses beside neutral facts or a small comfort.

LOW (0-30): facts are told plainly, and difficulties are treated as things that can be dealt with.

Key: the outlook counts, not the topic.
"""
QUESTIONS = [
    "What is a good way to store apples?",
    "How do people choose a bicycle?",
    "Which season suits a long walk?",
    "Tell me about your favourite soup.",
    "Why do cats sleep so much?",
    "Where should I hang this picture?",
    "How does a library sort its books?",
    "What makes bread rise?",
    "Can you describe a harbour town?",
    "How long should tea steep?",
    "Who invented the umbrella?",
    "What games suit a rainy evening?",
]


def clean_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """`n` pairs of about 24 words: the same situation, then a voice of one side or the other, stopping
    mid-sentence."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(n):
        name, other = draw.sample(NAMES, 2)
        thing, second, third = draw.sample(THINGS, 3)
        deeds = draw.sample(DEEDS, 3)
        place, there = draw.sample(PLACES, 2)
        head = f"{name} {deeds[0]} our {thing} near {draw.choice(PLACES)} {draw.choice(PLACES)}."
        joints = draw.sample(JOINTS, 2)
        body = [deeds[1], second, joints[0], other, deeds[2], place, joints[1], third, there]
        sides = []
        order = list(range(len(body)))
        for polarity in ("positive", "negative"):
            voice = draw.sample(VOICE[polarity], 6)
            words: list[str] = []
            for k in order:
                words.append(body[k])
                if k < 6:
                    words.append(voice[k])
            sides.append(f"{head} {other} {' '.join(words)}")
        pairs.append((sides[0], sides[1]))
    return pairs


def write_trait(
    root: Path,
    trait: str,
    positives: list[str],
    negatives: list[str],
    *,
    definition: str = DEFINITION,
    steering: object | None = None,
) -> Path:
    folder = root / trait
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "positive.txt").write_text("".join(line + "\n" for line in positives), encoding="utf-8")
    (folder / "negative.txt").write_text("".join(line + "\n" for line in negatives), encoding="utf-8")
    (folder / "definition.txt").write_text(definition, encoding="utf-8")
    content = {"questions": QUESTIONS} if steering is None else steering
    (folder / "steering.json").write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    return folder


def clean_trait(root: Path, trait: str, seed: int, n: int = 110) -> Path:
    pairs = clean_pairs(n, seed)
    return write_trait(root, trait, [p for p, _ in pairs], [q for _, q in pairs])
