# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Threads that wait without spinning: many times faster where cores are shared.
export OMP_WAIT_POLICY := passive

.PHONY: venv demo test test-slow test-all lint docs clean

venv: $(VENV)/.ready

$(VENV)/.runtime: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.ready: $(VENV)/.runtime requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/.runtime  ## stream videos of the shapes world with the weights that ship
	@$(BIN)/python inference.py --overwrite

test: venv  ## the fast tests
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not gpu"

# in the order of the tree, in which the longest file comes early
test-slow: venv  ## the tests of more than a few seconds
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "slow and not gpu"

test-all: test test-slow

lint: venv  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy wan model pipeline trainer utils evaluation shapes scripts inference.py train.py

docs: venv  ## what is written down of the configuration
	$(BIN)/python -m utils.config_docs

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
