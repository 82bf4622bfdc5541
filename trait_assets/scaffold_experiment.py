"""A new experiment's config file: what the user gave, and every default as a comment with its meaning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from storage.errors import UserError
from trait_assets.experiments import Experiment, config_path, parse_experiment


def write_experiment(
    root: Path, name: str, extraction_model: str, application_model: str | None, traits: Sequence[str] | None
) -> Path:
    """Write experiments/<name>/config.yaml. Refuses a bad name and an experiment that exists."""
    given: dict[str, object] = {"extraction_model": extraction_model}
    if application_model:
        given["application_model"] = application_model
    if traits:
        given["traits"] = list(traits)
    parse_experiment(name, given, where="new-experiment")
    if (existing := config_path(root, name)) is not None:
        raise UserError(
            "the experiment exists", where=str(existing), remedy="edit it, or choose another name"
        )
    lines = [
        yaml.safe_dump(given, sort_keys=False, allow_unicode=True).rstrip(),
        "",
        "# Options and their defaults:",
    ]
    for option, field in Experiment.model_fields.items():
        if option in given or option in ("name", "steer"):
            continue
        default = field.get_default(call_default_factory=True)
        text = (
            yaml.safe_dump({option: default}, default_flow_style=True, width=1000)
            .strip()
            .removeprefix("{")
            .removesuffix("}")
        )
        lines.append(f"# {text}" + (f"   # {field.description}" if field.description else ""))
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
