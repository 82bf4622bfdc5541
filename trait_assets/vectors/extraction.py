"""Stage 3: one vector file per position, component and method, fitted on the train activations.

Plans and lays out files; the fitting is in `fit` and `methods`. No model is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trait_assets.activations.dataset import activation_sites
from trait_assets.pipeline import Check, Outcome, Plan, StageContext


class VectorsStage:
    """`vectors/{position}/{component}/{method}/`: vectors.safetensors with all layers, and metadata.json."""

    name = "vectors"
    # 2: the metadata shows which tokens were averaged
    code_version = "2"
    shared = False

    def plan(self, ctx: StageContext, trait: str) -> Plan:
        from trait_assets.vectors.methods import get_method

        activations = ctx.upstream("activations", trait)
        methods = list(dict.fromkeys(ctx.experiment.methods))
        for method in methods:
            get_method(method)
        options = {"methods": methods, "seed": ctx.experiment.seed}
        return Plan(trait, {"activations": activations.fingerprint}, options, payload=activations)

    def execute(self, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]:
        with ctx.progress.task(f"vectors · {len(plans)} traits", len(plans)) as task:
            for plan in plans:
                try:
                    outcome = self._fit(ctx, plan)
                except Exception as error:
                    outcome = Outcome(plan.trait, error=error)
                task.advance(1)
                yield outcome

    def _fit(self, ctx: StageContext, plan: Plan) -> Outcome:
        from trait_assets.activations.dataset import load_activations
        from trait_assets.activations.tokens import sample_table
        from trait_assets.vectors.fit import fit_vectors
        from trait_assets.vectors.vector import vector_folder

        trait, methods = plan.trait, plan.options["methods"]
        assert trait is not None
        outcome = Outcome(trait)
        table: list[dict[str, Any]] = []
        samples: dict[str, list[dict[str, Any]]] = {}
        left_out: set[str] = set()
        unconverged: list[str] = []
        for position, component in activation_sites(plan.payload.options):
            activations = load_activations(
                ctx.workspace, ctx.experiment.name, trait, position, component, "train"
            )
            source = activations.metadata
            samples[position] = source.get("sample_tokens", [])
            metadata: dict[str, Any] = {
                key: source.get(key)
                for key in ("model", "dtype", "hook_site", "layer_convention", "sample_tokens")
                if key in source
            }
            metadata |= {
                "seed": plan.options["seed"],
                "data_fingerprint": plan.inputs["activations"],
                "vectors_fingerprint": plan.fingerprint,
                "code_version": self.code_version,
            }
            for name, file in fit_vectors(
                activations, methods, plan.options["seed"], metadata=metadata
            ).items():
                folder = vector_folder(ctx.experiment.name, trait, position, component, name)
                outcome.files[f"{folder}/vectors.safetensors"] = file.pack()
                record = file.record()
                outcome.files[f"{folder}/metadata.json"] = record
                left_out |= {f"layer {e['layer']}: {e['reason']}" for e in file.metadata["excluded_layers"]}
                for layer, facts in record["layers"].items():
                    where = {
                        "layer": int(layer),
                        "method": name,
                        "position": position,
                        "component": component,
                    }
                    for metric in ("norm", "baseline", "train_acc", "norm_over_median_norm"):
                        if facts[metric] is not None:
                            outcome.metrics.append({"name": metric, "value": facts[metric], **where})
                    if facts.get("converged") is False:
                        unconverged.append(f"{name} at layer {layer}")
                middle = file.layers[len(file.layers) // 2]
                table.append(
                    {
                        "position": position,
                        "component": component,
                        "method": name,
                        "layers": len(file.layers),
                        "train_acc_middle": record["layers"][str(middle)]["train_acc"],
                        "norm_middle": record["layers"][str(middle)]["norm"],
                        "norm_over_median_middle": record["layers"][str(middle)]["norm_over_median_norm"],
                        "middle_layer": middle,
                    }
                )
        outcome.tables["vectors"] = table
        outcome.tables["averaged_tokens"] = sample_table(samples)
        outcome.summary = {
            "methods": ", ".join(methods),
            "files": len(table),
            "layers": max(row["layers"] for row in table),
            "n_train_pos": int(activations.y.sum()),
            "n_train_neg": int((~activations.y).sum()),
            "left_out": "; ".join(sorted(left_out)) or None,
        }
        outcome.checks = [
            Check(
                "vectors_found_at_every_layer",
                not left_out,
                "; ".join(sorted(left_out)) if left_out else "every method found a direction at every layer",
            ),
            Check(
                "optimisation_converged",
                not unconverged,
                f"not converged: {', '.join(unconverged[:5])}"
                if unconverged
                else "every iterative fit converged",
            ),
        ]
        return outcome
