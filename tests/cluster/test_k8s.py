"""deploy/k8s against the published schemas of Kubernetes, and the Job that Dagster's launcher makes of a run.

No cluster is asked: the launcher posts to a loopback server that keeps what it gets.
"""

from __future__ import annotations

import http.server
import importlib.util
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trait_assets.paths import REPOSITORY

pytestmark = pytest.mark.cluster

DEPLOY = REPOSITORY / "deploy" / "k8s"
VERSIONS = ("1.29", "1.32", "1.35")
MANIFESTS = sorted(
    path
    for path in DEPLOY.glob("*.yaml")
    if path.name not in ("kustomization.yaml", "dagster.yaml", "workspace.yaml", "values.yaml")
)


def need(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(
                f"{module} is not installed: `make test-cluster` has an environment of its own for this"
            )


def documents(text: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(text) if one]


def validate(document: dict[str, Any]) -> None:
    import kubernetes_validate

    for version in VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_follow_the_schemas(path):
    need("kubernetes_validate")
    for document in documents(path.read_text(encoding="utf-8")):
        validate(document)


def test_a_misspelt_field_would_be_noticed():
    need("kubernetes_validate")
    import kubernetes_validate

    document = documents((DEPLOY / "services.yaml").read_text(encoding="utf-8"))[0]
    document["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(document)


def test_kustomize_renders_one_image_for_services_and_runs():
    need("kubernetes_validate")
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders kustomization.yaml, is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    rendered = documents(done.stdout)
    for document in rendered:
        validate(document)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "traits"
    kinds = sorted(document["kind"] for document in rendered)
    assert kinds.count("Deployment") == 3
    pods = [d["spec"]["template"]["spec"] for d in rendered if d["kind"] in ("Deployment", "Job")]
    images = {container["image"] for pod in pods for container in pod["containers"]}
    told = {
        entry["value"]
        for pod in pods
        for container in pod["containers"]
        for entry in container.get("env", [])
        if entry["name"] == "DAGSTER_CURRENT_IMAGE"
    }
    assert images == told
    assert len(images) == 1


def test_what_is_named_exists():
    """Every ConfigMap, volume claim, account and service that is named is made here; the one Secret is not."""
    everything = [d for path in MANIFESTS for d in documents(path.read_text(encoding="utf-8"))]
    made = {(d["kind"], d["metadata"]["name"]) for d in everything}
    kustomization = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text(encoding="utf-8"))
    made |= {("ConfigMap", one["name"]) for one in kustomization["configMapGenerator"]}
    assert set(kustomization["resources"]) == {path.name for path in MANIFESTS}
    assert ("Secret", "traits-secrets") not in made
    config = yaml.safe_load((DEPLOY / "dagster.yaml").read_text(encoding="utf-8"))
    launcher = config["run_launcher"]["config"]
    named = {("ConfigMap", launcher["instance_config_map"])}
    named |= {("ConfigMap", name) for name in launcher["env_config_maps"]}
    named.add(("ServiceAccount", launcher["service_account_name"]))
    text = "\n".join(path.read_text(encoding="utf-8") for path in MANIFESTS)
    for document in everything:
        pod = pod_of(document)
        for volume in pod.get("volumes", []):
            if "configMap" in volume:
                named.add(("ConfigMap", volume["configMap"]["name"]))
        mounted = {m["name"] for c in pod.get("containers", []) for m in c.get("volumeMounts", [])}
        assert mounted <= {volume["name"] for volume in pod.get("volumes", [])}
        if account := pod.get("serviceAccountName"):
            named.add(("ServiceAccount", account))
    for volume in launcher["volumes"]:
        if claim := volume.get("persistentVolumeClaim"):
            named.add(("PersistentVolumeClaim", claim["claimName"]))
    workspace = yaml.safe_load((DEPLOY / "workspace.yaml").read_text(encoding="utf-8"))
    named.add(("Service", workspace["load_from"][0]["grpc_server"]["host"]))
    assert named <= made
    assert "kind: Secret" not in text


def pod_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document.get("spec", {})
    if document["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    return (
        spec.get("template", {}).get("spec", {})
        if document["kind"] in ("Deployment", "Job", "CronJob")
        else {}
    )


class KubernetesApi(http.server.ThreadingHTTPServer):
    """Keeps every Job that is posted and says that it was made."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: list[dict[str, Any]] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    server: KubernetesApi

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.jobs.append({"path": self.path, "job": body})
        answer = json.dumps(body).encode()
        self.send_response(201)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    server = KubernetesApi()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture
def home(api, tmp_path, monkeypatch) -> Path:
    """The shipped dagster.yaml, but outside a cluster (a kubeconfig) and on SQLite."""
    need("dagster_k8s", "kubernetes_validate")
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "loopback",
        "clusters": [{"name": "loopback", "cluster": {"server": f"http://127.0.0.1:{api.server_port}"}}],
        "contexts": [{"name": "loopback", "context": {"cluster": "loopback", "user": "nobody"}}],
        "users": [{"name": "nobody", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    config = yaml.safe_load((DEPLOY / "dagster.yaml").read_text(encoding="utf-8"))
    config["run_launcher"]["config"] |= {
        "load_incluster_config": False,
        "kubeconfig_file": str(tmp_path / "kubeconfig"),
    }
    config["storage"] = {"sqlite": {"base_dir": str(tmp_path / "history")}}
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text(yaml.safe_dump(config))
    experiments = tmp_path / "experiments" / "big"
    experiments.mkdir(parents=True)
    (experiments / "config.yaml").write_text(
        yaml.safe_dump(
            {"extraction_model": "meta/some-70b", "run_resources": {"gpus": 4, "cpus": 8, "memory_gb": 96}}
        )
    )
    monkeypatch.setenv("TRAITS_EXPERIMENTS", str(tmp_path / "experiments"))
    return home


def launch(home: Path, stages: list[str], tags: dict[str, str]) -> dict[str, str]:
    """Submit and launch one run of the experiment `big`, as webserver and daemon do; gives its tags."""
    import dagster as dg
    from dagster._core.code_pointer import ModuleCodePointer
    from dagster._core.launcher import LaunchRunContext
    from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
    from dagster._core.remote_origin import (
        GrpcServerCodeLocationOrigin,
        RemoteJobOrigin,
        RemoteRepositoryOrigin,
    )
    from dagster._core.run_coordinator import SubmitRunContext

    from trait_assets.definitions import build_defs

    job = build_defs().resolve_implicit_global_asset_job_def()
    selection = {dg.AssetKey(["big", stage]) for stage in stages}
    origin = JobPythonOrigin(
        job_name=job.name,
        repository_origin=RepositoryPythonOrigin(
            executable_path="python",
            code_pointer=ModuleCodePointer("trait_assets.definitions", "defs", working_directory="/app"),
            container_image="registry.example/trait-assets:1",
            entry_point=["dagster"],
            container_context={},
        ),
    )
    with dg.DagsterInstance.from_config(str(home)) as instance:
        run = instance.create_run_for_job(
            job.get_subset(asset_selection=selection),
            asset_selection=selection,
            tags={"dagster/partition": "emotion/anger", **tags},
            job_code_origin=origin,
            remote_job_origin=RemoteJobOrigin(
                RemoteRepositoryOrigin(
                    GrpcServerCodeLocationOrigin(host="traits-code", port=4000, location_name="traits"),
                    "__repository__",
                ),
                job.name,
            ),
        )
        instance.run_coordinator.submit_run(SubmitRunContext(run, workspace=None))
        submitted = instance.get_run_by_id(run.run_id)
        assert submitted is not None
        instance.run_launcher.launch_run(LaunchRunContext(submitted, workspace=None))
        launched = instance.get_run_by_id(run.run_id)
        assert launched is not None
        return dict(launched.tags)


def test_a_model_bound_run_becomes_a_job_with_gpus(api, home):
    tags = launch(home, ["responses", "vetted_responses", "activations", "vectors"], {})
    (posted,) = api.jobs
    assert posted["path"] == "/apis/batch/v1/namespaces/traits/jobs"
    validate(posted["job"])
    spec = posted["job"]["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"] == {
        "limits": {"nvidia.com/gpu": "4"},
        "requests": {"cpu": "8", "memory": "98304Mi", "nvidia.com/gpu": "4"},
    }
    assert container["image"] == "registry.example/trait-assets:1"
    assert container["args"][:3] == ["dagster", "api", "execute_run"]
    # secrets by reference: their names, never a value
    assert {"secretRef": {"name": "traits-secrets"}}.items() <= container["envFrom"][1].items()
    assert "DAGSTER_POSTGRES_URL" not in json.dumps(container["env"])
    assert spec["backoffLimit"] == 0
    assert {m["mountPath"] for m in container["volumeMounts"]} >= {"/cache", "/state"}
    assert pod["serviceAccountName"] == "dagster"
    assert json.loads(tags["dagster-k8s/config"])["container_config"]["resources"]["limits"] == {
        "nvidia.com/gpu": "4"
    }


def test_a_run_without_a_model_asks_for_no_gpu(api, home):
    tags = launch(home, ["vectors", "vector_evaluation"], {})
    (posted,) = api.jobs
    validate(posted["job"])
    resources = posted["job"]["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert "nvidia.com/gpu" not in json.dumps(resources)
    assert resources["requests"]["cpu"] == "8"
    assert "limits" not in json.loads(tags["dagster-k8s/config"])["container_config"]["resources"]


def test_a_tag_of_the_user_stays(api, home):
    own = {"container_config": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}}
    tags = launch(home, ["responses"], {"dagster-k8s/config": json.dumps(own)})
    assert json.loads(tags["dagster-k8s/config"]) == own
    (posted,) = api.jobs
    resources = posted["job"]["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == {"nvidia.com/gpu": "1"}
