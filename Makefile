# `make demo` and `make test` need nothing but Python 3.11 or newer with venv: both set up .venv.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest --numprocesses=auto --maxprocesses=8 --dist=loadgroup
GPU_NEEDS := torch numpy setuptools pybind11 pytest hypothesis

.PHONY: demo test check lint bench gpu

demo: .venv/installed
	$(BIN)/dpm-fast train swiss-roll --out runs/demo --resume auto

test: .venv/installed
	$(PYTEST) -m "not slow"

check: .venv/installed
	$(PYTEST) -m slow

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The faster setting of glibc's malloc for eager PyTorch: a fair baseline.
bench: export GLIBC_TUNABLES := glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456
bench: .venv/installed
	$(BIN)/pytest benchmarks --benchmark-only

# On a GPU machine: with its own Python and torch, nothing downloaded, nothing installed.
gpu:
	@$(PYTHON) -c "import importlib.util, sys; \
	lacking = [name for name in '$(GPU_NEEDS)'.split() if not importlib.util.find_spec(name)]; \
	sys.exit('make gpu: $(PYTHON) lacks ' + ', '.join(lacking) if lacking else 0)"
	$(PYTHON) -m benchmarks.gpu

# Where there is no GPU, nothing here runs the CUDA module, and nvcc would take a minute.
.venv/installed: export DPM_FAST_CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)
.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[all,test,dev]'
	touch $@
