# VENV is the active virtual environment, or .venv, which is created when it is missing.
VENV ?= $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help venv demo bench docs fuzz test test-fast test-long quality style clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.hf_rtl-dev  ## Install the package in editable mode, with all that development needs

# On one thread figures come out as in the card, whatever the number of cores.
demo: export OMP_NUM_THREADS = 1
demo: $(VENV)/.hf_rtl-plots  ## Prune tickets for scikit-learn's digits, offline on a CPU, and check what came out
	$(PYTHON) recipes/prune.py --config recipes/configs/digits.yaml --sanity
	mv runs/digits/results.json runs/digits-results.json
	$(PYTHON) recipes/evaluate.py runs/digits/round-* runs/digits/final --compare runs/digits-results.json
	$(PYTHON) recipes/verify.py runs/digits --results runs/digits-results.json
	mv runs/digits-results.json runs/digits/results.json

bench: export OMP_NUM_THREADS = 1
bench: export PYTHONPATH = recipes
bench: $(VENV)/.hf_rtl-bench  ## Measure time and memory beside rivals, in a quarter of an hour, and write docs/benchmarks.md
	$(PYTHON) -m benchmarks --turns 5 --full --output model_cards/benchmarks-results.json
	$(PYTHON) -m pages.benchmarks

# MkDocs 1 is what the extra asks for, so its notice of MkDocs 2 says nothing.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.hf_rtl-docs  ## Build the documentation as a site into site/, of which index.html is the start
	$(PYTHON) -m mkdocs build

fuzz: export OMP_NUM_THREADS = 1
fuzz: venv  ## Read 10,000 damaged folders of models, tickets, rules, runs and cards, and write docs/compatibility.md
	$(PYTHON) -m tests.fuzz --page docs/compatibility.md

test: quality  ## Run the checks, then the tests
	$(PYTHON) -m pytest --numprocesses 3 --dist loadfile

test-fast: venv  ## Run the tests that are not slow, without the checks
	$(PYTHON) -m pytest --numprocesses 3 --dist loadfile -m "not slow and not long"

test-long: venv  ## Run the long tests too: runs killed at all moments that are known, all forms of graphs, and the like
	$(PYTHON) -m pytest --ignore tests/distributed -m long --numprocesses 2 --dist loadfile
	$(PYTHON) -m pytest tests/distributed/test_kill.py -m ""
	$(PYTHON) -m pytest tests/distributed -m long --ignore tests/distributed/test_kill.py

quality: venv  ## Check lint, format and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

style: venv  ## Fix lint and format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:  ## Remove builds and caches, not the environment
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(PYTHON):
	python3 -m venv $(VENV)

# A stamp for every extra: installed again only when pyproject.toml changes.
$(VENV)/.hf_rtl-%: pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@
