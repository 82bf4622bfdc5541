"""Rules that find what would teach a vector something else than its trait.

Belongs here: every rule on trait folders, its threshold and why it lies there, and the walk over the dataset
root. Does not: reading files (`dataset.py`), measures (`wording.py`), a judge's opinion of a scenario
(`vetting.py`).

Two tiers. `fast_findings` needs neither a model nor scikit-learn, runs in tens of milliseconds per trait,
and feeds the asset checks. `full_findings` adds a bag-of-words classifier and, given an encoder of
sentences, contamination.

What is a warning: a fault that becomes part of the vector, and that an author can mend. What is only an
info: something worth knowing that can be right. A trait of style *is* a choice of words, so words that lean
to one side are no fault by themselves; a single word, a sign or a length that tells the sides apart without
any reading is one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from storage.errors import UserError
from storage.keys import check_trait
from trait_assets.scenarios.dataset import (
    DEFINITION_FILES,
    KNOWN_FILES,
    POLARITIES,
    SIDE_FILES,
    STEERING_FILE,
    TEMPLATE_FIELD,
    FolderRead,
    Polarity,
    Scenario,
    discover,
    numbered_lines,
    read_folder,
    unknown_trait,
)
from trait_assets.scenarios.findings import Finding, Severity, at_lines, counts, in_order
from trait_assets.scenarios.wording import (
    bigrams,
    document_frequencies,
    fisher,
    jaccard,
    language_shares,
    mann_whitney,
    similar_pairs,
    unspaced_share,
    without_quotes,
    words,
)

if TYPE_CHECKING:
    import numpy as np

# part of the scenarios stage's code version: a changed rule shows in the stored findings
LINT_VERSION = 1

# [n] texts → [n, width] rows of unit length
Embed = Callable[[Sequence[str]], "np.ndarray"]
CountTokens = Callable[[str], int]

DRAFT_MARK = "drafted.json"
COMPANIONS = frozenset({"readme.md", "notes.md", "license", DRAFT_MARK, ".gitkeep", ".gitignore"})

FEW = 20
ENOUGH = 100
# one-sided by count: an eighth of the rows more on one side shifts means and thresholds
COUNT_RATIO = 1.25
LENGTH_RATIO = 1.15
SIDE_P = 0.01
PAIR_LENGTH_RATIO = 1.75
NEAR_DUPLICATE = 0.7
NEAR_BOTH_SIDES = 0.8
# a sign on 25 points more of one side's lines than of the other's
STRUCTURE_GAP = 0.25
# a word that alone tells the sides apart with 80 % balanced accuracy …
TELLING_GAP = 0.6
# … or stands on 40 % of one side and hardly ever on the other
TELLING_HIGH, TELLING_LOW = 0.40, 0.05
LANGUAGE_GAP = 0.10
# five words, chosen inside the training folds, that still separate held-out lines
LEAK_WORDS = 5
LEAK_AUC = 0.95
# below this separation (in standard deviations) the encoder does not see the trait well enough to accuse a
# line
SEEN = 3.5
# log of how much likelier the line is on the other side: planted lines of the other side reach 7 to 28,
# while the farthest of 220 good lines reaches 7
CONTAMINATED, DOUBTFUL = 8.0, 4.0
FEW_QUESTIONS = 5
ENOUGH_QUESTIONS = 10
CONTEXT_TOKENS = 2048


@dataclass(frozen=True)
class LintReport:
    """Findings over one or many trait folders. `traits`: what was read, good or not."""

    findings: tuple[Finding, ...]
    traits: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        return counts(self.findings)

    def of(self, trait: str) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.file == trait or f.file.startswith(trait + "/"))

    def clean(self, *, strict: bool = True) -> bool:
        """No errors, and with `strict` no warnings either: what a command's exit status should say."""
        totals = self.counts
        return totals["error"] == 0 and not (strict and totals["warning"])

    def record(self) -> dict[str, Any]:
        return {
            "traits": list(self.traits),
            "counts": self.counts,
            "findings": [f.record() for f in self.findings],
        }


def lint(
    root: Path,
    traits: Sequence[str] | None = None,
    *,
    full: bool = True,
    embed: Embed | None = None,
    count_tokens: CountTokens | None = None,
    context_tokens: int = CONTEXT_TOKENS,
) -> LintReport:
    """Lint `traits`, or everything under `root`.

    `embed`: an encoder of sentences, for contamination (without it that rule is left out); `count_tokens`:
    the model's tokenizer, without which lengths in tokens are estimated from bytes. Raises `UserError` for
    an unknown trait only.
    """
    root = Path(root)
    findings: list[Finding] = []
    if traits is None:
        if not root.is_dir():
            raise UserError(
                "there is no such folder", where=str(root), remedy="name the folder that holds the traits"
            )
        folders = list(_trait_folders(root, findings))
        findings += _copied_files(folders)
    else:
        folders = []
        for trait in traits:
            check_trait(trait)
            if not (root / trait).is_dir():
                raise unknown_trait(root, trait)
            folders.append((root / trait, trait))
    for folder, label in folders:
        if full:
            findings += full_findings(
                folder, label, embed=embed, count_tokens=count_tokens, context_tokens=context_tokens
            )
        else:
            findings += fast_findings(folder, label, count_tokens=count_tokens, context_tokens=context_tokens)
    return LintReport(in_order(findings), tuple(label for _, label in folders))


def _trait_folders(root: Path, findings: list[Finding]) -> Iterator[tuple[Path, str]]:
    """Every folder at trait level that holds anything known or alike; what lies elsewhere becomes a
    finding."""
    discovery = discover(root)
    for key, reason in discovery.problems.items():
        parts = key.split("/")
        if len(parts) == 1:
            direct = [n for n in KNOWN_FILES if (root / key / n).exists()]
            for name in direct:
                findings.append(
                    Finding(
                        f"{key}/{name}",
                        None,
                        "error",
                        "category-level-file",
                        "lies at category level, where no trait is read",
                        f"move it to {key}/<trait>/{name}",
                    )
                )
            if not direct:
                findings.append(Finding(key, None, "error", "bad-folder", reason, "see the message"))
        elif len(parts) > 2:
            findings.append(
                Finding(key, None, "error", "too-deep", reason, f"move it to {parts[-2]}/{parts[-1]}")
            )
        elif not any((root / key / n).exists() for n in KNOWN_FILES) or "is not a trait name" in reason:
            code = "bad-name" if "is not a trait name" in reason else "bad-folder"
            findings.append(Finding(key, None, "error", code, reason, "rename it"))
    for category in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        for path in sorted(category.iterdir()):
            if path.is_file() and path.name not in KNOWN_FILES and path.name.lower() not in COMPANIONS:
                findings.append(_foreign(f"{category.name}/{path.name}", path.name))
            if path.is_dir() and any((path / name).exists() for name in KNOWN_FILES):
                yield path, f"{category.name}/{path.name}"


def _foreign(where: str, name: str) -> Finding:
    severity: Severity = "error" if name.endswith(".py") else "info" if name.startswith(".") else "warning"
    reason = "would shadow a package of that name" if name.endswith(".py") else "is not read by anything"
    return Finding(where, None, severity, "foreign-file", f"{reason}", "move it out of the dataset folder")


def _copied_files(folders: Sequence[tuple[Path, str]]) -> list[Finding]:
    first: dict[str, str] = {}
    found = []
    for folder, label in folders:
        for name in (*SIDE_FILES["positive"], *SIDE_FILES["negative"]):
            path = folder / name
            if not path.is_file():
                continue
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            where = f"{label}/{name}"
            if digest in first:
                found.append(
                    Finding(
                        where,
                        None,
                        "info",
                        "copied-file",
                        f"is byte for byte {first[digest]}",
                        "do not compare or pool these two traits: they share their rows",
                    )
                )
            else:
                first[digest] = where
    return found


# ------------------------------------------------------------------------------------------------------- fast


def fast_findings(
    folder: Path,
    label: str,
    *,
    count_tokens: CountTokens | None = None,
    context_tokens: int = CONTEXT_TOKENS,
) -> list[Finding]:
    """Findings of one trait folder that need no model and no fit. `label`: what the folder is called in
    them."""
    return _fast(folder, read_folder(folder, label), count_tokens, context_tokens)


def _fast(
    folder: Path, read: FolderRead, count_tokens: CountTokens | None, context_tokens: int
) -> list[Finding]:
    findings = list(read.findings)
    findings += _company(folder, read)
    for name, text in read.texts.items():
        undecodable = any(f.code == "invalid-utf8" and f.file == read.path_of(name) for f in read.findings)
        findings += [
            f
            for f in _characters(read.path_of(name), text)
            # the reader itself puts U+FFFD where it could not decode
            if not (undecodable and f.code == "replacement-character")
        ]
    for polarity in POLARITIES:
        if scenarios := read.side(polarity):
            findings += _one_side(read, polarity, scenarios, count_tokens, context_tokens)
    findings += _definition(read)
    findings += _steering(read)
    if read.positives and read.negatives:
        findings += _both_sides(read)
        findings += _balance(read)
    return findings


def _company(folder: Path, read: FolderRead) -> list[Finding]:
    """Files that are none of a trait's, and the mark that `traits draft` leaves."""
    findings = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name != "__pycache__":
                findings.append(
                    Finding(
                        read.path_of(path.name),
                        None,
                        "warning",
                        "foreign-folder",
                        "is a folder inside a trait, and nothing reads it",
                        "move it out of the trait",
                    )
                )
        elif path.name == DRAFT_MARK:
            findings.append(_draft(read, path))
        elif path.name not in KNOWN_FILES and path.name.lower() not in COMPANIONS:
            findings.append(_foreign(read.path_of(path.name), path.name))
    if STEERING_FILE not in read.files.values():
        findings.append(
            Finding(
                read.label,
                None,
                "warning",
                "missing-steering",
                "has no steering.json, so nothing can prove its vector causal",
                'write {"questions": [...]}, or run it without steering',
            )
        )
    return findings


def _draft(read: FolderRead, path: Path) -> Finding:
    try:
        mark = json.loads(path.read_text(encoding="utf-8"))
        model, made = mark.get("model", "a model"), mark.get("pairs", "?")
    except (OSError, ValueError, AttributeError):
        model, made = "a model", "?"
    return Finding(
        read.path_of(DRAFT_MARK),
        None,
        "warning",
        "draft",
        f"{made} pairs were drafted by {model} and nobody has signed them off",
        "read every line, mend what is off, then delete this file",
    )


_CHARACTERS: tuple[tuple[str, re.Pattern[str], Severity, str, str], ...] = (
    (
        "nbsp",
        re.compile("[\u00a0\u2007](?![;:!?»%])|\u202f(?![;:!?»%])"),
        "warning",
        "holds a no-break space, which a tokenizer does not see as a space",
        "replace it by a space",
    ),
    (
        "line-separator",
        re.compile("[\u2028\u2029\u0085\v\f]"),
        "warning",
        "holds a line break that is none to this reader (U+2028, U+2029, U+0085, VT or FF)",
        "replace it by a space, or cut the line there",
    ),
    (
        "zero-width",
        re.compile("[\u200b\u2060\ufeff\u00ad]"),
        "warning",
        "holds an invisible character (zero-width space, BOM or soft hyphen)",
        "delete it",
    ),
    (
        "bidi-control",
        re.compile("[\u202a-\u202e\u2066-\u2069]"),
        "warning",
        "holds a bidirectional control character",
        "delete it, unless the text is written right to left",
    ),
    (
        "control-character",
        re.compile("[\x01-\x08\x0e-\x1f\x7f\x80-\x84\x86-\x9f]"),
        "warning",
        "holds a control character",
        "delete it",
    ),
    (
        "replacement-character",
        re.compile("\ufffd"),
        "warning",
        "holds U+FFFD: a character was lost when the file was saved",
        "write it anew",
    ),
    (
        "mojibake",
        re.compile("Ã[\u0080-\u00bf]|â€.|Â[\u00a1-\u00bf]"),
        "warning",
        "looks like UTF-8 read as Latin-1 and saved again",
        "save it anew from the source",
    ),
)


def _characters(file: str, text: str) -> list[Finding]:
    findings = []
    lines = list(numbered_lines(text))
    for code, pattern, severity, message, remedy in _CHARACTERS:
        hits = [number for number, line in lines if pattern.search(line)]
        findings += at_lines(file, hits, severity, code, message, remedy)
    if not file.endswith((".json", ".jsonl")):
        hits = [number for number, line in lines if "\t" in line.strip()]
        findings += at_lines(
            file,
            hits,
            "warning",
            "tab",
            "holds a tab",
            "replace it by a space; a table has one prompt per line too",
        )
    return findings


_BARE_ROLE = re.compile(
    r"(user|human|assistant|ai|system|bot|model|question|answer|q|a)\s*[:：]", re.IGNORECASE
)
_ROLE_PREFIX = re.compile(r"(user|human|assistant|system)\s*[:：]\s*\S", re.IGNORECASE)
_TEMPLATE_TOKEN = re.compile(
    r"<\|[a-z_]+\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>|^###\s*(?:Instruction|Response|Input)",
    re.M,
)
_LITERAL_ESCAPE = re.compile(r"\\[nrt](?![a-z])|\\u[0-9a-fA-F]{4}")
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|nbsp|#\d{2,5}|#x[0-9a-fA-F]{2,5});")
_LIST_MARK = re.compile(r"(?:\d{1,3}[.)]|[-*•])\s+\S")
_BRACKETS = re.compile(r"\[[A-Z][A-Z _]{2,30}\]|\{\{[^{}]{1,40}\}\}|<[A-Z][A-Z_ ]{2,30}>")

_START = r"(?:^|[.!?:;。！？]\s*|…\s+)(?:please\s+|and\s+|now\s+)?"
_INSTRUCTIONS = re.compile(
    "|".join(
        [
            r"^\W*you are (?:now |going to be )?(?:an?|the|my|no longer)\b",
            _START
            + r"you are (?:now )?an? [\w\s-]{0,30}(?:assistant|chatbot|ai|bot|language model|expert)\b",
            _START + r"(?:respond|reply|answer|speak|talk|write|act|behave|continue)\s+"
            r"(?:only\s+)?(?:as|like|with|in)\s+"
            r"(?:if\b|an?\b|the\b|english|spanish|french|german|one\b|all\b|\w+ly\b|\w+ "
            r"(?:tone|style|voice|language))",
            _START + r"(?:pretend|imagine|suppose)\s+(?:that\s+)?(?:you(?:'re| are)|to be)\b",
            _START + r"role-?play\b",
            r"\byour (?:task|role|goal|job) is to\b",
            r"\bas an? (?:ai|language model|ai assistant)\b",
            r"\b(?:in the (?:style|voice|tone) of|stay in character|break character)\b",
            r"\byour (?:response|answer|reply|output|completion)s? (?:should|must)\b",
            r"^(?:please\s+)?be (?:as |more |very |extremely |completely |fully |really )?"
            r"(?:\w+ and "
            r")?(?:angry|rude|polite|formal|informal|honest|happy|sad|enthusiastic|sarcastic|serious|"
            r"helpful|unhelpful|evil|kind|brief|concise|\w+ful|\w+tic)\b",
            _START + r"(?:responde|contesta|actúa|habla|escribe) (?:como|en|de forma|de manera)\b",
            r"^eres una? ",
            _START + r"(?:réponds|répondez|agis|parle) (?:comme|en)\b",
            r"^tu es une? ",
            _START + r"(?:antworte|sprich|verhalte dich|schreibe?) (?:wie|als ob|auf|im stil)\b",
            r"^du bist eine? ",
            r"^你是一[个名位]|请以.{1,12}的(?:身份|口吻|语气)|^(?:请)?扮演",
        ]
    ),
    re.IGNORECASE,
)


def instructs(text: str) -> str | None:
    """The words by which a text instructs a model instead of eliciting; None if it does not. Speech in
    quotes is the characters' own affair."""
    found = _INSTRUCTIONS.search(without_quotes(text))
    return found.group().strip(" .!?:;…") if found else None


@dataclass(frozen=True)
class LineRule:
    """A rule on one prompt by itself. `text_only`: it is about files of one prompt per line."""

    code: str
    severity: Severity
    hits: Callable[[str], Any]
    message: str
    remedy: str
    text_only: bool = False


LINE_RULES: tuple[LineRule, ...] = (
    LineRule(
        "bare-role",
        "error",
        _BARE_ROLE.fullmatch,
        "is a bare speaker's mark: a prompt of several lines was flattened into a file of one per line",
        "put such prompts into a .jsonl file, with \\n inside",
    ),
    LineRule(
        "role-prefix",
        "warning",
        lambda p: _ROLE_PREFIX.match(p) and "\n" not in p,
        "begins with a speaker's mark; the chat template adds its own",
        "keep only what is said",
    ),
    LineRule(
        "template-token",
        "warning",
        _TEMPLATE_TOKEN.search,
        "holds a chat template's own token",
        "delete it",
    ),
    LineRule(
        "literal-escape",
        "warning",
        _LITERAL_ESCAPE.search,
        "holds an escape sequence as text, such as backslash n",
        "write the character, or use .jsonl for prompts of several lines",
        text_only=True,
    ),
    LineRule("html-entity", "warning", _ENTITY.search, "holds an HTML entity", "write the character itself"),
    LineRule(
        "comment",
        "warning",
        lambda p: p.startswith("#"),
        "begins with #, and there are no comments: it is read as a prompt",
        "delete the line",
        text_only=True,
    ),
    LineRule(
        "list-mark",
        "warning",
        _LIST_MARK.match,
        "begins with a list's number or bullet",
        "delete the mark",
    ),
    LineRule(
        "json-in-txt",
        "error",
        lambda p: re.match(r'\{\s*"prompt"\s*:', p),
        "is a JSON object in a .txt file, and would be shown to the model as it stands",
        "rename the file to .jsonl",
        text_only=True,
    ),
    LineRule(
        "quoted-line",
        "warning",
        lambda p: len(p) > 1 and p[0] == p[-1] == '"' and '"' not in p[1:-1],
        "is wrapped in quotes as a whole, as a spreadsheet exports it",
        "remove the outer quotes",
    ),
    LineRule(
        "unknown-placeholder",
        "warning",
        lambda p: TEMPLATE_FIELD.search(p) or _BRACKETS.search(p),
        "holds a placeholder, and nothing fills it in",
        "write the words themselves",
    ),
    LineRule(
        "too-short",
        "warning",
        lambda p: len(words(p)) < 3,
        "has fewer than three words, too little to elicit anything",
        "write a situation",
    ),
    LineRule(
        "ends-in-quote",
        "info",
        lambda p: p[-1] in "\"'“”«»„",
        "ends in a quotation mark, so the model begins with a quotation's first word",
        "make sure that both sides do so equally often",
    ),
    LineRule(
        "open-quote",
        "info",
        lambda p: p.count('"') % 2 == 1 and p[-1] != '"',
        "holds an odd number of double quotes (speech that the model continues)",
        "make sure that both sides do so equally often",
    ),
)


def line_faults(prompt: str, label: str) -> list[str]:
    """Codes of the errors and warnings that a prompt earns by itself, for whoever screens texts before they
    are in a file. `label`: the trait's name, which the text should not say."""
    found = [rule.code for rule in LINE_RULES if rule.severity != "info" and rule.hits(prompt)]
    found += [code for code, pattern, *_ in _CHARACTERS if pattern.search(prompt)]
    if instructs(prompt) is not None:
        found.append("instruction")
    named = trait_name_pattern(label)
    if named is not None and named.search(prompt):
        found.append("names-trait")
    return found


def _one_side(
    read: FolderRead,
    polarity: Polarity,
    scenarios: Sequence[Scenario],
    count_tokens: CountTokens | None,
    context_tokens: int,
) -> list[Finding]:
    name = read.files[polarity]
    file = read.path_of(name)
    findings: list[Finding] = []

    n = len(scenarios)
    if n < ENOUGH:
        severity: Severity = "warning" if n < FEW else "info"
        findings.append(
            Finding(
                file,
                None,
                severity,
                "few-scenarios",
                f"has {n} scenarios",
                "write 100 or more: a fifth is held out, and vetting takes some away",
            )
        )
    for rule in LINE_RULES:
        if rule.text_only and not name.endswith(".txt"):
            continue
        lines = [x.line for x in scenarios if rule.hits(x.prompt)]
        findings += at_lines(file, lines, rule.severity, rule.code, rule.message, rule.remedy)
    findings += _too_long(file, scenarios, count_tokens, context_tokens)
    findings += _instructed(file, scenarios)
    findings += _named(file, read.label, scenarios)
    findings += _repeats(file, scenarios)
    if unspaced_share(s.prompt for s in scenarios) > 0.5:
        findings.append(
            Finding(
                file,
                None,
                "info",
                "no-spaces",
                "is written without spaces between words, so words are counted by characters",
                "nothing: it is said so that the counts are read rightly",
            )
        )
    return findings


def _too_long(
    file: str, scenarios: Sequence[Scenario], count_tokens: CountTokens | None, context_tokens: int
) -> list[Finding]:
    findings = []
    for s in scenarios:
        text = s.prompt + (s.system_prompt or "")
        # three bytes per token are few for every script and tokenizer in use: the estimate errs towards a
        # finding
        tokens = count_tokens(text) if count_tokens is not None else len(text.encode()) // 3
        if tokens > context_tokens:
            about = "" if count_tokens is not None else "about "
            findings.append(
                Finding(
                    file,
                    s.line,
                    "error" if count_tokens is not None else "warning",
                    "too-long",
                    f"has {about}{tokens} tokens, more than the context of {context_tokens}",
                    "shorten it",
                )
            )
    return findings


def _instructed(file: str, scenarios: Sequence[Scenario]) -> list[Finding]:
    findings = []
    hits = [(s.line, found) for s in scenarios if (found := instructs(s.prompt)) is not None]
    if len(hits) <= 5:
        for line, found in hits:
            findings.append(_instruction(file, line, f"instructs the model (“{found}”)"))
    elif hits:
        shown = ", ".join(str(line) for line, _ in hits[:20])
        findings.append(
            _instruction(
                file,
                hits[0][0],
                f"{len(hits)} lines: instruct the model, as in “{hits[0][1]}” (lines {shown})",
            )
        )
    with_system = [s for s in scenarios if s.system_prompt is not None]
    if with_system:
        kinds = len({s.system_prompt for s in with_system})
        findings.append(
            Finding(
                file,
                with_system[0].line,
                "warning",
                "system-prompt",
                f"{len(with_system)} of {len(scenarios)} scenarios carry a system prompt ({kinds} "
                f"different): "
                "instructed elicitation",
                "prefer situations that bring the trait about by themselves; see elicitation_guide.md",
            )
        )
        repeated = len(scenarios) - len({s.prompt for s in scenarios})
        if repeated:
            findings.append(
                Finding(
                    file,
                    None,
                    "info",
                    "repeated-prompt",
                    f"{repeated} prompts recur with another system prompt",
                    "count distinct prompts, not lines, when you ask whether there are enough",
                )
            )
    return findings


def _instruction(file: str, line: int, message: str) -> Finding:
    return Finding(
        file,
        line,
        "warning",
        "instruction",
        message,
        "write a situation in which the trait shows by itself; see elicitation_guide.md",
    )


def trait_name_pattern(label: str) -> re.Pattern[str] | None:
    """Matches the trait's own name and its close forms (`enthusias…`); None where the name is too short to
    tell."""
    parts = [p for p in re.split(r"[_\-\d]+", label.split("/")[-1]) if len(p) >= 5]
    stems = [p if len(p) < 8 else p[:-2] for p in parts]
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, stems))})\w*", re.IGNORECASE) if stems else None


def _named(file: str, label: str, scenarios: Sequence[Scenario]) -> list[Finding]:
    pattern = trait_name_pattern(label)
    if pattern is None:
        return []
    lines = [s.line for s in scenarios if pattern.search(s.prompt)]
    many = len(lines) > max(2, 0.05 * len(scenarios))
    return at_lines(
        file,
        lines,
        "warning" if many else "info",
        "names-trait",
        "names the trait itself: the vector may stand for the word",
        "show it instead of naming it",
        each=2,
    )


def _identity(s: Scenario) -> tuple[str, str]:
    return " ".join(s.prompt.split()), " ".join((s.system_prompt or "").split())


def _repeats(file: str, scenarios: Sequence[Scenario]) -> list[Finding]:
    """Exact and near duplicates within one side, said at the later line."""
    findings = []
    first: dict[tuple[str, str], int] = {}
    distinct: list[Scenario] = []
    for s in scenarios:
        key = _identity(s)
        if key in first:
            findings.append(
                Finding(
                    file,
                    s.line,
                    "warning",
                    "duplicate",
                    f"is line {first[key]} again",
                    "delete it, or write another situation: it would count twice, and may straddle "
                    "train and validation",
                )
            )
        else:
            first[key] = s.line
            distinct.append(s)
    # a prompt that recurs with another system prompt is told by `repeated-prompt`
    by_prompt = list({s.prompt: s for s in reversed(distinct)}.values())[::-1]
    told: set[int] = set()
    for i, j, similarity in similar_pairs([bigrams(s.prompt) for s in by_prompt], None, NEAR_DUPLICATE):
        if j in told:
            continue
        told.add(j)
        findings.append(
            Finding(
                file,
                by_prompt[j].line,
                "warning",
                "near-duplicate",
                f"is line {by_prompt[i].line} with few words changed ({similarity:.0%} of the word "
                f"pairs are shared)",
                "write another situation",
            )
        )
    return findings


# -------------------------------------------------------------------------------------------------- both si


def _both_sides(read: FolderRead) -> list[Finding]:
    """Lines that carry both labels, exactly or nearly."""
    findings: list[Finding] = []
    pos_name, neg_name = read.files["positive"], read.files["negative"]
    file = read.path_of(neg_name)
    known = {_identity(s): s.line for s in reversed(read.positives)}
    loose = {(tuple(words(s.prompt)), s.system_prompt): s.line for s in reversed(read.positives)}
    exact: set[int] = set()
    for s in read.negatives:
        line = known.get(_identity(s))
        almost = loose.get((tuple(words(s.prompt)), s.system_prompt)) if words(s.prompt) else None
        if line is None and almost is None:
            continue
        exact.add(s.line)
        same = line is not None
        findings.append(
            Finding(
                file,
                s.line,
                "error",
                "both-sides",
                f"stands in {pos_name}:{line if same else almost} too"
                + ("" if same else ", but for case and punctuation")
                + ": it carries both labels",
                "delete one of the two",
            )
        )
    shared = {s.prompt for s in read.positives} & {s.prompt for s in read.negatives}
    by_system = [s for s in read.negatives if s.prompt in shared and s.line not in exact]
    if by_system:
        findings.append(
            Finding(
                file,
                by_system[0].line,
                "info",
                "same-prompts",
                f"{len(shared)} prompts are the same on both sides and differ only by their system prompt",
                "know that the vector then stands for the instruction, as far as it goes",
            )
        )
        return findings
    left = [bigrams(s.prompt) for s in read.positives]
    rest = [(i, s) for i, s in enumerate(read.negatives) if s.line not in exact]
    minimal = []
    told = set()
    for i, k, similarity in similar_pairs(left, [bigrams(s.prompt) for _, s in rest], NEAR_BOTH_SIDES):
        index, s = rest[k]
        if index == i and len(read.positives) == len(read.negatives):
            minimal.append(s.line)
        elif s.line not in told:
            told.add(s.line)
            findings.append(
                Finding(
                    file,
                    s.line,
                    "warning",
                    "near-both-sides",
                    f"is nearly {pos_name}:{read.positives[i].line} ({similarity:.0%} of the word pairs "
                    f"are shared), "
                    "which is not its counterpart",
                    "write another situation, or move it to the line of its counterpart",
                )
            )
    findings += at_lines(
        file,
        sorted(minimal),
        "info",
        "minimal-pair",
        f"differs from its counterpart in {pos_name} by a few words only",
        "make sure that exactly these words carry the trait",
    )
    return findings


@dataclass(frozen=True)
class _Sign:
    name: str
    has: Callable[[str], bool]


_SIGNS = (
    _Sign("an exclamation mark", lambda p: "!" in p or "！" in p),
    _Sign("a question mark", lambda p: "?" in p or "？" in p),
    _Sign("a double quote", lambda p: any(q in p for q in '"“”«»「')),
    _Sign("an odd number of double quotes", lambda p: p.count('"') % 2 == 1),
    _Sign("a quotation mark at its end", lambda p: p[-1] in "\"'“”«»„"),
    _Sign("a full stop, ! or ? at its end", lambda p: p.rstrip("\"'”»")[-1:] in tuple(".!?。！？…")),
    _Sign("a comma at its end", lambda p: p[-1] in ",，"),
    _Sign("a colon at its end", lambda p: p[-1] in ":："),
    _Sign("a colon", lambda p: ":" in p or "：" in p),
    _Sign("a semicolon", lambda p: ";" in p or "；" in p),
    _Sign("a dash", lambda p: any(d in p for d in ("—", "–", " - ", "--"))),
    _Sign("an ellipsis", lambda p: "…" in p or "..." in p),
    _Sign("a parenthesis", lambda p: "(" in p or "（" in p),
    _Sign("a comma", lambda p: "," in p or "，" in p or "、" in p),
    _Sign("a digit", lambda p: re.search(r"\d", p) is not None),
    _Sign("a small letter at its start", lambda p: p[0].islower()),
    _Sign("a word in capitals", lambda p: re.search(r"\b[A-Z]{3,}\b", p) is not None),
    _Sign("an emoji", lambda p: re.search("[\U0001f300-\U0001faff☀-➿]", p) is not None),
    _Sign("several lines", lambda p: "\n" in p),
)


def _balance(read: FolderRead) -> list[Finding]:
    findings: list[Finding] = []
    positives, negatives = read.positives, read.negatives
    n, m = len(positives), len(negatives)
    pos_file, neg_file = read.path_of(read.files["positive"]), read.path_of(read.files["negative"])
    fewer = pos_file if n < m else neg_file
    if n != m:
        uneven = max(n, m) / min(n, m) >= COUNT_RATIO
        findings.append(
            Finding(
                fewer,
                None,
                "warning" if uneven else "info",
                "count-imbalance",
                f"{n} positives stand against {m} negatives, so lines are not read as pairs",
                "write as many lines on both sides, line i of one the counterpart of line i of the other",
            )
        )
    if {s.prompt for s in positives} == {s.prompt for s in negatives}:
        # the sides differ by system prompt alone: wording cannot tell them apart
        return findings
    findings += _lengths(read, pos_file, neg_file)
    findings += _structure(read, pos_file, neg_file)
    findings += _words(read, pos_file, neg_file)
    if n == m:
        findings += _pairs(read, neg_file)
    return findings


def _lengths(read: FolderRead, pos_file: str, neg_file: str) -> list[Finding]:
    a = [float(len(words(s.prompt))) for s in read.positives]
    b = [float(len(words(s.prompt))) for s in read.negatives]
    longer, p = mann_whitney(a, b)
    ratio = max(mean(a), 1e-9) / max(mean(b), 1e-9)
    if p >= SIDE_P or 1 / LENGTH_RATIO < ratio < LENGTH_RATIO:
        return []
    file = neg_file if ratio > 1 else pos_file
    share = longer if ratio > 1 else 1 - longer
    return [
        Finding(
            file,
            None,
            "warning",
            "length-imbalance",
            f"positives have {mean(a):.1f} words on average, negatives {mean(b):.1f}; length alone orders "
            f"{share:.0%} of the positive-negative pairs (Mann-Whitney p = {_p(p)})",
            "bring each line to the length of its counterpart",
        )
    ]


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _structure(read: FolderRead, pos_file: str, neg_file: str) -> list[Finding]:
    findings = []
    n, m = len(read.positives), len(read.negatives)
    signs = list(_SIGNS)
    for at, what in ((slice(0, 3), "begins with"), (slice(-1, None), "ends in")):
        common = Counter(
            " ".join(words(s.prompt)[at])
            for s in (*read.positives, *read.negatives)
            if len(words(s.prompt)) >= 4
        )
        for phrase, count in common.most_common(5):
            if count >= 8:
                signs.append(_phrase_sign(phrase, at, what))
    for sign in signs:
        pos = [s for s in read.positives if sign.has(s.prompt)]
        neg = [s for s in read.negatives if sign.has(s.prompt)]
        gap = len(pos) / n - len(neg) / m
        if abs(gap) < STRUCTURE_GAP:
            continue
        # Bonferroni over the signs looked at
        p = fisher(len(pos), n, len(neg), m) * len(signs)
        if p >= SIDE_P:
            continue
        side, file, hits = ("positives", pos_file, pos) if gap > 0 else ("negatives", neg_file, neg)
        high, low = max(len(pos) / n, len(neg) / m), min(len(pos) / n, len(neg) / m)
        phrase_sign = sign.name.startswith(("begins", "ends"))
        has = sign.name if phrase_sign else f"has {sign.name}"
        findings.append(
            Finding(
                file,
                hits[0].line,
                "warning",
                "structure-imbalance",
                f"{has} in {high:.0%} of the {side} and {low:.0%} of the others (Fisher p = "
                f"{_p(min(p, 1.0))})",
                "spread it over both sides, or take it out: it tells the sides apart without the trait",
            )
        )
    return findings


def _phrase_sign(phrase: str, at: slice, what: str) -> _Sign:
    return _Sign(f"{what} “{phrase}”", lambda p: " ".join(words(p)[at]) == phrase)


def different_languages(positives: Sequence[str], negatives: Sequence[str]) -> tuple[str, str] | None:
    """The two languages or scripts in which the sides differ, or None when they are written in the same."""
    a, b = language_shares(positives), language_shares(negatives)
    gaps = {name: a.get(name, 0.0) - b.get(name, 0.0) for name in {*a, *b}}
    if not gaps:
        return None
    up, down = max(gaps, key=gaps.__getitem__), min(gaps, key=gaps.__getitem__)
    return (up, down) if gaps[up] > LANGUAGE_GAP and gaps[down] < -LANGUAGE_GAP else None


def _words(read: FolderRead, pos_file: str, neg_file: str) -> list[Finding]:
    """Single words that tell the sides apart."""
    pos, neg = [s.prompt for s in read.positives], [s.prompt for s in read.negatives]
    n, m = len(pos), len(neg)
    languages = different_languages(pos, neg)
    if languages is not None:
        return [
            Finding(
                neg_file,
                None,
                "info",
                "different-languages",
                f"positives hold more {languages[0]}, negatives more {languages[1]}: their words differ "
                f"by nature",
                "nothing, if the language is the trait; otherwise write both sides in one",
            )
        ]
    a, b = document_frequencies(pos), document_frequencies(neg)
    findings = []
    for word in sorted({*a, *b}):
        high, low = a[word] / n, b[word] / m
        side, file = "positives", pos_file
        if high < low:
            high, low, side, file = low, high, "negatives", neg_file
        if not (high - low >= TELLING_GAP or (high >= TELLING_HIGH and low <= TELLING_LOW)):
            continue
        if fisher(a[word], n, b[word], m) * len({*a, *b}) >= SIDE_P:
            continue
        source = read.positives if side == "positives" else read.negatives
        line = next(s.line for s in source if word in words(s.prompt))
        findings.append(
            Finding(
                file,
                line,
                "warning",
                "telling-word",
                f"the word “{word}” stands in {high:.0%} of the {side} and {low:.0%} of the others",
                "say it in other words on most lines, or use it on both sides",
            )
        )
    return findings


def truly_paired(positives: Sequence[str], negatives: Sequence[str]) -> tuple[bool, float, float]:
    """Whether line i answers line i: (yes, mean similarity of counterparts, of lines that are not)."""
    if len(positives) != len(negatives) or len(positives) < 3:
        return False, 0.0, 0.0
    a, b = [frozenset(words(p)) for p in positives], [frozenset(words(p)) for p in negatives]
    n = len(a)
    own = mean(jaccard(a[i], b[i]) for i in range(n))
    shifts = [d for d in (1, 2, 3, 5, 7) if d < n]
    other = mean(jaccard(a[i], b[(i + d) % n]) for d in shifts for i in range(n))
    return own - other > 0.08 and own > 1.4 * other, own, other


def _pairs(read: FolderRead, file: str) -> list[Finding]:
    positives, negatives = read.positives, read.negatives
    paired, own, other = truly_paired([s.prompt for s in positives], [s.prompt for s in negatives])
    if not paired:
        return [
            Finding(
                file,
                None,
                "info",
                "not-paired",
                f"line i is no counterpart of positive line i (they share {own:.0%} of their words, "
                f"others {other:.0%})",
                "pair the lines: the same situation with and without the trait leaves less else to learn",
            )
        ]
    a, b = [frozenset(words(s.prompt)) for s in positives], [frozenset(words(s.prompt)) for s in negatives]
    frequency = Counter(word for line in a for word in line)
    holders: dict[str, list[int]] = {}
    for j, line in enumerate(a):
        for word in line:
            holders.setdefault(word, []).append(j)

    def sharing(line: frozenset[str]) -> set[int]:
        """Positives that share a word with `line` that few others have: only such can be its counterpart."""
        return {j for word in line if 0 < frequency[word] <= max(3, len(a) // 10) for j in holders[word]}

    broken, long = [], []
    for i, s in enumerate(negatives):
        mine = jaccard(a[i], b[i])
        elsewhere = any(j != i and jaccard(a[j], b[i]) >= mine + 0.15 for j in sharing(b[i]))
        # no likelier than chance, where counterparts are much likelier
        if elsewhere or (own >= 2.5 * other and mine <= other):
            broken.append(s.line)
        x, y = len(words(positives[i].prompt)), len(words(s.prompt))
        if min(x, y) and max(x, y) / min(x, y) > PAIR_LENGTH_RATIO and abs(x - y) > 5:
            long.append(s.line)
    findings = at_lines(
        file,
        broken,
        "warning",
        "broken-pair",
        "is no counterpart of the positive on the same place, while most lines are",
        "look for a line that is missing or out of order further up",
    )
    findings += at_lines(
        file,
        long,
        "warning",
        "pair-length",
        f"is more than {PAIR_LENGTH_RATIO:g} times as long as its counterpart, or the other way round",
        "bring the two to the same length",
    )
    return findings


# -------------------------------------------------------------------------------------- definition and ques

_RUBRIC = {
    level: re.compile(rf"^\W*{level}\b[^\n]{{0,24}}?[:(\[0-9]", re.IGNORECASE | re.MULTILINE)
    for level in ("HIGH", "MID", "LOW")
}
_RUBRIC["MID"] = re.compile(
    r"^\W*(?:MID|MIDDLE|MEDIUM|MODERATE)\b[^\n]{0,24}?[:(\[0-9]", re.IGNORECASE | re.MULTILINE
)


def _definition(read: FolderRead) -> list[Finding]:
    name = read.files.get("definition")
    if name is None or not read.definition:
        return []
    file = read.path_of(name)
    findings = []
    missing = [level for level, pattern in _RUBRIC.items() if not pattern.search(read.definition)]
    if missing:
        findings.append(
            Finding(
                file,
                1,
                "warning",
                "rubric",
                f"has no paragraph for {', '.join(missing)}",
                "say what scores HIGH (70-100), MID (30-70) and LOW (0-30), each in a paragraph that "
                "begins so",
            )
        )
    if len(read.definition) < 150:
        findings.append(
            Finding(
                file,
                1,
                "warning",
                "short-definition",
                f"has {len(read.definition)} characters, too few to judge by",
                "say what counts and what does not",
            )
        )
    lines = [
        number
        for number, line in numbered_lines(read.texts[name])
        if TEMPLATE_FIELD.search(line) or _BRACKETS.search(line)
    ]
    findings += at_lines(
        file,
        lines,
        "warning",
        "unknown-placeholder",
        "holds a placeholder, and nothing fills it in",
        "write the words",
    )
    return findings


def _steering(read: FolderRead) -> list[Finding]:
    if read.steering is None:
        return []
    file = read.path_of(STEERING_FILE)
    questions, lines = read.steering.questions, read.question_lines
    findings = []
    if len(questions) < ENOUGH_QUESTIONS:
        findings.append(
            Finding(
                file,
                None,
                "warning" if len(questions) < FEW_QUESTIONS else "info",
                "few-questions",
                f"has {len(questions)} questions; half of them choose the dose, the other half prove it",
                "write 10 to 20",
            )
        )
    seen: dict[str, int] = {}
    for question, line in zip(questions, lines, strict=True):
        key = " ".join(words(question)) or question
        if key in seen:
            findings.append(
                Finding(
                    file,
                    line,
                    "warning",
                    "duplicate-question",
                    f"is the question of line {seen[key]} again",
                    "ask something else: a repeated question narrows the interval without telling more",
                )
            )
        seen.setdefault(key, line)
    order = list(seen)
    for i, j, similarity in similar_pairs([bigrams(q) for q in order], None, NEAR_DUPLICATE):
        findings.append(
            Finding(
                file,
                seen[order[j]],
                "warning",
                "near-duplicate-question",
                f"is nearly the question of line {seen[order[i]]} ({similarity:.0%} of the word pairs "
                f"are shared)",
                "ask something else",
            )
        )
    findings += _questions_against_scenarios(read, file, questions, lines)
    pattern = trait_name_pattern(read.label)
    instructing = [line for q, line in zip(questions, lines, strict=True) if instructs(q) is not None]
    naming = [
        line for q, line in zip(questions, lines, strict=True) if pattern is not None and pattern.search(q)
    ]
    findings += at_lines(
        file,
        instructing,
        "info",
        "question-instructs",
        "tells the model how to answer",
        "keep it only if steering shall work against it; a neutral question shows a smaller dose's effect",
    )
    findings += at_lines(
        file, naming, "info", "question-names-trait", "names the trait", "ask about something else", each=2
    )
    return findings


def _questions_against_scenarios(
    read: FolderRead, file: str, questions: Sequence[str], lines: Sequence[int]
) -> list[Finding]:
    where: dict[str, str] = {}
    for polarity in POLARITIES:
        for s in read.side(polarity):
            where.setdefault(" ".join(words(s.prompt)), f"{read.files[polarity]}:{s.line}")
    findings = []
    for question, line in zip(questions, lines, strict=True):
        source = where.get(" ".join(words(question)))
        if source is not None:
            findings.append(
                Finding(
                    file,
                    line,
                    "warning",
                    "question-in-scenarios",
                    f"is the scenario {source}, from which the vector is made",
                    "ask something that the vector has not seen",
                )
            )
    return findings


# ------------------------------------------------------------------------------------------------------- full


def full_findings(
    folder: Path,
    label: str,
    *,
    embed: Embed | None = None,
    count_tokens: CountTokens | None = None,
    context_tokens: int = CONTEXT_TOKENS,
) -> list[Finding]:
    """`fast_findings`, and what a classifier on words and (with `embed`) on sentence embeddings says."""
    read = read_folder(folder, label)
    findings = _fast(folder, read, count_tokens, context_tokens)
    if min(len(read.positives), len(read.negatives)) < 10:
        return findings
    if {s.prompt for s in read.positives} == {s.prompt for s in read.negatives}:
        return findings
    leak = word_leak([s.prompt for s in read.positives], [s.prompt for s in read.negatives])
    findings += _leak_findings(read, leak)
    if embed is not None:
        findings += _contamination(read, embed)
    return findings


@dataclass(frozen=True)
class WordLeak:
    """How well words alone tell the sides apart, on held-out lines.

    `auc`: logistic regression on the presence of all words; `auc_few`: on the five words that differ most in
    the training folds; `positive_words`, `negative_words`: the most telling ones, (word, share of positives,
    share of negatives).
    """

    auc: float
    auc_few: float
    positive_words: tuple[tuple[str, float, float], ...]
    negative_words: tuple[tuple[str, float, float], ...]


def groups_of(positives: Sequence[str], negatives: Sequence[str]) -> list[int]:
    """A group number per line, positives first: counterparts and near-duplicates share one, so that no fold
    is asked about a line whose twin it was taught."""
    n, m = len(positives), len(negatives)
    parent = list(range(n + m))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    if n == m:
        for i in range(n):
            parent[root(n + i)] = root(i)
    for i, j, _ in similar_pairs([bigrams(t) for t in (*positives, *negatives)], None, NEAR_DUPLICATE):
        parent[root(j)] = root(i)
    return [root(i) for i in range(n + m)]


def word_leak(positives: Sequence[str], negatives: Sequence[str], *, folds: int = 5) -> WordLeak:
    """Grouped cross-validation of two bag-of-words classifiers. At least 10 lines a side."""
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold

    texts = [*positives, *negatives]
    y = np.array([1] * len(positives) + [0] * len(negatives))
    groups = np.array(groups_of(positives, negatives))
    folds = min(folds, len(set(groups.tolist())))
    every, few = np.zeros(len(y)), np.zeros(len(y))
    for train, test in GroupKFold(folds).split(texts, y, groups):
        vectorizer = CountVectorizer(analyzer=words, binary=True)
        a = vectorizer.fit_transform([texts[i] for i in train]).tocsr()
        b = vectorizer.transform([texts[i] for i in test]).tocsr()
        labels = y[train]
        if len(set(labels.tolist())) < 2:
            continue
        every[test] = LogisticRegression(max_iter=1000).fit(a, labels).decision_function(b)
        gaps = np.abs(np.asarray(a[labels == 1].mean(axis=0) - a[labels == 0].mean(axis=0))).ravel()
        chosen = np.argsort(-gaps, kind="stable")[:LEAK_WORDS]
        few[test] = (
            LogisticRegression(max_iter=1000).fit(a[:, chosen], labels).decision_function(b[:, chosen])
        )
    p, q = document_frequencies(positives), document_frequencies(negatives)
    gap = {w: p[w] / len(positives) - q[w] / len(negatives) for w in {*p, *q}}

    def telling(sign: int) -> tuple[tuple[str, float, float], ...]:
        ranked = sorted((w for w in gap if gap[w] * sign > 0), key=lambda w: (-gap[w] * sign, w))[:5]
        return tuple((w, p[w] / len(positives), q[w] / len(negatives)) for w in ranked)

    return WordLeak(float(roc_auc_score(y, every)), float(roc_auc_score(y, few)), telling(1), telling(-1))


def _leak_findings(read: FolderRead, leak: WordLeak) -> list[Finding]:
    file = read.path_of(read.files["positive"])
    shown = ", ".join(
        f"{w} ({a:.0%} against {b:.0%})" for w, a, b in (*leak.positive_words[:4], *leak.negative_words[:4])
    )
    languages = different_languages([s.prompt for s in read.positives], [s.prompt for s in read.negatives])
    if leak.auc_few >= LEAK_AUC and languages is None:
        return [
            Finding(
                file,
                None,
                "warning",
                "vocabulary-leak",
                f"five words tell held-out lines apart with AUC {leak.auc_few:.2f}; positives against "
                f"negatives: {shown}",
                "spread the vocabulary: say the same in other words, and give these words to both sides",
            )
        ]
    if leak.auc >= 0.9:
        return [
            Finding(
                file,
                None,
                "info",
                "vocabulary",
                f"words alone tell held-out lines apart with AUC {leak.auc:.2f} (the best five with "
                f"{leak.auc_few:.2f}); "
                f"positives against negatives: {shown}",
                "nothing, if these words are the trait; otherwise give them to both sides",
            )
        ]
    return []


@dataclass(frozen=True)
class Contamination:
    """How each line sits between the two sides. `wrong`: per line, positives first, the log of how much
    likelier it is on the other side; `separation`: distance of the sides in standard deviations; `accuracy`:
    out of fold."""

    wrong: tuple[float, ...]
    separation: float
    accuracy: float


def contamination(
    positives: Sequence[str], negatives: Sequence[str], embed: Embed, *, folds: int = 5
) -> Contamination:
    """Out-of-fold logistic regression on sentence embeddings, its scores read as two bells of equal robust
    width."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    x = np.asarray(embed([*positives, *negatives]), dtype=np.float64)
    y = np.array([1] * len(positives) + [0] * len(negatives))
    groups = np.array(groups_of(positives, negatives))
    score = np.zeros(len(y))
    for train, test in GroupKFold(min(folds, len(set(groups.tolist())))).split(x, y, groups):
        if len(set(y[train].tolist())) == 2:
            fit = LogisticRegression(C=10.0, max_iter=2000).fit(x[train], y[train])
            score[test] = fit.decision_function(x[test])

    def width(values: np.ndarray) -> float:
        return float(1.4826 * np.median(np.abs(values - np.median(values)))) + 1e-6

    high, low = float(np.median(score[y == 1])), float(np.median(score[y == 0]))
    scale = float(np.sqrt((width(score[y == 1]) ** 2 + width(score[y == 0]) ** 2) / 2))
    separation = (high - low) / scale
    z = (score - (high + low) / 2) / scale
    wrong = np.where(y == 1, -1.0, 1.0) * z * separation
    return Contamination(tuple(float(w) for w in wrong), separation, float(np.mean((score > 0) == (y == 1))))


def _contamination(read: FolderRead, embed: Embed) -> list[Finding]:
    result = contamination([s.prompt for s in read.positives], [s.prompt for s in read.negatives], embed)
    if result.separation < SEEN:
        return [
            Finding(
                read.path_of(read.files["negative"]),
                None,
                "info",
                "contamination-unseen",
                f"sentence embeddings see this trait with {result.accuracy:.0%} accuracy only, too "
                f"little to accuse a line",
                "vet the scenarios with a judge instead",
            )
        ]
    findings = []
    n = len(read.positives)
    for polarity, offset in (("positive", 0), ("negative", n)):
        side: Sequence[Scenario] = read.positives if polarity == "positive" else read.negatives
        other = "negatives" if polarity == "positive" else "positives"
        for i, s in enumerate(side):
            wrong = result.wrong[offset + i]
            if wrong >= DOUBTFUL:
                findings.append(
                    Finding(
                        read.path_of(read.files[polarity]),
                        s.line,
                        "warning" if wrong >= CONTAMINATED else "info",
                        "contaminated",
                        f"reads like one of the {other} (log odds {wrong:.1f} by sentence embeddings)",
                        "read it: move it to the other side, mend it, or delete the pair",
                    )
                )
    return findings


def default_embed() -> Embed:
    """The offline sentence encoder. Raises `UserError` with the install command when it is missing."""
    from resources.judges.embedding import embed

    return embed


def definition_file(folder: Path) -> Path | None:
    for name in DEFINITION_FILES:
        if (folder / name).is_file():
            return folder / name
    return None


def median_words(texts: Sequence[str]) -> float:
    return float(median(len(words(t)) for t in texts)) if texts else 0.0
