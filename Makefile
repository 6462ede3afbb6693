# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Compiled afterwards, on all processors; a few files of packages are no Python.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
# Threads that wait without spinning: many times faster where cores are shared.
export OMP_WAIT_POLICY := passive
# Else every process that is started compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv demo app test test-slow test-long test-app test-app-long test-all lint docs clean

venv: $(VENV)/.ready

$(VENV)/.runtime: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -r requirements.txt setuptools
	$(PIP) --no-deps --no-build-isolation -e .
	$(COMPILE)
	touch $@

$(VENV)/.ready: $(VENV)/.runtime requirements-dev.txt requirements-app.txt
	$(PIP) -c constraints.txt -r requirements-dev.txt
	$(COMPILE)
	touch $@

$(VENV)/.app: $(VENV)/.runtime requirements-app.txt
	$(PIP) -c constraints.txt -r requirements-app.txt
	$(COMPILE)
	touch $@

app: $(VENV)/.app  ## a page that shows video while it is generated
	@$(BIN)/python app.py

demo: $(VENV)/.runtime  ## stream videos of the shapes world with the weights that ship
	@$(BIN)/python inference.py --overwrite

test: venv  ## the fast tests
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not long and not gpu and not browser"

# in the order of the tree, in which the longest file comes early
test-slow: venv  ## the tests of a second or more
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "slow and not long and not gpu and not browser"

test-long: venv  ## long trials, by hand before a release
	$(BIN)/python -m pytest -n auto --timeout 0 -m "long and not gpu and not browser"

test-app: $(VENV)/.browser  ## the live page in a real browser
	$(BIN)/python -m pytest tests/shapes/test_page.py -m "browser and not long"

test-app-long: $(VENV)/.browser  ## its trials of minutes
	$(BIN)/python -m pytest tests/shapes/test_page.py --timeout 0 -m "browser and long"

$(VENV)/.browser: $(VENV)/.ready requirements-browser.txt requirements-app.txt
	$(PIP) -c constraints.txt -r requirements-browser.txt
	$(COMPILE)
	@command -v chromium > /dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null \
		&& apt-get -qq update && apt-get -qq install --no-install-recommends -y chromium; } \
		|| { echo "make test-app needs the browser chromium: sudo apt-get install chromium" >&2; exit 1; }
	touch $@

test-all: test test-slow

lint: venv  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(wildcard wan model pipeline trainer utils evaluation shapes server scripts *.py)

docs: venv  ## what is written down of the configuration
	$(BIN)/python -m utils.config_docs

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
