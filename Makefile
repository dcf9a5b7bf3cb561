# make demo        train a small model by RL on its highest-entropy tokens, from nothing
# make test        gtests and pytest on the CPU
# make test-report the report of `entropy-rl inspect` in a headless Chromium
# make test-verl   the verl integration, in an environment of its own; make test-verl-full: every mode and recipe
# make test-trl    the trainer for TRL against TRL's own, in an environment of their own
# make test-gpu    on a GPU: the op tests, compute-sanitizer; fails where there is none
# make gpu-bundle  the wheels that tests/gpu/run_all.sh needs on a GPU machine without a network
# make bench       every op beside its peers: DEVICE=cpu, ARGS='--op policy_loss'; writes benchmarks/results
# make performance docs/performance.md from benchmarks/results
# make wheel       the CPU wheel, for torch 2.11 and Python 3.10 and later; make test-wheel tests it under a newer torch
# make cuda-build  the CUDA wheel, built and tested without a GPU; fails on local memory or narrow loads
# make test-emulated  the CUDA wheel on an emulated device, without a GPU; make test-emulated-full: every op test
# make instruction-counts  docs/cuda_instructions.md from the emulated device
# make lint        formatting and types; make format mends the formatting
#
# Each target makes the virtual environment it needs. PYTHON chooses the interpreter, ENTROPY_RL_SIMD (avx512, avx2,
# portable) the instruction set of the CPU kernels, by default the widest that the processor has.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
JOBS ?= $(shell nproc)
BIN := .venv/bin
CUDA_BIN := .venv-cuda/bin
VERL_BIN := .venv-verl/bin
TRL_BIN := .venv-trl/bin
BENCH_BIN := .venv-bench/bin
# What `make test-gpu` runs under: an interpreter that has torch, pytest, hypothesis and the installed wheel.
GPU_PYTHON ?= $(PYTHON)
CUDA_TORCH := torch==2.14.1
# Pure Python, for a GPU machine that has torch: the tests' needs, and peers of the benchmarks.
GPU_WHEELS := pytest iniconfig packaging pluggy pygments hypothesis sortedcontainers trl==1.16.0 liger-kernel==0.8.5

# The tested versions, for what is installed and for what pip's isolated builds install.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := setup.py $(wildcard csrc/*.* csrc/*/*.*)
CPP_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*.h tests/cpp/*.cpp tests/cpp/*.h tests/emulator/*.cu tests/emulator/src/*.cpp tests/emulator/src/*.h)
PYTHON_FILES := setup.py entropy_rl_ext python recipe tests benchmarks

.PHONY: help demo test gtest pytest test-report test-verl test-verl-full test-trl test-gpu gpu-bundle bench performance wheel test-wheel cuda-build emulator test-emulated test-emulated-full instruction-counts lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# The development environment, with the package built in place; a change of the sources builds it again.
.venv/libraries: $(SOURCES) pyproject.toml constraints.txt
	[ -d .venv ] || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch setuptools ninja pybind11
	$(BIN)/pip install -q --no-build-isolation -e '.[train,test,lint]'
	touch $@

demo: .venv/libraries
	$(BIN)/python -m entropy_rl.demo

test: gtest pytest

gtest: .venv/libraries
	[ -e /usr/include/gtest/gtest.h ] || { apt-get update -qq && apt-get install -y -qq libgtest-dev; }
	$(BIN)/cmake -S . -B build/gtest -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DTORCH_INCLUDE_DIRS="$$($(BIN)/python -c 'import torch.utils.cpp_extension as e; print(";".join(e.include_paths()))')"
	$(BIN)/cmake --build build/gtest -j $(JOBS)
	$(BIN)/ctest --test-dir build/gtest --output-on-failure -j $(JOBS)

pytest: .venv/libraries
	$(BIN)/pytest tests --ignore tests/integrations --ignore tests/gpu --ignore tests/browser --ignore tests/wheel -q

test-report: .venv/libraries
	command -v chromedriver || { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; }
	$(BIN)/pytest tests/browser -q

.venv-verl/environment: tests/integrations/verl/requirements.txt
	$(PYTHON) -m venv .venv-verl
	PIP_CONSTRAINT= $(VERL_BIN)/pip install -q -r tests/integrations/verl/requirements.txt
	touch $@

test-verl: .venv-verl/environment
	$(VERL_BIN)/pip install -q --no-deps .
	$(VERL_BIN)/pytest tests/integrations/verl -q -m 'not full'

test-verl-full: test-verl
	$(VERL_BIN)/pytest tests/integrations/verl -q -m full

.venv-trl/environment: tests/integrations/trl/requirements.txt
	$(PYTHON) -m venv .venv-trl
	PIP_CONSTRAINT= $(TRL_BIN)/pip install -q -r tests/integrations/trl/requirements.txt
	touch $@

test-trl: .venv-trl/environment .venv/libraries
	PYTHONPATH=$(CURDIR):$(CURDIR)/python $(TRL_BIN)/pytest tests/integrations/trl -q

# verl, TRL and Liger in one environment, so that each meets the same inputs in the same process.
.venv-bench/environment: benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	PIP_CONSTRAINT= $(BENCH_BIN)/pip install -q -r benchmarks/requirements.txt
	touch $@

DEVICE ?= cpu
bench: .venv/libraries .venv-bench/environment
	PYTHONPATH=.:python $(BENCH_BIN)/python -W ignore -m benchmarks --device $(DEVICE) $(ARGS)

performance: .venv/libraries
	$(BIN)/python -m benchmarks.report

.venv-cuda/environment: Makefile
	$(PYTHON) -m venv .venv-cuda
	PIP_CONSTRAINT= $(CUDA_BIN)/pip install -q $(CUDA_TORCH) 'setuptools>=77' wheel ninja pybind11 numpy pytest hypothesis
	touch $@

wheel: .venv/libraries
	rm -rf build/lib* build/temp* build/bdist* dist
	ENTROPY_RL_ABI3=1 $(BIN)/pip wheel -q . --no-deps --no-build-isolation -w dist

test-wheel: wheel .venv-cuda/environment
	$(BIN)/pip install -q 'abi3audit>=0.0.26' 'twine>=6'
	rm -rf build/kernels  # apart: transformers finds it where it is installed, and not every version goes with it
	$(BIN)/pip install -q --no-deps --target build/kernels 'kernels>=0.17'
	$(BIN)/twine check --strict dist/*.whl
	$(BIN)/abi3audit --strict --summary dist/*.whl
	$(BIN)/pytest tests/wheel -q
	@echo "the wheel, built under $$($(BIN)/python -c 'import torch; print(torch.__version__)'), under another torch:"
	$(CUDA_BIN)/pip install -q --no-deps --force-reinstall dist/*.whl
	$(CUDA_BIN)/python -c "import torch, entropy_rl_ext as e; print(torch.__version__, e.build_info()); assert e.build_info()['torch'] != torch.__version__"
	$(CUDA_BIN)/pytest tests/test_registration.py tests/ops -q

# The CUDA wheel, in dist/ until `make wheel` puts the CPU wheel there.
dist/cuda: .venv-cuda/environment pyproject.toml $(SOURCES) $(shell find entropy_rl_ext python -name '*.py')
	rm -rf build/lib* build/temp* build/bdist* build/wheel dist
	ENTROPY_RL_ABI3=1 $(CUDA_BIN)/pip wheel -q . --no-deps --no-build-isolation -w dist
	touch $@

cuda-build: dist/cuda .venv/libraries
	$(CUDA_BIN)/pip install -q --no-deps --force-reinstall dist/*.whl
	cd build && ../$(CUDA_BIN)/python -c "import entropy_rl_ext as e; info = e.build_info(); print(info); assert info['cuda'], 'the wheel holds no CUDA kernels'"
	$(CUDA_BIN)/python tools/compile_report.py .venv-cuda/lib/python3*/site-packages/entropy_rl_ext/_cuda.abi3.so --markdown docs/cuda_kernels.md
	$(CUDA_BIN)/pytest tests/test_registration.py tests/ops -q
	@echo "the same wheel under a CPU build of torch:"
	$(BIN)/pip install -q --no-deps --target build/wheel dist/*.whl
	PYTHONPATH=build/wheel $(BIN)/pytest tests/test_registration.py tests/ops/test_token_entropy.py -q

# The emulated CUDA device (docs/emulation.md): libcudaemu.so, the CUDA wheel and the PTX of its kernels.
build/emulator/package: dist/cuda
	rm -rf $@ build/emulator/ptx
	mkdir -p build/emulator/ptx
	$(CUDA_BIN)/pip install -q --no-deps --target $@ dist/*.whl
	cuobjdump=$$(PYTHONPATH=tools $(CUDA_BIN)/python -c 'import compile_report; print(compile_report.find_cuobjdump())'); \
	  cd build/emulator/ptx && "$$cuobjdump" --extract-ptx all ../package/entropy_rl_ext/_cuda.abi3.so > /dev/null
	touch $@

emulator: build/emulator/package
	$(MAKE) -C tests/emulator -j $(JOBS)

test-emulated: emulator
	tests/emulator/run_tests.sh $(CUDA_BIN) quick

test-emulated-full: emulator
	tests/emulator/run_tests.sh $(CUDA_BIN) full

instruction-counts: emulator
	tests/emulator/run.sh $(CUDA_BIN)/python tools/instruction_counts.py docs/cuda_instructions.md

test-gpu:
	GPU_PYTHON=$(GPU_PYTHON) tests/gpu/run_all.sh tests sanitizers

gpu-bundle: cuda-build
	rm -rf build/gpu/wheels
	$(CUDA_BIN)/pip download -q -d build/gpu/wheels --no-deps --only-binary=:all: --implementation py --abi none --platform any $(GPU_WHEELS)
	cp dist/*.whl build/gpu/wheels

lint: .venv/libraries
	$(BIN)/ruff check $(wildcard $(PYTHON_FILES))
	$(BIN)/ruff format --check $(wildcard $(PYTHON_FILES))
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: .venv/libraries
	$(BIN)/ruff check --fix $(wildcard $(PYTHON_FILES))
	$(BIN)/ruff format $(wildcard $(PYTHON_FILES))
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf .venv .venv-bench .venv-cuda .venv-trl .venv-verl build dist entropy_rl_ext/*.so
