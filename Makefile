# make demo   shows a method from synthetic data to a report, offline after the installation
# make test   runs all tests
# Both create .venv when it is missing and install the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.medrl-installed

# More threads than free cores slow small networks down by an order of magnitude.
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format wheel typecheck docs clean

help:
	@sed -n 's/^# //p' Makefile | sed -n '1,2p'
	@echo 'also: make install | lint | format | typecheck | docs | wheel | clean'

install: $(STAMP)

# torch comes first and pinned, so that nothing else chooses another build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medrl needs Python 3.11 or later; name one with: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[all,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/medrl demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .

docs: $(STAMP)
	$(BIN)/python docs/make.py

# Type checkers cannot follow the editable installation, so what ships is checked: the installed wheel.
typecheck: wheel
	bash .ci/typecheck $(BIN)/python dist/*.whl

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
