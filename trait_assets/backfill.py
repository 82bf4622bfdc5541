"""`traits backfill`: which runs a backfill makes, and launching it on a running webserver over GraphQL.

Over GraphQL, because only the server's own backfills honour the assets' backfill policy (one run per range of neighbours)
and are listed on its Backfills page. The plan is pure; the client speaks HTTP and knows nothing of Dagster's Python API.
Computing does not belong here: a backfill's runs execute the same stages as every other run.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from storage.errors import UserError

DEFAULT_URL = "http://127.0.0.1:3000"
TIMEOUT_S = 60
# Dagster refuses longer titles
MAX_TITLE = 100

SERVER_QUERY = """
query Server($key: AssetKeyInput!) {
  assetNodeOrError(assetKey: $key) {
    __typename
    ... on AssetNode { partitionKeys repository { name location { name } } }
  }
  assetNodes { assetKey { path } }
  instance { daemonHealth { daemonStatus(daemonType: "BACKFILL") { healthy } } }
}
"""
ADD_PARTITION = """
mutation Add($repository: RepositorySelector!, $set: String!, $key: String!) {
  addDynamicPartition(repositorySelector: $repository, partitionsDefName: $set, partitionKey: $key) {
    __typename
    ... on UnauthorizedError { message }
    ... on PythonError { message }
  }
}
"""
LAUNCH = """
mutation Launch($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on Error { message }
  }
}
"""


@dataclass(frozen=True)
class Backfill:
    """One entry of the Backfills page: these stages of one experiment for these runs of traits."""

    experiment: str
    stages: list[str]
    runs: list[list[str]]
    title: str

    @property
    def asset_keys(self) -> list[list[str]]:
        return [["scenarios"] if s == "scenarios" else [self.experiment, s] for s in self.stages]

    @property
    def traits(self) -> list[str]:
        return [trait for run in self.runs for trait in run]


def plan(
    experiment: str, stages: Sequence[str], runs: Sequence[Sequence[str]], known: Sequence[str], limit: int
) -> list[Backfill]:
    """The backfills whose runs are exactly `runs`: ranges of neighbours in `known`, in that order.

    The server joins neighbours into runs of `limit`, the policy's. So where a run begins right behind one that is not
    full, the two go into different backfills; two backfills are always enough.
    """
    place = {trait: index for index, trait in enumerate(known)}
    parts: tuple[list[list[str]], list[list[str]]] = ([], [])
    part, full = 0, False
    end: int | None = None
    for run in runs:
        touches = end is not None and place[run[0]] == end + 1
        part = (part if full else 1 - part) if touches else 0
        parts[part].append(list(run))
        end, full = place[run[-1]], len(run) == limit
    filled = [part for part in parts if part]
    n_traits = sum(map(len, runs))
    what = f"{experiment}: {_stages_text(stages)} of {n_traits} trait{'s' if n_traits != 1 else ''}"
    titles = [
        what + (f" (part {number} of {len(filled)})" if len(filled) > 1 else "")
        for number in range(1, len(filled) + 1)
    ]
    return [
        Backfill(experiment, list(stages), part_runs, title[-MAX_TITLE:])
        for part_runs, title in zip(filled, titles, strict=True)
    ]


def _stages_text(stages: Sequence[str]) -> str:
    return ", ".join(stages) if len(stages) <= 2 else f"{stages[0]} … {stages[-1]}"


@dataclass
class Server:
    """A Dagster webserver that has this project loaded."""

    url: str = DEFAULT_URL
    known: list[str] = field(default_factory=list)
    assets: set[tuple[str, ...]] = field(default_factory=set)
    repository: dict[str, str] = field(default_factory=dict)
    daemon_healthy: bool | None = None

    def connect(self) -> None:
        """Learn the registered traits, in order, and the assets. UserError where no such server answers."""
        data = self.query(SERVER_QUERY, {"key": {"path": ["scenarios"]}})
        node = data["assetNodeOrError"]
        if node["__typename"] != "AssetNode":
            raise UserError(
                "this webserver has no asset `scenarios`",
                where=self.url,
                remedy="start `make ui` in this project, or give its address with --url",
            )
        self.known = list(node["partitionKeys"])
        self.repository = {
            "repositoryName": node["repository"]["name"],
            "repositoryLocationName": node["repository"]["location"]["name"],
        }
        self.assets = {tuple(asset["assetKey"]["path"]) for asset in data["assetNodes"]}
        self.daemon_healthy = data["instance"]["daemonHealth"]["daemonStatus"]["healthy"]

    def register(self, traits: Sequence[str], partition_set: str) -> None:
        """Add traits that the server does not know yet, in the order given."""
        for trait in traits:
            answer = self.query(
                ADD_PARTITION, {"repository": self.repository, "set": partition_set, "key": trait}
            )["addDynamicPartition"]
            if answer["__typename"] not in ("AddDynamicPartitionSuccess", "DuplicateDynamicPartitionError"):
                raise UserError(
                    f"the trait {trait} cannot be registered: {answer.get('message')}", where=self.url
                )
            self.known.append(trait)

    def launch(self, backfill: Backfill) -> str:
        """Start one backfill; returns its id."""
        unknown = [key for key in backfill.asset_keys if tuple(key) not in self.assets]
        if unknown:
            raise UserError(
                f"the webserver does not know {', '.join('/'.join(key) for key in unknown)}",
                where=self.url,
                remedy="press `Reload definitions` in the UI (or restart it): the experiment is newer than its graph",
            )
        answer = self.query(
            LAUNCH,
            {
                "params": {
                    "assetSelection": [{"path": key} for key in backfill.asset_keys],
                    "partitionNames": backfill.traits,
                    "title": backfill.title,
                    "tags": [
                        {"key": "trait_assets/launched_by", "value": "backfill"},
                        {"key": "trait_assets/experiment", "value": backfill.experiment},
                    ],
                }
            },
        )["launchPartitionBackfill"]
        if answer["__typename"] != "LaunchBackfillSuccess":
            raise UserError(f"the webserver refused the backfill: {answer.get('message')}", where=self.url)
        return str(answer["backfillId"])

    def link(self, backfill_id: str) -> str:
        return f"{self.url.rstrip('/')}/runs/b/{backfill_id}"

    def query(self, text: str, variables: dict[str, Any]) -> dict[str, Any]:
        """One GraphQL request. UserError where nothing or something else answers."""
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"`{self.url}` is not an http address", remedy=f"write e.g. --url {DEFAULT_URL}")
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/graphql",
            data=json.dumps({"query": text, "variables": variables}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            # Dagster answers a query that it does not understand with 400 and says why in the body
            raise UserError(
                f"the webserver answered {error.code}: {error.read()[:300].decode(errors='replace')}",
                where=self.url,
                remedy="check that --url is the Dagster webserver of this project",
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(
                f"no Dagster webserver answers ({getattr(error, 'reason', error)})",
                where=self.url,
                remedy="start `make ui`, give its address with --url, or look at the plan with --dry-run",
            ) from error
        if answer.get("errors"):
            messages = "; ".join(str(error.get("message")) for error in answer["errors"])
            raise UserError(f"the webserver refused the request: {messages}", where=self.url)
        data: dict[str, Any] = answer["data"]
        return data
