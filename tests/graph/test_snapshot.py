"""The whole graph as it is meant to be, in graph.json beside this file; and the rules that every shape of it keeps.

A change of the graph on purpose is written down with `GRAPH_SNAPSHOT=write python -m pytest tests/graph/test_snapshot.py`;
the file's diff then shows a reviewer what changes for the users.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from trait_assets.checks import CHECKS
from trait_assets.definitions import build_defs
from trait_assets.experiments import Experiment
from trait_assets.paths import REPOSITORY
from trait_assets.pipeline import PIPELINE, TABLES

SNAPSHOT = Path(__file__).with_name("graph.json")
UPDATE = "GRAPH_SNAPSHOT=write python -m pytest tests/graph/test_snapshot.py"
MODEL = "embedded:smollm2-135m-instruct"
# every option that shapes the graph, and a name whose dash a group cannot carry
EXPERIMENTS = (
    Experiment(name="full", extraction_model=MODEL),
    Experiment(name="prefill", extraction_model=MODEL, prefill_only=True),
    Experiment(name="no-steering", extraction_model=MODEL, steering=False),
    Experiment(name="least", extraction_model=MODEL, prefill_only=True, steering=False),
)


@pytest.fixture(scope="module")
def defs() -> dg.Definitions:
    return build_defs(experiments=EXPERIMENTS)


@pytest.fixture(scope="module")
def graph(defs) -> dict[str, Any]:
    return describe(defs)


def describe(defs: dg.Definitions) -> dict[str, Any]:
    """What users of the graph see, as plain JSON in a stable order."""
    repository = defs.get_repository_def()
    assets = {}
    for key in sorted(repository.asset_graph.get_all_asset_keys()):
        node = repository.asset_graph.get(key)
        definition = node.assets_def
        policy = node.backfill_policy
        condition = node.automation_condition
        assets[key.to_user_string()] = {
            "deps": sorted(parent.to_user_string() for parent in node.parent_keys),
            "group": node.group_name,
            "partitions": _partitions(node.partitions_def),
            "backfill": None if policy is None else policy.max_partitions_per_run,
            "pool": definition.op.pool,
            "kinds": sorted(node.kinds),
            "owners": sorted(node.owners),
            "code_version": node.code_version,
            "automation": None if condition is None else condition.get_label(),
            "described": bool(node.description),
            "checks": sorted(check.name for check in repository.asset_graph.get_check_keys_for_assets([key])),
        }
    return {
        "assets": assets,
        "sensors": {
            sensor.name: {
                "status": sensor.default_status.value,
                "interval_seconds": sensor.minimum_interval_seconds,
            }
            for sensor in sorted(repository.sensor_defs, key=lambda s: s.name)
        },
        "schedules": {
            schedule.name: {"status": schedule.default_status.value, "cron": schedule.cron_schedule}
            for schedule in sorted(repository.schedule_defs, key=lambda s: s.name)
        },
        "resources": sorted(repository.get_top_level_resources()),
    }


def _partitions(partitions: dg.PartitionsDefinition | None) -> str | None:
    if partitions is None:
        return None
    name = getattr(partitions, "name", None)
    return f"{type(partitions).__name__}({name})"


def as_text(graph: dict[str, Any]) -> str:
    return json.dumps(graph, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def test_the_graph_is_the_one_written_down(graph):
    now = as_text(graph)
    if os.environ.get("GRAPH_SNAPSHOT") == "write":
        SNAPSHOT.write_text(now, encoding="utf-8")
    then = SNAPSHOT.read_text(encoding="utf-8")
    if now != then:
        diff = difflib.unified_diff(
            then.splitlines(), now.splitlines(), "graph.json", "the graph now", lineterm="", n=2
        )
        pytest.fail(
            "the graph has changed:\n" + "\n".join(diff) + f"\nif this is meant: {UPDATE}", pytrace=False
        )


def test_each_shape_has_its_stages_and_no_others(graph):
    def stages(experiment: str) -> set[str]:
        return {key.split("/")[1] for key in graph["assets"] if key.startswith(f"{experiment}/")}

    everything = (set(PIPELINE) - {"scenarios"}) | set(TABLES)
    before_activations = {"vetted_scenarios", "responses", "vetted_responses"}
    of_steering = {"steering_results", "steering_summary"}
    assert stages("full") == everything
    assert stages("prefill") == everything - before_activations
    assert stages("no-steering") == everything - of_steering
    assert stages("least") == everything - before_activations - of_steering
    # without responses the hidden states come straight from the scenarios
    assert graph["assets"]["prefill/activations"]["deps"] == ["scenarios"]


def test_trait_assets_share_one_policy_and_one_dimension_and_tables_have_none(graph):
    for key, asset in graph["assets"].items():
        if key.split("/")[-1] in TABLES:
            assert asset["partitions"] is None, key
            assert asset["backfill"] is None, key
        else:
            assert asset["partitions"] == "DynamicPartitionsDefinition(traits)", key
            assert asset["backfill"] == 16, key


def test_every_asset_says_who_and_what_it_is(defs, graph):
    for spec in defs.resolve_all_asset_specs():
        name = spec.key.to_user_string()
        assert spec.metadata.get("dagster/code_references"), name
        asset = graph["assets"][name]
        assert asset["described"], name
        assert asset["owners"], name
        assert asset["kinds"], name
        assert asset["code_version"], name


def recorded_checks() -> set[str]:
    """Names of the checks in the sources, read without running them.

    A name that is not a literal is a parameter of the function around the `Check(...)`: then the literals that the
    same module calls this function with count.
    """
    names: set[str] = set()
    for path in sorted((REPOSITORY / "trait_assets").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        around: dict[ast.AST, str] = {}
        # breadth first: an inner function overwrites what the outer one said about its calls
        for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
            around.update(dict.fromkeys(ast.walk(function), function.name))
        for call in [n for n in ast.walk(tree) if _is_call_of(n, "Check")]:
            first = call.args[0]
            if isinstance(first, ast.Constant):
                names.add(first.value)
                continue
            literals = {
                other.args[0].value
                for other in ast.walk(tree)
                if _is_call_of(other, around[call]) and other.args and isinstance(other.args[0], ast.Constant)
            }
            assert literals, f"{path}:{call.lineno}: the name of this check cannot be read"
            names |= literals
    return names


def _is_call_of(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", None) == name


def test_every_recorded_check_is_declared_and_every_declared_one_recorded():
    declared = {name for checks in CHECKS.values() for name in checks}
    assert recorded_checks() == declared
