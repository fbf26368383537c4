# `make demo` shows the main job on real data, `make test` runs everything that CI runs, `make slow` the dearest tests.
# All create .venv and install what they need; PYTHON=python3.12 picks another interpreter,
# PIP_FLAGS='...' adds flags to pip install.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed
SITE := build/wheel-site
WORKERS ?= 2

.PHONY: demo test lint wheel types smoke unit slow clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/rmfx demo

test: lint types smoke unit

# Not every file of torch and its like is compiled: Python compiles what it imports.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "rmfx needs Python 3.11 or later; choose one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The wheel is unpacked outside the tree: what is checked and smoke-tested is what users install. A type
# checker run on the tree silently skips rmfx.passes, because its sources are in passes/.
wheel: $(STAMP)
	rm -rf build dist && mkdir build
	$(BIN)/python -m build --wheel --no-isolation >build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(SITE) dist/*.whl

types: wheel
	cd $(SITE) && $(BIN)/mypy --config-file $(CURDIR)/setup.cfg --cache-dir $(CURDIR)/.mypy_cache -p rmfx

smoke: wheel
	cd $(SITE) && PYTHONPATH=$(CURDIR)/$(SITE) $(BIN)/python -P $(CURDIR)/tests/wheel_smoke.py

unit: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) -m 'not slow' --durations=10

slow: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) -m slow --durations=10

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
