"""What a result was made from, as a tree: every input down to the scenario lines, and whether each is
still current.

Belongs here: following manifests. Does not: SQL (`index.py`; the manifests alone tell this, so a locked
or missing index is no obstacle), printing (`show.py`), how today's code or trait folders are read (the
caller says).
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from storage import keys
from storage.errors import ArtifactError, UserError
from storage.manifest import Manifest
from storage.metrics import metrics_key
from storage.workspace import Workspace

# current: what counts now, made from what counts now. outdated: something it was made from is another
# now. replaced: a newer result counts. damaged: a file is missing or altered. recorded: a fact, nothing
# to compare with.
State = Literal["current", "outdated", "replaced", "damaged", "missing", "recorded"]
Kind = Literal["number", "result", "model", "judge", "options", "source", "scenario", "input"]

_HEX = re.compile(r"[0-9a-f]{6,32}")
# Where each stage's row tables carry their identifying columns; asked for by name in `Target.where`.
_MAX_NUMBERS = 12


@dataclass(frozen=True)
class Target:
    """Which result is asked about; `where` narrows it to rows (layer, method, position, component, name
    …).
    """

    experiment: str | None
    stage: str
    trait: str | None
    fingerprint: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """One thing that took part. `facts`: plain values; `why`: one sentence where the state is not current."""

    kind: Kind
    title: str
    state: State
    why: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    children: tuple[Node, ...] = ()

    def record(self, _seen: set[int] | None = None) -> dict[str, Any]:
        """Plain data for JSON. What was shown before in full says so in `above` instead of being repeated."""
        seen = set() if _seen is None else _seen
        above = id(self) in seen and bool(self.children)
        seen.add(id(self))
        return {
            "kind": self.kind,
            "title": self.title,
            "state": self.state,
            "why": self.why,
            "facts": dict(self.facts),
            "above": above,
            "children": [] if above else [child.record(seen) for child in self.children],
        }

    def walk(self) -> list[Node]:
        """This node and all below it, top down."""
        return [self, *(node for child in self.children for node in child.walk())]


@dataclass(frozen=True)
class Now:
    """What is true today outside the store; without it those facts are shown as recorded only.

    `source_hash(trait)`: content hash of the trait folder, None when it is gone; `code_versions`: stage →
    version.
    """

    source_hash: Callable[[str], str | None] | None = None
    code_versions: Mapping[str, str] = field(default_factory=dict)


def find(workspace: Workspace, text: str, *, stage: str | None = None, **where: Any) -> Target:
    """The result that `text` names: a fingerprint (its first 6 characters or more), a file of a result
    (path or storage key), or `experiment/category/trait[/stage]`, `experiment/stage` for a table.

    Without a stage, the last one that the trait has. UserError when nothing, or more than one thing, fits.
    """
    where = {name: value for name, value in where.items() if value is not None}
    for attempt in (_find_fingerprint, _find_file, _find_name):
        found = attempt(workspace, text.strip(), stage)
        if found is not None:
            return Target(found.experiment, found.stage, found.trait, found.fingerprint, where)
    raise UserError(
        f"nothing stored is called {text!r}",
        remedy=(
            "Give experiment/category/trait (and --stage), the path of a result's file, or the first "
            "characters of a fingerprint."
        ),
    )


def _tops(workspace: Workspace) -> list[str | None]:
    names = [name for name in workspace.store.children() if not name.startswith((".", "_"))]
    return [None, *names]


def _find_fingerprint(workspace: Workspace, text: str, stage: str | None) -> Manifest | None:
    if not _HEX.fullmatch(text):
        return None
    hits = {
        key.rsplit("/", 1)[-1].split("-")[0]: key
        for top in _tops(workspace)
        for key in workspace.store.list(f"{keys.scope(top)}/history")
        if key.rsplit("/", 1)[-1].startswith(text) and (stage is None or f"/history/{stage}/" in key)
    }
    if len(hits) > 1:
        raise UserError(f"{len(hits)} results begin with {text}", remedy="Give more characters.")
    return workspace.manifests.read_key(next(iter(hits.values()))) if hits else None


def _find_file(workspace: Workspace, text: str, stage: str | None) -> Manifest | None:
    key = text
    root = workspace.store.local_path("x")
    if root is not None and (os.path.isabs(text) or Path(text).exists()):
        absolute = Path(os.path.abspath(text))
        if not absolute.is_relative_to(root.parent):
            return None
        key = absolute.relative_to(root.parent).as_posix()
    parts = key.split("/")
    if len(parts) < 4:
        return None
    top = parts[0] if not parts[0].startswith("_") else None
    trait = "/".join(parts[2:4]) if top is not None else "/".join(parts[1:3])
    try:
        keys.check_trait(trait)
        candidates = [
            manifest
            for place in dict.fromkeys((top, None))
            for manifest in _current_of(workspace, place, trait)
        ]
    except UserError:
        return None
    for manifest in candidates:
        named = any(file == key or file.startswith(f"{key}/") for file in manifest.files)
        if named and (stage is None or stage == manifest.stage):
            return manifest
    return None


def _find_name(workspace: Workspace, text: str, stage: str | None) -> Manifest | None:
    parts = text.split("/")
    if len(parts) == 4 and stage is None:
        *parts, stage = parts
    if len(parts) == 3:
        experiment, trait = parts[0], "/".join(parts[1:])
    elif len(parts) == 2 and stage is None:  # a table
        return workspace.manifests.read(keys.check_experiment(parts[0]), keys.check_stage(parts[1]), None)
    elif len(parts) == 1 and stage is not None:
        return workspace.manifests.read(keys.check_experiment(parts[0]), stage, None)
    else:
        return None
    keys.check_experiment(experiment)
    keys.check_trait(trait)
    if stage is not None:
        own = workspace.manifests.read(experiment, stage, trait)
        return own if own is not None else workspace.manifests.read(None, stage, trait)
    found = _current_of(workspace, experiment, trait)
    if not found:
        return None
    # the last one is the one that no other was made from
    used = {value for manifest in found for value in manifest.inputs.values()}
    last = [manifest for manifest in found if manifest.fingerprint not in used]
    return max(last or found, key=lambda manifest: (manifest.status == "done", manifest.created_at))


def _current_of(workspace: Workspace, experiment: str | None, trait: str) -> list[Manifest]:
    """The trait's current manifests within one experiment (or of what is shared)."""
    top = f"{keys.scope(experiment)}/manifests"
    found = []
    for name in workspace.store.children(top):
        if not name.endswith(".json"):
            try:
                manifest = workspace.manifests.read(experiment, name, trait)
            except ArtifactError:
                continue
            if manifest is not None:
                found.append(manifest)
    return found


def lineage(workspace: Workspace, target: Target, *, now: Now | None = None, lines: int | None = 3) -> Node:
    """The tree above `target`. `lines`: how many scenario lines per side are shown (None: all).

    UserError when the result does not exist.
    """
    tree = _Tree(workspace, now or Now(), lines)
    manifest = tree.target(target)
    node = tree.result(manifest)
    numbers = _numbers(workspace, manifest, target.where) if target.where else None
    if numbers is None:
        return node
    said = ", ".join(f"{name} {value}" for name, value in target.where.items())
    if not numbers:
        raise UserError(
            f"`{manifest.stage}` of {manifest.trait or manifest.experiment} has no row with {said}",
            remedy="Leave out what narrows it, or look at `traits sql` for the rows there are.",
        )
    of = manifest.trait or manifest.experiment or ""
    title = f"{said} of {of}" if len(numbers) == 1 else f"{said} of {of} ({len(numbers)} rows)"
    facts: dict[str, Any] = {}
    for row in numbers[:_MAX_NUMBERS]:
        if set(row) >= {"name", "value"}:
            rest = [f"{k} {v}" for k, v in row.items() if k not in ("name", "value", *target.where)]
            facts[" ".join([str(row["name"]), *rest])] = row["value"]
        else:
            label = f"{row.get('table', 'row')} " if len(numbers) > 1 else ""
            facts.update({f"{label}{k}": v for k, v in row.items() if k not in ("table", *target.where)})
    return Node("number", title, node.state, node.why, facts, (node,))


def _numbers(
    workspace: Workspace, manifest: Manifest, where: Mapping[str, Any]
) -> list[dict[str, Any]] | None:
    """The result's metric rows that fit `where`, without empty cells and common columns."""
    import pyarrow.parquet as pq

    from storage.metrics import COMMON

    key = metrics_key(
        manifest.experiment, manifest.stage, manifest.trait, manifest.fingerprint, manifest.run_id
    )
    table = pq.read_table(io.BytesIO(workspace.store.read_bytes(key)))
    rows = []
    for row in table.drop_columns(list(COMMON)).to_pylist():
        if all(str(row.get(name)) == str(value) for name, value in where.items()):
            rows.append({name: value for name, value in row.items() if value is not None})
    return rows


class _Tree:
    def __init__(self, workspace: Workspace, now: Now, lines: int | None) -> None:
        self.workspace = workspace
        self.now = now
        self.lines = lines
        self._by_fingerprint: dict[tuple[str | None, str | None], dict[str, list[str]]] = {}
        self._nodes: dict[str, Node] = {}

    def target(self, target: Target) -> Manifest:
        current = self.workspace.manifests.read(target.experiment, target.stage, target.trait)
        if target.fingerprint is None or (current is not None and current.fingerprint == target.fingerprint):
            if current is not None:
                return current
        else:
            for key in self._keys(target.experiment, target.trait).get(target.fingerprint, []):
                manifest = self.workspace.manifests.read_key(key)
                if manifest is not None:
                    return manifest
        raise UserError(
            f"{target.trait or target.experiment} has no `{target.stage}`"
            + (f" {target.fingerprint}" if target.fingerprint else ""),
            remedy=f"Materialise `{target.stage}` first.",
        )

    def _keys(self, experiment: str | None, trait: str | None) -> dict[str, list[str]]:
        """fingerprint → history keys, newest name last, of a trait (None: of everything in the
        experiment).
        """
        place = (experiment, trait)
        if place not in self._by_fingerprint:
            store, top = self.workspace.store, f"{keys.scope(experiment)}/history"
            if trait is None:
                found = store.list(top)
            else:
                found = [key for stage in store.children(top) for key in store.list(f"{top}/{stage}/{trait}")]
            table: dict[str, list[str]] = {}
            for key in found:
                table.setdefault(key.rsplit("/", 1)[-1].split("-")[0], []).append(key)
            self._by_fingerprint[place] = table
        return self._by_fingerprint[place]

    def _made_from(self, manifest: Manifest, value: str) -> Manifest | None:
        """The result with that fingerprint: the current one where it still counts, else the newest in
        history.
        """
        for experiment in dict.fromkeys((manifest.experiment, None)):
            found = []
            for key in self._keys(experiment, manifest.trait).get(value, []):
                try:
                    read = self.workspace.manifests.read_key(key)
                except ArtifactError:
                    continue
                if read is not None:
                    found.append(read)
            if found:
                return max(found, key=lambda m: m.created_at)
        return None

    def result(self, manifest: Manifest) -> Node:
        mark = f"{manifest.experiment}|{manifest.stage}|{manifest.trait}|{manifest.fingerprint}"
        if mark not in self._nodes:
            self._nodes[mark] = self._result(manifest)
        return self._nodes[mark]

    def _result(self, manifest: Manifest) -> Node:
        children = [self._input(manifest, name, value) for name, value in manifest.inputs.items()]
        children += _participants(manifest)
        if manifest.stage == "scenarios":
            children += self._scenario_lines(manifest)
        state, why = self._state(manifest, children)
        facts: dict[str, Any] = {
            "fingerprint": manifest.fingerprint,
            "run": manifest.run_id,
            "created": manifest.created_at,
            "code version": manifest.code_version,
            "libraries": ", ".join(f"{name} {version}" for name, version in manifest.libraries.items()),
        }
        if manifest.stage == "responses":
            facts |= self._lines_used(manifest)
        if manifest.status == "skipped":
            facts["skipped"] = manifest.summary.get("skipped", True)
        of = manifest.trait or manifest.experiment or "all"
        title = f"{manifest.stage} of {of}"
        if manifest.trait and manifest.experiment:
            title += f" in {manifest.experiment}"
        return Node("result", title, state, why, facts, tuple(children))

    def _state(self, manifest: Manifest, children: list[Node]) -> tuple[State, str]:
        try:
            current = self.workspace.manifests.read(manifest.experiment, manifest.stage, manifest.trait)
        except ArtifactError as error:
            return "damaged", error.what
        if current is None:
            return "missing", "its manifest was taken back"
        if current.fingerprint != manifest.fingerprint:
            return "replaced", f"now it is {current.fingerprint[:8]} of {current.created_at}"
        problems = self.workspace.manifests.verify(current)
        if problems:
            return "damaged", problems[0]
        version = self.now.code_versions.get(manifest.stage)
        if version is not None and version != manifest.code_version:
            return "outdated", f"the code of this stage is version {version} now"
        for child in children:
            if child.state not in ("current", "recorded"):
                return "outdated", f"{child.title} is {child.state}"
        return "current", ""

    def _input(self, manifest: Manifest, name: str, value: str) -> Node:
        upstream = self._made_from(manifest, value)
        if upstream is not None:
            return self.result(upstream)
        if manifest.trait is not None and manifest.stage == "scenarios":
            return self._source(manifest.trait, name, value)
        state: State = "missing" if re.fullmatch(r"[0-9a-f]{32}", value) else "recorded"
        why = "nothing with this fingerprint is stored" if state == "missing" else ""
        return Node("input", name, state, why, {"value": value})

    def _source(self, trait: str, name: str, value: str) -> Node:
        title = f"{name} of the folder {trait}"
        if self.now.source_hash is None:
            return Node("source", title, "recorded", "", {"hash": value})
        today = self.now.source_hash(trait)
        if today is None:
            return Node("source", title, "missing", "the folder cannot be read any more", {"hash": value})
        if today != value:
            return Node(
                "source", title, "outdated", "the files were edited since", {"hash": value, "now": today}
            )
        return Node("source", title, "current", "", {"hash": value})

    def _lines_used(self, manifest: Manifest) -> dict[str, str]:
        """Which lines of the trait's files were answered: vetting and a limit leave some out."""
        try:
            rows = _numbers(self.workspace, manifest, {"table": "responses"}) or []
        except ArtifactError:
            return {}
        used: dict[str, list[int]] = {}
        for row in rows:
            if "line" in row and "polarity" in row:
                used.setdefault(f"{row['polarity']} lines used", []).append(int(row["line"]))
        return {name: ", ".join(map(str, sorted(lines))) for name, lines in sorted(used.items())}

    def _scenario_lines(self, manifest: Manifest) -> list[Node]:
        if manifest.trait is None or (self.lines is not None and self.lines <= 0):
            return []
        key = keys.scenario_set(manifest.trait)
        try:
            content = self.workspace.store.read_json(key, manifest.files.get(key))
        except ArtifactError:
            return []  # the state of the result says so
        nodes = []
        for polarity in ("positive", "negative"):
            side = content.get(f"{polarity}s", [])
            shown = side if self.lines is None else side[: self.lines]
            for row in shown:
                nodes.append(Node("scenario", f"{polarity}, line {row['line']}: {row['prompt']}", "recorded"))
            if len(side) > len(shown):
                nodes.append(Node("scenario", f"… and {len(side) - len(shown)} more {polarity}", "recorded"))
        return nodes


def _participants(manifest: Manifest) -> list[Node]:
    """Models, judge and options, as the manifest recorded them."""
    nodes = []
    rest: dict[str, Any] = {}
    for name, value in manifest.options.items():
        if isinstance(value, Mapping) and name.endswith("model") and value.get("model"):
            revision = value.get("revision") or "no revision"
            nodes.append(Node("model", f"{name} {value['model']} @ {revision}", "recorded", "", dict(value)))
        elif isinstance(value, Mapping) and name == "judge":
            title = value.get("model") or value.get("name") or value.get("kind") or "unknown"
            nodes.append(Node("judge", f"judge {title}", "recorded", "", dict(value)))
        else:
            rest[name] = value
    if rest:
        nodes.append(Node("options", "options", "recorded", "", rest))
    return nodes
