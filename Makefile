# make run | test | lint. Each sets up .venv first where it is missing or older than the lock.
PYTHON ?= python3
ARGS ?= ablation=no_relaxation
BIN := .venv/bin
UV := uv==0.13.9

.PHONY: run test lint lock

run: .venv/.installed
	$(BIN)/python experiments/run.py $(ARGS)

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(UV)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

# The lock holds no index address, so that it works with whatever registry or mirror a site uses.
lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --custom-compile-command "make lock" --quiet -o requirements.lock
