"""The prompting baseline: a system prompt made of a trait's definition, so that a reader sees what words
alone do.

Here: the text. Not here: how a model is given it.
"""

from __future__ import annotations

import re

from trait_assets.steering.questions import Direction

_PARAGRAPH = re.compile(r"^\s*(HIGH|MID|MEDIUM|LOW|KEY)\b[^:\n]{0,40}:\s*", re.IGNORECASE | re.MULTILINE)


def trait_system_prompt(definition: str, direction: Direction) -> str:
    """What a model is told to be: the HIGH paragraph of the definition, or the LOW one when the trait is to
    be lowered.

    A definition without such paragraphs is given whole.
    """
    wanted = "LOW" if direction == "negative" else "HIGH"
    described = _paragraphs(definition).get(wanted)
    manner = " ".join((described or definition).split())
    if described is None and direction == "negative":
        return f"Answer every question so that none of the following can be found in your answer. {manner}"
    return f"Answer every question in exactly this manner, as strongly as you can. {manner}"


def _paragraphs(definition: str) -> dict[str, str]:
    marks = list(_PARAGRAPH.finditer(definition))
    ends = [m.start() for m in marks[1:]] + [len(definition)]
    # without a mark there is still an end
    pairs = zip(marks, ends, strict=False)
    return {m.group(1).upper(): definition[m.end() : end].strip() for m, end in pairs}
