# `make demo` and `make test` need Python >= 3.11 and make, nothing else. Running one again is quick.
PYTHON ?= python3
BIN := .venv/bin
CLEAN := build/clean-env
OLDEST := build/oldest-env
OLDEST_DIFFUSERS := 0.42.0

.PHONY: demo test test-fast test-oldest lint docs dist app bench clean

demo: .venv/installed
	$(BIN)/diffattn demo --out outputs/demo

# Two processes with one thread each; then, alone on the machine, the tests that drive a browser.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not browser"
	$(BIN)/python -m pytest -m browser

# Every package, without the tests that are slow or need a browser.
test-fast: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not browser"

# What every method and every denoiser must fulfil, with the oldest diffusers that pyproject.toml allows.
test-oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal tests/methods/test_contract.py tests/architectures

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel is built from the sdist, installed in a clean environment, and draws a picture there.
dist: .venv/installed-dev
	rm -rf dist build
	$(BIN)/python -m build
	$(PYTHON) -m venv $(CLEAN)
	$(CLEAN)/bin/python -m pip install -q -c constraints.txt $(TORCH_ARGS) torch
	$(CLEAN)/bin/python -m pip install -q -c constraints.txt dist/*.whl
	cd $(CLEAN) && bin/diffattn generate --prompt "T-Rex" --steps 10 --device cpu --out trex.png

app: .venv/installed-app
	$(BIN)/diffattn app

bench: .venv/installed-dev
	$(BIN)/python pipelines/benchmark.py --models sd15 --sizes 512,1024 --resume --out outputs/bench

clean:
	rm -rf .venv build dist site *.egg-info

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

$(OLDEST)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v '^diffusers==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -q -c constraints.txt $(TORCH_ARGS) torch
	$(OLDEST)/bin/python -m pip install -q -c $(OLDEST)/constraints.txt diffusers==$(OLDEST_DIFFUSERS) -e '.[dev]'
	touch $@
