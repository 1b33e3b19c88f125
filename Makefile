# One target for each task; `make` alone lists them.

# The interpreter for the virtual environment; it is started, because a name on the path may not work.
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV ?= .venv
ARGS ?=
RUN ?= last
SWEEP ?=
MODULE ?=
PORT ?= 5000

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Tests of one file stay in one worker: they share what is expensive to set up. tests/conftest.py orders the files.
# One thread per worker: two workers with two threads each would mostly wait for each other on two cores.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help run resume sweep ui test test-fast test-oldest test-newest coverage mutants soak bench docs pictures lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

run: $(INSTALLED) ## train a model; make run ARGS="model=cnn optimizer.lr=3e-4"
	$(BIN)/python -m ksuit_runner $(ARGS)

resume: $(INSTALLED) ## resume a run; make resume RUN=id (by default the last one)
	$(BIN)/python -m ksuit_runner resume=$(RUN) $(ARGS)

sweep: $(INSTALLED) ## run a sweep; make sweep SWEEP=name
	@test -n "$(SWEEP)" || { echo "Which sweep? make sweep SWEEP=name, one of: $(basename $(notdir $(wildcard conf/sweep/*.yaml)))" >&2; exit 1; }
	$(BIN)/python -m ksuit_runner sweep=$(SWEEP) $(ARGS)

ui: outputs/mlflow.db $(INSTALLED) ## open MLflow's page over all runs on http://127.0.0.1:5000; PORT=
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	  $(BIN)/mlflow server --backend-store-uri "sqlite:///$(CURDIR)/outputs/mlflow.db" \
	  --default-artifact-root "$(CURDIR)/outputs/runs" --host 127.0.0.1 --port $(PORT) --workers 1

outputs/mlflow.db:
	@echo "no runs yet: make run" >&2; exit 1

test: lint ## check style and types, then run all tests
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(ARGS)

test-fast: $(INSTALLED) ## run the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow and not soak" $(ARGS)

test-oldest: build/oldest/.installed ## run the tests with the oldest versions that pyproject.toml allows; ARGS="tests/engine/test_loop.py"
	OMP_NUM_THREADS=1 build/oldest/bin/python $(PYTEST) $(ARGS)

test-newest: build/newest/.installed ## run the tests with the newest ones
	OMP_NUM_THREADS=1 build/newest/bin/python $(PYTEST) $(ARGS)

coverage: $(INSTALLED) ## run the tests and list the lines of the package that they do not reach; ARGS="tests/engine/test_loop.py"
	rm -rf build/coverage
	OMP_NUM_THREADS=1 $(BIN)/coverage run $(PYTEST) $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

mutants: $(INSTALLED) ## mutate a module and list what its tests miss; make mutants MODULE=record/journal ARGS="--sample 60"
	@test -n "$(MODULE)" || { echo "Which module? make mutants MODULE=record/journal, or data/batch_plan, delivery/outbox ..." >&2; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(MODULE) $(ARGS)

soak: $(INSTALLED) ## kill and suspend runs for 20 minutes, and survive an outage of ten; ARGS="--minutes 5 --seed 1"
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/faults/soak.py $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak tests --timeout 1800

bench: $(VENV)/.installed-bench ## compare the runner with other trainers, side by side; ARGS="small_model --rounds 5"
	PYTHONPATH=tests $(BIN)/python -m benchmarks --json outputs/bench.json $(ARGS)

docs: $(INSTALLED) ## make a site of the documentation in build/docs, without dead links
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

pictures: $(INSTALLED) ## draw the pictures of the documentation
	cd docs/pictures && for name in *.dot; do dot -Tsvg "$$name" -o "$${name%.dot}.svg"; done
	OMP_NUM_THREADS=1 $(BIN)/python docs/pictures/gallery.py
	OMP_NUM_THREADS=1 $(BIN)/python docs/pictures/terminal.py
	OMP_NUM_THREADS=1 $(BIN)/python docs/pictures/pages.py

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and all caches; outputs/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find callbacks conf ksuit_runner tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed and '$(PYTHON)' is not. Name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade 'pip>=25.1' # for --group
	$(PIP) install --editable . --group dev
	@touch $@

$(VENV)/.installed-bench: $(INSTALLED)
	$(PIP) install --editable . --group dev --group bench
	@touch $@

# uv, because pip cannot choose the oldest versions.
build/oldest/.installed: UV_ARGS := --resolution lowest-direct
build/newest/.installed: UV_ARGS := --resolution highest
build/%/.installed: pyproject.toml
	$(PYTHON) -m venv --clear build/$*
	build/$*/bin/python -m pip --disable-pip-version-check install uv==0.13.9
	build/$*/bin/uv pip install --python build/$*/bin/python $(UV_ARGS) \
	  -r pyproject.toml --all-extras --group test --editable .
	@touch $@
