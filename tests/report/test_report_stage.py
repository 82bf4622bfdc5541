"""The report stage: when it is made anew, what it shows, what it leaves out and says so."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from storage import keys
from trait_assets.pipeline import run
from trait_assets.report import contents
from trait_assets.report.contents import status_table
from trait_assets.report.page import embedded
from trait_assets.report.report import gather


class Page(HTMLParser):
    """Elements and visible texts of a page, scripts apart."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._inside: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        self._inside = tag if tag in ("script", "style") else self._inside

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside is None:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    @property
    def ids(self) -> set[str]:
        return {attrs["id"] for _, attrs in self.tags if attrs.get("id")}  # type: ignore[misc]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def page(finished: Any) -> Page:
    return Page(finished.html())


def test_it_is_current_until_something_below_it_changes(stored):
    first = stored.report()
    assert first.state == "done", first.detail
    assert stored.report().state == "current"
    stored.commit("activations", "toy/alpha", {}, options={"changed": True})
    again = stored.report()
    assert again.state == "done"
    assert again.manifest.fingerprint != first.manifest.fingerprint
    # the state of the folders shows in the report too
    (stored.context.dataset_root / "toy" / "gamma" / "positive.txt").unlink()
    assert stored.report().state == "done"
    assert stored.report().state == "current"


def test_the_manifest_counts_and_tells_every_trait_from_its_stages(finished):
    manifest = finished.context.workspace.manifests.read("lab", "report", None)
    assert {k: manifest.summary[k] for k in ("traits", "validated", "not_validated", "without_verdict")} == {
        "traits": 3,
        "validated": 1,
        "not_validated": 0,
        "without_verdict": 2,
    }
    assert manifest.summary["report"].endswith("lab/report/report.html")
    assert manifest.summary["judge_is_stand_in"] is True
    table = {row["trait"]: row for row in manifest.tables["trait_status"]}
    assert list(table) == ["toy/alpha", "toy/beta", "toy/gamma"]
    assert table["toy/gamma"]["vectors"] == "missing"
    assert table["toy/alpha"]["vectors"] == "current"
    assert manifest.inputs["vectors/toy/alpha"] == table_fingerprint(finished, "vectors", "toy/alpha")
    (check,) = manifest.summary["checks"]
    assert check["passed"], check["description"]


def table_fingerprint(stored: Any, stage: str, trait: str) -> str:
    return stored.context.workspace.manifests.read("lab", stage, trait).fingerprint


def test_every_trait_has_its_verdict_and_why(page):
    assert "1 of 3 traits validated" in page.text
    assert "change +13.0 clears 2 random directions" in page.text
    assert "scenarios is missing: not materialised yet" in page.text
    assert {"toy--alpha", "toy--beta", "toy--gamma"} <= page.ids
    # no result, no judge: nothing is invented for it
    assert "Nothing is stored for this trait yet." in page.text


def test_scores_name_their_judge_and_the_stand_in_is_said(page):
    assert "The judge is a stand-in." in page.text
    assert page.text.count("judge<b>one</b> (stand-in)") >= 5


def test_each_result_has_its_lineage_and_every_source_leads_there(page, finished):
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    targets = {link[1:] for link in links}
    assert all(link.startswith("#") for link in links)
    assert targets <= page.ids
    for stage in ("activations", "vectors", "vector_evaluation", "steering_results", "vetted_responses"):
        assert f"toy--alpha--{stage}" in page.ids
        assert table_fingerprint(finished, stage, "toy/alpha") in page.text
    assert "run-of-the-test" in page.text
    assert '"application_model"' in page.text


def test_parts_that_were_not_made_are_named(page):
    beta = page.data["traits"]["toy--beta"]
    assert beta["dose"] is None
    assert beta["heat"] is not None
    assert "No dose–response and no steered texts: steering_results has no result yet" in page.text


def test_the_null_is_drawn_again_as_evaluation_drew_it(page, finished):
    null = page.data["traits"]["toy--alpha"]["null"]
    report = finished.context.workspace.store.read_json(
        keys.extraction("lab", "toy/alpha", "evaluation", "evaluation.json")
    )
    best = report["best"]
    assert len(null["sample"]) == 40
    assert sum(null["sample"]) / 40 == pytest.approx(best["null_auc_mean"], abs=1e-3)
    assert null["best"]["val_auc"] == best["val_auc"]
    at = null["layers"].index(best["layer"])
    assert null["auc"][at] == pytest.approx(best["val_auc"], abs=1e-4)
    assert null["null_low"][at] == pytest.approx(best["null_auc_p05"], abs=1e-4)


def test_without_the_activations_of_that_evaluation_only_the_band_is_shown(stored):
    stored.commit("activations", "toy/alpha", {}, options={"positions": [], "components": []})
    assert stored.report().state == "done"
    page = Page(stored.html())
    assert page.data["traits"]["toy--alpha"]["null"]["sample"] is None
    assert page.data["traits"]["toy--beta"]["null"]["sample"] is not None
    assert "the distribution could not be drawn again" in page.text


def test_hostile_texts_stay_texts(page, finished):
    html = finished.html()
    # one for the data, one for plotly, one for ours
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert "img" not in {tag for tag, _ in page.tags}
    samples = page.data["traits"]["toy--alpha"]["samples"]
    shown = samples["questions"][0]["unsteered"]["text"]
    assert "</script><script>window.pwned = 1</script>" in shown
    assert "\u2028" in shown
    assert "<script>window.pwned" not in html
    assert "\u2028" not in page.scripts[0]
    assert page.scripts[0].isascii()


def test_embedded_json_holds_no_markup_and_no_nan():
    text = str(embedded({"a": "<!--<script>&]]>", "b": "\ud800\u2029é"}))
    assert text.isascii()
    assert not set(text) & set("<>&")
    assert json.loads(text) == {"a": "<!--<script>&]]>", "b": "\ud800\u2029é"}
    with pytest.raises(ValueError, match="JSON"):
        embedded([float("nan")])


def test_the_page_asks_for_nothing_from_outside(page):
    asking = [
        (tag, name)
        for tag, attrs in page.tags
        for name in attrs
        if name in ("src", "srcset", "action", "data", "poster") or (tag == "link" and name == "href")
    ]
    assert asking == []
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == 2


def test_a_damaged_file_costs_its_part_and_is_named(stored):
    key = keys.steering("lab", "toy/alpha", "response_all", "results.json")
    path = stored.context.workspace.store.local_path(key)
    path.write_text(path.read_text(encoding="utf-8").replace("13.0", "99.0"), encoding="utf-8")
    result = stored.report()
    assert result.state == "done"
    (check,) = result.manifest.summary["checks"]
    assert not check["passed"]
    assert "steering_results of toy/alpha" in check["description"]
    page = Page(stored.html())
    assert page.data["traits"]["toy--alpha"]["dose"] is None
    assert page.data["traits"]["toy--alpha"]["heat"] is not None
    assert "Left out:" in page.text


def test_a_damaged_manifest_does_not_stop_the_others(stored):
    key = keys.manifest("lab", "vectors", "toy/beta")
    stored.context.workspace.store.write_bytes(key, b"{")
    result = stored.report()
    assert result.state == "done"
    assert "vectors of toy/beta" in result.manifest.summary["problems"]
    table = {row["trait"]: row for row in result.manifest.tables["trait_status"]}
    assert table["toy/beta"]["vectors"] == "damaged"
    assert table["toy/beta"]["vector_evaluation"] == "stale"
    assert result.manifest.summary["validated"] == 1


def test_an_experiment_without_any_result_has_no_report(tmp_path, synthetic):
    lab = synthetic.lab(tmp_path)
    from trait_assets.report.report import ReportStage

    (result,) = run(ReportStage(), lab.context, [None])
    assert result.state == "failed"
    assert "no trait of lab has a result yet" in result.reason
    assert "traits run" in result.reason


@pytest.mark.parametrize(
    ("options", "said", "gone"),
    [
        ({"steering": False}, "steering is switched off in this experiment", "steering, report questions"),
        ({"prefill_only": True}, "this experiment is prefill-only", "Judge scores of responses"),
    ],
)
def test_a_graph_without_a_part_has_a_report_without_it(stored, options, said, gone):
    result = stored.report(experiment=stored.context.experiment.with_overrides(options))
    assert result.state == "done", result.detail
    page = Page(stored.html())
    assert said in page.text
    assert gone not in page.text


def test_a_skipped_stage_is_called_skipped(stored):
    stored.commit(
        "vetted_responses", "toy/alpha", {}, status="skipped", summary={"skipped": "vetting is off"}
    )
    assert stored.report().state == "done"
    assert "the stage vetted_responses was skipped (vetting is off)" in Page(stored.html()).text


def test_traits_that_the_experiment_leaves_out_do_not_show(stored):
    narrow = stored.context.experiment.with_overrides({"traits": ["toy/beta"]})
    result = stored.report(experiment=narrow)
    assert result.manifest.summary["traits"] == 1
    assert "toy--alpha" not in Page(stored.html()).ids


def test_histogram_tells_before_from_after_and_leaves_abstentions_out(page):
    scenarios, responses = page.data["traits"]["toy--alpha"]["histograms"]
    assert (scenarios["subject"], responses["subject"]) == ("scenarios", "responses")
    assert scenarios["bins"]["positive"] == {
        "kept": [0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        "left_out": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    }
    assert scenarios["bins"]["negative"]["kept"] == [9, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert scenarios["summary"]["n_abstained"] == 1


def test_histogram_holds_the_end_of_the_scale():
    rows = [{"polarity": "positive", "verdict": "kept", "score": value} for value in (0.0, 9.99, 10.0, 100.0)]
    assert contents.histogram(rows)["positive"]["kept"] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_heat_has_a_cell_for_each_layer_and_method_and_marks_the_chosen(page, finished):
    heat = page.data["traits"]["toy--alpha"]["heat"]
    (site,) = heat["sites"]
    assert site["layers"] == [0, 1, 2, 3]
    assert site["methods"] == ["mean_diff", "probe", "gradient"]
    report = finished.context.workspace.store.read_json(
        keys.extraction("lab", "toy/alpha", "evaluation", "evaluation.json")
    )
    for row in report["rows"]:
        cell = site["metrics"]["val_accuracy"][site["methods"].index(row["method"])][row["layer"]]
        assert cell == pytest.approx(row["val_accuracy"], abs=1e-4)
    assert site["best"] == {"layer": report["best"]["layer"], "method": report["best"]["method"]}


def test_heat_without_held_out_rows_shows_cross_validation():
    rows = [
        {
            "position": "prompt[-1]",
            "component": "residual",
            "layer": layer,
            "method": "probe",
            "cv_auc": 0.5 + layer / 10,
            "cv_accuracy": None,
            "val_accuracy": None,
            "val_auc": None,
            "effect_size_d": None,
        }
        for layer in (3, 1)
    ]
    heat = contents.heat(rows, None)
    assert heat["metrics"] == {"cv_auc": "cross-validated AUC"}
    assert heat["sites"][0]["metrics"]["cv_auc"] == [[0.6, 0.8]]
    assert heat["sites"][0]["best"] is None


def test_dose_response_sorts_settings_by_what_was_added(page):
    dose = page.data["traits"]["toy--alpha"]["dose"]
    chosen, other = dose["curves"]
    assert chosen["chosen"]
    assert (chosen["method"], chosen["layer"]) == ("mean_diff", 2)
    assert not other["chosen"]
    assert [(p["dose"], p["change"], p["low"], p["high"]) for p in chosen["search"]] == [
        (0.1, 6.0, 1.0, 11.0),
        (0.2, 12.0, 7.0, 17.0),
        (0.4, 24.0, 19.0, 29.0),
    ]
    assert [(p["dose"], p["change"]) for p in chosen["report"]] == [(0.2, 13.0)]
    assert [p["change"] for p in dose["controls"]] == [1.0, -2.0]
    assert dose["prompting"]["change"] == 4.0
    assert dose["prompting"]["dose"] is None
    assert dose["threshold"] == 70.0


def test_samples_give_each_arm_its_doses_in_order(page):
    samples = page.data["traits"]["toy--alpha"]["samples"]
    assert [arm["kind"] for arm in samples["arms"]] == ["vector", "vector", "random", "random", "prompting"]
    assert samples["arms"][0]["label"] == "mean_diff, layer 2 (chosen)"
    assert samples["best_dose"] == 0.2
    search = next(q for q in samples["questions"] if q["half"] == "search")
    answers = search["answers"][samples["arms"][0]["id"]]
    assert [a["dose"] for a in answers] == [0.1, 0.2, 0.4]
    assert answers[1]["text"].startswith("vector mean_diff at 0.2, question 0")
    report = next(q for q in samples["questions"] if q["half"] == "report")
    assert len(report["answers"]) == 4
    abstained = samples["questions"][2]["unsteered"]
    assert abstained["trait"] is None
    assert abstained["abstained"] == "refusal"


def test_many_texts_are_cut_by_whole_questions(stored):
    generations = stored.context.workspace.store.read_json(
        keys.steering("lab", "toy/alpha", "response_all", "generations.json")
    )
    whole = contents.samples([generations], None, 10_000_000)
    assert (len(whole["questions"]), whole["of"]) == (6, 6)
    one = contents.samples([generations], None, 1)
    assert (len(one["questions"]), one["of"]) == (1, 6)
    half = sum(len(row["response"]) for row in generations) // 2
    some = contents.samples([generations], None, half)
    assert 1 < len(some["questions"]) < 6
    assert {q["half"] for q in some["questions"]} == {"search", "report"}


def test_runs_of_no_position_count_once(stored):
    result = stored.context.workspace.store.read_json(
        keys.steering("lab", "toy/alpha", "response_all", "results.json")
    )
    dose = contents.dose_response([result, {**result, "position": "prompt[-1]"}])
    assert len(dose["controls"]) == 2
    assert len(dose["curves"]) == 2


def test_a_large_experiment_has_all_traits_in_the_overview_and_the_best_in_full(stored, monkeypatch):
    monkeypatch.setattr(contents, "DETAILED_TRAITS", 1)
    monkeypatch.setattr(contents, "MATRIX_TRAITS", 1)
    assert stored.report().state == "done"
    page = Page(stored.html())
    assert list(page.data["traits"]) == ["toy--alpha"]
    assert "toy/gamma" in page.text
    assert "toy--gamma" not in page.ids
    assert "The 1 traits with a link have a section below" in page.text
    links = {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"}
    assert links <= page.ids
    assert page.data["across"] is None


def test_status_table_is_flat_and_keeps_reasons():
    rows = [
        {
            "trait": "a/b",
            "problem": "no negative.txt",
            "stages": {
                "vectors": {"state": "stale", "reason": "activations has changed since"},
                "steering_results": {"state": "missing", "reason": None},
            },
        }
    ]
    assert status_table(rows) == [
        {
            "trait": "a/b",
            "vectors": "stale",
            "steering_results": "missing",
            "reason": "no negative.txt; vectors: activations has changed since",
        }
    ]


def test_every_covered_trait_is_gathered_with_its_manifests(stored):
    material = gather(stored.context)
    assert set(material.traits) == {"toy/alpha", "toy/beta"}
    assert set(material.traits["toy/alpha"]) >= {"scenarios", "vectors", "steering_results"}
    assert set(material.tables) == {"extraction_evaluation"}


def test_the_demo_has_all_its_parts(demo):
    result = demo.report()
    assert result.state == "done", result.detail or result.reason
    page = Page(demo.html())
    assert result.manifest.summary["problems"] is None
    evaluated = [t for t in page.data["traits"].values() if t["heat"]]
    assert evaluated
    for trait in evaluated:
        assert trait["null"]["sample"], "the null distribution could not be drawn again"
        assert len(trait["histograms"]) == 2
    steered = [t for t in page.data["traits"].values() if t["dose"]]
    for trait in steered:
        assert trait["dose"]["curves"][0]["chosen"]
        assert len(trait["dose"]["controls"]) >= 5
        assert trait["samples"]["questions"][0]["answers"]
    assert len(demo.html()) < 12_000_000
