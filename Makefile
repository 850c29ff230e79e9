# rnnkern: every command a person needs; `make` lists them.
#
# Each command makes the environment and the extension first and does nothing twice. Variables:
#   PYTHON=python3     the interpreter the environment is made from
#   VENV=.venv         where the environment is
#   TORCH=2.13.0       a torch version, or anything pip accepts (TORCH=torch==2.14.0, TORCH=/path/to/torch.whl)
#   CXX=g++            the compiler
#   ARGS=              passed on, for example make test ARGS="-k lstm", make demo ARGS="--epochs 1"
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
ARGS ?=
export CXX

# The same as in pyproject.toml's build-system: installed first, since the build runs in this environment.
BUILD_TOOLS := "setuptools>=77" "cmake>=3.24" "ninja" "pybind11>=2.13"

torch := $(if $(findstring torch,$(TORCH)),$(TORCH),torch==$(TORCH))
python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check install --quiet
sources := setup.py CMakeLists.txt $(shell find csrc -type f)
cpp := $(shell find csrc rnnkern/_bench benchmarks/gpu -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
# Two `make` at a time take turns in everything that writes to the environment or to build/.
alone = +@$(if $(shell command -v flock),flock Makefile) $(MAKE) --no-print-directory
comma := ,
space := $() $()

.PHONY: help demo test fuzz programs bench sweep streaming gpu-report build lint format ctest asan tsan sanitize cuda-check triton-check triton-oldest tools check clean distclean FORCE
help:
	@echo 'make demo       train, test and show the grapheme-to-phoneme example on our kernels'
	@echo 'make test       run every Python test'
	@echo 'make fuzz       random modules and calls against torch.nn (ARGS="--seconds 3600": for an hour)'
	@echo 'make programs   install programs of others, and test that they run as before, and how much faster'
	@echo 'make bench      measure against torch.nn and others, write benchmarks/results/ (ARGS=--smoke: a few rows)'
	@echo 'make sweep      random shapes against torch.nn; make streaming measures calls of one step'
	@echo 'make gpu-report build, test and measure on a GPU, with the $(PYTHON) and the packages at hand (ARGS="--part layers")'
	@echo 'make build      make the environment ($(VENV)) and build the extension into it'
	@echo 'make lint       ruff, mypy, clang-format; make format mends what they can'
	@echo 'make ctest      the C++ tests; make sanitize runs them under TSan, and with Python tests under ASan + UBSan'
	@echo 'make cuda-check registers, stack and spills of the CUDA kernels against csrc/cuda/resources.json, where nvcc is found'
	@echo 'make triton-check the same of Triton kernels, against rnnkern/triton/resources.json; compiles for minutes (ARGS=--quick: some)'
	@echo 'make triton-oldest the tests of Triton kernels, and triton-check ARGS=--quick, with the oldest Triton that they run on'
	@echo 'make clean      remove what was built; make distclean removes $(VENV) too'

demo: build
	@$(python) examples/g2p.py $(ARGS)

# On all cores; ARGS=-n0: in one process, which --pdb chooses by itself.
spread := -n auto --maxprocesses 8 --dist worksteal
test: build
	@$(python) -m pytest $(spread) $(ARGS)

fuzz: build
	@$(python) -m tests.fuzz $(ARGS)

programs:
	$(alone) $(VENV)/.stamp-programs
	@$(python) -m pytest -s tests/test_programs.py tests/test_importers.py $(ARGS)

bench: build
	@$(python) -m benchmarks.report $(ARGS)

sweep streaming: build
	@$(python) -m benchmarks.$@ $(ARGS)

# Where a GPU is, its Python has a torch of its own: nothing is installed, and the extension is built into the tree.
gpu-report:
	@$(PYTHON) -m benchmarks.gpu $(ARGS)

build:
	$(alone) $(VENV)/.stamp-build

lint:
	$(alone) $(VENV)/.stamp-lint
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy
	@$(VENV)/bin/clang-format --dry-run -Werror $(cpp)

format:
	$(alone) $(VENV)/.stamp-lint
	@$(python) -m ruff check --fix .
	@$(python) -m ruff format .
	@$(VENV)/bin/clang-format -i $(cpp)

# The C++ tests need no torch, but CMake and Ninja come from the environment. $(4): more of CMake's options; $(5): what to
# build, or all.
ctest_in = PATH="$(CURDIR)/$(VENV)/bin:$$PATH"; \
  cmake -S . -B $(1) -G Ninja -DRNNKERN_TORCH=OFF -DRNNKERN_TESTS=ON -DRNNKERN_SANITIZE=$(2) $(4) >$(1).log || { cat $(1).log; exit 1; }; \
  cmake --build $(1) $(5); ctest --test-dir $(1) --output-on-failure -j"$$(nproc)" $(3)

ctest: tools
	@mkdir -p build; $(call ctest_in,build/ctest,,$(ARGS))

sanitize: asan tsan

# And those Python tests that have most to do with memory, on a copy of the package with sanitized kernels.
asan_tests := $(foreach name,nn_step nn_short_calls nn_cell nn_recurrent nn_quantized int8 packed_rows bad_input attention_errors,tests/test_$(name).py)
# But for those that run no kernel of ours, or the same ones by way of torch's compiler, which is slow here.
asan_less := compiled_without or export or opcheck or fake_kernels or meta_device or constructor or what_quantizing or cannot_be_quantized
asan: build
	@mkdir -p build; $(call ctest_in,build/asan,address$(comma)undefined,$(ARGS),-DRNNKERN_TORCH=ON \
	  -DPython_EXECUTABLE="$(CURDIR)/$(python)" -DCMAKE_INSTALL_PREFIX="$(CURDIR)/build/asan/package/rnnkern"); \
	rm -rf build/asan/package; mkdir build/asan/package; cp -r rnnkern tests pyproject.toml build/asan/package; \
	rm -f build/asan/package/rnnkern/*.so; cmake --install build/asan >build/asan.log || { cat build/asan.log; exit 1; }; \
	cd build/asan/package; export ASAN_OPTIONS=detect_leaks=0; \
	preload="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)"; \
	LD_PRELOAD="$$preload" "$(CURDIR)/$(python)" -m tests.fuzz --seconds 20 --seed 1 >fuzz.log 2>&1 & \
	fuzzer=$$!; status=0; \
	LD_PRELOAD="$$preload" "$(CURDIR)/$(python)" -m pytest $(spread) -k "not ($(asan_less))" $(asan_tests) || status=$$?; \
	wait $$fuzzer || status=$$?; cat fuzz.log; exit $$status

# Threads are started in the CPU engines and in the team only.
tsan_tests := layer team workspace attention
tsan: tools
	@mkdir -p build; $(call ctest_in,build/tsan,thread,-R '^($(subst $(space),|,$(tsan_tests)))\.' $(ARGS),,--target $(tsan_tests:%=test_%))

# From what ptxas said in the build, so that kernels are compiled once. ARGS=--update: this is what they need from now on.
cuda-check: build
	@$(python) csrc/cuda/resources.py build/cmake-$$($(python) -c 'import sys; print(sys.implementation.cache_tag)') $(ARGS)

# Without a GPU: the kernels are compiled for several. ARGS=--update: this is what they need from now on.
triton-check: build
	@TRITON_INTERPRET=0 $(python) -m rnnkern.triton.compile $(ARGS)

# Beside the environment, whose torch runs it. Its interpreter fails with NumPy 2.4.
oldest := build/triton-3.6.0
triton-oldest: build
	$(alone) $(oldest)/.stamp
	@export PYTHONPATH="$(CURDIR)/$(oldest)"; \
	TRITON_INTERPRET=1 $(python) -c 'from rnnkern import triton; raise SystemExit(triton.missing_on("cpu") or 0)'; \
	$(python) -m pytest $(spread) tests/test_triton_*.py $(ARGS); \
	TRITON_INTERPRET=0 $(python) -m rnnkern.triton.compile --quick --targets sm_90 gfx942

$(oldest)/.stamp: $(VENV)/.stamp-env
	@echo "installing Triton 3.6.0"; rm -rf $(@D); $(pip) --target $(@D) --no-deps 'triton==3.6.0' 'numpy<2.4'; touch $@

tools:
	$(alone) $(VENV)/.stamp-env

# One line for each thing that is missing.
check:
	@missing=0; need() { echo "rnnkern needs $$1" >&2; missing=1; }; \
	if ! command -v "$(PYTHON)" >/dev/null; then \
	  need "Python 3.10 or later: $(PYTHON) is not found (apt install python3, or make PYTHON=...)"; \
	elif ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
	  need "Python 3.10 or later: $(PYTHON) is $$("$(PYTHON)" -V 2>&1) (make PYTHON=...)"; \
	else \
	  "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || need "Python's venv module (apt install python3-venv)"; \
	  "$(PYTHON)" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	    || need "Python's headers, Python.h (apt install python3-dev)"; \
	fi; \
	if ! command -v $(firstword $(CXX)) >/dev/null; then \
	  need "a C++17 compiler: $(CXX) is not found (apt install g++, 11 or later, or make CXX=...)"; \
	elif ! printf '#if !defined(__clang__) && __GNUC__ < 11\n#error\n#endif\n#include <vector>\n' \
	    | $(CXX) -std=c++17 -x c++ -fsyntax-only - 2>/dev/null; then \
	  need "g++ 11 or later with its standard library: $(CXX) is $$($(CXX) --version 2>&1 | head -n 1)"; \
	fi; \
	exit $$missing

# Stamps, so that nothing is done twice. Reached through $(alone) only.
$(VENV)/.stamp-venv:
	@$(MAKE) --no-print-directory check
	@echo "making $(VENV)"; "$(PYTHON)" -m venv $(VENV); touch $@

# Rewritten, and so newer than what was installed, only when another torch is asked for.
$(VENV)/.torch: $(VENV)/.stamp-venv FORCE
	@echo '$(torch)' | cmp -s - $@ || echo '$(torch)' >$@

$(VENV)/.stamp-env: $(VENV)/.torch
	@echo "installing $(torch) and build tools"; $(pip) '$(torch)' $(BUILD_TOOLS); touch $@

# Without build isolation: the extension is built against the torch that is here, and no second one is downloaded.
$(VENV)/.stamp-build: $(VENV)/.stamp-env pyproject.toml $(sources)
	@$(MAKE) --no-print-directory check
	@echo "building the extension"; $(pip) --no-build-isolation -e '.[demo,bench,test]'; touch $@

# torch is named again, so that no program brings another; silero-vad needs torchaudio for files only.
$(VENV)/.stamp-programs: $(VENV)/.stamp-build
	@echo "installing programs"; $(pip) --no-build-isolation '$(torch)' -e '.[programs,importers]'; $(pip) --no-deps silero-vad; touch $@

$(VENV)/.stamp-lint: $(VENV)/.stamp-build
	@echo "installing the linters"; $(pip) --no-build-isolation -e '.[lint]'; touch $@

clean:
	rm -rf build dist *.egg-info rnnkern/*.so $(VENV)/.stamp-build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
