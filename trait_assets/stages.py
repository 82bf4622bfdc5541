"""All stages by name. The assets wrap them; commands ask them for versions. Nothing heavy is imported."""

from __future__ import annotations

from trait_assets.activations.extraction import ActivationsStage
from trait_assets.evaluation.evaluation import ExtractionEvaluationStage, VectorEvaluationStage
from trait_assets.judging import VettedResponsesStage, VettedScenariosStage
from trait_assets.pipeline import Stage
from trait_assets.report.report import ReportStage
from trait_assets.responses.generation import ResponsesStage
from trait_assets.scenarios.reading import ScenariosStage
from trait_assets.steering.evaluation import SteeringStage, SteeringSummaryStage
from trait_assets.vectors.extraction import VectorsStage


def all_stages() -> dict[str, Stage]:
    """In the order of the pipeline, tables last."""
    stages: list[Stage] = [
        ScenariosStage(),
        VettedScenariosStage(),
        ResponsesStage(),
        VettedResponsesStage(),
        ActivationsStage(),
        VectorsStage(),
        VectorEvaluationStage(),
        SteeringStage(),
        ExtractionEvaluationStage(),
        SteeringSummaryStage(),
        ReportStage(),
    ]
    return {stage.name: stage for stage in stages}


def code_versions() -> dict[str, str]:
    return {name: stage.code_version for name, stage in all_stages().items()}
