"""Metadata shows which tokens a position picked of three rows, on the real model."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.tensors import unpack
from storage.workspace import Workspace
from trait_assets import pipeline
from trait_assets.activations.extraction import ActivationsStage
from trait_assets.activations.tokens import SHOWN_TOKENS, pack_strings, token_sample
from trait_assets.experiments import Experiment
from trait_assets.progress import LogProgress
from trait_assets.scenarios.reading import ScenariosStage
from trait_assets.vectors.extraction import VectorsStage

TRAIT = "register/bureaucratic"
DATASETS = Path(__file__).parents[2] / "datasets" / "traits"
POSITIONS = ["prompt[-2:]", "prompt[-5:-2]"]


@dataclass
class OneModel:
    """Hands out a model that is loaded already, and counts how often it is asked for."""

    model: Any
    loads: list[str] = field(default_factory=list)

    def spec(self, model: str, revision: str | None = None, adapter: str | None = None) -> Any:
        from resources.models.rows import ModelSpec

        return ModelSpec(model, revision, adapter=adapter)

    def identify(self, spec: Any) -> Any:
        return self.model.identity

    def get(self, spec: Any, max_batch_rows: int | None = None) -> Any:
        self.loads.append(spec.model)
        return self.model


def context(tmp_path: Path, models: OneModel, **options: Any) -> pipeline.StageContext:
    experiment = Experiment(
        name="small",
        extraction_model="embedded:smollm2-135m-instruct",
        traits=[TRAIT],
        prefill_only=True,
        base_model=True,
        position=POSITIONS,
        layers="10,17",
        methods=["mean_diff"],
        scenario_limit=8,
        **options,
    )
    return pipeline.StageContext(
        experiment=experiment,
        workspace=Workspace(tmp_path / "experiments", tmp_path / "lineage.duckdb"),
        models=models,  # type: ignore[arg-type]
        judges=None,  # type: ignore[arg-type]
        dataset_root=DATASETS,
        run_id="run",
        progress=LogProgress(logging.getLogger("quiet")),
    )


def stage(ctx: pipeline.StageContext, which: Any) -> pipeline.TraitResult:
    (result,) = pipeline.run(which, ctx, [TRAIT])
    assert result.state in ("done", "current"), result.reason
    return result


def test_the_averaged_tokens_stand_in_metadata_file_and_tables(smollm2: Any, tmp_path: Path) -> None:
    models = OneModel(smollm2)
    ctx = context(tmp_path, models)
    stage(ctx, ScenariosStage())
    activations = stage(ctx, ActivationsStage())
    vectors = stage(ctx, VectorsStage())
    store = ctx.workspace.store
    scenarios = store.read_json(f"_scenarios/{TRAIT}/scenario_set.json")
    seen = 0
    for result, kind in ((activations, "activations"), (vectors, "vectors")):
        for key in result.manifest.files:
            if not key.endswith("metadata.json"):
                continue
            metadata = store.read_json(key)
            sample = metadata["sample_tokens"]
            assert [s["row"].split(":")[0] for s in sample] == ["positive", "negative", "positive"]
            for row in sample:
                side, index = row["row"].split(":")
                scenario = scenarios[f"{side}s"][int(index)]
                assert scenario["line"] == row["line"]
                # the whole prompt with the tokenizer itself, then the slice as Python takes it
                ids = smollm2.tokenizer(scenario["prompt"], add_special_tokens=False)["input_ids"]
                picked = ids[-2:] if metadata["position"] == "prompt[-2:]" else ids[-5:-2]
                assert row["tokens"] == [smollm2.tokenizer.decode([i]) for i in picked], kind
                assert row["n_tokens"] == len(picked)
                seen += 1
            if kind == "vectors":
                _, header = unpack(store.read_bytes(key.replace("metadata.json", "vectors.safetensors")))
                assert header["sample_tokens"] == sample
        table = result.manifest.tables["averaged_tokens"]
        assert {(row["position"], row["tokens"]) for row in table} == {
            ("prompt[-2:]", 2),
            ("prompt[-5:-2]", 3),
        }
        assert len(table) == 6
    assert seen == 2 * 2 * 3

    # another split: rows are reused, tokens with them, and no model is asked for
    before = len(models.loads)
    again = stage(context(tmp_path, models, val_split=0.0), ActivationsStage())
    assert again.manifest.summary["captured_now"] == 0
    assert len(models.loads) == before
    assert len(again.manifest.tables["averaged_tokens"]) == 6
    # a capture from scratch says the same
    other = tmp_path / "other"
    fresh = context(other, models, val_split=0.0)
    stage(fresh, ScenariosStage())
    assert stage(fresh, ActivationsStage()).manifest.tables == again.manifest.tables


def test_a_journal_keeps_the_tokens_of_a_killed_run(smollm2: Any, tmp_path: Path, monkeypatch) -> None:
    import trait_assets.activations.extraction as extraction

    models = OneModel(smollm2)
    ctx = context(tmp_path, models)
    stage(ctx, ScenariosStage())
    monkeypatch.setattr(extraction, "FLUSH_ROWS", 1)

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("killed before the commit")

    with monkeypatch.context() as m:
        m.setattr(extraction, "build_activations", broken)
        (failed,) = pipeline.run(ActivationsStage(), ctx, [TRAIT])
        assert failed.state == "failed"
    resumed = stage(ctx, ActivationsStage())
    assert resumed.manifest.summary["reused"] > 0
    undisturbed = context(tmp_path / "other", models)
    stage(undisturbed, ScenariosStage())
    expected = stage(undisturbed, ActivationsStage())
    assert resumed.manifest.tables == expected.manifest.tables


@pytest.mark.parametrize("strings", [[], ["a"], ["\ud800", "\x00", "ü", "|", "\n"]])
def test_strings_come_back(strings: list[str]) -> None:
    packed = pack_strings(strings)
    assert packed.dtype == np.uint8
    assert json.loads(packed.tobytes()) == strings


def test_a_long_row_shows_both_ends() -> None:
    strings = [str(i) for i in range(1000)]
    sample = token_sample("positive:0", 1, pack_strings(strings))
    assert sample["n_tokens"] == 1000
    assert sample["omitted_in_the_middle"] == 1000 - SHOWN_TOKENS
    assert sample["tokens"][0] == "0"
    assert sample["tokens"][-1] == "999"
    assert len(sample["tokens"]) == SHOWN_TOKENS
