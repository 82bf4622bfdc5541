"""The report's link in the UI: only where the web server can see what a run leaves on its disk."""

from __future__ import annotations

import dagster as dg
import pytest

from storage.workspace import Workspace
from trait_assets.report.asset import report_links
from trait_assets.report.report import report_key


@pytest.mark.parametrize("remote", [False, True], ids=["runs on this machine", "runs on others"])
def test_no_link_to_another_machines_disk(tmp_path, remote):
    workspace = Workspace(tmp_path / "results", tmp_path / "state" / "lineage.duckdb")
    workspace.store.write_bytes(report_key("demo"), b"<html></html>")
    launcher = {"module": "dagster._core.test_utils", "class": "ExplodingRunLauncher"}
    with dg.instance_for_test(overrides={"run_launcher": launcher} if remote else None) as instance:
        links = report_links(instance, workspace, "demo")
    assert set(links) == ({"report file"} if remote else {"open report", "report file"})
