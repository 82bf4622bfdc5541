"""Every option of an experiment, given on the command line, changes the plans of the stages that it is about and of no other.

A plan holds everything that decides a result; its fingerprint is what a result is kept by. So each option is given to
`traits run` over a finished experiment, and where the launch would be, every stage plans one trait instead. Options that
decide no result (batch sizes, rate limits) are looked at where they arrive. A test fails while an option is in neither list.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from resources.judges.resource import JudgeResource
from resources.models.resource import ModelResource
from storage.errors import UserError
from trait_assets import cli, launch
from trait_assets.experiments import Experiment
from trait_assets.paths import dataset_root
from trait_assets.pipeline import PIPELINE, StageContext, stage_fingerprint, stages_of
from trait_assets.progress import LinesProgress
from trait_assets.stages import all_stages

TRAIT = "register/bureaucratic"
COMMIT = {"main": "a" * 40, "next": "b" * 40}


@dataclass
class Planned:
    """What a command would have launched, and the plans of TRAIT under its options."""

    effective: Experiment
    traits: list[str]
    stages: list[str]
    judges: dict[str, Any]
    models: dict[str, Any]
    force: bool
    plans: dict[str, str] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    context: StageContext | None = None

    def changed(self, before: Planned) -> set[str]:
        return {s for s in {*self.plans, *before.plans} if self.plans.get(s) != before.plans.get(s)}


# what most tests compare with is planned once
KEPT: dict[tuple[str, tuple[str, ...]], Planned] = {}


@pytest.fixture
def plan(finished, monkeypatch) -> Callable[..., Planned]:
    """plan("--layers", "10"): `traits run -e small --layers 10` up to the launch."""
    for name, value in finished.copy.env.items():
        monkeypatch.setenv(name, value)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "DAGSTER_HOME", "TRAITS_STORE"):
        monkeypatch.delenv(name, raising=False)

    def planned(*arguments: str, command: str = "run") -> Planned:
        if (command, arguments) in KEPT:
            return KEPT[command, arguments]
        seen: list[Planned] = []

        def look(self: launch.Launcher, traits: list[str], stages: list[str]) -> launch.LaunchReport:
            found = Planned(self.effective, list(traits), list(stages), self.judges, self.models, self.force)
            found.context = context = StageContext(
                experiment=self.effective,
                workspace=cli.open_workspace(),
                models=ModelResource(**self.models),
                judges=JudgeResource(**self.judges),
                dataset_root=dataset_root(),
                run_id="plan",
                progress=LinesProgress(),
            )
            every = all_stages()
            for name in stages_of(self.effective):
                try:
                    one = every[name].plan(context, TRAIT)
                except UserError as error:
                    found.plans[name] = f"refused: {error}"
                    continue
                found.plans[name] = stage_fingerprint(every[name], one)
                found.options[name] = one.options
                if one.skipped is not None:
                    found.skipped[name] = one.skipped
            seen.append(found)
            return self.report

        monkeypatch.setattr(launch.Launcher, "launch", look)
        result = CliRunner().invoke(cli.app, [command, "-e", "small", *arguments, "--json"])
        assert result.exit_code == 0, (result.output, result.exception)
        (found,) = seen
        if arguments in ((), ("--judge", "openai")):
            KEPT[command, arguments] = found
        return found

    return planned


@pytest.fixture
def base(plan) -> Planned:
    return plan()


def test_with_no_option_every_plan_is_the_stored_one(base):
    manifests = cli.open_workspace().manifests
    for stage in PIPELINE:
        stored = manifests.read(None if stage == "scenarios" else "small", stage, TRAIT)
        assert base.plans[stage] == stored.fingerprint, stage


VETTING = {"vetted_scenarios", "vetted_responses"}
STEERED = {"steering_results"}
EVERYTHING_AFTER_SCENARIOS = set(PIPELINE) - {"scenarios"}

# option → what is typed, and the stages whose plan it changes, given that everything before them stays as it is
CHANGES: dict[str, tuple[list[str], set[str]]] = {
    "pos_threshold": (["--pos-threshold", "65"], VETTING),
    "neg_threshold": (["--neg-threshold", "35"], VETTING),
    "min_kept": (["--set", "min_kept=3"], VETTING),
    "max_abstention_rate": (["--set", "max_abstention_rate=0.5"], VETTING),
    "pair_filter": (["--set", "pair_filter=true"], VETTING),
    "scenario_limit": (["--scenario-limit", "10"], {"vetted_scenarios", "responses"}),
    "max_new_tokens": (["--max-new-tokens", "9"], {"responses"}),
    "temperature": (["--temperature", "0.7"], {"responses"}),
    "top_p": (["--set", "top_p=0.9"], {"responses"}),
    "base_model": (["--it-model"], {"responses", "activations"}),
    "vetting_filter": (["--no-vetting-filter"], {"activations"}),
    "val_split": (["--val-split", "0.3"], {"activations", "vector_evaluation"}),
    "position": (["--position", "response[:3],prompt[-1]"], {"activations"}),
    "component": (["--component", "residual,mlp_out"], {"activations"}),
    "layers": (["--layers", "10"], {"activations"}),
    "methods": (["--methods", "mean_diff,gradient"], {"vectors"}),
    "n_random": (["--set", "n_random=30"], {"vector_evaluation"}),
    "n_permutations": (["--set", "n_permutations=0"], {"vector_evaluation"}),
    "bootstrap": (["--set", "bootstrap=200"], {"vector_evaluation"}),
    "seed": (["--seed", "7"], EVERYTHING_AFTER_SCENARIOS - {"vetted_responses"}),
    "vet_scenarios": (["--no-vet-scenarios"], {"vetted_scenarios"}),
    "vet": (["--no-vet"], VETTING),
    "steering": (["--no-steering"], STEERED),
    "extraction_model": (
        ["--extraction-model", "org/base"],
        {"responses", "activations", "steering_results"},
    ),
    "extraction_revision": (
        ["--extraction-model", "org/base", "--set", "extraction_revision=next"],
        {"responses", "activations", "steering_results"},
    ),
    "extraction_adapter": (
        ["--set", "extraction_adapter=org/adapter"],
        {"responses", "activations", "steering_results"},
    ),
    "application_model": (["--application-model", "org/base"], STEERED),
    "application_revision": (
        ["--application-model", "org/base", "--set", "application_revision=next"],
        STEERED,
    ),
    "application_adapter": (
        ["--application-model", "org/base", "--set", "application_adapter=org/adapter"],
        STEERED,
    ),
}
STEER: dict[str, Any] = {
    "questions": 6,
    "max_new_tokens": 5,
    "temperature": 0.5,
    "chat": False,
    "search_share": 0.5,
    "methods": ["probe"],
    "layers": "17",
    "depth_window": [0.5, 0.7],
    "max_candidates": 1,
    "candidates": [{"layer": 10, "method": "mean_diff"}],
    "doses": [0.05],
    "refine_steps": 1,
    "refine_top": 1,
    "coherence_threshold": 60.0,
    "controls": 1,
    "prompting_baseline": False,
    "steer_from": "all",
    "operation": "add_norm_preserving",
    "multi_layer": True,
    "bootstrap": 300,
}
# what decides no result, and the test below that says what it does
ELSEWHERE = {
    "description": "test_a_description_decides_nothing",
    "traits": "test_traits_narrow_and_widen_a_run",
    "prefill_only": "test_prefill_only_has_another_graph_and_reads_the_token_that_is_asked_for",
    "token_position": "test_prefill_only_has_another_graph_and_reads_the_token_that_is_asked_for",
    "batch_size": "test_a_batch_size_bounds_the_model_and_decides_nothing",
}


def nested(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    return {
        name: info.annotation
        for name, info in model.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    }


def test_no_option_of_an_experiment_is_without_a_test():
    groups = nested(Experiment)
    plain = set(Experiment.model_fields) - {"name"} - set(groups)
    assert plain == set(CHANGES) | set(ELSEWHERE)
    assert not set(CHANGES) & set(ELSEWHERE)
    assert all(name in globals() for name in ELSEWHERE.values())
    assert {f"steer.{name}" for name in STEER} == {f"steer.{n}" for n in groups["steer"].model_fields}
    assert set(groups) == {"steer", *GROUPS}
    for group, options in GROUPS.items():
        assert set(options) == set(groups[group].model_fields), group


@pytest.fixture
def hub(tmp_path, monkeypatch) -> None:
    """A Hugging Face cache that knows org/base in two revisions, and org/adapter."""
    from huggingface_hub import constants

    for repo in ("base", "adapter"):
        folder = tmp_path / f"models--org--{repo}"
        (folder / "refs").mkdir(parents=True)
        for name, commit in COMMIT.items():
            (folder / "refs" / name).write_text(commit)
            (folder / "snapshots" / commit).mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize("option", CHANGES)
def test_an_option_changes_the_plans_that_it_is_about(option, plan, base, hub, finished):
    arguments, stages = CHANGES[option]
    config = finished.copy.experiments / "small" / "config.yaml"
    written = config.read_bytes()
    given = plan(*arguments)
    assert getattr(given.effective, option) != getattr(base.effective, option)
    assert given.changed(base) == stages
    assert config.read_bytes() == written


def test_revisions_and_adapters_are_in_the_identity(plan, hub):
    main = plan("--extraction-model", "org/base")
    later = plan("--extraction-model", "org/base", "--set", "extraction_revision=next")
    assert main.options["activations"]["model"]["revision"] == COMMIT["main"]
    assert later.options["activations"]["model"]["revision"] == COMMIT["next"]
    adapted = plan("--set", "extraction_adapter=org/adapter").options["responses"]["model"]
    assert adapted["adapter"] == "org/adapter"
    assert plan("--application-model", "org/base").options["responses"] == plan().options["responses"]


@pytest.mark.parametrize("option", STEER)
def test_an_option_of_steering_changes_steering_alone(option, plan, base):
    value = STEER[option]
    given = plan("--set", f"steer.{option}={json.dumps(value)}")
    assert given.changed(base) == STEERED
    assert given.options["steering_results"]["steer"][option] == value
    if option in ("methods", "layers", "candidates", "max_candidates", "depth_window"):
        chosen = given.options["steering_results"]["candidates"]
        assert chosen != base.options["steering_results"]["candidates"]


def test_vetting_that_is_off_is_skipped_and_says_so(plan):
    assert set(plan("--no-vet-scenarios").skipped) == {"vetted_scenarios"}
    assert set(plan("--no-vet").skipped) == VETTING
    assert "switched off" in plan("--no-vet").skipped["vetted_responses"]
    assert not plan("--vet", "--vet-scenarios").skipped


def test_without_steering_there_is_no_steering_stage(plan):
    assert "steering_results" not in plan("--no-steering").stages
    assert "steering_results" in plan("--steering").stages


def test_traits_narrow_and_widen_a_run(plan, base):
    assert base.traits == ["emotion/enthusiasm", TRAIT]
    assert plan("--traits", TRAIT).traits == [TRAIT]
    assert plan("-t", "emotion/*").traits == ["emotion/enthusiasm"]
    narrowed = plan("--set", f"traits=[{TRAIT}]")
    assert narrowed.traits == [TRAIT]
    assert narrowed.plans == base.plans
    # what is named is run, although the config leaves it out
    both = plan("--set", f"traits=[{TRAIT}]", "--traits", "emotion/enthusiasm")
    assert both.effective.covers("emotion/enthusiasm")


def test_prefill_only_has_another_graph_and_reads_the_token_that_is_asked_for(plan):
    for name, position in (("last", "prompt[-1]"), ("first", "prompt[0]"), ("mean", "prompt[:]")):
        given = plan("--prefill-only", "--token-position", name, "--no-steering")
        assert given.stages == ["scenarios", "activations", "vectors", "vector_evaluation"]
        assert given.options["activations"]["positions"] == [position]
        assert given.options["activations"]["prefill_only"] is True
    assert "responses" in plan("--no-prefill-only").stages


def test_a_description_decides_nothing(plan, base):
    given = plan("--set", "description=a try")
    assert given.effective.description == "a try"
    assert given.plans == base.plans


def test_a_batch_size_bounds_the_model_and_decides_nothing(plan, base, smollm2):
    given = plan("--batch-size", "3")
    assert given.plans == base.plans
    assert given.context is not None
    model: Any = given.context.extraction_model()
    assert model.batcher.max_rows == 3
    assert base.context is not None
    assert base.context.extraction_model().batcher.max_rows is None


# option → value and how the server that generates is told of it
SERVER: dict[str, tuple[Any, str]] = {
    "server_url": ("http://127.0.0.1:9/v1", "base_url"),
    "served_model": ("short-name", "model"),
    "api_key_env": ("MY_KEY", "api_key_env"),
    "max_concurrency": (3, "max_concurrency"),
    "requests_per_minute": (30, "requests_per_minute"),
    "timeout_s": (5.0, "timeout_s"),
    "max_attempts": (2, "max_attempts"),
    "max_wait_s": (20.0, "max_wait_s"),
    "max_calls": (100, "max_calls"),
    "max_tokens": (5000, "max_tokens"),
}
RESOURCES = {
    "gpus": (2, "num_gpus", 2),
    "cpus": (3.0, "num_cpus", 3.0),
    "memory_gb": (4.0, "memory", 4 * 2**30),
}
# options under a name of their own, apart from steering's
GROUPS = {"generation": {"backend", *SERVER}, "run_resources": set(RESOURCES)}


def test_a_generation_server_decides_the_responses_by_its_kind_and_model_alone(plan, base):
    served = plan("--set", "generation.backend=server")
    assert served.changed(base) == {"responses"}
    named = plan("--set", "generation.backend=server", "--set", "generation.served_model=short-name")
    assert named.changed(served) == {"responses"}
    rest = [
        f"generation.{option}={value}" for option, (value, _) in SERVER.items() if option != "served_model"
    ]
    settings = [word for setting in rest for word in ("--set", setting)]
    assert plan("--set", "generation.backend=server", *settings).plans == served.plans
    assert plan(*settings).plans == base.plans


def test_every_option_of_the_generation_server_reaches_it(plan, monkeypatch):
    monkeypatch.setattr(ModelResource, "served", lambda self, spec, server: server)
    settings = [f"generation.{option}={value}" for option, (value, _) in SERVER.items()]
    given = plan("--set", "generation.backend=server", *(w for s in settings for w in ("--set", s)))
    assert given.context is not None
    server: Any = given.context.generating_model()
    assert {told: getattr(server, told) for _, told in SERVER.values()} == {
        told: value for value, told in SERVER.values()
    }


def test_the_server_has_flags_of_its_own(plan):
    address = "http://127.0.0.1:9/v1"
    short = plan("--generation", "server", "--generation-url", address)
    assert (short.effective.generation.backend, short.effective.generation.server_url) == ("server", address)
    assert short.plans == plan("--set", "generation.backend=server").plans
    assert plan("--generation", "local").plans == plan().plans


@pytest.mark.parametrize("option", RESOURCES)
def test_what_a_run_asks_of_a_cluster_decides_no_result(option, plan, base):
    from trait_assets.coordinator import RAY_TAG, resource_tag

    value, name, asked = RESOURCES[option]
    given = plan("--set", f"run_resources.{option}={value}")
    assert given.plans == base.plans
    assert resource_tag(RAY_TAG, given.effective.run_resources, gpu=True)[name] == asked


# option of the judge → value, and the stages whose plan it changes where an LLM judge scores
JUDGE_DECIDES = {
    "model": "other",
    "variant": "q4",
    "base_url": "http://127.0.0.1:9/v1",
    "scoring": "text",
    "show_prompt": False,
    "min_mass": 0.5,
    "max_text_chars": 9000,
}
JUDGE_DECIDES_NOTHING = {
    "retry_abstentions": True,
    "max_concurrency": 2,
    "requests_per_minute": 10,
    "timeout_s": 3.0,
    "max_attempts": 2,
    "max_wait_s": 9.0,
    "max_calls": 10,
    "max_tokens": 1000,
    "max_cost_usd": 1.0,
    "prompt_usd_per_million": 1.0,
    "completion_usd_per_million": 2.0,
}


def test_no_option_of_the_judge_is_without_a_test():
    assert {"backend", "api_key", *JUDGE_DECIDES, *JUDGE_DECIDES_NOTHING} == set(JudgeResource.model_fields)


def test_the_judge_decides_what_it_scores(plan, base):
    openai = plan("--judge", "openai")
    assert openai.changed(base) == VETTING | STEERED
    assert openai.judges == {"backend": "openai"}
    assert plan("--judge", "local").plans == base.plans
    named = plan("--judge", "openai", "--judge-model", "other")
    assert named.changed(openai) == VETTING | STEERED
    assert named.judges["model"] == "other"


@pytest.mark.parametrize("option", JUDGE_DECIDES)
def test_an_option_that_decides_a_score_changes_what_is_judged(option, plan):
    given = plan("--judge", "openai", "--set", f"judge.{option}={json.dumps(JUDGE_DECIDES[option])}")
    assert given.judges[option] == JUDGE_DECIDES[option]
    assert given.changed(plan("--judge", "openai")) == VETTING | STEERED


def test_limits_and_prices_of_the_judge_reach_it_and_decide_no_score(plan):
    settings = [f"judge.{option}={json.dumps(value)}" for option, value in JUDGE_DECIDES_NOTHING.items()]
    given = plan("--judge", "openai", *(word for s in settings for word in ("--set", s)))
    assert given.judges == {"backend": "openai", **JUDGE_DECIDES_NOTHING}
    assert given.plans == plan("--judge", "openai").plans


def test_a_key_is_refused_on_the_command_line(finished, monkeypatch):
    for name, value in finished.copy.env.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(cli.app, ["run", "-e", "small", "--set", "judge.api_key=sk-secret"])
    assert result.exit_code == 2
    assert "OPENAI_API_KEY" in result.stderr
    assert "sk-secret" not in result.stderr


def test_each_stage_command_runs_its_stages_under_the_same_options(plan, base):
    for command, (stages, _) in cli.STAGE_COMMANDS.items():
        given = plan("--layers", "10", command=command)
        assert given.stages == (list(stages) if stages else base.stages), command
        assert given.changed(base) == {"activations"}, command
        assert not given.force
    assert plan("--force").force
