# `make demo` and `make test` work on a fresh machine with Python 3.11 or later, make and pip.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED_FROM := pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)  # Python files are used in place

# Modules are compiled when they are first imported, whatever the environment says: the tests start many processes.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test slow check readme kernels clean

demo: $(VENV)/.installed
	$(BIN)/formix compare studies/demo-images.yaml studies/demo-text.yaml --out runs/demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tables and the picture in README.md, from docs/results.
readme: $(VENV)/.installed-dev
	$(BIN)/python docs/readme.py
	$(BIN)/python docs/screenshot.py docs/results/fashion-mnist/report.html docs/report.png

# The CPU kernels against their targets, into docs/results/kernels: minutes, on a machine that does nothing else.
kernels: $(VENV)/.installed-dev
	$(BIN)/formix bench targets --out docs/results/kernels
	$(BIN)/python docs/screenshot.py docs/results/kernels/chart.html docs/results/kernels/chart.png whole

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(INSTALLED_FROM)
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(BIN)/python $(INSTALLED_FROM)
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build runs
