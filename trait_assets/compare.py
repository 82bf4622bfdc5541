"""Two experiments side by side: which inputs, options and numbers differ, and how far apart their vectors
lie.

Belongs here: comparing what manifests and vector files say. Does not: judging which is better, printing
colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from storage.errors import ArtifactError, UserError
from storage.keys import check_experiment

if TYPE_CHECKING:
    from rich.console import Group

    from storage.manifest import Manifest
    from storage.workspace import Workspace
    from trait_assets.vectors.vector import VectorFile

Kind = Literal["result", "option", "input", "code", "library", "number"]


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same; `trait` is None for a table over all traits, None as a value: not
    there.
    """

    trait: str | None
    stage: str
    kind: Kind
    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Cosine:
    """Cosine between the two experiments' vectors of one place; None with the reason in `note`."""

    trait: str
    position: str
    component: str
    method: str
    layer: int
    cosine: float | None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """`same`: (trait, stage) of results whose fingerprints agree, so that nothing can differ."""

    a: str
    b: str
    differences: tuple[Difference, ...]
    cosines: tuple[Cosine, ...]
    same: tuple[tuple[str | None, str], ...]

    def record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "differences": [asdict(difference) for difference in self.differences],
            "cosines": [asdict(cosine) for cosine in self.cosines],
            "same": [{"trait": trait, "stage": stage} for trait, stage in self.same],
        }


def compare_experiments(
    workspace: Workspace, a: str, b: str, traits: Iterable[str] | None = None
) -> Comparison:
    """Compare the current results of experiments `a` and `b`, of all traits or of some.

    UserError when one of them has no results at all. A damaged result counts as not there, and says so.
    """
    check_experiment(a)
    check_experiment(b)
    wanted = None if traits is None else set(traits)
    ours, theirs = (_results(workspace, name, wanted) for name in (a, b))
    for name, found in ((a, ours), (b, theirs)):
        if not found:
            raise UserError(f"experiment {name} has no results", remedy=f"Run `traits run {name}` first.")
    differences: list[Difference] = []
    same: list[tuple[str | None, str]] = []
    cosines: list[Cosine] = []
    for trait, stage in sorted({*ours, *theirs}, key=lambda place: (place[0] or "~", place[1])):
        one, other = ours.get((trait, stage)), theirs.get((trait, stage))
        if isinstance(one, str) or isinstance(other, str) or one is None or other is None:
            differences.append(Difference(trait, stage, "result", "state", _said(one), _said(other)))
            continue
        if one.fingerprint == other.fingerprint:
            same.append((trait, stage))
        differences += _differences(trait, stage, one, other)
        if stage == "vectors":
            cosines += _cosines(workspace, one, other)
    return Comparison(a, b, tuple(differences), tuple(cosines), tuple(same))


def _results(
    workspace: Workspace, experiment: str, wanted: set[str] | None
) -> dict[tuple[str | None, str], Manifest | str]:
    """(trait, stage) → manifest, or the sentence that says why it cannot be read."""
    found: dict[tuple[str | None, str], Manifest | str] = {}
    for key in workspace.manifests.keys(experiment):
        stage, _, rest = key.split("/manifests/", 1)[1].removesuffix(".json").partition("/")
        trait = rest or None
        if wanted is not None and trait is not None and trait not in wanted:
            continue
        try:
            manifest = workspace.manifests.read_key(key)
        except ArtifactError as error:
            found[trait, stage] = error.what
            continue
        if manifest is not None:
            found[trait, stage] = manifest
    return found


def _said(result: Manifest | str | None) -> str | None:
    return result if result is None or isinstance(result, str) else result.status


def _differences(trait: str | None, stage: str, a: Manifest, b: Manifest) -> list[Difference]:
    parts: list[tuple[Kind, Mapping[str, Any], Mapping[str, Any]]] = [
        ("result", {"status": a.status}, {"status": b.status}),
        ("code", {"code_version": a.code_version}, {"code_version": b.code_version}),
        ("option", _flat(a.options), _flat(b.options)),
        ("input", a.inputs, b.inputs),
        ("library", a.libraries, b.libraries),
        ("number", _numbers(a.summary), _numbers(b.summary)),
    ]
    return [
        Difference(trait, stage, kind, name, one.get(name), other.get(name))
        for kind, one, other in parts
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name) or type(one.get(name)) is not type(other.get(name))
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested options by dotted path; lists are values."""
    if isinstance(value, Mapping) and value:
        return {
            name: leaf
            for key, inner in value.items()
            for name, leaf in _flat(inner, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: value} if path else {}


# How long a run took says nothing about what it found.
_NOT_COMPARED = frozenset(
    [
        "seconds_since_start",
        "generated_now",
        "from_cache",
        "captured_now",
        "reused",
        "judged_now",
        "rows_per_second",
        "tokens_per_second",
        "gpu_peak_gib",
        "judge_tokens",
        "judge_cost_usd",
        "checks",
    ]
)


def _numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in summary.items()
        if name not in _NOT_COMPARED and isinstance(value, int | float | str)
    }


def _cosines(workspace: Workspace, a: Manifest, b: Manifest) -> list[Cosine]:
    ours, theirs = _vector_files(workspace, a), _vector_files(workspace, b)
    found = []
    for place in sorted({*ours} & {*theirs}):
        one, other = ours[place], theirs[place]
        for layer in sorted({*one.layers} & {*other.layers}):
            u, v = one.vector(layer), other.vector(layer)
            where = (str(a.trait), *place, layer)
            if u.width != v.width:
                found.append(Cosine(*where, None, f"widths {u.width} and {v.width}"))
            else:
                found.append(Cosine(*where, float(u.direction @ v.direction)))
    return found


def _vector_files(workspace: Workspace, manifest: Manifest) -> dict[tuple[str, str, str], VectorFile]:
    from trait_assets.vectors.vector import VectorFile

    files = {}
    for key, record in manifest.files.items():
        if key.endswith("/vectors.safetensors"):
            data = workspace.store.read_bytes(key, record)
            file = VectorFile.from_bytes(data, workspace.store.describe(key))
            files[file.position, file.component, file.method] = file
    return files


def show(comparison: Comparison) -> Group:
    """The comparison as tables for Rich: what differs, then the cosines with the least alike first."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    what = Table(title=f"{comparison.a} against {comparison.b}")
    for name in ("trait", "stage", "kind", "name", comparison.a, comparison.b):
        what.add_column(Text(name), overflow="fold")
    for d in comparison.differences:
        what.add_row(
            Text(d.trait or "all traits"), d.stage, d.kind, Text(d.name), Text(_cell(d.a)), Text(_cell(d.b))
        )
    cosines = Table(title="cosine between the vectors, over the layers both have")
    for name in ("trait", "position", "component", "method", "layers", "least", "at layer", "median"):
        cosines.add_column(name)
    groups: dict[tuple[str, str, str, str], list[Cosine]] = {}
    for c in comparison.cosines:
        groups.setdefault((c.trait, c.position, c.component, c.method), []).append(c)
    for place, members in groups.items():
        known = sorted((c.cosine, c.layer) for c in members if c.cosine is not None)
        if known:
            numbers = (f"{known[0][0]:.4f}", str(known[0][1]), f"{known[len(known) // 2][0]:.4f}")
        else:
            numbers = (members[0].note, "", "")
        cosines.add_row(*map(Text, (*place, str(len(members)), *numbers)))
    return Group(what, cosines) if comparison.cosines else Group(what)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
