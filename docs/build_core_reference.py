"""Writes docs/core_reference.md from the docstrings of the modules listed below; `--check` only says whether
it is current.

The sources are parsed, not imported: no torch is loaded, and a module that needs a GPU is documented like
any other.

    python docs/build_core_reference.py [--check]
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TARGET = REPOSITORY / "docs" / "core_reference.md"

CHAPTERS: dict[str, tuple[str, ...]] = {
    "From a notebook": (
        "trait_assets/api.py",
        "trait_assets/vectors/vector.py",
        "trait_assets/activations/dataset.py",
    ),
    "Scenarios": (
        "trait_assets/scenarios/dataset.py",
        "trait_assets/scenarios/findings.py",
        "trait_assets/scenarios/lint.py",
        "trait_assets/scenarios/scaffold.py",
        "trait_assets/scenarios/drafting.py",
        "trait_assets/scenarios/preview.py",
        "trait_assets/scenarios/vetting.py",
    ),
    "Language models": (
        "resources/models/rows.py",
        "resources/models/positions.py",
        "resources/models/layers.py",
        "resources/models/loading.py",
        "resources/models/language_model.py",
    ),
    "Vectors": (
        "trait_assets/vectors/methods.py",
        "trait_assets/vectors/exchange.py",
        "trait_assets/activations/split.py",
    ),
    "Evaluation": ("trait_assets/evaluation/metrics.py", "trait_assets/evaluation/null.py"),
    "Steering": ("trait_assets/steering/dose_search.py", "trait_assets/steering/scoring.py"),
    "Judges": ("resources/judges/protocol.py",),
    "Experiments and stages": ("trait_assets/experiments.py", "trait_assets/pipeline.py"),
    "Storage": (
        "storage/errors.py",
        "storage/artifacts.py",
        "storage/manifest.py",
        "storage/rows.py",
        "storage/tensors.py",
    ),
}

HEAD = """# Core reference

The functions and classes that the stages are built of, for notebooks and for whoever adds a stage. Generated
from the docstrings by `python docs/build_core_reference.py`; edit those, not this page.

"""


def reference() -> str:
    parts = [HEAD]
    for chapter, files in CHAPTERS.items():
        sections = [section(file) for file in files if (REPOSITORY / file).is_file()]
        if sections:
            parts.append(f"## {chapter}\n\n" + "\n".join(sections))
    return "\n".join(parts).rstrip() + "\n"


def section(file: str) -> str:
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    module = file.removesuffix(".py").replace("/", ".")
    lines = [f"### `{module}`\n"]
    if doc := ast.get_docstring(tree):
        lines.append(quoted(doc) + "\n")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and public(node):
            lines += entry("####", signature(node), node)
        elif isinstance(node, ast.ClassDef) and public(node):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            lines += entry("####", f"class {node.name}({bases})" if bases else f"class {node.name}", node)
            fields = [
                f"{item.target.id}: {ast.unparse(item.annotation)}"
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and not item.target.id.startswith("_")
            ]
            if fields:
                lines.append("Fields: " + ", ".join(f"`{field}`" for field in fields) + "\n")
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and public(item) and ast.get_docstring(item):
                    lines += entry("-", signature(item, method=True), item)
    return "\n".join(lines)


def public(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return not node.name.startswith("_")


def signature(node: ast.FunctionDef, *, method: bool = False) -> str:
    arguments = ast.unparse(node.args)
    if method:
        arguments = arguments.removeprefix("self").removeprefix("cls").removeprefix(", ")
    if any(isinstance(d, ast.Name) and d.id in ("property", "cached_property") for d in node.decorator_list):
        returns = f": {ast.unparse(node.returns)}" if node.returns else ""
        return f"{node.name}{returns}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({arguments}){returns}"


def entry(mark: str, heading: str, node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    doc = inspect.cleandoc(ast.get_docstring(node) or "")
    if mark == "-":
        return [f"- `{heading}`", "", *(f"  {line}".rstrip() for line in doc.split("\n")), ""]
    return [f"{mark} `{heading}`\n", f"{doc}\n" if doc else ""]


def quoted(doc: str) -> str:
    """A module's docstring as it is: layouts in it stay aligned."""
    return "\n".join(line.rstrip() for line in inspect.cleandoc(doc).split("\n"))


def main() -> int:
    text = reference()
    if "--check" in sys.argv[1:]:
        current = TARGET.read_text(encoding="utf-8") if TARGET.is_file() else ""
        if current != text:
            print(f"{TARGET} is out of date: run python docs/build_core_reference.py", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
