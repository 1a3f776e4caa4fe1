# make demo   the whole job on a small fixed subset, from images to a table
# make test   the tests                make lint   what .ci/run and pre-commit check
# make ui     MLflow's pages           make docs   these pages as a site, in docs/_build/html
# make lock   pin the newest versions that fit pyproject.toml
# make clean  caches and runs/demo (the environment and other runs stay; they can be removed by hand)

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := PYTHONUNBUFFERED=1 $(BIN)/python -m pip --disable-pip-version-check
# Of pip's many lines, one for each large package as it comes and one when all are there.
PROGRESS := while read -r verb what size; do case "$$verb $$size" in \
	"Downloading ("[0-9][0-9]*.*" MB)") what=$${what\#\#*/}; echo "  $${what%%-*} $$size" ;; \
	"Installing "*) echo "  unpacking" ;; esac; done

.PHONY: help demo test lint format docs lock ui clean

help:
	@sed -n 's/^# make/make/p' Makefile

# The environment is made once and again when the lock changes. An interrupted installation leaves no stamp.
$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "lpclip needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Making .venv from requirements.lock: a few minutes and about 7.5 GB, most of it PyTorch."
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) install --progress-bar off -r requirements.lock 2>&1 | tee .venv/install.log | $(PROGRESS) || { \
		grep '^ERROR' .venv/install.log >&2; echo "The rest is in .venv/install.log." >&2; exit 1; }
	@$(PIP) install --quiet --quiet --no-deps --editable .
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python jobs/selftrain.py --limit 6000 --eval-limit 2000 --out runs/demo

test: $(INSTALLED)
	@$(BIN)/python -m pytest

lint: $(INSTALLED)
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m mypy
	@$(BIN)/lint-imports

format: $(INSTALLED)
	@$(BIN)/python -m ruff check --fix
	@$(BIN)/python -m ruff format

docs: $(INSTALLED)
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs docs/_build/html
	@echo "docs/_build/html/index.html"

lock: $(INSTALLED)
	@$(BIN)/python -m uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade \
		--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" \
		--output-file requirements.lock pyproject.toml

ui: $(INSTALLED)
	@MLFLOW_DISABLE_TELEMETRY=true $(BIN)/python -m mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///mlflow.db

clean:
	@rm -rf runs/demo docs/_build build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
