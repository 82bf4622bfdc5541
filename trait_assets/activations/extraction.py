"""Stage 2: hidden states of every kept row, pooled over each position, at every layer and component.

Rows of all traits of a batch go through the model together. A row is captured once: it is reused from the stored artifact
while nothing that decides it changes, and from the journal when a run was killed half way.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resources.models.layers import parse_layers
from resources.models.rows import CaptureRow
from storage import keys
from storage.errors import ArtifactError, UserError
from storage.manifest import fingerprint
from trait_assets.activations.tokens import (
    join_strings,
    pack_strings,
    sample_rows,
    sample_table,
    stored_strings,
    token_name,
    token_sample,
)
from trait_assets.metering import Meter
from trait_assets.pipeline import Check, Outcome, Plan, StageContext
from trait_assets.scenarios.selection import POLARITIES, read_scenario_set, subset

if TYPE_CHECKING:
    import numpy as np

FLUSH_ROWS = 32
FLUSH_SECONDS = 5.0
LAYER_CONVENTION = "0-based; component residual is the output of that block, before any final norm"


@dataclass(frozen=True)
class _Row:
    """What will be captured. `prompt_ids` is None in prefill-only mode, where the model's tokenizer makes them."""

    key: str
    polarity: str
    index: int
    line: int
    pair: int | None
    text: str
    system: str | None
    prompt_ids: tuple[int, ...] | None
    response_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Payload:
    rows: list[_Row]
    left_out: dict[str, int]
    notes: list[str]


class ActivationsStage:
    """`activations/{position}/{component}/{train,val}_all_layers.safetensors`: [n, n_layers, width] float32."""

    name = "activations"
    # 2: the strings of the tokens that were averaged are kept
    code_version = "2"
    shared = False

    def plan(self, ctx: StageContext, trait: str) -> Plan:
        e = ctx.experiment
        inputs = {"scenarios": ctx.upstream("scenarios", trait, shared=True).fingerprint}
        if not e.prefill_only:
            inputs["responses"] = ctx.upstream("responses", trait).fingerprint
            vetting = ctx.upstream("vetted_responses", trait)
            # what a filter that is off would have left out decides nothing here
            inputs["vetted_responses"] = vetting.fingerprint if e.vetting_filter else "not filtered"
        model = ctx.models.identify(ctx.extraction_spec()).record()
        row_options = {"row": "capture/1", "model": model, "layers": e.layers, "base_model": e.base_model}
        payload = (
            self._prefill_rows(ctx, trait, row_options)
            if e.prefill_only
            else self._rows(ctx, trait, row_options)
        )
        for polarity in POLARITIES:
            n = sum(row.polarity == polarity for row in payload.rows)
            if n < 2:
                raise UserError(
                    f"only {n} {polarity} rows are left to capture",
                    where=trait,
                    remedy="see vetted_responses: lower the thresholds, add scenarios, or use --no-vetting-filter",
                )
        options = {
            **row_options,
            "positions": e.positions,
            "components": e.component,
            "val_split": e.val_split,
            "seed": e.seed,
            "prefill_only": e.prefill_only,
        }
        return Plan(trait, inputs, options, payload)

    def _rows(self, ctx: StageContext, trait: str, row_options: dict[str, Any]) -> _Payload:
        e = ctx.experiment
        failed: dict[str, str] = {}
        manifest = ctx.workspace.manifests.read(e.name, "vetted_responses", trait)
        if e.vetting_filter and manifest is not None and manifest.status == "done":
            scores = ctx.workspace.store.read_json(
                keys.extraction(e.name, trait, "vetting", "response_scores.json")
            )
            failed = {row["key"]: row["verdict"] for row in scores["results"] if row["verdict"] != "kept"}
        rows: list[_Row] = []
        left_out: dict[str, int] = defaultdict(int)
        for polarity, file in (("positive", "pos.json"), ("negative", "neg.json")):
            for record in ctx.workspace.store.read_json(keys.extraction(e.name, trait, "responses", file)):
                key = f"{polarity}:{record['scenario_index']}"
                if key in failed:
                    left_out[failed[key]] += 1
                    continue
                if not record["response_token_ids"] and all(p.startswith("response") for p in e.positions):
                    left_out["empty response"] += 1
                    continue
                prompt_ids, response_ids = (
                    tuple(record["prompt_token_ids"]),
                    tuple(record["response_token_ids"]),
                )
                rows.append(
                    _Row(
                        key=fingerprint(
                            {**row_options, "prompt_ids": prompt_ids, "response_ids": response_ids}
                        ),
                        polarity=polarity,
                        index=record["scenario_index"],
                        line=record["line"],
                        pair=record["pair"],
                        text=record["question"],
                        system=record["system_prompt"],
                        prompt_ids=prompt_ids,
                        response_ids=response_ids,
                    )
                )
        return _Payload(rows, dict(left_out), [])

    def _prefill_rows(self, ctx: StageContext, trait: str, row_options: dict[str, Any]) -> _Payload:
        e = ctx.experiment
        scenarios = subset(read_scenario_set(ctx, trait), e.scenario_limit, e.seed)
        rows = [
            _Row(
                key=fingerprint({**row_options, "prompt": s.prompt, "system": s.system_prompt}),
                polarity=s.polarity,
                index=s.index,
                line=s.line,
                pair=s.pair,
                text=s.prompt,
                system=s.system_prompt,
                prompt_ids=None,
                response_ids=(),
            )
            for s in scenarios
        ]
        return _Payload(rows, {}, ["prefill-only: prompts were captured without generating"])

    def execute(self, ctx: StageContext, plans: Sequence[Plan]) -> Iterator[Outcome]:
        have: dict[str, dict[str, dict[str, np.ndarray]]] = {}
        journals = {}
        waiting: dict[str, list[Plan]] = defaultdict(list)
        requests: dict[str, _Row] = {}
        open_keys: dict[str, set[str]] = {}
        fresh: dict[str, int] = {}
        for plan in plans:
            journals[plan.owner] = ctx.workspace.journal(ctx.experiment.name, self.name, plan.owner)
            needed = _tensor_names(plan.options)
            known = {} if ctx.force else {**self._stored(ctx, plan), **journals[plan.owner].load()}
            wanted = {row.key for row in plan.payload.rows}
            have[plan.owner] = {
                key: value for key, value in known.items() if key in wanted and needed <= set(value)
            }
            missing = wanted - set(have[plan.owner])
            open_keys[plan.owner], fresh[plan.owner] = set(missing), len(missing)
            for row in plan.payload.rows:
                if row.key in missing and plan not in waiting[row.key]:
                    waiting[row.key].append(plan)
                    requests.setdefault(row.key, row)
        for plan in plans:
            if not open_keys[plan.owner]:
                yield self._finish(ctx, plan, have.pop(plan.owner), journals[plan.owner], fresh[plan.owner])
        if not requests:
            return

        buffer: dict[str, dict[str, dict[str, np.ndarray]]] = defaultdict(dict)
        flushed = time.monotonic()
        meter = Meter()
        for key, tensors, tokens in self._capture(ctx, requests, plans[0].options, meter):
            # a row of several traits is captured once
            meter.add(waiting[key][0].owner, rows=1, tokens=tokens)
            finished = []
            for plan in waiting[key]:
                have[plan.owner][key] = tensors
                buffer[plan.owner][key] = tensors
                open_keys[plan.owner].discard(key)
                if not open_keys[plan.owner]:
                    # its rows go straight into the artifact
                    buffer.pop(plan.owner, None)
                    finished.append(plan)
            if sum(map(len, buffer.values())) >= FLUSH_ROWS or time.monotonic() - flushed > FLUSH_SECONDS:
                for trait, rows in buffer.items():
                    journals[trait].put_many(rows)
                buffer.clear()
                flushed = time.monotonic()
            for plan in finished:
                outcome = self._finish(
                    ctx, plan, have.pop(plan.owner), journals[plan.owner], fresh[plan.owner]
                )
                outcome.work = meter.settle(plan.owner)
                yield outcome

    def _capture(
        self, ctx: StageContext, requests: dict[str, _Row], options: dict[str, Any], meter: Meter
    ) -> Iterator[tuple[str, dict[str, np.ndarray], int]]:
        """(key, tensors, tokens that went through the model)."""
        import numpy as np

        from trait_assets.responses.generation import uses_completion

        e = ctx.experiment
        model = meter.load(ctx.extraction_model)
        layers = parse_layers(e.layers, model.n_layers)
        base = uses_completion(e.base_model, model.has_chat_template, e.extraction_model)
        rows = []
        for key, row in requests.items():
            prompt = row.prompt_ids
            if prompt is None:
                prompt = model.encode(row.text, row.system, chat=not base).ids
            rows.append(CaptureRow(key, prompt, row.response_ids))
        positions, components = options["positions"], options["components"]
        by_key = {row.key: row for row in rows}
        tokens = {row.key: len(row.prompt_ids) + len(row.response_ids) for row in rows}
        with ctx.progress.task(f"activations · {len(rows)} rows", len(rows)) as task:
            results = model.capture(rows, positions, components, layers)
            for captured in meter.each("model", results):
                task.advance(1, tokens=tokens[captured.key])
                tensors: dict[str, np.ndarray] = {
                    "norms": captured.norms.astype(np.float32),
                    "layers": np.asarray(layers, dtype=np.int64),
                }
                tensors["n_layers"] = np.asarray([model.n_layers], dtype=np.int64)
                for position in positions:
                    strings = model.preview(by_key[captured.key], position)
                    tensors[token_name(position)] = pack_strings(strings)
                    for component in components:
                        name = f"{position}|{component}"
                        # an empty position is kept as such, so that the row is not captured again to find out
                        tensors[name] = captured.pooled.get(
                            (position, component), np.zeros((0,), dtype=np.float32)
                        ).astype(np.float32)
                yield captured.key, tensors, tokens[captured.key]

    def _stored(self, ctx: StageContext, plan: Plan) -> dict[str, dict[str, np.ndarray]]:
        """Rows of the artifact that stands there now, by capture key, where they are still intact."""
        from storage.tensors import unpack

        manifests = ctx.workspace.manifests
        try:
            manifest = manifests.read(ctx.experiment.name, self.name, plan.owner)
            if manifest is None or manifest.status != "done" or manifests.verify(manifest):
                return {}
        except ArtifactError:
            return {}
        rows: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        for key in manifest.files:
            if not key.endswith("_all_layers.safetensors"):
                continue
            tensors, header = unpack(ctx.workspace.store.read_bytes(key))
            for i, row_key in enumerate(header["row_keys"]):
                rows[row_key][f"{header['position']}|{header['component']}"] = tensors["activations"][i]
                rows[row_key]["norms"] = tensors["row_norms"][i]
                rows[row_key]["layers"] = tensors["layers"]
                rows[row_key]["n_layers"] = tensors["n_layers"]
            for row_key, packed in stored_strings(tensors, header["row_keys"]).items():
                rows[row_key][token_name(header["position"])] = packed
        return dict(rows)

    def _finish(
        self,
        ctx: StageContext,
        plan: Plan,
        captured: dict[str, dict[str, np.ndarray]],
        journal: Any,
        fresh: int,
    ) -> Outcome:
        try:
            outcome = build_activations(ctx, plan, captured)
        except Exception as error:
            return Outcome(plan.owner, error=error)
        outcome.summary["captured_now"] = fresh
        outcome.summary["reused"] = len(captured) - fresh
        outcome.after_commit = journal.clear
        return outcome


def _tensor_names(options: dict[str, Any]) -> set[str]:
    sites = {f"{p}|{c}" for p in options["positions"] for c in options["components"]}
    return sites | {"norms", "layers", "n_layers"} | {token_name(p) for p in options["positions"]}


def build_activations(ctx: StageContext, plan: Plan, captured: dict[str, dict[str, np.ndarray]]) -> Outcome:
    """Split the rows and lay out the files. Raises UserError where a side is left without train rows."""
    import numpy as np

    from storage.tensors import pack
    from trait_assets.activations.dataset import folder
    from trait_assets.activations.split import RowInfo, split_rows

    trait, e = plan.owner, ctx.experiment
    rows: list[_Row] = plan.payload.rows
    name_of = {row.key: f"{row.polarity}:{row.index}" for row in rows}
    by_name = {f"{row.polarity}:{row.index}": row for row in rows}
    split = split_rows(
        [
            RowInfo(name, row.polarity, row.index, row.text, row.pair, row.system)
            for name, row in by_name.items()
        ],
        val_split=e.val_split,
        seed=e.seed,
    )
    files: dict[str, Any] = {}
    table: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    checks: list[Check] = []
    samples: dict[str, list[dict[str, Any]]] = {}
    layers = [int(layer) for layer in captured[rows[0].key]["layers"]]
    n_layers = int(captured[rows[0].key]["n_layers"][0])
    norms = np.stack([captured[row.key]["norms"] for row in rows])
    median_norm = np.nanmedian(norms, axis=0) if np.isfinite(norms).any() else np.full(len(layers), np.nan)
    for position in plan.options["positions"]:
        for component in plan.options["components"]:
            site = f"{position}|{component}"
            excluded = [{"key": key, "reason": reason} for key, reason in split.excluded.items()]
            parts: dict[str, list[_Row]] = {"train": [], "val": []}
            for part, members in (("train", split.train), ("val", split.val)):
                for name in sorted(
                    members, key=lambda k: (by_name[k].polarity != "positive", by_name[k].index)
                ):
                    if captured[by_name[name].key][site].size:
                        parts[part].append(by_name[name])
                    else:
                        excluded.append({"key": name, "reason": f"{position} selects no token"})
            counts = {
                (part, polarity): sum(row.polarity == polarity for row in members)
                for part, members in parts.items()
                for polarity in POLARITIES
            }
            for polarity in POLARITIES:
                if counts["train", polarity] < 2:
                    raise UserError(
                        f"{counts['train', polarity]} {polarity} train rows at {position}, {component}",
                        where=trait,
                        remedy="add scenarios, lower val_split, or choose a position that the rows have",
                    )
            base = folder(e.name, trait, position, component)
            for part, chosen in parts.items():
                if not chosen:
                    continue
                stacked = np.stack([captured[row.key][site] for row in chosen])
                files[f"{base}/{part}_all_layers.safetensors"] = pack(
                    {
                        "activations": stacked,
                        "row_norms": np.stack([captured[row.key]["norms"] for row in chosen]),
                        "layers": np.asarray(layers, dtype=np.int64),
                        "n_layers": np.asarray([n_layers], dtype=np.int64),
                        **join_strings([captured[row.key][token_name(position)] for row in chosen]),
                    },
                    {
                        "position": position,
                        "component": component,
                        "part": part,
                        "row_keys": [row.key for row in chosen],
                        "layer_convention": LAYER_CONVENTION,
                    },
                )
            train = np.stack([captured[row.key][site] for row in parts["train"]])
            constant = [layers[i] for i in range(len(layers)) if float(train[:, i].std(axis=0).max()) == 0.0]
            sample = [
                token_sample(name_of[row.key], row.line, captured[row.key][token_name(position)])
                for row in sample_rows(parts["train"])
            ]
            samples[position] = sample
            files[f"{base}/metadata.json"] = {
                "trait": trait,
                "model": plan.options["model"],
                "n_layers": n_layers,
                "layers": layers,
                "hidden_dim": int(train.shape[-1]),
                "position": position,
                "component": component,
                "n_examples_pos": counts["train", "positive"],
                "n_examples_neg": counts["train", "negative"],
                "n_val_pos": counts["val", "positive"],
                "n_val_neg": counts["val", "negative"],
                "rows": {
                    part: [
                        {
                            "key": name_of.get(row.key, row.key),
                            "polarity": row.polarity,
                            "index": row.index,
                            "line": row.line,
                            "pair": row.pair,
                            "group": int(split.groups[f"{row.polarity}:{row.index}"]),
                        }
                        for row in members
                    ]
                    for part, members in parts.items()
                },
                "median_norm": [float(v) if np.isfinite(v) else None for v in median_norm],
                "dtype": "float32",
                "hook_site": component,
                "layer_convention": LAYER_CONVENTION,
                "sample_tokens": sample,
                "excluded": excluded,
                "left_out_before": plan.payload.left_out,
                "val_split": e.val_split,
                "seed": e.seed,
                "notes": [*plan.payload.notes, *split.notes],
            }
            row = {
                "position": position,
                "component": component,
                "train_positive": counts["train", "positive"],
                "train_negative": counts["train", "negative"],
                "val_positive": counts["val", "positive"],
                "val_negative": counts["val", "negative"],
                "width": int(train.shape[-1]),
                "excluded": len(excluded),
            }
            table.append(row)
            metrics += [
                {"name": k, "value": float(v), "position": position, "component": component}
                for k, v in row.items()
                if isinstance(v, int)
            ]
            checks.append(
                Check(
                    "activations_vary",
                    not constant,
                    f"layers {constant} of {position}, {component} are the same on every row"
                    if constant
                    else f"every layer of {position}, {component} varies over the rows",
                    severity="error",
                )
            )
    summary = {
        "n_layers": n_layers,
        "layers_captured": len(layers),
        "train_positive": table[0]["train_positive"],
        "train_negative": table[0]["train_negative"],
        "val_positive": table[0]["val_positive"],
        "val_negative": table[0]["val_negative"],
        "left_out": sum(plan.payload.left_out.values()),
        "median_norm_middle": float(median_norm[len(layers) // 2])
        if np.isfinite(median_norm[len(layers) // 2])
        else None,
        "notes": "; ".join([*plan.payload.notes, *split.notes]) or None,
    }
    tables = {"sites": table, "averaged_tokens": sample_table(samples)}
    return Outcome(trait, files=files, summary=summary, metrics=metrics, tables=tables, checks=checks)
