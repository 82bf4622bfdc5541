"""Vetting of responses: the rules are those of scenarios (trait_assets/scenarios/vetting.py), the subject is
another.

Nothing here asks a judge or reads a file.
"""

from __future__ import annotations

from functools import partial

from trait_assets.scenarios.vetting import Candidate, Vetting, apply_thresholds

vet_responses = partial(apply_thresholds, subject="responses")

__all__ = ["Candidate", "Vetting", "vet_responses"]
