# Two commands on a fresh machine with python3 (3.11 or newer), make and git: `make demo` and `make test`.
# Every target makes .venv and installs its pinned requirements first; a stamp makes the second run instant.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
# Errors are shown, progress is not.
PIP := $(PY) -m pip -qq --disable-pip-version-check
SECONDS ?= 600
# Processes that run tests, a file each at a time, in the order of the files: the short ones come last. 0: in this one.
# Two on two cores, three on more: tests with Ray start processes of their own, and wait for one another's.
WORKERS ?= $(if $(filter 1 2,$(shell nproc)),2,3)
# More arguments for the tool behind a target: make test ARGS="-k restore", make demo ARGS="--iterations 12".
ARGS ?=
# Run by people, not imported by the package.
SCRIPTS := $(sort $(dir $(wildcard benchmarks/*.py cluster/*.py examples/*.py)))
CODE := rl_ckpt tests requirements $(SCRIPTS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-rllib test soak lint format bench docs pins clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/demo.stamp ## train, save, lose a node, restore: the whole story on this machine
	$(PY) -m rl_ckpt.demo $(ARGS)

demo-rllib: $(VENV)/rllib.stamp ## an RLlib job that is killed, started again, and goes on by itself
	$(PY) examples/rllib_resume.py $(ARGS)

test: $(VENV)/test.stamp ## run all tests but the soak
	$(PY) -m pytest -m "not soak" -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

soak: $(VENV)/test.stamp ## SECONDS=600 of kills at random, what is lost and what leaks; then the long tests
	$(PY) -m tests.soak --seconds $(SECONDS) $(ARGS)
	$(PY) -m pytest -m soak

lint: $(VENV)/lint.stamp ## ruff check, ruff format --check, mypy --strict
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(PY) -m mypy --strict rl_ckpt $(SCRIPTS)
	$(PY) -m mypy tests requirements

format: $(VENV)/lint.stamp ## rewrite the code as lint wants it, where ruff can
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

bench: $(VENV)/bench.stamp ## every question beside every alternative, about 20 minutes
	$(PY) -m benchmarks $(ARGS)

docs: $(VENV)/docs.stamp ## build the documentation into site/, offline
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs --quiet build --strict

pins: $(VENV)/made.stamp ## resolve pyproject.toml anew into requirements/*.txt
	$(PY) requirements/pin.py

clean: ## remove what the other targets made, .venv included
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site demo-run *.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 is %d.%d, rl-ckpt needs 3.11 or newer: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The package itself goes in last and without its dependencies, as the pins hold them all.
$(VENV)/%.stamp: requirements/%.txt pyproject.toml $(VENV)/made.stamp
	$(PIP) install -r $<
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

