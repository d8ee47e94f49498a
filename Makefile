# One command per habit; `make help` lists them. Every target sets up what it needs, once, in $(VENV).
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)

# pip, because it is the one installer that prefers a locally provided CPU build of torch (see constraints.txt).
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CODE = src tests examples benchmarks training
# A GPU machine may have no environment of ours: its own torch will do.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)
SET_UP_FROM = pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/alisa/kernels/native/csrc/**/*)

.PHONY: help demo test test-isa slow-test models real-test ray-test gpu-check check format clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.ready-core  ## generate with the model inside the package, dense against sparse (about two minutes with set-up)
	@$(VENV)/bin/python examples/demo.py

# One process for each core, each with one thread (tests/conftest.py); more than eight would only take memory.
FAST_TESTS = $(VENV)/bin/python -m pytest -m "not gpu and not slow and not real" --numprocesses logical --maxprocesses 8 --dist worksteal

test: $(VENV)/.ready-dev  ## the tests, without those that need a GPU or more than a few seconds
	$(FAST_TESTS)

# Vector widths of torch, the BLAS of numpy, and threads. Two of them in each process are more than there are cores, so
# those that wait must not spin.
ISA_SETTINGS = ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Haswell OMP_NUM_THREADS=1

test-isa: $(VENV)/.ready-dev  ## the same tests as another processor would run them: vector widths, BLAS, one thread
	@failed=0; verdicts=""; \
	for setting in $(ISA_SETTINGS); do \
	  echo "== $$setting"; verdict=passed; \
	  env OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive "$$setting" $(FAST_TESTS) -q || { verdict=FAILED; failed=1; }; \
	  verdicts+="$$verdict  $$setting"$$'\n'; \
	done; \
	printf '\n%s' "$$verdicts"; exit $$failed

slow-test: $(VENV)/.ready-dev  ## the slow tests
	$(VENV)/bin/python -m pytest -m "slow and not gpu and not real"

models: $(VENV)/.ready-dev  ## the two real models (325 MiB) into ALISA_MODELS, by default ~/.cache/alisa/models
	@$(VENV)/bin/python benchmarks/real_models.py

real-test: $(VENV)/.ready-dev  ## the tests on real models; those whose model is not there are skipped (`make models`)
	$(VENV)/bin/python -m pytest -m "real and not gpu"

ray-test: $(VENV)/.ready-dev  ## installs Ray (0.75 GB), then runs the tests of many machines
	$(PIP_INSTALL) -e '.[dev,ray]'
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/dist

gpu-check:  ## with an NVIDIA GPU: its tests, kernels, and engines end to end in 16 GiB; eight minutes, no download
	PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu_check.py --output benchmarks/results/gpu.jsonl

check: $(VENV)/.ready-dev  ## format, lint, types, import direction, figures in the documents
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/pyrefly check
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python benchmarks/tables.py --check

format: $(VENV)/.ready-dev  ## rewrite the code in the one format, mend what ruff can mend
	$(VENV)/bin/ruff format $(CODE)
	$(VENV)/bin/ruff check --fix $(CODE)

clean:  ## remove what runs leave behind; the environment stays
	rm -rf build dist out .pytest_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the environment too
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
	  || { echo "alisa needs Python 3.11 or 3.12, and $(PYTHON) is not that; say which one to use: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-core: $(SET_UP_FROM) | $(VENV)/bin/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.ready-dev: $(SET_UP_FROM) | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.ready-core

# Other engines on the same workload, each in its own environment, because they ask for different versions of the same
# packages; `alisa bench run` runs them. What is in NAME.no-deps.txt comes without what it requires.
PEERS = transformers vllm openvino kvpress llamacpp
.PHONY: peers $(PEERS:%=peer-%)

peers: $(PEERS:%=peer-%)  ## the engines that benchmarks compare with, under .peers; one of them: make peer-vllm

$(PEERS:%=peer-%): peer-%: .peers/%/.ready

PEER_PIP_INSTALL = .peers/$*/bin/python -m pip install --quiet --disable-pip-version-check
.peers/%/.ready: benchmarks/peers/requirements/%.txt
	$(PYTHON) -m venv .peers/$*
	$(PEER_PIP_INSTALL) -r $<
	$(if $(wildcard $(<:.txt=.no-deps.txt)),$(PEER_PIP_INSTALL) --no-deps -r $(<:.txt=.no-deps.txt))
	@touch $@
