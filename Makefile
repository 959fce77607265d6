# `make demo` and `make test` need Python >= 3.11 and make, nothing else. Running one again is quick.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint app bench clean

demo: .venv/installed
	$(BIN)/diffattn demo --out outputs/demo

test: .venv/installed-dev
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

app: .venv/installed-app
	$(BIN)/diffattn app

bench: .venv/installed-dev
	$(BIN)/python pipelines/benchmark.py --models sd15 --sizes 512,1024 --resume --out outputs/bench

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("diffattn needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

# Torch first and by itself, so that its build can be chosen: TORCH_ARGS='--index-url URL', such as that of the CPU wheels.
TORCH_ARGS ?=

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt $(TORCH_ARGS) torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv/installed-app: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[app]'
	touch $@
