"""The tree of what a result was made from, and forgetting a trait."""

from __future__ import annotations

import io
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from storage import keys, show
from storage.errors import UserError
from storage.forget import forget
from storage.lineage import Node, Now, Target, find, lineage
from storage.manifest import Manifest, fingerprint
from storage.workspace import Workspace

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
MODEL = {"model": "tiny/model", "revision": "abc123", "dtype": "float32"}
JUDGE = {"kind": "openai", "model": "gpt-4.1-mini", "rubrics": {"response": "r/2"}}


class Story:
    """A small experiment that grows: commits results in the order of the pipeline."""

    def __init__(self, workspace: Workspace, experiment: str = "demo", trait: str = "tonal/dry") -> None:
        self.workspace, self.experiment, self.trait = workspace, experiment, trait
        self.minute = 0

    def commit(self, stage: str, inputs: dict, files: dict, *, shared=False, rows=(), options=None) -> str:
        self.minute += 1
        store = self.workspace.store
        records = {
            key: store.write_bytes(key, value) if isinstance(value, bytes) else store.write_json(key, value)
            for key, value in files.items()
        }
        mark = fingerprint([stage, self.trait, inputs, options or {}])
        manifest = Manifest(
            stage=stage,
            experiment=None if shared else self.experiment,
            trait=self.trait,
            fingerprint=mark,
            status="done",
            code_version="1",
            run_id=f"run-{self.minute}",
            created_at=(START + timedelta(minutes=self.minute)).isoformat(),
            inputs=inputs,
            options=options or {},
            files=records,
            libraries={"torch": "2.13"},
        )
        self.workspace.commit(manifest, rows)
        return mark

    def scenarios(self, first: str = "line one") -> str:
        content = {
            "positives": [{"line": i + 1, "prompt": first if i == 0 else f"pos {i}"} for i in range(5)],
            "negatives": [{"line": i + 1, "prompt": f"neg {i}"} for i in range(2)],
        }
        return self.commit(
            "scenarios",
            {"files": fingerprint(first)},
            {keys.scenario_set(self.trait): content},
            shared=True,
        )

    def vectors(self, scenarios: str) -> str:
        e, t = self.experiment, self.trait
        responses = self.commit(
            "responses",
            {"scenarios": scenarios},
            {keys.extraction(e, t, "responses", "pos.json"): [1]},
            options={"model": MODEL, "temperature": 0.0},
        )
        vetted = self.commit(
            "vetted_responses", {"responses": responses, "scenarios": scenarios}, {}, options={"judge": JUDGE}
        )
        return self.commit(
            "vectors",
            {"responses": responses, "vetted_responses": vetted},
            {keys.extraction(e, t, "vectors", "response_all", "residual", "probe", "v.bin"): b"v" * 100},
            rows=[
                {"name": "norm", "value": 2.5, "layer": 3, "method": "probe"},
                {"name": "norm", "value": 9.9, "layer": 4, "method": "probe"},
                {"table": "vectors", "layer": 3, "method": "probe", "norm": 2.5},
            ],
        )


@pytest.fixture
def story(workspace: Workspace) -> Story:
    told = Story(workspace)
    told.vectors(told.scenarios())
    return told


def titles(node: Node) -> list[str]:
    return [below.title for below in node.walk()]


def test_the_tree_reaches_the_scenario_lines_the_model_and_the_judge(story: Story) -> None:
    node = lineage(story.workspace, Target("demo", "vectors", "tonal/dry"))
    assert node.title == "vectors of tonal/dry in demo"
    assert node.state == "current"
    found = titles(node)
    for expected in (
        "responses of tonal/dry in demo",
        "scenarios of tonal/dry",
        "model tiny/model @ abc123",
        "judge gpt-4.1-mini",
        "positive, line 1: line one",
        "… and 2 more positive",
        "negative, line 2: neg 1",
        "files of the folder tonal/dry",
    ):
        assert expected in found, expected
    judge = next(below for below in node.walk() if below.kind == "judge")
    assert judge.facts["rubrics"] == {"response": "r/2"}
    options = [below.facts for below in node.walk() if below.kind == "options"]
    assert {"temperature": 0.0} in options
    facts = node.facts
    assert (facts["run"], facts["code version"], facts["libraries"]) == ("run-4", "1", "torch 2.13")
    every_line = lineage(story.workspace, Target("demo", "vectors", "tonal/dry"), lines=None)
    assert "positive, line 5: pos 4" in titles(every_line)
    json.dumps(node.record(), allow_nan=False)


def test_a_number_is_shown_with_what_made_it(story: Story) -> None:
    target = find(story.workspace, "demo/tonal/dry", stage="vectors", layer=3, method="probe")
    node = lineage(story.workspace, target)
    assert node.kind == "number"
    assert node.title == "layer 3, method probe of tonal/dry (2 rows)"
    assert node.facts["norm"] == 2.5
    assert node.children[0].title == "vectors of tonal/dry in demo"
    with pytest.raises(UserError, match="layer 77"):
        lineage(story.workspace, find(story.workspace, "demo/tonal/dry", stage="vectors", layer=77))


@pytest.mark.parametrize(
    ("change", "where", "state"),
    [
        ("edited folder", "files of the folder tonal/dry", "outdated"),
        ("deleted folder", "files of the folder tonal/dry", "missing"),
        ("new scenarios", "scenarios of tonal/dry", "replaced"),
        ("new code", "responses of tonal/dry in demo", "outdated"),
        ("flipped byte", "responses of tonal/dry in demo", "damaged"),
        ("lost file", "responses of tonal/dry in demo", "damaged"),
        ("taken back", "vetted_responses of tonal/dry in demo", "missing"),
    ],
)
def test_whatever_changes_below_makes_the_top_outdated(
    story: Story, change: str, where: str, state: str
) -> None:
    w = story.workspace
    hashes = {"tonal/dry": fingerprint("line one")}
    versions = {"responses": "1"}
    file = keys.extraction("demo", "tonal/dry", "responses", "pos.json")
    if change == "edited folder":
        hashes["tonal/dry"] = fingerprint("another first line")
    elif change == "deleted folder":
        hashes.clear()
    elif change == "new scenarios":
        story.scenarios("another first line")
    elif change == "new code":
        versions["responses"] = "2"
    elif change == "flipped byte":
        data = w.store.read_bytes(file)
        w.store.write_bytes(file, data.replace(b"1", b"2"))
    elif change == "lost file":
        w.store.delete(file)
    elif change == "taken back":
        w.manifests.delete("demo", "vetted_responses", "tonal/dry")
    now = Now(source_hash=hashes.get, code_versions=versions)
    node = lineage(w, Target("demo", "vectors", "tonal/dry"), now=now)
    by_title = {below.title: below for below in node.walk()}
    assert by_title[where].state == state
    assert by_title[where].why
    assert node.state == "outdated"
    assert node.why


def test_an_older_result_is_found_and_called_replaced(story: Story) -> None:
    w = story.workspace
    old = w.manifests.read("demo", "vectors", "tonal/dry")
    assert old is not None
    new = story.vectors(story.scenarios("another first line"))
    assert new != old.fingerprint
    node = lineage(w, find(w, old.fingerprint[:10]))
    assert node.state == "replaced"
    assert "positive, line 1: line one" not in titles(node), "today's lines are not those it was made from"
    assert lineage(w, find(w, new)).state == "current"


def test_results_are_found_by_many_names(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    w = story.workspace
    key = keys.extraction("demo", "tonal/dry", "vectors", "response_all", "residual", "probe", "v.bin")
    current = w.manifests.read("demo", "vectors", "tonal/dry")
    assert current is not None
    names = [
        "demo/tonal/dry",
        "demo/tonal/dry/vectors",
        current.fingerprint,
        current.fingerprint[:6],
        key,
        key.rsplit("/", 1)[0],
        str(w.store.local_path(key)),
    ]
    for name in names:
        target = find(w, name)
        assert (target.experiment, target.stage, target.trait) == ("demo", "vectors", "tonal/dry"), name
    monkeypatch.chdir(w.store.local_path("demo") or Path())
    assert find(w, key.removeprefix("demo/")).stage == "vectors"
    assert find(w, keys.scenario_set("tonal/dry")).stage == "scenarios"
    assert find(w, "demo/tonal/dry", stage="scenarios").stage == "scenarios"
    for name in (
        "",
        "nothing",
        "demo/tonal/wet",
        "ffffffffff",
        "/etc/passwd",
        "../../x",
        "a/b/c/d/e",
        "demo",
    ):
        with pytest.raises(UserError):
            find(w, name)
    with pytest.raises(UserError, match="no `steering_results`"):
        lineage(w, Target("demo", "steering_results", "tonal/dry"))


def test_the_same_answer_over_memory(tmp_path: Path) -> None:
    w = Workspace("memory://lineage-test/experiments", tmp_path / "x.duckdb")
    told = Story(w)
    told.vectors(told.scenarios())
    node = lineage(w, find(w, "demo/tonal/dry"))
    assert node.state == "current"
    assert "positive, line 1: line one" in titles(node)


def test_the_printed_tree_says_each_thing_once(story: Story) -> None:
    now = Now(source_hash=lambda trait: "edited")
    node = lineage(story.workspace, find(story.workspace, "demo/tonal/dry"), now=now)
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(show.tree(node))
    text = out.getvalue()
    assert text.count("positive, line 1: line one") == 1
    assert "see above" in text
    assert "[outdated]" in text
    assert "the files were edited since" in text
    assert "gpt-4.1-mini" in text
    table = io.StringIO()
    result = story.workspace.index.sql("SELECT 'x[red]' AS a, 1.23456789 AS b, NULL AS c")
    Console(file=table, width=80).print(show.table(result))
    assert "x[red]" in table.getvalue()
    assert "1.23457" in table.getvalue()


def test_markup_in_scenarios_is_text(workspace: Workspace) -> None:
    told = Story(workspace)
    told.vectors(told.scenarios("[bold]not markup[/bold] [/]"))
    out = io.StringIO()
    Console(file=out, width=200).print(show.tree(lineage(workspace, find(workspace, "demo/tonal/dry"))))
    assert "[bold]not markup[/bold] [/]" in out.getvalue()


def commit_table(w: Workspace, experiment: str, traits: list[str]) -> None:
    """A result over all traits, with a file, a picture and a row."""
    key = keys.extraction(experiment, None, "table.json")
    mark = fingerprint(["table", experiment, traits])
    files = {key: w.store.write_json(key, {"traits": traits})}
    w.store.write_bytes(keys.picture(experiment, "summary_table", None, "p"), b"png")
    manifest = Manifest(
        stage="summary_table",
        experiment=experiment,
        trait=None,
        fingerprint=mark,
        status="done",
        code_version="1",
        run_id="table-run",
        created_at=START.isoformat(),
        inputs=dict.fromkeys(traits, "a" * 32),
        files=files,
    )
    w.commit(manifest, [{"name": "change", "value": 1.0, "of": trait} for trait in traits])


def test_a_forgotten_trait_leaves_nothing_and_takes_nothing_else_along(any_workspace: Workspace) -> None:
    w = any_workspace
    for experiment, trait in (("demo", "tonal/dry"), ("other", "tonal/dry"), ("demo", "tonal/dry-wit")):
        told = Story(w, experiment, trait)
        told.vectors(told.scenarios())
        w.row_cache("judge", trait).put_many({"k": {"score": 1}})
        w.store.write_bytes(keys.picture(experiment, "vectors", trait, "p"), b"png")
        w.row_journal(experiment, "responses", trait).put_many({"k": {"x": 1}})
    commit_table(w, "demo", ["tonal/dry", "tonal/dry-wit"])
    commit_table(w, "other", ["tonal/dry-wit"])
    kept_before = [key for key in w.store.list() if "/dry-wit" in key]
    kept_before += [key for key in w.store.list("other") if "table" in key]
    kept_before.sort()
    trial = forget(w, "tonal/dry", dry_run=True)
    assert len(w.store.list()) == len(trial.keys) + len(kept_before)
    done = forget(w, "tonal/dry")
    assert sorted(done.keys) == sorted(trial.keys)
    assert done.rows > 0
    assert w.store.list() == kept_before
    left = re.compile(rb"tonal/dry(?!-)")
    assert not [key for key in w.store.list() if left.search(w.store.read_bytes(key))]
    assert not left.search(w.index.path.read_bytes()), "deleted rows stay in a database file"
    traits = w.index.sql("SELECT DISTINCT trait FROM manifests ORDER BY trait NULLS LAST").rows
    assert traits == [("tonal/dry-wit",), (None,)]
    w.index.rebuild()
    assert w.index.sql("SELECT DISTINCT trait FROM metrics WHERE trait IS NOT NULL").rows == [
        ("tonal/dry-wit",)
    ]
    with pytest.raises(UserError, match="nothing is stored"):
        forget(w, "tonal/dry")
    with pytest.raises(UserError):
        forget(w, "../x")
