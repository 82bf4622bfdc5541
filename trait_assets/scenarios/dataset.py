"""Trait folders as they are read from disk: `datasets/traits/<category>/<trait>/`.

Belongs here: which files make a trait, how their bytes become scenarios, what stops them from being read,
and the content hash. Does not: judging whether the texts are *good* (`lint.py`, `vetting.py`), and writing
them (`scaffold.py`, `drafting.py`). No model, no Dagster.

    positive.txt, negative.txt     one prompt per line; or positive.jsonl, negative.jsonl with `prompt` and
                                   optionally `system_prompt` per line
    definition.txt                 what is judged (trait_definition.txt is accepted)
    steering.json                  {"questions": ["…"], "direction": "positive" or "negative" (optional),
                                   "eval_prompt": "…{question}…{answer}…" (optional)}

A line ends at "\\n" and nowhere else: quotes, tabs, form feeds and U+2028 are part of a prompt. So no csv
reader and no `str.splitlines` here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from storage.errors import UserError
from storage.keys import check_trait
from trait_assets.scenarios.findings import Finding, Severity, in_order

Polarity = Literal["positive", "negative"]
POLARITIES: tuple[Polarity, ...] = ("positive", "negative")

SIDE_FILES: dict[Polarity, tuple[str, str]] = {
    "positive": ("positive.txt", "positive.jsonl"),
    "negative": ("negative.txt", "negative.jsonl"),
}
DEFINITION_FILES = ("definition.txt", "trait_definition.txt")
STEERING_FILE = "steering.json"
KNOWN_FILES = (*SIDE_FILES["positive"], *SIDE_FILES["negative"], *DEFINITION_FILES, STEERING_FILE)

TRAIT_KEY = re.compile(r"[a-z0-9][a-z0-9_-]*/[a-z0-9][a-z0-9_-]*")
# text that `traits new` leaves for the author to replace
PLACEHOLDER = re.compile(r"<<[^<>\n]{1,400}>>")
TEMPLATE_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
TEMPLATE_FIELDS = ("question", "answer")
STEERING_KEYS = ("questions", "direction", "eval_prompt", "adversarial_prefix", "description")
MAX_FILE_BYTES = 64 * 1024 * 1024

_LOOKS_LIKE_A_TRAIT = re.compile(
    r"(pos|positives?|neg|negatives?|(trait[_-])?definitions?|steering)\b.*\.(txt|jsonl?|csv|tsv|md)",
    re.IGNORECASE,
)
# what may stand around a prompt by accident; NBSP and its kin are not in here, the lint names them
_EDGE = " \t\r\f\v"


@dataclass(frozen=True)
class Scenario:
    """One prompt. `line`: 1-based line of the source file, which identifies it for people."""

    prompt: str
    system_prompt: str | None
    line: int


@dataclass(frozen=True)
class SteeringFile:
    """What stage 5 asks. `direction`: which way success lies; `eval_prompt`: a rubric of the author's own,
    with the placeholders {question} and {answer}, in place of the definition."""

    questions: tuple[str, ...]
    direction: Polarity
    eval_prompt: str | None


@dataclass(frozen=True)
class ScenarioSet:
    """A trait's texts, read and validated.

    A scenario's index is its place in `positives` or `negatives`; with `paired` the two sides correspond
    index by index. `content_hash` is that of the source files (`trait_hash`), also for a subset.
    """

    trait: str
    definition: str
    positives: tuple[Scenario, ...]
    negatives: tuple[Scenario, ...]
    steering: SteeringFile | None
    content_hash: str
    findings: tuple[dict[str, Any], ...] = ()

    @cached_property
    def paired(self) -> bool:
        """Both sides have the same number of scenarios, so that line i belongs to line i."""
        return len(self.positives) == len(self.negatives)

    def side(self, polarity: Polarity) -> tuple[Scenario, ...]:
        return self.positives if polarity == "positive" else self.negatives

    def subset(self, limit: int | None, seed: int) -> ScenarioSet:
        """At most `limit` scenarios per side, drawn by a seeded rank of the index, in file order.

        Paired sides keep the same indices. A larger limit with the same seed only adds scenarios, so that
        what was generated for the smaller one stays valid.
        """
        if limit is None or (limit >= len(self.positives) and limit >= len(self.negatives)):
            return self
        if limit < 1:
            raise UserError(f"scenario_limit is {limit}", where=self.trait, remedy="use 2 or more")
        sides = {}
        for polarity in POLARITIES:
            label = "pair" if self.paired else polarity
            scenarios = self.side(polarity)
            ranks = [_rank(seed, label, i) for i in range(len(scenarios))]
            drawn = sorted(sorted(range(len(scenarios)), key=ranks.__getitem__)[:limit])
            sides[polarity] = tuple(scenarios[i] for i in drawn)
        return replace(self, positives=sides["positive"], negatives=sides["negative"])

    def to_json(self) -> dict[str, Any]:
        return {
            "trait": self.trait,
            "definition": self.definition,
            "positives": [asdict(s) for s in self.positives],
            "negatives": [asdict(s) for s in self.negatives],
            "steering": None
            if self.steering is None
            else {
                "questions": list(self.steering.questions),
                "direction": self.steering.direction,
                "eval_prompt": self.steering.eval_prompt,
            },
            "content_hash": self.content_hash,
            "findings": [dict(f) for f in self.findings],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> ScenarioSet:
        """The inverse of `to_json`; unknown keys are ignored, missing ones a UserError."""
        try:
            steering = data["steering"]
            return ScenarioSet(
                trait=data["trait"],
                definition=data["definition"],
                positives=tuple(
                    Scenario(s["prompt"], s["system_prompt"], s["line"]) for s in data["positives"]
                ),
                negatives=tuple(
                    Scenario(s["prompt"], s["system_prompt"], s["line"]) for s in data["negatives"]
                ),
                steering=None
                if steering is None
                else SteeringFile(
                    tuple(steering["questions"]), steering["direction"], steering["eval_prompt"]
                ),
                content_hash=data["content_hash"],
                findings=tuple(data.get("findings", ())),
            )
        except (KeyError, TypeError) as error:
            raise UserError(
                f"is not a stored scenario set ({type(error).__name__}: {error})",
                where=str(data.get("trait", "scenario set")) if isinstance(data, dict) else "scenario set",
                remedy="materialise `scenarios` again",
            ) from error


def _rank(seed: int, label: str, index: int) -> bytes:
    return hashlib.sha256(f"{seed}:{label}:{index}".encode()).digest()


# ----------------------------------------------------------------------------------------------------------


@dataclass
class FolderRead:
    """Everything that could be read of one folder, and every finding on the way; errors do not stop the
    reading."""

    label: str
    positives: tuple[Scenario, ...] = ()
    negatives: tuple[Scenario, ...] = ()
    definition: str = ""
    steering: SteeringFile | None = None
    # polarity, "definition" and "steering" → file name that was read
    files: dict[str, str] = field(default_factory=dict)
    # file name → its text, BOM and CRLF normalised, for rules that look at characters
    texts: dict[str, str] = field(default_factory=dict)
    # (question index → line) of steering.json
    question_lines: tuple[int, ...] = ()
    findings: list[Finding] = field(default_factory=list)

    def side(self, polarity: Polarity) -> tuple[Scenario, ...]:
        return self.positives if polarity == "positive" else self.negatives

    def path_of(self, name: str) -> str:
        return f"{self.label}/{name}"

    def add(
        self, name: str, line: int | None, severity: Severity, code: str, message: str, remedy: str
    ) -> None:
        self.findings.append(
            Finding(self.path_of(name) if name else self.label, line, severity, code, message, remedy)
        )


def read_folder(folder: Path, label: str) -> FolderRead:
    """Read a trait folder as far as it goes. Never raises for anything that is wrong with the files."""
    read = FolderRead(label)
    _read_side(folder, read, "positive")
    _read_side(folder, read, "negative")
    _read_definition(folder, read)
    _read_steering(folder, read)
    return read


def _present(folder: Path, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if (folder / name).exists() or (folder / name).is_symlink()]


def _text(folder: Path, name: str, read: FolderRead) -> str | None:
    """The file's text with BOM and CRLF normalised, or None; says what was wrong."""
    path = folder / name
    try:
        if not path.is_file():
            read.add(name, None, "error", "not-a-file", "is not a regular file", "replace it by a text file")
            return None
        if path.stat().st_size > MAX_FILE_BYTES:
            size = path.stat().st_size / 2**20
            read.add(
                name,
                None,
                "error",
                "too-big",
                f"is {size:.0f} MiB",
                f"keep it below {MAX_FILE_BYTES // 2**20} MiB",
            )
            return None
        data = path.read_bytes()
    except OSError as error:
        read.add(
            name, None, "error", "unreadable", f"cannot be read: {error.strerror}", "check its permissions"
        )
        return None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        read.add(name, 1, "error", "utf16", "is UTF-16, not UTF-8", "save the file as UTF-8")
        return None
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
        read.add(
            name,
            1,
            "warning",
            "bom",
            "begins with a byte order mark (ignored)",
            "save it as UTF-8 without BOM",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        read.add(
            name,
            line,
            "error",
            "invalid-utf8",
            f"is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            "save the file as UTF-8",
        )
        text = data.decode("utf-8", errors="replace")
    if "\x00" in text:
        offset = text.index("\x00")
        read.add(
            name,
            text.count("\n", 0, offset) + 1,
            "error",
            "nul",
            f"holds {text.count(chr(0))} NUL character(s), the first at character {offset}",
            "remove them, or save the file as UTF-8 if it is UTF-16",
        )
    crlf = text.count("\r\n")
    if crlf:
        first = text.count("\n", 0, text.index("\r\n")) + 1
        read.add(
            name,
            first,
            "warning",
            "crlf",
            f"{crlf} line(s) end in CR LF (read as LF)",
            "save the file with Unix line ends",
        )
        text = text.replace("\r\n", "\n")
    if "\r" in text:
        line = text.count("\n", 0, text.index("\r")) + 1
        alone = "\n" not in text.strip("\n")
        read.add(
            name,
            line,
            "error" if alone else "warning",
            "carriage-return",
            f"holds {text.count(chr(13))} bare carriage return(s)"
            + (" and no line feed: it would be read as a single line" if alone else ""),
            "save the file with Unix line ends",
        )
    read.texts[name] = text
    return text


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """(1-based number, raw line); the empty piece after a final newline is no line."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    yield from enumerate(lines, start=1)


def _read_side(folder: Path, read: FolderRead, polarity: Polarity) -> None:
    names = _present(folder, SIDE_FILES[polarity])
    if not names:
        read.add(
            "",
            None,
            "error",
            f"missing-{polarity}",
            f"has no {polarity}.txt",
            f"write {polarity}.txt with one prompt per line (or {polarity}.jsonl)",
        )
        return
    if len(names) == 2:
        read.add(
            names[1],
            None,
            "error",
            "both-formats",
            f"stands beside {names[0]}, and only one of them can count",
            "delete the one that is out of date",
        )
    name = names[0]
    read.files[polarity] = name
    text = _text(folder, name, read)
    if text is None:
        return
    if not text.strip(_EDGE + "\n"):
        read.add(name, None, "error", "empty", "is empty", "write one prompt per line")
        return
    scenarios = _jsonl(name, text, read) if name.endswith(".jsonl") else _lines(name, text, read)
    for scenario in scenarios:
        if PLACEHOLDER.search(scenario.prompt):
            read.add(
                name,
                scenario.line,
                "error",
                "scaffold",
                "still holds the scaffold's text",
                "replace everything in << >> by your own",
            )
    if polarity == "positive":
        read.positives = tuple(scenarios)
    else:
        read.negatives = tuple(scenarios)


def _lines(name: str, text: str, read: FolderRead) -> list[Scenario]:
    scenarios = []
    for number, raw in numbered_lines(text):
        prompt = raw.strip(_EDGE)
        if not prompt:
            read.add(name, number, "info", "blank-line", "is blank (skipped)", "remove the line")
            continue
        if prompt != raw and raw.strip("\r") != prompt:
            side = "ends" if raw.rstrip(_EDGE) != raw else "begins"
            read.add(
                name,
                number,
                "warning",
                "surrounding-space",
                f"{side} with white space (stripped)",
                "remove it: a model continues `word ` and `word` differently",
            )
        scenarios.append(Scenario(prompt, None, number))
    if not text.endswith("\n"):
        last = text.count("\n") + 1
        read.add(
            name,
            last,
            "info",
            "no-final-newline",
            "has no newline at its end",
            "add one, so that tools agree",
        )
    return scenarios


def _jsonl(name: str, text: str, read: FolderRead) -> list[Scenario]:
    scenarios = []
    odd_keys: set[str] = set()

    def fault(line: int, message: str, remedy: str) -> None:
        read.add(name, line, "error", "jsonl", message, remedy)

    shape = 'write an object such as {"prompt": "…", "system_prompt": "…"}'
    for number, raw in numbered_lines(text):
        if not raw.strip(_EDGE):
            read.add(name, number, "info", "blank-line", "is blank (skipped)", "remove the line")
            continue
        try:
            row = json.loads(raw)
        except (json.JSONDecodeError, RecursionError) as error:
            where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deeply nested"
            fault(number, f"is not JSON: {reason}{where}", shape)
            continue
        if not isinstance(row, dict):
            fault(number, f"is a JSON {type(row).__name__}, not an object", shape)
            continue
        prompt, system = row.get("prompt"), row.get("system_prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            fault(number, "has no text under `prompt`", shape)
            continue
        if system is not None and (not isinstance(system, str) or not system.strip()):
            fault(number, "has a `system_prompt` that is no text", "write a text, or leave the key out")
            continue
        if any(_unencodable(part) for part in (prompt, system or "")):
            fault(number, "holds half a surrogate pair", "write the character itself, or both escapes")
            continue
        for key in row.keys() - {"prompt", "system_prompt"} - odd_keys:
            odd_keys.add(key)
            read.add(
                name,
                number,
                "info",
                "unknown-key",
                f"the key `{key}` is not used",
                "keep it if it helps you; only `prompt` and `system_prompt` are read",
            )
        scenarios.append(Scenario(prompt.strip(_EDGE + "\n"), system, number))
    return scenarios


def _unencodable(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _read_definition(folder: Path, read: FolderRead) -> None:
    names = _present(folder, DEFINITION_FILES)
    if not names:
        read.add(
            "",
            None,
            "error",
            "missing-definition",
            "has no definition.txt",
            "write definition.txt: what is HIGH, MID and LOW in this trait",
        )
        return
    texts = {name: _text(folder, name, read) for name in names}
    name = names[0]
    if len(names) == 2 and texts[names[0]] != texts[names[1]]:
        read.add(
            names[1],
            None,
            "error",
            "both-formats",
            f"stands beside {names[0]} and says something else",
            "keep one of the two",
        )
    read.files["definition"] = name
    text = texts[name]
    if text is None:
        return
    definition = text.strip()
    if not definition:
        read.add(name, None, "error", "empty", "is empty", "say what is HIGH, MID and LOW in this trait")
    for match in PLACEHOLDER.finditer(text):
        read.add(
            name,
            text.count("\n", 0, match.start()) + 1,
            "error",
            "scaffold",
            "still holds the scaffold's text",
            "replace everything in << >> by your own",
        )
    read.definition = definition


class _RepeatedKeyError(ValueError):
    pass


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKeyError(key)
        found[key] = value
    return found


def _read_steering(folder: Path, read: FolderRead) -> None:
    name = STEERING_FILE
    if not _present(folder, (name,)):
        return
    read.files["steering"] = name
    text = _text(folder, name, read)
    if text is None:
        return

    def fault(line: int | None, message: str, remedy: str, code: str = "steering-schema") -> None:
        read.add(name, line, "error", code, message, remedy)

    shape = 'write {"questions": ["…", "…"]}'
    try:
        content = json.loads(text, object_pairs_hook=_no_repeats)
    except json.JSONDecodeError as error:
        fault(error.lineno, f"is not JSON: {error.msg} at column {error.colno}", "correct the syntax")
        return
    except _RepeatedKeyError as error:
        line = _line_of(text, json.dumps(str(error)), last=True)
        fault(line, f"names the key `{error}` twice", "keep one of them")
        return
    except RecursionError:
        fault(1, "is too deeply nested", shape)
        return
    if not isinstance(content, dict):
        fault(1, f"is a JSON {type(content).__name__}, not an object", shape)
        return
    before = len([f for f in read.findings if f.severity == "error"])
    questions = _questions(text, content, read, fault, shape)
    direction = content.get("direction", "positive")
    if direction not in POLARITIES:
        fault(
            _line_of(text, '"direction"'),
            f"has the direction {direction!r}",
            'use "positive" (more of the trait) or "negative"',
        )
    eval_prompt = content.get("eval_prompt")
    if eval_prompt is not None:
        _check_eval_prompt(text, eval_prompt, fault)
    for key in content.keys() - set(STEERING_KEYS):
        read.add(
            name,
            _line_of(text, json.dumps(key, ensure_ascii=False)),
            "info",
            "unknown-key",
            f"the key `{key}` is not used",
            "keep it if it helps you; questions, direction and eval_prompt are read",
        )
    if len([f for f in read.findings if f.severity == "error"]) == before:
        read.steering = SteeringFile(tuple(questions), direction, eval_prompt)


def _questions(text: str, content: dict[str, Any], read: FolderRead, fault: Any, shape: str) -> list[str]:
    given = content.get("questions")
    if not isinstance(given, list) or not given:
        fault(
            _line_of(text, '"questions"'),
            "has no list of questions" if not isinstance(given, list) else "has an empty list of questions",
            shape,
        )
        return []
    questions: list[str] = []
    lines: list[int] = []
    objects: list[int] = []
    cursor = 0
    for index, item in enumerate(given):
        question = item.get("question") if isinstance(item, dict) else item
        at, cursor = _find_value(text, question, cursor)
        if not isinstance(question, str) or not question.strip():
            what = "has no text under `question`" if isinstance(item, dict) else f"is {json.dumps(item)[:40]}"
            fault(at, f"question {index + 1} {what}", "write each question as a text")
            continue
        if _unencodable(question):
            fault(at, f"question {index + 1} holds half a surrogate pair", "write the character itself")
            continue
        if PLACEHOLDER.search(question):
            fault(
                at, "still holds the scaffold's text", "replace everything in << >> by your own", "scaffold"
            )
        if isinstance(item, dict):
            objects.append(at)
        questions.append(question.strip())
        lines.append(at)
    if objects:
        read.add(
            STEERING_FILE,
            objects[0],
            "info",
            "question-objects",
            f"{len(objects)} question(s) are objects; only their `question` is used",
            "keep them, or write plain texts",
        )
    read.question_lines = tuple(lines)
    return questions


def _check_eval_prompt(text: str, eval_prompt: Any, fault: Any) -> None:
    line = _line_of(text, '"eval_prompt"')
    if not isinstance(eval_prompt, str) or not eval_prompt.strip():
        fault(
            line, "has an `eval_prompt` that is no text", "write a text with {question} and {answer}, or null"
        )
        return
    if _unencodable(eval_prompt):
        fault(line, "`eval_prompt` holds half a surrogate pair", "write the character itself")
        return
    fields = TEMPLATE_FIELD.findall(eval_prompt)
    strangers = list(dict.fromkeys(f for f in fields if f not in TEMPLATE_FIELDS))
    for unknown in strangers:
        fault(
            line,
            f"`eval_prompt` has the unknown placeholder {{{unknown}}}",
            "use {question} and {answer}",
            "unknown-placeholder",
        )
    if "answer" not in fields and not strangers:
        fault(line, "`eval_prompt` never shows the {answer}", "put {answer} where the judge shall read it")


def _line_of(text: str, needle: str, *, last: bool = False) -> int:
    at = text.rfind(needle) if last else text.find(needle)
    return text.count("\n", 0, at) + 1 if at >= 0 else 1


def _find_value(text: str, value: Any, cursor: int) -> tuple[int, int]:
    """(line, next cursor) of a JSON value written after `cursor`; the cursor's own line when it is written
    otherwise."""
    for ascii_only in (False, True):
        written = json.dumps(value, ensure_ascii=ascii_only)
        at = text.find(written, cursor)
        if at >= 0:
            return text.count("\n", 0, at) + 1, at + len(written)
    return text.count("\n", 0, cursor) + 1, cursor


# ----------------------------------------------------------------------------------------------------------


def load_trait(root: Path, trait: str, *, require_steering: bool) -> ScenarioSet:
    """The scenario set of `root`/`trait`.

    Raises `UserError` naming file, line and remedy for: an unknown trait (with the nearest known name), a
    missing or empty file, invalid UTF-8, a malformed JSONL line or steering.json, scaffold text that was
    never replaced, and a missing steering.json where it is required.
    """
    check_trait(trait)
    folder = Path(root) / trait
    if not folder.is_dir():
        raise unknown_trait(Path(root), trait)
    read = read_folder(folder, trait)
    errors = [f for f in in_order(read.findings) if f.severity == "error"]
    if errors:
        # a missing file explains the rest, so it is said first
        first = min(errors, key=lambda f: (not f.code.startswith("missing"), errors.index(f)))
        more = f" (and {len(errors) - 1} more: see `traits lint {trait}`)" if len(errors) > 1 else ""
        raise UserError(first.message + more, where=str(Path(root) / first.where), remedy=first.remedy)
    if require_steering and read.steering is None:
        raise UserError(
            "has no steering.json",
            where=str(folder),
            remedy='write {"questions": [...]} there, or run without steering (`--no-steering`)',
        )
    return ScenarioSet(
        trait=trait,
        definition=read.definition,
        positives=read.positives,
        negatives=read.negatives,
        steering=read.steering,
        content_hash=trait_hash(root, trait),
        findings=tuple(f.record() for f in in_order(read.findings)),
    )


def unknown_trait(root: Path, trait: str) -> UserError:
    known = discover(root).traits
    close = difflib.get_close_matches(trait, known, n=1, cutoff=0.5)
    if not close:
        close = [k for k in known if k.split("/")[1] == trait.split("/")[-1]][:1]
    if close:
        remedy = f"did you mean `{close[0]}`?"
    elif known:
        shown = ", ".join(known[:8]) + (f" … ({len(known)} in all)" if len(known) > 8 else "")
        remedy = f"known traits: {shown}"
    else:
        remedy = f"make one with `traits new {trait}`"
    return UserError(f"there is no trait `{trait}`", where=str(root), remedy=remedy)


def trait_hash(root: Path, trait: str) -> str:
    """Hash over names and bytes of the trait's known files: what a change of the scenarios is noticed by.

    32 hex digits. A folder without any known file, or one that vanished, is a `UserError`.
    """
    folder = Path(root) / check_trait(trait)
    digest = hashlib.sha256()
    found = False
    for name in KNOWN_FILES:
        try:
            data = (folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(
                f"cannot be read: {error.strerror}",
                where=str(folder / name),
                remedy="replace it by a readable text file",
            ) from error
        found = True
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    if not found:
        raise unknown_trait(Path(root), trait)
    return digest.hexdigest()[:32]


# -------------------------------------------------------------------------------------------------------- d


@dataclass(frozen=True)
class Discovery:
    """What lies under the dataset root. `problems`: folder below the root → why it is not among `traits`."""

    traits: list[str]
    problems: dict[str, str]


def discover(root: Path) -> Discovery:
    """Every trait folder under `root` (two levels), and every folder that looks like one and is not.

    Looks at names and sizes, not at contents: it runs at each tick of the folder sensor. Never raises for
    what it finds.
    """
    root = Path(root)
    traits: list[str] = []
    problems: dict[str, str] = {}
    if not root.is_dir():
        return Discovery([], {str(root): "there is no such folder"})
    for category in _folders(root, root, problems):
        if direct := [n for n in _files(category) if n in KNOWN_FILES]:
            problems[category.name] = (
                f"{', '.join(direct)} at category level: a trait is a folder category/name, two levels deep"
            )
        for folder in _folders(category, root, problems):
            key = f"{category.name}/{folder.name}"
            reason = _problem(folder, key, problems, root)
            if reason == "":
                traits.append(key)
            elif reason is not None:
                problems[key] = reason
    return Discovery(sorted(traits), problems)


def _folders(parent: Path, root: Path, problems: dict[str, str]) -> list[Path]:
    try:
        return sorted(
            p
            for p in parent.iterdir()
            if not p.name.startswith(".") and p.name != "__pycache__" and p.is_dir()
        )
    except OSError as error:
        problems[parent.relative_to(root).as_posix()] = f"cannot be listed: {error.strerror}"
        return []


def _files(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir() if not p.is_dir())
    except OSError:
        return []


def _problem(folder: Path, key: str, problems: dict[str, str], root: Path) -> str | None:
    """'' for a good trait folder, a reason for a bad one, None for something that is no trait at all."""
    files = _files(folder)
    known = [n for n in files if n in KNOWN_FILES]
    if not known:
        for below in _folders(folder, root, problems):
            if any(n in KNOWN_FILES for n in _files(below)):
                problems[below.relative_to(root).as_posix()] = (
                    "lies three levels deep: a trait is category/name"
                )
        alike = [n for n in files if _LOOKS_LIKE_A_TRAIT.fullmatch(n)]
        return f"{alike[0]} is none of the names that are read ({', '.join(KNOWN_FILES)})" if alike else None
    try:
        check_trait(key)
    except UserError as error:
        return f"{error.what}: {error.remedy}"
    for polarity in POLARITIES:
        present = [n for n in SIDE_FILES[polarity] if n in known]
        if not present:
            return f"has no {polarity}.txt"
        if len(present) == 2:
            return f"has both {present[0]} and {present[1]}: keep one"
    if not any(n in known for n in DEFINITION_FILES):
        return "has no definition.txt"
    for name in known:
        try:
            if not (folder / name).is_file():
                return f"{name} is not a regular file"
            if (folder / name).stat().st_size == 0:
                return f"{name} is empty"
            if name in SIDE_FILES["positive"] and _is_scaffold(folder / name):
                return f"{name} still holds the scaffold's text"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def _is_scaffold(path: Path) -> bool:
    with path.open("rb") as file:
        return PLACEHOLDER.search(file.read(4096).decode("utf-8", errors="replace")) is not None
