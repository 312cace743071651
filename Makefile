# make demo   trains a small attention-augmented network on handwritten digits, less than three minutes of training
# make test   runs the tests
# make lint   checks the format, the style and the types
# make setup  only makes the environment, which the others make when they need it
#
# PYTHON=python3.12 make test takes another interpreter; each version has an environment of its own.
# `make demo FLAGS="--config.num_epochs=2"` and `make test FLAGS="-k relative"` hand flags on.

# The first interpreter that is new enough; with none, the check below says what is wrong with python3.
PYTHON ?= $(firstword $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python; done) python3)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ENV := .venv-$(VERSION)
READY := $(ENV)/.ready
PIP := $(ENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt
WORKDIR ?= runs/digits
FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup environment demo test slow lint format clean FORCE

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

setup: $(READY)

# Where the environment is or will be.
environment:
	@echo $(ENV)

demo: $(READY)
	@$(ENV)/bin/aaconv train --config configs/digits.py --workdir $(WORKDIR) --maps 4 $(FLAGS)

test: $(READY)
	@$(ENV)/bin/python -m pytest -n 2 --dist loadscope $(FLAGS)

# The long proofs, which `make test` leaves out.
slow: $(READY)
	@$(ENV)/bin/python -m pytest -n 2 --dist loadscope -m slow $(FLAGS)

lint: $(READY)
	@$(ENV)/bin/ruff format --check .
	@$(ENV)/bin/ruff check .
	@$(ENV)/bin/pyright --pythonpath $(ENV)/bin/python

format: $(READY)
	@$(ENV)/bin/ruff format .
	@$(ENV)/bin/ruff check --fix .

clean:
	rm -rf .venv-* .pytest_cache .ruff_cache .hypothesis build dist
	find aaconv configs tests experiments -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp holds the folder it was made in, so that a moved checkout gets a new environment.
# It is written last: an environment without it was interrupted half-way and is made afresh.
$(READY): pyproject.toml constraints.txt $(if $(filter $(CURDIR),$(shell cat $(READY) 2>/dev/null)),,FORCE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "aaconv needs Python 3.11 or later; $(PYTHON) is $(or $(VERSION),not there or does not run)." >&2; \
		echo "Name another one: PYTHON=/path/to/python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make environments: install the package python$(VERSION)-venv" >&2; exit 1; }
	@if [ "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" ]; then rm -f $@; else \
		echo "Making the environment $(ENV) ..."; $(PYTHON) -m venv --clear $(ENV); fi
	@echo "Installing the packages of constraints.txt into $(ENV) (a minute or two) ..."
	@$(PIP) -e '.[dev]'
	@printf '%s\n' '$(CURDIR)' > $@

FORCE:
