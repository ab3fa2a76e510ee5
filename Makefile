PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COHORT ?= ../shared/data/brats18

.PHONY: demo test docs bench clean

demo: $(VENV)/.ready  ## the main job on a synthetic cohort, in about seven minutes
	$(BIN)/anomri demo -o demo

test: $(VENV)/.ready  ## lint, types, layers, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

docs: $(VENV)/.ready  ## the site, in site/; warnings and broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.ready  ## speed as ratios to the plain program, on real scans
	$(BIN)/python benchmarks/speed.py $(COHORT)

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo site
