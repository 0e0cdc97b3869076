# Two commands do everything a newcomer needs, each in .venv, which it makes itself:
#   make demo    install, then the whole walk on the embedded sample and base
#   make test    install the dev extra, then every quick test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
C := $(wildcard src/lora_cmqa/kernels/_rows.[ch]) # compiled by the install
# Two test processes of one thread each: the tiny models gain nothing from more threads.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.PHONY: demo test test-all check bench lock clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile; echo "make check    lint, types, imports"; echo "make test-all the slow proofs"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt $(C)
	$(PIP) install -q -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt $(C)
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/cmqa demo

test: $(VENV)/.dev
	$(PYTEST) -n 2 -m "not slow and not gpu"

# One after the other with all cores: the slow proofs train and time.
test-all: $(VENV)/.dev
	TOKENIZERS_PARALLELISM=true $(BIN)/python -m pytest -m "slow and not gpu" --durations=15

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(C)
	$(BIN)/mypy
	$(BIN)/lint-imports

# What a release pins by hash: the plain install with demo and track, for Linux with the CPU build of torch.
lock: $(VENV)/.dev
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --generate-hashes --strip-extras --no-annotate \
	  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links -c constraints.txt \
	  --extra demo --extra track -o requirements.lock pyproject.toml

# Training speed beside others: about an hour on 2 quiet cores, a stopped one goes on; one line in results/train.jsonl.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/train.py $(BENCH)
	$(BIN)/python benchmarks/train.py --table

clean:
	rm -rf $(VENV) runs data build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
