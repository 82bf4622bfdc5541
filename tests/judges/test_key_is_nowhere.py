"""The judge's key goes to the judge's server and nowhere else: every file, database row and line of a run is
searched, in the clear."""

import logging
import sqlite3
import sys
import zlib
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pytest

from resources.judges.protocol import JudgeItem, TraitContext
from resources.judges.resource import JudgeResource
from storage.artifacts import ArtifactStore
from storage.rows import RowCache

SECRET = "sk-test-5d21c0ffee88-never-written"
CONTEXT = TraitContext("mood/loud", "HIGH (70-100): loud shouting.\n\nLOW (0-30): quiet whispering.")


@pytest.fixture
def written(load_helper: Any) -> Any:
    return load_helper(Path(__file__).with_name("written.py"))


def test_the_search_finds_a_secret_wherever_it_lies(tmp_path: Path, written: Any) -> None:
    (tmp_path / "plain.log").write_text(f"key={SECRET}")
    with sqlite3.connect(tmp_path / "runs.db") as connection:
        connection.execute("CREATE TABLE snapshots (body BLOB)")
        connection.execute("INSERT INTO snapshots VALUES (?)", [zlib.compress(f"x{SECRET}x".encode() * 9)])
    connection.close()
    with duckdb.connect(str(tmp_path / "lineage.duckdb")) as duck:
        duck.execute("CREATE TABLE t AS SELECT ? AS a FROM range(2000)", [SECRET])
        duck.execute("COPY (SELECT a FROM t) TO ? (FORMAT parquet)", [str(tmp_path / "rows.parquet")])
    (tmp_path / "clean.txt").write_text("nothing")
    found = {Path(place.split(":")[0]).name for place in written.holders(tmp_path, SECRET)}
    assert found == {"plain.log", "runs.db", "lineage.duckdb", "rows.parquet"}


@pytest.mark.parametrize("fails", [False, True])
def test_dagster_keeps_the_name_of_the_variable_and_not_its_value(
    openai_server: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    written: Any,
    fails: bool,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY_FOR_TEST", SECRET)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    module = sys.modules[type(openai_server).__module__]
    if fails:
        openai_server.script = lambda request: module.Reply(
            401, module.error_body(f"Incorrect API key provided: {SECRET}", "invalid_api_key")
        )
    store = ArtifactStore(tmp_path / "store")

    @dg.asset
    def judged(context: dg.AssetExecutionContext, judges: JudgeResource) -> dg.MaterializeResult:
        context.log.info(f"judged by {judges!r}")
        judge = judges.judge(lambda trait: RowCache(store, f"judgements/{trait}"))
        items = [JudgeItem(str(i), "steering", CONTEXT, "q", f"text {i}") for i in range(3)]
        scores = list(judge.score(items))
        return dg.MaterializeResult(
            metadata={"n": len(scores), "judge": dg.MetadataValue.json(judge.identity)}
        )

    home = tmp_path / "home"
    home.mkdir()
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        result = dg.materialize(
            [judged],
            instance=instance,
            resources={"judges": JudgeResource(base_url=openai_server.base_url, model="loopback-1")},
            run_config={
                "resources": {
                    "judges": {
                        "config": {
                            "base_url": openai_server.base_url,
                            "model": "loopback-1",
                            "api_key": {"env": "JUDGE_KEY_FOR_TEST"},
                        }
                    }
                }
            },
            raise_on_error=False,
        )
        assert result.success is not fails
        run = instance.get_run_by_id(result.run_id)
        assert run is not None
        assert SECRET not in repr(run.run_config)
    assert openai_server.requests[0].headers["authorization"] == f"Bearer {SECRET}"
    assert written.holders(tmp_path, SECRET) == []
    # the search has seen what Dagster keeps
    assert written.holders(home, "JUDGE_KEY_FOR_TEST")
    assert SECRET not in caplog.text
    assert not any(SECRET in stream for stream in capfd.readouterr())
