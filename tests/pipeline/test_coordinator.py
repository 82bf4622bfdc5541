"""What runs ask of a cluster: GPUs for those that hold a model, in the words of the launcher, and nothing else.

The launchers themselves are tested in tests/cluster.
"""

from __future__ import annotations

import json

import dagster as dg
import pytest
import yaml
from dagster._core.run_coordinator import SubmitRunContext
from dagster._core.test_utils import ExplodingRunLauncher

from storage.errors import UserError
from trait_assets.coordinator import K8S_TAG, RAY_TAG, most_of, resource_tag, resources_of
from trait_assets.definitions import build_defs
from trait_assets.experiments import RunResources, parse_experiment


class RayRunLauncher(ExplodingRunLauncher):
    """By its name the launcher of dagster-ray, which need not be installed for this; nothing is launched here."""


def test_a_run_with_a_model_asks_for_its_gpus():
    needs = RunResources(gpus=2, cpus=4, memory_gb=1.5)
    assert resource_tag(RAY_TAG, needs, gpu=True) == {"num_gpus": 2, "num_cpus": 4, "memory": 1610612736}
    assert resource_tag(K8S_TAG, needs, gpu=True) == {
        "container_config": {
            "resources": {
                "limits": {"nvidia.com/gpu": "2"},
                "requests": {"cpu": "4", "memory": "1536Mi", "nvidia.com/gpu": "2"},
            }
        }
    }


@pytest.mark.parametrize("tag", [RAY_TAG, K8S_TAG])
def test_a_run_without_a_model_and_a_cluster_without_gpus_ask_for_none(tag):
    assert resource_tag(tag, RunResources(), gpu=False) == {}
    assert resource_tag(tag, RunResources(gpus=0), gpu=True) == {}
    assert "gpu" not in json.dumps(resource_tag(tag, RunResources(gpus=3, cpus=0.5), gpu=False))


def test_a_run_for_several_experiments_asks_for_the_largest_of_each():
    many = most_of([RunResources(gpus=1, memory_gb=80), RunResources(gpus=4, cpus=2)])
    assert many == RunResources(gpus=4, cpus=2, memory_gb=80)
    assert most_of([]) == RunResources()


def test_the_config_says_what_a_run_needs_and_is_checked(tmp_path, monkeypatch, caplog):
    given = {"extraction_model": "tiny/llama", "run_resources": {"gpus": 8}}
    assert parse_experiment("big", given, where="config").run_resources.gpus == 8
    with pytest.raises(UserError, match=r"unknown option `run_resources\.gpu`.*did you mean `gpus`"):
        parse_experiment("big", {**given, "run_resources": {"gpu": 8}}, where="config")
    with pytest.raises(UserError, match=r"run_resources\.gpus"):
        parse_experiment("big", {**given, "run_resources": {"gpus": -1}}, where="config")
    monkeypatch.setenv("TRAITS_EXPERIMENTS", str(tmp_path))
    assert resources_of("elsewhere") == RunResources()
    assert "the defaults of run_resources are used for elsewhere" in caplog.text


@pytest.mark.parametrize(
    ("launcher", "stages", "expected"),
    [
        (RayRunLauncher, ["responses", "vetted_responses", "vectors"], {"num_gpus": 3}),
        (RayRunLauncher, ["vectors", "vector_evaluation"], None),
        (ExplodingRunLauncher, ["responses"], None),
    ],
    ids=["a model", "no model", "another launcher"],
)
def test_tags_are_there_before_a_run_is_queued(tmp_path, monkeypatch, launcher, stages, expected):
    folder = tmp_path / "experiments" / "big"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"extraction_model": "tiny/llama", "run_resources": {"gpus": 3}})
    )
    monkeypatch.setenv("TRAITS_EXPERIMENTS", str(tmp_path / "experiments"))
    job = build_defs().resolve_implicit_global_asset_job_def()
    selection = {dg.AssetKey(["big", stage]) for stage in stages}
    with dg.instance_for_test(
        overrides={
            "run_coordinator": {"module": "trait_assets.coordinator", "class": "ResourceCoordinator"},
            "concurrency": {"pools": {"granularity": "run", "default_limit": 1}},
        }
    ) as instance:
        monkeypatch.setattr(type(instance), "run_launcher", launcher())
        run = instance.create_run_for_job(
            job.get_subset(asset_selection=selection),
            asset_selection=selection,
            tags={"dagster/partition": "emotion/anger"},
            remote_job_origin=origin(job.name),
        )
        queued = instance.run_coordinator.submit_run(SubmitRunContext(run, workspace=None))
    assert queued.status == dg.DagsterRunStatus.QUEUED
    assert (json.loads(queued.tags[RAY_TAG]) if RAY_TAG in queued.tags else None) == expected
    assert K8S_TAG not in queued.tags


def origin(job: str):
    from dagster._core.remote_origin import (
        GrpcServerCodeLocationOrigin,
        RemoteJobOrigin,
        RemoteRepositoryOrigin,
    )

    location = GrpcServerCodeLocationOrigin(host="localhost", port=4000, location_name="traits")
    return RemoteJobOrigin(RemoteRepositoryOrigin(location, "__repository__"), job)
