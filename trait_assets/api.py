"""For notebooks: a vector with its provenance, and steering of a plain Hugging Face model.

    from trait_assets.api import load_vector, steered

    vector = load_vector("demo", "register/bureaucratic")
    print(vector)                                  # where it comes from, and whether it is still current
    with steered(model, vector, dose=0.15):
        model.generate(**inputs)

Belongs here: what a user types. Does not: running stages (`traits run …` or the Dagster UI do that).
"""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from storage import keys
from storage.errors import UserError
from storage.lineage import Node, Now, Target, lineage
from storage.workspace import Workspace
from trait_assets import paths

if TYPE_CHECKING:
    from resources.models.anatomy import Anatomy
    from trait_assets.vectors.vector import TraitVector

# A model is taken apart once; the entry goes with the model.
_anatomies: weakref.WeakKeyDictionary[Any, Anatomy] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class ProvenVector:
    """A vector of an experiment, with what it was made from.

    `vector`: direction, layer, norms; `provenance`: the lineage tree; `chosen_by`: who chose layer and
    method.
    """

    vector: TraitVector
    experiment: str
    provenance: Node
    chosen_by: str
    # what the choice was published with: dose and numbers, where it was steered
    published: dict[str, Any]

    @property
    def direction(self) -> np.ndarray:
        """[width] float32, length 1."""
        return self.vector.direction

    @property
    def layer(self) -> int:
        return self.vector.layer

    @property
    def current(self) -> bool:
        """Nothing that it was made from has changed since."""
        return self.provenance.state == "current"

    def __str__(self) -> str:
        from rich.console import Console
        from rich.text import Text

        from storage import show

        out = io.StringIO()
        v = self.vector
        head = (
            f"{v.trait}: {v.method}, layer {v.layer}, {v.position}, {v.component}; chosen by {self.chosen_by}"
        )
        tokens = [
            f"averaged over {sample['n_tokens']} tokens of {sample['row']}: {sample['tokens'][:12]}"
            for sample in v.metadata.get("sample_tokens", [])
        ]
        console = Console(file=out, width=120, color_system=None)
        console.print(*map(Text, (head, *tokens)), show.tree(self.provenance), sep="\n")
        return out.getvalue().rstrip()


def workspace() -> Workspace:
    """The results of this repository (TRAITS_STORE, TRAITS_EXPERIMENTS and TRAITS_STATE say otherwise)."""
    return Workspace(paths.results_root(), paths.lineage_path())


def load_vector(
    experiment: str,
    trait: str,
    *,
    layer: int | None = None,
    method: str | None = None,
    position: str | None = None,
    component: str | None = None,
    where: Workspace | None = None,
) -> ProvenVector:
    """The vector of a trait, and where it comes from.

    What is not named is chosen: by steering, where it found one (its published setting), else by the
    evaluation. UserError when the trait has no such vector, or when its file is not the one that its
    manifest names.
    """
    from trait_assets.vectors.vector import VectorFile, vector_folder

    w = workspace() if where is None else where
    place: dict[str, Any] = {"layer": layer, "method": method, "position": position, "component": component}
    published: dict[str, Any] = {}
    chosen_by = "you"
    if any(value is None for value in place.values()):
        best, chosen_by = _best(w, experiment, trait)
        if best is not None:
            if all(value is None or best[name] == value for name, value in place.items()):
                published = {k: v for k, v in best.items() if k not in place}
            else:
                chosen_by += ", but for what you named"
            place = {name: best[name] if value is None else value for name, value in place.items()}
    unknown = [name for name, value in place.items() if value is None]
    if unknown:
        raise UserError(
            f"nothing has chosen a vector of {trait} yet",
            where=experiment,
            remedy=f"Name {', '.join(unknown)}, or materialise `vector_evaluation`.",
        )
    folder = vector_folder(experiment, trait, place["position"], place["component"], place["method"])
    key = f"{folder}/vectors.safetensors"
    for stage in ("vectors", "imported_vectors"):
        manifest = w.manifests.read(experiment, stage, trait)
        if manifest is not None and key in manifest.files:
            data = w.store.read_bytes(key, manifest.files[key])
            vector = VectorFile.from_bytes(data, w.store.describe(key)).vector(int(place["layer"]))
            return ProvenVector(
                vector, experiment, _provenance(w, experiment, stage, trait), chosen_by, published
            )
    raise UserError(
        f"no {place['method']} vectors of {trait} at {place['position']}, {place['component']}",
        where=experiment,
        remedy="Add them to the experiment and materialise `vectors`.",
    )


def _best(w: Workspace, experiment: str, trait: str) -> tuple[dict[str, Any] | None, str]:
    """The setting that steering published, else the one that the evaluation chose, and whose choice it is."""
    steering = w.manifests.read(experiment, "steering_results", trait)
    if steering is not None and steering.summary.get("best_layer") is not None:
        s = steering.summary
        names = ("layer", "method", "position", "component", "dose", "coefficient")
        best = {name: s.get(f"best_{name}") for name in names}
        best |= {
            name: s.get(name) for name in ("validated", "change", "change_low", "change_high", "coherence")
        }
        return best, "steering (validated)" if s.get("validated") else "steering (not validated)"
    key = keys.extraction(experiment, trait, "evaluation", "evaluation.json")
    evaluation = w.manifests.read(experiment, "vector_evaluation", trait)
    if evaluation is not None and key in evaluation.files:
        best = w.store.read_json(key, evaluation.files[key]).get("best")
        if best is not None:
            return dict(best), "cross-validation"
    return None, "nobody"


def _provenance(w: Workspace, experiment: str, stage: str, trait: str) -> Node:
    from trait_assets.scenarios.dataset import trait_hash

    def source_hash(name: str) -> str | None:
        try:
            return trait_hash(paths.dataset_root(), name)
        except (UserError, OSError):
            return None

    return lineage(w, Target(experiment, stage, trait), now=Now(source_hash=source_hash))


@contextmanager
def steered(
    model: Any,
    vector: ProvenVector | TraitVector,
    dose: float,
    *,
    positions: Literal["response", "all"] = "response",
) -> Iterator[None]:
    """Add the vector to a plain Hugging Face causal model inside the with block; nestable, nothing stays
    behind.

    `dose`: ‖added‖ ÷ median ‖h‖ of the vector's layer, negative to steer away. `positions`: `response`
    adds from the last token of each forward pass of a prompt on (with left padding that is where the
    answer begins), `all` at every token. UserError when layer, width or hook site do not fit the model,
    or the median norm is unknown.
    """
    from resources.models.anatomy import dissect, hooks

    v: TraitVector = vector.vector if isinstance(vector, ProvenVector) else vector
    if not np.isfinite(dose):
        raise UserError(f"the dose is {dose}", where="steered", remedy="Give a number such as 0.15.")
    if not np.isfinite(v.median_norm):
        raise UserError(
            "the median norm of its layer is unknown, so a dose means nothing",
            where=f"{v.trait}, {v.method}, layer {v.layer}",
            remedy="Use a vector of an experiment, or set its median_norm (dataclasses.replace).",
        )
    if model not in _anatomies:
        _anatomies[model] = dissect(model)
    anatomy = _anatomies[model]
    site = anatomy.site(v.component, v.layer)
    if site.width != v.width:
        raise UserError(
            f"the vector has width {v.width}, {v.component} of {anatomy.architecture} has width {site.width}",
            where=f"{v.trait}, layer {v.layer}",
            remedy="Steer the model that the vector was extracted from, or one of its kin.",
        )
    import torch

    term = torch.from_numpy(v.direction.astype(np.float32) * np.float32(dose * v.median_norm))

    def add(module: Any, args: Any, output: Any) -> Any:
        value = site.read(output)
        changed = value.float()
        if positions == "response":
            changed = changed.clone()
            changed[:, -1:] += term.to(value.device)
        else:
            changed = changed + term.to(value.device)
        return site.write(output, changed.to(value.dtype))

    with hooks([(site.module, add)]):
        yield
