"""Plain results of this package as something Rich can print.

Belongs here: trees, tables, wording of states. Does not: finding the facts, writing to a terminal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from storage.text import printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.tree import Tree

    from storage.index import QueryResult
    from storage.lineage import Node

_COLOURS = {
    "current": "green",
    "recorded": "default",
    "outdated": "yellow",
    "replaced": "yellow",
    "damaged": "red",
    "missing": "red",
}
_LONG = 160


def tree(node: Node) -> Tree:
    """A lineage tree; facts stand under their node, whatever is not current says why."""
    from rich.tree import Tree

    root = Tree(_label(node))
    _grow(root, node, set())
    return root


def _label(node: Node) -> Any:
    from rich.text import Text

    label = Text(_short(node.title), style="bold" if node.kind in ("number", "result") else "")
    if node.state != "recorded":
        label.append(f"  [{node.state}]", style=_COLOURS[node.state])
    if node.why:
        label.append(f" {printable(node.why)}", style=_COLOURS[node.state])
    return label


def _grow(branch: Tree, node: Node, seen: set[int]) -> None:
    from rich.text import Text

    if node.children and id(node) in seen:
        branch.add(Text("see above", style="dim"))
        return
    seen.add(id(node))
    for name, value in node.facts.items():
        if value not in (None, "", {}, []):
            branch.add(Text(f"{name}: {_short(_plain(value))}", style="dim"))
    for child in node.children:
        _grow(branch.add(_label(child)), child, seen)


def _plain(value: Any) -> str:
    if isinstance(value, float | Decimal):
        return f"{value:.6g}"
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _short(text: str) -> str:
    line = " ".join(printable(text).split())
    return line if len(line) <= _LONG else f"{line[: _LONG - 1]}…"


def table(result: QueryResult, *, title: str | None = None) -> Table:
    """A query's answer; empty cells are empty."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title)
    for name in result.columns:
        numeric = any(
            isinstance(row[result.columns.index(name)], int | float | Decimal) for row in result.rows[:50]
        )
        shown.add_column(Text(printable(name)), justify="right" if numeric else "left", overflow="fold")
    for row in result.rows:
        shown.add_row(*(Text("" if value is None else printable(_plain(value))) for value in row))
    return shown
