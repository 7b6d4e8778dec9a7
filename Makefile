# `make demo` and `make test` need nothing but Python 3.10 or newer: they make .venv and install into it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-sweep test-full test-readme test-wheel fuzz lint types format notebooks figures bench kit
.DELETE_ON_ERROR:

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sdxl-ref needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/python -m sdxl_ref demo

# One process a core, each with one thread: many small models.
test: .venv/installed-dev lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

# Every combination of what `make test` runs a sample of; and the parity tests once more on packed networks.
test-sweep: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m sweep -n auto
	OMP_NUM_THREADS=1 $(BIN)/pytest --packed -m 'not full' -n auto --dist loadfile tests/parity

# README's commands as they stand, pasted one after the other into a fresh shell on a fresh clone.
test-readme:
	$(PYTHON) tests/fresh/readme.py

# Inputs that are almost right, to everything that reads what it did not write.
FUZZ_SECONDS ?= 600
fuzz: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

# sdist and wheel, built and installed into an empty environment.
test-wheel:
	$(PYTHON) tests/fresh/wheel.py

# Full-size networks on a generated checkpoint: 20 GB of memory, 7 GB of disk under FULL_DIR.
test-full: .venv/installed-dev
	$(BIN)/pytest -m full -s tests/full

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Run the notebooks and their solutions, check what they say, and keep the fresh outputs.
notebooks: .venv/installed-dev
	$(BIN)/python tests/test_notebooks.py

# The figure of the two experts in README.md.
figures: .venv/installed-dev
	$(BIN)/python figures/experts.py

bench: .venv/installed-dev
	$(BIN)/python benchmarks/bench.py

# A realistic run with budgets, for any implementation to check itself against: see README.md.
kit: .venv/installed
	$(BIN)/sdxl-ref parity kit --checkpoint pocket-refiner --out kit
