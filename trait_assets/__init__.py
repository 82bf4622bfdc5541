"""Trait vectors as a Dagster asset graph: from natural scenarios to directions proved causal by steering."""
