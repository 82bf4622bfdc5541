"""The one partition set: `traits`, keys `category/trait`, kept in the Dagster instance.

Dynamic, so that a new folder needs no reload, and so that traits added together stay neighbours: a batch of neighbours is one
run. Discovery of folders is pure (`scenarios.dataset.discover`); this module only compares it with the instance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import dagster as dg

TRAITS = "traits"
traits_partitions = dg.DynamicPartitionsDefinition(name=TRAITS)


def known_traits(instance: dg.DagsterInstance) -> list[str]:
    """Partition keys in the order of their registration."""
    return list(instance.get_dynamic_partitions(TRAITS))


def register(instance: dg.DagsterInstance, traits: Iterable[str]) -> list[str]:
    """Add what is missing, in sorted order; returns what was added."""
    known = set(known_traits(instance))
    new = sorted(set(traits) - known)
    if new:
        instance.add_dynamic_partitions(TRAITS, new)
    return new


def contiguous_ranges(known: Sequence[str], wanted: Iterable[str], limit: int) -> list[list[str]]:
    """Cut `wanted` into runs of neighbours in registration order, each at most `limit` long.

    A Dagster run covers a range of partitions, so traits that are not neighbours cannot share one.
    """
    chosen = set(wanted)
    ranges: list[list[str]] = []
    previous: int | None = None
    for index, trait in enumerate(known):
        if trait not in chosen:
            continue
        if previous is not None and index == previous + 1 and len(ranges[-1]) < limit:
            ranges[-1].append(trait)
        else:
            ranges.append([trait])
        previous = index
    return ranges
