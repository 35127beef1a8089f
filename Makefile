# Everything here works from a fresh clone with nothing but Python 3.11 or newer: every target that needs the
# environment makes it first.
#
#   make demo VENV=~/envs/kedit      another place for the environment
#   make venv PYTHON=python3.12      another interpreter
#   make venv TORCH=torch==2.11.0    another version of torch than the one of constraints.txt

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3
# Installed before everything else, by exact version, so that no other package's wider range decides which
# build of torch comes in.
TORCH ?= $(shell grep '^torch==' constraints.txt)

BIN := $(VENV)/bin
STAMP := $(VENV)/.kedit-installed
DOCS_STAMP := $(VENV)/.kedit-docs-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The models of the tests are tiny: several threads a process cost far more than they bring. No test may reach
# a hub or a tracking server, and outside `test-gpu` none may find a GPU.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline
WORKERS ?= 2
# -rfEs names what failed and why something was skipped (absent data, for one). A process that has run out of
# tests takes some of the others, since a few slow ones take minutes.
PYTEST := $(BIN)/python -m pytest -rfEs --durations=10 -n $(WORKERS) --dist worksteal

.PHONY: help venv demo benchmark docs test test-one test-slow test-all test-gpu lint format types clean

help: ## show this list
	@echo "kedit-lightning: knowledge editing of language models"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' \
		| while IFS='|' read -r name text; do printf '%-18s %s\n' "$$name" "$$text"; done

venv: $(STAMP) ## create the environment in .venv and install everything (once)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than 3.11 or absent: name another interpreter with make PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || { echo "[1/4] creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "[2/4] upgrading pip"
	@$(PIP) install -qq --upgrade pip
	@echo "[3/4] installing $(TORCH) (the largest download)"
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(PIP) install -qq $(TORCH) -c $(VENV)/constraints.txt
	@echo "[4/4] installing kedit-lightning with its development tools (a minute or two)"
	@$(PIP) install -qq -e '.[dev]' -c $(VENV)/constraints.txt
	@# Help of the commands is rendered once and cached, which takes some seconds.
	@for command in fit edit validate test predict; do $(BIN)/kedit $$command --help > /dev/null; done
	@touch $@
	@echo "$(VENV) is ready"

demo: venv ## edit eight facts in the packaged model with three methods and show what happened
	@$(BIN)/python tools/demo.py

# A part by name (PART=nano.nano_facts.single, or a pattern), the stated subset (SUBSET=1), another folder of real data.
PART ?= *
DATA ?= ../shared/data
benchmark: venv ## every method on every benchmark, into docs/leaderboard: hours, goes on after a stop (PART=, SUBSET=1, DATA=)
	$(TEST_ENV) CUDA_VISIBLE_DEVICES= $(BIN)/python -u tools/leaderboard/benchmark.py --part '$(PART)' --data '$(DATA)' \
		$(if $(SUBSET),--subset)

$(DOCS_STAMP): $(STAMP)
	@echo "installing what builds the documentation"
	@$(PIP) install -qq -e '.[dev,docs]' -c $(VENV)/constraints.txt
	@touch $@

docs: $(DOCS_STAMP) ## build the documentation into site/, warnings as errors
	$(TEST_ENV) NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

test: venv ## run the fast tests (no network, no GPU, under ten minutes on two cores)
	$(TEST_ENV) CUDA_VISIBLE_DEVICES= $(PYTEST) -m "not slow and not real_data and not gpu"

test-slow: venv ## run only what the fast tests leave out: full matrix, notebooks, real data
	$(TEST_ENV) CUDA_VISIBLE_DEVICES= $(PYTEST) -m "(slow or real_data) and not gpu"

test-one: venv ## run the tests of a file, a folder, or a part of a name: make test-one NAME=rome
	@test -n "$(NAME)" || { echo "say which: make test-one NAME=rome"; exit 1; }
	$(TEST_ENV) CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -rfEs -m "not gpu" \
		$(if $(wildcard $(NAME)),$(NAME),tests -k '$(NAME)')

# Two runs, so that the fast tests report first.
test-all: test ## run every test that needs no GPU
	$(MAKE) --no-print-directory test-slow

test-gpu: venv ## run the tests that need a CUDA device
	$(TEST_ENV) $(PYTEST) -n 0 -m gpu

lint: venv ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv ## bring every file into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: venv ## check types (mypy, strict)
	$(BIN)/mypy

clean: ## remove .venv, caches and outputs
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist site outputs lightning_logs wandb src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
