# `make demo` and `make test` start from nothing but python3 (3.11 or newer, with venv) and make.
# Both use .venv; stamp files in it keep a second run from installing again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517
FACTS := setup.py settings.ini

.DEFAULT_GOAL := help
.PHONY: help demo test bench bench-mixed export readme site clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## install the package and run its demonstration
	$(BIN)/clusterweights demo

test: export OPENBLAS_NUM_THREADS := 1
test: $(VENV)/developing ## run every test: those in the notebooks and those in tests/
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ONLY)

bench: $(VENV)/developing ## time the solvers, for benchmarks/results.md (SIZES="S M" for some)
	$(BIN)/python benchmarks/solvers.py $(if $(SIZES),--sizes $(SIZES))

bench-mixed: $(VENV)/developing ## time the mixed models, for benchmarks/mixed_results.md (TASKS="education linear" for some)
	$(PIP) gpboost
	$(BIN)/python benchmarks/mixed.py $(if $(TASKS),--tasks $(TASKS))

export: $(VENV)/developing ## write the modules from the notebooks, and strip outputs
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: $(VENV)/developing ## write README.md from nbs/index.ipynb
	$(BIN)/python tests/make_readme.py

site: $(VENV)/developing ## build the book in _docs, to be read without a network
	$(BIN)/python tests/make_site.py

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info _proc _docs .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/it ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Editable, so that a changed module is what runs. If the pins are there already they satisfy the
# requirements, and pip leaves them alone.
$(VENV)/installed: $(VENV)/made $(FACTS)
	$(PIP) --editable .
	@touch $@

# The pins settle what `installed` would bring, so that stamp is set as well.
$(VENV)/developing: $(VENV)/made $(FACTS)
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/installed $@
