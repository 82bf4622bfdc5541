"""What an asset page shows of a manifest: numbers as people read them, explained, in tables that fit."""

from __future__ import annotations

import math

import dagster as dg
import pytest

from trait_assets import metering
from trait_assets.report import asset_page
from trait_assets.report.asset_page import Number, written
from trait_assets.stage import column_schema, table_value

EVALUATION = {
    "val_accuracy": 0.875,
    "val_accuracy_low": 0.5478101726137389,
    "val_accuracy_high": 0.9758728263705078,
    "val_auc": 1.0,
    "effect_size_d": 2.896682974893105,
    "contrast": None,
    "n_val_pos": 4,
    "n_val_neg": 5,
    "best_method": "probe",
    "best_layer": 27,
    "permutation_p": math.nan,
    "checks": [
        {"name": "polarity", "passed": True, "description": "fine"},
        {"name": "held_out_accuracy", "passed": False, "description": "88% on held-out rows"},
    ],
}


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.5, "share", "50\u00a0%"),
        (0.9758728, "share", "97.6\u00a0%"),
        (-3.25, "change", "−3.2"),
        (38.97, "change", "+39.0"),
        (52.8991, "points", "52.9"),
        (1234567, "count", "1,234,567"),
        (0.014925, "plain", "0.0149"),
        (True, "text", "yes"),
        ("local", "text", "local"),
        (math.nan, "plain", None),
        (math.inf, "share", None),
        (None, "count", None),
        ("", "text", None),
    ],
)
def test_a_number_is_written_as_people_read_it(value, kind, text):
    assert written(value, kind) == text


def test_an_interval_stands_beside_its_number_where_there_is_one():
    number = Number("change", "", "change", ("low", "high"))
    assert number.value({"change": 3.0, "low": -1.0, "high": 7.04}) == "+3.0 [−1.0,\u00a0+7.0]"
    assert number.value({"change": 3.0, "low": None, "high": 7.0}) == "+3.0"
    assert number.value({"low": 1.0}) is None


def test_the_result_is_a_sentence():
    assert asset_page.headline("vector_evaluation", EVALUATION) == (
        "probe at layer 27: held-out accuracy 87.5\u00a0% [54.8,\u00a097.6] of 9 rows, AUC 1"
    )
    assert asset_page.headline("responses", {"skipped": "not in this experiment"}) == (
        "skipped: not in this experiment"
    )


def test_plotted_numbers_are_finite_rounded_and_few():
    found = asset_page.plotted("vector_evaluation", EVALUATION)
    assert found == {"val_accuracy": 0.875, "val_auc": 1.0, "effect_size_d": 2.8967}
    for stage in asset_page.NUMBERS:
        assert sum(number.plotted for number in asset_page.NUMBERS[stage]) <= 8, stage


def test_a_number_that_nobody_described_is_shown_last():
    rows = asset_page.numbers("vector_evaluation", {"surprise_share": 0.25, **EVALUATION})
    assert rows[0]["number"] == "val_accuracy"
    assert rows[-1] == {"number": "surprise share", "value": "0.25", "meaning": ""}
    # the ends of an interval are not numbers of their own, and what there is not is not shown
    assert {row["number"] for row in rows}.isdisjoint({"val_accuracy_low", "permutation_p", "contrast"})


def test_what_a_stages_work_took_is_described():
    row = {
        "rows_per_second": 2.5,
        "tokens_per_second": 60.0,
        "gpu_peak_bytes": 2 * metering.GIB,
        "judge": "local",
        "judge_calls": 3,
        "judge_prompt_tokens": 5,
        "judge_completion_tokens": 7,
        "judge_cost_usd": 0.5,
    }
    recorded = metering.summary(row)
    shown = asset_page.numbers("responses", recorded)
    assert {line["number"] for line in shown} == set(recorded)
    assert all(line["meaning"] for line in shown)


def test_failed_checks_stand_on_the_page_with_what_was_found():
    assert asset_page.failed_checks(EVALUATION) == [
        {"check": "held_out_accuracy", "found": "88% on held-out rows"}
    ]


def test_tables_keep_the_columns_that_fit_and_say_something():
    row = {
        "method": "probe",
        "position": "response[:]",
        "component": "residual",
        "layer": 3,
        "val_accuracy": 0.9,
        "val_accuracy_low": 0.7,
        "val_accuracy_high": 1.0,
        "null_percentile": 99.0,
    }
    shown = asset_page.tables("vector_evaluation", {"best_layer_per_method": [row, {**row, "layer": 4}]})
    (lines,) = shown.values()
    assert lines[0] == {
        "method": "probe",
        "layer": 3,
        "accuracy [95 %]": "90\u00a0% [70,\u00a0100]",
        "beats random": "99\u00a0%",
    }
    both = asset_page.tables(
        "vector_evaluation", {"best_layer_per_method": [row, {**row, "position": "prompt[-1]"}]}
    )
    assert [line["position"] for line in both["best layer per method"]] == ["response[:]", "prompt[-1]"]
    assert "component" not in both["best layer per method"][0]
    # a table that nobody described keeps all its columns
    assert asset_page.tables("vectors", {"other": [{"a": 1}], "none": []}) == {"other": [{"a": 1}]}


def test_the_status_table_names_what_is_not_up_to_date():
    row = {
        "trait": "t/a",
        "scenarios": "current",
        "responses": "skipped",
        "vectors": "stale",
        "reason": "new code",
    }
    shown = asset_page.tables("report", {"trait_status": [row]})
    assert shown["trait status"] == [
        {"trait": "t/a", "up to date": "2 of 3", "not up to date": "vectors stale", "reason": "new code"}
    ]


def test_columns_of_a_table_over_all_traits_are_those_of_the_asset_that_it_is_taken_from():
    sources = asset_page.column_sources("steering_summary", {})
    assert sources["change"] == ("steering_results", "change")
    columns = {name for name, _, _ in asset_page.columns("steering_summary")}
    assert columns == {"trait", *sources}
    # without vetted responses there is no contrast to take
    assert asset_page.column_sources("vector_evaluation", EVALUATION) == {}
    assert asset_page.column_sources("vector_evaluation", {"contrast": 50.0}) == {
        "contrast": ("vetted_responses", "contrast")
    }
    schema = column_schema("extraction_evaluation")["dagster/column_schema"]
    assert all(column.description for column in schema.columns)
    assert column_schema("report") == {}


def test_a_table_is_one_that_dagster_takes():
    rows = [{"name": "a", "value": 0.123456, "bad": math.nan}, {"name": "b", "value": 2, "more": None}]
    table = table_value(rows)
    assert [column.name for column in table.schema.columns] == ["name", "value", "bad", "more"]
    assert table.records[0].data == {"name": "a", "value": 0.1235, "bad": None, "more": None}
    assert isinstance(table, dg.TableMetadataValue)


@pytest.mark.parametrize("stage", sorted(asset_page.NUMBERS))
def test_a_summary_of_an_older_version_costs_the_sentence_and_not_the_run(stage: str) -> None:
    said = asset_page.headline(stage, {"seconds_since_start": 1.0})
    assert said is None or stage == "vector_evaluation"
    assert said is None or "None" not in said
