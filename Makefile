# make demo   the whole job on a small fixed subset, from images to a table
# make demo TORCH=cpu   the same with PyTorch's CPU build, as by itself where no NVIDIA driver is
# make test   the tests without the slow ones, about a quarter of an hour      make test-all   all tests
# make lint   what .ci/run and pre-commit check
# make ui     compare runs, in MLflow  make docs   these pages as a site, in docs/_build/html
# make lock   pin the newest versions that fit pyproject.toml, for users and for developers
# make clean  caches and runs/demo (the environment and other runs stay; they can be removed by hand)

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
USERS := .venv/.installed
DEVELOPERS := .venv/.installed-dev
PIP := PYTHONUNBUFFERED=1 $(BIN)/python -m pip --disable-pip-version-check
# Of pip's many lines, one for each large package as it comes and one when all are there.
PROGRESS := while read -r verb what size; do case "$$verb $$size" in \
	"Downloading ("[0-9][0-9]*.*" MB)") what=$${what\#\#*/}; echo "  $${what%%-*} $$size" ;; \
	"Installing "*) echo "  unpacking" ;; esac; done
# pip would compile the modules one after the other; compileall does it on all processors.
INSTALL = $(PIP) install --no-compile --progress-bar off $(1) 2>&1 | tee .venv/install.log | $(PROGRESS) || { \
	grep '^ERROR' .venv/install.log >&2; echo "The rest is in .venv/install.log." >&2; exit 1; }; \
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib || true

# PyTorch's CPU build needs no CUDA packages. It is taken with TORCH=cpu, or by itself on a Linux without an NVIDIA driver, if
# pip finds it; TORCH=cuda takes the ordinary build, the only one on macOS. This counts when .venv is made.
TORCH ?= $(shell [ "$$(uname)" != Linux ] || [ -e /proc/driver/nvidia ] || command -v nvidia-smi >/dev/null \
	&& echo cuda || echo cpu)
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# torch and torchvision must be of the same build. The locks' hashes hold for everything but this build: it lies on an index of
# its own, which `make lock` does not ask.
CPU_PINS = $(shell sed -nE 's/^(torch|torchvision)==([^ ;]+).*/\1==\2+cpu/p' requirements.lock)
WITHOUT_TORCH := sed -E '/^(cuda-|nvidia-|torch(vision)?==|triton==)/,/[^\\]$$/d'
# An index that does not answer is given up after 10 seconds.
FIND_CPU_PINS = for pin in $(CPU_PINS); do timeout 10 $(BIN)/python -m pip index versions "$${pin%==*}" --retries 0 \
	--index-url $(CPU_INDEX) 2>/dev/null | grep -F "$${pin\#*==}" >/dev/null || exit 1; done

.PHONY: help demo test test-all lint format docs lock ui clean

help:
	@sed -n 's/^# make/make/p' Makefile

# The environment is made once and again when the lock changes. An interrupted installation leaves no stamp.
$(USERS): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "lpclip needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv
	@size="about 3 GB"; lock=requirements.lock; cpu=; \
	if [ "$(TORCH)" = cpu ] && ($(FIND_CPU_PINS)); then \
		lock=.venv/without-torch.lock; $(WITHOUT_TORCH) requirements.lock >$$lock; cpu="--index-url $(CPU_INDEX) $(CPU_PINS)"; \
	elif [ "$$(uname)" = Linux ]; then \
		size="about 7.5 GB, most of it for CUDA"; \
		[ "$(TORCH)" != cpu ] || echo "pip finds no $(CPU_PINS) at $(CPU_INDEX), so it takes PyTorch's ordinary build."; \
	fi; \
	echo "Making .venv from requirements.lock: a few minutes and $$size."; \
	$(call INSTALL,--no-deps -r $$lock); \
	[ -z "$$cpu" ] || { $(call INSTALL,--no-deps $$cpu); }
	@$(PIP) install --quiet --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(DEVELOPERS): requirements-dev.lock $(USERS)
	@echo "Adding the developers' tools to .venv from requirements-dev.lock: a minute and about 0.3 GB."
	@$(WITHOUT_TORCH) requirements-dev.lock >.venv/without-torch.lock
	@$(call INSTALL,--no-deps -r .venv/without-torch.lock)
	@touch $@

demo: $(USERS)
	@$(BIN)/python jobs/selftrain.py --limit 2500 --eval-limit 1000 --out runs/demo

test: $(DEVELOPERS)
	@$(BIN)/python -m pytest -m "not slow"

test-all: $(DEVELOPERS)
	@$(BIN)/python -m pytest

lint: $(DEVELOPERS)
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m mypy
	@$(BIN)/lint-imports

format: $(DEVELOPERS)
	@$(BIN)/python -m ruff check --fix
	@$(BIN)/python -m ruff format

docs: $(DEVELOPERS)
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs docs/_build/html
	@echo "docs/_build/html/index.html"

# With the packages of CUDA, which the CPU build does not need, so that every package has hashes.
COMPILE := $(BIN)/python -m uv pip compile --quiet --universal --python-version 3.11 --upgrade --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" pyproject.toml
lock: $(DEVELOPERS)
	@$(COMPILE) --all-extras --output-file requirements-dev.lock
	@$(COMPILE) --constraint requirements-dev.lock --output-file requirements.lock

ui: $(USERS)
	@$(BIN)/lpclip ui

clean:
	@rm -rf runs/demo docs/_build build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
