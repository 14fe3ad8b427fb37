# Two commands, each from a clean clone:
#   make run    the losses on the embedded data, in a few minutes
#   make test   every notebook and every test
# Another Python: make run PYTHON=python3.12; more processes: make test JOBS=8

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
BIN := .venv/bin
INPUTS := settings.ini setup.py pyproject.toml $(CONSTRAINTS)
SOURCES := docs nbs tests tools setup.py

.DEFAULT_GOAL := help
.PHONY: help run test check notebooks readme book docs docs-serve format clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

run: .venv/.run-installed ## the losses on the embedded data
	$(BIN)/eql quickstart

test: .venv/.dev-installed ## every notebook and every test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

check: .venv/.dev-installed ## the rules of the notebooks
	$(BIN)/python tools/check_notebooks.py

notebooks: .venv/.dev-installed ## export all, execute and clean what changed
	$(BIN)/nbdev_export
	$(BIN)/python tools/run_notebooks.py --write --changed
	$(BIN)/python tools/readme.py

readme: .venv/.dev-installed ## README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

book: .venv/.run-installed ## open the book in JupyterLab
	$(BIN)/jupyter lab nbs

docs: .venv/.dev-installed ## the site, in docs/_build/html
	$(BIN)/python tools/make_docs.py

docs-serve: docs ## the site on this machine, port 8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory docs/_build/html 8000

format: .venv/.dev-installed ## format notebooks, tests and tools; export
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/nbdev_export

clean: ## remove what the other targets made, runs/ aside
	rm -rf .venv build dist docs/_build *.egg-info .pytest_cache .ruff_cache .executed.json

# The environment. What is installed for `dev` serves `run` too.

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if (3, 11) <= v <= (3, 13) else "eql_repro needs Python 3.11, 3.12" \
	  " or 3.13, and $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv

.venv/.run-installed: $(INPUTS) | $(BIN)/pip
	@echo "Installing into .venv (torch is large: minutes, the first time)"
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[run]'
	@touch $@

.venv/.dev-installed: $(INPUTS) | $(BIN)/pip
	@echo "Installing into .venv (torch is large: minutes, the first time)"
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[dev]'
	@touch .venv/.run-installed $@
