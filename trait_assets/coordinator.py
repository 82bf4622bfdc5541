"""What a run asks of its machine: runs that hold the pool `gpu` ask for GPUs, all others for none.

Belongs here: the run coordinator that deploy/ray and deploy/k8s name, which puts an experiment's `run_resources` on each
run in the words of the launcher in use. Does not: launching, queueing and pool limits, which are Dagster's.

It runs where runs are submitted (webserver and daemon), so this project is installed there too. On one machine it is not
used: without it, or with another launcher, runs carry no such tags.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from dagster import DagsterRun
from dagster._core.run_coordinator import QueuedRunCoordinator, SubmitRunContext

from storage.errors import UserError
from trait_assets import paths
from trait_assets.experiments import RunResources, load_experiment

RAY_TAG = "dagster-ray/config"
K8S_TAG = "dagster-k8s/config"
GPU_POOL = "gpu"
# launcher class → the tag that it reads
TAG_OF = {"RayRunLauncher": RAY_TAG, "K8sRunLauncher": K8S_TAG}

log = logging.getLogger("trait_assets")


class ResourceCoordinator(QueuedRunCoordinator):
    """Dagster's queue; tags each run with what it needs before it is queued. A tag that is there already stays."""

    def submit_run(self, context: SubmitRunContext) -> DagsterRun:
        run = context.dagster_run
        tag = TAG_OF.get(type(self._instance.run_launcher).__name__)
        if tag is not None and tag not in run.tags:
            needs = most_of(resources_of(name) for name in experiments_of(run))
            pools = run.run_op_concurrency.all_pools if run.run_op_concurrency else None
            value = resource_tag(tag, needs, gpu=GPU_POOL in (pools or ()))
            if value:
                self._instance.add_run_tags(run.run_id, {tag: json.dumps(value, sort_keys=True)})
        return super().submit_run(context)


def experiments_of(run: DagsterRun) -> list[str]:
    """Names of the experiments whose assets a run makes; shared assets belong to none."""
    return sorted({key.path[0] for key in run.asset_selection or () if len(key.path) > 1})


def resources_of(experiment: str) -> RunResources:
    """What the experiment's config asks for; the defaults, with a warning, where it cannot be read here."""
    try:
        return load_experiment(paths.experiments_root(), experiment).run_resources
    except UserError as error:
        log.warning("the defaults of run_resources are used for %s: %s", experiment, error)
        return RunResources()


def most_of(needs: Iterable[RunResources]) -> RunResources:
    """The largest of each, for a run that serves several experiments; the defaults for one that serves none."""
    needs = list(needs)
    if not needs:
        return RunResources()
    return RunResources(
        gpus=max(n.gpus for n in needs),
        cpus=max((n.cpus for n in needs if n.cpus is not None), default=None),
        memory_gb=max((n.memory_gb for n in needs if n.memory_gb is not None), default=None),
    )


def resource_tag(tag: str, needs: RunResources, *, gpu: bool) -> Mapping[str, Any]:
    """The value of `dagster-ray/config` or `dagster-k8s/config`; empty when the run asks for nothing special."""
    gpus = needs.gpus if gpu else 0
    if tag == RAY_TAG:
        ray: dict[str, Any] = {}
        if gpus:
            ray["num_gpus"] = gpus
        if needs.cpus is not None:
            ray["num_cpus"] = needs.cpus
        if needs.memory_gb is not None:
            ray["memory"] = round(needs.memory_gb * 2**30)
        return ray
    requests: dict[str, str] = {}
    if needs.cpus is not None:
        requests["cpu"] = f"{needs.cpus:g}"
    if needs.memory_gb is not None:
        requests["memory"] = f"{round(needs.memory_gb * 1024)}Mi"
    resources: dict[str, dict[str, str]] = {}
    if gpus:
        # Kubernetes takes whole GPUs only, as a limit that is its own request
        requests["nvidia.com/gpu"] = resources.setdefault("limits", {})["nvidia.com/gpu"] = str(gpus)
    if requests:
        resources["requests"] = requests
    return {"container_config": {"resources": resources}} if resources else {}
