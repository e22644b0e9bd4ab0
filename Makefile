# make run | test | test-slurm | paper | lint. Each sets up .venv first where it is missing or older than the lock.
PYTHON ?= python3
ARGS ?= ablation=no_relaxation
BIN := .venv/bin
UV := uv==0.13.9
# Tests start many processes: where nothing compiled is kept, each compiles all that it imports, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-slurm paper lint lock

run: .venv/.installed
	$(BIN)/python experiments/run.py $(ARGS)

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slurm" $(TESTS)

# On a real Slurm, brought up for the tests from the distribution's packages (root); skipped where that cannot be had.
test-slurm: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm tests

# Tables, figures, claims and the page, from committed results alone; a second run changes no byte.
paper: .venv/.installed
	$(BIN)/python -m analysis.paper

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
