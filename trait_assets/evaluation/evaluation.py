"""Stage 4: held-out numbers of every vector of a trait, and the table over all traits of an experiment.

Plans, reads, and lays out results; the numbers are made in `trait_report` and `across`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from storage import keys
from storage.errors import UserError
from trait_assets.activations.dataset import activation_sites
from trait_assets.pipeline import Check, Outcome, Plan, StageContext

# "Good" in the words of the report: these limits colour checks, they hide nothing.
GOOD_ACCURACY = 0.9
GOOD_CONTRAST = 40.0
SIGNIFICANT = 0.05

_SUMMARY_FROM_BEST = {
    "val_accuracy": "val_accuracy",
    "val_accuracy_low": "val_accuracy_low",
    "val_accuracy_high": "val_accuracy_high",
    "val_auc": "val_auc",
    "val_auc_low": "val_auc_low",
    "val_auc_high": "val_auc_high",
    "effect_size_d": "effect_size_d",
    "null_percentile": "null_percentile",
    "permutation_p": "permutation_p",
    "raw_norm": "raw_norm",
    "raw_norm_over_median_norm": "raw_norm_over_median_norm",
    "cv_auc": "cv_auc",
    "cv_accuracy": "cv_accuracy",
    "split_half_cosine": "split_half_cosine",
    "random_accuracy_mean": "random_accuracy_mean",
    "random_accuracy_p05": "random_accuracy_p05",
    "random_accuracy_p95": "random_accuracy_p95",
    "energy_top3": "energy_top3",
}


class VectorEvaluationStage:
    """`evaluation/evaluation.json`: one row per layer, method, position and component, and the chosen one."""

    name = "vector_evaluation"
    code_version = "1"
    shared = False

    def plan(self, ctx: StageContext, trait: str) -> Plan:
        e = ctx.experiment
        vectors = ctx.upstream("vectors", trait)
        activations = ctx.upstream("activations", trait)
        inputs = {"vectors": vectors.fingerprint, "activations": activations.fingerprint}
        vetting = ctx.workspace.manifests.read(e.name, "vetted_responses", trait)
        contrast = None
        if vetting is not None and vetting.status == "done":
            inputs["vetted_responses"] = vetting.fingerprint
            contrast = vetting.summary.get("contrast")
        if vectors.inputs.get("activations") != activations.fingerprint:
            raise UserError(
                f"the vectors of {trait} were fitted on other activations than those there now",
                where="vector_evaluation",
                remedy="materialise `vectors` again first",
            )
        options = {
            "n_random": e.n_random,
            "n_permutations": e.n_permutations,
            "bootstrap": e.bootstrap,
            "seed": e.seed,
            "val_split": e.val_split,
        }
        return Plan(trait, inputs, options, payload=(activations, vectors, contrast))

    def execute(self, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]:
        with ctx.progress.task(f"vector evaluation · {len(plans)} traits", len(plans)) as task:
            for plan in plans:
                try:
                    outcome = self._evaluate(ctx, plan)
                except Exception as error:
                    outcome = Outcome(plan.trait, error=error)
                task.advance(1)
                yield outcome

    def _evaluate(self, ctx: StageContext, plan: Plan) -> Outcome:
        from trait_assets.activations.dataset import has_part, load_activations
        from trait_assets.evaluation.trait_report import EvaluationOptions, choose_best, evaluate_site
        from trait_assets.vectors.vector import load_vectors

        assert plan.trait is not None
        experiment, trait = ctx.experiment.name, plan.trait
        activations, vectors, contrast = plan.payload
        options = EvaluationOptions(
            plan.options["n_random"],
            plan.options["n_permutations"],
            plan.options["bootstrap"],
            plan.options["seed"],
        )
        rows: list[dict[str, Any]] = []
        notes: list[str] = []
        counts: dict[tuple[str, str], dict[str, int]] = {}
        for position, component in activation_sites(activations.options):
            train = load_activations(ctx.workspace, experiment, trait, position, component, "train")
            val = None
            if has_part(train.metadata, "val"):
                val = load_activations(ctx.workspace, experiment, trait, position, component, "val")
                if not 0 < val.y.sum() < len(val.y):
                    notes.append(f"{position}, {component}: the held-out rows are all on one side")
                    val = None
            files = {
                method: load_vectors(ctx.workspace, experiment, trait, position, component, method)
                for method in vectors.options["methods"]
            }
            found, said = evaluate_site(train, val, files, options)
            rows += found
            notes += [note for note in said if note not in notes]
            counts[position, component] = {
                "n_train_pos": int(train.y.sum()),
                "n_train_neg": int((~train.y).sum()),
                "n_val_pos": 0 if val is None else int(val.y.sum()),
                "n_val_neg": 0 if val is None else int((~val.y).sum()),
            }
        smallest = min(counts.values(), key=lambda c: c["n_train_pos"] + c["n_train_neg"])
        best = choose_best(rows, smallest["n_train_pos"], smallest["n_train_neg"])
        site = (best["position"], best["component"]) if best else next(iter(counts))
        val_note = _val_note(plan.options["val_split"], counts[site], train.metadata.get("notes", []))
        report = {
            "trait": trait,
            "experiment": experiment,
            "options": plan.options,
            "chosen_by": (
                "cross-validation on train rows: highest cv_auc, or within its standard error the largest d"
            ),
            "counts": [{"position": p, "component": c, **n} for (p, c), n in counts.items()],
            "contrast": contrast,
            "val_note": val_note,
            "notes": notes,
            "best": best,
            "rows": rows,
        }
        outcome = Outcome(trait)
        if best is not None:
            report |= self._around_best(ctx, trait, best, vectors.options["methods"])
        outcome.files[keys.extraction(experiment, trait, "evaluation", "evaluation.json")] = report
        outcome.summary = _summary(best, counts[site], contrast, val_note, notes)
        outcome.metrics = _metric_rows(rows)
        outcome.tables = {"best_layer_per_method": best_per_method(rows, smallest)}
        outcome.checks = _checks(best, contrast, val_note)
        outcome.pictures = _pictures(trait, report)
        return outcome

    def _around_best(
        self, ctx: StageContext, trait: str, best: dict[str, Any], methods: Sequence[str]
    ) -> dict[str, Any]:
        """Cosines across methods at the chosen layer and across layers of the chosen method; projections of
        all rows.
        """
        import numpy as np

        from trait_assets.activations.dataset import has_part, load_activations
        from trait_assets.evaluation.trait_report import cosines
        from trait_assets.vectors.vector import load_vectors

        name, site = ctx.experiment.name, (best["position"], best["component"])
        files = {method: load_vectors(ctx.workspace, name, trait, *site, method) for method in methods}
        here = {m: file.vector(best["layer"]) for m, file in files.items() if best["layer"] in file.layers}
        chosen, vector = files[best["method"]], here[best["method"]]
        projections = []
        train = load_activations(ctx.workspace, name, trait, *site, "train")
        for part in ("train", "val"):
            if part == "val" and not has_part(train.metadata, "val"):
                continue
            rows = train if part == "train" else load_activations(ctx.workspace, name, trait, *site, "val")
            scores = vector.project(rows.X[:, rows.layers.index(vector.layer)])
            projections += [
                {
                    "key": key,
                    "part": part,
                    "polarity": "positive" if y else "negative",
                    "projection": float(score),
                }
                for key, y, score in zip(rows.keys, rows.y, scores, strict=True)
            ]
        return {
            "method_cosines": {
                "methods": list(here),
                "layer": best["layer"],
                "matrix": cosines(np.stack([v.direction for v in here.values()])),
            },
            "layer_cosines": {
                "layers": chosen.layers,
                "method": best["method"],
                "matrix": cosines(np.asarray(chosen.directions)),
            },
            "projections": projections,
        }


def _val_note(val_split: float, counts: dict[str, int], notes: Sequence[str]) -> str | None:
    if counts["n_val_pos"] and counts["n_val_neg"]:
        return None
    if val_split == 0:
        return "val_split is 0: there are no held-out rows, so there are no held-out numbers"
    said = [note for note in notes if "no held-out" in note]
    return said[0] if said else "no held-out rows on both sides, so there are no held-out numbers"


def _summary(
    best: dict[str, Any] | None,
    counts: dict[str, int],
    contrast: float | None,
    val_note: str | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "best_method": best["method"] if best else None,
        "best_layer": best["layer"] if best else None,
        "best_position": best["position"] if best else None,
        "best_component": best["component"] if best else None,
        **{name: best[field] if best else None for name, field in _SUMMARY_FROM_BEST.items()},
        **counts,
        "contrast": contrast,
    }
    if val_note:
        summary["val_note"] = val_note
    if notes:
        summary["notes"] = "; ".join(notes)
    return summary


_NOT_METRICS = {"layer", "method", "position", "component", "oriented"}


def _metric_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "value": float(value),
            "layer": row["layer"],
            "method": row["method"],
            "position": row["position"],
            "component": row["component"],
        }
        for row in rows
        for name, value in row.items()
        if name not in _NOT_METRICS and value is not None
    ]


_TABLE_FIELDS = (
    "position",
    "component",
    "method",
    "layer",
    "cv_auc",
    "cv_accuracy",
    "split_half_cosine",
    "val_accuracy",
    "val_accuracy_low",
    "val_accuracy_high",
    "val_auc",
    "val_auc_low",
    "val_auc_high",
    "effect_size_d",
    "null_percentile",
    "permutation_p",
    "raw_norm_over_median_norm",
    "energy_top3",
)


def best_per_method(rows: Sequence[dict[str, Any]], counts: dict[str, int]) -> list[dict[str, Any]]:
    """For each position, component and method the layer that train chooses (random: the middle one)."""
    from trait_assets.evaluation.trait_report import choose_best

    sites: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        sites[row["position"], row["component"], row["method"]].append(row)
    table = []
    for members in sites.values():
        best = (
            choose_best(members, counts["n_train_pos"], counts["n_train_neg"]) or members[len(members) // 2]
        )
        table.append({name: best[name] for name in _TABLE_FIELDS})
    return table


def _checks(best: dict[str, Any] | None, contrast: float | None, val_note: str | None) -> list[Check]:
    checks = [
        Check(
            "held_out_numbers_exist",
            val_note is None and best is not None,
            val_note
            or (
                "cross-validation chose a vector" if best else "train rows are too few to choose a vector by"
            ),
        )
    ]
    if contrast is not None:
        checks.append(
            Check(
                "contrast",
                contrast > GOOD_CONTRAST,
                f"judged contrast {contrast:.1f}, good above {GOOD_CONTRAST:g}",
            )
        )
    if best is None:
        return checks
    checks.append(
        Check(
            "no_massive_dimension",
            not best["massive_dimension"],
            f"{best['energy_top3']:.0%} of the chosen vector lies in its three largest dimensions",
        )
    )
    if best["val_accuracy"] is not None:
        checks += [
            Check(
                "held_out_accuracy",
                best["val_accuracy"] >= GOOD_ACCURACY,
                f"{best['val_accuracy']:.0%} "
                f"[{best['val_accuracy_low']:.0%}, {best['val_accuracy_high']:.0%}] on "
                f"held-out rows, good from {GOOD_ACCURACY:.0%}",
                values={"low": best["val_accuracy_low"], "high": best["val_accuracy_high"]},
            ),
            Check(
                "polarity",
                bool(best["polarity_ok"]),
                "held-out positives project higher"
                if best["polarity_ok"]
                else "held-out positives project LOWER",
            ),
            Check(
                "better_than_random_directions",
                best["null_percentile"] >= 95,
                f"AUC {best['val_auc']:.2f}: above {best['null_percentile']:.0f} % of random directions",
            ),
        ]
    if best["permutation_p"] is not None:
        checks.append(
            Check(
                "better_than_shuffled_labels",
                best["permutation_p"] <= SIGNIFICANT,
                f"p = {best['permutation_p']:.3f} against shuffled held-out labels",
            )
        )
    return checks


def _pictures(trait: str, report: dict[str, Any]) -> dict[str, bytes]:
    from trait_assets.report import pictures

    best = report["best"]
    position, component = (best["position"], best["component"]) if best else (None, None)
    rows = [
        r for r in report["rows"] if best is None or (r["position"], r["component"]) == (position, component)
    ]
    found = {}
    metric = "val_auc" if any(row["val_auc"] is not None for row in rows) else "cv_auc"
    if any(row[metric] is not None for row in rows):
        found["layer_by_method"] = pictures.layer_method_heatmap(rows, metric, best, title=trait)
    if best is not None:
        found["projections"] = pictures.projection_strip(report["projections"], best, title=trait)
        found["layer_cosines"] = pictures.cosine_heatmap(
            report["layer_cosines"]["matrix"],
            [str(layer) for layer in report["layer_cosines"]["layers"]],
            title=f"{trait}: {best['method']} between layers",
        )
    return found


class ExtractionEvaluationStage:
    """`extraction/extraction_evaluation.json`: all evaluated traits of the experiment, side by side and
    against each other.

    Its `plan` takes trait None. It is made anew whenever any trait's evaluation changed, so a new trait
    always joins.
    """

    name = "extraction_evaluation"
    code_version = "1"
    shared = False

    def plan(self, ctx: StageContext, trait: str | None) -> Plan:
        found, problems = ctx.finished(VectorEvaluationStage.name)
        if not found:
            raise UserError(
                f"no trait of {ctx.experiment.name} is evaluated yet"
                + (f" ({problems[0]})" if problems else ""),
                where=self.name,
                remedy="materialise `vector_evaluation` first",
            )
        inputs = {name: manifest.fingerprint for name, manifest in sorted(found.items())}
        return Plan(None, inputs, {"problems": problems}, payload=[found[name] for name in sorted(found)])

    def execute(self, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]:
        for plan in plans:
            try:
                yield self._gather(ctx, plan)
            except Exception as error:
                yield Outcome(plan.trait, error=error)

    def _gather(self, ctx: StageContext, plan: Plan) -> Outcome:
        from trait_assets.evaluation.across import best_vector, cosine_matrix, cross_auc_matrix

        experiment = ctx.experiment.name
        traits, methods, vectors = [], [], []
        for manifest in plan.payload:
            row = {"trait": manifest.trait}
            row |= {name: value for name, value in manifest.summary.items() if name in _TABLE_COLUMNS}
            traits.append(row)
            methods += [
                {"trait": manifest.trait, **line} for line in manifest.tables.get("best_layer_per_method", [])
            ]
            if manifest.summary.get("best_layer") is not None:
                vectors.append(best_vector(ctx.workspace, experiment, manifest.trait))
        names = [vector.trait for vector in vectors]
        cosine = cosine_matrix(vectors)
        cross = cross_auc_matrix(ctx.workspace, experiment, vectors)
        document = {
            "experiment": experiment,
            "traits": traits,
            "best_per_method": methods,
            "cosine": {"traits": names, "matrix": cosine},
            "cross_auc": {
                "traits": names,
                "matrix": cross,
                "meaning": "row: whose vector; column: whose rows; diagonal: held-out rows only",
            },
            "problems": plan.options["problems"],
        }
        outcome = Outcome(None)
        outcome.files[keys.extraction(experiment, None, "extraction_evaluation.json")] = document
        outcome.tables = {"traits": traits}
        outcome.metrics = _cross_metrics(names, cosine, cross)
        accuracies = [row["val_accuracy"] for row in traits if row.get("val_accuracy") is not None]
        outcome.summary = {
            "traits": len(traits),
            "traits_with_held_out_numbers": len(accuracies),
            "good_accuracy": sum(value >= GOOD_ACCURACY for value in accuracies),
            "mean_val_accuracy": sum(accuracies) / len(accuracies) if accuracies else None,
            "problems": "; ".join(plan.options["problems"]) or None,
        }
        outcome.checks = [
            Check(
                "all_evaluations_intact",
                not plan.options["problems"],
                "; ".join(plan.options["problems"]) or "every evaluation could be read",
            )
        ]
        if len(names) > 1:
            from trait_assets.report import pictures

            outcome.pictures = {
                "cosine": pictures.cosine_heatmap(cosine, names, title="cosine of the chosen vectors"),
                "cross_auc": pictures.auc_heatmap(cross, names, title="AUC of row's vector on column's rows"),
            }
        return outcome


_TABLE_COLUMNS = {
    "best_method",
    "best_layer",
    "best_position",
    "best_component",
    "n_train_pos",
    "n_train_neg",
    "n_val_pos",
    "n_val_neg",
    "contrast",
    "val_note",
    "notes",
    *_SUMMARY_FROM_BEST,
}


def _cross_metrics(names: list[str], cosine: list[list[Any]], cross: list[list[Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, matrix in (("cross_trait_cosine", cosine), ("cross_trait_auc", cross)):
        for i, trait in enumerate(names):
            for j, other in enumerate(names):
                if matrix[i][j] is not None and (name == "cross_trait_auc" or i < j):
                    rows.append(
                        {"name": name, "value": float(matrix[i][j]), "of_trait": trait, "on_trait": other}
                    )
    return rows
