"""The HTML report: a document of `contents` in, the bytes of one self-contained page out.

Belongs here: markup, safe embedding, formatting of numbers. Does not: reading artifacts, choosing what is said. The charts are
drawn in the reader's browser by report.js with plotly.js, which is inlined; the page fetches nothing.

Texts of models are untrusted. Markup is autoescaped, data for the script is JSON without any character that HTML could read as
markup, the script only ever sets text, and the page's content security policy allows its own two scripts by hash and no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent
MISSING = "–"
# what report.js draws; everything else stands in the markup
_DRAWN = ("heat", "null", "projections", "histograms", "dose", "samples")


def render(content: Mapping[str, Any]) -> bytes:
    """UTF-8 HTML. What has no UTF-8 form (half a surrogate pair) becomes a replacement character in the browser."""
    plotly, script = _plotly(), (HERE / "report.js").read_text(encoding="utf-8")
    html = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            content=content,
            style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
            plotly=Markup(plotly),
            script=Markup(script),
            script_hashes=Markup(f"{_hash(plotly)} {_hash(script)}"),
            data=embedded(_data(content)),
        )
    )
    return html.encode("utf-8", "xmlcharrefreplace")


def embedded(value: Any) -> Markup:
    """JSON that may stand inside a <script> element whatever texts it holds: ASCII, and no `<`, `>` or `&`.

    ValueError for NaN and infinities.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        # these occur inside strings only, where the escape means the same
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _data(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "traits": {
            trait["anchor"]: {name: trait[name] for name in _DRAWN}
            for trait in content["traits"]
            if trait["detailed"]
        },
        "across": content["across"],
    }


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "percent": percent,
        "interval": interval,
        "when": when,
        "pretty": pretty,
        "short": lambda text: str(text)[:8],
        "words": lambda text: str(text).replace("_", " "),
    }
    return environment


def number(value: Any, digits: int = 2) -> str:
    """A number with so many decimals; `–` for none. Texts pass through."""
    if value is None:
        return MISSING
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.{digits}f}" if math.isfinite(value) else MISSING
    return str(value)


def signed(value: Any, digits: int = 1) -> str:
    return MISSING if value is None else f"{value:+.{digits}f}".replace("-", "−")


def percent(value: Any) -> str:
    return MISSING if value is None else f"{100 * value:.0f} %"


def interval(low: Any, high: Any, form: str = "number", digits: int = 2) -> str:
    """`[low, high]`, empty where an end is missing."""
    if low is None or high is None:
        return ""
    show = {"number": number, "signed": signed}.get(form)
    ends = (
        (f"{100 * end:.0f}" for end in (low, high))
        if show is None
        else (show(e, digits) for e in (low, high))
    )
    return f"[{', '.join(ends)}]"


def when(text: Any) -> str:
    """`2026-11-25T04:39:56.812+00:00` as `2026-11-25 04:39 UTC`."""
    if not text:
        return MISSING
    date, _, time = str(text).partition("T")
    zone = "UTC" if time.endswith(("+00:00", "Z")) else ""
    return f"{date} {time[:5]} {zone}".strip()


def pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True)
