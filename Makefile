# Needs Python >= 3.11, pip and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
# A file's tests share servers and trained models, so they stay in one process. In the order of the folders: those of
# Ray take minutes and come first, the many short ones fill what is left at the end.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test coverage test-slow lint reference install clean help

quickstart: .venv/installed  ## run the complete chain on synthetic images, on this machine
	$(BIN)/medmamba quickstart

test: .venv/installed  ## run the tests in two processes
	$(BIN)/pytest -m "not slow and not gpu" $(SHARED) --cov --cov-report=

coverage: .venv/installed  ## list the lines that the last `make test` did not reach
	$(BIN)/coverage report --show-missing

test-slow: .venv/installed  ## run the long tests
	$(BIN)/pytest -m "slow and not gpu"

lint: .venv/installed  ## check style, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

reference: .venv/installed  ## regenerate pipelines/CONFIG.md from the configuration classes
	$(BIN)/python tests/config_reference.py

install: .venv/installed  ## create .venv with everything

# A single pip command, because a second one could replace pinned versions.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medmamba needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:  ## delete .venv and caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14
