"""Half a surrogate pair has no UTF-8 form. Whatever way it comes in, nothing fails over it later."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import keys, show
from storage.lineage import Target, lineage
from storage.manifest import fingerprint
from storage.metrics import metrics_key
from storage.text import printable, well_formed, well_formed_tree
from storage.workspace import Workspace

HALF = "half \ud83d"
MENDED = "half \ufffd"
SPLIT = "\ud83d\ude00"  # both halves, as two characters
ROOT = Path(__file__).parents[2]
any_text = st.text(st.characters(codec=None, exclude_categories=()), max_size=30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("plain ü 😀 \x00", "plain ü 😀 \x00"),
        (HALF, MENDED),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        (SPLIT, "😀"),
        (f"a{SPLIT}b\ud800c", "a😀b\ufffdc"),
    ],
)
def test_halves_are_joined_or_replaced(text: str, expected: str) -> None:
    assert well_formed(text) == expected


@settings(deadline=None)
@given(any_text)
def test_what_comes_out_has_a_utf8_form_and_good_text_stays(text: str) -> None:
    mended = well_formed(text)
    mended.encode("utf-8")
    assert well_formed(mended) == mended
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return
    assert mended == text


def test_trees_are_mended_throughout() -> None:
    tree = {"a": [HALF, {"b": (HALF, 1, None, True, 0.5)}], HALF: SPLIT}
    assert well_formed_tree(tree) == {"a": [MENDED, {"b": [MENDED, 1, None, True, 0.5]}], MENDED: "😀"}


def test_a_terminal_is_shown_and_not_told() -> None:
    assert printable("a\x1b[2J\x9b31m\x07 ü\t" + HALF) == "a\\x1b[2J\\x9b31m\\x07 ü\t" + MENDED


ROWS: list[dict[str, Any]] = [
    {"table": "responses", "question": HALF, "answer": SPLIT, "finish_reason": "stop"},
    {"table": "judge_scores", "abstained": HALF, "judge": HALF},
    {"table": "generations", "response": HALF, "a_list": [HALF], "a_tree": {"b": HALF, HALF: 1}},
    {"name": HALF, "value": 1.0, "unknown_column": HALF},
    {"name": "mixed", "value": 2.0, "unknown_column": 3},
    {"name": "nul", "value": 3.0, "unknown_column": "a\x00b\x1b"},
]


def test_a_result_full_of_broken_text_is_committed_and_indexed(
    any_workspace: Workspace, make_manifest
) -> None:
    w = any_workspace
    manifest = make_manifest(
        run_id=f"run {HALF}",
        summary={"note": HALF, "notes": [HALF], HALF: 1, "pair": SPLIT},
        options={"system_prompt": HALF, "judge": {"kind": HALF}, "model": {"model": HALF, "revision": "1"}},
        inputs={f"an input {HALF}": fingerprint(HALF)},
        tables={"examples": [{"prompt": HALF}]},
        libraries={"torch": HALF},
    )
    assert w.commit(manifest, ROWS) == "indexed"
    # the manifest keeps what it was given, as an escape
    read = w.manifests.read("demo", "vectors", "tonal/dry")
    assert read is not None
    assert (read.options, read.inputs, read.tables) == (manifest.options, manifest.inputs, manifest.tables)
    sql = w.index.sql
    assert sql("SELECT question, answer FROM current_responses").rows == [(MENDED, "😀")]
    assert sql("SELECT abstained, judge FROM judge_scores").rows == [(MENDED, MENDED)]
    assert sql("SELECT response, extra ->> '$.a_list' FROM generations").rows == [(MENDED, f'["{MENDED}"]')]
    assert sql("SELECT name, extra ->> '$.unknown_column' FROM metrics ORDER BY value").rows == [
        (MENDED, MENDED),
        ("mixed", "3"),
        ("nul", "a\x00b\x1b"),
    ]
    assert sql("SELECT summary ->> '$.note', summary ->> '$.pair', run_id FROM current_manifests").rows == [
        (MENDED, "😀", f"run {MENDED}")
    ]
    assert sql("SELECT input FROM inputs").rows == [(f"an input {MENDED}",)]
    assert sql("SELECT model FROM models").rows == [(MENDED,)]
    # a question that holds one is asked all the same
    assert sql(f"SELECT count(*) FROM metrics WHERE name = '{HALF}'").rows == [(1,)]
    assert sql("SELECT ?", [HALF]).rows == [(MENDED,)]
    before = sql("SELECT * EXCLUDE (source) FROM metrics ORDER BY value").rows
    w.index.rebuild()
    assert sql("SELECT * EXCLUDE (source) FROM metrics ORDER BY value").rows == before


@settings(deadline=None)  # the first call imports pyarrow
@given(any_text)
def test_any_text_goes_into_parquet_and_back(text: str) -> None:
    import pyarrow.parquet as pq

    from storage.metrics import encode_rows

    data = encode_rows([{"answer": text, "tree": {"a": [text]}}, {"tree": text}], {"run_id": text})
    table = pq.read_table(io.BytesIO(data))
    assert table["answer"].to_pylist() == [well_formed(text), None]
    assert json.loads(table["tree"].to_pylist()[0]) == {"a": [well_formed(text)]}
    assert table["run_id"].to_pylist() == [well_formed(text)] * 2


def test_rows_and_journals_take_it(workspace: Workspace) -> None:
    cache = workspace.row_cache("judge", "tonal/dry")
    cache.put_many({"k": {"reason": HALF}})
    assert workspace.row_cache("judge", "tonal/dry").get("k") == {"reason": HALF}
    journal = workspace.row_journal("demo", "responses", "tonal/dry")
    journal.put_many({"k": {"answer": HALF}})
    assert workspace.row_journal("demo", "responses", "tonal/dry").get("k") == {"answer": HALF}


def test_a_tree_with_broken_text_is_printed_to_any_terminal(workspace: Workspace, make_manifest) -> None:
    from rich.console import Console

    workspace.commit(make_manifest(options={"system_prompt": f"{HALF} \x1b[31mred"}), [])
    node = lineage(workspace, Target("demo", "vectors", "tonal/dry"))
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding="utf-8")
    Console(file=terminal, width=200).print(show.tree(node))
    result = workspace.index.sql("SELECT ?, chr(27) || '[31m' AS x", [HALF])
    Console(file=terminal, width=200).print(show.table(result))
    terminal.flush()
    assert b"\x1b" not in raw.getvalue()
    assert MENDED.encode() in raw.getvalue()


def test_the_command_line_answers_in_valid_json(workspace: Workspace, make_manifest) -> None:
    """`lineage --json` prints the manifest's own text; an escape in JSON is what it was given as."""
    workspace.commit(make_manifest(options={"system_prompt": HALF}), [])
    root = str(workspace.store.root)
    for arguments in (
        ["lineage", "demo/tonal/dry", "--json"],
        ["lineage", "demo/tonal/dry"],
        ["sql", "SELECT options ->> '$.system_prompt' AS x FROM manifests", "--json"],
        ["lineage", "demo/tonal/dry/\udcff"],
    ):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "trait_assets.cli", *arguments],
            capture_output=True,
            cwd=ROOT,
            check=False,
            env={
                **os.environ,
                "TRAITS_EXPERIMENTS": root,
                "TRAITS_STATE": str(workspace.index.path.parent),
                "PYTHONIOENCODING": "utf-8",
            },
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        assert done.returncode == (2 if "\udcff" in arguments[-1] else 0), done.stderr.decode()
        if arguments[-1] == "--json":
            document = json.loads(done.stdout)
            assert HALF in json.dumps(document, ensure_ascii=False) or MENDED in json.dumps(
                document, ensure_ascii=False
            )


def test_the_key_of_the_rows_is_found_for_any_run(workspace: Workspace, make_manifest) -> None:
    workspace.commit(make_manifest(run_id=HALF), [{"name": "a", "value": 1}])
    manifest = workspace.manifests.read("demo", "vectors", "tonal/dry")
    assert manifest is not None
    key = metrics_key("demo", "vectors", "tonal/dry", manifest.fingerprint, manifest.run_id)
    assert workspace.store.exists(key)
    assert key.startswith(keys.metrics("demo", "vectors", "tonal/dry"))
