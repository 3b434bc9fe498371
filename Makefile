# `make studio` sets up and runs the main job; `make test` sets up and runs every check. Both may be run again.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	command -v $$p >/dev/null && $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# An NVIDIA driver, or GPU=1, adds xformers.
GPU ?= $(if $(shell command -v nvidia-smi),1,)
# A Chromium adds what the tests in a browser need.
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
comma := ,
EXTRAS := dev$(comma)video$(if $(GPU),$(comma)gpu,)$(if $(CHROMIUM),$(comma)browser,)

.PHONY: studio test setup lint clean

studio: setup
	@echo "== training the example subject on the bundled base (a few minutes on two cores)"
	$(BIN)/studio train --preset subject

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 with venv was found"; echo "hint: install one, or name it: make studio PYTHON=/path/to/python3.11"; exit 2; }
	@echo "== setting up $(VENV) with $(PYTHON) (about a minute, 1.5 GB)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
