# Every verb sets itself up: a fresh clone needs Python 3.9 or newer, git, make and a C compiler, nothing else.
PYTHON ?= $(or $(firstword $(foreach name,python3.11 python3,$(shell command -v $(name)))),python3)
CONFIG ?= configs/local.yaml
MINUTES ?= 15
SECONDS ?= 60
RATE ?= 1
ARRIVALS ?= poisson
WORKERS ?= 1
PROCESSES ?= 4
BIN    := .venv/bin

# Compiled modules are kept even where the caller's environment forbids it: every test process would compile them anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install serve demo-metrics lint format test test-fast coverage test-k8s test-slow load bench bench-full bench-check bench-gpu soak checkpoint clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: ## make .venv ready (pinned dependencies; a second run takes a moment)
	@$(PYTHON) requirements/install.py

checkpoint: install ## write the nano checkpoint to checkpoints/nano
	@$(BIN)/python -m serving.nano.build

serve: install ## start the stack in the foreground, on PORT if given (Ctrl-C stops everything)
	@$(if $(PORT),SERVING__ROUTER__PORT=$(PORT)) exec $(BIN)/serving up --config $(CONFIG)

demo-metrics: install ## the stack with a Prometheus beside it, whose address is printed (Ctrl-C stops both)
	@$(if $(PORT),SERVING__ROUTER__PORT=$(PORT)) exec $(BIN)/python -m serving.cli.demo_metrics --config $(CONFIG)

lint: install ## ruff, mypy --strict, import-linter, no loops between folders
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/draw_rooms.py --check

format: install ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: install ## the tests that every change must pass, in PROCESSES processes
	$(BIN)/python -m pytest -n $(PROCESSES)

test-fast: install ## those of them that start no stack, server or browser: the inner loop
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not heavy"

coverage: install ## lines and branches that `make test` runs, by room, and what no test reaches
	$(BIN)/python -m coverage erase
	$(BIN)/python -m pytest -n $(PROCESSES) --cov --cov-report= || true
	$(BIN)/python -m tests.support.coverage_by_room

test-k8s: install ## manifests, images and their names, checked offline (`make test` does that too)
	$(BIN)/python -m pytest tests/k8s

test-slow: install ## proofs that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu"

load: install ## realistic users for a minute, against a stack of its own if none runs; SECONDS, RATE, ARRIVALS, WORKERS, URL
	@$(BIN)/python -m benchmarks.load $(if $(URL),--url $(URL)) --seconds $(SECONDS) --rate $(RATE) \
	  --arrivals $(ARRIVALS) --workers $(WORKERS)

bench: install ## run every benchmark, draw plots, write benchmarks/README.md: about thirty-five minutes of an idle machine
	@$(BIN)/python -m benchmarks

bench-full: install ## the same with every round of each: over an hour
	@$(BIN)/python -m benchmarks --full

bench-check: install ## compare the results' ratios with the committed baseline
	@$(BIN)/python -m benchmarks.check

bench-gpu: install ## the harness against the published checkpoint on this machine's GPUs; ARGS=--dry-run says how
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

.PHONY: check-gpu
check-gpu: install ## what only a GPU can settle about the published checkpoint, in minutes; ARGS=--dry-run runs it without one
	@$(BIN)/python -m benchmarks.check_gpu $(ARGS)

soak: install ## load, departures and kills for MINUTES, with a verdict
	@$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

.PHONY: rehearsal
rehearsal: install ## the Kubernetes overlay cpu-dev on a Ray cluster in network namespaces, nodes killed under load (root)
	$(BIN)/python -m benchmarks.rehearsal

clean: ## remove everything that was made here
	rm -rf .venv checkpoints .pytest_cache .mypy_cache .ruff_cache
