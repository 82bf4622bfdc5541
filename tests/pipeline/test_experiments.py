"""Experiment configs: defaults of the specification, overrides, and errors that name the option."""

from __future__ import annotations

import json

import pytest

from storage.errors import UserError
from trait_assets.experiments import list_experiments, load_experiment, parse_experiment


def parse(**values):
    return parse_experiment("e", {"extraction_model": "m", **values}, where="config.yaml")


def test_defaults_are_those_of_the_specification():
    e = parse()
    assert (e.pos_threshold, e.neg_threshold, e.val_split, e.layers) == (60, 40, 0.2, "all")
    assert e.position == ["response[:]"]
    assert e.component == ["residual"]
    assert e.methods == ["mean_diff", "probe", "gradient"]
    assert e.steering
    assert e.vet_scenarios
    assert e.vet
    assert e.vetting_filter
    assert not e.prefill_only
    assert e.token_position == "last"
    assert e.response_length(base=False) == 150
    assert e.response_length(base=True) == 16
    assert e.steered_model == "m"
    assert e.steer.coherence_threshold == 70


def test_lists_may_be_written_with_commas():
    e = parse(position="response[:], prompt[-1]", methods="probe,random", traits="a/b, c/*")
    assert e.position == ["response[:]", "prompt[-1]"]
    assert e.methods == ["probe", "random"]
    assert e.covers("a/b")
    assert e.covers("c/anything")
    assert not e.covers("a/c")


@pytest.mark.parametrize(
    ("token_position", "position"), [("last", "prompt[-1]"), ("first", "prompt[0]"), ("mean", "prompt[:]")]
)
def test_token_positions_are_prompt_positions(token_position, position):
    assert parse(prefill_only=True, token_position=token_position).positions == [position]


def test_prefill_only_keeps_prompt_positions_that_are_asked_for():
    assert parse(prefill_only=True, position="prompt[-3:],response[:]").positions == ["prompt[-3:]"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_token": 3}, "did you mean `max_new_tokens`"),
        ({"steer": {"dose": [1]}}, "did you mean `doses`"),
        ({"pos_threshold": 30}, "pos_threshold must be above neg_threshold"),
        ({"pos_threshold": 101}, "option `pos_threshold`"),
        ({"val_split": 1.0}, "option `val_split`"),
        ({"position": "response[::2]"}, "response[::2]"),
        ({"position": "answer[:]"}, "answer"),
        ({"layers": "5-"}, "option `layers`"),
        ({"steer": {"doses": [0.1, -0.1]}}, "positive relative doses"),
        ({"steer": {"depth_window": [0.8, 0.2]}}, "depth_window"),
        ({"scenario_limit": 5}, "scenario_limit 5 is below min_kept 10"),
        ({"token_position": "middle"}, "option `token_position`"),
    ],
)
def test_a_bad_option_is_named(values, message):
    with pytest.raises(UserError) as error:
        parse(**values)
    assert message in str(error.value)


def test_the_model_is_required():
    with pytest.raises(UserError, match="extraction_model"):
        parse_experiment("e", {}, where="experiments/e/config.yaml")


def test_overrides_make_another_experiment_and_are_checked():
    e = parse(steer={"questions": 8})
    changed = e.with_overrides({"max_new_tokens": 5, "steer": {"max_new_tokens": 7}, "val_split": None})
    assert changed.max_new_tokens == 5
    assert changed.steer.questions == 8
    assert changed.steer.max_new_tokens == 7
    assert changed.val_split == 0.2
    assert e.max_new_tokens is None
    with pytest.raises(UserError, match="did you mean `layers`"):
        e.with_overrides({"layer": "3"})


def test_files_yaml_and_json(tmp_path):
    for name, file, text in [
        ("one", "config.yaml", "extraction_model: m\nseed: 3\n"),
        ("two", "config.json", json.dumps({"extraction_model": "m", "seed": 4})),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    (tmp_path / "_cache").mkdir()
    (tmp_path / "notes").mkdir()
    assert list_experiments(tmp_path) == ["one", "two"]
    assert load_experiment(tmp_path, "one").seed == 3
    assert load_experiment(tmp_path, "two").seed == 4
    with pytest.raises(UserError, match="did you mean `two`"):
        load_experiment(tmp_path, "tow")


@pytest.mark.parametrize(
    ("text", "message"),
    [("extraction_model: [", "cannot be parsed"), ("- a\n", "not a mapping"), ("", "not a mapping")],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_experiment(tmp_path, "e")
    assert "config.yaml" in str(error.value)
