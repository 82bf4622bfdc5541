"""A cluster on one machine: Postgres, an S3 server, Ray nodes that can be killed, and Dagster's two services.

Each is a process (tree) of its own that the test starts and ends by its id; nothing is mocked.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
# the least that Ray accepts
STORE_BYTES = 80 * 2**20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_address() -> str:
    """This machine's address as Ray sees it: nodes of one host do not find one another by 127.0.0.1."""
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


def wait(until: Callable[[], Any], seconds: float, what: str, every: float = 0.25) -> Any:
    """The first true answer of `until`; AssertionError naming `what` when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := until():
            return answer
        time.sleep(every)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@dataclass
class Service:
    """A process and everything below it; its output is kept for the report of a failure."""

    name: str
    command: list[str]
    env: Mapping[str, str]
    log: Path
    cwd: Path | None = None
    user: str | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Service:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.env),
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                user=self.user,
                group=self.user,
            )
        return self

    def tree(self) -> list[psutil.Process]:
        if self.process is None:
            return []
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def check(self) -> None:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.name} ended:\n{self.tail()}"

    def kill(self) -> None:
        """SIGKILL for the process and everything below it, as a power cut does it."""
        for victim in self.tree():
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
        if self.process is not None:
            self.process.wait(30)

    def stop(self, with_signal: int = signal.SIGTERM, patience: float = 10) -> None:
        below = self.tree()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(with_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        for left in below:
            try:
                left.kill()
            except psutil.NoSuchProcess:
                continue

    def tail(self, n: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-n:] if self.log.exists() else ""


@dataclass
class Postgres:
    """A database cluster of its own in a folder, on a unix socket there and on a loopback port."""

    folder: Path
    port: int = field(default_factory=free_port)
    service: Service | None = None

    @staticmethod
    def programs() -> Path | None:
        """The newest server that Debian's packages put under /usr/lib/postgresql, or one on the path."""
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
        if found:
            return found[-1].parent
        on_path = shutil.which("initdb")
        return Path(on_path).parent if on_path else None

    @property
    def url(self) -> str:
        return f"postgresql://traits:secret@127.0.0.1:{self.port}/dagster"

    def start(self) -> Postgres:
        programs = self.programs()
        assert programs is not None
        user: str | None = None
        self.folder.mkdir(parents=True)
        if os.geteuid() == 0:
            # the server refuses to run as root
            shutil.chown(self.folder, "postgres", "postgres")
            user = "postgres"
        data = self.folder / "data"
        password = self.folder / "password"
        password.write_text("secret")
        password.chmod(0o644)
        subprocess.run(
            [
                str(programs / "initdb"),
                "-D",
                str(data),
                "-U",
                "traits",
                "--pwfile",
                str(password),
                "--auth=scram-sha-256",
                "--no-sync",
                "-E",
                "UTF8",
            ],
            check=True,
            capture_output=True,
            cwd="/",
            user=user,
            group=user,
        )
        self.service = Service(
            "postgres",
            [
                str(programs / "postgres"),
                "-D",
                str(data),
                "-p",
                str(self.port),
                "-k",
                str(self.folder),
                "-c",
                "listen_addresses=127.0.0.1",
                "-c",
                "fsync=off",
            ],
            os.environ,
            self.folder.parent / "postgres.log",
            Path("/"),
            user,
        ).start()
        wait(self._ready, 30, "Postgres takes connections")
        return self

    def _ready(self) -> bool:
        import psycopg2

        assert self.service is not None
        self.service.check()
        try:
            connection = psycopg2.connect(self.url.replace("/dagster", "/postgres"))
        except psycopg2.OperationalError:
            return False
        try:
            connection.autocommit = True
            connection.cursor().execute("CREATE DATABASE dagster")
        finally:
            connection.close()
        return True

    def stop(self) -> None:
        if self.service is not None:
            self.service.stop(signal.SIGINT)


SETTINGS = {
    "RAY_memory_monitor_refresh_ms": "0",
    # on a busy machine a slow answer is no dead node; a killed one is noticed by its broken connection
    "RAY_health_check_timeout_ms": "60000",
    "RAY_raylet_start_wait_time_s": "240",
    "RAY_USAGE_STATS_ENABLED": "0",
}
STARTED = "Ray runtime started"
HEAD = f"""
import json, sys, time
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args=json.loads(sys.argv[1]))
print({STARTED!r}, flush=True)
while True:
    time.sleep(60)
"""


def ray_head(folder: Path, env: Mapping[str, str], port: int, dashboard: int) -> Service:
    """The head node, which takes jobs and runs none.

    Not by `ray start --block`, which also starts the server of Ray's client protocol, unused here, and ends with it.
    """
    arguments = {
        "num_cpus": 0,
        "num_gpus": 0,
        "object_store_memory": STORE_BYTES,
        "gcs_server_port": port,
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": dashboard,
        "dashboard_agent_listen_port": free_port(),
        "metrics_export_port": free_port(),
        "node_ip_address": own_address(),
    }
    (folder / "ray").mkdir()
    command = [sys.executable, "-c", HEAD, json.dumps(arguments)]
    settings = {**SETTINGS, "RAY_TMPDIR": str(folder)}
    return Service("head", command, {**env, **settings}, folder / "head.log", folder).start()


def ray_worker(name: str, folder: Path, env: Mapping[str, str], address: str) -> Service:
    """A worker (`ray start --block`): its raylet and agents, and the runs it executes, are its process tree.

    Its GPU is one in name only: it makes Ray place one model-bound run per worker.
    """
    command = [str(BIN / "ray"), "start", "--block", f"--address={address}", "--num-cpus=1", "--num-gpus=1"]
    # every node of the one host needs ports of its own
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"]
    command += [f"--object-store-memory={STORE_BYTES}", f"--node-ip-address={own_address()}"]
    settings = {**SETTINGS, "RAY_TMPDIR": str(folder)}
    return Service(name, command, {**env, **settings}, folder / f"{name}.log", folder).start()


@dataclass
class Webserver:
    """Dagster's GraphQL, as the UI asks it."""

    url: str

    def query(self, text: str, **variables: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}/graphql",
            data=json.dumps({"query": text, "variables": variables}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.loads(response.read())
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    def runs(self) -> list[dict[str, Any]]:
        """Every run: runId, status, tags (as a dictionary), oldest first."""
        data = self.query("{ runsOrError { ... on Runs { results { runId status tags { key value } } } } }")[
            "runsOrError"
        ]["results"]
        return [{**run, "tags": {t["key"]: t["value"] for t in run["tags"]}} for run in reversed(data)]

    def backfills(self) -> dict[str, str]:
        """id → status."""
        data = self.query(
            "{ partitionBackfillsOrError { ... on PartitionBackfills { results { id status } } } }"
        )
        return {one["id"]: one["status"] for one in data["partitionBackfillsOrError"]["results"]}

    def stop_sensors(self) -> None:
        found = self.query(
            "{ repositoriesOrError { ... on RepositoryConnection { nodes { sensors { name sensorState { id } } } } } }"
        )
        for node in found["repositoriesOrError"]["nodes"]:
            for sensor in node["sensors"]:
                answer = self.query(
                    "mutation Stop($id: String!) { stopSensor(id: $id) { __typename } }",
                    id=sensor["sensorState"]["id"],
                )
                assert answer["stopSensor"]["__typename"] == "StopSensorMutationResult", answer
