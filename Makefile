# `make demo` and `make test` need Python >= 3.11, git and a package registry; everything goes into .venv.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist worksteal
DEMO_DIR ?= runs/demo
COMPRESS_DIR ?= runs/compressed
# Peers that conversions are compared with, some 1.5 GB; `make test REFEREES=` goes without them. TensorFlow, saved-model, is one too;
# in one process with a torch that has triton it crashes.
REFEREES ?= gguf referees onnx

PY := $(VENV)/bin/python
BIN := $(VENV)/bin

.PHONY: help demo compress_demo test lint clean
.DEFAULT_GOAL := help

help: ## This list.
	@awk -F ':.*## ' '/^[a-z_]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Train a small GPT on Python's own source, evaluate it, sample from it: runs/demo/report.html
	$(PY) -m experiments.demo --workdir=$(DEMO_DIR)

compress_demo: $(VENV)/.installed ## Prune, quantise, distil and share the demo's model; all beside it: runs/compressed/report/compress.html
	$(PY) -m experiments.compress_demo --demo=$(DEMO_DIR) --workdir=$(COMPRESS_DIR)

test: $(VENV)/.installed-test ## The whole test suite, on 8 simulated CPU devices.
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-test ## ruff, mypy on signatures, the import levels, the size budget.
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PY) -m tools.lint_budget

clean: ## Remove the environment and the tools' caches; runs/ stays.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# The stamps are written last, so that an interrupted installation is taken up again.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "gptjax needs Python >= 3.11, got: $$($(PYTHON) --version 2>&1 || true)."; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.installed: setup.py | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: setup.py | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@for peer in $(REFEREES); do \
	  $(PY) -m pip install --quiet --disable-pip-version-check --editable ".[$$peer]" || \
	    echo "WARNING: .[$$peer] could not be installed: tests that compare with it are skipped."; \
	done
	@case ' $(REFEREES) ' in *' onnx '*) $(PY) -m pip install --quiet --disable-pip-version-check --no-deps jax2onnx || \
	  echo "WARNING: jax2onnx could not be installed: tests of ONNX are skipped.";; esac
	@touch $(VENV)/.installed $@
