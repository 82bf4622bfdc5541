"""Two Ray workers, Postgres and an S3 server on this machine, with this project's deploy/ray/dagster.yaml."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from trait_assets.paths import REPOSITORY

HERE = Path(__file__).parent
BUCKET = "traits"


def _machines() -> ModuleType:
    if "tests_machines" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tests_machines", HERE / "machines.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["tests_machines"] = module
        spec.loader.exec_module(module)
    return sys.modules["tests_machines"]


def save_tiny_model(folder: Path) -> None:
    """A random Llama of four blocks with one token per byte, as a folder that loads like any other model."""
    import torch
    import transformers as tf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = ("<pad>", "<bos>", "<eos>")
    vocabulary = {token: index for index, token in enumerate(specials)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    tf.LlamaForCausalLM(config).float().save_pretrained(folder)


@dataclass
class Cluster:
    """What the test drives. `nodes` share nothing but the program, the datasets and the configs: each has a state folder
    of its own."""

    base: Path
    machines: Any
    store: str = f"s3://{BUCKET}/experiments"
    env: dict[str, str] = field(default_factory=dict)
    services: list[Any] = field(default_factory=list)
    nodes: list[Any] = field(default_factory=list)
    web: Any = None
    head_address: str = ""
    names: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def env_of(self, machine: str, **more: str) -> dict[str, str]:
        state = self.base / machine / "state"
        state.mkdir(parents=True, exist_ok=True)
        return {**self.env, "TRAITS_STATE": str(state), **more}

    def traits(self, *arguments: str, machine: str, **env: str) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "trait_assets.cli", *arguments],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=self.env_of(machine, **env),
            timeout=3000,
            check=False,
        )
        assert result.returncode == 0, (
            f"traits {' '.join(arguments)}\n{result.stderr[-3000:]}{result.stdout[-2000:]}"
        )
        return result

    def dagster(self, *arguments: str) -> None:
        result = subprocess.run(
            [str(self.machines.BIN / "dagster"), *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=self.env_of("services", DAGSTER_HOME=str(self.home)),
            timeout=240,
        )
        assert result.returncode == 0, f"dagster {' '.join(arguments)}\n{result.stderr[-3000:]}"

    @property
    def home(self) -> Path:
        return self.base / "services" / "home"

    def join(self, name: str) -> None:
        """Start another worker, and wait until it belongs to the cluster."""
        node = self.machines.ray_worker(name, self.base, self.env_of(name), self.head_address)
        self.nodes.append(node)
        # one after the other: nodes that start on one host at the same moment get in each other's way
        self.machines.wait(
            lambda: node.check() or self.machines.STARTED in node.tail(), 300, f"{name} joins the cluster"
        )

    def stored(self, prefix: str = "") -> list[str]:
        """Keys under a prefix of the store, from the server itself."""
        import boto3

        client = boto3.client("s3", endpoint_url=self.env["AWS_ENDPOINT_URL"], **CREDENTIALS)
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=f"experiments/{prefix}"
        )
        return [one["Key"].removeprefix("experiments/") for page in pages for one in page.get("Contents", [])]

    def running_on(self) -> dict[str, str]:
        """Node → id of the run whose process it executes."""
        found = {}
        for node in self.nodes:
            for process in node.tree():
                try:
                    command = process.cmdline()
                except self.machines.psutil.Error:
                    continue
                if "execute_run" in command:
                    found[node.name] = json.loads(command[-1])["pipeline_run_id"]
        return found

    def report(self) -> str:
        tails = [f"== {s.name}\n{s.tail(1500)}" for s in [*self.services, *self.nodes]]
        return "\n".join(tails)


CREDENTIALS = {
    "aws_access_key_id": "test",
    "aws_secret_access_key": "test",
    "region_name": "us-east-1",
}

TINY = {
    "description": "A tiny random model: what is tested is where it runs.",
    "vet": False,
    # small batches of longish answers: there is a middle of a run in which to kill it
    "max_new_tokens": 40,
    "scenario_limit": 12,
    "batch_size": 2,
    "methods": ["mean_diff", "probe"],
    "n_random": 20,
    "n_permutations": 20,
    "bootstrap": 100,
    "steer": {
        "questions": 4,
        "max_new_tokens": 6,
        "max_candidates": 2,
        "doses": [0.3],
        "refine_steps": 0,
        "controls": 1,
        "bootstrap": 100,
    },
}
TRAITS = [
    "emotion/anger",
    "emotion/enthusiasm",
    "emotion/gloom",
    "language/spanish",
    "register/archaic",
    "register/bureaucratic",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    for module in ("ray", "dagster_ray", "dagster_postgres", "psycopg2", "s3fs", "moto", "boto3"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(
                f"{module} is not installed: `make test-cluster` has an environment of its own for this"
            )
    machines = _machines()
    if machines.Postgres.programs() is None:
        pytest.skip("Postgres is not installed (Debian: apt-get install postgresql)")
    # not pytest's folder: the database's user must be able to enter it, and Ray's sockets want a short path
    base = Path(tempfile.mkdtemp(prefix="traits-cluster-"))
    base.chmod(0o755)
    made = Cluster(base, machines, names=TRAITS, options=TINY)
    try:
        _start(made)
        yield made
    except BaseException:
        print(made.report())
        raise
    finally:
        for service in reversed([*made.services, *made.nodes]):
            service.stop()
        if not os.environ.get("TRAITS_KEEP_CLUSTER"):
            shutil.rmtree(base, ignore_errors=True)


def _start(made: Cluster) -> None:
    machines, base = made.machines, made.base
    save_tiny_model(base / "model")
    for trait in TRAITS:
        shutil.copytree(REPOSITORY / "datasets" / "traits" / trait, base / "datasets" / trait)
    folder = base / "experiments" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({**TINY, "extraction_model": str(base / "model"), "traits": TRAITS})
    )

    postgres = machines.Postgres(base / "postgres").start()
    made.services.append(postgres.service)
    s3, dashboard, web = (machines.free_port() for _ in range(3))
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("OPENAI_", "DAGSTER_", "TRAITS_", "AWS_", "RAY_")) or key == "TRAITS_CACHE"
    }
    made.env = {
        **kept,
        # a run is started as `dagster …` on its node
        "PATH": os.pathsep.join([str(machines.BIN), kept["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRAITS_DATASETS": str(base / "datasets"),
        "TRAITS_EXPERIMENTS": str(base / "experiments"),
        "TRAITS_STORE": made.store,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "DAGSTER_POSTGRES_URL": postgres.url,
        "DAGSTER_RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    moto = machines.Service(
        "s3",
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(s3)],
        made.env,
        base / "s3.log",
    ).start()
    made.services.append(moto)

    gcs = machines.free_port()
    head = machines.ray_head(base, made.env_of("head"), gcs, dashboard)
    made.services.append(head)
    machines.wait(lambda: machines.answers(f"http://127.0.0.1:{s3}/moto-api/"), 240, "the S3 server answers")
    import boto3

    boto3.client("s3", endpoint_url=made.env["AWS_ENDPOINT_URL"], **CREDENTIALS).create_bucket(Bucket=BUCKET)

    made.home.mkdir(parents=True)
    shutil.copy(REPOSITORY / "deploy" / "ray" / "dagster.yaml", made.home)
    made.dagster("instance", "concurrency", "set", "gpu", "2")
    made.dagster("instance", "concurrency", "set", "judge", "4")

    machines.wait(
        lambda: machines.answers(f"http://127.0.0.1:{dashboard}/api/version"), 240, "Ray takes jobs"
    )
    made.head_address = f"{machines.own_address()}:{gcs}"
    made.join("worker1")
    made.join("worker2")

    services_env = made.env_of("services", DAGSTER_HOME=str(made.home))

    def service(name: str, *command: str) -> None:
        program = [str(machines.BIN / command[0]), *command[1:], "-w", "workspace.yaml"]
        made.services.append(
            machines.Service(name, program, services_env, base / f"{name}.log", REPOSITORY).start()
        )

    service("webserver", "dagster-webserver", "-h", "127.0.0.1", "-p", str(web))
    made.web = machines.Webserver(f"http://127.0.0.1:{web}")
    machines.wait(lambda: machines.answers(f"{made.web.url}/server_info"), 240, "the webserver answers")
    # this test launches by itself what the sensors would launch, so they are stopped before the daemon starts
    made.web.stop_sensors()
    service("daemon", "dagster-daemon", "run")
