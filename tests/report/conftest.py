"""A small experiment with every part that a report can show, its vectors fitted and evaluated by the real stages.

`lab`: toy/alpha has everything and is validated, toy/beta was vetted and evaluated but never steered, toy/gamma has a folder and
no result. All model texts are hostile.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from resources.judges.protocol import Abstention, Score
from storage import keys
from storage.manifest import Manifest, fingerprint
from storage.workspace import Workspace
from trait_assets.evaluation.evaluation import ExtractionEvaluationStage, VectorEvaluationStage
from trait_assets.pipeline import StageContext, TraitResult, run
from trait_assets.report.report import ReportStage, report_key
from trait_assets.scenarios.vetting import Candidate, apply_thresholds
from trait_assets.stages import code_versions
from trait_assets.vectors.extraction import VectorsStage

HOSTILE = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>\u2028&amp;"
JUDGE = {"kind": "llm", "model": "judge<b>one</b>"}
MODEL = {"model": "toy", "revision": "rev1", "dtype": "float32", "adapter": None, "quantization": None}
DOSES = (0.1, 0.2, 0.4)


@dataclass
class Stored:
    """The experiment, and what the report stage makes of it."""

    context: StageContext
    root: Path

    @property
    def path(self) -> Path:
        found = self.context.workspace.store.local_path(report_key(self.context.experiment.name))
        assert found is not None
        return found

    def report(self, **changes: Any) -> TraitResult:
        (result,) = run(ReportStage(), dataclasses.replace(self.context, **changes), [None])
        return result

    def html(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def commit(
        self,
        stage: str,
        trait: str,
        files: dict[str, Any],
        *,
        options: dict[str, Any] | None = None,
        summary: dict[str, Any] | None = None,
        experiment: str | None = "lab",
        status: Any = "done",
    ) -> Manifest:
        workspace = self.context.workspace
        records = {key: workspace.store.write_json(key, content) for key, content in files.items()}
        manifest = Manifest(
            stage=stage,
            experiment=experiment,
            trait=trait,
            fingerprint=fingerprint(
                [stage, trait, sorted(r.sha256 for r in records.values()), options or {}]
            ),
            status=status,
            code_version=code_versions()[stage],
            run_id="run-of-the-test",
            created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            options=options or {},
            files=records,
            summary=summary or {},
        )
        workspace.commit(manifest)
        return manifest


def trait_folder(root: Path, trait: str) -> None:
    folder = root / trait
    folder.mkdir(parents=True)
    for side in ("positive", "negative"):
        (folder / f"{side}.txt").write_text(
            "".join(f"{side} line {i}\n" for i in range(12)), encoding="utf-8"
        )
    (folder / "definition.txt").write_text(
        "Is it toy?\n\nHIGH (70-100): yes.\n\nLOW (0-30): no.\n", encoding="utf-8"
    )


def vetted(stored: Stored, trait: str) -> None:
    """Both vetting stages, by the real rules. Positives score 5, 15 … 95, negatives 5; one abstention."""
    for stage, subject, file in (
        ("vetted_scenarios", "scenarios", "scenario_scores.json"),
        ("vetted_responses", "responses", "response_scores.json"),
    ):
        candidates = [
            Candidate(f"positive:{i}", "positive", Score(f"positive:{i}", 10.0 * i + 5), HOSTILE, i)
            for i in range(10)
        ]
        candidates += [
            Candidate(f"negative:{i}", "negative", Score(f"negative:{i}", 5.0), "calm", i) for i in range(9)
        ]
        candidates.append(Candidate("negative:9", "negative", Abstention("negative:9", "refusal"), "", 9))
        vetting = apply_thresholds(candidates, min_per_side=2, max_abstention_rate=0.5, subject=subject)
        stored.commit(
            stage,
            trait,
            {keys.extraction("lab", trait, "vetting", file): {**vetting.to_json(), "judge": JUDGE}},
            options={"judge": JUDGE},
            summary={**vetting.summary(), "judge": "judge", "judge_is_stand_in": True},
        )


def measured(change: float, n: int, coherence: float = 90.0) -> dict[str, Any]:
    return {
        "abstentions": 0,
        "change": change,
        "change_low": change - 5,
        "change_high": change + 5,
        "change_n": n,
        "coherence_mean": coherence,
        "coherence_n": n,
        "distinct_3": 0.95,
        "n": n,
        "success_rate": 0.5,
        "trait_mean": 20 + change,
        "trait_n": n,
        "wrong_way_fraction": 0.1,
    }


def steered(stored: Stored, trait: str, *, response: str = HOSTILE, n: int = 3) -> None:
    """Results and generations of one position: two candidates, two random directions, a prompt."""
    runs, rows = [], []

    def add(
        kind: str, half: str, method: str | None, layer: int | None, dose: float | None, change: float
    ) -> None:
        name = "|".join(str(part) for part in (kind, method, layer, dose))
        config = {
            "coefficients": [] if dose is None else [dose * 10],
            "doses": [] if dose is None else [dose],
            "layers": [] if layer is None else [layer],
            "methods": [] if method is None else [method],
            "operation": None if dose is None else "add",
            "position": "response[:]" if layer is not None else None,
            "component": "residual" if layer is not None else None,
        }
        if kind != "baseline":
            runs.append(
                {"kind": kind, "name": name, "half": half, "config": config, "result": measured(change, n)}
            )
        rows.extend(
            {
                "kind": kind,
                "name": name,
                "half": half,
                "position": config["position"],
                "component": config["component"],
                "method": method,
                "layer": layer,
                "layers": config["layers"],
                "dose": dose,
                "coefficient": None if dose is None else dose * 10,
                "question_index": i if half == "search" else n + i,
                "question": f"{half} question {i} {HOSTILE}",
                # half a surrogate pair: JSON can carry it, UTF-8 cannot
                "response": f"{kind} {method} at {dose}, question {i}: {response}\ud83d",
                "trait_score": None if i == 2 else 20 + change,
                "coherence_score": 90.0,
                "distinct_3": 0.95,
                "abstained": "refusal" if i == 2 else None,
                "finish_reason": "stop",
                "tokens": 5,
                "judged": {},
            }
            for i in range(n)
        )

    for half in ("search", "report"):
        add("baseline", half, None, None, None, 0.0)
    for dose in DOSES:
        add("vector", "search", "mean_diff", 2, dose, 60 * dose)
        add("vector", "search", "probe", 1, dose, 20 * dose)
    add("vector", "report", "mean_diff", 2, 0.2, 13.0)
    add("random", "report", "random_0", 2, 0.2, 1.0)
    add("random", "report", "random_1", 2, 0.2, -2.0)
    add("prompting", "report", None, None, None, 4.0)
    best = {
        "layer": 2,
        "method": "mean_diff",
        "position": "response[:]",
        "component": "residual",
        "dose": 0.2,
    }
    results = {
        "trait": trait,
        "position": "response[:]",
        "direction": "positive",
        "questions": {"search": ["q"] * n, "report": ["q"] * n, "split": True},
        "baseline": {half: measured(0.0, n) for half in ("search", "report")},
        "runs": runs,
        "best": {**best, "coefficient": 2.0},
        "options": {"coherence_threshold": 70.0},
        "validated": True,
    }
    stored.commit(
        "steering_results",
        trait,
        {
            keys.steering("lab", trait, "response_all", "results.json"): results,
            keys.steering("lab", trait, "response_all", "generations.json"): rows,
        },
        options={"judge": JUDGE, "application_model": MODEL},
        summary={
            **{f"best_{name}": value for name, value in best.items()},
            "validated": True,
            "reason": "change +13.0 clears 2 random directions",
            "baseline_trait": 20.0,
            "steered_trait": 33.0,
            "change": 13.0,
            "change_low": 8.0,
            "change_high": 18.0,
            "coherence": 90.0,
            "judge": "judge",
            "judge_is_stand_in": True,
            "checks": [
                {
                    "name": "coherent",
                    "passed": False,
                    "description": HOSTILE,
                    "severity": "warn",
                    "values": {},
                }
            ],
        },
    )


def build(root: Path, synthetic: ModuleType, **options: Any) -> Stored:
    lab = synthetic.lab(root, description=f"A lab. {HOSTILE}", **options)
    folders = root / "datasets"
    stored = Stored(dataclasses.replace(lab.context, dataset_root=folders), root)
    for trait in ("toy/alpha", "toy/beta", "toy/gamma"):
        trait_folder(folders, trait)
    for seed, trait in enumerate(("toy/alpha", "toy/beta")):
        whole = synthetic.planted(40, 24, layers=4, gap=2.5, seed=seed)
        held = np.arange(len(whole.y)) % 4 == 0
        train, val = (synthetic.Planted(whole.x[part], whole.y[part], whole.truth) for part in (~held, held))
        lab.put(trait, train, val)
        for stage in (VectorsStage(), VectorEvaluationStage()):
            (result,) = run(stage, stored.context, [trait])
            assert result.state == "done", result.reason
        vetted(stored, trait)
    scenarios = {
        "trait": "toy/alpha",
        "definition": f"Is it toy? {HOSTILE}",
        "positives": [],
        "negatives": [],
    }
    stored.commit("scenarios", "toy/alpha", {keys.scenario_set("toy/alpha"): scenarios}, experiment=None)
    steered(stored, "toy/alpha")
    (table,) = run(ExtractionEvaluationStage(), stored.context, [None])
    assert table.state == "done", table.reason
    return stored


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, synthetic: ModuleType) -> Stored:
    return build(tmp_path_factory.mktemp("built"), synthetic)


def copied(built: Stored, root: Path) -> Stored:
    shutil.copytree(built.root, root, dirs_exist_ok=True)
    context = dataclasses.replace(
        built.context,
        workspace=Workspace(root / "experiments", root / "index.duckdb"),
        dataset_root=root / "datasets",
    )
    return Stored(context, root)


@pytest.fixture
def stored(built: Stored, tmp_path: Path) -> Stored:
    """A fresh copy that a test may change."""
    return copied(built, tmp_path)


@pytest.fixture(scope="session")
def finished(built: Stored, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """One that has its report. Not to be changed."""
    made = copied(built, tmp_path_factory.mktemp("report"))
    result = made.report()
    assert result.state == "done", result.detail or result.reason
    return made


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A copy of the finished demo beside the repository's configs, where somebody has run it."""
    import logging

    from trait_assets.experiments import load_experiment
    from trait_assets.paths import REPOSITORY
    from trait_assets.progress import LogProgress

    source = REPOSITORY / "experiments"
    if not (source / "demo" / "manifests" / "vector_evaluation").is_dir():
        pytest.skip("the demo has not been run here")
    root = tmp_path_factory.mktemp("demo")
    for part in ("demo", "_scenarios", "_shared"):
        shutil.copytree(
            source / part, root / "experiments" / part, ignore=shutil.ignore_patterns("journal", "history")
        )
    return Stored(
        StageContext(
            experiment=load_experiment(root / "experiments", "demo"),
            workspace=Workspace(root / "experiments", root / "index.duckdb"),
            models=None,  # type: ignore[arg-type]
            judges=None,  # type: ignore[arg-type]
            dataset_root=REPOSITORY / "datasets" / "traits",
            run_id="report-test",
            progress=LogProgress(logging.getLogger("quiet"), interval=1e9),
            force=True,
        ),
        root,
    )
