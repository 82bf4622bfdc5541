"""What the HTML report says: stored artifacts of one experiment in, one plain document (JSON types only) out.

Belongs here: which numbers, texts and facts a reader sees, and from which manifest each comes. Does not: how they look
(`page`), measuring anything anew. The one thing computed here is the null distribution at the chosen layer: evaluation
stores its quantiles and the seed, the random directions are drawn again from it and must give the stored percentile.

A part that was not made, or whose file is damaged, is left out and replaced by one sentence in `missing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from storage import keys
from storage.errors import ArtifactError, UserError
from trait_assets.judging import judge_name

if TYPE_CHECKING:
    import numpy as np

    from storage.manifest import Manifest
    from storage.workspace import Workspace
    from trait_assets.experiments import Experiment

# Characters of model text in one report. Many traits share it: each shows as many questions as its share holds.
TEXT_BUDGET = 12_000_000
# A page of many more sections would no longer open in a browser; the overview names every trait.
DETAILED_TRAITS = 150
MATRIX_TRAITS = 200
# Bytes of activations that may be read whole to draw null distributions again, where they cannot be memory-mapped.
REMOTE_ACTIVATION_BYTES = 256_000_000
HEAT_METRICS = {
    "val_accuracy": "held-out accuracy",
    "val_auc": "held-out AUC",
    "cv_accuracy": "cross-validated accuracy",
    "cv_auc": "cross-validated AUC",
    "effect_size_d": "effect size d",
}
BINS = 10

Document = dict[str, Any]


@dataclass
class Material:
    """The manifests a report is made from. `traits`: trait → stage → manifest; `tables`: stage → manifest."""

    traits: dict[str, dict[str, Manifest]]
    tables: dict[str, Manifest]
    status: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)


def document(workspace: Workspace, experiment: Experiment, material: Material, created_at: str) -> Document:
    """Everything the page shows. `created_at`: when the report is made, ISO 8601 UTC."""
    status = {row["trait"]: row for row in material.status}
    names = sorted({*material.traits, *status})
    reader = _Reader(workspace, list(material.problems))
    traits = []
    for name in names:
        done = {s: m for s, m in material.traits.get(name, {}).items() if m.status == "done"}
        traits.append(_row(name, done, _verdict(experiment, done, status.get(name))))
    # the most interesting ones are shown in full: validated, then refuted, then open, by name
    states = ("validated", "not validated", "open")
    ranked = sorted(traits, key=lambda t: (states.index(t["verdict"]["state"]), t["trait"]))
    budget = TEXT_BUDGET // max(1, min(DETAILED_TRAITS, len(ranked)))
    for page in ranked[:DETAILED_TRAITS]:
        page |= _details(reader, experiment, page["trait"], material.traits.get(page["trait"], {}), budget)
        page["detailed"] = True
    every = [m for stages in material.traits.values() for m in stages.values()]
    verdicts = [trait["verdict"]["state"] for trait in traits]
    return {
        "experiment": experiment.name,
        "description": experiment.description,
        "created_at": created_at,
        "newest_result": max((m.created_at for m in every), default=None),
        "models": _models(every),
        "judges": _judges(every),
        "stand_in": any(m.summary.get("judge_is_stand_in") for m in every),
        "steering": experiment.steering,
        "prefill_only": experiment.prefill_only,
        "counts": {state: verdicts.count(state) for state in states}
        | {"traits": len(traits), "detailed": sum(trait["detailed"] for trait in traits)},
        "traits": traits,
        "across": _across(reader, material.tables.get("extraction_evaluation")),
        "tables": [manifest_record(m) for m in material.tables.values()],
        "status": status_table(material.status),
        "problems": reader.problems,
    }


def status_table(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`overview.status_rows` as flat rows: trait, one column per stage, and the reasons in one text."""
    table = []
    for row in rows:
        reasons = [row["problem"]] if row.get("problem") else []
        reasons += [
            f"{stage}: {entry['reason']}"
            for stage, entry in row["stages"].items()
            if entry["reason"] and entry["state"] != "current"
        ]
        states = {stage: entry["state"] for stage, entry in row["stages"].items()}
        table.append({"trait": row["trait"], **states, "reason": "; ".join(reasons)})
    return table


def manifest_record(manifest: Manifest) -> dict[str, Any]:
    """What a reader needs to find and repeat a result."""
    return {
        "stage": manifest.stage,
        "status": manifest.status,
        "fingerprint": manifest.fingerprint,
        "run_id": manifest.run_id,
        "created_at": manifest.created_at,
        "code_version": manifest.code_version,
        "inputs": dict(manifest.inputs),
        "options": dict(manifest.options),
        "files": sorted(key for key in manifest.files if not key.endswith(".png")),
        "libraries": dict(manifest.libraries),
        "checks": [dict(check) for check in manifest.summary.get("checks", [])],
    }


def judge_words(manifest: Manifest | None) -> str | None:
    """The judge of a stage's scores, as it is named beside each of them."""
    if manifest is None or "judge" not in manifest.options:
        return None
    name = judge_name(manifest.options["judge"])
    return f"{name} (stand-in)" if manifest.summary.get("judge_is_stand_in") else name


@dataclass
class _Reader:
    """Files that a manifest names, read only if they are the ones it names."""

    workspace: Workspace
    problems: list[str]

    def json(self, manifest: Manifest, key: str) -> Any | None:
        record = manifest.files.get(key)
        if record is None:
            self.problems.append(f"{manifest.stage} of {manifest.trait} names no file {key}")
            return None
        try:
            return self.workspace.store.read_json(key, expect=record)
        except ArtifactError as error:
            self.problems.append(f"{manifest.stage} of {manifest.trait or 'all traits'}: {error}")
            return None


# One trait


def _row(trait: str, done: Mapping[str, Manifest], verdict: dict[str, Any]) -> Document:
    """What the overview needs; manifests alone are read."""
    return {
        "trait": trait,
        "anchor": trait.replace("/", "--"),
        "detailed": False,
        "verdict": verdict,
        "numbers": _numbers(done),
        "judges": {
            "vetting": judge_words(done.get("vetted_responses")) or judge_words(done.get("vetted_scenarios")),
            "steering": judge_words(done.get("steering_results")),
        },
    }


def _details(
    reader: _Reader,
    experiment: Experiment,
    trait: str,
    manifests: Mapping[str, Manifest],
    budget: int,
) -> Document:
    """A trait's own section."""
    done = {stage: m for stage, m in manifests.items() if m.status == "done"}
    missing: dict[str, str] = {}
    page: Document = {
        "definition": _definition(reader, done.get("scenarios"), trait),
        "histograms": _histograms(reader, experiment, trait, manifests, missing),
        "missing": missing,
        "manifests": [manifest_record(m) for m in manifests.values()],
        "sources": {stage: m.fingerprint for stage, m in done.items()},
    }
    page |= _separation(reader, experiment, trait, manifests, missing)
    page |= _steering(reader, experiment, trait, manifests, missing, budget)
    page["failed_checks"] = [
        {"stage": m.stage, **check}
        for m in done.values()
        for check in m.summary.get("checks", [])
        if not check["passed"]
    ]
    return page


def _verdict(
    experiment: Experiment, done: Mapping[str, Manifest], status: Mapping[str, Any] | None
) -> dict[str, Any]:
    """validated, not validated, or open, and why."""
    steering = done.get("steering_results")
    if steering is not None:
        state = "validated" if steering.summary.get("validated") else "not validated"
        stale = (status or {}).get("stages", {}).get("steering_results", {})
        reason = str(steering.summary.get("reason") or "")
        if stale.get("state") == "stale":
            reason += f" (out of date: {stale.get('reason')})"
        return {"state": state, "reason": reason}
    if status is not None and status.get("problem"):
        return {"state": "open", "reason": f"the trait folder cannot be used: {status['problem']}"}
    for stage, entry in (status or {}).get("stages", {}).items():
        if entry["state"] not in ("current", "skipped"):
            words = entry["reason"] or ("not materialised yet" if entry["state"] == "missing" else None)
            return {
                "state": "open",
                "reason": f"{stage} is {entry['state']}" + (f": {words}" if words else ""),
            }
    if not experiment.steering:
        return {"state": "open", "reason": "steering is switched off: separation was measured, not causation"}
    return {"state": "open", "reason": "not steered yet"}


_EVALUATION_NUMBERS = (
    "best_method",
    "best_layer",
    "best_position",
    "best_component",
    "val_accuracy",
    "val_accuracy_low",
    "val_accuracy_high",
    "val_auc",
    "val_auc_low",
    "val_auc_high",
    "cv_auc",
    "cv_accuracy",
    "effect_size_d",
    "null_percentile",
    "permutation_p",
    "raw_norm",
    "raw_norm_over_median_norm",
    "split_half_cosine",
    "energy_top3",
    "val_note",
    "n_train_pos",
    "n_train_neg",
    "n_val_pos",
    "n_val_neg",
)
_STEERING_NUMBERS = (
    "best_method",
    "best_layer",
    "best_position",
    "best_component",
    "best_dose",
    "best_coefficient",
    "baseline_trait",
    "steered_trait",
    "change",
    "change_low",
    "change_high",
    "coherence",
    "baseline_coherence",
    "distinct_3",
    "success_rate",
    "wrong_way_fraction",
    "random_change",
    "random_change_high",
    "prompting_change",
    "prompting_coherence",
    "n_search",
    "n_report",
    "abstentions",
    "flags",
    "direction",
)
_VETTING_NUMBERS = ("n", "n_kept", "n_abstained", "contrast", "contrast_kept")


def _numbers(done: Mapping[str, Manifest]) -> dict[str, dict[str, Any]]:
    wanted = {
        "vetted_scenarios": _VETTING_NUMBERS,
        "vetted_responses": _VETTING_NUMBERS,
        "vector_evaluation": _EVALUATION_NUMBERS,
        "steering_results": _STEERING_NUMBERS,
    }
    return {
        stage: {name: done[stage].summary.get(name) if stage in done else None for name in names}
        for stage, names in wanted.items()
    }


def _definition(reader: _Reader, manifest: Manifest | None, trait: str) -> str | None:
    if manifest is None:
        return None
    found = reader.json(manifest, keys.scenario_set(trait))
    return None if found is None else str(found.get("definition") or "")


def _absent(experiment: Experiment, stage: str, manifests: Mapping[str, Manifest], what: str) -> str:
    """Why a part is not there, in one sentence."""
    manifest = manifests.get(stage)
    if manifest is not None and manifest.status == "skipped":
        return f"{what}: the stage {stage} was skipped ({manifest.summary.get('skipped')})."
    if experiment.prefill_only and stage in ("vetted_scenarios", "responses", "vetted_responses"):
        return f"{what}: this experiment is prefill-only, so nothing is generated or vetted."
    if not experiment.steering and stage == "steering_results":
        return f"{what}: steering is switched off in this experiment."
    return f"{what}: {stage} has no result yet; the trait's status says why."


# Judge histograms


def _histograms(
    reader: _Reader,
    experiment: Experiment,
    trait: str,
    manifests: Mapping[str, Manifest],
    missing: dict[str, str],
) -> list[dict[str, Any]]:
    found = []
    for stage, subject, file in (
        ("vetted_scenarios", "scenarios", "scenario_scores.json"),
        ("vetted_responses", "responses", "response_scores.json"),
    ):
        manifest = manifests.get(stage)
        if manifest is None or manifest.status != "done":
            missing[stage] = _absent(experiment, stage, manifests, f"No judge scores of {subject}")
            continue
        scores = reader.json(manifest, keys.extraction(experiment.name, trait, "vetting", file))
        if scores is None:
            missing[stage] = f"The judge scores of {subject} could not be read; see the problems above."
            continue
        found.append(
            {
                "stage": stage,
                "subject": subject,
                "judge": judge_words(manifest),
                "thresholds": scores.get("thresholds") or {},
                "bins": histogram(scores["results"]),
                "summary": {name: manifest.summary.get(name) for name in _VETTING_NUMBERS},
                "worst": scores.get("worst", [])[:5],
            }
        )
    return found


def histogram(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """polarity → kept or left_out → counts in ten bins of ten points; abstentions have no score and no bin.

    Before vetting is the sum of both, after vetting is `kept`.
    """
    counts = {side: {"kept": [0] * BINS, "left_out": [0] * BINS} for side in ("positive", "negative")}
    for row in results:
        if row.get("score") is None:
            continue
        kept = "kept" if row["verdict"] == "kept" else "left_out"
        counts[row["polarity"]][kept][min(BINS - 1, max(0, int(row["score"] // BINS)))] += 1
    return counts


# Separation on held-out rows


def _separation(
    reader: _Reader,
    experiment: Experiment,
    trait: str,
    manifests: Mapping[str, Manifest],
    missing: dict[str, str],
) -> Document:
    nothing: Document = {"heat": None, "null": None, "projections": None}
    manifest = manifests.get("vector_evaluation")
    if manifest is None or manifest.status != "done":
        missing["vector_evaluation"] = _absent(
            experiment, "vector_evaluation", manifests, "No evaluated vectors"
        )
        return nothing
    report = reader.json(manifest, keys.extraction(experiment.name, trait, "evaluation", "evaluation.json"))
    if report is None:
        missing["vector_evaluation"] = "The evaluation could not be read; see the problems above."
        return nothing
    best, rows = report["best"], report["rows"]
    found: Document = {"heat": heat(rows, best), "null": None, "projections": None}
    if best is None:
        missing["null"] = (
            "No vector could be chosen (too few train rows to cross-validate), so there is no null "
            "distribution to place it in."
        )
    elif best.get("val_auc") is None:
        missing["null"] = f"No null distribution: {report.get('val_note') or 'there are no held-out rows'}."
    else:
        found["null"] = null_band(rows, best) | {
            "sample": _null_sample(reader, experiment, trait, manifests, report)
        }
    if best is not None and report.get("projections"):
        found["projections"] = projections(report["projections"], best)
    return found


def heat(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Per position and component: layers, methods, and each metric as [method][layer], None where unmeasured."""
    if not rows:
        return None
    sites = []
    for position, component in dict.fromkeys((r["position"], r["component"]) for r in rows):
        here = [r for r in rows if (r["position"], r["component"]) == (position, component)]
        layers = sorted({r["layer"] for r in here})
        methods = list(dict.fromkeys(r["method"] for r in here))
        cells = {(r["method"], r["layer"]): r for r in here}
        metrics = {}
        for metric in HEAT_METRICS:
            grid = [[_rounded(cells.get((m, layer), {}).get(metric), 4) for layer in layers] for m in methods]
            if any(value is not None for line in grid for value in line):
                metrics[metric] = grid
        chosen = best is not None and (best["position"], best["component"]) == (position, component)
        sites.append(
            {
                "position": position,
                "component": component,
                "layers": layers,
                "methods": methods,
                "metrics": metrics,
                "best": {"layer": best["layer"], "method": best["method"]} if chosen and best else None,
            }
        )
    sites.sort(key=lambda site: site["best"] is None)
    known = [metric for metric in HEAT_METRICS if any(metric in site["metrics"] for site in sites)]
    return {"sites": sites, "metrics": {m: HEAT_METRICS[m] for m in known}} if known else None


def null_band(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> dict[str, Any]:
    """AUC of the chosen method's vectors over layers, and the mean and 5–95 % band of random directions there."""
    line = [r for r in rows if all(r[k] == best[k] for k in ("method", "position", "component"))]
    line = sorted((r for r in line if r.get("null_auc_mean") is not None), key=lambda r: r["layer"])
    return {
        "layers": [r["layer"] for r in line],
        "auc": [_rounded(r["val_auc"], 4) for r in line],
        "auc_low": [_rounded(r["val_auc_low"], 4) for r in line],
        "auc_high": [_rounded(r["val_auc_high"], 4) for r in line],
        "null_mean": [_rounded(r["null_auc_mean"], 4) for r in line],
        "null_low": [_rounded(r["null_auc_p05"], 4) for r in line],
        "null_high": [_rounded(r["null_auc_p95"], 4) for r in line],
        "best": {
            name: best.get(name)
            for name in (
                "layer",
                "method",
                "position",
                "component",
                "val_auc",
                "val_auc_low",
                "val_auc_high",
                "null_percentile",
                "permutation_p",
                "random_accuracy_mean",
                "random_accuracy_p05",
                "random_accuracy_p95",
            )
        },
    }


def _null_sample(
    reader: _Reader,
    experiment: Experiment,
    trait: str,
    manifests: Mapping[str, Manifest],
    report: Mapping[str, Any],
) -> list[float] | None:
    """Held-out AUCs of the random directions at the chosen layer, sorted; None where they cannot be drawn again.

    The same draw as evaluation's (same seed, same rows); the percentile that it gives must be the stored one.
    """
    activations, evaluated = manifests.get("activations"), manifests["vector_evaluation"]
    if activations is None or evaluated.inputs.get("activations") != activations.fingerprint:
        return None
    from trait_assets.evaluation.null import percentile_within, random_null
    from trait_assets.vectors.methods import random_directions

    best, options = report["best"], report["options"]
    try:
        train, val = (
            _layer(reader.workspace, experiment.name, trait, best, part) for part in ("train", "val")
        )
    except (ArtifactError, UserError) as error:
        reader.problems.append(f"activations of {trait}: {error}")
        return None
    if train is None or val is None:
        return None
    width = train[0].shape[1]
    # as in evaluation: the seed is moved on from that of the stored `random` vector, projections are float32
    family = random_directions(options["n_random"], width, options["seed"] + 1, best["layer"])
    family = family.astype("float32")
    null = random_null(train[0] @ family.T, train[1], val[0] @ family.T, val[1])["auc"]
    # one held-out pair of rows that changes order in the last bit moves the percentile by less than this
    if abs(percentile_within(best["val_auc"], null) - best["null_percentile"]) > 2.0:
        return None
    return sorted(round(float(value), 4) for value in null)


def _layer(
    workspace: Workspace, experiment: str, trait: str, best: Mapping[str, Any], part: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Hidden states [n, width] of the chosen layer and labels [n]; only this layer is read from a local disk."""
    import numpy as np

    from storage.tensors import open_local, unpack
    from trait_assets.activations.dataset import folder

    base = folder(experiment, trait, best["position"], best["component"])
    metadata = workspace.store.read_json(f"{base}/metadata.json")
    rows = metadata["rows"][part]
    if not rows or best["layer"] not in metadata["layers"]:
        return None
    key = f"{base}/{part}_all_layers.safetensors"
    path = workspace.store.local_path(key)
    if path is not None:
        states = open_local(path)["activations"]
    elif workspace.store.size(key) <= REMOTE_ACTIVATION_BYTES:
        states = unpack(workspace.store.read_bytes(key))[0]["activations"]
    else:
        return None
    y = np.array([row["polarity"] == "positive" for row in rows])
    return np.ascontiguousarray(states[:, list(metadata["layers"]).index(best["layer"])]), y


def projections(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> dict[str, Any]:
    """Projections on the chosen vector by part and polarity, and the threshold that train set."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        value = _rounded(row["projection"], 4)
        if value is not None:
            groups.setdefault(f"{row['part']} {row['polarity']}", []).append(value)
    return {"groups": groups, "threshold": best.get("threshold")}


# Steering


def _steering(
    reader: _Reader,
    experiment: Experiment,
    trait: str,
    manifests: Mapping[str, Manifest],
    missing: dict[str, str],
    budget: int,
) -> Document:
    nothing: Document = {"dose": None, "samples": None}
    manifest = manifests.get("steering_results")
    if manifest is None or manifest.status != "done":
        missing["steering_results"] = _absent(
            experiment, "steering_results", manifests, "No dose–response and no steered texts"
        )
        return nothing
    files = sorted(manifest.files)
    results: list[Any] = [reader.json(manifest, key) for key in files if key.endswith("/results.json")]
    generations: list[Any] = [
        reader.json(manifest, key) for key in files if key.endswith("/generations.json")
    ]
    if not results or any(part is None for part in (*results, *generations)):
        missing["steering_results"] = "The steering results could not be read; see the problems above."
        return nothing
    judge = judge_words(manifest)
    return {
        "dose": dose_response(results) | {"judge": judge},
        "samples": samples(generations, results[0].get("best"), budget) | {"judge": judge},
    }


def dose_response(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every measured setting, by what was added. Runs of no position stand in every file and count once."""
    first = results[0]
    best = first.get("best")
    curves: dict[str, dict[str, Any]] = {}
    controls: list[dict[str, Any]] = []
    prompting, other = None, []
    seen = set()
    for result in results:
        for run in result["runs"]:
            mark = (run["kind"], run["name"], run["half"])
            if mark in seen:
                continue
            seen.add(mark)
            config, point = run["config"], _point(run)
            if run["kind"] == "prompting":
                prompting = point
            elif len(config["layers"]) != 1:
                other.append(point | {"layers": config["layers"], "methods": config["methods"]})
            elif run["kind"] == "random":
                controls.append(point | {"name": config["methods"][0]})
            else:
                label = _arm_label(config["methods"][0], config["layers"][0], config["position"], results)
                curve = curves.setdefault(
                    label,
                    {
                        "label": label,
                        "method": config["methods"][0],
                        "layer": config["layers"][0],
                        "position": config["position"],
                        "component": config["component"],
                        "chosen": best is not None
                        and (best["method"], best["layer"], best["position"], best["component"])
                        == (
                            config["methods"][0],
                            config["layers"][0],
                            config["position"],
                            config["component"],
                        ),
                        "search": [],
                        "report": [],
                    },
                )
                curve[run["half"]].append(point)
    for curve in curves.values():
        for half in ("search", "report"):
            curve[half].sort(key=lambda p: p["dose"])
    return {
        "curves": sorted(curves.values(), key=lambda c: not c["chosen"]),
        "controls": controls,
        "prompting": prompting,
        "combinations": other,
        "baseline": {
            half: {name: _rounded(value.get(name), 2) for name in ("trait_mean", "coherence_mean", "n")}
            for half, value in first["baseline"].items()
        },
        "best": None
        if best is None
        else {name: best[name] for name in ("layer", "method", "position", "component", "dose")},
        "threshold": first["options"]["coherence_threshold"],
        "direction": first["direction"],
        "questions": {half: len(first["questions"][half]) for half in ("search", "report")},
        "split": first["questions"]["split"],
    }


def _arm_label(method: str, layer: int, position: str | None, results: Sequence[Any]) -> str:
    return f"{method}, layer {layer}" + (f", {position}" if len(results) > 1 and position else "")


def _point(run: Mapping[str, Any]) -> dict[str, Any]:
    result, doses = run["result"], run["config"]["doses"]
    return {
        "dose": abs(doses[0]) if doses else None,
        "half": run["half"],
        "trait": _rounded(result["trait_mean"], 2),
        "change": _rounded(result["change"], 2),
        "low": _rounded(result["change_low"], 2),
        "high": _rounded(result["change_high"], 2),
        "coherence": _rounded(result["coherence_mean"], 2),
        "distinct_3": _rounded(result["distinct_3"], 3),
        "wrong_way": _rounded(result["wrong_way_fraction"], 3),
        "n": result["n"],
        "abstentions": result["abstentions"],
    }


def samples(
    generations: Sequence[Sequence[Mapping[str, Any]]], best: Mapping[str, Any] | None, budget: int
) -> dict[str, Any]:
    """Texts by question, arm and dose, the unsteered one at dose 0.

    `arms`: what was added (vectors, random directions, a system prompt), the chosen vector first; `questions`: text, half, the
    unsteered answer, and arm → list of answers by rising dose. Whole questions are kept as long as `budget` characters last.
    """
    arms: dict[str, dict[str, Any]] = {}
    questions: dict[tuple[str, int], dict[str, Any]] = {}
    seen = set()
    for rows in generations:
        for row in rows:
            mark = (row["kind"], row["name"], row["half"], row["question_index"])
            if mark in seen or len(row.get("layers") or []) > 1:
                continue
            seen.add(mark)
            entry = questions.setdefault(
                (row["half"], row["question_index"]),
                {"question": row["question"], "half": row["half"], "unsteered": None, "answers": {}},
            )
            if row["kind"] == "baseline":
                entry["unsteered"] = _answer(row)
                continue
            arm = _arm(row, best, several=len(generations) > 1)
            arms.setdefault(arm["id"], arm)
            entry["answers"].setdefault(arm["id"], []).append(_answer(row))
    listed = sorted(arms.values(), key=lambda a: (a["order"], a["label"]))
    kept: list[dict[str, Any]] = []
    used = 0
    # report questions decide the verdict, but only the search questions were asked at every dose: take turns
    for entry in _taking_turns(questions.values()):
        for answers in entry["answers"].values():
            answers.sort(key=lambda a: a["dose"] or 0.0)
        size = sum(
            len(a["text"])
            for a in [*(x for answers in entry["answers"].values() for x in answers), entry["unsteered"]]
            if a
        )
        if kept and used + size > budget:
            continue
        used += size
        kept.append(entry)
    return {
        "arms": [{k: v for k, v in arm.items() if k != "order"} for arm in listed],
        "questions": sorted(kept, key=lambda q: q["half"] != "search"),
        "of": len(questions),
        "best_dose": None if best is None else best["dose"],
    }


def _taking_turns(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    halves: dict[str, list[dict[str, Any]]] = {"search": [], "report": []}
    for entry in entries:
        halves[entry["half"]].append(entry)
    turns = []
    for i in range(max(map(len, halves.values()), default=0)):
        turns += [half[i] for half in halves.values() if i < len(half)]
    return turns


def _arm(row: Mapping[str, Any], best: Mapping[str, Any] | None, *, several: bool) -> dict[str, Any]:
    kind = row["kind"]
    if kind == "prompting":
        return {"id": "prompting", "label": "system prompt, no vector", "kind": kind, "order": 3}
    if kind == "random":
        number = str(row["method"]).removeprefix("random_")
        label = f"random direction {int(number) + 1}" if number.isdigit() else str(row["method"])
        return {
            "id": f"{row['method']}|{row['layer']}",
            "label": f"{label}, layer {row['layer']}",
            "kind": kind,
            "order": 2,
        }
    chosen = best is not None and all(row[k] == best[k] for k in ("method", "layer", "position", "component"))
    label = f"{row['method']}, layer {row['layer']}" + (f", {row['position']}" if several else "")
    return {
        "id": f"{row['method']}|{row['layer']}|{row['position']}|{row['component']}",
        "label": label + (" (chosen)" if chosen else ""),
        "kind": kind,
        "order": 0 if chosen else 1,
    }


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dose": None if row["dose"] is None else abs(row["dose"]),
        "text": str(row["response"]),
        "trait": _rounded(row["trait_score"], 1),
        "coherence": _rounded(row["coherence_score"], 1),
        "distinct_3": _rounded(row["distinct_3"], 2),
        "abstained": row["abstained"],
        "cut": row["finish_reason"] == "length",
    }


# The whole experiment


def _across(reader: _Reader, manifest: Manifest | None) -> dict[str, Any] | None:
    if manifest is None or manifest.status != "done":
        return None
    table = next(
        (reader.json(manifest, key) for key in manifest.files if key.endswith("extraction_evaluation.json")),
        None,
    )
    if table is None or len(table["cosine"]["traits"]) > MATRIX_TRAITS:
        return None
    return {
        "fingerprint": manifest.fingerprint,
        "cosine": table.get("cosine"),
        "cross_auc": table.get("cross_auc"),
    }


def _models(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Each model identity that made something, with what it did."""
    roles = {
        "responses": ("model", "responses and activations"),
        "activations": ("model", "responses and activations"),
        "steering_results": ("application_model", "steered"),
    }
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for manifest in manifests:
        option, role = roles.get(manifest.stage, (None, None))
        record = manifest.options.get(option) if option else None
        if not isinstance(record, dict):
            continue
        mark = tuple(str(record.get(k)) for k in ("model", "revision", "adapter", "dtype", "quantization"))
        entry = found.setdefault(mark, {**record, "roles": []})
        if role not in entry["roles"]:
            entry["roles"].append(role)
    return list(found.values())


def _judges(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        identity = manifest.options.get("judge")
        if not isinstance(identity, dict) or manifest.status != "done":
            continue
        details = ", ".join(
            f"{k} {v}" for k, v in sorted(identity.items()) if isinstance(v, (str, int, float))
        )
        found.setdefault(
            details,
            {
                "name": judge_name(identity),
                "details": details,
                "stand_in": bool(manifest.summary.get("judge_is_stand_in")),
            },
        )
    return list(found.values())


def _rounded(value: Any, digits: int) -> float | None:
    return None if value is None else round(float(value), digits)
