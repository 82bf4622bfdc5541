"""Reading trait folders: what is accepted, what is refused and how it is said, what a subset and a hash
are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import UserError
from trait_assets.scenarios.dataset import (
    KNOWN_FILES,
    ScenarioSet,
    SteeringFile,
    discover,
    load_trait,
    read_folder,
    trait_hash,
)


def test_lines_end_at_line_feeds_and_nowhere_else(tmp_path: Path, corpus: ModuleType) -> None:
    odd = ['she said, "go', "a\u2028b c d", "one\x0ctwo three", 'a "b", c, "d', "Ünï—cödé 😂 line"]
    corpus.write_trait(tmp_path, "a/b", odd, odd)
    loaded = load_trait(tmp_path, "a/b", require_steering=True)
    assert [s.prompt for s in loaded.positives] == odd
    assert [s.line for s in loaded.positives] == [1, 2, 3, 4, 5]


def test_blank_lines_are_skipped_and_lines_keep_their_numbers(tmp_path: Path, corpus: ModuleType) -> None:
    corpus.write_trait(
        tmp_path, "a/b", ["one line here", "", "  ", "another line here  "], ["x y z", "u v w"]
    )
    loaded = load_trait(tmp_path, "a/b", require_steering=True)
    assert [(s.prompt, s.line) for s in loaded.positives] == [("one line here", 1), ("another line here", 4)]
    assert loaded.paired
    assert {(f["code"], f["line"]) for f in loaded.findings} == {
        ("blank-line", 2),
        ("blank-line", 3),
        ("surrounding-space", 4),
    }


def test_bom_and_crlf_are_normalised_and_said(tmp_path: Path, corpus: ModuleType) -> None:
    folder = corpus.write_trait(tmp_path, "a/b", ["x"], ["one thing\r", "another thing\r"])
    (folder / "positive.txt").write_bytes(b"\xef\xbb\xbfone thing\r\nanother thing\r\n")
    loaded = load_trait(tmp_path, "a/b", require_steering=True)
    assert [s.prompt for s in loaded.positives] == ["one thing", "another thing"]
    assert [s.prompt for s in loaded.negatives] == ["one thing", "another thing"]
    assert {(f["file"], f["code"]) for f in loaded.findings} == {
        ("a/b/positive.txt", "bom"),
        ("a/b/positive.txt", "crlf"),
        ("a/b/negative.txt", "crlf"),
    }


def test_jsonl_keeps_system_prompts_and_inner_line_breaks(tmp_path: Path, corpus: ModuleType) -> None:
    folder = corpus.write_trait(tmp_path, "a/b", ["x"], ["y"])
    for side in ("positive", "negative"):
        (folder / f"{side}.txt").unlink()
        rows = [{"prompt": "Two\nlines", "system_prompt": f"Be {side}.", "note": "mine"}, {"prompt": "plain"}]
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    loaded = load_trait(tmp_path, "a/b", require_steering=True)
    assert loaded.positives[0].prompt == "Two\nlines"
    assert loaded.positives[0].system_prompt == "Be positive."
    assert loaded.negatives[1].system_prompt is None
    assert [f["code"] for f in loaded.findings] == ["unknown-key", "unknown-key"]


def test_steering_questions_may_be_objects(tmp_path: Path, corpus: ModuleType) -> None:
    steering = {
        "questions": [{"question": "What now?", "high_trait": "…"}, "And then?"],
        "direction": "negative",
        "eval_prompt": 'Question {question}, answer {answer}. Reply as {"score": 5}.',
    }
    corpus.write_trait(tmp_path, "a/b", ["x y z"], ["u v w"], steering=steering)
    loaded = load_trait(tmp_path, "a/b", require_steering=True)
    assert loaded.steering == SteeringFile(("What now?", "And then?"), "negative", steering["eval_prompt"])


def test_the_other_name_of_the_definition_is_accepted(tmp_path: Path, corpus: ModuleType) -> None:
    folder = corpus.write_trait(tmp_path, "a/b", ["x y z"], ["u v w"])
    (folder / "definition.txt").rename(folder / "trait_definition.txt")
    assert load_trait(tmp_path, "a/b", require_steering=True).definition.startswith("Score only")


# fault → (files to write or, with None, to delete; what the message says)
BAD: dict[str, tuple[dict[str, bytes | None], str]] = {
    "missing side": ({"negative.txt": None}, "has no negative.txt"),
    "empty side": ({"positive.txt": b" \n\n"}, "positive.txt: is empty"),
    "not utf-8": (
        {"positive.txt": b"good line\nbad \xe9 line\n"},
        "positive.txt:2: is not UTF-8: byte 0xe9 at offset 14",
    ),
    "utf-16": ({"positive.txt": "good line\n".encode("utf-16")}, "positive.txt:1: is UTF-16"),
    "nul": ({"negative.txt": b"a\x00b\n"}, "negative.txt:1: holds 1 NUL"),
    "old mac": ({"negative.txt": b"one line\rtwo lines\r"}, "no line feed"),
    "no definition": ({"definition.txt": None}, "has no definition.txt"),
    "empty definition": ({"definition.txt": b"\n"}, "definition.txt: is empty"),
    "steering syntax": ({"steering.json": b'{\n  "questions": [\n}'}, "steering.json:3: is not JSON"),
    "steering list": ({"steering.json": b'["a"]'}, "not an object"),
    "no questions": ({"steering.json": b'{"questions": []}'}, "empty list of questions"),
    "question type": ({"steering.json": b'{"questions": [\n"a?",\n3]}'}, "steering.json:3: question 2 is 3"),
    "repeated key": (
        {"steering.json": b'{"questions": ["a?"],\n"questions": ["b?"]}'},
        "steering.json:2: names the key",
    ),
    "direction": (
        {"steering.json": b'{"questions": ["a?"],\n"direction": "up"}'},
        "steering.json:2: has the direction 'up'",
    ),
    "eval prompt": (
        {"steering.json": b'{"questions": ["a?"], "eval_prompt": "{reply}"}'},
        "unknown placeholder {reply}",
    ),
    "scaffold": ({"positive.txt": b"<<a situation>> and so\n"}, "scaffold"),
    "jsonl row": (
        {"positive.txt": None, "positive.jsonl": b'{"prompt": "a b"}\n{"prompt": 1}\n'},
        "positive.jsonl:2: has no text",
    ),
    "jsonl syntax": (
        {"positive.txt": None, "positive.jsonl": b'{"prompt": "a b"\n'},
        "positive.jsonl:1: is not JSON",
    ),
    "half a surrogate": (
        {"positive.txt": None, "positive.jsonl": b'{"prompt": "a \\ud800 b"}\n'},
        "surrogate",
    ),
    "half a surrogate in a question": (
        {"steering.json": b'{"questions": ["a \\ud800?"]}'},
        "surrogate",
    ),
    "half a surrogate in the judge's prompt": (
        {"steering.json": b'{"questions": ["a?"], "eval_prompt": "{answer} \\ud800"}'},
        "surrogate",
    ),
    "both formats": ({"positive.jsonl": b'{"prompt": "a b"}\n'}, "only one of them can count"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_refused_by_file_and_line_with_a_remedy(
    fault: str, tmp_path: Path, corpus: ModuleType
) -> None:
    folder = corpus.write_trait(tmp_path, "a/b", ["x y z"], ["u v w"])
    files, expected = BAD[fault]
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_trait(tmp_path, "a/b", require_steering=True)
    assert expected in str(caught.value)
    assert caught.value.remedy
    assert str(tmp_path) in str(caught.value.where)


def test_steering_is_required_only_where_asked_for(tmp_path: Path, corpus: ModuleType) -> None:
    folder = corpus.write_trait(tmp_path, "a/b", ["x y z"], ["u v w"])
    (folder / "steering.json").unlink()
    assert load_trait(tmp_path, "a/b", require_steering=False).steering is None
    with pytest.raises(UserError, match=r"no steering\.json"):
        load_trait(tmp_path, "a/b", require_steering=True)


def test_an_unknown_trait_is_answered_with_the_nearest(tmp_path: Path, corpus: ModuleType) -> None:
    corpus.write_trait(tmp_path, "emotion/anger", ["x y z"], ["u v w"])
    for asked in ("emotion/angre", "emotions/anger"):
        with pytest.raises(UserError, match="did you mean `emotion/anger`"):
            load_trait(tmp_path, asked, require_steering=False)
    with pytest.raises(UserError, match="not a trait name"):
        load_trait(tmp_path, "../etc/passwd", require_steering=False)


def test_a_set_survives_its_json(tmp_path: Path, corpus: ModuleType) -> None:
    corpus.clean_trait(tmp_path, "a/b", 1, n=20)
    loaded = load_trait(tmp_path, "a/b", require_steering=True)
    assert ScenarioSet.from_json(json.loads(json.dumps(loaded.to_json()))) == loaded
    with pytest.raises(UserError, match="scenario set"):
        ScenarioSet.from_json({"trait": "a/b"})


def test_a_subset_keeps_pairs_order_and_grows_by_addition(tmp_path: Path, corpus: ModuleType) -> None:
    corpus.clean_trait(tmp_path, "a/b", 1, n=50)
    loaded = load_trait(tmp_path, "a/b", require_steering=True)
    ten, twenty, other = loaded.subset(10, 0), loaded.subset(20, 0), loaded.subset(10, 1)
    lines = [s.line for s in ten.positives]
    assert lines == [s.line for s in ten.negatives] == sorted(lines)
    assert set(lines) < {s.line for s in twenty.positives}
    assert lines != [s.line for s in other.positives]
    assert ten == loaded.subset(10, 0)
    assert ten.positives[0] == loaded.positives[lines[0] - 1]
    assert loaded.subset(50, 0) is loaded
    assert loaded.subset(None, 0) is loaded


def test_sides_of_different_length_are_drawn_by_themselves(tmp_path: Path, corpus: ModuleType) -> None:
    pairs = corpus.clean_pairs(40, 1)
    corpus.write_trait(tmp_path, "a/b", [p for p, _ in pairs], [q for _, q in pairs][:15])
    loaded = load_trait(tmp_path, "a/b", require_steering=True)
    assert not loaded.paired
    part = loaded.subset(20, 0)
    assert (len(part.positives), len(part.negatives)) == (20, 15)


def test_the_hash_follows_names_and_bytes_of_known_files_only(tmp_path: Path, corpus: ModuleType) -> None:
    folder = corpus.clean_trait(tmp_path, "a/b", 1, n=5)
    before = trait_hash(tmp_path, "a/b")
    (folder / "README.md").write_text("notes", encoding="utf-8")
    os.utime(folder / "positive.txt", (1, 1))
    assert trait_hash(tmp_path, "a/b") == before
    (folder / "definition.txt").rename(folder / "trait_definition.txt")
    renamed = trait_hash(tmp_path, "a/b")
    with (folder / "negative.txt").open("a", encoding="utf-8") as file:
        file.write("one more line here\n")
    assert len({before, renamed, trait_hash(tmp_path, "a/b")}) == 3
    with pytest.raises(UserError, match="there is no trait"):
        trait_hash(tmp_path, "a/c")


def test_discovery_tells_traits_problems_and_strangers_apart(tmp_path: Path, corpus: ModuleType) -> None:
    for good in ("a/one", "b/two-3"):
        corpus.clean_trait(tmp_path, good, 1, n=3)
    corpus.clean_trait(tmp_path, "a/Big", 1, n=3)
    corpus.clean_trait(tmp_path, "a/deep/er", 1, n=3)
    half = corpus.clean_trait(tmp_path, "a/half", 1, n=3)
    (half / "negative.txt").unlink()
    empty = corpus.clean_trait(tmp_path, "a/empty", 1, n=3)
    (empty / "positive.txt").write_bytes(b"")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "definition.txt").write_text("stray", encoding="utf-8")
    (tmp_path / "a" / "named").mkdir()
    (tmp_path / "a" / "named" / "positives.csv").write_text("x", encoding="utf-8")
    (tmp_path / "a" / "pictures").mkdir()
    (tmp_path / "a" / "pictures" / "plot.png").write_bytes(b"png")
    (tmp_path / ".git" / "x").mkdir(parents=True)
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    found = discover(tmp_path)
    assert found.traits == ["a/one", "b/two-3"]
    assert set(found.problems) >= {"a/Big", "a/deep/er", "a/half", "a/empty", "c", "a/named"}
    assert "a/pictures" not in found.problems
    assert "two levels" in found.problems["c"]
    assert discover(tmp_path / "nowhere").traits == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(st.sampled_from(KNOWN_FILES), st.binary(max_size=60), max_size=5))
def test_no_bytes_whatsoever_crash_the_reader(
    files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("bytes")
    folder = root / "a" / "b"
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    read_folder(folder, "a/b")
    discover(root)
    try:
        loaded = load_trait(root, "a/b", require_steering=False)
    except UserError:
        return
    assert loaded.positives
    assert loaded.negatives
    json.dumps(loaded.to_json()).encode("utf-8")
