# make demo   set up, and run the main job on embedded data
# make test   set up, and run the tests
# Each target sets up its own virtual environment on first use, with the versions in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SHARD ?= 1/1

.PHONY: demo test test-slow lint bench clean

demo: $(READY)
	$(BIN)/python recipes/image_classification.py $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadscope $(TESTS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --shard $(SHARD) $(TESTS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	for benchmark in benchmarks/bench_*.py; do $(BIN)/python $$benchmark || exit 1; done

$(READY): setup.py constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"tftransfer needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
