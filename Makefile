# make demo: install, compile the shipped example for the CPU, generate text.   make test: all that CI needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUNDLE ?= .demo/tiny-deepseek-v2.moec
PROMPT ?= In the beginning God
# Test processes: one a core, each with one thread of its own; what is made for a file is made in one of them.
JOBS ?= auto

# What a recipe that failed has half made is made again.
.DELETE_ON_ERROR:
.PHONY: demo install test test-slow check docs lock clean

demo: $(VENV)/.installed-compile
	@mkdir -p $(dir $(BUNDLE))
	$(BIN)/moec compile examples/tiny-deepseek-v2 -o $(BUNDLE) --target cpu --force
	$(BIN)/moec generate $(BUNDLE) "$(PROMPT)" --max-new-tokens 96 --seed 7 --stats
	@echo "bundle: $(BUNDLE)"

install: $(VENV)/.installed-dev

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal -m "not slow and not gpu"

test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal -m "slow and not gpu"

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(mypy)
	$(BIN)/lint-imports --no-cache

# Exit status 2: workers have three seconds to start, which a busy machine may not give them.
mypy = $(BIN)/mypy -n auto || { [ $$? = 2 ] && $(BIN)/mypy; }

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py

# The packages in constraints.txt, for every Python and processor that moec is for; UPGRADE=yes: their newest versions.
lock: $(VENV)/bin/python
	$(pip) pip uv
	$(resolve) --universal --python-version 3.11 $(if $(UPGRADE),--upgrade) -o constraints.txt \
		--annotation-style line --custom-compile-command "make lock"
	for python in 3.11 3.12 3.13; do for processor in x86_64 aarch64; do \
		$(resolve) --python-version $$python --python-platform $$processor-manylinux_2_28 \
			--only-binary :all: --constraint constraints.txt >/dev/null || exit; \
	done; done

resolve = $(BIN)/uv pip compile -q pyproject.toml --all-extras --group tools

pip = $(BIN)/python -m pip install -q --constraint constraints.txt

# pip would compile thousands of files one by one; not all that packages carry is for this Python, or ever imported.
define install
	$(pip) pip setuptools
	$(pip) --no-build-isolation --no-compile --editable ".[$(1)]"
	$(BIN)/python -m compileall -q -j 0 -x '/tests/|/(modular|convert)_\w+\.py$$' $(VENV)/lib >/dev/null || true
endef

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-compile: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,compile)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,dev)
	@touch $@ $(VENV)/.installed-compile

clean:
	rm -rf .demo build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
