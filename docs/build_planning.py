"""Writes the tables of docs/planning.md from the code that `traits plan` runs; `--check` only says whether they
are current.

    python docs/build_planning.py [--check]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TARGET = REPOSITORY / "docs" / "planning.md"
sys.path.insert(0, str(REPOSITORY))


def built(text: str) -> str:
    """The page with each marked part made anew."""
    from trait_assets.planning.worked_example import section

    for size in ("8b", "70b"):
        begin, end = f"<!-- worked example {size} -->", f"<!-- end {size} -->"
        pattern = re.compile(rf"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{TARGET} has no {begin}")
        made = f"{begin}\n{section(size)}\n{end}"
        text = pattern.sub(lambda _, made=made: made, text)  # type: ignore[misc]
    return text


def main() -> None:
    text = TARGET.read_text(encoding="utf-8")
    new = built(text)
    if "--check" in sys.argv[1:]:
        if new != text:
            raise SystemExit("docs/planning.md is out of date: python docs/build_planning.py")
        return
    TARGET.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
