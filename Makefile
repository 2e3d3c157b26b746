# make demo | test | bench | lint: each sets up what it needs, once. `make help` lists the usual ones.
#
# PYTHON=/path names another interpreter: if it has torch it is used as it is, and gets what it lacks; if not, it is
# what makes .venv, as python3 does by default.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup build cpp-tests test test-all emulated test-cuda bench-cuda bench-kernels cuda-link sanitize clang demo bench docs wheel lint format clean distclean

GIVEN := $(filter-out undefined default,$(origin PYTHON))
PYTHON ?= python3
ifdef GIVEN
  # sys.executable where it has torch, "none" where it has not, empty where it does not run
  TORCH_PYTHON := $(shell $(PYTHON) -c 'import importlib.util as u, sys; print(sys.executable if u.find_spec("torch") else "none")')
  $(if $(TORCH_PYTHON),,$(error PYTHON=$(PYTHON) does not run))
endif
ifneq ($(filter-out none,$(TORCH_PYTHON)),)
  PY := $(TORCH_PYTHON)
  STATE := build/state/$(subst /,_,$(PY))
  SETUP := --use $(PY)
else
  PY := $(CURDIR)/.venv/bin/python
  STATE := .venv/state
  SETUP := --venv .venv $(PYTHON)
endif
export PATH := $(dir $(PY)):$(PATH)
# Read by setup.py: the C++ tests share the package's build tree.
export CMAKE_ARGS := -DMASKED_LOSS_TESTS=ON $(CMAKE_ARGS)
# `build` shows what pip prints.
export MASKED_LOSS_PROGRESS := 0

BUILD := build/package
SOURCES := CMakeLists.txt VERSION setup.py pyproject.toml $(wildcard cmake/* csrc/*.* csrc/*/*.* csrc/*/*/*.* python/src/*)
CPP := $(filter-out %.txt,$(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.* python/src/*.cpp tests/cpp/*.cpp tests/cpp/*.h tests/cuda_emulation/*.* tests/cuda_emulation/*/*.* benchmarks/kernels/*.* examples/cpp/*.cpp))

help:
	@echo 'make demo     train a small character model and draw what the mask does'
	@echo 'make test     GoogleTest and pytest, in minutes; says what it leaves to make test-all'
	@echo 'make test-all  every test, CUDA kernels compiled and emulated, sanitizers, clang, the oldest torch'
	@echo 'make bench    timings against torch.nn.functional'
	@echo 'make test-cuda, make bench-cuda  the same on a GPU; make cuda-link  a CUDA build without one'
	@echo 'make bench-kernels  one program, without torch, that times the kernels on a GPU'
	@echo 'make wheel    a wheel, in build/dist'
	@echo 'make docs     the documentation, into build/docs'
	@echo 'make lint     ruff and clang-format; no Python in csrc/'
	@echo 'make format   apply ruff and clang-format'
	@echo 'make build    set up and build the package, which demo, test and bench do first'
	@echo 'make clean    remove what was built; make distclean: .venv too'
	@echo 'PYTHON=/path/to/python make ... uses an interpreter that has torch, instead of .venv'

setup: $(STATE)/ready
$(STATE)/ready: requirements.txt tools/setup.sh
	@tools/setup.sh $(SETUP)
	@mkdir -p $(STATE) && touch $@

# One interpreter at a time: the extension module lies in the source tree.
build: $(STATE)/built
$(STATE)/built: $(STATE)/ready $(SOURCES)
	@echo '== Building masked_loss for $(PY)'
	@rm -f build/state/*/built .venv/state/built; mkdir -p build
	@set -o pipefail; $(PY) -m pip install --verbose --no-build-isolation --no-deps --editable . 2>&1 \
	  | tee build/package.log | sed -un '/^ *\[[0-9]*\/[0-9]*\] [BL]/p' \
	  || { tail -n 80 build/package.log; echo '== The build failed; the whole log: build/package.log'; exit 1; }
	@touch $@

cpp-tests: build
	@echo '== Building the C++ tests'
	@cmake -S . -B $(BUILD) -DMASKED_LOSS_TESTS=ON > build/configure.log 2>&1 || { cat build/configure.log; exit 1; }
	@cmake --build $(BUILD) --target masked_loss_tests

# All steps run, whatever one says; the last lines are their summaries.
test: cpp-tests
	@$(PY) tools/run_tests.py fast

test-all: cpp-tests
	@$(PY) tools/run_tests.py all

# The Python tests on the CUDA kernels, emulated on the CPU: make emulated PYTEST_ARGS='tests/python/test_masks.py'
emulated: cpp-tests
	@cmake --build $(BUILD) --target masked_loss_emulated
	@$(PY) -m pytest --emulated $(PYTEST_ARGS)

# With a CUDA build of the oldest torch. Needs nvcc and network, but no GPU.
cuda-link: setup
	@echo '== Linking with a CUDA build of torch'
	@$(PY) tools/cuda_link.py

# The CPU's library with the address and undefined-behaviour sanitizers.
sanitize: setup
	@$(PY) tools/check_cpu.py sanitize

# Every source by itself, read by clang.
clang: setup
	@$(PY) tools/check_cpu.py clang

# Builds for this machine's GPU.
test-cuda: setup
	@architecture=$$($(PY) tools/test_cuda.py --require) && rm -f $(STATE)/built && \
	  TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$$architecture} $(MAKE) --no-print-directory cpp-tests
	@$(PY) tools/test_cuda.py $(PYTEST_ARGS)

bench-cuda: setup
	@architecture=$$($(PY) tools/test_cuda.py --require) && rm -f $(STATE)/built && \
	  TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$$architecture} $(MAKE) --no-print-directory build
	@$(PY) benchmarks/run_cuda.py $(BENCH_ARGS)

# One program that times every launcher on a GPU; needs nvcc, but neither torch nor a GPU. Prints where it is.
bench-kernels:
	@$(or $(wildcard $(PY)),python3) tools/check_cuda.py bench

demo: build
	@$(PY) examples/char_language_model.py $(DEMO_ARGS)

bench: build
	@$(PY) benchmarks/run.py --json benchmarks/results/cpu.json --plots docs $(BENCH_ARGS)

# Warnings are errors.
docs: build
	@echo '== Building the documentation'
	@$(PY) -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs
	@echo 'build/docs/index.html'

# For this interpreter, its torch's minor version and, with CUDA, TORCH_CUDA_ARCH_LIST.
wheel: build
	@$(PY) -m build --wheel --no-isolation --outdir build/dist .

lint: setup
	@echo '== Lint'
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@clang-format --dry-run -Werror $(CPP)
	@! grep -rnE 'Python\.h|pybind11|torch/extension\.h|torch/csrc/utils/pybind' csrc \
	  || { echo 'csrc/ has to build without Python'; exit 1; }

format: setup
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@clang-format -i $(CPP)

clean:
	rm -rf build out python/masked_loss/{include,lib,_build.py,_C*.so} python/*.egg-info
	rm -f .venv/state/built

distclean: clean
	rm -rf .venv
