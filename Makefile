# Set-up and the commands of the README. Needs Python >= 3.11, pip and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
# A file's tests share servers and trained models, so they stay in one process. In the order of the folders: those of
# Ray take minutes and come first, the many short ones fill what is left at the end.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test coverage test-slow lint reference install clean

quickstart: .venv/installed  ## images in, a promoted model out, on this machine
	$(BIN)/medmamba quickstart

test: .venv/installed  ## the tests, in two processes
	$(BIN)/pytest -m "not slow and not gpu" $(SHARED) --cov --cov-report=
coverage: .venv/installed  ## the lines that the last `make test` did not reach
	$(BIN)/coverage report --show-missing

test-slow: .venv/installed  ## the long matrix
	$(BIN)/pytest -m "slow and not gpu"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

reference: .venv/installed  ## pipelines/CONFIG.md, from the configuration classes
	$(BIN)/python tests/config_reference.py

install: .venv/installed

# One pip command with one constraints file: a second one could replace what the first has pinned.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medmamba needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
