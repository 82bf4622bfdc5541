"""An experiment: which models, which traits, which options. A documented, typed config file and nothing else.

`experiments/<name>/config.yaml` (or config.json) is read here. What an option *does* belongs to the stage that reads it.
Every field can be overridden for one run, in the launchpad (resource `overrides`) and on the command line; an override is
part of the fingerprint of whatever it touches, because fingerprints are computed from the effective experiment.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from storage.errors import UserError

EXPERIMENT_NAME = re.compile(r"^[a-z0-9][a-z0-9_-]*$")
INSTRUCT_MAX_NEW_TOKENS = 150
BASE_MAX_NEW_TOKENS = 16
# no model has more; the true number is checked again when the model is at hand
MOST_LAYERS = 1000


def _as_list(value: Any) -> Any:
    """`a,b` on a command line and [a, b] in YAML mean the same."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _position_list(value: Any) -> Any:
    # a position never holds a comma, so the same splitting serves
    return _as_list(value)


Names = Annotated[list[str], BeforeValidator(_as_list)]
Positions = Annotated[list[str], BeforeValidator(_position_list)]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class SteeringOptions(_Options):
    """Options of stage 5, under `steer:` in the config."""

    questions: int | None = Field(
        None, ge=1, description="Use the first N questions of steering.json; default all."
    )
    max_new_tokens: int = Field(64, ge=1, description="Length of each answer.")
    temperature: float = Field(
        0.0, ge=0, description="0 is greedy; a steered answer and its baseline share the seed."
    )
    chat: bool | None = Field(
        None, description="Chat template for questions; default where the tokenizer has one."
    )
    search_share: float = Field(
        0.4,
        gt=0,
        lt=1,
        description="Share of the questions that choose layer, method and dose; the rest report.",
    )
    methods: Names | None = Field(
        None, description="Vector methods to try; default those of the experiment, random left out."
    )
    layers: str | None = Field(None, description="Layers to try, as in `layers`; default the depth window.")
    depth_window: tuple[float, float] = Field(
        (0.25, 0.75), description="Depth window of candidate layers (share of depth)."
    )
    max_candidates: int = Field(
        24, ge=1, description="Candidates (layer × method × position × component) per trait."
    )
    candidates: list[dict[str, Any]] | None = Field(
        None, description="Explicit candidates: a list of {layer, method, position?, component?}."
    )
    doses: list[float] = Field(
        default_factory=lambda: [0.06, 0.12, 0.18, 0.26],
        description="The coarse ladder of relative doses (‖added‖ ÷ median ‖h‖).",
    )
    refine_steps: int = Field(2, ge=0, description="Bracket-and-bisect rounds after the ladder.")
    refine_top: int = Field(3, ge=1, description="How many candidates are refined.")
    coherence_threshold: float = Field(
        70.0, ge=0, le=100, description="Least mean coherence of an admissible dose."
    )
    controls: int = Field(5, ge=0, description="Norm-matched random directions at the chosen layer and dose.")
    prompting_baseline: bool = Field(
        True, description="Also measure what a system prompt built from the definition does."
    )
    steer_from: Literal["response", "all"] = Field("response", description="First steered position.")
    operation: Literal["add", "add_norm_preserving"] = "add"
    multi_layer: bool = Field(
        False, description="Also try several layers at once, weighted by single-layer effect."
    )
    bootstrap: int = Field(2000, ge=100, description="Bootstrap draws over questions.")

    @model_validator(mode="after")
    def _doses(self) -> SteeringOptions:
        if not self.doses or any(d <= 0 or d > 5 for d in self.doses):
            raise ValueError("doses must be positive relative doses, at most 5")
        low, high = self.depth_window
        if not 0 <= low < high <= 1:
            raise ValueError("depth_window must be two shares of depth, low < high, within 0 and 1")
        return self


class GenerationOptions(_Options):
    """Where stage 1 is generated, under `generation:` in the config. Capture and steering always run on a loaded model.

    Which backend and under which name it serves the model are part of the responses' fingerprint; where the server
    stands and how hard it is asked are not.
    """

    backend: Literal["local", "server"] = Field(
        "local", description="server: a vLLM or SGLang server generates, asked by token ids."
    )
    server_url: str | None = Field(
        None,
        description="Address of the server, ending in /v1; default the variable TRAITS_GENERATION_URL.",
    )
    served_model: str | None = Field(
        None, description="Name under which the server lists the model; default extraction_model."
    )
    api_key_env: str | None = Field(
        None, description="Name of the environment variable that holds the server's key; default no key."
    )
    max_concurrency: int = Field(64, ge=1, description="Requests in flight at once.")
    requests_per_minute: int = Field(0, ge=0, description="Client-side rate limit; 0: none.")
    timeout_s: float = Field(600.0, gt=0, description="Time limit of one request.")
    max_attempts: int = Field(8, ge=1, description="Tries per prompt for server faults and timeouts.")
    max_wait_s: float = Field(900.0, gt=0, description="Longest time one prompt may wait on rate limits.")
    max_calls: int = Field(0, ge=0, description="Budget of answered requests per process; 0: none.")
    max_tokens: int = Field(0, ge=0, description="Budget of prompt + response tokens per process; 0: none.")

    @model_validator(mode="after")
    def _address(self) -> GenerationOptions:
        if self.server_url is not None and not re.match(r"https?://[^/@?]+(/[^?]*)?$", self.server_url):
            raise ValueError(
                "server_url must be an http(s) address without user name or query, e.g. http://localhost:8000/v1"
            )
        if self.api_key_env is not None and not re.match(r"[A-Za-z_][A-Za-z0-9_]*$", self.api_key_env):
            raise ValueError("api_key_env is the name of a variable, not a key")
        return self


class RunResources(_Options):
    """What one run asks of a cluster, under `run_resources:` in the config. No number depends on it; on one machine it is
    not read."""

    gpus: int = Field(
        1,
        ge=0,
        description="GPUs of a run that holds a model; 0 on a cluster without. Other runs ask for none.",
    )
    cpus: float | None = Field(None, gt=0, description="CPU cores of a run; default the launcher's.")
    memory_gb: float | None = Field(None, gt=0, description="Memory of a run, GiB; default the launcher's.")


class Experiment(_Options):
    """Everything an experiment can be told; defaults are those of the specification."""

    name: str = Field(description="The folder name under experiments/; never written in the file.")
    description: str = ""
    extraction_model: str = Field(description="Hub id, local folder, .gguf file or embedded:<name>.")
    application_model: str | None = Field(
        None, description="The model that is steered; default the extraction model."
    )
    extraction_revision: str | None = None
    application_revision: str | None = None
    extraction_adapter: str | None = Field(None, description="PEFT/LoRA adapter on the extraction model.")
    application_adapter: str | None = None
    traits: Names | None = Field(
        None, description="category/trait names or patterns such as emotion/*; default every trait there is."
    )

    steering: bool = Field(True, description="Stage 5; without it steering.json may be missing.")
    vet_scenarios: bool = Field(True, description="Stage 0.5.")
    vet: bool = Field(True, description="Both vetting stages; off switches 0.5 and 1.5 off.")
    pos_threshold: float = Field(
        60.0, ge=0, le=100, description="A positive is kept at this judge score or above."
    )
    neg_threshold: float = Field(
        40.0, ge=0, le=100, description="A negative is kept at this judge score or below."
    )
    min_kept: int = Field(10, ge=2, description="Fewest rows per side that vetting may leave.")
    max_abstention_rate: float = Field(
        0.10, ge=0, le=1, description="Largest share of items a judge may abstain on."
    )
    pair_filter: bool = Field(False, description="Drop both rows of a pair when one of them fails vetting.")
    vetting_filter: bool = Field(True, description="Leave failed responses out of stage 2.")

    max_new_tokens: int | None = Field(
        None, ge=1, description="Response length; default 150 (instruct), 16 (base)."
    )
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    base_model: bool | None = Field(
        None,
        description="Text completion without chat template; default by the tokenizer (no template → base).",
    )
    scenario_limit: int | None = Field(None, ge=2, description="Use a seeded subset of N scenarios per side.")

    val_split: float = Field(0.2, ge=0, lt=1, description="Held-out share; 0 turns the held-out set off.")
    position: Positions = Field(
        default_factory=lambda: ["response[:]"], description="<frame>[<slice>], several allowed."
    )
    component: Names = Field(default_factory=lambda: ["residual"], description="Hook sites, several allowed.")
    methods: Names = Field(
        default_factory=lambda: ["mean_diff", "probe", "gradient"], description="Vector methods."
    )
    layers: str = Field("all", description="16 | 5,10 | 5-20 | 30%-60% | all")
    prefill_only: bool = Field(False, description="No generation: scenarios go straight to stage 2.")
    token_position: Literal["last", "first", "mean"] = Field(
        "last", description="Position in prefill-only mode."
    )
    n_random: int = Field(100, ge=20, description="Random directions in the null distribution.")
    n_permutations: int = Field(
        200, ge=0, description="Label permutations in the permutation null; 0 turns it off."
    )
    bootstrap: int = Field(1000, ge=100, description="Bootstrap draws of held-out intervals.")

    batch_size: int | None = Field(
        None, ge=1, description="Rows per batch; default automatic, from free memory."
    )
    seed: int = 0
    steer: SteeringOptions = Field(default_factory=SteeringOptions)
    generation: GenerationOptions = Field(default_factory=GenerationOptions)
    run_resources: RunResources = Field(default_factory=RunResources)

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if self.pos_threshold <= self.neg_threshold:
            raise ValueError("pos_threshold must be above neg_threshold")
        if (
            self.vet
            and not self.prefill_only
            and self.scenario_limit is not None
            and self.scenario_limit < self.min_kept
        ):
            raise ValueError(
                f"scenario_limit {self.scenario_limit} is below min_kept {self.min_kept}: vetting could never pass"
            )
        return self

    def covers(self, trait: str) -> bool:
        """Whether the trait is among this experiment's `traits`."""
        return self.traits is None or any(fnmatch.fnmatchcase(trait, pattern) for pattern in self.traits)

    @property
    def steered_model(self) -> str:
        return self.application_model or self.extraction_model

    @property
    def steered_revision(self) -> str | None:
        return self.application_revision if self.application_model else self.extraction_revision

    @property
    def steered_adapter(self) -> str | None:
        return self.application_adapter if self.application_model else self.extraction_adapter

    @property
    def scenario_vetting(self) -> bool:
        return self.vet and self.vet_scenarios and not self.prefill_only

    @property
    def response_vetting(self) -> bool:
        return self.vet and not self.prefill_only

    @property
    def positions(self) -> list[str]:
        """The positions captured: in prefill-only mode the one that token_position names, unless prompt positions
        are asked for explicitly."""
        if not self.prefill_only:
            return list(self.position)
        prompt_positions = [p for p in self.position if p.startswith("prompt")]
        return prompt_positions or [
            {"last": "prompt[-1]", "first": "prompt[0]", "mean": "prompt[:]"}[self.token_position]
        ]

    def response_length(self, *, base: bool) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return BASE_MAX_NEW_TOKENS if base else INSTRUCT_MAX_NEW_TOKENS

    def with_overrides(self, overrides: Mapping[str, Any]) -> Experiment:
        """The effective experiment of one run. `steer` and the other groups may be partial mappings."""
        given = {k: v for k, v in overrides.items() if v is not None}
        if not given:
            return self
        values = self.model_dump()
        for group in GROUPS:
            part = given.pop(group, None)
            if part:
                values[group] = {**values[group], **{k: v for k, v in dict(part).items() if v is not None}}
        values.update(given)
        return parse_experiment(self.name, {k: v for k, v in values.items() if k != "name"}, where="override")


# options that have options of their own
GROUPS: dict[str, type[_Options]] = {
    "steer": SteeringOptions,
    "generation": GenerationOptions,
    "run_resources": RunResources,
}


def _nearest(unknown: str, known: list[str]) -> str:
    close = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"known options: {', '.join(sorted(known))}"


def parse_experiment(name: str, values: Mapping[str, Any], *, where: str) -> Experiment:
    """Validate a config mapping; every fault is a `UserError` naming the option.

    Positions and layers are checked for their grammar here, so that a typing error never reaches a model.
    """
    if not EXPERIMENT_NAME.match(name):
        raise UserError(
            f"experiment name {name!r} is not allowed",
            where=where,
            remedy="use lower-case letters, digits, - and _ only",
        )
    for key in values:
        if key not in Experiment.model_fields or key == "name":
            known = [f for f in Experiment.model_fields if f != "name"]
            raise UserError(f"unknown option `{key}`", where=where, remedy=_nearest(str(key), known))
    for group, options in GROUPS.items():
        given = values.get(group)
        for key in given if isinstance(given, Mapping) else ():
            if key not in options.model_fields:
                raise UserError(
                    f"unknown option `{group}.{key}`",
                    where=where,
                    remedy=_nearest(str(key), list(options.model_fields)),
                )
    try:
        experiment = Experiment(name=name, **dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"]) or "config"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise UserError(
                f"option `{option}` is missing", where=where, remedy=f"add `{option}: …`"
            ) from error
        raise UserError(f"option `{option}`: {message}", where=where, remedy="correct this value") from error
    _check_grammars(experiment, where)
    return experiment


def _check_grammars(experiment: Experiment, where: str) -> None:
    from resources.models.layers import parse_layers
    from resources.models.positions import Position
    from resources.models.rows import COMPONENTS

    for component in experiment.component:
        if component not in COMPONENTS:
            raise UserError(
                f"there is no component `{component}`",
                where=where,
                remedy=_nearest(component, list(COMPONENTS)),
            )
    for position in experiment.position:
        Position.parse(position)
    if not experiment.positions:
        raise UserError(
            "option `position` is empty", where=where, remedy="name at least one, e.g. response[:]"
        )
    for name, spec in (("layers", experiment.layers), ("steer.layers", experiment.steer.layers)):
        if spec is not None:
            try:
                parse_layers(spec, MOST_LAYERS)
            except UserError as error:
                raise UserError(f"option `{name}`: {error.what}", where=where, remedy=error.remedy) from error


def config_path(root: Path, name: str) -> Path | None:
    for file in ("config.yaml", "config.yml", "config.json"):
        if (root / name / file).is_file():
            return root / name / file
    return None


def list_experiments(root: Path) -> list[str]:
    """Names of the folders under `root` that hold a config file."""
    if not root.is_dir():
        return []
    return sorted(
        p.name for p in root.iterdir() if EXPERIMENT_NAME.match(p.name) and config_path(root, p.name)
    )


def load_experiment(root: Path, name: str) -> Experiment:
    """Read experiments/<name>/config.yaml (or .json). Raises UserError naming file and option."""
    path = config_path(root, name)
    if path is None:
        known = list_experiments(root)
        raise UserError(
            f"there is no experiment `{name}`",
            where=str(root),
            remedy=(_nearest(name, known) if known else "write")
            + f"; an experiment is a file {root / name / 'config.yaml'}",
        )
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UserError("is not UTF-8", where=str(path), remedy="save the file as UTF-8") from error
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise UserError(f"cannot be parsed: {error}", where=str(path), remedy="correct the syntax") from error
    if not isinstance(values, dict):
        raise UserError("is not a mapping of options", where=str(path), remedy="write `extraction_model: …`")
    return parse_experiment(name, values, where=str(path))
