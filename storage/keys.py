"""Where things live: names in, storage keys out.

Belongs here: the layout of the root folder and the rules for names. Does not: reading, writing, the
encoding of positions into folder names (callers bring the folder name).

    _scenarios/{category}/{trait}/scenario_set.json           shared by all experiments
    _cache/{kind}/{category}/{trait}/…                        rows by content (judgements), shared
    _shared/manifests/{stage}/{category}/{trait}.json
    {experiment}/extraction/{category}/{trait}/…
    {experiment}/steering/{category}/{trait}/{position}/…
    {experiment}/manifests/{stage}/{category}/{trait}.json    a stage's current result; tables: …/{stage}.json
    {experiment}/history/{stage}/…                            every manifest ever committed
    {experiment}/metrics/{stage}/…                            Parquet rows
    {experiment}/pictures/{stage}/…                           PNG
    {experiment}/journal/{stage}/{category}/{trait}/…         rows of a stage in progress
"""

from __future__ import annotations

import re

from storage.artifacts import ArtifactStore, is_device_name
from storage.errors import UserError

SHARED = "_shared"
MAX_NAME = 100
_NAME = r"[a-z0-9][a-z0-9_-]*"
_TRAIT = re.compile(rf"{_NAME}/{_NAME}")
_EXPERIMENT = re.compile(_NAME)
_STAGE = re.compile(r"[a-z][a-z0-9_]*")


def check_trait(trait: str) -> str:
    """`trait` if it is a legal `category/name`; UserError otherwise."""
    legal = isinstance(trait, str) and _TRAIT.fullmatch(trait) is not None and len(trait) <= MAX_NAME
    if not legal or any(is_device_name(part) for part in trait.split("/")):
        raise UserError(
            f"{_short(trait)} is not a trait name",
            remedy=(
                "Name it category/trait with lower-case letters, digits, _ and -, each part beginning with a "
                f"letter or digit, at most {MAX_NAME} characters, and no Windows device name such as con."
            ),
        )
    return trait


def check_experiment(experiment: str) -> str:
    """`experiment` if it is a legal name; UserError otherwise."""
    legal = (
        isinstance(experiment, str)
        and _EXPERIMENT.fullmatch(experiment) is not None
        and len(experiment) <= MAX_NAME
    )
    if not legal or is_device_name(experiment):
        raise UserError(
            f"{_short(experiment)} is not an experiment name",
            remedy=(
                "Use lower-case letters, digits, _ and -, beginning with a letter or digit, "
                f"at most {MAX_NAME} characters, and no Windows device name such as con."
            ),
        )
    return experiment


def check_stage(stage: str) -> str:
    """`stage` if it is a legal stage name; UserError otherwise."""
    if not isinstance(stage, str) or not _STAGE.fullmatch(stage) or len(stage) > MAX_NAME:
        raise UserError(
            f"{_short(stage)} is not a stage name", remedy="Use lower-case letters, digits and _."
        )
    return stage


def _short(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 60 else f"{text[:50]}… ({len(str(name))} characters)"


def scope(experiment: str | None) -> str:
    """The top folder of an experiment, or of what all experiments share (None)."""
    return SHARED if experiment is None else check_experiment(experiment)


def scenario_set(trait: str) -> str:
    return f"_scenarios/{check_trait(trait)}/scenario_set.json"


def extraction(experiment: str, trait: str | None = None, *rest: str) -> str:
    """Under `{experiment}/extraction`; without a trait, a file of the whole experiment."""
    folder = f"{check_experiment(experiment)}/extraction"
    if trait is not None:
        folder = f"{folder}/{check_trait(trait)}"
    return ArtifactStore.check_key("/".join((folder, *rest)))


def steering(
    experiment: str, trait: str | None = None, position_folder: str | None = None, *rest: str
) -> str:
    """Under `{experiment}/steering`; without a trait, a file of the whole experiment."""
    folder = f"{check_experiment(experiment)}/steering"
    if trait is not None:
        folder = f"{folder}/{check_trait(trait)}"
    if position_folder is not None:
        folder = f"{folder}/{position_folder}"
    return ArtifactStore.check_key("/".join((folder, *rest)))


def manifest(experiment: str | None, stage: str, trait: str | None) -> str:
    place = f"{scope(experiment)}/manifests/{check_stage(stage)}"
    return f"{place}.json" if trait is None else f"{place}/{check_trait(trait)}.json"


def _per_trait(top: str, kind: str, stage: str, trait: str | None) -> str:
    # A table's own files lie beside the categories, which cannot begin with "_".
    place = f"{top}/{kind}/{check_stage(stage)}"
    return f"{place}/_table" if trait is None else f"{place}/{check_trait(trait)}"


def history(experiment: str | None, stage: str, trait: str | None) -> str:
    """Folder of all manifests that were ever committed here."""
    return _per_trait(scope(experiment), "history", stage, trait)


def row_cache(kind: str, trait: str) -> str:
    """Folder of content-addressed rows (`kind`: judge, …), shared by all experiments."""
    return f"_cache/{check_stage(kind)}/{check_trait(trait)}"


def journal(experiment: str | None, stage: str, trait: str | None) -> str:
    """Folder of the rows of a stage in progress."""
    return _per_trait(scope(experiment), "journal", stage, trait)


def metrics(experiment: str | None, stage: str, trait: str | None) -> str:
    """Folder of the Parquet files of one stage and trait (None: of a table)."""
    return _per_trait(scope(experiment), "metrics", stage, trait)


def picture(experiment: str | None, stage: str, trait: str | None, name: str) -> str:
    """A PNG that belongs to a stage's result."""
    return ArtifactStore.check_key(f"{_per_trait(scope(experiment), 'pictures', stage, trait)}/{name}.png")
