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
.PHONY: demo install test test-slow check docs clean

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

# pip would compile thousands of files one by one; not all that packages carry is for this Python.
define install
	$(BIN)/python -m pip install -q "pip>=24"
	$(BIN)/python -m pip install -q --no-compile -e ".[$(1)]"
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
endef

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-compile: pyproject.toml | $(VENV)/bin/python
	$(call install,compile)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(call install,dev)
	@touch $@ $(VENV)/.installed-compile

clean:
	rm -rf .demo build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
