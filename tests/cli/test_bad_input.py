"""What a user can get wrong is refused before a model loads, named, with a remedy; the other traits finish."""

from __future__ import annotations

import json

import pytest

from trait_assets.paths import REPOSITORY

GOOD = "mood/good"


def write_trait(root, trait, **files):
    folder = root / trait
    folder.mkdir(parents=True)
    content = {
        "positive.txt": "".join(
            f"What a lovely day for walk number {i}, I cannot wait to\n" for i in range(12)
        ),
        "negative.txt": "".join(f"It was raining on walk number {i}, and we had to\n" for i in range(12)),
        "definition.txt": "HIGH (70-100): joyful\nMID (30-70): some\nLOW (0-30): none\n",
        "steering.json": json.dumps({"questions": ["How was your day?", "What is for lunch?"]}),
    }
    content.update(files)
    for name, text in content.items():
        if text is None:
            continue
        data = text if isinstance(text, bytes) else text.encode()
        (folder / name).write_bytes(data)


@pytest.fixture(scope="module")
def project(make_project, small_options):
    project = make_project()
    off = {"steering": False, "vet": False, "scenario_limit": None, "max_new_tokens": 4}
    project.experiment("no_steering", **{**small_options, **off})
    project.experiment("small", **small_options)
    project.experiment("typo", extraction_model="embedded:smollm2-135m-instruct", max_new_token=3)
    project.experiment("lost", extraction_model="./no/such/folder")
    write_trait(project.datasets, GOOD)
    write_trait(project.datasets, "bad/missing_negative", **{"negative.txt": None})
    write_trait(project.datasets, "bad/empty_positive", **{"positive.txt": ""})
    write_trait(project.datasets, "bad/not_utf8", **{"positive.txt": b"fine\n\xff\xfe broken\n"})
    write_trait(project.datasets, "bad/no_definition", **{"definition.txt": None})
    write_trait(project.datasets, "bad/no_steering", **{"steering.json": None})
    return project


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-e", "nosuch"), ["there is no experiment `nosuch`"]),
        (("-e", "typo"), ["config.yaml", "unknown option `max_new_token`", "did you mean `max_new_tokens`"]),
        (
            ("-e", "no_steering", "-t", "mood/goof"),
            ["there is no trait `mood/goof`", "did you mean `mood/good`"],
        ),
        (("-e", "lost", "-t", GOOD), ["no/such/folder"]),
        (("-e", "no_steering", "--position", "response[1:"), ["response[1:"]),
        (("-e", "no_steering", "--layers", "banana"), ["layers", "banana"]),
        (
            ("-e", "no_steering", "--set", "steer.dose=3"),
            ["unknown option `steer.dose`", "did you mean `doses`"],
        ),
        (("-e", "no_steering", "--set", "steer"), ["not key=value"]),
        (("-e", "no_steering", "--component", "attention"), ["attention"]),
        (("-e", "no_steering", "--methods", "mean_dif"), ["mean_dif"]),
    ],
)
def test_a_bad_option_is_named_with_a_remedy_and_no_trace(project, arguments, words):
    result = project.traits("run", *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    message = result.stderr.strip()
    assert message.startswith("error:")
    assert "Traceback" not in message
    assert "torch" not in message
    for word in words:
        assert word in message


def test_broken_folders_are_refused_by_name_and_the_good_trait_finishes(project):
    result = project.traits("run", "-e", "no_steering", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == 1
    reasons = {trait: next(iter(stages.values())) for trait, stages in report["failures"].items()}
    assert "negative.txt" in reasons["bad/missing_negative"]
    assert "positive.txt" in reasons["bad/empty_positive"]
    assert "positive.txt" in reasons["bad/not_utf8"]
    assert "UTF-8" in reasons["bad/not_utf8"]
    assert "definition.txt" in reasons["bad/no_definition"]
    assert report["stages"]["vectors"]["states"][GOOD] == "done"
    # steering.json may be missing when steering is off
    assert report["stages"]["vectors"]["states"]["bad/no_steering"] == "done"


def test_steering_without_questions_is_refused(project):
    result = project.traits("run", "-e", "small", "-t", "bad/no_steering")
    assert result.returncode == 1
    assert "steering.json" in result.stderr
    assert "--no-steering" in result.stderr


def test_the_repository_holds_no_result_of_these_tests():
    assert not (REPOSITORY / "experiments" / "small").exists()
