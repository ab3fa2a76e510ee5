PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COHORT ?= ../shared/data/brats18

.PHONY: demo test ruff types layers docs bench dist clean

demo: $(VENV)/.ready  ## the main job on a synthetic cohort, in a minute or two
	$(BIN)/anomri demo -o demo

test: $(VENV)/.ready  ## lint, types, layers, tests; FAST=1 leaves slow tests out
	$(MAKE) --no-print-directory --jobs 3 --output-sync ruff types layers
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --maxschedchunk 2 $(if $(FAST),-m "not slow")

ruff:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

layers:
	$(BIN)/lint-imports

docs: $(VENV)/.ready  ## the site, in site/; warnings and broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.ready  ## speed as ratios to the plain program, on real scans
	$(BIN)/python benchmarks/speed.py $(COHORT)

dist: $(VENV)/.ready  ## the wheel and the source archive, in dist/, checked for the package index
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo site dist
