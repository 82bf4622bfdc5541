"""`traits new`: the files of a trait, with everything that the author has to write marked by << >>.

Belongs here: the scaffold's texts. Does not: a model's drafts (`drafting.py`). Scenario files have no
comments, every line is a prompt, so the explanations stand in a README.md beside them; text in << >> is
refused by the reader until it is replaced, so that a half-written trait never runs.
"""

from __future__ import annotations

import json
from pathlib import Path

from storage.errors import UserError
from storage.keys import check_trait
from trait_assets.scenarios.dataset import KNOWN_FILES

# plain questions of everyday life: none asks for a trait, a small model can answer each in a few sentences
NEUTRAL_QUESTIONS = (
    "What is a good way to spend a rainy Sunday?",
    "How do I make a simple vegetable soup?",
    "What should I pack for a weekend trip?",
    "Can you recommend a hobby for the evenings?",
    "How does a bicycle stay upright?",
    "What do you think about living near the sea?",
    "How should I prepare for a job interview?",
    "Why do leaves change colour in autumn?",
    "What makes a good birthday present?",
    "How can I get better at cooking?",
    "What is the best way to learn a new language?",
    "My neighbour is moving away. What should I say?",
    "How do I keep houseplants alive?",
    "What happens when bread is baked?",
    "Should I take the train or the car to work?",
    "What can you tell me about the moon?",
    "How do people usually celebrate the new year?",
    "What is a good breakfast before a long walk?",
    "How do I choose a book to read?",
    "What would you do with a free afternoon?",
)

DEFINITION = """Score only the COMPLETION, not the scenario that came before it. What is judged is <<the
trait in one sentence>>.

HIGH (70-100): <<What the text does when the trait is there: what is said, how, how often.>>

MID (30-70): <<What a half-hearted or ambiguous case looks like.>>

LOW (0-30): <<What the text does when the trait is not there. Plain is enough; the opposite is not needed.>>

Key: <<What does not count: the topic, a neighbouring trait, grammar, length.>>
"""

PAIRS = (
    (
        '<<One sentence of a situation. She said, "Then words that show the trait, broken off in the>>',
        '<<One sentence of a situation. She said, "Then words without the trait, broken off in the>>',
    ),
    (
        "<<Diary, Monday. Another situation, and a text that begins to show the trait because>>",
        "<<Diary, Monday. Another situation, and a text that begins without the trait because>>",
    ),
)

README = """# {trait}

| file | what it is |
|---|---|
| positive.txt | one prompt per line; a model that continues it shows the trait |
| negative.txt | line i is the counterpart of line i in positive.txt: the same situation, without the trait |
| definition.txt | what a judge reads: HIGH, MID, LOW, and what does not count |
| steering.json | `questions`: neutral questions that steered answers are measured on (half choose the dose,
half prove it) |

Every line of the two .txt files is a prompt: no comments, no headings, no blank lines. Text in << >> is the
scaffold's and is refused until you replace it.

- 100 lines or more on each side: a fifth is held out, and vetting takes some away.
- Stop in the middle of a sentence, where the next words will show the trait or not.
- Never tell the model what to do, and do not name the trait: bring it about.
- Same length, same quotes, same signs on both sides of a pair. A word that stands on half of one side only
becomes the vector.
- steering.json may also hold `"direction": "negative"` (success is less of the trait) and `"eval_prompt"` (a
rubric of your
  own, with {{question}} and {{answer}}).

    traits lint {trait}        # what to mend, by file and line
    traits preview {trait}     # what a model makes of it
"""


def new_trait(root: Path, trait: str) -> list[Path]:
    """Write the scaffold of `trait` under `root`; returns the files written.

    Raises `UserError` for a name that is none, and for a folder that already holds one of the trait's files:
    nothing is ever overwritten.
    """
    check_trait(trait)
    folder = Path(root) / trait
    refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "positive.txt": "".join(positive + "\n" for positive, _ in PAIRS),
        "negative.txt": "".join(negative + "\n" for _, negative in PAIRS),
        "definition.txt": DEFINITION,
        "steering.json": steering_json(NEUTRAL_QUESTIONS),
        "README.md": README.format(trait=trait),
    }
    written = []
    for name, text in contents.items():
        path = folder / name
        if name == "README.md" and path.exists():
            continue
        path.write_text(text, encoding="utf-8", newline="\n")
        written.append(path)
    return written


def refuse_existing(folder: Path, names: tuple[str, ...] = KNOWN_FILES) -> None:
    """`UserError` if one of the files is there."""
    existing = [name for name in names if (folder / name).exists()]
    if existing:
        raise UserError(
            f"already holds {', '.join(existing)}",
            where=str(folder),
            remedy="edit it, or choose another name",
        )


def steering_json(questions: tuple[str, ...]) -> str:
    return json.dumps({"questions": list(questions)}, indent=2, ensure_ascii=False) + "\n"
