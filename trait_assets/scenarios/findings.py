"""What a reader of trait files has to say about them: one finding per fault, with file, line and remedy.

Belongs here: the shape of a finding and how findings are ordered, counted and printed. Does not: the rules
that make them (`dataset.py` for what stops a file from being read, `lint.py` for everything else).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One thing to look at.

    `file`: path below the dataset root, with `/`; `line`: 1-based, None when the whole file is meant;
    `severity`: error (the trait cannot be read, or its labels are wrong), warning (the vector will pick up
    something else than the trait), info (worth knowing, nothing to mend by itself); `code`: a stable slug;
    `message`: what was seen, with numbers; `remedy`: one imperative sentence.
    """

    file: str
    line: int | None
    severity: Severity
    code: str
    message: str
    remedy: str

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def where(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def __str__(self) -> str:
        return f"{self.where}: {self.severity} [{self.code}] {self.message} — {self.remedy}"


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sorted by file, line, severity, code; exact repetitions left out."""
    unique = dict.fromkeys(findings)
    return tuple(
        sorted(unique, key=lambda f: (f.file, f.line or 0, SEVERITIES.index(f.severity), f.code, f.message))
    )


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """How many of each severity, zeros included."""
    seen = Counter(f.severity for f in findings)
    return {severity: seen.get(severity, 0) for severity in SEVERITIES}


def at_lines(
    file: str,
    lines: Sequence[int],
    severity: Severity,
    code: str,
    message: str,
    remedy: str,
    *,
    each: int = 5,
) -> list[Finding]:
    """One finding per line while there are few; beyond `each`, one at the first line that lists them all.

    A file with 150 lines of the same fault has one fault, and should read like it.
    """
    if len(lines) <= each:
        return [Finding(file, line, severity, code, message, remedy) for line in lines]
    shown = ", ".join(map(str, lines[:20])) + (f" … {lines[-1]}" if len(lines) > 20 else "")
    return [Finding(file, lines[0], severity, code, f"{len(lines)} lines: {message} (lines {shown})", remedy)]
