# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart

.PHONY: quickstart test test-all conformance compatibility lint format clean

# The original taming code is an oracle of the VQ conversion; of what it would bring along only einops is needed.
# A stamp, so that the environment is made again when what it is made from changes.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt taming-transformers-rom1504 einops
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/jam-hf quickstart --run $(RUN)

# On two cores three workers of one thread, since each waits a fifth of its time for a disk or a process; a file on one
# worker. transformers' own suite after them, likewise.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile

test: $(VENV)/.installed lint
	$(PYTEST)
	$(BIN)/python modeling_tests/conformance

# With the nightly cases, three times as long: before a release, and where something large has moved.
test-all: $(VENV)/.installed lint
	$(PYTEST) --nightly
	$(BIN)/python modeling_tests/conformance --nightly

# transformers' own test-suite of the installed version, on JAMs and on a stock Llama.
conformance: $(VENV)/.installed
	$(BIN)/python modeling_tests/conformance

# docs/compatibility.md, from the results of both.
compatibility: $(VENV)/.installed
	-$(PYTEST) modeling_tests --nightly --feature-report runs/features.json
	-$(BIN)/python modeling_tests/conformance --nightly
	$(BIN)/python modeling_tests/compatibility_table.py --features runs/features.json --conformance runs/conformance.jsonl

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python modeling_tests/model_lint.py
	$(BIN)/python modeling_tests/text_lint.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis *.egg-info
