"""A new experiment's config file: what the user gave, and every default as a comment with its meaning."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel

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
    lines += _commented(Experiment, left_out={*given, "name"})
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _commented(options: type[BaseModel], *, left_out: Collection[str] = (), indent: str = "") -> list[str]:
    """Each option with its default as a comment line, options of a group indented under its name."""
    lines = []
    for option, field in options.model_fields.items():
        if option in left_out:
            continue
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            lines += [f"# {indent}{option}:", *_commented(type(default), indent=indent + "  ")]
            continue
        plain = list(default) if isinstance(default, tuple) else default
        text = (
            yaml.safe_dump({option: plain}, default_flow_style=True, width=1000)
            .strip()
            .removeprefix("{")
            .removesuffix("}")
        )
        lines.append(f"# {indent}{text}" + (f"   # {field.description}" if field.description else ""))
    return lines
