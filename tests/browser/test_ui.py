"""The Dagster UI as a researcher uses it: a real browser on a real `dagster dev`, over a project that the command line filled.

The tests follow one visit from top to bottom; what is started at its beginning is looked for at its end.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from trait_assets.checks import CHECKS
from trait_assets.report.asset_page import NUMBERS

pytestmark = pytest.mark.browser

# an asset of the graph → how far right it stands: the order of the pipeline
COLUMNS = (
    ("vetted_scenarios",),
    ("responses",),
    ("vetted_responses",),
    ("activations",),
    ("vectors",),
    ("vector_evaluation",),
    ("steering_results",),
    ("extraction_evaluation", "steering_summary"),
    ("report",),
)
NEW = {"my/grumpy": "emotion/anger", "my/quaint": "register/archaic"}


@pytest.fixture(scope="module", autouse=True)
def new_folders(dev: Any) -> None:
    """New trait folders, dropped while the daemon runs: what they set going is looked at last."""
    dev.wait(lambda: dev.ticked("keep_experiments_fresh"), 120)
    dev.drop(NEW)


def settled(page: Any, address: str) -> None:
    """Open an asset's page and wait for its results: every one of them carries a fingerprint."""
    page.goto(address)
    page.get_by_text("fingerprint", exact=True).first.wait_for()


def entry(page: Any, name: str) -> str:
    """What stands beside the name of a metadata entry."""
    return page.evaluate(
        """(name) => [...document.querySelectorAll('td')]
          .find((cell) => cell.textContent.trim() === name).nextElementSibling.innerText.trim()""",
        name,
    )


def test_the_graph_of_the_demo_reads_from_left_to_right(dev: Any, page: Any) -> None:
    # wide enough for the names to be written out
    page.set_viewport_size({"width": 2900, "height": 1000})
    page.goto("/locations/traits/asset-groups/demo/lineage")
    found = []
    for column in COLUMNS:
        boxes = []
        for name in column:
            node = page.get_by_text(name, exact=True).first
            node.wait_for()
            boxes.append(node.bounding_box()["x"])
        found.append(boxes)
    page.set_viewport_size({"width": 1500, "height": 900})
    assert [min(boxes) for boxes in found] == sorted(min(boxes) for boxes in found)
    assert all(max(left) < min(right) for left, right in itertools.pairwise(found))


def test_a_partition_page_shows_its_numbers_and_opens_its_picture(dev: Any, page: Any) -> None:
    settled(page, "/assets/demo/vector_evaluation?view=partitions&partition=emotion%2Fgloom")
    text = page.inner_text("body")
    stored = json.loads(
        (dev.experiments / "demo" / "manifests" / "vector_evaluation" / "emotion" / "gloom.json").read_text()
    )["summary"]
    assert f"{stored['best_method']} at layer {stored['best_layer']}: " in text
    # the numbers that are plotted, and the meaning of all
    for name in ("effect_size_d", "contrast"):
        assert float(entry(page, name)) == pytest.approx(stored[name], abs=1e-4)
    assert "how often shuffled labels separate the held-out rows as well" in text
    assert "best layer per method" in text
    page.get_by_text("[Show Markdown]").first.click()
    picture = page.locator("img[src^='data:image/png;base64,']").first
    picture.wait_for()
    assert picture.evaluate("image => image.naturalWidth") > 300
    page.keyboard.press("Escape")
    picture.wait_for(state="detached")


def test_every_number_of_the_demo_has_a_meaning(dev: Any) -> None:
    from trait_assets.report import asset_page

    seen = set()
    for path in dev.experiments.glob("*/manifests/**/*.json"):
        manifest = json.loads(path.read_text())
        stage, summary = manifest["stage"], manifest["summary"]
        seen.add(stage)
        rows = asset_page.numbers(stage, summary)
        assert [row["number"] for row in rows if not row["meaning"]] == [], stage
        assert asset_page.headline(stage, summary)
    assert seen == set(NUMBERS)


def test_the_checks_of_a_trait_are_listed_with_their_results(dev: Any, page: Any) -> None:
    page.goto("/assets/demo/vector_evaluation?view=checks")
    page.get_by_text("Latest execution", exact=True).wait_for()
    names = CHECKS["vector_evaluation"]
    text = page.inner_text("body")
    assert f"Checks ({len(names)})" in text
    for name, meaning in names.items():
        page.get_by_text(name, exact=True).first.click()
        page.get_by_text(meaning, exact=True).first.wait_for()
    # one trait that has nothing to check must not make a check look as if it had not run
    assert page.get_by_text("Passed", exact=True).count() > 0
    assert page.get_by_text("Skipped", exact=True).count() == 0


def test_the_report_opens_from_its_link_and_answers(dev: Any, page: Any) -> None:
    settled(page, "/assets/demo/report")
    with page.expect_download() as download:
        page.get_by_role("link", name="/logs/report/demo/html").click()
    saved = dev.root / "report.html"
    download.value.save_as(saved)
    assert saved.read_bytes() == (dev.experiments / "demo" / "report" / "report.html").read_bytes()
    report = page.context.browser.new_page()
    complaints: list[str] = []
    report.on("console", lambda message: complaints.append(message.text))
    report.on("pageerror", lambda error: complaints.append(str(error)))
    report.goto(Path(saved).as_uri())
    trait = report.locator(".samples").first
    slider, steered = trait.locator("input.dose"), trait.locator(".steered.text")
    slider.focus()
    report.keyboard.press("Home")
    assert steered.inner_text() == trait.locator(".plain.text").inner_text()
    report.keyboard.press("End")
    assert slider.get_attribute("aria-valuetext").startswith("0.2")
    assert "trait" in trait.locator(".steered-scores").inner_text()
    heat = report.locator("[data-chart='heat']").first
    heat.scroll_into_view_if_needed()
    report.wait_for_function("() => document.querySelector('[data-chart=heat] .nsewdrag')")
    box = heat.locator(".nsewdrag").first.bounding_box()
    at = (box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    report.mouse.move(*at)
    report.wait_for_selector(".hoverlayer .hovertext")
    report.mouse.click(*at)
    answer = report.locator("output.answer").first
    assert answer.inner_text().startswith("mean_diff, layer 10: held-out accuracy")
    report.close()
    assert complaints == []


def test_lineage_shows_what_an_asset_comes_from_and_what_comes_from_it(dev: Any, page: Any) -> None:
    page.goto("/assets/demo/vector_evaluation?view=lineage")
    middle = page.get_by_text("vector_evaluation", exact=True).last
    middle.wait_for()
    page.get_by_text("steering_results", exact=True).first.wait_for()

    def x(name: str) -> float:
        return page.get_by_text(name, exact=True).last.bounding_box()["x"]

    assert max(x("activations"), x("vectors")) < x("vector_evaluation")
    assert x("vector_evaluation") < min(x("extraction_evaluation"), x("steering_results"))


def test_a_trait_is_materialised_by_clicking(dev: Any, page: Any) -> None:
    # something to do: a damaged result is rebuilt
    evaluation = (
        dev.experiments / "demo" / "extraction" / "emotion" / "gloom" / "evaluation" / "evaluation.json"
    )
    before = evaluation.read_bytes()
    evaluation.unlink()
    known = {run.run_id for run in dev.instance.get_runs()}

    page.goto("/assets/demo/vector_evaluation")
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_text("Select a partition or create one").click()
    page.get_by_text("emotion/gloom", exact=True).filter(visible=True).last.click()
    page.get_by_text("1 partition", exact=True).wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Launch 1 run").click()

    def launched() -> list[dg.DagsterRun]:
        return [
            run
            for run in dev.instance.get_runs()
            if run.run_id not in known and run.asset_selection == {dg.AssetKey(["demo", "vector_evaluation"])}
        ]

    dev.wait(lambda: bool(launched()) and launched()[0].is_finished, 120)
    (run,) = launched()
    assert run.tags["dagster/partition"] == "emotion/gloom"
    page.goto(f"/runs/{run.run_id}")
    page.get_by_text("Success", exact=True).first.wait_for()
    assert evaluation.read_bytes() == before
    settled(page, "/assets/demo/vector_evaluation?view=partitions&partition=emotion%2Fgloom")
    assert run.run_id[:8] in page.inner_text("body")
    assert entry(page, "state") == "done"


@pytest.mark.slow
def test_the_backfill_of_new_folders_is_listed_and_green(dev: Any, page: Any) -> None:
    quick = dg.AssetKey(["quick", "vector_evaluation"])

    def of_new_folders() -> list[str]:
        return [b.backfill_id for b in dev.instance.get_backfills() if quick in (b.asset_selection or ())]

    dev.wait(lambda: bool(of_new_folders()), 120)
    backfill = of_new_folders()[-1]
    page.goto("/runs?view=backfills")
    name = page.get_by_text(backfill, exact=True).first
    name.wait_for()
    # the row that the name stands in
    row = name.locator("xpath=ancestor::*[contains(., 'keep_experiments_')][1]")
    dev.wait(lambda: "2 partitions" in row.inner_text(), 60)
    dev.wait(lambda: dev.instance.get_materialized_partitions(quick) == set(NEW), 200)
    end = time.monotonic() + 60
    while "Success" not in row.inner_text():
        assert time.monotonic() < end, row.inner_text()
        time.sleep(1)
